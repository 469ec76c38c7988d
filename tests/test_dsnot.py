"""DSnoT: it moves the mean output towards the dense one, and needs the inputs' mean to do so."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import patterns, random_weight

from maskopt import LayerProblem, Unstructured, solve, verify
from maskopt.errors import OptionError, ProblemError


def biased_problem(n, rows, seed, pattern, variance=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * n, n, generator=generator, dtype=torch.float64) * variance
    x += torch.randn(n, generator=generator, dtype=torch.float64)
    weight = random_weight(rows, n, seed + 1)
    return LayerProblem(weight, x.T @ x / len(x), pattern, mean=x.mean(0))


def mean_error(problem, mask):
    return torch.where(mask, 0.0, problem.weight * problem.mean).sum(1)


@given(st.data(), st.integers(1, 16), st.integers(1, 4), st.integers(0, 10**6))
def test_legal_verified_and_batched_equals_single(data, n, rows, seed):
    problem = biased_problem(n, rows, seed, data.draw(patterns(n)))
    solution = solve(problem, "dsnot", cycles=5)
    verify(problem, solution)
    for i in range(rows):
        alone = solve(problem.row(i), "dsnot", cycles=5).mask[0]
        assert torch.equal(alone, solution.mask[i])


def test_the_first_swap_is_the_one_of_the_paper():
    # pruned: 0, 1 with c = 3, 1: ε = 4 > 0, so 0 comes back; of the kept with c < 0 the least Wanda
    # score leaves: input 3 (score 2), not 2 (score 4)
    weight = torch.tensor([[3.0, 1.0, -4.0, -2.0, 5.0]], dtype=torch.float64)
    mean = torch.ones(5, dtype=torch.float64)
    gram = torch.outer(mean, mean) + torch.eye(5, dtype=torch.float64) * 0.5
    problem = LayerProblem(weight, gram, Unstructured(keep=3), mean=mean)
    start = torch.tensor([[False, False, True, True, True]])
    solution = solve(problem, "dsnot", warm_start=start, cycles=1)
    assert solution.mask[0].tolist() == [True, False, True, False, True]
    assert solution.trace.swaps.tolist() == [1]


def test_the_mean_error_shrinks_on_wide_rows():
    problem = biased_problem(64, 8, 3, Unstructured(sparsity=0.6))
    start = solve(problem, "wanda").mask
    after = solve(problem, "dsnot", threshold=0.0, cycles=1).mask
    assert float(mean_error(problem, after).abs().mean()) < float(
        mean_error(problem, start).abs().mean()
    )


def test_what_it_cannot_do_without():
    problem = LayerProblem(torch.ones(1, 4), torch.eye(4), Unstructured(sparsity=0.5))
    with pytest.raises(ProblemError, match="mean"):
        solve(problem, "dsnot")
    with pytest.raises(ProblemError, match=r"mean must be \[4\]"):
        LayerProblem(torch.ones(1, 4), torch.eye(4), Unstructured(keep=2), mean=torch.ones(3))
    biased = biased_problem(8, 1, 0, Unstructured(sparsity=0.5))
    with pytest.raises(OptionError):
        solve(biased, "dsnot", cycles=-1)
