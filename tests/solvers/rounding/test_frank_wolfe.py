"""SparseFW and its bound, beyond the contract of every search."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_search import drawn, floor
from strategies import HALF, problems

from maskopt import NM, solve, verify
from maskopt.solvers.convex.linear_bound import linear_bound


@given(problems(max_n=9, max_rows=2), st.floats(0, 1))
def test_the_bound_holds_at_any_point_and_under_any_shift_of_the_diagonal(problem, part):
    """λ = −d⊙w² with d up to λ_min(G): on masks the value is the same."""
    least = float(torch.linalg.eigvalsh(problem.gram.double())[0].clamp(min=0.0))
    lam = -part * least * problem.weight.double().square()
    best = solve(problem, "exhaustive")
    slack = floor(problem)
    value, _ = linear_bound(problem, (~best.mask).double(), lam)
    assert bool(((value - best.objective).abs() <= slack).all())
    random = torch.rand(2, problem.rows, problem.n)
    for x in ((~best.mask).double(), random[0], -3 * random[1]):
        for shift in ((), (lam,)):
            bound = linear_bound(problem, x, *shift)[1]
            assert bool((bound <= best.objective + slack).all())


@pytest.mark.parametrize("pattern", [HALF, NM(keep=2, of=4)], ids=str)
def test_converges_to_the_relaxations_optimum(pattern):
    problem = drawn(4, 32, pattern=pattern)
    solution = solve(problem, "frank_wolfe", iterations=3000)
    relaxed = solution.trace.relaxed_objective
    assert bool((relaxed <= solution.objective * (1 + 1e-9)).all())
    # gap ≤ 2·curvature/(T + 2): after 3000 steps the bound is close below the relaxed value
    assert bool((solution.lower_bound >= 0.95 * relaxed).all())
    worse = solve(problem, "frank_wolfe", iterations=3).trace.relaxed_objective
    assert bool((relaxed < worse).all())
    hurried = solve(problem, "frank_wolfe", time_limit=0.0)
    assert hurried.trace.iterations.tolist() == [0] * 4


def test_alpha_keeps_the_top_wanda_weights():
    problem = drawn(3, 20, seeds=(1, 4))
    score = problem.weight.abs() * problem.gram.diagonal().sqrt()
    options = {"iterations": 50, "warm_start": "worst"}
    solution = solve(problem, "frank_wolfe", alpha=0.5, **options)
    verify(problem, solution)
    assert bool((solution.objective < solve(problem, "worst").objective).all())
    top = score.argsort(1, descending=True)[:, :5]
    assert bool(solution.mask.gather(1, top).all())
    whole = solve(problem, "frank_wolfe", alpha=1.0, **options)
    assert torch.equal(whole.mask, solve(problem, "wanda").mask)
