"""What bounds of our own fix before SCIP begins: nothing that a better mask has otherwise."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import problems, random_gram, random_weight

from maskopt import NM, LayerProblem, Limits, RowProblem, Status, Unstructured, solve, verify
from maskopt.solvers.exact import scip, scip_model
from maskopt.solvers.exact.duals import qcr_duals
from maskopt.solvers.exact.incumbent import with_incumbent
from maskopt.solvers.exact.probing import probe
from maskopt.solvers.exact.tree import BranchTask, Tree
from maskopt.solvers.exact.twins import in_order

HALF, SIXTY = Unstructured(sparsity=0.5), Unstructured(sparsity=0.6)


def task_of(problem):
    group, pruned = problem.group_size, problem.pruned_per_group
    row, start = problem.row(0), np.arange(problem.n) % group < pruned
    return BranchTask(
        q=row.q().numpy(), group=group, pruned=pruned, start=start, values=row.values()
    )


def masks(problem):
    """Every legal p, bool [masks, n]."""
    size, count = problem.group_size, problem.pruned_per_group
    sides = [np.isin(np.arange(size), c) for c in itertools.combinations(range(size), count)]
    groups = problem.n // size
    return np.array([np.concatenate(c) for c in itertools.product(sides, repeat=groups)])


class Blind(Tree):
    """Never finds a better mask than the one that it began with."""

    def _round(self, point, state):
        pass


@given(problems(max_n=12, max_rows=1))
def test_every_mask_below_the_cutoff_has_what_was_fixed(problem):
    """From a bad incumbent, which leaves many masks below it."""
    task = task_of(problem)
    if not 0 < task.pruned < task.group or task.cost(task.start) <= task.noise:
        return
    tree = Blind(task, qcr_duals(task))
    found = probe(tree)
    free = np.flatnonzero(found.state < 0)
    for p in masks(problem):
        if task.cost(p) < found.cutoff and in_order(p.astype(np.int8), tree.twins):
            assert found.allows(p)
            # a single mask that is left would have been kept, were this tree not blind
            if len(free):
                assert task.cost(p) >= found.bound - 1e-9 * task.cost(task.start)
    same = np.arange(problem.n) // task.group
    a = task.q + np.diag(found.lam) + tree.mu * (same[:, None] == same[None, :])
    least = np.linalg.eigvalsh(a[np.ix_(free, free)]).min(initial=0.0)
    assert least >= -1e-9 * max(np.abs(a).max(), 1e-300)


def hard(n, pattern=SIXTY, seed=2):
    return LayerProblem(random_weight(1, n, 1), random_gram(n, "full", seed), pattern)


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2))])
@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)], ids=str)
@pytest.mark.parametrize("presolve", [True, False])
def test_scip_agrees_with_branch_with_it_and_without(pattern, presolve, seed):
    problem = hard(28, pattern, seed)
    solution = solve(problem, "scip", presolve=presolve)
    assert solution.status == (Status.OPTIMAL,)
    exact = solve(problem, "branch").objective
    torch.testing.assert_close(solution.objective, exact, rtol=1e-6, atol=0.0)
    verify(problem, solution)


def test_twins_are_fixed_in_order():
    """Pairs of copies: what is fixed is in order, and so is the mask."""
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gram = (x.T @ x).repeat_interleave(2, 0).repeat_interleave(2, 1)
    problem = LayerProblem(torch.ones(1, 12, dtype=torch.float64), gram, HALF)
    task = task_of(problem)
    tree = Tree(task, qcr_duals(task))
    assert [known.tolist() for known in tree.twins] == [[i, i + 1] for i in range(0, 12, 2)]
    assert in_order(probe(tree).state, tree.twins)
    solution = solve(problem, "scip", workers=0)
    assert in_order((~solution.mask[0].numpy()).astype(np.int8), tree.twins)
    torch.testing.assert_close(solution.objective, solve(problem, "exhaustive").objective)
    assert solution.status == (Status.OPTIMAL,)
    verify(problem, solution)


@pytest.mark.parametrize("misleading", [False, True])
def test_scip_has_what_is_left(monkeypatch, misleading):
    """The search sees the free inputs alone, also where the incumbent is not among what is allowed."""
    problem, seen = hard(60), []

    def watched(task):
        if misleading:  # as of a mask below the incumbent, of which there is none
            state = task.probed.state.copy()
            state[np.flatnonzero(state >= 0)[0]] ^= 1
            task = dataclasses.replace(task, probed=task.probed._replace(state=state))
        seen.append(task)
        return scip_model.solve_model(task)

    monkeypatch.setattr(scip, "solve_model", watched)
    solution = solve(problem, "scip", workers=0)
    (task,) = seen
    assert 0 < (task.probed.state < 0).sum() < problem.n
    assert task.probed.allows(task.start) is not misleading
    assert solution.status == (Status.OPTIMAL,)
    assert solution.trusted[0].startswith("presolve of maskopt and SCIP ")
    torch.testing.assert_close(solution.objective, solve(problem, "branch").objective)


def test_a_whole_number_between_the_cutoff_and_the_incumbent_is_no_gap():
    graph = np.triu(np.random.default_rng(3).random((24, 24)) < 0.5, 1)
    edges = (graph + graph.T).astype(float)
    problem = RowProblem.from_quadratic(edges, select=8, maximise=True)
    solution, ours = solve(problem, "scip"), solve(problem, "branch")
    assert solution.status == (Status.OPTIMAL,)
    assert float(solution.lower_bound[0]) == float(solution.objective[0])
    assert problem.value(float(solution.objective[0])) == problem.value(float(ours.objective[0]))


def test_no_time_leaves_everything_free():
    task = with_incumbent(task_of(hard(40)))
    tree = Tree(task, qcr_duals(task))
    tree.task = dataclasses.replace(task, limits=Limits(seconds=0).begin())
    found = probe(tree)
    assert found.state.tolist() == tree.start.state.tolist()
    assert found.bound == tree.start.bound
