"""`update` least-squares: kept weights by least squares, in the model, its folder, and what checks both."""

import json

import pytest
import torch
from commands import run
from forging import change_tensors, copied, fails, forge_manifest, shard_of
from tiny_models import inputs_of, save, tiny, tokens

from maskopt import LeastSquaresUpdate, collect_problems, prune_model
from maskopt.errors import ModelError, OptionError, VerificationError
from maskopt.models.checkpoints.report import read_manifest
from maskopt.models.checkpoints.workspace import MANIFEST
from maskopt.models.evaluation.bound import certify_model
from maskopt.models.pruning.solving import DAMPING_GRID
from maskopt.models.verification.verify import verify_model

OPTIONS = {"sparsity": 0.5, "min_tokens": 1, "update": "least-squares"}
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def result(dense_folder, tmp_path_factory):
    """What `swap` makes of the dense model, and its report; nobody may change the folder."""
    out = tmp_path_factory.mktemp("refit") / "out"
    return out, prune_model(dense_folder, tokens(10), output=out, **OPTIONS)


def lost(change, inputs):
    return float((inputs @ change.T).square().mean(0).sum())


@pytest.mark.parametrize("solver", ["swap", "wanda", pytest.param("tabu", marks=pytest.mark.slow)])
def test_weights_are_those_of_least_squares_on_the_layers_own_inputs(solver):
    """Whatever chose the mask; block 1 is given what the refitted block 0 gives."""
    data, model = tokens(10), tiny("llama", layers=2)
    before, original = tiny("llama", layers=2), tiny("llama", layers=2)
    given = {**OPTIONS, "solver": solver, "holdout": 0.4}
    report = prune_model(model, data, **given)
    prune_model(before, data, include=("layers.0.*",), **given)
    second = [layer for layer in report.layers if layer.block == 1]
    assert len(second) == 7
    for layer in second:
        w, v = (m.get_submodule(layer.name).weight.detach().double() for m in (original, model))
        mask = report.masks[layer.name]
        assert not v[~mask].any()
        x, held = (inputs_of(before, layer.name, windows) for windows in (data[:6], data[6:]))
        gram = x.T @ x / len(x)
        damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        for row in range(0, len(w), 7):
            kept = mask[row]
            best = torch.linalg.solve(damped[kept][:, kept], (damped @ w[row])[kept])
            torch.testing.assert_close(v[row, kept], best, rtol=1e-3, atol=1e-4)
        assert layer.error == pytest.approx(lost(w - v, x), rel=1e-4)
        assert layer.error_held == pytest.approx(lost(w - v, held), rel=1e-4)
        assert layer.error_kept == pytest.approx(lost(w * ~mask, x))
        assert layer.error < layer.error_kept
        assert layer.objective == ("kept" if solver == "tabu" else "least-squares")


def test_dampings_of_held_out_windows_and_of_experts_that_saw_too_little(tmp_path):
    given = {**OPTIONS, "holdout": 0.4, "include": ("layers.0.self_attn.*",)}
    chosen = prune_model(tiny("llama", layers=2), tokens(10), damping="auto", **given)
    assert {layer.damping for layer in chosen.layers} <= {*DAMPING_GRID}
    fixed = prune_model(tiny("llama", layers=2), tokens(10), damping=0.003, **given)
    first = zip(chosen.layers[:3], fixed.layers[:3], strict=True)
    assert sum(a.error_held - b.error_held for a, b in first) < 0
    # experts that saw too little keep their weights; their tensor may hold others that are refitted
    more = {**OPTIONS, "min_tokens": 45, "solver": "wanda"}
    folder, out = save(tiny("mixtral", layers=2), tmp_path / "model"), tmp_path / "out"
    report = prune_model(folder, tokens(), output=out, **more)
    verify_model(out, folder, calibration=tokens())
    few = [x for x in report.layers if x.fallback]
    assert 0 < len(few) < len(report.layers)
    assert all(x.damping is None and x.error_kept is None for x in few)


def test_refitted_rows_are_proven_for_what_they_cost_refitted(result):
    """What the swaps gained is not what least squares did: their start's objective is of kept weights."""
    report = result[1]
    assert all(set(layer.statuses) == {"swap-optimal"} for layer in report.layers)
    assert report.fingerprint["options"]["start"] == "admm"
    kept = prune_model(tiny("llama"), tokens(10), **{**OPTIONS, "update": "none"})
    assert kept.fingerprint["options"]["start"] == "relax"
    ours, theirs = (sum(x.relative for x in r.layers) for r in (report, kept))
    assert ours < 0.9 * theirs
    options = {"solver_options": {"max_swaps": 0}, **OPTIONS}
    none = prune_model(tiny("llama"), tokens(10), solver="swap", **options)
    for found, gains in ((none, False), (report, True)):
        gained = [layer.improvement_quantiles for layer in found.layers]
        assert all(gained)
        assert any(gain[-1] > 0 for gain in gained) is gains
        assert all(0 <= gain[0] <= gain[-1] < 0.9 for gain in gained)


def test_the_command_says_what_mask_and_refit_did(dense, data, tmp_path):
    out = tmp_path / "out"
    words = ["--sparsity", 0.5, "--update", "least-squares", "--damping", 0.03, "--solver", "wanda"]
    words += ["--min-tokens", 8]
    assert "before" in run("prune", dense, *words, "--calibration", data, "--output", out)
    assert {layer["damping"] for layer in read_manifest(out / MANIFEST)["layers"]} == {0.03}
    shown = run("verify", out, "--original", dense)
    assert "every weight that is neither pruned nor updated is that of" in shown
    assert "updated weights" in shown[shown.index("(checked)") :]  # claimed
    shown = run("verify", out, "--original", dense, "--calibration", data)
    assert "updated weights (checked)" in shown
    assert "kept weights" not in shown


def test_problems_of_a_model_and_instances_are_for_refitted_weights_where_asked(dense, tmp_path):
    more = {"layers": "layers.0.mlp.up_proj", "calibration": tokens(), "sparsity": 0.5}
    more["update"] = "least-squares"
    ((_, problem),) = collect_problems(dense, damping=0.1, **more)
    assert problem.update == LeastSquaresUpdate(0.1)
    with pytest.raises(ModelError, match="`damping` auto chooses by masks, and none are made here"):
        collect_problems(dense, damping="auto", holdout=0.5, **more)
    up, out = tmp_path / "up.npz", tmp_path / "rows.jsonl"
    problem.with_update(None).save(up)
    part = ("--columns", 12, "--output", out)

    def objectives(*options):
        """Of the jobs that are new in the file: others were asked for otherwise."""
        before = len(out.read_text().splitlines()) if out.exists() else 0
        run("compare", up, *options, *part)
        return [json.loads(line)["objective"] for line in out.read_text().splitlines()[before:]]

    all_three = ("--solvers", "wanda,admm,swap", "--rows", 2)
    refitted = objectives(*all_three, "--update", "least-squares", "--damping", "0.1")
    kept = objectives(*all_three)
    assert len(refitted) == len(kept) == 6
    assert refitted[0] != kept[0]  # the damping counts in the one
    assert refitted[2] <= min(refitted[:2]) * (1 + 1e-9)
    owned = ("--update", "least-squares", "--solver-options", "sparsegpt.update=true", "--rows", 1)
    assert len(objectives("--solvers", "sparsegpt,obs", *owned)) == 2
    shown = run("compare", up, "--solvers", "obs", *owned, "--columns", 12, fails=OptionError)
    assert "there is no solver 'sparsegpt' among obs" in shown


# What checks them ---------------------------------------------------------------------------------


def weights(change):
    def forge(out):
        change_tensors(shard_of(out, NAME), lambda tensors: change(tensors[NAME]))
        forge_manifest(out)

    return forge


def layer(**values):
    return lambda out: forge_manifest(out, lambda m: m["layers"][9].update(values))


def keeps(out):
    def change(manifest):
        manifest["fingerprint"]["options"]["update"] = "none"
        for layer in manifest["layers"]:
            layer.update(damping=None, error_kept=None, objective="kept")

    forge_manifest(out, change)


moved = weights(lambda weight: weight[0].mul_(1.001))
infinite = weights(lambda weight: weight.masked_fill_(weight == weight.max(), torch.inf))
FORGED = [
    (moved, "row 0: its weights are not those of least squares"),
    (infinite, "holds NaN or infinite weights"),
    (keeps, "a kept weight differs from the original"),
    (layer(damping=0.02), "was updated with another damping than the options say"),
    (layer(damping=None), "is updated, or not, otherwise than the options say"),
    (layer(error_kept=0.0), "before its weights were updated; its mask has"),
    (layer(error=0.0), "states an error of 0; its mask has"),
]


def test_gaps_of_refitted_weights_are_not_claimed(result, dense_folder):
    with pytest.raises(ModelError, match="its weights were updated, and bounds are for unchanged"):
        certify_model(dense_folder, result[0], calibration=tokens(10), rows_per_layer=1)


@pytest.mark.parametrize(("forge", "message"), FORGED)
def test_what_is_not_so_is_found(forge, message, result, dense_folder, tmp_path):
    out = copied(result[0], tmp_path)
    forge(out)
    if forge is moved:  # only the calibration text shows it
        verify_model(out, dense_folder)
    fails(VerificationError, message, verify_model, out, dense_folder, calibration=tokens(10))


def test_a_solvers_own_weights_are_said_to_be_and_checked_for_what_they_cost(
    dense_folder, tmp_path
):
    given, own = {**OPTIONS, "solver": "sparsegpt"}, tmp_path / "own"
    squares = prune_model(tiny("llama"), tokens(), **given)
    report = prune_model(
        dense_folder, tokens(), output=own, **given, solver_options={"update": True}
    )
    assert {x.objective for x in report.layers} == {"updated"}
    first = [r.layers[0] for r in (squares, report)]
    assert first[0].error < first[1].error < first[1].error_kept
    verified = verify_model(own, dense_folder, calibration=tokens())
    assert "errors" in verified.checked
    assert "updated weights" in verified.claimed

    def claims(out):
        forge_manifest(out, lambda m: [x.update(objective="least-squares") for x in m["layers"]])

    for forge, said in ((moved, "states an error of"), (claims, "are not those of least squares")):
        forge(out := copied(own, tmp_path / said))
        fails(VerificationError, said, verify_model, out, dense_folder, calibration=tokens())


def test_options_that_no_run_has_are_refused(pruned_folder, tmp_path):
    for index, said in enumerate(({"sensitivity": "uniform"}, {"damping": 0.3})):
        out = copied(pruned_folder, tmp_path / str(index))
        forge_manifest(out, lambda m, said=said: m["fingerprint"]["options"].update(said))
        fails(VerificationError, "damaged or was changed", verify_model, out)
