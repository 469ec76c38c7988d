"""SparseGPT's mask against a literal column-by-column transcription of the paper."""

import pytest
import torch
from hypothesis import given
from strategies import problems, random_gram, random_weight

from maskopt import NM, LayerProblem, Unstructured, solve, verify
from maskopt.errors import OptionError


def literal(problem: LayerProblem, damping: float) -> torch.Tensor:
    """One weight at a time, the inverse Hessian downdated by elimination instead of a factor."""
    gram = problem.gram.double().clone()
    alive = gram.diagonal() > 0
    gram.diagonal()[~alive] = gram.diagonal()[alive].mean()
    hessian = gram + damping * gram.diagonal()[alive].mean() * torch.eye(problem.n)
    group, pruned, n = problem.group_size, problem.pruned_per_group, problem.n
    kept = torch.ones(problem.rows, n, dtype=torch.bool)
    for row in range(problem.rows):
        w = problem.weight[row].double().clone()
        w[~alive] = 0
        inverse = torch.linalg.inv(hessian)
        diagonals = []
        current = inverse.clone()
        for j in range(n):
            diagonals.append(float(current[j, j]))
            current = current - current[:, j, None] * current[None, j] / current[j, j]
        d = torch.tensor(diagonals)
        current = inverse
        for j in range(n):
            if group < n and j % group == 0:
                order = (w[j : j + group].square() / d[j : j + group]).argsort(stable=True)
                kept[row, j + order[:pruned]] = False
            elif group == n and j == 0:
                kept[row, (w.square() / d).argsort(stable=True)[:pruned]] = False
            if not kept[row, j]:
                w[j:] -= w[j] / current[j, j] * current[j, j:]
            current = current - current[:, j, None] * current[None, j] / current[j, j]
    return kept


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.5), NM(keep=2, of=4)], ids=str)
@pytest.mark.parametrize("kind", ["full", "zero-columns"])
def test_equals_the_literal_algorithm(pattern, kind):
    problem = LayerProblem(random_weight(4, 24, 1), random_gram(24, kind, 2), pattern)
    assert torch.equal(solve(problem, "sparsegpt").mask, literal(problem, 0.01))


@given(problems())
def test_legal_and_verified_on_anything(problem):
    verify(problem, solve(problem, "sparsegpt"))


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.6), NM(keep=1, of=3)], ids=str)
def test_counts_are_exact_over_many_blocks(pattern):
    problem = LayerProblem(random_weight(3, 300, 1), random_gram(300, "full", 0), pattern)
    solution = solve(problem, "sparsegpt")
    verify(problem, solution)
    scaled = LayerProblem(problem.weight * 1024, problem.gram / 4096, pattern)
    assert torch.equal(solve(scaled, "sparsegpt").mask, solution.mask)
    alone = solve(problem.row(1), "sparsegpt").mask
    assert torch.equal(alone[0], solution.mask[1])


def test_damping_must_be_positive():
    problem = LayerProblem(torch.ones(1, 4), torch.eye(4), Unstructured(sparsity=0.5))
    with pytest.raises(OptionError, match="damping"):
        solve(problem, "sparsegpt", damping=0.0)
