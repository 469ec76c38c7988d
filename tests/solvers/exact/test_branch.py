"""Branch and bound of our own: equal to enumeration and to SCIP, honest at every limit."""

import heapq
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from strategies import problems, random_gram, random_weight

from maskopt import NM, LayerProblem, Status, Unstructured, solve, verify
from maskopt.errors import OptionError, SolverError
from maskopt.solvers.convex.triangles import Pool
from maskopt.solvers.exact import branch, tree
from maskopt.solvers.exact.duals import qcr_duals
from maskopt.solvers.exact.pentagons import PLACES
from maskopt.solvers.exact.reconvex import multipliers, start_vectors
from maskopt.solvers.exact.relaxation import Plan, Relaxed
from maskopt.solvers.exact.tree import BranchTask, Tree


@given(problems(max_n=10, max_rows=1))
@settings(max_examples=40)
def test_branch_equals_exhaustive(problem):
    exact = solve(problem, "exhaustive").objective
    solution = solve(problem, "branch", workers=0)
    slack = 1e-6 * exact + 1e-10 * problem.diagonal_mass()
    assert bool(((solution.objective - exact).abs() <= slack).all())
    assert bool((solution.lower_bound <= exact + slack).all())
    verify(problem, solution)


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.6), NM(keep=2, of=4)], ids=str)
@pytest.mark.parametrize("kind", ["full", "low-rank", "duplicates", "outliers"])
def test_branch_and_scip_prove_the_same_optimum(pattern, kind):
    problem = LayerProblem(random_weight(1, 24, 4), random_gram(24, kind, 3), pattern)
    ours = solve(problem, "branch")
    scip = solve(problem, "scip", time_limit=60)
    torch.testing.assert_close(ours.objective, scip.objective, rtol=2e-6, atol=1e-9)
    assert ours.status == scip.status == (Status.OPTIMAL,)
    verify(problem, ours)
    verify(problem, scip)


def test_limits_leave_an_incumbent_and_a_valid_bound():
    problem = LayerProblem(random_weight(1, 64, 1), random_gram(64, "full", 2), Unstructured(0.6))
    best = solve(problem, "branch").objective
    for options in ({"time_limit": 0}, {"node_limit": 3}, {"gap_limit": 0.5}):
        solution = solve(problem, "branch", **options)
        assert solution.status == (Status.FEASIBLE,)
        assert bool((solution.lower_bound <= best * (1 + 1e-9)).all())
        verify(problem, solution)
    assert float(solution.gap) <= 0.5


def test_bad_options_are_named():
    problem = LayerProblem(random_weight(1, 8, 1), random_gram(8, "full", 2), Unstructured(0.5))
    with pytest.raises(OptionError, match="candidates"):
        solve(problem, "branch", candidates=0)
    big = LayerProblem(np.ones((1, 520)), np.eye(520), Unstructured(0.5))
    with pytest.raises(SolverError, match="lower_bound"):
        solve(big, "branch")


def test_the_multipliers_of_a_node_are_semidefinite_and_tighten_it():
    problem = LayerProblem(random_weight(1, 48, 1), random_gram(48, "full", 2), Unstructured(0.6))
    q, n = problem.row(0).q().numpy(), 48
    mu, pruned = float(np.trace(q)) / n, problem.pruned_per_group
    state = np.full(n, -1, dtype=np.int8)
    state[[3, 8, 20]] = (1, 0, 1)
    free = np.flatnonzero(state < 0)
    same, point = np.ones((n, n)), np.full(n, 0.6)
    values = []
    for sweeps in (1, 20, 500):
        lam, _ = multipliers(q, mu, pruned, same, state, start_vectors(n, 0), point, sweeps)
        a = q + mu * same + np.diag(lam)
        assert np.linalg.eigvalsh(a[np.ix_(free, free)])[0] >= 0
        p = np.where(state < 0, (pruned - 2) / len(free), state)
        gradient = 2 * a @ p - lam - 2 * mu * pruned
        value = p @ q @ p + lam @ (p * p - p) + mu * (p.sum() - pruned) ** 2
        least = np.sort(gradient[free])[: pruned - 2].sum() - gradient[free] @ p[free]
        values.append(value + least)
    optimum = float(solve(problem, "branch").objective)
    assert values[0] < values[1] < values[2] <= optimum * 1.2
    assert lam[state >= 0].tolist() == [0, 0, 0]


def test_multipliers_beyond_float32_are_none():
    """An input that was fixed can outweigh the free ones by more than the sweeps can hold."""
    n = 8
    w = np.ones(n)
    w[0] = 1e22
    q = np.outer(w, w) + np.diag(w**2)
    state = np.full(n, -1, dtype=np.int8)
    state[0] = 1
    vectors = start_vectors(n, 0)
    lam, after = multipliers(q, 1.0, 4, np.ones((n, n)), state, vectors, np.full(n, 0.5), 10)
    assert not lam.any()
    assert np.array_equal(after, vectors)


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.6), NM(keep=2, of=4)], ids=str)
@pytest.mark.parametrize("kind", ["full", "low-rank", "duplicates", "outliers"])
def test_a_node_is_bounded_and_fixed_validly(pattern, kind):
    """Against all masks below random nodes, with the multipliers of the root and with the node's own."""
    n = 12
    problem = LayerProblem(random_weight(1, n, 9), random_gram(n, kind, 3), pattern)
    q = problem.row(0).q().numpy()
    legal = np.array(list(itertools.product((0, 1), repeat=n)), dtype=float)
    legal = legal[
        (legal.reshape(-1, n // problem.group_size, problem.group_size).sum(2) ==
         problem.pruned_per_group).all(1)
    ]  # fmt: skip
    costs = np.einsum("si,ij,sj->s", legal, q, legal)
    start = legal[0].astype(bool)
    task = BranchTask(q=q, group=problem.group_size, pruned=problem.pruned_per_group, start=start)
    duals = qcr_duals(task)
    lam, mu = duals.with_margin(task), duals.penalty
    searched = Tree(task, duals)
    random = np.random.default_rng(0)
    fixings = tight = cuts = 0
    nothing = Relaxed(lam, start_vectors(n, 1), Pool.empty(PLACES))
    for _ in range(60):
        # an incumbent that some masks beat
        cost = float(np.quantile(costs, random.uniform(0.02, 0.6)))
        state = np.full(n, -1, dtype=np.int8)
        chosen = random.choice(n, random.integers(0, 5), replace=False)
        state[chosen] = legal[random.integers(len(legal))][chosen]
        below = (legal[:, chosen] == state[chosen]).all(1)
        own, _ = multipliers(
            q, mu, task.pruned, searched.same, state, start_vectors(n, 1), np.full(n, 0.5), 200
        )
        searched.cost = cost
        middle = np.full(n, task.pruned / task.group)
        triangles = searched._tighten(state, middle, nothing, Plan((3.0, 1.0, 0.3)), 0.0)
        cuts += len(triangles.pool.tau)
        for form in (nothing, nothing._replace(lam=own), triangles):
            searched.cost = cost
            after = state.copy()
            value, _, _ = searched.bound(after, form)
            assert value <= costs[below].min() + 1e-9 * abs(cost)
            tight += value > 0.8 * costs[below].min()
            better = below & (costs < searched.cutoff)
            fixed = np.flatnonzero(after >= 0)
            if value < searched.cutoff:
                assert (legal[better][:, fixed] == after[fixed]).all()
            fixings += len(fixed) - len(chosen)
    assert fixings >= 5
    assert cuts > 20
    assert tight > 10


def test_ctrl_c_before_the_tree_returns_the_incumbent(monkeypatch):
    def interrupted(task):
        raise KeyboardInterrupt

    monkeypatch.setattr(branch, "qcr_duals", interrupted)
    problem = LayerProblem(random_weight(1, 24, 1), random_gram(24, "full", 2), Unstructured(0.6))
    solution = solve(problem, "branch")
    assert solution.trace.ended == ("userinterrupt",)
    assert bool((solution.objective <= solve(problem, "wanda").objective).all())
    assert solution.lower_bound.tolist() == [0.0]
    verify(problem, solution)


def test_the_tree_does_not_depend_on_the_run():
    problem = LayerProblem(random_weight(1, 56, 3), random_gram(56, "full", 2), Unstructured(0.6))
    one, two = (solve(problem, "branch", node_limit=40) for _ in range(2))
    assert torch.equal(one.trace.nodes, two.trace.nodes)
    assert torch.equal(one.lower_bound, two.lower_bound)
    assert torch.equal(one.mask, two.mask)


def test_ctrl_c_returns_the_incumbent_and_the_least_open_bound(monkeypatch):
    problem = LayerProblem(random_weight(1, 64, 1), random_gram(64, "full", 2), Unstructured(0.6))
    best = solve(problem, "branch").objective
    calls = itertools.count()
    original = tree.bound_node

    def interrupted(*args):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(tree, "bound_node", interrupted)
    check_interrupted(problem, best)


def check_interrupted(problem, best):
    solution = solve(problem, "branch")
    assert solution.trace.ended == ("userinterrupt",)
    assert solution.status == (Status.FEASIBLE,)
    assert bool((solution.lower_bound > 0.8 * best).all())
    assert bool((solution.lower_bound < best * (1 - 1e-4)).all())  # nodes are still open
    verify(problem, solution)


def test_ctrl_c_between_taking_a_node_and_branching_on_it_loses_no_node(monkeypatch):
    problem = LayerProblem(random_weight(1, 64, 1), random_gram(64, "full", 2), Unstructured(0.6))
    best = solve(problem, "branch").objective
    calls, take = itertools.count(), heapq.heappop

    def interrupted(nodes):
        node = take(nodes)
        if next(calls) == 9:
            nodes.clear()  # as if all others were being branched on, too
            raise KeyboardInterrupt
        return node

    monkeypatch.setattr(tree.heapq, "heappop", interrupted)
    check_interrupted(problem, best)
