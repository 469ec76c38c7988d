"""1-swap search on refitted weights: legal, proven, never worse, and the same however it is run."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KINDS, problems, random_gram, random_linear, random_weight

from maskopt import (
    NM,
    LayerProblem,
    Limits,
    Refit,
    Status,
    Unstructured,
    improving_swap,
    solve,
    verify,
)
from maskopt.errors import SolverError, VerificationError
from maskopt.solution import REFIT_FLOOR, SWAP_TOLERANCE
from maskopt.solvers.refit.scratch import Scratch, inverse
from maskopt.solvers.refit.state import Metric, Pairs, Row

DAMPINGS = (0.0, 0.01, 0.3)
PATTERNS = (Unstructured(0.5), Unstructured(0.7), NM(keep=2, of=4), NM(keep=4, of=8))


def layer(n, pattern, kind="full", rows=3, damping=0.01, dtype=torch.float64, linear=False):
    weight, gram = random_weight(rows, n, 1, dtype), random_gram(n, kind, 2, dtype)
    part = random_linear(weight, gram, 3) if linear else None
    return LayerProblem(weight, gram, pattern, linear=part, refit=Refit(damping))


def row_of(problem, mask, index=0):
    squares = problem.least_squares
    spread = squares.inverse.diagonal().clone()
    metric = Metric(squares.damped, spread, problem.group_size)
    target = squares.target(problem.weight, problem.correlation)
    return Row.of(metric, Scratch(mask.device), target[index], mask[index])


@given(
    problems(max_rows=3), st.sampled_from(DAMPINGS), st.sampled_from(("wanda", "random", "worst"))
)
def test_rows_are_proven_and_no_worse_than_their_start(problem, damping, start):
    problem = problem.refitting(Refit(damping))
    begun = solve(problem, start)
    found = solve(problem, "swap", start=begun.mask)
    assert set(found.status) == {Status.SWAP_OPTIMAL}
    assert verify(problem, found).checked
    slack = REFIT_FLOOR * problem.diagonal_mass() + 1e-9 * begun.objective
    assert bool((found.objective <= begun.objective + slack).all())
    history = found.trace.history
    assert bool((history[:, 1:] <= history[:, :-1]).all())
    torch.testing.assert_close(history[:, -1], found.objective, rtol=1e-6, atol=float(slack.max()))
    torch.testing.assert_close(
        found.objective, problem.objective(found.mask), rtol=1e-6, atol=float(slack.max())
    )


@given(problems(max_n=10, max_rows=2), st.sampled_from(DAMPINGS))
def test_optima_are_below_and_are_left_alone(problem, damping):
    problem = problem.refitting(Refit(damping))
    best = solve(problem, "exhaustive")
    assert verify(problem, best).checked
    found = solve(problem, "swap", start="random")
    slack = REFIT_FLOOR * problem.diagonal_mass() + SWAP_TOLERANCE * best.objective
    assert bool((found.objective >= best.objective - slack).all())
    again = solve(problem, "swap", start=best.mask)
    assert torch.equal(again.mask, best.mask)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", [1e-6, 0.01])
def test_larger_rows_than_candidates(pattern, kind, damping):
    """So large that candidates are few of them, and screening has work to do."""
    problem = layer(160, pattern, kind, damping=damping, dtype=torch.float32, linear=kind == "full")
    found = solve(problem, "swap", start="wanda")
    assert set(found.status) == {Status.SWAP_OPTIMAL}
    assert verify(problem, found).checked
    assert (int(found.trace.swaps.sum()) > 0) == (kind != "diagonal")


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_screening_leaves_out_no_pair_that_improves(pattern, kind):
    problem = layer(80, pattern, kind)
    for start in ("random", "wanda", "swap"):
        mask = solve(problem, start).mask
        row = row_of(problem, mask)
        b = row.m @ problem.least_squares.damped[row.kept][:, row.pruned]
        outer = problem.least_squares.damped[row.pruned][:, row.kept]
        c = problem.least_squares.damped.diagonal()[row.pruned] - (outer * b.T).sum(1)
        delta = (row.v[:, None] - b * (row.r / c)).square()
        delta = delta / (row.m.diagonal()[:, None] + b.square() / c) - row.r.square() / c
        group = problem.group_size
        delta[row.kept[:, None] // group != row.pruned // group] = torch.inf
        objective = float(problem.objective(mask)[0])
        improving = (delta.amin(0) < -1e-9 * objective).nonzero()[:, 0]
        assert set(improving.tolist()) <= set(row._suspects().tolist())
        pairs = row.improving(32, 1e-6 * objective)
        assert (pairs is None) == bool((delta >= -1e-6 * objective).all())


def test_every_delta_is_the_difference_of_objectives():
    for pattern, linear in itertools.product(
        (Unstructured(keep=5), NM(keep=2, of=4)), (False, True)
    ):
        problem = layer(12, pattern, rows=1, linear=linear)
        mask = solve(problem, "random").mask
        before = float(problem.objective(mask)[0])
        best = 0.0
        for u, p in itertools.product(range(12), range(12)):
            if not mask[0, u] or mask[0, p] or u // problem.group_size != p // problem.group_size:
                continue
            other = mask.clone()
            other[0, u], other[0, p] = False, True
            best = min(best, float(problem.objective(other)[0]) - before)
        found = improving_swap(problem, mask, tolerance=0.0)
        assert found is not None
        assert found.delta == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("count", [1, 3])
def test_exchanges_leave_what_a_fresh_start_gives(count):
    problem = layer(60, Unstructured(keep=25), rows=1)
    row = row_of(problem, solve(problem, "wanda").mask)
    pairs = Pairs(torch.arange(0, 2 * count, 2), torch.arange(3, 3 + count))
    row.exchange(pairs.u, pairs.p, row.block(pairs))
    m, v, r = row.m.clone(), row.v.clone(), row.r.clone()
    row.renew()
    for found, expected in zip((m, v, r), (row.m, row.v, row.r), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("size", [1, 2, 95, 97, 200, 301])
def test_inverses_by_halves(size):
    matrix = random_gram(size, "full", 5) + 0.1 * torch.eye(size, dtype=torch.float64)
    out, work = torch.empty_like(matrix), torch.empty(size * size // 2 + 1, dtype=torch.float64)
    found = inverse(matrix.clone(), out, work)
    torch.testing.assert_close(found, torch.linalg.inv(matrix), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS[:3:2], ids=str)
def test_threads_companions_order_and_units_change_nothing(pattern):
    problem = layer(96, pattern, rows=6)
    start = solve(problem, "wanda").mask
    found = solve(problem, "swap", start=start)
    assert torch.equal(solve(problem, "swap", start=start, threads=3).mask, found.mask)
    alone = solve(problem.row(4), "swap", start=start[4:5])
    assert torch.equal(alone.mask[0], found.mask[4])
    scaled = LayerProblem(problem.weight * 8, problem.gram * 4, pattern, refit=problem.refit)
    again = solve(scaled, "swap", start=start)
    assert torch.equal(again.mask, found.mask)
    torch.testing.assert_close(again.objective, found.objective * 256, rtol=1e-9, atol=0.0)
    turned = torch.arange(96).roll(48)  # whole groups keep their members
    moved = LayerProblem(
        problem.weight[:, turned], problem.gram[turned][:, turned], pattern, refit=problem.refit
    )
    other = solve(moved, "swap", start=start[:, turned])
    assert torch.equal(other.mask, found.mask[:, turned])


def test_limits_are_kept_and_what_was_reached_can_be_gone_on_with():
    problem = layer(96, Unstructured(0.5), rows=4)
    start = solve(problem, "worst")
    before = start.objective
    for most in (0, 1, 5):
        some = solve(problem, "swap", start=start.mask, max_swaps=most)
        assert int(some.trace.swaps.max()) <= most
        assert set(some.status) == {Status.FEASIBLE}
        assert bool((some.objective <= before).all())
        verify(problem, some)
        before = some.objective
    on = solve(problem, "swap", start=some.mask)
    assert set(on.status) == {Status.SWAP_OPTIMAL}
    late = solve(problem, "swap", start=start.mask, limits=Limits(seconds=0))
    assert set(late.status) == {Status.FEASIBLE}
    assert torch.equal(late.mask, start.mask)
    torch.testing.assert_close(late.objective, start.objective, rtol=1e-9, atol=0.0)
    verify(problem, late)


@pytest.mark.parametrize("keep", [0, 8])
def test_rows_without_a_pair_to_exchange(keep):
    problem = layer(8, Unstructured(keep=keep))
    found = solve(problem, "swap", start="wanda")
    assert set(found.status) == {Status.SWAP_OPTIMAL}
    assert verify(problem, found).checked


def test_a_swap_that_was_undone_is_found():
    problem = layer(40, Unstructured(0.5), rows=2)
    start = solve(problem, "worst")
    some = solve(problem, "swap", start=start.mask, max_swaps=1)
    forged = type(some)(some.mask, some.objective, some.lower_bound, (Status.SWAP_OPTIMAL,) * 2)
    with pytest.raises(VerificationError, match="row 0 claims swap-optimal, yet keeping input"):
        verify(problem, forged)


def test_kernels_are_of_weights_as_they_are():
    with pytest.raises(SolverError, match="kernel 'numba' is for weights as they are"):
        solve(layer(8, Unstructured(0.5)), "swap", kernel="numba")
