"""Problems with a linear part: the same promises as without, kept by every solver and every bound."""

import numpy as np
import pytest
import torch
from strategies import random_gram, random_linear, random_weight

from maskopt import NM, LayerProblem, Linear, Status, Unstructured, verify
from maskopt.bounds import available_bounds, lower_bound
from maskopt.errors import ProblemError, VerificationError
from maskopt.solver import available_solvers, solve

SOLVERS = [name for name, info in available_solvers().items() if info.available]
EXACT = ("branch", "exhaustive", "gurobi", "highs", "scip")
#: but that of refitted weights
BOUNDS = [n for n, i in available_bounds().items() if i.unavailable is None and n != "perspective"]
PATTERNS = (Unstructured(keep=4), NM(keep=2, of=4))
close = torch.testing.assert_close


def layer(pattern, rows=3, n=8, kind="full", seed=1, dtype=torch.float64):
    weight, gram = random_weight(rows, n, seed, dtype), random_gram(n, kind, seed, dtype)
    mean = gram.diagonal().sqrt() / 2
    return LayerProblem(weight, gram, pattern, mean=mean, linear=random_linear(weight, gram, seed))


@pytest.fixture(params=PATTERNS, ids=str)
def problem(request):
    return layer(request.param)


def test_the_objective_is_the_error_of_the_outputs_against_their_targets():
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, 50, 8, generator=generator, dtype=torch.float64)
    weight, moved = random_weight(3, 8, 1), target - x
    linear = Linear.of_inputs(weight, x.T @ moved / 50, moved.T @ moved / 50)
    problem = LayerProblem(weight, x.T @ x / 50, Unstructured(keep=4), linear=linear)
    mask = solve(problem, "random").mask
    expected = (target @ weight.T - x @ (weight * mask).T).square().mean(0)
    close(problem.objective(mask), expected, rtol=1e-12, atol=0)
    energy = (target @ weight.T).square().mean(0)
    close(problem.output_energy(), energy, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_answers_for_the_whole_objective(name, problem):
    best = solve(problem, "exhaustive").objective
    solution = solve(problem, name)
    verify(problem, solution)
    assert bool((solution.objective >= best * (1 - 1e-9)).all())
    if name in EXACT:
        assert solution.status == (Status.OPTIMAL,) * 3
        close(solution.objective, best, rtol=1e-6, atol=1e-12)
    for keep in (8, 0):  # nothing to prune, and everything
        one = layer(Unstructured(keep=keep), rows=1)
        solution = solve(one, name)
        verify(one, solution)
        assert int(solution.mask.sum()) == keep


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("kind", ["full", "low-rank", "outliers"])
def test_no_bound_is_above_the_optimum(name, kind):
    reached = []
    for problem in (layer(p, kind=kind, seed=seed) for p in PATTERNS for seed in range(1, 5)):
        best = solve(problem, "exhaustive").objective
        value = lower_bound(problem, name).value
        assert bool((value <= best * (1 + 1e-9) + 1e-12).all())
        reached += (value / best.clamp(min=1e-300))[best > 0].tolist()
    assert np.median(reached) > (0.9 if name.startswith("sdp") else 0.5)


def test_greedy_elimination_counts_what_the_residual_makes_of_each_input():
    """0 and 1 cost the same by themselves; with 0 gone the output comes nearer to its target."""
    linear = Linear(torch.tensor([[-0.5, 0.5, 0.0]]), torch.tensor([1.0]))
    problem = LayerProblem(torch.ones(1, 3), torch.eye(3), Unstructured(keep=2), linear=linear)
    assert solve(problem, "elimination").mask.tolist() == [[False, True, True]]
    assert float(solve(problem, "elimination").objective) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "name", ["swap", "relax", "tabu", "memetic", "kswap", "frank_wolfe", "elimination", "sdp"]
)
def test_a_part_of_zeros_changes_nothing(name):
    weight, gram = random_weight(4, 24, 1), random_gram(24, "full", 2)
    zeros = Linear(torch.zeros(4, 24), torch.zeros(4))
    options = {"iterations": 50} if name == "frank_wolfe" else {}
    expected, found = (
        solve(LayerProblem(weight, gram, Unstructured(0.5), linear=part), name, **options)
        for part in (None, zeros)
    )
    assert torch.equal(expected.mask, found.mask)
    assert torch.equal(expected.objective, found.objective)
    close(found.lower_bound, expected.lower_bound, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["swap", "elimination", "exhaustive"])
def test_permuted_and_scaled(name, problem):
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    if isinstance(problem.pattern, NM):
        order = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    linear = Linear(problem.linear.correlation[:, order] * 64, problem.linear.constant * 256)
    weight, gram = problem.weight[:, order] * 4, problem.gram[order][:, order] * 16
    moved = LayerProblem(weight, gram, problem.pattern, linear=linear)
    start = solve(problem, "wanda").mask if name == "swap" else None
    expected = solve(problem, name, start=start)
    found = solve(moved, name, start=None if start is None else start[:, order])
    close(found.objective, expected.objective * 256, rtol=1e-9, atol=0)


def test_restricted_inputs_and_rows(problem):
    row, columns = problem.row(1), [1, 3, 4, 6]
    part = row.restrict(columns)
    mask, full = solve(part, "wanda").mask[0], torch.ones(8, dtype=torch.bool)
    full[columns] = mask
    assert part.objective(mask) == pytest.approx(row.objective(full), rel=1e-12)
    assert problem.take([2, 0]).linear.constant.tolist() == problem.linear.constant[[2, 0]].tolist()


def test_claims_for_the_quadratic_part_alone_are_refused(problem):
    bare = LayerProblem(problem.weight, problem.gram, problem.pattern)
    for name in ("swap", "branch"):
        with pytest.raises(VerificationError):
            verify(problem, solve(bare, name))


@pytest.mark.parametrize(
    ("correlation", "constant", "message"),
    [
        (torch.zeros(2, 7), torch.zeros(2), r"linear: correlation must be \[2, 8\]"),
        (torch.zeros(2, 8), torch.zeros(3), r"linear: constant must be \[2\]"),
        (torch.zeros(2, 8), torch.tensor([0.0, -1.0]), "not below 0"),
        (torch.full((2, 8), torch.nan), torch.zeros(2), "NaN"),
        (torch.ones(2, 8), torch.tensor([100.0, 0.01]), "constant of row 1 .* same r"),
    ],
)
def test_what_is_no_linear_part(correlation, constant, message):
    linear = Linear(correlation, constant)
    with pytest.raises(ProblemError, match=message):
        LayerProblem(random_weight(2, 8, 1), torch.eye(8), Unstructured(0.5), linear=linear)
