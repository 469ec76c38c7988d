"""Certified lower bounds of refitted weights: below every mask, checked, and worth something."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from certificates import claimed
from hypothesis import given
from hypothesis import strategies as st
from local_search import floor
from refit_layers import REFITS, changed, shuffled
from strategies import HALF, KINDS, problems, random_linear, refit_layer

from maskopt import (
    NM,
    LayerProblem,
    Limits,
    Refit,
    Solution,
    Status,
    Unstructured,
    available_bounds,
    lower_bound,
    solve,
    verify,
)
from maskopt.errors import OptionError, ProblemError, SolverError, VerificationError
from maskopt.refit_certificate import RefitCertificate

PATTERNS = (HALF, NM(keep=2, of=4), NM(keep=1, of=4))


@given(problems(max_n=8, max_rows=2), st.sampled_from((Refit(0.001), *REFITS)), st.integers(0, 4))
def test_no_mask_costs_less(problem, how, splits):
    problem = problem.refitting(how)
    bound = lower_bound(problem, "perspective", splits=splits, turns=20)
    best = solve(problem, "exhaustive")
    assert bool((bound.value >= 0).all())
    assert bool((bound.value <= best.objective + floor(problem)).all())
    claimed = Solution.of(
        problem, best.mask, lower_bound=bound.value, certificate=bound.certificate
    )
    assert verify(problem, claimed).checked


def seeds(few, many):
    """The first few in the default tier, the rest in the slow one."""
    slow = (pytest.param(seed, marks=pytest.mark.slow) for seed in range(few, many))
    return pytest.mark.parametrize("seed", [*range(few), *slow])


@seeds(1, 9)
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_rows_are_bounded_by_their_optimum(kind, seed):
    rows, damping = 32 if seed else 8, (0.01, 0.1)[seed % 2]
    problem = refit_layer(rows=rows, n=6, kind=kind, seed=seed, damping=damping)
    bound = lower_bound(problem, "perspective", splits=1 - seed % 2, turns=5)
    best = solve(problem, "exhaustive").objective
    assert bool((bound.value <= best + floor(problem)).all())


@given(st.integers(0, 10**6), st.sampled_from(PATTERNS), st.booleans())
def test_any_point_and_any_split_prove_no_more_than_is_true(seed, pattern, linear):
    """However bad: random v, and d of which much is missing to B ⪰ 0."""
    problem = refit_layer(pattern, rows=2, n=8, seed=seed)
    if linear:
        part = random_linear(problem.weight, problem.gram, seed + 3)
        problem = LayerProblem(
            problem.weight, problem.gram, pattern, linear=part, refit=problem.refit
        )
    generator = torch.Generator().manual_seed(seed)
    size = problem.least_squares.damped.diagonal()
    d = size * torch.rand(2, 8, generator=generator, dtype=torch.float64)
    d *= 10.0 ** -torch.randint(0, 4, (2, 1), generator=generator)
    v = problem.weight + torch.randn(2, 8, generator=generator, dtype=torch.float64) / 10
    proven = RefitCertificate(d, v).check(problem)
    best = solve(problem, "exhaustive").objective
    assert bool((proven <= best + floor(problem)).all())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_value_is_the_formulas(pattern):
    problem = refit_layer(pattern, rows=2, n=8, seed=4)
    a = problem.least_squares.damped
    room = float(torch.linalg.eigvalsh(a)[0])
    d = torch.full((2, 8), 0.5 * room, dtype=torch.float64)
    v = solve(problem, "exhaustive").mask * problem.weight
    proven = RefitCertificate(d, v).check(problem)
    kept = 1 if pattern == NM(1, 4) else 2 if isinstance(pattern, NM) else 4
    for row in range(2):
        w, b = problem.weight[row], a - torch.diag(d[row])
        price = (a @ w - b @ v[row]).square() / d[row]
        groups = price.view(-1, problem.group_size).sort(dim=1).values[:, -kept:]
        true = float(w @ a @ w - v[row] @ b @ v[row] - groups.sum())
        assert float(proven[row]) == pytest.approx(max(true, 0.0), rel=1e-9, abs=1e-12)


def test_it_is_tight_where_inputs_are_not_correlated():
    for damping in (0.01, 1.0):
        problem = refit_layer(kind="diagonal", rows=3, n=8, damping=damping)
        best = solve(problem, "swap").objective
        bound = lower_bound(problem, "perspective").value
        torch.testing.assert_close(bound, best, rtol=5e-3, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=str)
def test_better_splits_and_turns_only_help(pattern):
    problem = refit_layer(pattern, rows=2, n=16, damping=0.05)
    found = solve(problem, "swap").objective
    gaps = [
        float(lower_bound(problem, "perspective", splits=splits).gap(found).mean())
        for splits in (0, 1, 4, 20)
    ]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(gaps))
    assert gaps[-1] < 0.97 * gaps[0]


def test_order_units_threads_and_a_row_alone_change_nothing():
    problem = refit_layer(rows=3, n=8)
    bound = lower_bound(problem, "perspective", threads=1).value
    assert torch.equal(lower_bound(problem, "perspective", threads=2).value, bound)
    for row in range(3):
        assert float(lower_bound(problem.row(row), "perspective").value) == float(bound[row])
    moved = lower_bound(changed(problem, columns=shuffled(problem)), "perspective").value
    torch.testing.assert_close(moved, bound, rtol=1e-3, atol=1e-12)
    scaled = changed(problem, 2.0**10, 2.0**-6)
    torch.testing.assert_close(lower_bound(scaled, "perspective").value, bound * 2.0**14)


def test_degenerate_rows_are_bounded_by_nothing():
    for w, g in ((0.0, 1.0), (1.0, 0.0)):
        problem = changed(refit_layer(rows=2, n=6), w, g)
        assert lower_bound(problem, "perspective").value.tolist() == [0.0, 0.0]
    for keep in (0, 5):
        problem = refit_layer(Unstructured(keep=keep), n=5)
        bound = lower_bound(problem, "perspective").value
        optimum = solve(problem, "exhaustive").objective
        assert bool((bound <= optimum + floor(problem)).all())
        assert bool((bound >= 0.9 * optimum - floor(problem)).all())


@seeds(3, 40)
@pytest.mark.parametrize("per", ["row", "layer"])
def test_inputs_that_say_the_same_are_bounded_too(per, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1 + seed % 3, 4, generator=generator, dtype=torch.float64)
    x = x * 10.0 ** torch.empty(4, dtype=torch.float64).uniform_(-3, 3, generator=generator)
    x[:, 1] = -x[:, 0]
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    weight[torch.rand(3, 4, generator=generator) < 0.3] = 0
    for damping in (0.0, 1e-6, 0.01):
        pattern = Unstructured(sparsity=0.5, per=per)
        problem = LayerProblem(weight, x.T @ x, pattern, refit=Refit(damping))
        best = solve(problem, "exhaustive")
        bound = lower_bound(problem, "perspective", splits=4)
        room = 1e-9 * problem.diagonal_mass().sum()
        assert float(bound.value.sum()) <= float(best.objective.sum() + room)
        if per == "row":
            one = problem.take([seed % 3])
            verify(one, solve(one, "branch"))


def test_no_time_leaves_a_bound_that_holds():
    problem = refit_layer(rows=2, n=12)
    bound = lower_bound(problem, "perspective", limits=Limits(seconds=0))
    assert bound.trace.iterations.tolist() == [0, 0]
    assert bool((bound.value <= solve(problem, "exhaustive").objective).all())


def test_float32_layers_have_bounds_too():
    problem = refit_layer(rows=2, n=12, dtype=torch.float32)
    bound = lower_bound(problem, "perspective")
    found = solve(problem, "exhaustive")
    assert bool((bound.value <= found.objective + floor(problem)).all())
    assert bool((bound.value > 0.2 * found.objective).all())


def test_it_goes_with_a_solution_to_disk_and_back(tmp_path):
    problem = refit_layer(rows=2, n=12)
    bound = lower_bound(problem, "perspective")
    mask, status = solve(problem, "swap").mask, Status.SWAP_OPTIMAL
    more = {"lower_bound": bound.value, "certificate": bound.certificate, "status": status}
    Solution.of(problem, mask, **more).save(tmp_path / "solution.npz")
    loaded = Solution.load(tmp_path / "solution.npz")
    assert isinstance(loaded.certificate, RefitCertificate)
    assert torch.equal(loaded.certificate.check(problem), bound.value)
    assert verify(problem, loaded, require="checked").checked
    # half a certificate is none
    parts = dict(np.load(tmp_path / "solution.npz"))
    del parts["certificate.point"]
    np.savez(tmp_path / "half.npz", **parts)
    with pytest.raises(ProblemError, match="not a sound certificate"):
        Solution.load(tmp_path / "half.npz")


def test_claims_beyond_the_certificate_are_refused():
    problem = refit_layer(rows=2, n=24)
    bound = lower_bound(problem, "perspective")
    found = solve(problem, "swap")
    assert claimed(problem, found, bound).checked
    good = bound.certificate
    for certificate, message in (
        (replace(good, split=-good.split), "split of the diagonal is negative"),
        (replace(good, split=good.split * torch.nan), "split holds NaN or infinite"),
        (replace(good, split=good.split[:, :5]), r"split must be float64 \[2, 24\]"),
        (replace(good, point=good.point.float()), r"point must be float64 \[2, 24\]"),
        (replace(good, split=torch.zeros_like(good.split)), "its certificate proves 0"),
        (replace(good, split=1e6 * good.split), "its certificate proves 0"),
        (replace(good, point=2 * good.point), "its certificate proves"),
    ):
        with pytest.raises(VerificationError, match=message):
            claimed(problem, found, bound, certificate=certificate)
    with pytest.raises(VerificationError, match="its certificate proves"):
        claimed(problem, found, bound, 1.001)
    other = refit_layer(rows=2, n=24, seed=9)
    assert float(good.check(other).sum()) < float(bound.value.sum())


def test_bounds_of_kept_weights_are_no_bounds_of_refitted_ones():
    problem = refit_layer(rows=1, n=6)
    kept = problem.refitting(None)
    assert "perspective" in available_bounds()
    with pytest.raises(SolverError, match=r"'sdp' is of weights as they are; .* 'perspective'"):
        lower_bound(problem, "sdp")
    with pytest.raises(SolverError, match="'perspective' is of refitted weights"):
        lower_bound(kept, "perspective")
    with pytest.raises(OptionError, match="splits"):
        lower_bound(problem, "perspective", splits=-1)
    certificates = [
        (lower_bound(kept, "box").certificate, problem, "proves nothing of refitted weights"),
        (lower_bound(problem, "perspective").certificate, kept, "proves nothing of kept ones"),
    ]
    for certificate, wrong, message in certificates:
        with pytest.raises(VerificationError, match=message):
            certificate.check(wrong)
