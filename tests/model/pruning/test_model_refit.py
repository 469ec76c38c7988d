"""`weights` refit: kept weights set anew by least squares, in the model, its folder, and what checks both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from forging import change_masks, copied, forge_manifest, shard_of
from outputs import contents
from resuming import interrupted
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, inputs_of, save, tiny, tokens
from transformers import AutoModelForCausalLM

from maskopt import Refit, collect_problems, prune_model
from maskopt.certify import certify_model
from maskopt.errors import MaskoptError, ModelError, OptionError, VerificationError
from maskopt.model.report import read_manifest
from maskopt.model.verify import verify_output
from maskopt.model.workspace import MANIFEST

OPTIONS: dict[str, Any] = {"sparsity": 0.5, "min_tokens": 1, "weights": "refit"}


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize("solver", ["swap", "wanda", "tabu"])
def test_weights_are_those_of_least_squares_on_the_layers_own_inputs(solver: str) -> None:
    """Whatever chose the mask; block 1 is given what the refitted block 0 gives."""
    data, model = tokens(10), tiny("llama")
    report = prune_model(model, data, solver=solver, holdout=0.4, **OPTIONS)
    before, original = tiny("llama"), tiny("llama")
    prune_model(before, data, solver=solver, holdout=0.4, include=("layers.0.*",), **OPTIONS)
    checked = 0
    for layer in (layer for layer in report.layers if layer.block == 1):
        w = original.get_submodule(layer.name).weight.detach().double()
        v = model.get_submodule(layer.name).weight.detach().double()
        mask = report.masks[layer.name]
        assert not v[~mask].any()
        x = inputs_of(before, layer.name, data[:6])
        gram = x.T @ x / len(x)
        damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        for row in range(0, len(w), 7):
            kept = mask[row]
            best = torch.linalg.solve(damped[kept][:, kept], (damped @ w[row])[kept])
            torch.testing.assert_close(v[row, kept], best, rtol=1e-3, atol=1e-4)
        lost = (x @ (w - v).T).square().mean(0).sum()
        aside = (inputs_of(before, layer.name, data[6:]) @ (w - v).T).square().mean(0).sum()
        assert layer.error == pytest.approx(float(lost), rel=1e-4)
        assert layer.error_held == pytest.approx(float(aside), rel=1e-4)
        assert layer.error_kept == pytest.approx(float((x @ (w * ~mask).T).square().mean(0).sum()))
        assert layer.error < layer.error_kept
        assert layer.chosen_for == ("kept" if solver == "tabu" else "refitted")
        checked += 1
    assert checked == 7


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_written_as_it_is_in_memory(family: str, tmp_path: Path) -> None:
    """The same logits (experts are called in another order there), and nothing that verify finds."""
    folder = save(tiny(family), tmp_path / "model")
    more = {"min_tokens": 8, "solver": "wanda"}
    prune_model(folder, tokens(), output=tmp_path / "out", **{**OPTIONS, **more})
    model = loaded(folder)
    prune_model(model, tokens(), **{**OPTIONS, **more})
    with torch.no_grad():
        expected, found = (m(tokens()[:2]).logits for m in (model, loaded(tmp_path / "out")))
    torch.testing.assert_close(expected, found, rtol=1e-5, atol=1e-6)
    verified = verify_output(tmp_path / "out", folder, calibration=tokens())
    assert "refitted weights" in verified.checked
    assert "kept weights" not in {*verified.checked, *verified.claimed}  # none is


@pytest.mark.parametrize("stage", ["calibrate", "solve"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_runs_write_the_same_bytes(tmp_path: Path, stage: str, dtype: torch.dtype) -> None:
    dense = save(tiny("llama", dtype=dtype), tmp_path / "model", shard="20KB")
    more = {**OPTIONS, "solver": "swap", "warm_start": None, "holdout": 0.4}
    prune_model(dense, tokens(), output=tmp_path / "whole", **more)
    interrupted(dense, tmp_path / "out", 2, stage, **more)
    prune_model(dense, tokens(), output=tmp_path / "out", resume=True, **more)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    verified = verify_output(tmp_path / "out", dense, calibration=tokens())
    assert len(verified.checked_layers) == 21


def test_a_changed_file_of_new_weights_is_not_gone_on_with(dense: Path, tmp_path: Path) -> None:
    more = {**OPTIONS, "solver": "swap", "warm_start": None}
    interrupted(dense, tmp_path / "out", 2, "solve", **more)
    (file,) = (tmp_path / "out").rglob("00000.weights.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        ModelError, match=r"00000\.weights\.safetensors: does not match the journal"
    ):
        prune_model(dense, tokens(), output=tmp_path / "out", resume=True, **more)


def test_experts_that_saw_too_little_keep_their_weights(tmp_path: Path) -> None:
    """Their tensor may hold others that are refitted."""
    folder = save(tiny("mixtral"), tmp_path / "model")
    report = prune_model(
        folder,
        tokens(),
        output=tmp_path / "out",
        **{**OPTIONS, "min_tokens": 45, "solver": "wanda"},
    )
    few = [x for x in report.layers if x.fallback]
    assert few
    assert len(few) < len(report.layers)
    assert all(x.damping is None and x.error_kept is None for x in few)
    verify_output(tmp_path / "out", folder, calibration=tokens())


def test_damping_by_held_out_windows_is_one_of_the_grid() -> None:
    report = prune_model(tiny("llama"), tokens(10), holdout=0.4, damping="auto", **OPTIONS)
    found = {layer.damping for layer in report.layers}
    assert found <= {0.003, 0.01, 0.03, 0.1, 0.3}
    fixed = prune_model(tiny("llama"), tokens(10), holdout=0.4, damping=0.003, **OPTIONS)
    first = zip(report.layers[:3], fixed.layers[:3], strict=True)
    assert sum(a.error_held - b.error_held for a, b in first) < 0  # type: ignore[operator]


def test_refitted_rows_are_proven_for_what_they_cost_refitted() -> None:
    report = prune_model(tiny("llama"), tokens(10), **OPTIONS)
    assert all(set(layer.statuses) == {"swap-optimal"} for layer in report.layers)
    assert report.fingerprint["options"]["warm_start"] == "admm"
    kept = prune_model(tiny("llama"), tokens(10), **{**OPTIONS, "weights": "keep"})
    assert kept.fingerprint["options"]["warm_start"] == "relax"
    ours, theirs = (sum(x.relative for x in r.layers) for r in (report, kept))
    assert ours < 0.9 * theirs


def test_the_command_says_what_mask_and_refit_did(dense: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("Pack my box with five dozen liquor jugs. " * 40)
    shown = run(
        "prune", dense, "--sparsity", 0.5, "--weights", "refit", "--damping", "0.03",
        "--calibration", text, "--samples", 4, "--seq-len", 32, "--output", out, "--min-tokens", 8,
    )  # fmt: skip
    assert "before" in shown
    assert {layer["damping"] for layer in read_manifest(out / MANIFEST)["layers"]} == {0.03}
    shown = run("verify", out, "--against", dense)
    assert "every weight that is neither pruned nor refitted is that of" in shown
    assert "kept weights, refitted weights" in shown[shown.index("(checked)") :]  # claimed
    shown = run("verify", out, "--against", dense, "--calibration", text)
    assert "statuses of 21 layers, refitted weights (checked)" in shown
    assert "kept weights" not in shown


def test_problems_of_a_model_and_instances_are_for_refitted_weights_where_asked(
    dense: Path, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"layers": "layers.0.mlp.up_proj", "calibration": tokens()}
    ((_, problem),) = collect_problems(dense, sparsity=0.5, weights="refit", damping=0.1, **more)
    assert problem.refit == Refit(0.1)
    with pytest.raises(ModelError, match="`damping` auto chooses by masks, and none are made here"):
        collect_problems(dense, sparsity=0.5, weights="refit", damping="auto", holdout=0.5, **more)
    problem.refitting(None).save(tmp_path / "up.npz")
    out = tmp_path / "rows.jsonl"
    options = ["--solvers", "wanda,admm,swap", "--rows", 2, "--columns", 12, "--output", out]
    run("compare", tmp_path / "up.npz", "--weights", "refit", "--damping", "0.1", *options)
    refitted = [json.loads(line)["objective"] for line in out.read_text().splitlines()]
    run("compare", tmp_path / "up.npz", *options)  # into the same file: they are other jobs
    kept = [json.loads(line)["objective"] for line in out.read_text().splitlines()][6:]
    assert len(refitted) == len(kept) == 6
    assert refitted[0] != kept[0]  # the damping counts in the one
    assert refitted[2] <= min(refitted[:2]) * (1 + 1e-9)
    owned = [
        "--weights",
        "refit",
        "--option",
        "sparsegpt.update=true",
        "--rows",
        1,
        "--columns",
        12,
    ]
    run("compare", tmp_path / "up.npz", "--solvers", "sparsegpt,obs", *owned, "--output", out)
    assert len(out.read_text().splitlines()) == 14
    shown = run("compare", tmp_path / "up.npz", "--solvers", "obs", *owned, fails=OptionError)
    assert "there is no solver 'sparsegpt' among obs" in shown


def test_gaps_of_refitted_weights_are_not_claimed(result: tuple[Path, Path]) -> None:
    with pytest.raises(ModelError, match="its weights were set anew, and bounds are of weights as"):
        certify_model(result[0], result[1], calibration=tokens(), rows_per_layer=1)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("refit")
    dense = save(tiny("llama"), home / "model")
    prune_model(dense, tokens(), output=home / "out", **OPTIONS)
    return dense, home / "out"


NAME = "model.layers.1.mlp.up_proj.weight"


def changed(out: Path, change: Any) -> None:
    """One tensor of the result changed, and every digest made right again."""
    path = shard_of(out, NAME)
    tensors = load_file(path)
    change(tensors[NAME])
    save_file(tensors, path, metadata={"format": "pt"})
    forge_manifest(out)


def moved(weight: torch.Tensor) -> None:
    weight[0] *= 1.001


def test_weights_that_are_not_least_squares_are_found(
    result: tuple[Path, Path], tmp_path: Path
) -> None:
    out = copied(result[1], tmp_path)
    changed(out, moved)
    verify_output(out, result[0])  # only the calibration text can tell
    with pytest.raises(
        VerificationError, match=r"row 0: its weights are not those of least squares"
    ):
        verify_output(out, result[0], calibration=tokens())


def test_weights_that_no_layer_may_change_are_found(
    result: tuple[Path, Path], tmp_path: Path
) -> None:
    out = copied(result[1], tmp_path)

    def keeps(manifest: dict[str, Any]) -> None:
        manifest["fingerprint"]["options"]["weights"] = "keep"
        for layer in manifest["layers"]:
            layer.update(damping=None, error_kept=None, chosen_for="kept")

    forge_manifest(out, keeps)
    with pytest.raises(VerificationError, match="a kept weight differs from the original"):
        verify_output(out, result[0])


def test_a_solvers_own_weights_are_said_to_be_and_checked_for_what_they_cost(
    dense: Path, tmp_path: Path
) -> None:
    more = {**OPTIONS, "solver": "sparsegpt", "solver_options": {"update": True}}
    report = prune_model(dense, tokens(), output=tmp_path / "own", **more)
    squares = prune_model(
        dense, tokens(), **{**OPTIONS, "solver": "sparsegpt"}, output=tmp_path / "out"
    )
    assert {x.chosen_for for x in report.layers} == {"updated"}
    first = [r.layers[0] for r in (squares, report)]
    assert first[0].error < first[1].error < first[1].error_kept  # type: ignore[operator]
    verified = verify_output(tmp_path / "own", dense, calibration=tokens())
    assert "errors" in verified.checked
    assert "refitted weights" in verified.claimed
    out = copied(tmp_path / "own", tmp_path / "moved")
    changed(out, moved)
    with pytest.raises(VerificationError, match="states an error of"):
        verify_output(out, dense, calibration=tokens())
    out = copied(tmp_path / "own", tmp_path / "claims")
    forge_manifest(out, lambda m: [x.update(chosen_for="refitted") for x in m["layers"]])
    with pytest.raises(VerificationError, match="its weights are not those of least squares"):
        verify_output(out, dense, calibration=tokens())


def test_infinite_weights_are_found(result: tuple[Path, Path], tmp_path: Path) -> None:
    out = copied(result[1], tmp_path)
    kept = change_masks(out, lambda _: None)[NAME].kept

    def infinite(weight: torch.Tensor) -> None:
        weight[tuple(kept.nonzero()[0])] = torch.inf

    changed(out, infinite)
    with pytest.raises(VerificationError, match="holds NaN or infinite weights"):
        verify_output(out, result[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"damping": 0.02}, "was refitted with another damping than the options say"),
        ({"damping": None}, "is refitted, or not, otherwise than the options say"),
        ({"error_kept": 0.0}, "before its weights were refitted; its mask has"),
        ({"error": 0.0}, "states an error of 0; its mask has"),
    ],
)
def test_manifests_that_say_otherwise_are_found(
    result: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    out = copied(result[1], tmp_path)
    forge_manifest(out, lambda m: m["layers"][9].update(change))
    with pytest.raises(VerificationError, match=message):
        verify_output(out, result[0], calibration=tokens())


def test_options_of_nothing_in_an_older_manifest_are_passed_over(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    prune_model(dense, tokens(), output=tmp_path / "out", sparsity=0.5, min_tokens=1)
    told = {"importance": "alike", "damping": 0.3}
    forge_manifest(tmp_path / "out", lambda m: m["fingerprint"]["options"].update(told))
    assert verify_output(tmp_path / "out", dense, calibration=tokens()).checked_layers


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"weights": "both"},
            OptionError,
            "`weights` must be text keep or refit or reconstruct, not 'both'",
        ),
        ({"damping": -1.0}, OptionError, "`damping` must be at least 0, not -1.0"),
        ({"damping": "some"}, OptionError, "`damping` must be a number of at least 0 or auto"),
        ({"damping": "auto"}, ModelError, "`damping` auto needs held-out windows"),
        ({"weights": "keep", "damping": 0.1}, OptionError, "`damping` is of refitted weights"),
        (
            {"weights": "reconstruct", "holdout": 0.2, "damping": 0.1},
            OptionError,
            "`damping` is of refitted weights",
        ),
    ],
)
def test_bad_input_gets_one_line(
    options: dict[str, Any], kind: type[MaskoptError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        prune_model(tiny("llama"), tokens(), **{**OPTIONS, **options})


def test_what_the_swaps_gained_is_not_what_least_squares_did() -> None:
    """The start's objective is of weights as they were."""
    for most, gains in ((0, False), (None, True)):
        report = prune_model(
            tiny("llama"), tokens(10), solver="swap", solver_options={"max_swaps": most}, **OPTIONS
        )
        told = [layer.gained for layer in report.layers]
        assert all(gained is not None for gained in told)
        assert any(gained[-1] > 0 for gained in told if gained) is gains
        assert all(0 <= gained[0] <= gained[-1] < 0.9 for gained in told if gained)
