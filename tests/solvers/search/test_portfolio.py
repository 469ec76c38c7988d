"""The portfolio: per row never worse than any member, and honest about what it proves."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from strategies import problems, random_gram, random_weight

from maskopt import (
    NM,
    Certificate,
    LayerProblem,
    Progress,
    Solution,
    Status,
    Unstructured,
    lower_bound,
    solve,
    verify,
)
from maskopt.errors import MaskoptError
from maskopt.solvers.search import portfolio
from maskopt.solvers.search.portfolio import merge


@settings(max_examples=25)
@given(problem=problems(max_n=10, max_rows=3))
def test_legal_verified_and_never_above_start_or_optimum(problem):
    start = solve(problem, "random")
    solution = solve(problem, "portfolio", warm_start=start.mask, members=("elimination", "swap"))
    verify(problem, solution)
    slack = 1e-9 * problem.diagonal_mass()
    assert bool((solution.objective <= start.objective + slack).all())
    assert bool((solution.objective >= solve(problem, "exhaustive").objective - slack).all())


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.6), NM(keep=2, of=4)], ids=str)
def test_no_member_is_better(pattern):
    problem = LayerProblem(random_weight(4, 40, 1), random_gram(40, "low-rank", 2), pattern)
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
    problem = LayerProblem(
        random_weight(6, 12, 1), random_gram(12, "full", 2), Unstructured(keep=5)
    )
    random, wanda = solve(problem, "random"), solve(problem, "wanda")
    merged, better = merge(problem, random, wanda)
    assert torch.equal(merged.objective, random.objective.minimum(wanda.objective))
    assert torch.equal(better, wanda.objective < random.objective)
    verify(problem, merged)


def test_a_bound_within_the_tolerance_of_optimal_keeps_it():
    """An exact backend's bound is as much as 1e-6 below the objective."""
    problem = LayerProblem(
        random_weight(4, 16, 1), random_gram(16, "full", 2), Unstructured(keep=8)
    )
    found = solve(problem, "kswap")
    optimal = Solution.of(
        problem,
        found.mask,
        status=Status.OPTIMAL,
        lower_bound=found.objective * (1 - 0.9e-6),
        trusted=("SCIP 10.0",) * 4,
    )
    for pair in ((optimal, solve(problem, "wanda")), (solve(problem, "wanda"), optimal)):
        merged, _ = merge(problem, *pair)
        assert set(merged.status) == {Status.OPTIMAL}
        assert merged.trusted == optimal.trusted
    wide = replace(optimal, lower_bound=found.objective * (1 - 2e-6), status=found.status)
    assert Status.OPTIMAL not in merge(problem, wide, solve(problem, "wanda"))[0].status


def test_every_row_has_the_higher_bound_with_its_proof():
    """Certificates, words and nothing at all, in one solution."""
    problem = LayerProblem(
        random_weight(4, 24, 1), random_gram(24, "full", 2), Unstructured(keep=12)
    )
    relaxed = solve(problem, "relax")
    rough = lower_bound(problem, "shift")
    stronger = torch.tensor([True, False, True, False])
    mixed = torch.where(stronger, relaxed.lower_bound, 0.0)
    one = replace(
        relaxed,
        lower_bound=mixed,
        certificate=Certificate.choose(~stronger, relaxed.certificate, zero_of(problem)),
    )
    other = Solution.of(
        problem,
        relaxed.mask,
        lower_bound=rough.value * 0.5,
        certificate=rough.certificate,
    )
    for pair in ((one, other), (other, one)):
        merged, _ = merge(problem, *pair)
        assert torch.equal(merged.lower_bound, one.lower_bound.maximum(other.lower_bound))
        assert verify(problem, merged, require="checked").checked
    word = ("", "SCIP 10.0", "", "")
    high = torch.where(torch.tensor([False, True, False, False]), relaxed.objective * 0.99, 0.0)
    exact = Solution.of(problem, relaxed.mask, lower_bound=high, trusted=word)
    for pair in ((one, exact), (exact, one)):
        merged, _ = merge(problem, *pair)
        assert torch.equal(merged.lower_bound, one.lower_bound.maximum(high))
        assert merged.trusted == word
        basis = verify(problem, merged).basis
        assert basis == ("checked", f"trusted: {word[1]}", "checked", "checked")


def test_of_equal_bounds_the_one_that_can_be_checked_is_taken():
    problem = LayerProblem(
        random_weight(2, 24, 1), random_gram(24, "full", 2), Unstructured(keep=12)
    )
    relaxed = solve(problem, "relax")
    word = Solution.of(
        problem, relaxed.mask, lower_bound=relaxed.lower_bound, trusted=("an oracle",) * 2
    )
    for pair in ((relaxed, word), (word, relaxed)):
        merged, _ = merge(problem, *pair)
        assert merged.trusted == ()
        assert verify(problem, merged, require="checked").checked


def test_mask_of_one_and_bound_of_another_can_be_optimal_together():
    problem = LayerProblem(
        random_weight(5, 10, 1), random_gram(10, "full", 2), Unstructured(keep=5)
    )
    mask = solve(problem, "kswap", candidates=2)
    optimum = torch.tensor([least(problem.row(i).q()) for i in range(5)], dtype=torch.float64)
    bound_only = Solution.of(
        problem,
        solve(problem, "worst").mask,
        lower_bound=optimum,
        trusted=("enumeration of maskopt 0.2.0",) * 5,
    )
    merged, _ = merge(problem, mask, bound_only)
    reached = mask.objective <= optimum * (1 + 1e-9)
    assert bool(reached.any())
    for status, there in zip(merged.status, reached.tolist(), strict=True):
        assert (status is Status.OPTIMAL) == there
    verify(problem, merged)


def test_a_bound_that_the_better_mask_refutes_is_dropped(caplog):
    problem = LayerProblem(
        random_weight(2, 24, 1), random_gram(24, "full", 2), Unstructured(keep=12)
    )
    found, worse = solve(problem, "relax"), solve(problem, "worst")
    wrong = replace(
        worse,
        lower_bound=worse.objective,
        status=(Status.OPTIMAL,) * 2,
        trusted=("an oracle",) * 2,
    )
    for pair in ((found, wrong), (wrong, found)):
        merged, _ = merge(problem, *pair)
        assert merged.status == found.status
        assert merged.trusted == ()
        assert merged.lower_bound.tolist() == found.lower_bound.tolist()
        assert verify(problem, merged, require="checked").checked
    assert "an oracle" in caplog.text


def test_members_that_do_not_fit_are_named_before_any_runs(monkeypatch):
    problem = LayerProblem(random_weight(1, 520, 1), random_gram(520, "full", 2), Unstructured(0.5))
    monkeypatch.setattr(portfolio, "solve", lambda *a, **k: pytest.fail("a member ran"))
    with pytest.raises(MaskoptError, match="branch: a row of 520 inputs is beyond it"):
        solve(problem, "portfolio", members=("swap", "branch"))


def least(q):
    """The least objective of all masks that prune half."""
    chosen = itertools.combinations(range(len(q)), len(q) // 2)
    return min(float(q[list(p)][:, list(p)].sum()) for p in chosen)


def zero_of(problem):
    """A certificate that proves nothing."""
    return Certificate.box(problem, torch.zeros(problem.rows, problem.n, dtype=torch.float64))


@pytest.mark.parametrize("member", ["relax", "sdp", "frank_wolfe", "tabu"])
def test_a_member_starts_from_the_best_mask_so_far(member, monkeypatch):
    problem = LayerProblem(
        random_weight(3, 20, 1), random_gram(20, "full", 2), Unstructured(keep=8)
    )
    started = {}

    def listening(layer, solver, *, start, limits):
        started[solver.name] = start
        return solve(layer, solver, start=start, limits=limits)

    monkeypatch.setattr("maskopt.solvers.search.portfolio.solve", listening)
    solve(problem, "portfolio", members=("swap", member), start="random")
    assert torch.equal(started["swap"], solve(problem, "random").mask)
    assert torch.equal(started[member], solve(problem, "swap", start="random").mask)


@pytest.mark.parametrize("member", ["relax", "sdp"])
def test_a_start_does_not_keep_a_relaxation_from_its_own_mask(member):
    """Its rounded mask costs more than a 1-swap optimum, and may still lead to a better one."""
    better = 0
    for seed in range(6):
        problem = LayerProblem(
            random_weight(4, 40, seed * 5 + 1),
            random_gram(40, "low-rank", seed),
            Unstructured(keep=20),
        )
        swap, alone = solve(problem, "swap"), solve(problem, member)
        together = solve(problem, member, start=swap.mask)
        best = swap.objective.minimum(alone.objective)
        assert bool((together.objective <= best * (1 + 1e-9)).all())
        better += int((alone.objective < swap.objective * (1 - 1e-6)).sum())
    assert better > 0


def test_time_limit_and_options():
    problem = LayerProblem(
        random_weight(3, 20, 1), random_gram(20, "full", 2), Unstructured(keep=8)
    )
    nothing = solve(problem, "portfolio", time_limit=0.0)
    assert torch.equal(nothing.mask, solve(problem, "wanda").mask)
    assert nothing.trace.history.shape == (3, 0)
    assert set(nothing.trace.stopped) == {"yes"}
    calls = []
    solve(problem, "portfolio", members=("swap",), on_progress=calls.append)
    assert calls == [Progress(0, 3, "swap", 0, 1), Progress(3, 3)]
    for members in (("swpa",), ("portfolio",), ()):
        with pytest.raises(MaskoptError):
            solve(problem, "portfolio", members=members)
