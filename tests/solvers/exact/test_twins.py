"""Inputs that may be exchanged: a tree looks at one order of theirs, and the check of its proof knows why."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import problems

from maskopt import NM, LayerProblem, RowProblem, Status, Unstructured, solve, verify
from maskopt.errors import VerificationError
from maskopt.proof_check import check_proof
from maskopt.solvers.exact.twins import in_order, put_in_order, twins_of


def parts(sizes):
    """The complete graph between parts of so many vertices: those of a part are twins."""
    part = np.repeat(np.arange(len(sizes)), sizes)
    return (part[:, None] != part[None, :]).astype(float)


@given(problems(max_n=12, max_rows=1))
def test_sets_are_those_whose_exchange_leaves_q_unchanged(problem):
    q, group = problem.row(0).q().numpy(), problem.group_size
    sets = twins_of(q, group)
    together = {pair for known in sets for pair in itertools.combinations(known.tolist(), 2)}
    for i, j in itertools.combinations(range(problem.n), 2):
        order = np.arange(problem.n)
        order[[i, j]] = j, i
        same = i // group == j // group and bool((q[order][:, order] == q).all())
        assert ((i, j) in together) is same


def test_the_first_ones_are_pruned():
    state = np.array([-1, 0, -1, -1, -1, 1, -1, -1], np.int8)
    assert in_order(state, [np.array([1, 3, 6]), np.array([0, 2, 5, 7])])
    assert state.tolist() == [1, 0, 1, 0, -1, 1, 0, -1]
    assert not in_order(np.array([0, 1, -1], np.int8), [np.array([0, 1, 2])])
    mask = put_in_order(np.array([0, 1, 0, 1, 1]), [np.array([0, 1, 4])])
    assert mask.tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("select", [5, 9, 14])
def test_graphs_of_twins_take_few_nodes_and_are_checked(select):
    """27 vertices in four parts; which masks cost least follows from the counts of the parts alone."""
    sizes = (10, 8, 6, 3)
    problem = RowProblem.from_quadratic(parts(sizes), select=select)
    solution = solve(problem, "branch", proof=True)
    assert solution.status == (Status.OPTIMAL,)
    assert verify(problem, solution, require="checked").checked
    counts = itertools.product(*(range(size + 1) for size in sizes))
    best = min(select**2 - sum(k * k for k in c) for c in counts if sum(c) == select)
    assert problem.value(float(solution.objective[0])) == pytest.approx(best)
    assert int(solution.trace.nodes[0]) < 30


def test_copies_of_inputs_on_both_patterns():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x.repeat_interleave(2, 1)
    weight = torch.ones(1, 16, dtype=torch.float64)
    for pattern in (Unstructured(sparsity=0.5), NM(2, 4)):
        problem = LayerProblem(weight, x.T @ x, pattern)
        solution = solve(problem, "branch", proof=True)
        exact = solve(problem, "exhaustive").objective
        torch.testing.assert_close(solution.objective, exact)
        assert verify(problem, solution, require="checked").checked


def test_a_tree_of_twins_does_not_serve_a_row_whose_inputs_are_none():
    graph = parts((5, 4, 3))
    problem = RowProblem.from_quadratic(graph, select=6)
    solution = solve(problem, "branch", proof=True)
    other = graph.copy()
    other[4, 11] = other[11, 4] = 0  # the last of the first part has one neighbour less
    changed = RowProblem.from_quadratic(other, select=6)
    best = float(solve(changed, "branch").objective[0])
    assert best < float(solution.objective[0])
    try:
        proven = float(check_proof(changed, solution.proof)[0])
    except VerificationError:
        proven = 0.0
    assert proven <= best
