"""Problems with a linear part: the same promises as without, kept by every solver and every bound."""

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import problems, random_gram, random_linear, random_weight

from maskopt import (
    NM,
    LayerProblem,
    Linear,
    RowProblem,
    Status,
    Unstructured,
    available_bounds,
    available_solvers,
    load_problem,
    lower_bound,
    solve,
    verify,
)
from maskopt.checks import improving_swap
from maskopt.errors import ProblemError, VerificationError

SOLVERS = [name for name, info in available_solvers().items() if info.available]
EXACT = ("branch", "exhaustive", "gurobi", "highs", "scip")
BOUNDS = [
    name
    for name, info in available_bounds().items()
    if info.unavailable is None and name != "perspective"  # of refitted weights
]
PATTERNS = (Unstructured(keep=4), NM(keep=2, of=4))


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
    weight = random_weight(3, 8, 1)
    moved = target - x
    linear = Linear.of_inputs(weight, x.T @ moved / 50, moved.T @ moved / 50)
    problem = LayerProblem(weight, x.T @ x / 50, Unstructured(keep=4), linear=linear)
    mask = solve(problem, "random").mask
    expected = (target @ weight.T - x @ (weight * mask).T).square().mean(0)
    torch.testing.assert_close(problem.objective(mask), expected, rtol=1e-12, atol=0)
    energy = (target @ weight.T).square().mean(0)
    torch.testing.assert_close(problem.output_energy(), energy, rtol=1e-6, atol=0)


@given(problems())
def test_q_of_a_row_has_the_linear_part_in_it(problem):
    mask = solve(problem, "random").mask
    for i in range(problem.rows if problem.pruned_per_group else 0):
        p, q = (~mask[i]).double(), problem.row(i).q()
        size = float(problem.diagonal_mass()[i])
        assert float(p @ q @ p) == pytest.approx(
            float(problem.objective(mask)[i]), rel=1e-9, abs=1e-12 * size
        )
        assert float(torch.linalg.eigvalsh(q)[0]) >= -1e-9 * float(q.trace()) - 1e-300


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_answers_for_the_whole_objective(name, problem):
    best = solve(problem, "exhaustive").objective
    solution = solve(problem, name)
    verify(problem, solution)
    assert bool((solution.objective >= best * (1 - 1e-9)).all())
    if name in EXACT:
        assert solution.status == (Status.OPTIMAL,) * 3
        torch.testing.assert_close(solution.objective, best, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("kind", ["full", "low-rank", "outliers"])
def test_no_bound_is_above_the_optimum(name, kind):
    reached = []
    for pattern in PATTERNS:
        for seed in range(1, 5):
            problem = layer(pattern, kind=kind, seed=seed)
            best = solve(problem, "exhaustive").objective
            value = lower_bound(problem, name).value
            assert bool((value <= best * (1 + 1e-9) + 1e-12).all())
            reached += (value / best.clamp(min=1e-300))[best > 0].tolist()
    assert np.median(reached) > (0.9 if name.startswith("sdp") else 0.5)


def test_cuts_close_what_the_relaxation_leaves():
    problem = layer(Unstructured(keep=8), n=16, seed=3)
    best = solve(problem, "exhaustive").objective
    plain, cut = lower_bound(problem, "sdp"), lower_bound(problem, "sdp", cuts=3)
    assert bool((cut.value <= best * (1 + 1e-9)).all())
    assert bool((cut.value >= plain.value).all())
    assert float((best - cut.value).sum()) < 0.5 * float((best - plain.value).sum())


@pytest.mark.parametrize("kernel", ["literal", "torch", "numba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_kernel_ends_where_no_swap_improves(kernel, dtype, problem):
    problem = layer(problem.pattern, rows=6, n=32, dtype=dtype)
    solution = solve(problem, "swap", kernel=kernel)
    assert solution.status == (Status.SWAP_OPTIMAL,) * 6
    for i in range(6):
        assert improving_swap(problem.row(i), solution.mask[i]) is None


def test_greedy_elimination_counts_what_the_residual_makes_of_each_input():
    """0 and 1 cost the same by themselves; with 0 gone the output comes nearer to its target."""
    gram = torch.eye(3)
    linear = Linear(torch.tensor([[-0.5, 0.5, 0.0]]), torch.tensor([1.0]))
    problem = LayerProblem(torch.ones(1, 3), gram, Unstructured(keep=2), linear=linear)
    assert solve(problem, "elimination").mask.tolist() == [[False, True, True]]
    assert float(solve(problem, "elimination").objective) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "name",
    ["swap", "relax", "tabu", "memetic", "kswap", "frank_wolfe", "elimination", "sdp"],
)
def test_a_part_of_zeros_changes_nothing(name):
    weight, gram = random_weight(4, 24, 1), random_gram(24, "full", 2)
    plain = LayerProblem(weight, gram, Unstructured(0.5))
    zeros = Linear(torch.zeros(4, 24), torch.zeros(4))
    other = LayerProblem(weight, gram, Unstructured(0.5), linear=zeros)
    options = {"iterations": 50} if name == "frank_wolfe" else {}
    expected, found = solve(plain, name, **options), solve(other, name, **options)
    assert torch.equal(expected.mask, found.mask)
    assert torch.equal(expected.objective, found.objective)
    torch.testing.assert_close(found.lower_bound, expected.lower_bound, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["swap", "elimination", "exhaustive"])
def test_permuted_and_scaled(name, problem):
    assert problem.linear is not None
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    if isinstance(problem.pattern, NM):
        order = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    moved = LayerProblem(
        problem.weight[:, order] * 4,
        problem.gram[order][:, order] * 16,
        problem.pattern,
        linear=Linear(problem.linear.correlation[:, order] * 64, problem.linear.constant * 256),
    )
    start = {"start": solve(problem, "wanda").mask} if name == "swap" else {}
    seen = {"start": start["start"][:, order]} if start else {}
    expected, found = solve(problem, name, **start), solve(moved, name, **seen)
    torch.testing.assert_close(found.objective, expected.objective * 256, rtol=1e-9, atol=0)


def test_rows_alone_and_restricted_inputs(problem):
    assert problem.linear is not None
    whole = solve(problem, "swap")
    for i in range(3):
        assert torch.equal(solve(problem.row(i), "swap").mask[0], whole.mask[i])
    row = problem.row(1)
    part = row.restrict([1, 3, 4, 6])
    mask = solve(part, "wanda").mask[0]
    full = torch.ones(8, dtype=torch.bool)
    full[[1, 3, 4, 6]] = mask
    assert part.objective(mask) == pytest.approx(row.objective(full), rel=1e-12)
    assert problem.take([2, 0]).linear.constant.tolist() == problem.linear.constant[[2, 0]].tolist()


def test_save_and_load(problem, tmp_path):
    assert problem.linear is not None
    problem.save(tmp_path / "layer.npz")
    again = load_problem(tmp_path / "layer.npz")
    assert torch.equal(again.linear.correlation, problem.linear.correlation)
    assert torch.equal(again.linear.constant, problem.linear.constant)
    problem.row(1).save(tmp_path / "row.npz")
    row = RowProblem.load(tmp_path / "row.npz")
    assert torch.equal(row.linear.correlation, problem.linear.correlation[1:2])


def test_claims_for_the_quadratic_part_alone_are_refused(problem):
    bare = LayerProblem(problem.weight, problem.gram, problem.pattern)
    for solution in (solve(bare, "swap"), solve(bare, "branch")):
        with pytest.raises(VerificationError):
            verify(problem, solution)


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
    with pytest.raises(ProblemError, match=message):
        LayerProblem(
            random_weight(2, 8, 1),
            torch.eye(8),
            Unstructured(0.5),
            linear=Linear(correlation, constant),
        )


def test_nothing_to_prune_and_everything():
    for keep, pruned in ((8, 0), (0, 8)):
        problem = layer(Unstructured(keep=keep), rows=1)
        for name in SOLVERS:
            solution = solve(problem, name)
            verify(problem, solution)
            assert int((~solution.mask).sum()) == pruned
