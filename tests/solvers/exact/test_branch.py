"""Branch and bound of our own, of kept and of refitted weights: what a node bounds and fixes; and inputs that
may be exchanged, of which a tree looks at one order, and the check of its proof knows why."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from local_search import floor
from strategies import problems, random_gram, random_weight, refit_layer

from maskopt import NM, LayerProblem, RowProblem, Status, Unstructured, solve, verify
from maskopt.certificates.proof_check import check_proof
from maskopt.errors import VerificationError
from maskopt.solvers.convex.triangles import Pool
from maskopt.solvers.exact import rows
from maskopt.solvers.exact.tasks import RowTask
from maskopt.solvers.exact.tree import least_squares
from maskopt.solvers.exact.tree.convexify import free_part, multipliers, qcr_duals, start_vectors
from maskopt.solvers.exact.tree.node import in_order, put_in_order, twins_of
from maskopt.solvers.exact.tree.pentagons import PLACES
from maskopt.solvers.exact.tree.quadratic import QuadraticTree
from maskopt.solvers.exact.tree.relaxation import Plan, Relaxed

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
        part = free_part(q, mu, pruned, same, state)
        lam, _ = multipliers(part, start_vectors(n, 0), point, sweeps)
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
    # beyond float32 there are none: a fixed input can outweigh the free ones by more than sweeps can hold
    n = 8
    w = np.where(np.arange(n) == 0, 1e22, 1.0)
    q = np.outer(w, w) + np.diag(w**2)
    state = np.full(n, -1, dtype=np.int8)
    state[0] = 1
    vectors = start_vectors(n, 0)
    part = free_part(q, 1.0, 4, np.ones((n, n)), state)
    lam, after = multipliers(part, vectors, np.full(n, 0.5), 10)
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
    task = RowTask(q=q, group=group, pruned=pruned, start=legal[0].astype(bool))
    duals = qcr_duals(task)
    searched, random = QuadraticTree(task, duals), np.random.default_rng(0)
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
        part = free_part(q, duals.penalty, pruned, searched.same, state)
        own, _ = multipliers(part, vectors, point, 200)
        searched.cost = cost
        middle = np.full(n, pruned / group)
        triangles = searched.convexify(state, middle, nothing, Plan((3.0, 1.0, 0.3)), 0.0)
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


@pytest.mark.slow
def test_beyond_enumeration_refitted_rows_rest_on_it_and_are_never_above_swap():
    problem = refit_layer(rows=2, n=28, damping=0.1)
    swapped = solve(problem, "swap", start="admm")
    found = solve(problem, "branch", start="admm", workers=0)
    assert set(found.status) == {Status.OPTIMAL}
    assert bool((found.objective <= swapped.objective + floor(problem)).all())
    assert "branch of maskopt" in str(verify(problem, found))


def test_float32_and_turns_that_end_early_cost_no_proof(monkeypatch):
    for how in ({"dtype": torch.float32}, {"damping": 0.03}):
        problem = refit_layer(rows=2, n=14, **how)
        found, best = solve(problem, "branch", workers=0), solve(problem, "exhaustive")
        assert set(found.status) == {Status.OPTIMAL}
        torch.testing.assert_close(found.objective, best.objective, rtol=1e-6, atol=1e-12)
        monkeypatch.setattr(least_squares, "_TURNS", 1)


def test_neither_runs_nor_a_parents_bound_change_what_is_fixed(monkeypatch):
    """The prices of a node speak of its own bound, which may lie below that of its parent."""
    one, two = (solve(layer(56, seed=3), "branch", node_limit=40) for _ in range(2))
    assert torch.equal(one.trace.nodes, two.trace.nodes)
    assert torch.equal(one.lower_bound, two.lower_bound)
    assert torch.equal(one.mask, two.mask)
    tasks = []
    monkeypatch.setattr(rows, "run_rows", lambda search, given, *rest: tasks.extend(given))
    monkeypatch.setattr(rows, "assemble", lambda *rest: solve(rest[0], "wanda"))
    solve(refit_layer(rows=4, n=20, damping=0.3), "branch")
    assert len(tasks) == 4
    for task in tasks:
        tree, fixed = least_squares.LeastSquaresTree(task), []
        for least in (0.0, tree.cutoff * (1 - 1e-6)):
            _, node = tree.bounded(np.full(20, -1, dtype=np.int8), np.full(20, 0.5), least)
            fixed.append(node.state.tolist() if node.bound < tree.cutoff else [])
        assert fixed[0] == fixed[1]


# --- twins
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
    # the first ones are pruned
    state = np.array([-1, 0, -1, -1, -1, 1, -1, -1], np.int8)
    assert in_order(state, [np.array([1, 3, 6]), np.array([0, 2, 5, 7])])
    assert state.tolist() == [1, 0, 1, 0, -1, 1, 0, -1]
    assert not in_order(np.array([0, 1, -1], np.int8), [np.array([0, 1, 2])])
    mask = put_in_order(np.array([0, 1, 0, 1, 1]), [np.array([0, 1, 4])])
    assert mask.tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("cardinality", [5, 9, 14])
def test_graphs_of_twins_take_few_nodes_and_are_checked(cardinality):
    """27 vertices in four parts; which masks cost least follows from the counts of the parts alone."""
    sizes = (10, 8, 6, 3)
    problem = RowProblem.from_quadratic(parts(sizes), cardinality=cardinality)
    solution = solve(problem, "branch", proof=True)
    assert solution.status == (Status.OPTIMAL,)
    assert verify(problem, solution, require="checked").checked
    counts = itertools.product(*(range(size + 1) for size in sizes))
    best = min(cardinality**2 - sum(k * k for k in c) for c in counts if sum(c) == cardinality)
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
    problem = RowProblem.from_quadratic(graph, cardinality=6)
    solution = solve(problem, "branch", proof=True)
    other = graph.copy()
    other[4, 11] = other[11, 4] = 0  # the last of the first part has one neighbour less
    changed = RowProblem.from_quadratic(other, cardinality=6)
    best = float(solve(changed, "branch").objective[0])
    assert best < float(solution.objective[0])
    try:
        proven = float(check_proof(changed, solution.proof)[0])
    except VerificationError:
        proven = 0.0
    assert proven <= best
