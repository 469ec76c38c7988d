"""Branch and bound of our own, of kept and of refitted weights: what a node bounds and fixes."""

import itertools

import numpy as np
import pytest
import torch
from local_search import floor
from strategies import random_gram, random_weight, refit_layer

from maskopt import NM, LayerProblem, Status, Unstructured, solve, verify
from maskopt.solvers.convex.triangles import Pool
from maskopt.solvers.exact import refit_rows, refit_tree
from maskopt.solvers.exact.duals import qcr_duals
from maskopt.solvers.exact.pentagons import PLACES
from maskopt.solvers.exact.reconvex import multipliers, start_vectors
from maskopt.solvers.exact.relaxation import Plan, Relaxed
from maskopt.solvers.exact.tree import BranchTask, Tree

SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("low-rank", "duplicates")]


def layer(n, seed=1):
    return LayerProblem(random_weight(1, n, seed), random_gram(n, "full", 2), Unstructured(0.6))


def test_the_multipliers_of_a_node_are_semidefinite_and_tighten_it():
    problem, n = layer(48), 48
    q = problem.row(0).q().numpy()
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
    w = np.where(np.arange(n) == 0, 1e22, 1.0)
    q = np.outer(w, w) + np.diag(w**2)
    state = np.full(n, -1, dtype=np.int8)
    state[0] = 1
    vectors = start_vectors(n, 0)
    lam, after = multipliers(q, 1.0, 4, np.ones((n, n)), state, vectors, np.full(n, 0.5), 10)
    assert not lam.any()
    assert np.array_equal(after, vectors)


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.6), NM(keep=2, of=4)], ids=str)
@pytest.mark.parametrize("kind", ["full", "outliers", *SLOW])
def test_a_node_is_bounded_and_fixed_validly(pattern, kind):
    """Against all masks below random nodes, with the multipliers of the root and with the node's own."""
    n = 12
    problem = LayerProblem(random_weight(1, n, 9), random_gram(n, kind, 3), pattern)
    q, group, pruned = problem.row(0).q().numpy(), problem.group_size, problem.pruned_per_group
    legal = np.array(list(itertools.product((0, 1), repeat=n)), dtype=float)
    legal = legal[(legal.reshape(-1, n // group, group).sum(2) == pruned).all(1)]
    costs = np.einsum("si,ij,sj->s", legal, q, legal)
    task = BranchTask(q=q, group=group, pruned=pruned, start=legal[0].astype(bool))
    duals = qcr_duals(task)
    searched, random = Tree(task, duals), np.random.default_rng(0)
    fixings = tight = cuts = 0
    nothing = Relaxed(duals.with_margin(task), start_vectors(n, 1), Pool.empty(PLACES))
    for _ in range(60):
        # an incumbent that some masks beat
        cost = float(np.quantile(costs, random.uniform(0.02, 0.6)))
        state = np.full(n, -1, dtype=np.int8)
        chosen = random.choice(n, random.integers(0, 5), replace=False)
        state[chosen] = legal[random.integers(len(legal))][chosen]
        below = (legal[:, chosen] == state[chosen]).all(1)
        vectors, point = start_vectors(n, 1), np.full(n, 0.5)
        own, _ = multipliers(q, duals.penalty, pruned, searched.same, state, vectors, point, 200)
        searched.cost = cost
        middle = np.full(n, pruned / group)
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


def test_the_tree_does_not_depend_on_the_run():
    problem = layer(56, seed=3)
    one, two = (solve(problem, "branch", node_limit=40) for _ in range(2))
    assert torch.equal(one.trace.nodes, two.trace.nodes)
    assert torch.equal(one.lower_bound, two.lower_bound)
    assert torch.equal(one.mask, two.mask)


def test_beyond_enumeration_refitted_rows_rest_on_it_and_are_never_above_swap():
    problem = refit_layer(rows=2, n=32, damping=0.1)
    swapped = solve(problem, "swap", start="admm")
    found = solve(problem, "branch", start="admm", workers=0)
    assert set(found.status) == {Status.OPTIMAL}
    assert bool((found.objective <= swapped.objective + floor(problem)).all())
    assert "branch of maskopt" in str(verify(problem, found))


@pytest.mark.parametrize("case", ["float32", "turns that end early"])
def test_refitted_rows_are_proven_all_the_same(case, monkeypatch):
    """Turns that end early cost nodes and no proof."""
    if case == "float32":
        problem = refit_layer(rows=2, n=14, dtype=torch.float32)
    else:
        problem = refit_layer(rows=3, n=14, damping=0.03)
        monkeypatch.setattr(refit_tree, "_TURNS", 1)
    found, best = solve(problem, "branch", workers=0), solve(problem, "exhaustive")
    assert set(found.status) == {Status.OPTIMAL}
    torch.testing.assert_close(found.objective, best.objective, rtol=1e-6, atol=1e-12)


def test_what_is_fixed_at_a_node_does_not_depend_on_its_parents_bound(monkeypatch):
    """Its prices speak of its own bound, which may lie below that of its parent."""
    tasks = []
    monkeypatch.setattr(refit_rows, "run_rows", lambda search, given, *rest: tasks.extend(given))
    monkeypatch.setattr(refit_rows, "assemble", lambda *rest: solve(rest[0], "wanda"))
    solve(refit_layer(rows=4, n=20, damping=0.3), "branch")
    assert len(tasks) == 4
    for task in tasks:
        tree, fixed = refit_tree._Tree(task), []
        for least in (0.0, tree.aim * (1 - 1e-6)):
            tree.open.clear()
            tree._add(np.zeros(20, dtype=np.int8), np.full(20, 0.5), least)
            fixed.append(tree.open[0][2].tolist() if tree.open else [])
        assert fixed[0] == fixed[1]
