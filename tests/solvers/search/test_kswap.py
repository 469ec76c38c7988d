"""Compounds of two exchanges: legal, monotone, 1-swap optimal, and free of what they claim to lack."""

import itertools

import pytest
import torch
from hypothesis import given
from strategies import problems, random_gram, random_weight

from maskopt import NM, LayerProblem, Status, Unstructured, solve, verify
from maskopt.errors import OptionError


@given(problems(max_n=12))
def test_legal_monotone_and_1_swap_optimal(problem):
    solution = solve(problem, "kswap", warm_start="random")
    assert set(solution.status) == {Status.SWAP_OPTIMAL}
    verify(problem, solution)
    slack = 1e-6 * problem.diagonal_mass() * 1e-6
    start = solve(problem, "swap", warm_start="random").objective
    assert bool((solution.objective <= start * (1 + 1e-6) + slack).all())
    again = solve(problem, "kswap", warm_start=solution.mask)
    assert torch.equal(again.mask, solution.mask)


@given(problems(max_n=7, max_rows=2))
def test_no_exchange_of_two_for_two_is_left_when_all_inputs_are_candidates(problem):
    solution = solve(problem, "kswap", warm_start="random", candidates=16)
    group = problem.group_size
    for i in range(problem.rows):
        q, mask = problem.row(i).q(), solution.mask[i]
        steps = [
            (u, p)
            for u in range(problem.n)
            for p in range(problem.n)
            if mask[u] and not mask[p] and u // group == p // group
        ]
        value = float(solution.objective[i])
        slack = 1e-6 * value + 1e-12 * float(q.diagonal().sum())
        for (u, p), (v, r) in itertools.combinations(steps, 2):
            if u == v or p == r:
                continue
            other = mask.clone()
            other[[u, v]], other[[p, r]] = False, True
            pruned = (~other).double()
            assert float(pruned @ q @ pruned) >= value - slack


def test_it_finds_better_masks_than_single_exchanges():
    better = 0
    for seed in range(1, 21):
        problem = LayerProblem(
            random_weight(4, 40, seed * 5 + 1),
            random_gram(40, "low-rank", seed),
            Unstructured(keep=20),
        )
        one, two = solve(problem, "swap"), solve(problem, "kswap")
        verify(problem, two)
        assert bool((two.objective <= one.objective * (1 + 1e-9)).all())
        better += int((two.objective < one.objective * (1 - 1e-3)).sum())
    assert better >= 20  # of 80 rows


def test_the_trace_tells_what_was_done():
    problem = LayerProblem(
        random_weight(4, 40, 6), random_gram(40, "low-rank", 1), Unstructured(keep=20)
    )
    solution = solve(problem, "kswap", start="wanda")
    trace = solution.trace
    torch.testing.assert_close(trace.start_objective, solve(problem, "wanda").objective)
    assert trace.history.shape == (4, int(trace.rounds.max()) + 1)
    assert bool((trace.history.diff(dim=1) <= 1e-12).all())
    torch.testing.assert_close(trace.history[:, -1], solution.objective)
    assert bool(((trace.moves > 0) == (trace.rounds > 1)).all())
    assert int(trace.moves.sum()) > 0
    assert int(trace.swaps.sum()) > 0
    assert set(trace.stopped) == {"no"}


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.6), NM(keep=2, of=4)], ids=str)
def test_invariances(pattern):
    problem = LayerProblem(random_weight(5, 40, 1), random_gram(40, "full", 4), pattern)
    base = solve(problem, "kswap")
    scaled = LayerProblem(problem.weight * 2**20, problem.gram * 2.0**-30, pattern)
    assert torch.equal(solve(scaled, "kswap").mask, base.mask)
    for i in range(problem.rows):
        assert torch.equal(solve(problem.row(i), "kswap").mask[0], base.mask[i])


def test_limits():
    problem = LayerProblem(
        random_weight(3, 30, 1), random_gram(30, "full", 4), Unstructured(keep=12)
    )
    stopped = solve(problem, "kswap", warm_start="worst", time_limit=0.0)
    assert torch.equal(stopped.mask, solve(problem, "worst").mask)
    assert set(stopped.status) == {Status.FEASIBLE}
    assert stopped.trace.stopped == ("yes",) * 3
    with pytest.raises(OptionError, match="candidates"):
        solve(problem, "kswap", candidates=1)
