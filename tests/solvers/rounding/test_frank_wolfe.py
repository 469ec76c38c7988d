"""SparseFW: legal, never above its start, and its bound never above the optimum."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import problems, random_gram, random_weight

from maskopt import NM, LayerProblem, Unstructured, solve, verify
from maskopt.errors import OptionError
from maskopt.solvers.convex.linear_bound import linear_bound


@given(problems(max_n=10))
def test_legal_monotone_and_bounded_by_the_optimum(problem):
    solution = solve(problem, "frank_wolfe", warm_start="random", iterations=30)
    verify(problem, solution)
    slack = 1e-9 * problem.diagonal_mass()
    assert bool((solution.objective <= solve(problem, "random").objective + slack).all())
    assert bool((solution.lower_bound <= solve(problem, "exhaustive").objective + slack).all())


@given(problems(max_n=9, max_rows=2))
def test_the_bound_holds_at_any_point(problem):
    best = solve(problem, "exhaustive").objective
    for x in (torch.rand(problem.rows, problem.n), -3 * torch.rand(problem.rows, problem.n)):
        assert bool((linear_bound(problem, x)[1] <= best + 1e-9 * problem.diagonal_mass()).all())


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.5), NM(keep=2, of=4)], ids=str)
def test_converges_to_the_relaxations_optimum(pattern):
    problem = LayerProblem(random_weight(4, 32, 1), random_gram(32, "full", 2), pattern)
    solution = solve(problem, "frank_wolfe", iterations=3000)
    relaxed = solution.trace.relaxed_objective
    assert bool((relaxed <= solution.objective * (1 + 1e-9)).all())
    # gap ≤ 2·curvature/(T + 2): after 3000 steps the bound is close below the relaxed value
    assert bool((solution.lower_bound >= 0.95 * relaxed).all())
    worse = solve(problem, "frank_wolfe", iterations=3).trace.relaxed_objective
    assert bool((relaxed < worse).all())


@given(problems(max_n=9, max_rows=2), st.floats(0, 1))
def test_a_diagonal_shift_of_the_form_is_the_same_on_masks(problem, part):
    """λ = −d⊙w² with d up to λ_min(G): value and bound of the shifted form."""
    least = float(torch.linalg.eigvalsh(problem.gram.double())[0].clamp(min=0.0))
    lam = -part * least * problem.weight.double().square()
    best = solve(problem, "exhaustive")
    value, bound = linear_bound(problem, (~best.mask).double(), lam)
    slack = 1e-9 * problem.diagonal_mass()
    assert bool(((value - best.objective).abs() <= slack).all())
    assert bool((bound <= best.objective + slack).all())
    for x in (torch.rand(problem.rows, problem.n), -3 * torch.rand(problem.rows, problem.n)):
        assert bool((linear_bound(problem, x, lam)[1] <= best.objective + slack).all())


def test_alpha_keeps_the_top_wanda_weights():
    problem = LayerProblem(
        random_weight(3, 20, 1), random_gram(20, "full", 4), Unstructured(keep=10)
    )
    norm = problem.gram.diagonal().sqrt()
    score = problem.weight.abs() * norm
    solution = solve(problem, "frank_wolfe", alpha=0.5, iterations=50, warm_start="worst")
    rounded_better = solution.objective < solve(problem, "worst").objective
    assert bool(rounded_better.all())
    top = score.argsort(1, descending=True)[:, :5]
    assert bool(solution.mask.gather(1, top).all())
    whole = solve(problem, "frank_wolfe", alpha=1.0, iterations=50, warm_start="worst")
    assert torch.equal(whole.mask, solve(problem, "wanda").mask)
    verify(problem, solution)


def test_invariance_and_options():
    problem = LayerProblem(random_weight(4, 24, 1), random_gram(24, "full", 4), NM(keep=2, of=4))
    base = solve(problem, "frank_wolfe", iterations=40)
    scaled = LayerProblem(problem.weight * 2**20, problem.gram * 2.0**-30, problem.pattern)
    assert torch.equal(solve(scaled, "frank_wolfe", iterations=40).mask, base.mask)
    for i in range(4):
        alone = solve(problem.row(i), "frank_wolfe", iterations=40)
        assert torch.equal(alone.mask[0], base.mask[i])
    hurried = solve(problem, "frank_wolfe", time_limit=0.0)
    assert hurried.trace.iterations.tolist() == [0] * 4
    calls = []
    solve(problem, "frank_wolfe", iterations=100, on_progress=calls.append)
    assert [(c.done, c.total, c.step_done, c.step_total) for c in calls] == [
        (0, 4, 50, 100),
        (0, 4, 100, 100),
    ]
    for bad in ({"alpha": 1.5}, {"iterations": -1}):
        with pytest.raises(OptionError):
            solve(problem, "frank_wolfe", **bad)
