"""The portfolio: per row never worse than any member, and honest about what it proves."""

import itertools
from dataclasses import replace

import pytest
import torch
from local_search import drawn
from strategies import HALF

from maskopt import NM, Certificate, Solution, Status, Unstructured, lower_bound, solve, verify
from maskopt.errors import MaskoptError
from maskopt.solvers.search import portfolio
from maskopt.solvers.search.portfolio import merge


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.6), NM(keep=2, of=4)], ids=str)
def test_no_member_is_better(pattern):
    problem = drawn(4, 40, "low-rank", pattern)
    solution = solve(problem, "portfolio")
    verify(problem, solution)
    for member in ("swap", "relax"):
        objective = solve(problem, member).objective
        assert bool((solution.objective <= objective * (1 + 1e-12)).all())
    assert set(solution.status) <= {Status.SWAP_OPTIMAL, Status.OPTIMAL}
    trace = solution.trace
    assert set(trace.winner) <= {"start", "swap", "relax", "tabu"}
    torch.testing.assert_close(trace.start_objective, solve(problem, "wanda").objective)
    assert trace.history.shape == (4, 3)
    assert bool((trace.history.diff(dim=1) <= 0).all())
    assert torch.equal(trace.history[:, -1], solution.objective)
    bounded = solve(problem, "portfolio", members=("frank_wolfe", "swap"))
    assert bool((bounded.lower_bound > 0).any())
    verify(problem, bounded)


def test_merge_takes_mask_and_bound_row_by_row():
    problem = drawn(6, 12, pattern=Unstructured(keep=5))
    random, wanda = solve(problem, "random"), solve(problem, "wanda")
    merged, better = merge(problem, random, wanda)
    assert torch.equal(merged.objective, random.objective.minimum(wanda.objective))
    assert torch.equal(better, wanda.objective < random.objective)
    verify(problem, merged)


def merged_both_ways(problem, one, two):
    return [merge(problem, *pair)[0] for pair in ((one, two), (two, one))]


def test_a_bound_within_the_tolerance_of_optimal_keeps_it():
    """An exact backend's bound is as much as 1e-6 below the objective."""
    problem = drawn(4, 16)
    found, wanda = solve(problem, "kswap"), solve(problem, "wanda")
    bound, word = found.objective * (1 - 0.9e-6), ("SCIP 10.0",) * 4
    optimal = Solution.of(
        problem, found.mask, status=Status.OPTIMAL, lower_bound=bound, trusted=word
    )
    for merged in merged_both_ways(problem, optimal, wanda):
        assert set(merged.status) == {Status.OPTIMAL}
        assert merged.trusted == word
    wide = replace(optimal, lower_bound=found.objective * (1 - 2e-6), status=found.status)
    assert Status.OPTIMAL not in merge(problem, wide, wanda)[0].status


def test_every_row_has_the_higher_bound_with_its_proof():
    """Certificates, words and nothing at all, in one solution."""
    problem = drawn(4, 24)
    relaxed = solve(problem, "relax")
    rough = lower_bound(problem, "shift")
    stronger = torch.tensor([True, False, True, False])
    nothing = Certificate.box(problem, torch.zeros(4, 24, dtype=torch.float64))
    one = replace(
        relaxed,
        lower_bound=torch.where(stronger, relaxed.lower_bound, 0.0),
        certificate=Certificate.choose(~stronger, relaxed.certificate, nothing),
    )
    half = rough.value * 0.5
    other = Solution.of(problem, relaxed.mask, lower_bound=half, certificate=rough.certificate)
    for merged in merged_both_ways(problem, one, other):
        assert torch.equal(merged.lower_bound, one.lower_bound.maximum(other.lower_bound))
        assert verify(problem, merged, require="checked").checked
    word = ("", "SCIP 10.0", "", "")
    high = torch.where(torch.tensor([False, True, False, False]), relaxed.objective * 0.99, 0.0)
    exact = Solution.of(problem, relaxed.mask, lower_bound=high, trusted=word)
    for merged in merged_both_ways(problem, one, exact):
        assert torch.equal(merged.lower_bound, one.lower_bound.maximum(high))
        assert merged.trusted == word
        basis = verify(problem, merged).basis
        assert basis == ("checked", f"trusted: {word[1]}", "checked", "checked")
    # of equal bounds the one that can be checked is taken
    words = Solution.of(
        problem, relaxed.mask, lower_bound=relaxed.lower_bound, trusted=("an oracle",) * 4
    )
    for merged in merged_both_ways(problem, relaxed, words):
        assert merged.trusted == ()
        assert verify(problem, merged, require="checked").checked


def test_mask_of_one_and_bound_of_another_can_be_optimal_together():
    problem = drawn(5, 10)
    mask, worst = solve(problem, "kswap", candidates=2), solve(problem, "worst").mask
    chosen = list(itertools.combinations(range(10), 5))
    forms = [problem.row(i).q() for i in range(5)]
    optimum = [min(float(q[list(p)][:, list(p)].sum()) for p in chosen) for q in forms]
    optimum = torch.tensor(optimum, dtype=torch.float64)
    word = ("enumeration of maskopt 0.2.0",) * 5
    bound_only = Solution.of(problem, worst, lower_bound=optimum, trusted=word)
    merged, _ = merge(problem, mask, bound_only)
    reached = mask.objective <= optimum * (1 + 1e-9)
    assert bool(reached.any())
    assert [status is Status.OPTIMAL for status in merged.status] == reached.tolist()
    verify(problem, merged)


def test_a_bound_that_the_better_mask_refutes_is_dropped(caplog):
    problem = drawn(2, 24)
    found, worse = solve(problem, "relax"), solve(problem, "worst")
    claims = {"status": (Status.OPTIMAL,) * 2, "trusted": ("an oracle",) * 2}
    wrong = replace(worse, lower_bound=worse.objective, **claims)
    for merged in merged_both_ways(problem, found, wrong):
        assert merged.status == found.status
        assert merged.trusted == ()
        assert merged.lower_bound.tolist() == found.lower_bound.tolist()
        assert verify(problem, merged, require="checked").checked
    assert "an oracle" in caplog.text


def test_members_that_do_not_fit_are_named_before_any_runs(monkeypatch):
    problem = drawn(1, 520)
    monkeypatch.setattr(portfolio, "solve", lambda *a, **k: pytest.fail("a member ran"))
    with pytest.raises(MaskoptError, match="branch: a row of 520 inputs is beyond it"):
        solve(problem, "portfolio", members=("swap", "branch"))


@pytest.mark.parametrize("member", ["relax", "sdp", "frank_wolfe", "tabu"])
def test_a_member_starts_from_the_best_mask_so_far(member, monkeypatch):
    problem = drawn(3, 20, pattern=Unstructured(keep=8))
    started = {}

    def listening(layer, solver, *, start, limits):
        started[solver.name] = start
        return solve(layer, solver, start=start, limits=limits)

    monkeypatch.setattr(portfolio, "solve", listening)
    solve(problem, "portfolio", members=("swap", member), start="random")
    assert torch.equal(started["swap"], solve(problem, "random").mask)
    assert torch.equal(started[member], solve(problem, "swap", start="random").mask)


@pytest.mark.parametrize("member", ["relax", "sdp"])
def test_a_start_does_not_keep_a_relaxation_from_its_own_mask(member):
    """Its rounded mask costs more than a 1-swap optimum, and may still lead to a better one."""
    better = 0
    for seed in range(6 if member == "relax" else 3):
        problem = drawn(4, 40, "low-rank", HALF, (seed * 5 + 1, seed))
        swap, alone = solve(problem, "swap"), solve(problem, member)
        together = solve(problem, member, start=swap.mask)
        best = swap.objective.minimum(alone.objective)
        assert bool((together.objective <= best * (1 + 1e-9)).all())
        better += int((alone.objective < swap.objective * (1 - 1e-6)).sum())
    assert better > 0


def test_without_time_the_start_comes_back():
    problem = drawn(3, 20, pattern=Unstructured(keep=8))
    nothing = solve(problem, "portfolio", time_limit=0.0)
    assert torch.equal(nothing.mask, solve(problem, "wanda").mask)
    assert nothing.trace.history.shape == (3, 0)
    assert set(nothing.trace.stopped) == {"yes"}
