"""`maskopt verify --calibration`: errors and statuses computed again from the text of the prune."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from forging import forge_manifest, prune_by
from test_verify_forgeries import shuffled
from tiny_models import patched, save, save_tokenizer, tiny, tokens

from maskopt import NM, prune_model
from maskopt.errors import MaskoptError, ModelError, OptionError, VerificationError
from maskopt.model.verify import verify_output

SWAP: dict[str, Any] = {"sparsity": 0.5, "solver": "swap", "warm_start": "wanda", "min_tokens": 1}


@pytest.fixture(scope="module")
def swapped(dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swapped") / "out"
    prune_model(dense_folder, tokens(), output=out, **SWAP)
    return out


@pytest.fixture
def result(swapped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(swapped, tmp_path / "result"))


def test_what_a_run_states_holds(swapped: Path, dense_folder: Path) -> None:
    verified = verify_output(swapped, dense_folder, calibration=tokens())
    assert len(verified.checked_layers) == verified.layers == 21
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


@pytest.mark.parametrize("name", OPTIONS)
def test_under_every_option(name: str, dense_folder: Path, tmp_path: Path) -> None:
    prune_model(dense_folder, tokens(), output=tmp_path / "out", **{**SWAP, **OPTIONS[name]})
    verified = verify_output(tmp_path / "out", dense_folder, calibration=tokens(), threads=2)
    assert len(verified.checked_layers) == verified.layers


def test_training_that_began_from_the_weights_of_a_solver(
    dense_folder: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "sparsity": 0.5, "min_tokens": 1, "solver": "sparsegpt", "solver_options": {"update": True},
        "weights": "reconstruct", "holdout": 0.3, "reconstruct": {"epochs": 1, "begin": "refit"},
    }  # fmt: skip
    for name, more in (("blocks", {}), ("rounds", {"true_sequential": True})):
        prune_model(dense_folder, tokens(), output=tmp_path / name, **given, **more)
    verified = verify_output(tmp_path / "blocks", dense_folder, calibration=tokens())
    assert len(verified.checked_layers) == 21
    assert "errors" in verified.claimed
    with pytest.raises(VerificationError, match="it cannot be checked on text"):
        verify_output(tmp_path / "rounds", dense_folder, calibration=tokens())
    forge_manifest(tmp_path / "blocks", lambda m: m["layers"][3].update(error_kept=1e-3))
    with pytest.raises(VerificationError, match="before its weights were refitted"):
        verify_output(tmp_path / "blocks", dense_folder, calibration=tokens())


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "deepseek_v3", "llama4", "bamba"])
@pytest.mark.parametrize("more", [{}, {"all_experts": True}, {"true_sequential": True}])
def test_other_families(family: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Fused, split and transposed experts; and layers that saw too few tokens."""
    if "all_experts" in more and family not in ("mixtral", "deepseek_v3"):
        pytest.skip("has no experts that could be given all tokens")
    dense = save(tiny(family), tmp_path / "dense")
    options = {**SWAP, "solver": "wanda", "warm_start": None, "min_tokens": 48, **more}
    prune_model(dense, tokens(), output=tmp_path / "out", **options)
    verified = verify_output(tmp_path / "out", dense, calibration=tokens())
    assert len(verified.checked_layers) == verified.layers


def test_excluded_experts(tmp_path: Path) -> None:
    dense = save(tiny("mixtral"), tmp_path / "dense")
    prune_model(
        dense, tokens(), sparsity=0.5, solver="wanda", min_tokens=1, output=tmp_path / "out",
        exclude=["experts.0"],
    )  # fmt: skip
    verified = verify_output(tmp_path / "out", dense, calibration=tokens())
    assert len(verified.checked_layers) == verified.layers
    forge_manifest(tmp_path / "out", edit("fingerprint", "options", "exclude", to=[]))
    with pytest.raises(VerificationError, match=r"experts\.0"):
        verify_output(tmp_path / "out", dense)


def test_layers_pruned_by_magnitude_need_no_calibration(tmp_path: Path) -> None:
    dense = save(tiny("mixtral"), tmp_path / "dense")
    out = tmp_path / "out"
    prune_model(dense, tokens(), sparsity=0.5, solver="wanda", min_tokens=48, output=out)
    fallbacks = [x["name"] for x in layers_of(out) if x["fallback"]]
    assert 0 < len(fallbacks) < len(layers_of(out))
    assert sorted(verify_output(out, dense).checked_layers) == sorted(fallbacks)
    assert verify_output(out).checked_layers == ()

    def lower(manifest: dict[str, Any]) -> None:
        layer = next(x for x in manifest["layers"] if x["fallback"])
        layer["error"] *= 0.99

    forge_manifest(out, lower)
    with pytest.raises(VerificationError, match="pruned by magnitude, states an error of"):
        verify_output(out, dense)


def layers_of(out: Path) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = json.loads((out / "maskopt-manifest.json").read_text())["layers"]
    return layers


def test_random_masks_under_the_errors_of_a_run(result: Path, dense_folder: Path) -> None:
    prune_by(result, dense_folder, shuffled)
    assert "errors" in verify_output(result, dense_folder).claimed
    with pytest.raises(VerificationError, match="states an error of"):
        verify_output(result, dense_folder, calibration=tokens())


def test_a_status_that_does_not_hold(dense_folder: Path, tmp_path: Path) -> None:
    """Wanda's masks with their own errors, said to be 1-swap optimal."""
    out = tmp_path / "out"
    prune_model(dense_folder, tokens(), output=out, sparsity=0.5, solver="wanda", min_tokens=1)

    def promote(manifest: dict[str, Any]) -> None:
        layer = next(x for x in manifest["layers"] if x["name"].endswith("1.mlp.up_proj"))
        layer["statuses"] = {"swap-optimal": layer["rows"]}

    forge_manifest(out, promote)
    verify_output(out, dense_folder, calibration=tokens(), layers=["layers.0", "down_proj"])
    with pytest.raises(VerificationError, match="keeping input") as caught:
        verify_output(out, dense_folder, calibration=tokens(), layers=["up_proj"])
    assert "model.layers.1.mlp.up_proj" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_optima_and_bounds_stay_claims(result: Path, dense_folder: Path) -> None:
    def claim(manifest: dict[str, Any]) -> None:
        layer = manifest["layers"][0]
        layer["statuses"] = {"optimal": layer["rows"]}
        layer["lower_bound"] = layer["error"]

    forge_manifest(result, claim)
    verified = verify_output(result, dense_folder, calibration=tokens())
    assert {"bounds", "optima"} <= set(verified.claimed)
    assert {"errors", "statuses"} <= set(verified.checked)


def edit(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = to

    return change


FORGED = {
    "one_pass": edit("fingerprint", "options", "one_pass", to=True),
    "true_sequential": edit("fingerprint", "options", "true_sequential", to=True),
    "shrink": edit("fingerprint", "options", "shrink", to=0.5),
    "no dtype": edit("fingerprint", "dtype", to="float31"),
    "length": edit("fingerprint", "calibration", "length", to="x"),
    "digest": edit("fingerprint", "calibration", "sha256", to="0" * 64),
    "error": edit("layers", 5, "error", to=1e-3),
    "error a little": lambda m: m["layers"][5].update(error=m["layers"][5]["error"] * (1 + 3e-5)),
    "energy": lambda m: m["layers"][5].update(energy=m["layers"][5]["energy"] * 2),
    "energy held": edit("layers", 5, "energy_held", to=1.0),
    "tokens": edit("layers", 5, "tokens", to=97),
    "device": edit("fingerprint", "device", to="tpu"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_run_is_refused(name: str, result: Path, dense_folder: Path) -> None:
    forge_manifest(result, FORGED[name])
    verify_output(result, dense_folder)
    with pytest.raises(VerificationError):
        verify_output(result, dense_folder, calibration=tokens())


def test_the_precision_decides_how_closely_errors_must_agree(
    result: Path, dense_folder: Path
) -> None:
    """A forger may say that passes were in half precision, and the result tells that it was believed."""
    assert verify_output(result, dense_folder, calibration=tokens()).tolerance == 1e-5
    forge_manifest(result, edit("fingerprint", "dtype", to="bfloat16"))
    assert verify_output(result, dense_folder, calibration=tokens()).tolerance == 1e-2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_run_on_a_gpu_is_checked_on_one(result: Path, dense_folder: Path) -> None:
    forge_manifest(result, edit("fingerprint", "device", to="cuda"))
    with pytest.raises(VerificationError, match="was on a GPU"):
        verify_output(result, dense_folder, calibration=tokens())


def test_bad_samples_are_left_out_again(tmp_path: Path) -> None:
    """Gemma multiplies embeddings by the root of their width: token 7 becomes infinite."""

    def blow_up(embedding: torch.Tensor) -> None:
        embedding[7] = 3e38

    dense = save(patched(tiny("gemma"), "model.embed_tokens.weight", blow_up), tmp_path / "dense")
    data = tokens()
    data[data == 7] = 8
    data[2, 3] = 7
    options = {**SWAP, "skip_bad_samples": True}
    report = prune_model(dense, data, output=tmp_path / "out", **options)
    assert [bad["sample"] for bad in report.bad_samples] == [2]
    verified = verify_output(tmp_path / "out", dense, calibration=data)
    assert len(verified.checked_layers) == verified.layers
    forge_manifest(tmp_path / "out", edit("bad_samples", 0, "sample", to=3))
    with pytest.raises(VerificationError, match="other samples"):
        verify_output(tmp_path / "out", dense, calibration=data)


def test_samples_that_the_dense_model_left_out(tmp_path: Path) -> None:
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


def test_other_text_is_refused(swapped: Path, dense_folder: Path) -> None:
    with pytest.raises(VerificationError, match="is not what the model was calibrated on"):
        verify_output(swapped, dense_folder, calibration=tokens(seed=1))
    with pytest.raises(VerificationError, match="with the original"):
        verify_output(swapped, calibration=tokens())
    with pytest.raises(VerificationError, match="give both"):
        verify_output(swapped, dense_folder, layers=["mlp"])
    with pytest.raises(ModelError, match="no layer matches"):
        verify_output(swapped, dense_folder, calibration=tokens(), layers=["mpl"])


def test_from_the_command_line(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    save_tokenizer(dense)
    text, other, out = tmp_path / "text.txt", tmp_path / "other.txt", tmp_path / "out"
    text.write_text("Pack my box with five dozen liquor jugs. " * 40)
    other.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    run(
        "prune", dense, "--sparsity", 0.5, "--warm-start", "wanda", "--calibration", text,
        "--samples", 4, "--seq-len", 32, "--output", out, "--min-tokens", 8, "--seed", 3,
    )  # fmt: skip
    shown = run("verify", out, "--against", dense)
    assert "sparsity 0.5000, every kept weight is that of" in shown
    assert "(checked); errors, statuses, bounds, start errors, options: claimed" in shown
    shown = run("verify", out, "--against", dense, "--calibration", text)
    assert (
        "errors (to 1e-05) and statuses of 21 layers (checked); start errors, options: claimed"
        in shown
    )
    shown = run(
        "verify", out, "--against", dense, "--calibration", text, "--layers", "q_proj,layers.0.mlp"
    )
    assert "errors (to 1e-05) and statuses of 6 layers (checked); errors and statuses of" in shown
    assert "of the other 15, start errors, options: claimed" in shown
    said = run("verify", out, "--against", dense, "--calibration", other, fails=MaskoptError)
    assert "other.txt: is not what the model was calibrated on" in said


def test_layers_that_are_named_one_by_one(
    swapped: Path, dense_folder: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "tokens.npy", tokens().numpy())
    common = [
        "verify",
        swapped,
        "--against",
        dense_folder,
        "--calibration",
        tmp_path / "tokens.npy",
    ]
    shown = run(*common, "--include", "layers.0.mlp", "--include", "layers.1.mlp.up_proj,q_proj")
    assert "of 7 layers (checked)" in shown
    assert "--layers chooses what --calibration" in run(
        "verify", swapped, "--include", "mlp", fails=MaskoptError
    )


@pytest.mark.parametrize(
    "given",
    [
        ["--against", "x"], ["--calibration", "x"], ["--include", "x"], ["--semi-structured"],
        ["--no-semi-structured"], ["--threads", 1], ["--text-field", "x"],
    ],
)  # fmt: skip
def test_options_of_the_other_kind_are_refused(given: list[Any], swapped: Path) -> None:
    flag = given[0].replace("--no-", "--")
    said = run("verify", "a.npz", "solution.npz", *given, fails=OptionError)
    assert said == f"{flag} is for a pruned model; solution.npz is checked as a solution"
    said = run("verify", swapped, "--require-checked", fails=OptionError)
    assert said.startswith("--require-checked is for an instance and its solution")
