"""SparseGPT against a literal column-by-column transcription of the paper, and its own weights."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_search import drawn
from strategies import HALF, problems, refit_layer

from maskopt import NM, LayerProblem, Refit, Solution, Status, Unstructured, solve, verify
from maskopt.errors import SolverError, VerificationError
from maskopt.solvers.greedy.sparsegpt import SparseGPT


def literal(problem, damping):
    """One column at a time, the inverse Hessian downdated by elimination instead of a factor: the mask, and
    the weights."""
    gram = problem.gram.double().clone()
    alive = gram.diagonal() > 0
    gram.diagonal()[~alive] = gram.diagonal()[alive].mean()
    hessian = gram + damping * gram.diagonal()[alive].mean() * torch.eye(problem.n)
    group, n = problem.group_size, problem.n
    kept = torch.ones(problem.rows, n, dtype=torch.bool)
    w = problem.weight.double().clone()
    w[:, ~alive] = 0
    current = torch.linalg.inv(hessian)
    ahead, diagonals = current.clone(), []
    for j in range(n):
        diagonals.append(float(ahead[j, j]))
        ahead = ahead - ahead[:, j, None] * ahead[None, j] / ahead[j, j]
    d = torch.tensor(diagonals)
    for j in range(n):
        if j % group == 0:  # an unstructured row is one group, and fits one block
            score = w[:, j : j + group].square() / d[j : j + group]
            if problem.pooled:
                order = score.flatten().argsort(stable=True)[: problem.pruned]
                kept.view(-1)[order] = False
            else:
                order = score.argsort(dim=1, stable=True)[:, : problem.pruned_per_group]
                kept.scatter_(1, j + order, False)
        lost = torch.where(kept[:, j], 0.0, w[:, j])
        w[:, j:] -= lost[:, None] / current[j, j] * current[j, j:]
        current = current - current[:, j, None] * current[None, j] / current[j, j]
    return kept, torch.where(kept, w, 0.0)


PATTERNS = [HALF, NM(keep=2, of=4), Unstructured(sparsity=0.5, per="layer")]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", ["full", "zero-columns"])
def test_equals_the_literal_algorithm(pattern, kind):
    problem = drawn(4, 24, kind, pattern)
    mask, weight = literal(problem, 0.01)
    assert torch.equal(solve(problem, "sparsegpt").mask, mask)
    updated = solve(problem.refitting(Refit(0.02)), "sparsegpt", update=True)
    assert torch.equal(updated.mask, mask)
    torch.testing.assert_close(updated.weight, weight, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.6), NM(keep=1, of=3)], ids=str)
def test_counts_are_exact_over_many_blocks(pattern):
    problem = drawn(3, 300, pattern=pattern)
    solution = solve(problem, "sparsegpt")
    verify(problem, solution)
    scaled = LayerProblem(problem.weight * 1024, problem.gram / 4096, pattern)
    assert torch.equal(solve(scaled, "sparsegpt").mask, solution.mask)
    alone = solve(problem.row(1), "sparsegpt").mask
    assert torch.equal(alone[0], solution.mask[1])


@given(problems(), st.booleans())
def test_its_own_weights_are_verified_and_never_better_than_least_squares(problem, float32):
    if float32:
        problem = LayerProblem(problem.weight.float(), problem.gram.float(), problem.pattern)
    problem = problem.refitting(Refit(0.01))
    solution = solve(problem, "sparsegpt", update=True)
    assert solution.own
    assert verify(problem, solution).checked
    best = problem.objective(solution.mask)
    assert bool((solution.objective >= best * (1 - 1e-9) - 1e-12 * problem.diagonal_mass()).all())


def test_over_many_blocks_the_walk_goes_on_and_pooled_rows_have_the_layers_count():
    problem = refit_layer(Unstructured(sparsity=0.6, per="layer"), rows=5, n=300)
    solution = solve(problem, "sparsegpt", update=True)
    verify(problem, solution)
    assert len(set((~solution.mask).sum(1).tolist())) > 1
    first = (~solution.mask[:, :128]).sum()
    assert int(first) == problem.pruned * 128 // 300
    alone = problem.under(problem.pattern.alike())
    row = solve(alone.row(2), "sparsegpt", update=True)
    torch.testing.assert_close(row.weight[0], solve(alone, "sparsegpt", update=True).weight[2])


def test_weights_that_are_not_what_they_are_said_to_be_are_found(tmp_path):
    problem = refit_layer(n=24)
    solution = solve(problem, "sparsegpt", update=True)
    solution.save(tmp_path / "own.npz")
    verify(problem, Solution.load(tmp_path / "own.npz"))
    weight = solution.weight
    kept, pruned = (tuple(mask.nonzero()[0]) for mask in (solution.mask, ~solution.mask))

    def forged(where, value):
        other = weight.clone()
        other[where] = value
        return replace(solution, weight=other)

    for solution_, message in [
        (forged(kept, 9.0), "objective: row 0 states"),
        (forged(kept, torch.nan), "those of row 0 are not finite"),
        (forged(pruned, 0.1), "not 0 where it prunes"),
        (replace(solution, weight=None), "must be float64"),
        (replace(solution, weight=weight.float()), "must be float64"),
        (replace(solution, own=False), "objective: row 0 states"),
        (replace(solution, status=(Status.SWAP_OPTIMAL,) * 3), "only FEASIBLE rows"),
    ]:
        with pytest.raises(VerificationError, match=message):
            verify(problem, solution_)
    with pytest.raises(VerificationError, match="of a problem with refit"):
        verify(problem.refitting(None), solution)


def test_weights_that_are_kept_are_not_updated():
    problem = refit_layer()
    with pytest.raises(SolverError, match=r"refit=Refit\(damping\)"):
        solve(problem.refitting(None), "sparsegpt", update=True)
    start = solve(problem, "swap", start=SparseGPT(update=True))
    assert torch.equal(start.mask, solve(problem, "swap", start="sparsegpt").mask)
