"""DSnoT: it moves the mean output towards the dense one, and needs the inputs' mean to do so."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import patterns, random_weight

from maskopt import NM, LayerProblem, Unstructured, solve, verify
from maskopt.errors import ProblemError


def biased_problem(n, rows, seed, pattern, variance=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * n, n, generator=generator, dtype=torch.float64) * variance
    x += torch.randn(n, generator=generator, dtype=torch.float64)
    weight = random_weight(rows, n, seed + 1)
    parts = x.view(4, n, n)  # four sequences
    within = parts.var(1, unbiased=False).mean(0)
    return LayerProblem(weight, x.T @ x / len(x), pattern, mean=x.mean(0), variance=within)


def literal(problem, start, threshold, cycles):
    """The reference's rules, weight by weight: lists sorted once, of which each entry is taken once."""
    group, n = problem.group_size, problem.n
    mask = start.clone()
    c = problem.weight * problem.mean
    wanda = problem.weight.abs() * problem.gram.diagonal().sqrt()
    for row in range(problem.rows):
        pruned = (~start[row]).nonzero()[:, 0].tolist()
        kept = sorted(start[row].nonzero()[:, 0].tolist(), key=lambda j: float(wanda[row, j]))
        came = sorted(pruned, key=lambda j: float(c[row, j] / problem.variance[j]))
        error = float(c[row, pruned].sum())
        sign = error > 0
        for _ in range(cycles):
            way = 1 if error > 0 else -1
            back = [j for j in came[::-way] if way * float(c[row, j]) > 0]
            if abs(error) <= threshold or not back:
                break
            regrown = back[0]
            if group < n:
                gone = [j for j in kept if j // group == regrown // group]
            else:
                gone = [j for j in kept if way * float(c[row, j]) < 0]
            after = error - float(c[row, regrown]) + (float(c[row, gone[0]]) if gone else 0.0)
            if not gone or (group < n and (after > 0) != sign):
                break
            mask[row, regrown], mask[row, gone[0]] = True, False
            came.remove(regrown)
            kept.remove(gone[0])
            error = after
    return mask


@given(st.data(), st.integers(1, 16), st.integers(1, 4), st.integers(0, 10**6))
def test_legal_verified_and_batched_equals_single(data, n, rows, seed):
    problem = biased_problem(n, rows, seed, data.draw(patterns(n)))
    solution = solve(problem, "dsnot", cycles=5)
    verify(problem, solution)
    for i in range(rows):
        alone = solve(problem.row(i), "dsnot", cycles=5).mask[0]
        assert torch.equal(alone, solution.mask[i])


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.6), NM(keep=2, of=4)], ids=str)
def test_equals_the_literal_algorithm(pattern):
    problem = biased_problem(40, 12, 5, pattern)
    start = solve(problem, "wanda").mask
    for cycles in (1, 3, 50):
        found = solve(problem, "dsnot", cycles=cycles, threshold=0.5, sequence_length=10)
        expected = literal(problem, start, 0.05, cycles)
        assert torch.equal(found.mask, expected)
        assert (found.trace.swaps == (expected & ~start).sum(1)).all()
    assert not torch.equal(expected, start)


def test_without_a_variance_the_tokens_are_one_sequence():
    problem = biased_problem(24, 4, 2, Unstructured(sparsity=0.5))
    mean, gram = problem.mean, problem.gram
    over_all = gram.diagonal() - mean.square()
    layers = [
        LayerProblem(problem.weight, gram, problem.pattern, mean=mean, variance=variance)
        for variance in (None, over_all)
    ]
    assert torch.equal(*(solve(layer, "dsnot").mask for layer in layers))


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
    lost = problem.weight * problem.mean
    before, now = (float(torch.where(m, 0.0, lost).sum(1).abs().mean()) for m in (start, after))
    assert now < before


def test_what_it_cannot_do_without():
    problem = LayerProblem(torch.ones(1, 4), torch.eye(4), Unstructured(sparsity=0.5))
    with pytest.raises(ProblemError, match="mean"):
        solve(problem, "dsnot")
    with pytest.raises(ProblemError, match=r"mean must be \[4\]"):
        LayerProblem(torch.ones(1, 4), torch.eye(4), Unstructured(keep=2), mean=torch.ones(3))
    with pytest.raises(ProblemError, match="variance"):
        LayerProblem(torch.ones(1, 4), torch.eye(4), Unstructured(keep=2), variance=-torch.ones(4))
