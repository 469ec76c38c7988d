"""The portfolio: per row never worse than any member, and honest about what it proves."""

import pytest
import torch
from hypothesis import given, settings
from strategies import problems, random_gram, random_weight

from maskopt import NM, LayerProblem, Solution, Status, Unstructured, solve, verify
from maskopt.errors import MaskoptError
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
    for objective in solution.trace["objective"].values():
        assert bool((solution.objective <= objective * (1 + 1e-12)).all())
    assert set(solution.status) <= {Status.SWAP_OPTIMAL, Status.OPTIMAL}
    assert set(solution.trace["winner"]) <= {"start", "swap", "relax", "tabu"}
    bounded = solve(problem, "portfolio", members=("frank_wolfe", "swap"))
    assert bool((bounded.lower_bound > 0).any())
    verify(problem, bounded)


def test_merge_takes_mask_and_bound_row_by_row():
    problem = LayerProblem(
        random_weight(6, 12, 1), random_gram(12, "full", 2), Unstructured(keep=5)
    )
    random, wanda = solve(problem, "random"), solve(problem, "wanda")
    merged, better = merge(random, wanda)
    assert torch.equal(merged.objective, random.objective.minimum(wanda.objective))
    assert torch.equal(better, wanda.objective < random.objective)
    verify(problem, Solution(**merged.__dict__))
    exact, _ = merge(wanda, solve(problem, "exhaustive"))
    assert set(exact.status) == {Status.OPTIMAL}
    # an optimum keeps its status only beside the bound that proved it
    unproven, _ = merge(solve(problem, "exhaustive"), wanda)
    assert set(unproven.status) == {Status.OPTIMAL}
    verify(problem, exact)
    verify(problem, unproven)


def test_time_limit_and_options():
    problem = LayerProblem(
        random_weight(3, 20, 1), random_gram(20, "full", 2), Unstructured(keep=8)
    )
    nothing = solve(problem, "portfolio", time_limit=0.0)
    assert torch.equal(nothing.mask, solve(problem, "wanda").mask)
    calls = []
    solve(problem, "portfolio", members=("swap",), on_progress=lambda *a: calls.append(a))
    assert calls == [(1, 1)]
    for members in (("swpa",), ("portfolio",), ()):
        with pytest.raises(MaskoptError):
            solve(problem, "portfolio", members=members)
