"""`maskopt verify --calibration`: errors and statuses computed again from the text of the prune."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from forging import copied, edit, forge_manifest, prune_by, says, shuffled
from tiny_models import patched, save, tiny, tokens

from maskopt import NM, prune_model
from maskopt.errors import MaskoptError, ModelError, OptionError, VerificationError
from maskopt.model.verify import verify_output

WANDA: dict[str, Any] = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1}
SWAP: dict[str, Any] = {**WANDA, "solver": "swap", "warm_start": "wanda"}


def refused(out: Path, dense: Path, said: str = "", data: Any = None, **options: Any) -> str:
    """What is said when errors are computed again."""
    with pytest.raises(VerificationError, match=said or None) as caught:
        verify_output(out, dense, calibration=tokens() if data is None else data, **options)
    return str(caught.value)


def check(out: Path, dense: Path, data: Any = None, **options: Any) -> Any:
    """Every layer's errors hold."""
    data = tokens() if data is None else data
    verified = verify_output(out, dense, calibration=data, **options)
    assert len(verified.checked_layers) == verified.layers
    return verified


@pytest.fixture(scope="module")
def swapped(dense_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("swapped") / "out"
    prune_model(dense_folder, tokens(), output=out, **SWAP)
    return out


@pytest.fixture
def result(swapped, tmp_path):
    return copied(swapped, tmp_path)


def test_what_a_run_states_holds(swapped, dense_folder):
    verified = check(swapped, dense_folder)
    assert verified.layers == 21
    assert {"errors", "statuses"} <= set(verified.checked)
    assert set(verified.claimed) == {"start errors", "options"}


OPTIONS: dict[str, dict[str, Any]] = {
    "one pass": {"one_pass": True},
    "true sequential": {"true_sequential": True},
    "shrink": {"shrink": 0.1},
    "2:4": {"sparsity": None, "pattern": NM(keep=2, of=4)},
    "bfloat16": {"dtype": "bfloat16"},
    "some layers": {"include": ["mlp"], "exclude": ["layers.1"]},
    "a third of the threads": {"threads": 1},
}


FIRST = ("true sequential", "2:4", "some layers")


@pytest.mark.parametrize(
    "name", [x if x in FIRST else pytest.param(x, marks=pytest.mark.slow) for x in OPTIONS]
)
def test_under_every_option(name, dense_folder, tmp_path):
    prune_model(dense_folder, tokens(), output=tmp_path / "out", **{**SWAP, **OPTIONS[name]})
    check(tmp_path / "out", dense_folder, threads=2)


def test_training_that_began_from_the_weights_of_a_solver(dense_folder, tmp_path):
    given: dict[str, Any] = {
        **WANDA, "solver": "sparsegpt", "solver_options": {"update": True},
        "weights": "reconstruct", "holdout": 0.3, "reconstruct": {"epochs": 1, "begin": "refit"},
    }  # fmt: skip
    for name, more in (("blocks", {}), ("rounds", {"true_sequential": True})):
        prune_model(dense_folder, tokens(), output=tmp_path / name, **given, **more)
    assert "errors" in check(tmp_path / "blocks", dense_folder).claimed
    refused(tmp_path / "rounds", dense_folder, "it cannot be checked on text")
    forge_manifest(tmp_path / "blocks", edit("layers", 3, "error_kept", to=1e-3))
    refused(tmp_path / "blocks", dense_folder, "before its weights were refitted")


#: fused, split and transposed experts
FAMILIES = [
    (family, how)
    for family in ("gpt2", "mixtral", "deepseek_v3", "llama4", "bamba")
    for how in ("blocks", "true_sequential", "all_experts")
    if how != "all_experts" or family in ("mixtral", "deepseek_v3")
]
MAIN = [("gpt2", "blocks"), ("mixtral", "all_experts"), ("llama4", "true_sequential")]


@pytest.mark.parametrize(
    ("family", "how"),
    [*MAIN, *(pytest.param(*x, marks=pytest.mark.slow) for x in FAMILIES if x not in MAIN)],
)
def test_other_families(family, how, tmp_path):
    """Some of their layers saw too few tokens."""
    dense = save(tiny(family), tmp_path / "dense")
    options = {**WANDA, "min_tokens": 48} | ({how: True} if how != "blocks" else {})
    prune_model(dense, tokens(), output=tmp_path / "out", **options)
    check(tmp_path / "out", dense)


def test_excluded_experts(tmp_path):
    dense, out = save(tiny("mixtral"), tmp_path / "dense"), tmp_path / "out"
    prune_model(dense, tokens(), output=out, **WANDA, exclude=["experts.0"])
    check(out, dense)
    forge_manifest(out, edit("fingerprint", "options", "exclude", to=[]))
    with pytest.raises(VerificationError, match=r"experts\.0"):
        verify_output(out, dense)


def test_layers_pruned_by_magnitude_need_no_calibration(tmp_path):
    dense, out = save(tiny("mixtral"), tmp_path / "dense"), tmp_path / "out"
    prune_model(dense, tokens(), output=out, **{**WANDA, "min_tokens": 48})
    layers = json.loads((out / "maskopt-manifest.json").read_text())["layers"]
    fallbacks = [x["name"] for x in layers if x["fallback"]]
    assert 0 < len(fallbacks) < len(layers)
    assert sorted(verify_output(out, dense).checked_layers) == sorted(fallbacks)
    assert verify_output(out).checked_layers == ()
    first = next(i for i, x in enumerate(layers) if x["fallback"])
    forge_manifest(out, edit("layers", first, "error", to=lambda x: 0.99 * x))
    with pytest.raises(VerificationError, match="pruned by magnitude, states an error of"):
        verify_output(out, dense)


def test_a_status_that_does_not_hold(dense_folder, pruned_folder, tmp_path):
    """Wanda's masks with their own errors, said to be 1-swap optimal."""
    out = copied(pruned_folder, tmp_path)

    def promote(manifest: dict[str, Any]) -> None:
        layer = next(x for x in manifest["layers"] if x["name"].endswith("1.mlp.up_proj"))
        layer["statuses"] = {"swap-optimal": layer["rows"]}

    forge_manifest(out, promote)
    verify_output(out, dense_folder, calibration=tokens(), layers=["layers.0", "down_proj"])
    said = refused(out, dense_folder, "keeping input", layers=["up_proj"])
    assert "model.layers.1.mlp.up_proj" in said
    assert "\n" not in said


def test_optima_and_bounds_stay_claims(result, dense_folder):
    def claim(manifest: dict[str, Any]) -> None:
        layer = manifest["layers"][0]
        layer.update(statuses={"optimal": layer["rows"]}, lower_bound=layer["error"])

    forge_manifest(result, claim)
    verified = verify_output(result, dense_folder, calibration=tokens())
    assert {"bounds", "optima"} <= set(verified.claimed)
    assert {"errors", "statuses"} <= set(verified.checked)


#: name → (how to forge, what is said when errors are computed again)
FORGED: dict[str, tuple[Any, str]] = {
    "random masks": (lambda out, dense: prune_by(out, dense, shuffled), "states an error of"),
    "a GPU": (says(edit("fingerprint", "device", to="cuda")), "was on a GPU"),
    "one_pass": (says(edit("fingerprint", "options", "one_pass", to=True)), ""),
    "true_sequential": (says(edit("fingerprint", "options", "true_sequential", to=True)), ""),
    "shrink": (says(edit("fingerprint", "options", "shrink", to=0.5)), ""),
    "no dtype": (says(edit("fingerprint", "dtype", to="float31")), ""),
    "length": (says(edit("fingerprint", "calibration", "length", to="x")), ""),
    "digest": (says(edit("fingerprint", "calibration", "sha256", to="0" * 64)), ""),
    "error": (says(edit("layers", 5, "error", to=1e-3)), ""),
    "error a little": (says(edit("layers", 5, "error", to=lambda x: x * (1 + 3e-5))), ""),
    "energy": (says(edit("layers", 5, "energy", to=lambda x: 2 * x)), ""),
    "energy held": (says(edit("layers", 5, "energy_held", to=1.0)), ""),
    "tokens": (says(edit("layers", 5, "tokens", to=97)), ""),
    "device": (says(edit("fingerprint", "device", to="tpu")), ""),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_run_is_refused(name, result, dense_folder):
    if name == "a GPU" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    FORGED[name][0](result, dense_folder)
    assert "errors" in verify_output(result, dense_folder).claimed
    refused(result, dense_folder, FORGED[name][1])


def test_the_precision_decides_how_closely_errors_must_agree(result, dense_folder):
    """Half precision is believed of a forger, and the result says that it was."""
    assert check(result, dense_folder).tolerance == 1e-5
    forge_manifest(result, edit("fingerprint", "dtype", to="bfloat16"))
    assert check(result, dense_folder).tolerance == 1e-2


def test_bad_samples_are_left_out_again(tmp_path):
    """Gemma multiplies embeddings by the root of their width: token 7 becomes infinite."""
    model = patched(tiny("gemma"), "model.embed_tokens.weight", lambda p: p[7].fill_(3e38))
    dense, out, data = save(model, tmp_path / "dense"), tmp_path / "out", tokens()
    data[data == 7] = 8
    data[2, 3] = 7
    report = prune_model(dense, data, output=out, **SWAP, skip_bad_samples=True)
    assert [bad["sample"] for bad in report.bad_samples] == [2]
    check(out, dense, data)
    forge_manifest(out, edit("bad_samples", 0, "sample", to=3))
    refused(out, dense, "other samples", data)


def test_samples_that_the_dense_model_left_out(tmp_path):
    """It walks along while blocks are trained, and not while they are checked."""
    data = tokens(12)
    token = int(data[3, 2])
    model = patched(tiny("gpt2"), "transformer.wte.weight", lambda p: p[token].fill_(3e38))
    dense = save(model, tmp_path / "dense")
    options = {**SWAP, "skip_bad_samples": True, "holdout": 0.25}
    more = {"weights": "reconstruct", "reconstruct": {"epochs": 1}}
    report = prune_model(dense, data, output=tmp_path / "out", **options, **more)
    assert {bad["layer"] for bad in report.bad_samples} == {"transformer.h.0 (dense)"}
    verified = verify_output(tmp_path / "out", dense, calibration=data)
    assert "errors" in verified.checked
    assert "windows left out" in verified.claimed


def test_other_text_is_refused(swapped, dense_folder):
    other, data = tokens(seed=1), tokens()
    refused(swapped, dense_folder, "is not what the model was calibrated on", other)
    with pytest.raises(VerificationError, match="with the original"):
        verify_output(swapped, calibration=data)
    with pytest.raises(VerificationError, match="give both"):
        verify_output(swapped, dense_folder, layers=["mlp"])
    with pytest.raises(ModelError, match="no layer matches"):
        verify_output(swapped, dense_folder, calibration=data, layers=["mpl"])


def test_from_the_command_line(dense, tmp_path):
    text, other, out = tmp_path / "text.txt", tmp_path / "other.txt", tmp_path / "out"
    text.write_text("Pack my box with five dozen liquor jugs. " * 40)
    other.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    run(
        "prune", dense, "--sparsity", 0.5, "--warm-start", "wanda", "--calibration", text,
        "--samples", 4, "--seq-len", 32, "--output", out, "--min-tokens", 8, "--seed", 3,
    )  # fmt: skip
    verify = ["verify", out, "--against", dense]
    shown = run(*verify)
    assert "sparsity 0.5000, every kept weight is that of" in shown
    assert "(checked); errors, statuses, bounds, start errors, options: claimed" in shown
    errors, on = "errors (to 1e-05) and statuses of", [*verify, "--calibration", text]
    assert f"{errors} 21 layers (checked); start errors, options: claimed" in run(*on)
    shown = run(*on, "--layers", "q_proj,layers.0.mlp")
    assert f"{errors} 6 layers (checked); errors and statuses of" in shown
    assert "of the other 15, start errors, options: claimed" in shown
    said = run(*verify, "--calibration", other, fails=MaskoptError)
    assert "other.txt: is not what the model was calibrated on" in said


def test_layers_that_are_named_one_by_one(swapped, dense_folder, data):
    common = ["verify", swapped, "--against", dense_folder, "--calibration", data]
    shown = run(*common, "--include", "layers.0.mlp", "--include", "layers.1.mlp.up_proj,q_proj")
    assert "of 7 layers (checked)" in shown
    said = run("verify", swapped, "--include", "mlp", fails=MaskoptError)
    assert "--layers chooses what --calibration" in said


@pytest.mark.parametrize(
    "given",
    [
        ["--against", "x"], ["--calibration", "x"], ["--include", "x"], ["--semi-structured"],
        ["--no-semi-structured"], ["--threads", 1], ["--text-field", "x"],
    ],
)  # fmt: skip
def test_options_of_the_other_kind_are_refused(given, swapped):
    flag = given[0].replace("--no-", "--")
    said = run("verify", "a.npz", "solution.npz", *given, fails=OptionError)
    assert said == f"{flag} is for a pruned model; solution.npz is checked as a solution"
    said = run("verify", swapped, "--require-checked", fails=OptionError)
    assert said.startswith("--require-checked is for an instance and its solution")
