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
from strategies import HALF, problems, refit_layer

from maskopt import (
    NM,
    LayerProblem,
    LeastSquaresUpdate,
    Limits,
    Unstructured,
    available_bounds,
    solve,
    verify,
)
from maskopt.certificates.certificate import Certificate
from maskopt.errors import OptionError, ProblemError, SolverError, VerificationError
from maskopt.protocol.bounds import lower_bound
from maskopt.protocol.solution import Solution, Status

PATTERNS = (HALF, NM(keep=2, of=4), NM(keep=1, of=4))


def bound_of(problem, **options):
    return lower_bound(problem, "perspective", **options)


def anything(problem, seed):
    """However bad: random v, and d of which much is missing to B ⪰ 0."""
    generator, shape = torch.Generator().manual_seed(seed), problem.weight.shape
    d = problem.least_squares.damped.diagonal()
    d = d * torch.rand(shape, generator=generator, dtype=torch.float64)
    d *= 10.0 ** -torch.randint(0, 4, (problem.rows, 1), generator=generator)
    v = torch.randn(shape, generator=generator, dtype=torch.float64) / 10
    return Certificate(d, d[:, :0], problem.weight + v)


@given(
    st.one_of(problems(max_n=8, max_rows=10), st.sampled_from(PATTERNS)),
    st.sampled_from((LeastSquaresUpdate(0.001), *REFITS)), st.integers(0, 4), st.integers(0, 10**6),
)  # fmt: skip
def test_no_mask_costs_less_than_what_any_certificate_proves(problem, how, splits, seed):
    if not isinstance(problem, LayerProblem):
        problem = refit_layer(problem, rows=8, n=8, seed=seed)
    problem = problem.with_update(how)
    bound, best = bound_of(problem, splits=splits, turns=20), solve(problem, "exhaustive")
    most = best.objective + floor(problem)
    assert bool((bound.value >= 0).all())
    assert bool((bound.value <= most).all())
    proven = {"lower_bound": bound.value, "certificate": bound.certificate}
    assert verify(problem, Solution.of(problem, best.mask, **proven)).checked
    for other in range(seed, seed + 3):
        assert bool((anything(problem, other).check(problem) <= most).all())


LATER = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12)]


@pytest.mark.parametrize("seed", [0, *LATER])
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
        problem = LayerProblem(weight, x.T @ x, pattern, update=LeastSquaresUpdate(damping))
        best, bound = solve(problem, "exhaustive"), bound_of(problem, splits=2, turns=20)
        room = 1e-9 * problem.diagonal_mass().sum()
        assert float(bound.value.sum()) <= float(best.objective.sum() + room)
        if per == "row":
            one = problem.take([seed % 3])
            verify(one, solve(one, "branch"))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_value_is_the_formulas(pattern):
    problem = refit_layer(pattern, rows=2, n=8, seed=4)
    a = problem.least_squares.damped
    room = float(torch.linalg.eigvalsh(a)[0])
    d = torch.full((2, 8), 0.5 * room, dtype=torch.float64)
    v = solve(problem, "exhaustive").mask * problem.weight
    proven = Certificate(d, d[:, :0], v).check(problem)
    kept = problem.group_size - problem.pruned_per_group
    for row in range(2):
        w, b = problem.weight[row], a - torch.diag(d[row])
        price = (a @ w - b @ v[row]).square() / d[row]
        groups = price.view(-1, problem.group_size).sort(dim=1).values[:, -kept:]
        true = float(w @ a @ w - v[row] @ b @ v[row] - groups.sum())
        assert float(proven[row]) == pytest.approx(max(true, 0.0), rel=1e-9, abs=1e-12)
    if kept > 1:  # better splits and turns only help
        problem = refit_layer(pattern, rows=2, n=16, damping=0.05)
        found = solve(problem, "swap").objective
        gaps = [float(bound_of(problem, splits=s).gap(found).mean()) for s in (0, 1, 4, 20)]
        assert all(later <= earlier + 1e-9 for earlier, later in pairwise(gaps))
        assert gaps[-1] < 0.97 * gaps[0]


@pytest.mark.parametrize(
    ("part", "options", "layer"),
    [  # tight where inputs are not correlated, or there is hardly a choice
        (0.995, {}, {"kind": "diagonal", "n": 8}),
        (0.995, {}, {"kind": "diagonal", "n": 8, "damping": 1.0}),
        (0.9, {}, {"pattern": Unstructured(keep=0), "n": 5}),
        (0.9, {}, {"pattern": Unstructured(keep=5), "n": 5}),
        (0.2, {}, {"n": 12, "dtype": torch.float32}),
        (0.0, {"limits": Limits(seconds=0)}, {"n": 12}),
    ],
)
def test_a_bound_is_worth_something(part, options, layer):
    problem = refit_layer(**layer)
    bound, best = bound_of(problem, **options), solve(problem, "exhaustive").objective
    assert bool((bound.value <= best + floor(problem)).all())
    assert bool((bound.value >= part * best - floor(problem)).all())
    assert bound.trace.iterations.tolist() == [0] * 3 or not options
    for w, g in ((0.0, 1.0), (1.0, 0.0)):
        assert bound_of(changed(problem, w, g), **options).value.tolist() == [0.0] * 3


def test_order_units_threads_and_a_row_alone_change_nothing():
    problem = refit_layer(rows=3, n=8)
    bound = bound_of(problem, threads=1, splits=3).value
    assert torch.equal(bound_of(problem, threads=2, splits=3).value, bound)
    for row in range(3):
        assert float(bound_of(problem.row(row), splits=3).value) == float(bound[row])
    moved = bound_of(changed(problem, columns=shuffled(problem)), splits=3).value
    torch.testing.assert_close(moved, bound, rtol=1e-3, atol=1e-12)
    scaled = bound_of(changed(problem, 2.0**10, 2.0**-6), splits=3).value
    torch.testing.assert_close(scaled, bound * 2.0**14)


def test_a_claim_goes_to_disk_and_back_and_none_beyond_its_certificate_is_accepted(tmp_path):
    problem = refit_layer(rows=2, n=24)
    bound, found = bound_of(problem), solve(problem, "swap")
    assert claimed(problem, found, bound).checked
    good = bound.certificate
    more = {"lower_bound": bound.value, "certificate": good, "status": Status.SWAP_OPTIMAL}
    Solution.of(problem, found.mask, **more).save(tmp_path / "solution.npz")
    loaded = Solution.load(tmp_path / "solution.npz")
    assert isinstance(loaded.certificate, Certificate)
    assert torch.equal(loaded.certificate.check(problem), bound.value)
    assert verify(problem, loaded, require="checked").checked
    parts = dict(np.load(tmp_path / "solution.npz"))
    del parts["certificate.point"]  # half a certificate is none
    np.savez(tmp_path / "half.npz", **parts)
    with pytest.raises(ProblemError, match="not a sound solution"):
        Solution.load(tmp_path / "half.npz")
    for certificate, message in (
        (replace(good, diagonal=-good.diagonal), "split of the diagonal is negative"),
        (replace(good, diagonal=good.diagonal * torch.nan), "diagonal holds NaN or infinite"),
        (replace(good, diagonal=good.diagonal[:, :5]), r"diagonal must be float64 \[2, 24\]"),
        (replace(good, point=good.point.float()), r"point must be float64 \[2, 24\]"),
        (replace(good, diagonal=torch.zeros_like(good.diagonal)), "its certificate proves 0"),
        (replace(good, diagonal=1e6 * good.diagonal), "its certificate proves 0"),
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
    kept = problem.with_update(None)
    assert "perspective" in available_bounds()
    box, own = lower_bound(kept, "box").certificate, bound_of(problem).certificate
    for call, error, message in (
        (lambda: lower_bound(problem, "sdp"), SolverError, "'sdp' is for unchanged .*perspective'"),
        (lambda: bound_of(kept), SolverError, "'perspective' is for updated weights"),
        (lambda: bound_of(problem, splits=-1), OptionError, "splits"),
        (lambda: box.check(problem), VerificationError, "proves nothing of updated ones"),
        (lambda: own.check(kept), VerificationError, "proves nothing of unchanged ones"),
    ):
        with pytest.raises(error, match=message):
            call()
