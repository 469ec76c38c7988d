"""Models made smaller: what is written computes what the model with those columns at zero computes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import run
from forging import change_tensors, forge_manifest
from outputs import contents
from safetensors.torch import load_file
from tiny_models import SHARED, save, save_with_own_code, tiny, tokens
from transformers import AutoModelForCausalLM

from maskopt import NM, LayerProblem, Unstructured, prune_model, shrink_model, solve
from maskopt.errors import MaskoptError, ModelError, OptionError, VerificationError
from maskopt.gram import Gram
from maskopt.model.report import manifest_digest
from maskopt.model.verify import verify_output
from maskopt.model.verify_smaller import verify_smaller
from maskopt.model.workspace import MANIFEST

CHANNELS = [
    "llama", "qwen2", "qwen3", "gemma", "gemma3", "opt", "phi", "phi3", "gpt_neox", "falcon", "cohere",
    "olmo2", "stablelm", "glm",
]  # fmt: skip
HEADS = [
    "llama", "qwen2", "qwen3", "gemma3", "phi", "phi3", "cohere", "glm", "mixtral", "llama4",
]  # fmt: skip


def shrunk(family: str, home: Path, **options: Any) -> tuple[Path, Path]:
    dense = save(tiny(family), home / "dense", shard="30KB")
    shrink_model(dense, tokens(6), output=home / "out", **options)
    return dense, home / "out"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(tokens(3, seed=5)).logits)


def with_zeros(dense: Path, out: Path) -> Any:
    """The dense model, the consumers' removed columns at zero, their kept ones as they were written."""
    model, smaller = (AutoModelForCausalLM.from_pretrained(folder) for folder in (dense, out))
    record = json.loads((out / MANIFEST).read_text())["shrunk"]
    for consumer, kept in record["kept"].items():
        weight, left = (m.get_submodule(consumer).weight.data for m in (model, smaller))
        step = next(s for s in record["tensors"][f"{consumer}.weight"] if s["by"] == consumer)
        ((length, width),) = step["parts"]
        stays = torch.zeros(length // width, dtype=torch.bool)
        stays[kept] = True
        columns = stays.repeat_interleave(width)
        assert left.shape[1] == int(columns.sum())
        weight.zero_()
        weight[:, columns] = left
    return model


@pytest.mark.parametrize("weights", ["keep", "refit"])
@pytest.mark.parametrize("family", CHANNELS)
def test_channels_are_gone_and_nothing_else(family: str, weights: str, tmp_path: Path) -> None:
    dense, out = shrunk(family, tmp_path, channels=0.25, weights=weights)
    smaller = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(
        logits(smaller), logits(with_zeros(dense, out)), rtol=1e-4, atol=1e-5
    )
    found = verify_smaller(out, dense)
    assert "kept weights" in found.checked
    assert found.set_anew == (3 if weights == "refit" else 0)


@pytest.mark.parametrize("family", HEADS)
def test_heads_are_gone_and_nothing_else(family: str, tmp_path: Path) -> None:
    dense, out = shrunk(family, tmp_path, heads=0.5)
    before = json.loads((dense / "config.json").read_text())
    config = json.loads((out / "config.json").read_text())
    assert 2 * config["num_attention_heads"] == before["num_attention_heads"]
    smaller = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(
        logits(smaller), logits(with_zeros(dense, out)), rtol=1e-4, atol=1e-5
    )
    verify_smaller(out, dense)


def test_where_groups_are_too_few_every_group_loses_heads(tmp_path: Path) -> None:
    model = tiny("gemma3")
    config = {"num_attention_heads": 4, "num_key_value_heads": 1}
    model = type(model)(type(model.config)(**{**model.config.to_dict(), **config}))
    dense = save(model, tmp_path / "dense")
    report = shrink_model(dense, tokens(6), output=tmp_path / "out", heads=0.5)
    assert report.layers[0].pattern == "2 of 4 heads"
    assert all(layer.statuses == {"optimal": layer.rows} for layer in report.layers)
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (after["num_attention_heads"], after["num_key_value_heads"]) == (2, 1)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")),
        logits(with_zeros(dense, tmp_path / "out")), rtol=1e-4, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("gpt2", {"channels": 0.25}, "of a form that is known"),
        ("olmo2", {"heads": 0.5}, "cannot describe the smaller model: parameter .*k_norm"),
        ("gpt_oss", {"heads": 0.5}, "cannot describe the smaller model: parameter .*sinks"),
        ("opt", {"heads": 0.5}, "cannot describe the smaller model"),
        ("mixtral", {"channels": 0.25}, "of a form that is known"),
        ("llama", {"heads": 0.25}, "`heads` 0.5 takes one"),
        ("llama", {"channels": 0.01}, "take a larger `channels`"),
        ("llama", {"channels": 0.25, "multiple": 64}, "smaller `multiple`"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_anything_is_written(
    family: str, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=said):
        shrunk(family, tmp_path, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, OptionError, "nothing is to be removed"),
        ({"channels": 1.0}, MaskoptError, "channels"),
        ({"channel": 0.25}, OptionError, "no option is called 'channel'; did you mean 'channels'"),
        ({"heads": -0.1}, MaskoptError, "heads"),
        ({"channels": 0.2, "include": "q_proj"}, OptionError, "leave out `include`"),
        ({"heads": 0.5, "solver": "tabu"}, OptionError, "`solver` is of channels"),
        ({"heads": 0.5, "solver_options": {"seed": 1}}, OptionError, "`solver_options` is of"),
        ({"heads": 0.5, "certify": True}, OptionError, "heads are proven"),
        ({"channels": 0.2, "solver": "swop"}, MaskoptError, "did you mean"),
        ({"channels": 0.2, "weights": "reconstruct"}, MaskoptError, "weights"),
        (
            {"channels": 0.2, "weights": "keep", "damping": 0.1},
            OptionError,
            "`damping` is of refitted",
        ),
    ],
)
def test_options_that_cannot_be(
    options: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        shrink_model(tmp_path, tokens(6), output=tmp_path / "out", **options)


def test_a_configuration_that_refuses_the_number_of_heads_is_asked_beforehand(
    tmp_path: Path,
) -> None:
    model = tiny("llama")
    config = {"num_attention_heads": 4, "num_key_value_heads": 1}
    model = type(model)(type(model.config)(**{**model.config.to_dict(), **config}))
    with pytest.raises(ModelError, match=r"cannot describe .*not a multiple"):
        shrink_model(
            save(model, tmp_path / "dense"), tokens(6), output=tmp_path / "out", heads=0.25
        )
    assert not (tmp_path / "out").exists()


def test_code_of_the_models_own_is_refused_before_anything_heavy(tmp_path: Path) -> None:
    dense = save_with_own_code(tmp_path / "dense")
    with pytest.raises(ModelError, match="code is not copied"):
        shrink_model(
            dense, tokens(6), output=tmp_path / "out", channels=0.5, trust_remote_code=True
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "more", "said"),
    [
        # a head of the first half and one of the second are one
        ("DiffLlamaConfig", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}, "is off by"),
        # a norm over all heads, as wide as the hidden states
        ("BitNetConfig", {}, "does not run"),
    ],
)  # fmt: skip
def test_families_whose_heads_do_more_are_refused_and_nothing_is_left(
    config: str, more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    configured = getattr(transformers, config)(**{**SHARED, "pad_token_id": 0, **more})
    dense = save(AutoModelForCausalLM.from_config(configured), tmp_path / "dense")
    with pytest.raises(ModelError, match=said):
        shrink_model(dense, tokens(6), output=tmp_path / "out", heads=0.5)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_the_choice_of_the_first_block_is_the_optimum_of_what_it_is_given(tmp_path: Path) -> None:
    """By a layer's own objective, over all ways to remove one of its groups; and errors are as reported."""
    dense, out = shrunk("llama", tmp_path, heads=0.5, weights="keep")
    model = AutoModelForCausalLM.from_pretrained(dense)
    name = "model.layers.0.self_attn.o_proj"
    module = model.get_submodule(name)
    gram = Gram(module.weight.shape[1])
    hook = module.register_forward_pre_hook(lambda _, args: gram.add(args[0][0].detach()))
    for window in tokens(6):
        logits_of = model(window[None])
    hook.remove()
    assert logits_of is not None
    n = module.weight.shape[1]
    problem = LayerProblem(module.weight.detach(), gram.value(), Unstructured(keep=n // 2))
    masks = [torch.arange(n) // (n // 2) == kept for kept in (0, 1)]
    errors = [float(problem.objective(m.expand(len(module.weight), n)).sum()) for m in masks]
    record = json.loads((out / MANIFEST).read_text())
    assert record["shrunk"]["kept"][name] == [errors.index(min(errors))]
    layer = next(x for x in record["layers"] if x["name"] == name)
    assert layer["error"] == pytest.approx(min(errors), rel=1e-6)
    assert layer["lower_bound"] == pytest.approx(min(errors), rel=1e-6)


def test_refitted_errors_are_lower_and_held_out_ones_are_told(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    report = shrink_model(
        dense, tokens(12), output=tmp_path / "out", channels=0.5, heads=0.5, holdout=0.34
    )
    for layer in report.layers:
        assert layer.error_kept is not None
        assert 0 < layer.error < layer.error_kept < layer.energy
        assert layer.relative_held is not None
    assert any(name.endswith("down_proj") for name in {x.name for x in report.layers})


def test_a_certified_choice_has_a_bound_below_it(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    report = shrink_model(
        dense, tokens(6), output=tmp_path / "out", channels=0.5, solver="wanda", certify=True
    )
    for layer in report.layers:
        assert layer.error_kept is not None
        assert 0 < layer.lower_bound <= layer.error_kept


def test_a_multiple_of_channels_stays(tmp_path: Path) -> None:
    _, out = shrunk("llama", tmp_path, channels=0.3, multiple=8)
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 40


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_interrupted_runs_resume_to_the_same_bytes(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"channels": 0.25, "heads": 0.5}
    dense, whole = shrunk("llama", tmp_path, **options)

    def halt(event: Any) -> None:
        if event.block == stop and event.stage == "solve" and event.done == 2:
            raise KeyboardInterrupt

    out = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        shrink_model(dense, tokens(6), output=out, on_progress=halt, **options)
    if stop == 0:
        assert not out.exists()
        return
    report = shrink_model(dense, tokens(6), output=out, resume=True, **options)
    assert len(report.layers) == 6
    assert contents(out) == contents(whole)
    finished = shrink_model(dense, tokens(6), output=out, resume=True, **options)
    assert [x.error for x in finished.layers] == [x.error for x in report.layers]
    with pytest.raises(ModelError, match="another run"):
        shrink_model(dense, tokens(6), output=out, resume=True, channels=0.5)


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    dense = save(tiny("llama", dtype=torch.bfloat16), tmp_path / "dense")
    shrink_model(dense, tokens(6), output=tmp_path / "out", channels=0.25)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    verify_smaller(tmp_path / "out", dense)


def test_smaller_and_then_pruned(tmp_path: Path) -> None:
    _, out = shrunk("llama", tmp_path, channels=0.25)
    prune_model(out, tokens(6), output=tmp_path / "both", pattern=NM(keep=2, of=4), min_tokens=1,
                solver="wanda")  # fmt: skip
    verify_output(tmp_path / "both", out)
    shrink_model(out, tokens(6), output=tmp_path / "twice", heads=0.5)
    verify_smaller(tmp_path / "twice", out)
    assert (tmp_path / "twice" / "README-original.md").read_text() == (
        out / "README.md"
    ).read_text()
    with pytest.raises(VerificationError, match="another model"):
        verify_smaller(tmp_path / "twice", save(tiny("llama"), tmp_path / "other", shard="30KB"))


@pytest.mark.parametrize("what", [{"channels": 0.25}, {"heads": 0.5}])
def test_zeros_of_a_pruned_model_are_not_filled(what: dict[str, Any], tmp_path: Path) -> None:
    dense, out = save(tiny("llama"), tmp_path / "dense"), tmp_path / "out"
    prune_model(dense, tokens(6), output=out, sparsity=0.5, min_tokens=1, solver="wanda")
    with pytest.raises(OptionError, match="least squares would fill its zeros"):
        shrink_model(out, tokens(6), output=tmp_path / "small", **what)
    assert not (tmp_path / "small").exists()
    shrink_model(out, tokens(6), output=tmp_path / "small", weights="keep", **what)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    for layer in (small.model.layers[0].mlp.down_proj, small.model.layers[0].self_attn.o_proj):
        assert float((layer.weight == 0).float().mean()) > 0.3


@pytest.mark.parametrize("tensor", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_not_the_original_s_is_found(tensor: str, tmp_path: Path) -> None:
    dense, out = shrunk("llama", tmp_path, channels=0.25)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    change_tensors(out / index[tensor], lambda tensors: tensors[tensor].view(-1)[0].add_(1))
    forge_manifest(out)  # its digests are right again
    with pytest.raises(VerificationError, match="is not the original's"):
        verify_smaller(out, dense)


def forge(out: Path, change: Any) -> None:
    record = json.loads((out / MANIFEST).read_text())
    change(record)
    record["sha256"] = manifest_digest(record)
    (out / MANIFEST).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["shrunk"]["kept"]["model.layers.0.mlp.down_proj"].__setitem__(0, 40), "damaged"),
        (lambda m: m["shrunk"]["kept"]["model.layers.0.mlp.down_proj"].pop(), "leaves"),
        (lambda m: m["shrunk"]["tensors"].pop("model.layers.0.mlp.up_proj.weight"), "shape"),
        (lambda m: m["shrunk"]["settings"].update(intermediate_size=37), "is not the 37"),
        (lambda m: m["shrunk"]["settings"].pop("intermediate_size"), "in more than the sizes"),
        (lambda m: m["shrunk"].pop("kept"), "damaged"),
        (lambda m: m["files"].update({"config.json": "0" * 64}), "was changed"),
        (lambda m: m["fingerprint"].update(model="0"), "another model"),
        (lambda m: m["shrunk"]["tensors"]["model.layers.0.mlp.up_proj.weight"][0]["parts"]
         .__setitem__(0, [36, 1]), "otherwise than it is long|damaged"),
        (lambda m: m["shrunk"]["set_anew"].append("model.norm.weight"), "damaged"),
        (lambda m: m["shrunk"]["tensors"].update({"nothing": [
            {"axis": 0, "by": "model.layers.0.mlp.down_proj", "parts": [[48, 1]]}]}), "not there"),
    ],
)  # fmt: skip
def test_forged_manifests_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    dense, out = shrunk("llama", tmp_path, channels=0.25)
    forge(out, change)
    with pytest.raises(VerificationError, match=said):
        verify_smaller(out, dense)


def test_another_choice_of_channels_than_the_weights_show_is_refused(tmp_path: Path) -> None:
    dense, out = shrunk("llama", tmp_path, channels=0.25)

    def other(record: dict[str, Any]) -> None:
        kept = record["shrunk"]["kept"]["model.layers.1.mlp.down_proj"]
        gone = next(i for i in range(48) if i not in kept)
        kept[:] = sorted({*kept[1:], gone})

    forge(out, other)
    with pytest.raises(VerificationError, match="is not the original's, cut as"):
        verify_smaller(out, dense)


def test_the_commands(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    torch_tokens = tmp_path / "tokens.npy"
    import numpy as np

    np.save(torch_tokens, tokens(6).numpy())
    out = tmp_path / "out"
    said = run(
        "shrink", dense, "--channels", 0.25, "--heads", 0.5, "--calibration", torch_tokens,
        "--output", out, "--certify",
    )  # fmt: skip
    assert "36 of 48 channels" in said
    assert "1 of 2 key–value groups" in said
    assert "holds" in run("verify", out, "--against", dense)
    assert "perplexity" in run("eval", dense, out, "--text", torch_tokens)
    again = tmp_path / "again"
    run(
        "shrink",
        dense,
        "--config",
        out / MANIFEST,
        "--calibration",
        torch_tokens,
        "--output",
        again,
    )
    assert contents(again) == contents(out)
    run("report", out, "--output", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "kept 1 of 2 key–value groups and 36 of 48 channels of 3 blocks" in page
    for command in (
        ["pack", out, "--output", tmp_path / "packed"],
        ["verify", out, "--masks", out],
    ):
        assert "shrink" in run(*command, fails=MaskoptError) or "mask" in run(
            *command, fails=MaskoptError
        )


def test_channels_by_a_better_solver_cost_no_more(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    first = {
        solver: shrink_model(
            dense, tokens(6), output=tmp_path / solver, channels=0.5, solver=solver, weights="keep"
        ).layers[0]
        for solver in ("magnitude", "wanda", "swap", "tabu")
    }
    errors = [first[solver].error for solver in ("tabu", "swap", "wanda")]
    assert all(one <= other * (1 + 1e-12) for one, other in itertools.pairwise(errors))
    assert solve is not None
