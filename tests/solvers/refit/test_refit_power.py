"""`Refit(power=…)`: inputs damped by their size. What holds of F under any damping is tested elsewhere, with
some powers among them; here is what every solver makes of it, and what a power alone does."""

from typing import Any

import pytest
import torch
from forging import copied, forge_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import problems, random_gram, random_weight
from test_refit_objective import metric, random_mask
from test_refit_swap import assert_proven
from tiny_models import save, tiny, tokens

from maskopt import (
    NM,
    LayerProblem,
    Refit,
    Status,
    Unstructured,
    load_problem,
    lower_bound,
    make_solver,
    prune_model,
    refit,
    solve,
    verify,
)
from maskopt.errors import MaskoptError, OptionError, VerificationError
from maskopt.files import read_arrays
from maskopt.least_squares import LeastSquares
from maskopt.model.report import read_manifest
from maskopt.model.verify import verify_output
from maskopt.model.workspace import MANIFEST

POWERS = st.sampled_from((0.25, 0.5, 1.0))
ROOT = Refit(0.1, power=0.5)


def layer(pattern=Unstructured(0.5), rows=3, n=16, kind="outliers", how=ROOT):  # noqa: B008
    return LayerProblem(random_weight(rows, n, 1), random_gram(n, kind, 2), pattern, refit=how)


def slack(problem):
    return 1e-9 * problem.diagonal_mass() + 1e-300


def test_inputs_are_damped_by_a_power_of_their_size():
    gram = torch.diag(torch.tensor([16.0, 4.0, 4.0, 0.0], dtype=torch.float64))
    ridge = LeastSquares.of(gram, Refit(0.5, power=0.5)).ridge
    # the mean is 6; an input that is always 0 has the least damping
    expected = [0.5 * (6 * 16) ** 0.5, 0.5 * (6 * 4) ** 0.5, 0.5 * (6 * 4) ** 0.5, 6e-6]
    torch.testing.assert_close(ridge, torch.tensor(expected, dtype=torch.float64))
    alike = LeastSquares.of(gram, Refit(0.5)).ridge
    assert alike.tolist() == [3.0] * 4


@settings(max_examples=20)
@given(problems(max_n=10, max_rows=3), POWERS, st.sampled_from((0.0, 0.01, 0.3)))
def test_solvers_end_where_they_say(problem, power, damping):
    problem = problem.refitting(Refit(damping, power))
    best = solve(problem, "exhaustive")
    verify(problem, best, require="checked")
    for name in ("obs", "admm", "swap", "memetic"):
        found = solve(problem, name)
        verify(problem, found)
        assert bool((found.objective >= best.objective - slack(problem)).all())
        if name in ("swap", "memetic"):
            assert_proven(problem, found)
    assert bool(
        (lower_bound(problem, "perspective").value <= best.objective + slack(problem)).all()
    )


@pytest.mark.parametrize("solver", ["branch", "scip"])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(keep=2, of=4)], ids=str)
@pytest.mark.parametrize("kind", ["full", "zero-columns"])
def test_exact_solvers_prove_the_optimum(solver, pattern, kind):
    problem = layer(pattern, rows=2, n=12, kind=kind)
    found = solve(problem, solver)
    assert set(found.status) == {Status.OPTIMAL}
    verify(problem, found)
    best = solve(problem, "exhaustive").objective
    torch.testing.assert_close(found.objective, best, rtol=1e-6, atol=float(slack(problem).max()))


def test_rows_that_trade():
    problem = layer(Unstructured(0.5, per="layer"), rows=2, n=7)
    best = solve(problem, "exhaustive").objective.sum()
    found = solve(problem, "swap")
    verify(problem, found)
    assert set(found.status) == {Status.SWAP_OPTIMAL}
    assert float(found.objective.sum()) >= float(best) * (1 - 1e-9)


@pytest.mark.parametrize("solver", ["swap", "obs", "admm"])
def test_a_power_of_one_does_not_see_the_size_of_inputs(solver):
    """Inputs times s and weights by s are the same layer; powers of two, for rounding."""
    size = 2.0 ** torch.randint(-3, 4, (24,), generator=torch.Generator().manual_seed(3)).double()
    problem = layer(n=24, kind="full", how=Refit(0.1, power=1))
    gram = problem.gram * size * size[:, None]
    scaled = LayerProblem(problem.weight / size, gram, problem.pattern, refit=problem.refit)
    one, other = solve(problem, solver), solve(scaled, solver)
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.objective, other.objective, rtol=1e-9, atol=0)
    alike = scaled.refitting(Refit(0.1))
    apart = alike.objective(one.mask) / problem.refitting(Refit(0.1)).objective(one.mask)
    assert bool((apart - 1).abs().gt(0.01).all())


def test_solvers_that_need_none_are_told_how(monkeypatch):
    """`obs` for a problem that keeps its weights, alone and as a start for refitted ones."""
    problem = layer(n=32)
    kept = problem.refitting(None)
    mask = solve(problem, "obs").mask
    assert torch.equal(solve(kept, make_solver("obs", damping=0.1, power=0.5)).mask, mask)
    assert not torch.equal(solve(kept, make_solver("obs", damping=0.1)).mask, mask)
    start = solve(problem, make_solver("swap", max_swaps=0), start="obs")
    assert torch.equal(start.mask, mask)


def test_a_mask_is_refitted_so():
    problem = layer().refitting(None)
    mask = solve(problem, "wanda").mask
    found = refit(problem, mask, damping=0.1, power=0.5)
    torch.testing.assert_close(found.weight, layer().weights(mask))
    torch.testing.assert_close(refit(layer(), mask).weight, found.weight)
    assert not torch.allclose(refit(problem, mask, damping=0.1).weight, found.weight)


def test_files_hold_it_and_those_without_it_mean_none(tmp_path):
    problem, mask = layer(), random_mask(layer())
    problem.save(tmp_path / "layer.npz")
    read = load_problem(tmp_path / "layer.npz")
    assert read.refit == ROOT
    assert torch.equal(read.objective(mask), problem.objective(mask))
    layer(how=Refit(0.1)).save(tmp_path / "alike.npz")
    header, _ = read_arrays(tmp_path / "alike.npz", "layer")
    assert header["refit"] == {"damping": 0.1}
    assert load_problem(tmp_path / "alike.npz").refit == Refit(0.1, power=0.0)
    assert repr(problem.refit) == "Refit(damping=0.1, power=0.5)"


@pytest.mark.parametrize("power", [-0.1, 1.1, float("nan"), True, "x", None], ids=repr)
def test_bad_powers_are_refused(power):
    with pytest.raises(OptionError, match="`power` must be 0 to 1"):
        Refit(0.1, power)


def test_float32_is_as_good(tmp_path):
    wide = layer(rows=4, n=64)
    narrow = LayerProblem(wide.weight.float(), wide.gram.float(), wide.pattern, refit=ROOT)
    exact = LayerProblem(narrow.weight.double(), narrow.gram.double(), wide.pattern, refit=ROOT)
    found = solve(narrow, "swap")
    assert_proven(narrow, found)
    torch.testing.assert_close(found.objective, exact.objective(found.mask), rtol=1e-9, atol=0)


OPTIONS: dict[str, Any] = {"sparsity": 0.5, "min_tokens": 1, "weights": "refit", "damping": 0.1}


def test_models_are_refitted_and_checked_so(tmp_path):
    dense, out = save(tiny("llama"), tmp_path / "dense"), tmp_path / "out"
    report = prune_model(dense, tokens(), output=out, damping_power=0.5, **OPTIONS)
    alike = prune_model(dense, tokens(), output=tmp_path / "alike", **OPTIONS)
    assert [x.error for x in report.layers] != [x.error for x in alike.layers]
    assert read_manifest(out / MANIFEST)["fingerprint"]["options"]["damping_power"] == 0.5
    assert verify_output(out, dense, calibration=tokens()).checked_layers
    # a manifest of before there was a choice means none
    forged = copied(tmp_path / "alike", tmp_path / "older")
    forge_manifest(forged, lambda m: m["fingerprint"]["options"].pop("damping_power"))
    assert verify_output(forged, dense, calibration=tokens()).checked_layers
    # and one that says another is found out
    forged = copied(out, tmp_path / "forged")
    forge_manifest(forged, lambda m: m["fingerprint"]["options"].update(damping_power=0.0))
    with pytest.raises(VerificationError):
        verify_output(forged, dense, calibration=tokens())
    # what no run has is no manifest, text or not
    forge_manifest(forged, lambda m: m["fingerprint"]["options"].update(damping_power=1.5))
    with pytest.raises(VerificationError, match="damaged or was changed"):
        verify_output(forged)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"damping_power": 2.0}, r"`damping_power` must be a number \[0, 1\], not 2.0"),
        ({"weights": "keep", "damping": 0.01, "damping_power": 0.5}, "is of refitted weights"),
    ],
)
def test_bad_options_get_one_line(how, message):
    with pytest.raises(MaskoptError, match=message):
        prune_model(tiny("llama"), tokens(), **{**OPTIONS, **how})


def test_the_metric_of_the_tests_is_that_of_the_definition():
    problem = layer()
    torch.testing.assert_close(problem.least_squares.damped, metric(problem))
