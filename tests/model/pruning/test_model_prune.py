"""Pruning whole models: every family, in memory and from a folder, against first principles."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import (
    FAMILIES,
    WordTokenizer,
    patched,
    save,
    save_tokenizer,
    tiny,
    tokens,
)
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import maskopt
from maskopt import NM, Unstructured, prune_model
from maskopt.errors import DataError, MaskoptError, ModelError, PatternError, SolverError
from maskopt.model.blocks import Blocks, choose, matrix
from maskopt.model.verify import verify_output

WANDA: dict[str, Any] = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1}


def reload(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()


def same(one: Any, two: Any) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_and_a_model_in_memory_end_alike(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    dense = save(model, tmp_path / "dense", shard="40KB")
    report = prune_model(dense, tokens(), output=tmp_path / "out", threads=2, **WANDA)
    in_memory = prune_model(model, tokens(), threads=1, **WANDA)
    pruned = reload(tmp_path / "out")
    assert same(pruned, model)
    assert report.sparsity == in_memory.sparsity
    assert [layer.error for layer in report.layers] == [layer.error for layer in in_memory.layers]
    verified = verify_output(tmp_path / "out", against=dense)
    assert verified.sparsity == pytest.approx(0.5, abs=0.02)
    for layer in Blocks(model).all_layers():
        zeros = (matrix(model, layer) == 0).sum(1)
        assert bool((zeros >= layer.n // 2).all()), layer.name
        assert in_memory.masks[layer.name].shape == (layer.rows, layer.n)
    for key, original in tiny(family).state_dict().items():  # outside the blocks nothing changes
        if not key.startswith(Blocks(model).name):
            assert torch.equal(original, model.state_dict()[key]), key


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "falcon"])
def test_gram_matrices_are_those_of_the_pruned_prefix(family: str) -> None:
    """The errors reported equal the change of each layer's output, measured by hooks."""
    model, data = tiny(family), tokens(3, 16)
    pruned = copy.deepcopy(model)
    report = prune_model(pruned, data, **WANDA)
    blocks = Blocks(model)
    half = copy.deepcopy(model)  # all blocks before the last pruned, the last one dense
    last = blocks.prefix(2)
    done = {k: v for k, v in pruned.state_dict().items() if not k.startswith(last)}
    half.load_state_dict({**half.state_dict(), **done})
    inputs: dict[str, torch.Tensor] = {}
    for name, module in half.named_modules():
        if name.startswith(last) and isinstance(module, torch.nn.Linear | Conv1D):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.update(
                    {name: torch.cat([inputs.get(name, args[0][:0]), args[0]])}
                )
            )
    with torch.no_grad():
        for row in data:
            half(row[None], use_cache=False)
    for layer in report.layers:
        if layer.name.startswith(last):
            x = inputs[layer.name].reshape(-1, layer.n).double()
            place = next(y for y in blocks.layers(2) if y.name == layer.name)
            weight = matrix(model, place).double()
            change = (weight * ~report.masks[layer.name]) @ x.T
            assert layer.error == pytest.approx(
                float(change.detach().square().sum() / len(x)), rel=1e-4
            )


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_gram_matrices_inside_a_block(family: str) -> None:
    """True-sequential: each layer sees what the pruned layers before it in the block produce."""
    model, data = tiny(family, layers=1), tokens(4, 16)
    plain, inside = copy.deepcopy(model), copy.deepcopy(model)
    usual = prune_model(plain, data, **WANDA)
    careful = prune_model(inside, data, true_sequential=True, **WANDA)
    names = [layer.name for layer in usual.layers]
    first = next(name for name in names if name.endswith("q_proj"))
    assert torch.equal(usual.masks[first], careful.masks[first])
    by_name = {layer.name: layer for layer in careful.layers}
    others = [a.error != by_name[a.name].error for a in usual.layers if a.name != first]
    assert any(others)
    seen: list[torch.Tensor] = []
    output = next(name for name in names if name.endswith("o_proj"))
    inside.get_submodule(output).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for row in data:
            inside(row[None], use_cache=False)
    x = torch.cat(seen).reshape(-1, seen[0].shape[-1]).double()
    weight = model.get_parameter(output + ".weight").double()
    change = (weight * ~careful.masks[output]) @ x.T
    assert by_name[output].error == pytest.approx(
        float(change.detach().square().sum() / len(x)), rel=1e-4
    )


def test_a_pass_that_collects_ends_with_the_last_inputs() -> None:
    """The last product is computed once, to learn that it is the last; where there are experts, always."""
    for family, name, expected in [("llama", "mlp", 1), ("mixtral", "mlp", 6), ("opt", "fc2", 1)]:
        model, count = tiny(family, layers=1), [0, 0]
        module = Blocks(model).modules[0].get_submodule(name)
        module.register_forward_pre_hook(lambda *_, c=count: c.__setitem__(0, c[0] + 1))
        module.register_forward_hook(lambda *_, c=count: c.__setitem__(1, c[1] + 1))
        prune_model(model, tokens(6, 16), threads=1, **WANDA)
        assert count == [6, expected]


def test_one_pass_judges_on_the_dense_model() -> None:
    model, data = tiny("llama"), tokens()
    one = prune_model(copy.deepcopy(model), data, one_pass=True, **WANDA)
    problems = dict(maskopt.collect_problems(model, data, sparsity=0.5))
    for layer in one.layers:
        problem = problems[layer.name]
        mask = maskopt.solve(problem, "wanda").mask
        assert torch.equal(mask, one.masks[layer.name])
        assert float(problem.objective(mask).sum()) == pytest.approx(layer.error, rel=1e-9)
    two = prune_model(copy.deepcopy(model), data, **WANDA)
    assert one.layers[-1].error != two.layers[-1].error
    with pytest.raises(ModelError, match="exclude each other"):
        prune_model(model, data, one_pass=True, true_sequential=True, **WANDA)


def test_swap_improves_on_its_start_in_every_layer() -> None:
    report = prune_model(tiny("llama"), tokens(), sparsity=0.5, solver="swap", min_tokens=1)
    for layer in report.layers:
        assert layer.error_start is not None
        assert layer.error <= layer.error_start
        assert layer.statuses == {"swap-optimal": layer.rows}
    assert sum(x.error for x in report.layers) < sum(x.error_start or 0 for x in report.layers)
    again = prune_model(tiny("llama"), tokens(), sparsity=0.5, threads=1, min_tokens=1)
    assert all(torch.equal(mask, again.masks[name]) for name, mask in report.masks.items())
    assert set(report.by_kind()) >= {"self_attn.q_proj", "mlp.down_proj"}


def test_n_of_m_and_chosen_layers(tmp_path: Path) -> None:
    model = tiny("qwen3")
    dense = save(model, tmp_path / "dense")
    report = prune_model(
        dense, tokens(), pattern=NM(keep=2, of=4), solver="wanda", output=tmp_path / "out",
        include=["mlp", "q_proj"], exclude=["model.layers.1.*"],
    )  # fmt: skip
    assert {layer.kind for layer in report.layers} == {
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj",
    }  # fmt: skip
    assert len(report.layers) == 8
    assert all(layer.pattern == "2:4" for layer in report.layers)
    pruned = reload(tmp_path / "out")
    assert torch.equal(
        pruned.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight
    )
    groups = (pruned.model.layers[0].mlp.up_proj.weight == 0).view(-1, 4).sum(1)
    assert bool((groups == 2).all())
    verify_output(tmp_path / "out", against=dense)


def test_a_model_in_memory_is_written(tmp_path: Path) -> None:
    model = tiny("gpt2")
    prune_model(model, tokens(), output=tmp_path / "out", **WANDA)
    assert same(reload(tmp_path / "out"), model)
    verify_output(tmp_path / "out")


def test_text_and_the_folders_tokenizer(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    save_tokenizer(dense)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    report = prune_model(
        dense, calibration=text, samples=4, seq_len=2048, output=tmp_path / "out", **WANDA
    )
    assert report.fingerprint["calibration"]["length"] == 64  # the model has no more positions
    assert (tmp_path / "out" / "tokenizer.json").exists()
    value = maskopt.perplexity(tmp_path / "out", text=text, seq_len=32)
    assert value.windows == 28
    assert value.targets == 28 * 31


def test_a_model_in_memory_with_a_tokenizer() -> None:
    report = prune_model(
        tiny("llama"),
        WordTokenizer(),
        calibration=["some text " * 20],
        samples=3,
        seq_len=16,
        **WANDA,
    )
    assert report.fingerprint["calibration"]["samples"] == 3
    assert report.output is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_its_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    dense = save(tiny("llama", dtype=dtype), tmp_path / "dense")
    prune_model(dense, tokens(), output=tmp_path / "a", **WANDA)
    prune_model(dense, tokens(), output=tmp_path / "b", dtype="bfloat16", **WANDA)
    for name in "ab":
        verify_output(tmp_path / name, against=dense)
        assert reload(tmp_path / name).dtype == dtype


# Mixture of experts ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_each_expert_sees_the_tokens_routed_to_it(family: str) -> None:
    model, data = tiny(family, layers=1), tokens(4, 16)
    routed = dict(maskopt.collect_problems(model, data, sparsity=0.5))
    report = prune_model(copy.deepcopy(model), data, **WANDA)
    first = [x for x in report.layers if "gate_up" in x.name and ".layers.0." in x.name]
    assert sum(x.tokens for x in first) == 2 * data.numel()  # two experts a token
    everything = prune_model(copy.deepcopy(model), data, all_experts=True, **WANDA)
    for layer in everything.layers:
        assert layer.tokens == data.numel()
    dense = {layer.name: layer for layer in report.layers}
    attention = next(x for x in everything.layers if x.name.endswith("q_proj"))
    assert attention.error == dense[attention.name].error  # what the block computes is the same
    assert set(routed) == {layer.name for layer in report.layers if layer.tokens}


def test_experts_with_too_few_tokens_are_pruned_by_magnitude() -> None:
    model, data = tiny("mixtral", layers=1), tokens(4, 16)
    dense = copy.deepcopy(model)
    options = {**WANDA, "min_tokens": 10_000}
    report = prune_model(model, data, **options)
    assert report.fallbacks == [layer.name for layer in report.layers]
    name = next(x for x in report.fallbacks if "down_proj" in x)
    place = next(layer for layer in Blocks(dense).all_layers() if layer.name == name)
    weight = matrix(dense, place).abs()
    threshold = weight.sort(1).values[:, place.n // 2]
    assert torch.equal(report.masks[name], weight >= threshold[:, None])


def test_experts_that_cannot_be_shown_all_tokens() -> None:
    said = refusal(ModelError, model=tiny("llama4"), all_experts=True)
    assert re.search("Llama4TextExperts is not given a routing .* leave out `all_experts`", said)


def test_a_table_is_not_taken_for_experts() -> None:
    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.ones(3, 4, 4))

    model = tiny("llama", layers=1)
    model.model.layers[0].table = Table()
    said = refusal(ModelError, model=model)
    assert "'model.layers.0.table.bias' looks like experts, but no token was multiplied" in said
    pattern = said.rsplit("`exclude` ", 1)[1].strip("'")
    report = prune_model(model, tokens(), exclude=[pattern], **WANDA)
    assert len(report.layers) == 7


def test_a_weight_may_stand_on_the_left() -> None:
    """Mamba multiplies Δ's projection as W xᵀ: its inputs are seen all the same."""
    model, data = tiny("mamba"), tokens(3, 16)
    report = prune_model(copy.deepcopy(model), data, **WANDA)
    assert [x.kind for x in report.layers if x.kind.endswith("dt_proj")] == ["mixer.dt_proj"] * 3
    assert all(x.tokens == data.numel() for x in report.layers)
    problems = dict(maskopt.collect_problems(model, data, sparsity=0.5))
    mixer, seen = model.backbone.layers[0].mixer, []
    mixer.x_proj.register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.no_grad():
        for row in data:
            model(row[None], use_cache=False)
    x = torch.cat(seen).reshape(-1, seen[0].shape[-1])[:, : mixer.dt_proj.in_features].double()
    gram = problems["backbone.layers.0.mixer.dt_proj"].gram
    assert torch.allclose(gram.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-7)


class _ListExperts(torch.nn.Module):
    """A hand-made block whose experts are a module list."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(16, 4, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        flat = x.reshape(-1, 16)
        choice = self.gate(flat).argmax(-1)
        result = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            if bool((choice == index).any()):
                result[choice == index] = expert(flat[choice == index])
        return x + result.view_as(x)


class _ListModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(96, 16)
        self.blocks = torch.nn.ModuleList(_ListExperts() for _ in range(2))
        self.head = torch.nn.Linear(16, 96)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_experts_as_a_module_list() -> None:
    torch.manual_seed(0)
    model, data = _ListModel(), tokens(4, 16)
    report = prune_model(copy.deepcopy(model), data, **WANDA)
    experts = [x for x in report.layers if x.name.startswith("blocks.0.experts")]
    assert sum(x.tokens for x in experts) == data.numel()
    everything = prune_model(copy.deepcopy(model), data, all_experts=True, **WANDA)
    assert all(x.tokens == data.numel() for x in everything.layers)
    gate = {x.name: x.error for x in report.layers}["blocks.0.gate"]
    assert {x.name: x.error for x in everything.layers}["blocks.0.gate"] == gate


# Bad input ------------------------------------------------------------------------------------


def refusal(kind: type[Exception] = MaskoptError, **options: Any) -> str:
    """The one error that a prune of a tiny model ends with."""
    model = options.pop("model", None) or tiny("llama", layers=1)
    data = options.pop("data", tokens())
    with pytest.raises(kind) as caught:
        prune_model(model, data, **{**WANDA, **options})
    return str(caught.value)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("did you mean 'wanda'", {"solver": "wnada"}),
        ("unknown solver", {"warm_start": "nothing-like-it"}),
        ("outside", {"sparsity": 1.0}),
        ("outside", {"sparsity": -0.1}),
        ("prunes nothing: .* 48 inputs at most", {"sparsity": 0.02}),
        ("exactly one", {"sparsity": None}),
        ("more than the 32", {"sparsity": None, "pattern": Unstructured(keep=33)}),
        ("q_proj.*do not divide", {"sparsity": None, "pattern": NM(keep=2, of=5)}),
        ("did you mean 'q_proj'", {"include": ["q_porj"]}),
        ("no layer matches 'lm_head'", {"exclude": ["lm_head"]}),
        ("leave no layer", {"include": ["q_proj"], "exclude": ["q_proj"]}),
        ("has no option", {"solver_options": {"time_limt": 3}}),
        ("cannot be its own start", {"solver": "swap", "warm_start": "swap"}),
        ("shrink", {"shrink": 2.0}),
        ("min_tokens", {"min_tokens": 0}),
        ("unknown device", {"device": "quantum"}),
        ("`dtype` is for model folders", {"dtype": "float32"}),
        ("`resume` needs a model folder", {"resume": True}),
        ("`calibration` text or tokens", {"data": None}),
        ("token id", {"data": torch.full((1, 4), 96)}),
        ("whole numbers", {"data": torch.full((1, 4), 0.5)}),
    ],
)
def test_bad_options(message: str, options: dict[str, Any]) -> None:
    kind = PatternError if "pattern" in options else MaskoptError
    said = refusal(kind, **options)
    assert re.search(message, said)
    assert "\n" not in said


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (
            "update=true sets weights anew",
            {"solver": "sparsegpt", "solver_options": {"update": True}},
        ),
        (
            r"q_proj': exhaustive: a row of 32 inputs at 0\.5 has 6\.01e\+8",
            {"solver": "exhaustive"},
        ),
        (r"exhaustive: .* that trades has", {"warm_start": "exhaustive", "budget": "both"}),
        ("down_proj': branch: a row of 520 inputs is beyond it", {"warm_start": "branch"}),
    ],
)
def test_what_a_solver_cannot_is_said_before_any_work(
    message: str, options: dict[str, Any]
) -> None:
    kind, arguments = FAMILIES["llama"]
    config = getattr(transformers, kind)(**{**arguments, "intermediate_size": 520})
    model = AutoModelForCausalLM.from_config(config)
    told: list[object] = []
    given = {"solver": "swap", **options, "on_progress": told.append}
    assert re.search(message, refusal(SolverError, model=model, **given))
    assert told == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device() -> None:
    assert "no CUDA device" in refusal(device="cuda")


def test_nan_weights_name_the_parameter(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    model = patched(tiny("llama"), name, lambda p: p[0, 0].fill_(float("nan")))
    dense = save(model, tmp_path / "dense")
    with pytest.raises(ModelError, match=r"up_proj\.weight' holds NaN"):
        prune_model(dense, tokens(), output=tmp_path / "out", **WANDA)
    assert not (tmp_path / "out").exists()
    assert "up_proj.weight' holds NaN" in refusal(model=model)


def test_infinite_activations_name_layer_and_sample() -> None:
    def overflow(p: torch.Tensor) -> None:
        p[5] = float("inf")

    model = patched(tiny("llama"), "model.embed_tokens.weight", overflow)
    data = tokens(4, 8)
    data[data == 5] = 6
    data[2, 3] = 5
    assert re.search(r"q_proj'.*sample 2 has NaN", refusal(model=model, data=data))
    model = patched(tiny("llama"), "model.embed_tokens.weight", overflow)
    report = prune_model(model, data, skip_bad_samples=True, **WANDA)
    assert [item["sample"] for item in report.bad_samples] == [2]
    clean = tiny("llama")
    kept = prune_model(clean, data[[0, 1, 3]], **WANDA)
    for name, mask in kept.masks.items():
        assert torch.equal(mask, report.masks[name])
    only = patched(tiny("llama"), "model.embed_tokens.weight", lambda p: p.fill_(float("inf")))
    assert "no calibration sample" in refusal(model=only, skip_bad_samples=True)


def test_models_that_are_not_language_models() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    assert "no list of decoder blocks" in refusal(model=model)


def test_shared_weights_are_refused() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    one, other = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    said = refusal(model=model)
    assert said.startswith(f"layer {one!r} shares its weight with {other!r}")
    prune_model(model, tokens(), sparsity=0.5, solver="wanda", exclude=[one, other])


def test_tokens_are_the_only_text_and_fit_the_model() -> None:
    assert "leave one of them out" in refusal(DataError, calibration="no such file")
    longer = tiny("llama")
    longer.config.max_position_embeddings = 8
    assert "longer than the model's 8 positions" in refusal(DataError, model=longer)


def test_patterns_on_names() -> None:
    layers = Blocks(tiny("llama")).all_layers()
    assert len(choose(layers, ["self_attn"])) == 12
    assert len(choose(layers, ["model.layers.0.*"])) == 7
    assert len(choose(layers, ["*_proj"], ["layers.2"])) == 14
    assert len(choose(layers)) == 21
