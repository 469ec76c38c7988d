"""At the edges of float64: claims that hold are accepted, others are refused, and nothing overflows."""

import dataclasses

import pytest
import torch
from strategies import random_gram, random_weight

from maskopt import NM, LayerProblem, Refit, Unstructured, lower_bound, solve, verify
from maskopt.certificate import Certificate
from maskopt.errors import ProblemError, VerificationError
from maskopt.linear import Linear
from maskopt.problem import RowProblem
from maskopt.solution import Solution, Status

HALF = Unstructured(0.5)


def layer(weight_scale=1.0, gram_scale=1.0, refit=None, n=8):
    weight, gram = random_weight(2, n, 3) * weight_scale, random_gram(n, "full", 4) * gram_scale
    return LayerProblem(weight, gram, HALF, refit=refit)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", ["magnitude", "swap", "exhaustive"])
def test_grams_that_are_indefinite_by_rounding(name, seed):
    """Masks then exist whose sum is below 0, where objectives are 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 6, generator=generator)
    x[:, 1] = -0.3 * x[:, 0]
    weight = torch.randn(1, 6, generator=generator)
    weight[0, 1] = weight[0, 0] / 0.3
    problem = LayerProblem(weight, x.T @ x / 3, Unstructured(keep=4))
    verify(problem, solve(problem, name))


@pytest.mark.parametrize("seed", range(12))
def test_optima_of_refitted_rows_with_a_linear_part_and_hardly_any_damping(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    other = torch.randn(4, 2, generator=generator, dtype=torch.float64) * 10
    linear = Linear(other.T @ x / 4, other.square().mean(0) * (1 + 1e-9))
    weight = random_weight(2, 8, seed)
    problem = LayerProblem(weight, x.T @ x / 4, HALF, linear=linear, refit=Refit(0.0))
    verify(problem, solve(problem, "exhaustive"))


@pytest.mark.parametrize("scale", [1e-170, 1e-165, 1e-100, 1e100, 1e160])
def test_refitted_rows_at_any_scale_of_the_gram_matrix(scale):
    problem = layer(gram_scale=scale, refit=Refit())
    found, best = solve(problem, "swap"), solve(problem, "exhaustive")
    verify(problem, found)
    verify(problem, best)
    bound = lower_bound(problem, "perspective").value
    assert bool((bound <= best.objective * (1 + 1e-9)).all())
    assert bool((bound > 0.1 * best.objective).all())
    worst = solve(problem, "random", seed=1).mask
    for row in range(2):
        one, mask = problem.row(row), worst[row : row + 1]
        if float(one.objective(mask)) > 1.01 * float(found.objective[row]):
            claim = Solution.of(one.as_layer(), mask, status=Status.SWAP_OPTIMAL)
            with pytest.raises(VerificationError):
                verify(one, claim)


def test_gram_matrices_of_subnormal_numbers_are_refused():
    with pytest.raises(ProblemError, match=r"float64 has few digits; scale it"):
        LayerProblem(torch.ones(1, 4), torch.eye(4, dtype=torch.float64) * 1e-315, HALF)


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e-160, 1e-155, 1e-150, 1e140])
@pytest.mark.parametrize("refit", [None, Refit()])
def test_rows_of_any_scale(scale, refit):
    problem = layer(scale, refit=refit)
    verify(problem, solve(problem, "swap"))


def test_refitted_weights_of_a_solution_are_checked():
    problem = layer(refit=Refit())
    found = solve(problem, "swap")
    verify(problem, found)
    for wrong in (1e6, float("nan"), 0.0):
        with pytest.raises(VerificationError, match="weights"):
            verify(problem, dataclasses.replace(found, weight=torch.full_like(found.weight, wrong)))


def test_a_certificate_of_many_rows_whose_weights_squared_are_subnormal():
    """λ/w² would be understated, if squares were."""
    weight, gram = random_weight(2, 24, 3).abs() + 0.5, random_gram(24, "full", 4)
    problem = LayerProblem(weight * 1e-151, gram * 1e3, HALF)
    size = 1e3 * float(torch.linalg.eigvalsh(gram)[-1])
    best = solve(problem, "swap").objective
    zeros, halves = torch.zeros(2, 1).double(), torch.full((2, 24), 0.5).double()
    for share in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        certificate = Certificate(-share * size * problem.weight**2, zeros, halves)
        assert bool((certificate.check(problem) <= best * (1 + 1e-9)).all())


def test_a_row_keeps_the_count_that_its_pattern_says():
    for share, pruned in ((2 / 3, 15), (0.6667, 16)):
        weight, gram = random_weight(1, 24, 3)[0], random_gram(24, "full", 4)
        assert RowProblem(weight, gram, Unstructured(share)).as_layer().pruned == pruned


@pytest.mark.parametrize(
    ("name", "options"), [("relax", {}), ("relax", {"max_iterations": 0}), ("admm", {})]
)
@pytest.mark.parametrize("scale", [1e-60, 1e30, 1e60])
@pytest.mark.parametrize("pattern", [HALF, Unstructured(0.5, per="layer"), NM(2, 4)])
def test_weights_beyond_float32_are_pruned_as_others_are(name, options, scale, pattern):
    """Scaled by a power of ten: the same masks but for the last bits, so the same objective within them."""
    refit = Refit() if name == "admm" else None
    weight, gram = random_weight(3, 48, 3), random_gram(48, "full", 4).float()
    plain, scaled = (LayerProblem(weight * by, gram, pattern, refit=refit) for by in (1.0, scale))
    found = solve(scaled, name, **options)
    verify(scaled, found)
    here = float(solve(plain, name, **options).objective.sum()) * scale**2
    assert float(found.objective.sum()) == pytest.approx(here, rel=1e-3)
