"""Least squares for kept weights, against a dense solve."""

import pytest
import torch
from hypothesis import given
from strategies import problems, random_gram, random_linear, random_weight

from maskopt import NM, LayerProblem, Limits, Refit, Unstructured, solve, verify
from maskopt.errors import OptionError, ProblemError, WarmStartError
from maskopt.least_squares import LEAST_DAMPING, LeastSquares
from maskopt.refitted import refit

PATTERNS = (Unstructured(keep=9), NM(keep=2, of=4))


def layer(pattern=PATTERNS[0], rows=5, n=16, kind="full", dtype=torch.float64, linear=False):
    weight, gram = random_weight(rows, n, 1, dtype), random_gram(n, kind, 2, dtype)
    part = random_linear(weight, gram, 3) if linear else None
    return LayerProblem(weight, gram, pattern, linear=part)


def dense_solve(problem, mask, damping):
    """Row by row, by the pseudo-inverse, in float64."""
    gram, weight = problem.gram.double(), problem.weight.double()
    ridge = damping and max(damping, LEAST_DAMPING) * gram.diagonal().mean()
    damped = gram + ridge * torch.eye(len(gram), dtype=torch.float64)
    result = torch.zeros_like(weight)
    for row in range(problem.rows):
        kept = mask[row].nonzero()[:, 0]
        target = damped[kept] @ weight[row]
        if problem.linear is not None:
            target = target + problem.linear.correlation[row, kept]
        result[row, kept] = torch.linalg.pinv(damped[kept][:, kept], hermitian=True) @ target
    return result


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("damping", [1e-6, 0.01, 0.3])
@pytest.mark.parametrize("linear", [False, True])
def test_the_weights_are_those_of_a_dense_solve(pattern, damping, linear):
    problem = layer(pattern, linear=linear)
    mask = solve(problem, "random").mask
    found = refit(problem, mask, damping=damping)
    expected = dense_solve(problem, mask, damping)
    torch.testing.assert_close(found.weight, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.error, problem.error(expected), rtol=1e-8, atol=1e-12)
    assert float(found.residual.max()) < 1e-10
    assert bool((found.weight[~mask] == 0).all())


def test_a_row_that_float32_cannot_solve_does_not_spoil_those_beside_it(monkeypatch):
    """Two large inputs that are the same up to the damping, which float32 does not see beside them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 160, generator=generator)
    x[:, 1] = x[:, 0]
    x[:, :2] *= 1e3
    mask = torch.ones(6, 160, dtype=torch.bool)
    mask[:, 2:60] = False
    mask[1:, 0], mask[1:, 5] = False, True
    weight, pattern = torch.randn(6, 160, generator=generator), Unstructured(keep=102)
    problem = LayerProblem(weight, x.T @ x / 400, pattern, refit=Refit(0.0))
    squares, again = problem.least_squares, []
    target = squares.target(problem.weight, None)
    refined = LeastSquares._refined

    def told(self, target, kept, dtype, pages):
        if dtype == torch.float64:
            again.extend(i[real].tolist() for i, real in zip(kept.index, kept.real, strict=True))
        return refined(self, target, kept, dtype, pages)

    monkeypatch.setattr(LeastSquares, "_refined", told)
    found = squares.solve(target, mask)
    assert again == [mask[0].nonzero()[:, 0].tolist()]
    assert float(squares.residual(found, target, mask).max()) < 1e-8
    alone = torch.cat([squares.solve(target[i : i + 1], mask[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(found, alone, rtol=1e-7, atol=1e-9)


@given(problems())
def test_no_row_gets_worse_and_none_better_than_least_squares(problem):
    mask = solve(problem, "random").mask
    slack = 1e-9 * problem.diagonal_mass() + 1e-300
    for damping in (0.0, 0.1):
        found = refit(problem, mask, damping=damping)
        assert bool((found.error <= problem.objective(mask)).all())
        assert bool((found.weight[~mask] == 0).all())
        best = problem.error(dense_solve(problem, mask, 0.0))
        assert bool((found.error >= best - slack).all())


@pytest.mark.parametrize("kind", ["full", "low-rank", "duplicates", "zero-columns", "outliers"])
def test_float32_is_refined_to_what_float64_gives(kind):
    problem = layer(n=64, pattern=Unstructured(0.5), kind=kind, dtype=torch.float32)
    mask = solve(problem, "wanda").mask
    found = refit(problem, mask)
    wide = LayerProblem(problem.weight.double(), problem.gram.double(), problem.pattern)
    expected = refit(wide, mask)
    torch.testing.assert_close(found.error, expected.error, rtol=1e-6, atol=1e-12)
    assert float(found.residual.max()) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_every_count_beside_each_other(dtype):
    """Those of like counts are factorised together, and no row depends on who is beside it."""
    n = 70
    weight, gram = random_weight(n + 1, n, 1, dtype), random_gram(n, "full", 2, dtype)
    problem = LayerProblem(weight, gram, Unstructured(keep=35), refit=Refit(0.01))
    score = torch.rand(n + 1, n, generator=torch.Generator().manual_seed(3))
    mask = score.argsort(1).argsort(1) < torch.arange(n + 1)[:, None]
    assert mask.sum(1).tolist() == list(range(n + 1))
    squares = problem.least_squares
    target = squares.target(problem.weight, None)
    found = squares.solve(target, mask)
    torch.testing.assert_close(found, dense_solve(problem, mask, 0.01), rtol=1e-6, atol=1e-8)
    assert float(squares.residual(found, target, mask).max()) < 1e-10
    assert bool((found[~mask] == 0).all())
    order = torch.randperm(n + 1, generator=torch.Generator().manual_seed(4))
    for limits in (Limits(threads=1, memory=2**16), Limits(threads=3, memory=3 * 2**18)):
        assert torch.equal(squares.solve(target[order], mask[order], limits), found[order])
    alone = torch.cat([squares.solve(target[i : i + 1], mask[i : i + 1]) for i in range(n + 1)])
    torch.testing.assert_close(alone, found, rtol=1e-9, atol=1e-12)


def test_the_error_of_weights_is_that_of_their_outputs():
    generator = torch.Generator().manual_seed(0)
    x, mix = (torch.randn(k, 16, dtype=torch.float64, generator=generator) for k in (200, 16))
    x = x @ mix
    weight = random_weight(5, 16, 1)
    problem = LayerProblem(weight, x.T @ x / 200, Unstructured(0.5))
    mask = solve(problem, "swap").mask
    found = refit(problem, mask, damping=0.0)
    lost = (x @ (weight - found.weight).T).square().mean(0)
    torch.testing.assert_close(found.error, lost, rtol=1e-9, atol=1e-14)
    assert torch.equal(problem.error(weight * mask), problem.objective(mask))
    assert float(found.error.sum()) < 0.9 * float(problem.objective(mask).sum())


def test_permuted_scaled_and_alone():
    problem = layer()
    mask = solve(problem, "swap").mask
    whole = refit(problem, mask)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    moved = LayerProblem(
        problem.weight[:, order] * 8, problem.gram[order][:, order] * 4, problem.pattern
    )
    found = refit(moved, mask[:, order])
    torch.testing.assert_close(found.weight, whole.weight[:, order] * 8, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.error, whole.error * 256, rtol=1e-9, atol=1e-14)
    for i in range(problem.rows):
        alone = refit(problem.row(i), mask[i])
        torch.testing.assert_close(alone.weight[0], whole.weight[i], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_change_no_bit_and_are_as_before_afterwards(dtype):
    problem = layer(rows=40, n=48, pattern=Unstructured(0.5), dtype=dtype)
    mask = solve(problem, "wanda").mask
    before = torch.get_num_threads()
    one = refit(problem, mask, limits=Limits(threads=1, memory=2**22))
    three = refit(problem, mask, limits=Limits(threads=3, memory=3 * 2**22))
    assert torch.equal(one.weight, three.weight)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("keep", [0, 16])
def test_nothing_kept_and_everything(keep):
    problem = layer(Unstructured(keep=keep), linear=True)
    mask = solve(problem, "wanda").mask
    found = refit(problem, mask, damping=0.0)
    if keep:
        assert bool((found.error <= problem.linear.constant).all())
    else:
        assert torch.equal(found.weight, torch.zeros_like(found.weight))
        assert torch.equal(found.error, problem.objective(mask))


def test_rows_without_weights_and_inputs_without_anything():
    problem = LayerProblem(torch.zeros(2, 6), torch.zeros(6, 6), Unstructured(keep=3))
    found = refit(problem, solve(problem, "wanda").mask)
    assert torch.equal(found.weight, torch.zeros(2, 6, dtype=torch.float64))
    assert found.error.tolist() == [0.0, 0.0]


def test_the_residual_is_that_of_the_weights_that_are_returned():
    problem = layer(rows=3, kind="low-rank", linear=True)
    mask = solve(problem, "wanda").mask
    found = refit(problem, mask, damping=0.1)
    gram = problem.gram + 0.1 * problem.gram.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    for row in range(3):
        kept = mask[row]
        wanted = (gram @ problem.weight[row] + problem.linear.correlation[row])[kept]
        rest = wanted - (gram @ found.weight[row])[kept]
        expected = float(rest.norm() / wanted.norm().clamp(min=1e-300))
        assert float(found.residual[row]) == pytest.approx(expected, abs=1e-12)


def test_bad_input_gets_one_line():
    problem = layer()
    mask = solve(problem, "wanda").mask
    for damping in (-0.1, float("nan")):
        with pytest.raises(OptionError, match="`damping` must be at least 0"):
            refit(problem, mask, damping=damping)
    with pytest.raises(WarmStartError, match="row 0 prunes"):
        refit(problem, torch.ones_like(mask))


@pytest.mark.parametrize(("n", "damping"), [(128, 3e-6), (256, 1e-5), (512, 1e-4)])
def test_a_gram_matrix_with_one_large_direction(n, damping):
    """By it a float32 factor leaves a small residual, and an error that is not the least."""
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(1, n, generator=generator), torch.randn(4, n, generator=generator)
    problem = LayerProblem(weight, x.T @ x, Unstructured(sparsity=0.5), refit=Refit(damping))
    found = solve(problem, "wanda")
    exact = LayerProblem(
        weight.double(),
        problem.gram.double(),
        problem.pattern,
        refit=Refit(damping),
        assume_psd=True,
    )
    _, best = exact.refitted(found.mask)
    torch.testing.assert_close(found.objective, best, rtol=1e-6, atol=0)
    verify(problem, found)


@pytest.mark.parametrize(("least", "refused"), [(-0.6, True), (-0.4, False)])
def test_an_eigenvalue_that_takes_away_half_of_the_damping_is_refused(least, refused):
    """It is rounding, and what F is would be rounding, too."""
    gram = torch.eye(40, dtype=torch.float64)
    gram[0, 0] = least * 0.01 * (39 / (40 - least * 0.01))
    squares = LeastSquares.of(gram, Refit(0.01))
    assert least * float(squares.ridge[0]) == pytest.approx(float(gram[0, 0]), rel=1e-3)
    if refused:
        with pytest.raises(ProblemError, match="take a larger damping"):
            squares.check("")
    else:
        squares.check("")
