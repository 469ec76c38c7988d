"""Whole inputs of a layer as a problem: its objective is the layer's, and its solvers are those of rows."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KINDS, random_gram, random_weight

from maskopt import NM, LayerProblem, Refit, Status, Unstructured, lower_bound, solve, verify
from maskopt.errors import PatternError, ProblemError
from maskopt.structure import change, refit_inputs, structure_problem


def removed(weight, gram, kept):
    """By the definition: the mean squared change of all outputs together."""
    return float(change(torch.where(kept, weight.double(), 0.0), weight, gram).sum())


@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.integers(1, 5), st.sampled_from([1, 2, 3]))
def test_the_objective_is_the_change_of_the_outputs(kind, seed, rows, width):
    n = 6 * width
    weight, gram = random_weight(rows, n, seed), random_gram(n, kind, seed + 1)
    groups = torch.arange(n) // width
    problem = structure_problem(weight, gram, Unstructured(keep=3), groups=groups)
    assert problem.n == 6
    assert float(torch.linalg.eigvalsh(problem.gram)[0]) >= -1e-9 * float(problem.gram.trace())
    scale = float(gram.double().trace() * weight.double().square().sum())
    for kept in itertools.combinations(range(6), 3):
        mask = torch.zeros(6, dtype=torch.bool)
        mask[list(kept)] = True
        expected = removed(weight, gram, mask[groups])
        assert problem.objective(mask) == pytest.approx(expected, rel=1e-9, abs=1e-12 * scale)


def test_groups_may_lie_anywhere_and_scaling_and_order_do_not_matter():
    weight, gram = random_weight(3, 8, 1), random_gram(8, "full", 2)
    groups = torch.tensor([2, 0, 1, 2, 2, 0, 1, 1])
    problem = structure_problem(weight, gram, Unstructured(keep=2), groups=groups)
    best = solve(problem, "exhaustive")
    costs = [removed(weight, gram, groups != gone) for gone in range(3)]
    assert int((~best.mask[0]).nonzero()) == costs.index(min(costs))
    assert float(best.objective) == pytest.approx(min(costs))
    weight, gram = random_weight(5, 12, 7), random_gram(12, "full", 8)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    turned = weight[:, order], gram[order][:, order]
    masks = [
        solve(structure_problem(w, g, Unstructured(keep=6)), "exhaustive").mask[0]
        for w, g in ((weight, gram), (8 * weight, gram / 4), turned)
    ]
    assert torch.equal(masks[1], masks[0])
    assert torch.equal(masks[2], masks[0][order])
    # a layer of one row is the row
    weight, gram = random_weight(1, 10, 5), random_gram(10, "outliers", 6)
    one = structure_problem(weight, gram, Unstructured(keep=4))
    row = LayerProblem(weight, gram, Unstructured(keep=4)).row(0)
    torch.testing.assert_close(one.q(), row.q().double())


@pytest.mark.parametrize("pattern", [Unstructured(keep=6), NM(keep=2, of=4)], ids=str)
def test_everything_that_solves_and_proves_rows_does_so_here(pattern):
    weight, gram = random_weight(20, 24, 3), random_gram(24, "low-rank", 4)
    problem = structure_problem(weight, gram, pattern, groups=torch.arange(24) // 2)
    best = solve(problem, "exhaustive")
    proven = solve(problem, "branch", proof=True)
    assert proven.status == (Status.OPTIMAL,)
    assert verify(problem, proven, require="checked").checked
    torch.testing.assert_close(proven.objective, best.objective)
    swap = solve(problem, "swap", start="wanda")
    assert verify(problem, swap).checked
    assert float(swap.objective) >= float(best.objective) - 1e-12
    assert float(lower_bound(problem, "sdp").value) <= float(best.objective) * (1 + 1e-9)


@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.sampled_from([0.0, 0.01, 0.3]))
def test_refitted_inputs_solve_the_least_squares_of_every_row(kind, seed, damping):
    weight, gram = random_weight(4, 9, seed), random_gram(9, kind, seed + 1)
    kept = torch.rand(9, generator=torch.Generator().manual_seed(seed)) < 0.6
    kept[0] = True
    new = refit_inputs(weight, gram, kept, Refit(damping))
    problem = LayerProblem(weight, gram, Unstructured(keep=int(kept.sum())), refit=Refit(damping))
    expected = change(problem.weights(kept.expand(4, 9)), weight, gram)
    assert bool((new[:, ~kept] == 0).all())
    own = change(torch.where(kept, weight.double(), 0.0), weight, gram)
    floor = 1e-12 * float(gram.double().trace()) * weight.double().square().sum(1)
    assert bool((change(new, weight, gram) <= own + floor).all())
    assert bool((change(new, weight, gram) <= expected + 1e-6 * own + floor).all())


@pytest.mark.parametrize(
    ("shape", "groups", "keep", "error", "said"),
    [
        ((3, 4), [0, 1, 2, 3], 9, PatternError, "keep=9"),
        ((3, 4), [0, 1, 3, 3], 1, ProblemError, "without a gap"),
        ((3, 4), [0, 1, -1, 1], 1, ProblemError, "whole numbers"),
        ((3, 4), [0, 1], 1, ProblemError, "each of the 4 inputs"),
        ((3, 5), None, 1, ProblemError, "must be"),
    ],
)
def test_what_does_not_fit_is_refused(shape, groups, keep, error, said):
    index, pattern = groups and torch.tensor(groups), Unstructured(keep=keep)
    with pytest.raises(error, match=said):
        structure_problem(torch.ones(shape), torch.eye(4), pattern, groups=index)
