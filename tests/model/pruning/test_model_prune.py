"""Pruning whole models: what options do, from folders and in memory, and what is refused."""

import copy
import re

import pytest
import torch
import transformers
from pooled_layers import pool
from tiny_models import SHARED, WordTokenizer, patched, save, tiny, tokens
from transformers import AutoModelForCausalLM

import maskopt
from maskopt import NM, Unstructured, prune_model
from maskopt import errors as e
from maskopt.models.verification.verify import verify_model

WANDA = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1}


def reload(folder):
    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()


def test_one_pass_judges_on_the_dense_model(tmp_path):
    model, data = tiny("llama", layers=2), tokens()
    one = prune_model(copy.deepcopy(model), data, calibrate_on="dense", **WANDA)
    problems = dict(maskopt.collect_problems(model, data, sparsity=0.5))
    for layer in one.layers:
        problem = problems[layer.name]
        mask = maskopt.solve(problem, "wanda").mask
        assert torch.equal(mask, one.masks[layer.name])
        assert float(problem.objective(mask).sum()) == pytest.approx(layer.error, rel=1e-9)
    two = prune_model(model, data, output=tmp_path / "out", **WANDA)
    assert one.layers[-1].error != two.layers[-1].error
    # a model in memory is written
    after, written = (m.state_dict() for m in (model, reload(tmp_path / "out")))
    assert written.keys() == after.keys()
    assert all(torch.equal(written[k], v) for k, v in after.items())
    verify_model(tmp_path / "out")


def test_swap_improves_on_its_start_in_every_layer():
    report = prune_model(
        tiny("llama", layers=2), tokens(), sparsity=0.5, solver="swap", min_tokens=1
    )
    given = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1}
    wanda = prune_model(tiny("llama", layers=2), tokens(), **given)
    for layer, other in zip(report.layers, wanda.layers, strict=True):
        assert layer.improvement_quantiles[0] >= 0
        assert other.error_wanda == other.error
        # the first block has the same inputs in both
        assert layer.block > 0 or layer.error_wanda == pytest.approx(other.error, rel=1e-9)
        assert layer.statuses == {"swap-optimal": layer.rows}
        assert layer.improvement_quantiles[-1] > 0
    assert sum(x.error for x in report.layers) < sum(x.error_wanda for x in report.layers)
    again = prune_model(tiny("llama", layers=2), tokens(), sparsity=0.5, threads=1, min_tokens=1)
    assert all(torch.equal(mask, again.masks[name]) for name, mask in report.masks.items())
    assert set(report.by_kind()) >= {"self_attn.q_proj", "mlp.down_proj"}


def test_n_of_m_and_chosen_layers(tmp_path):
    model = tiny("qwen3", layers=2)
    dense = save(model, tmp_path / "dense")
    report = prune_model(
        dense, tokens(), sparsity=NM(keep=2, of=4), solver="wanda", output=tmp_path / "out",
        include=["mlp", "q_proj"], exclude=["model.layers.1.*"],
    )  # fmt: skip
    mlp = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert {layer.kind for layer in report.layers} == {*mlp, "self_attn.q_proj"}
    assert len(report.layers) == 4
    assert all(layer.pattern == "2:4" for layer in report.layers)
    blocks, original = reload(tmp_path / "out").model.layers, model.model.layers
    assert torch.equal(blocks[1].mlp.up_proj.weight, original[1].mlp.up_proj.weight)
    assert bool(((blocks[0].mlp.up_proj.weight == 0).view(-1, 4).sum(1) == 2).all())
    verify_model(tmp_path / "out", original=dense)


def test_text_and_a_tokenizer_of_the_folder_or_given(dense, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    report = prune_model(dense, calibration=text, samples=4, seq_len=2048, output=out, **WANDA)
    assert report.fingerprint["calibration"]["length"] == 64  # the model has no more positions
    assert (out / "tokenizer.json").exists()
    value = maskopt.perplexity(out, text=text, seq_len=32)
    assert (value.windows, value.targets) == (28, 28 * 31)
    given = {"calibration": ["some text " * 20], "samples": 3, "seq_len": 16, **WANDA}
    report = prune_model(tiny("llama", layers=2), WordTokenizer(), **given)
    assert report.fingerprint["calibration"]["samples"] == 3
    assert report.output is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_its_bits(dtype, tmp_path):
    dense = save(tiny("llama", layers=1, dtype=dtype), tmp_path / "dense")
    prune_model(dense, tokens(), output=tmp_path / "a", **WANDA)
    prune_model(dense, tokens(), output=tmp_path / "b", dtype="bfloat16", **WANDA)
    for name in "ab":
        verify_model(tmp_path / name, original=dense)
        assert reload(tmp_path / name).dtype == dtype


# Bad input ----------------------------------------------------------------------------------------


def refusal(kind=e.MaskoptError, **options):
    """The one error that a prune of a tiny model ends with."""
    model = options.pop("model", None) or tiny("llama", layers=1)
    data = options.pop("data", tokens())
    with pytest.raises(kind) as caught:
        prune_model(model, data, **{**WANDA, **options})
    said = str(caught.value)
    assert "\n" not in said
    return said


NAME, EMBEDDING = "model.layers.0.mlp.up_proj", "model.embed_tokens.weight"
MODEL, MEASURED, WIDTH = {"allocation": "layers"}, {"sensitivity": "kl"}, {"wide": True}
WIDE, KEEP, POOL = ({"sparsity": x} for x in (NM(2, 4), Unstructured(keep=3), pool(0.5)))
ROWS = {"allocation": "rows", "sensitivity": "uniform", "max_deviation": 1, "solver": "swap"}
REFIT, DENSE = {"update": "least-squares"}, {"target": "dense"}
ONES = torch.ones(1, 4)
REFUSED = {
    e.MaskoptError: [
        ("did you mean 'wanda'", {"solver": "wnada"}),
        ("unknown solver", {"start": "nothing-like-it"}),
        ("outside", {"sparsity": 1.0}),
        ("outside", {"sparsity": -0.1}),
        ("prunes nothing: .* 48 inputs at most", {"sparsity": 0.02}),
        ("has no option", {"solver_options": {"time_limt": 3}}),
        ("cannot be its own start", {"solver": "swap", "start": "swap"}),
        ("gram_shrinkage", {"gram_shrinkage": 2.0}),
        ("unknown device", {"device": "quantum"}),
        ("`calibration` text or tokens", {"data": None}),
        ("token id", {"data": (96 * ONES).long()}),
        ("whole numbers", {"data": 0.5 * ONES}),
        ("'tabu' needs an equal count .* take swap", {**ROWS, "solver": "tabu"}),
        (
            "'sparsegpt' holds no `max_deviation` .* take swap",
            {**ROWS, "max_deviation": 0.1, "solver": "sparsegpt"},
        ),
    ],
    e.SolverError: [
        (
            "update=true updates",
            {**WIDTH, "solver": "sparsegpt", "solver_options": {"update": True}},
        ),
        (r"q_proj': exhaustive: a row of 32 .* 6\.01e\+8", {**WIDTH, "solver": "exhaustive"}),
        ("exhaustive: .* of a shared budget has", {**WIDTH, **ROWS, "start": "exhaustive"}),
        ("branch: a row of 520 inputs", {**WIDTH, "solver": "swap", "start": "branch"}),
    ],
    e.PatternError: [
        ("more than the 32", {"sparsity": Unstructured(keep=33)}),
        ("q_proj.*do not divide", {"sparsity": NM(keep=2, of=5)}),
    ],
    e.ModelError: [
        ("did you mean 'q_proj'", {"include": ["q_porj"]}),
        ("no layer matches 'lm_head'", {"exclude": ["lm_head"]}),
        ("leave no layer", {"include": ["q_proj"], "exclude": ["q_proj"]}),
        ("`dtype` is for model folders", {"dtype": "float32"}),
        ("`resume` needs a model folder", {"resume": True}),
        ("exclude each other", {"calibrate_on": "dense", "true_sequential": True}),
        ("`damping` auto needs held-out windows", {**REFIT, "damping": "auto"}),
        ("no list of decoder blocks", {"model": torch.nn.Sequential(torch.nn.Linear(3, 3))}),
    ],
    e.DataError: [
        ("leave one of them out", {"calibration": "no such file"}),
        ("`sensitivity` fisher leaves nothing of windows", {**MODEL, "data": tokens(4, 1)}),
    ],
    e.OptionError: [
        ("`allocation` layers needs a share .*, not 2:4", {**MODEL, **WIDE}),
        (r"needs a share such as 0\.5, not 0\.5 per layer", {**MODEL, **POOL}),
        (r"needs a share such as 0\.5, not keep 3", {**MODEL, **KEEP}),
        ("`sensitivity` must be .* relative or fisher or kl", {**MODEL, "sensitivity": "size"}),
        ("`max_deviation` must be", {**MODEL, "max_deviation": 1.5}),
        ("fisher needs every window's loss", {**MODEL, "skip_bad_samples": True}),
        ("`counts` needs `allocation` layers", {"allocation": "uniform", "counts": {"a": 1}}),
        ("no layer that is pruned is called 'a'", {**MODEL, "counts": {"a": 1}}),
        ("must be a whole number of at least 0 and less", {**MODEL, "counts": {NAME: 1}}),
        (
            "`allocation` must be text uniform or rows or layers or both, not 'all'",
            {"allocation": "all"},
        ),
        ("`allocation` rows needs a share .*, not 2:4", {**ROWS, **WIDE}),
        (
            "`allocation` both needs a share .*, not keep 3",
            {**ROWS, **KEEP, "allocation": "both"},
        ),
        ("`max_deviation` needs `allocation` rows", {"max_deviation": 0.1}),
        ("`sensitivity` needs `allocation` rows", {"sensitivity": "uniform"}),
        (
            "`max_deviation` 0.1 is not that",
            {**ROWS, "sparsity": pool(0.5, 0.2), "max_deviation": 0.1},
        ),
        ("every window's loss", {**ROWS, "sensitivity": "fisher", "skip_bad_samples": True}),
        ("^`sensitivity` kl is .*, not of rows", {**MEASURED, "allocation": "rows"}),
        ("^`sensitivity` kl is .*, not of rows", {**MEASURED, "allocation": "both"}),
        ("2, 32, 64 inputs have no step", {**MODEL, **MEASURED, "model": "mamba"}),
        ("`update` must be text none or least-squares or blockwise", {"update": "both"}),
        ("`damping` must be at least 0, not -1.0", {**REFIT, "damping": -1.0}),
        ("`damping` must be a number of at least 0 or auto", {**REFIT, "damping": "some"}),
        ("`damping` needs `update` least-squares", {"damping": 0.1}),
        ("`damping` needs", {"update": "blockwise", "holdout": 0.2, "damping": 0.1}),
        ("`target` must be text pruned or dense, not 'both'", {"target": "both"}),
        ("`target` dense and `calibrate_on` dense exclude", {**DENSE, "calibrate_on": "dense"}),
        ("`target` dense and `true_sequential` exclude", {**DENSE, "true_sequential": True}),
        ("`target` dense needs `all_experts` there", {**DENSE, "model": "mixtral"}),
    ],
}


@pytest.mark.parametrize(
    ("kind", "message", "options"),
    [(kind, *case) for kind, cases in REFUSED.items() for case in cases],
)
def test_bad_options(kind, message, options):
    given, begun = dict(options), []
    if isinstance(given.get("model"), str):
        given["model"] = tiny(given["model"])
    elif given.pop("wide", False):
        config = transformers.LlamaConfig(**{**SHARED, "intermediate_size": 520})
        given["model"] = AutoModelForCausalLM.from_config(config)
    assert re.search(message, refusal(kind, on_progress=begun.append, **given))
    assert kind != e.SolverError or begun == []


def test_nan_weights_name_the_parameter(tmp_path):
    model = patched(tiny("llama"), f"{NAME}.weight", lambda p: p[0, 0].fill_(float("nan")))
    dense = save(model, tmp_path / "dense")
    for given in (dense, model):
        said = refusal(e.ModelError, model=given, output=tmp_path / "out")
        assert "up_proj.weight' holds NaN" in said
    assert not (tmp_path / "out").exists()


def test_infinite_activations_name_layer_and_sample():
    def overflowing():
        return patched(tiny("llama", layers=2), EMBEDDING, lambda p: p[5].fill_(torch.inf))

    data = tokens(4, 8)
    data[data == 5] = 6
    data[2, 3] = 5
    assert re.search(r"q_proj'.*sample 2 has NaN", refusal(model=overflowing(), data=data))
    report = prune_model(overflowing(), data, skip_bad_samples=True, **WANDA)
    assert [item["sample"] for item in report.bad_samples] == [2]
    kept = prune_model(tiny("llama", layers=2), data[[0, 1, 3]], **WANDA)
    assert all(torch.equal(mask, report.masks[name]) for name, mask in kept.masks.items())
    only = patched(tiny("llama"), EMBEDDING, lambda p: p.fill_(torch.inf))
    assert "no calibration sample" in refusal(model=only, skip_bad_samples=True)


def test_weights_that_are_shared_and_models_that_do_not_fit():
    model = tiny("llama", layers=2)
    one, other = model.model.layers[0].mlp, model.model.layers[1].mlp
    other.up_proj.weight = one.up_proj.weight
    names = [f"model.layers.{block}.mlp.up_proj" for block in (0, 1)]
    said = refusal(model=model)
    assert said.startswith(f"layer {names[0]!r} shares its weight with {names[1]!r}")
    prune_model(model, tokens(), exclude=names, **WANDA)
    longer = tiny("llama")
    longer.config.max_position_embeddings = 8
    assert "longer than the model's 8 positions" in refusal(e.DataError, model=longer)
    if not torch.cuda.is_available():
        assert "no CUDA device" in refusal(device="cuda")
