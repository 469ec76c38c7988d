"""Branch and bound: what a node bounds and fixes, twins; SCIP's formulations, certificates and presolve."""

import dataclasses
import itertools

import numpy as np
import pyscipopt
import pytest
import torch
from certificates import proven
from forging import fails
from hypothesis import given
from prunes import slow
from strategies import HALF, TWO_FOUR, drawn, floor, legal_masks, problems, refit_layer, verified

from maskopt import LayerProblem, Limits, RowProblem, Status, Unstructured, solve, verify
from maskopt.certificates.proof import check_proof
from maskopt.errors import OptionError, VerificationError
from maskopt.protocol.bounds import lower_bound
from maskopt.solvers import Scip
from maskopt.solvers.convex.triangles import PLACES, Pool
from maskopt.solvers.exact import branch, rows, tasks
from maskopt.solvers.exact.rows import assemble
from maskopt.solvers.exact.scip import FORMULATIONS
from maskopt.solvers.exact.tasks import RowAnswer, RowTask
from maskopt.solvers.exact.tree.node import (
    FreePart,
    multipliers,
    qcr_duals,
    start_vectors,
    with_penalty,
)
from maskopt.solvers.exact.tree.quadratic import QuadraticTree
from maskopt.solvers.exact.tree.relaxation import Relaxed, Schedule
from maskopt.solvers.exact.tree.search import Node

SIXTY, OPTIMAL = Unstructured(sparsity=0.6), (Status.OPTIMAL,)
close = torch.testing.assert_close


def layer(n, seed=1, rows=1):
    return drawn(rows, n, pattern=SIXTY, seeds=(seed, 2))


def task_of(problem, row=0):
    group, pruned, row = problem.group_size, problem.pruned_per_group, problem.row(row)
    start = np.arange(problem.n) % group < pruned
    return RowTask(row.q().numpy(), group, pruned, start, values=row.values())


def free_part(q, mu, pruned, state):
    task = RowTask(q, len(q), pruned, np.zeros(len(q), bool))
    return FreePart.of(with_penalty(q, mu, task), state)


def test_the_multipliers_of_a_node_are_semidefinite_and_tighten_it():
    problem, n = layer(48), 48
    q = problem.row(0).q().numpy()
    mu, pruned = float(np.trace(q)) / n, problem.pruned_per_group
    state, values = np.full(n, -1, dtype=np.int8), []
    state[[3, 8, 20]] = (1, 0, 1)
    free, same, point = np.flatnonzero(state < 0), np.ones((n, n)), np.full(n, 0.6)
    for sweeps in (1, 20, 500):
        part = free_part(q, mu, pruned, state)
        lam, _ = multipliers(part, start_vectors(n, 0), point, sweeps)
        a = q + mu * same + np.diag(lam)
        assert np.linalg.eigvalsh(a[np.ix_(free, free)])[0] >= 0
        p = np.where(state < 0, (pruned - 2) / len(free), state)
        gradient = 2 * a @ p - lam - 2 * mu * pruned
        value = p @ q @ p + lam @ (p * p - p) + mu * (p.sum() - pruned) ** 2
        least = np.sort(gradient[free])[: pruned - 2].sum() - gradient[free] @ p[free]
        values.append(value + least)
    assert values[0] < values[1] < values[2] <= float(solve(problem, "branch").objective) * 1.2
    assert lam[state >= 0].tolist() == [0, 0, 0]
    # none where a fixed input outweighs the free ones by more than the sweeps of a wide row, in float32, hold
    n, vectors = 300, start_vectors(300, 0)
    first = np.arange(n) == 0
    w, state = np.where(first, 1e22, 1.0), np.where(first, 1, -1).astype(np.int8)
    part = free_part(np.outer(w, w) + np.diag(w**2), 1.0, 4, state)
    lam, after = multipliers(part, vectors, np.full(n, 0.5), 10)
    assert not lam.any()
    assert np.array_equal(after, vectors)


@pytest.mark.parametrize("pattern", [SIXTY, TWO_FOUR], ids=str)
@pytest.mark.parametrize("kind", ["full", slow("outliers"), slow("low-rank"), slow("duplicates")])
def test_a_node_is_bounded_and_fixed_validly(pattern, kind):
    """Against all masks below random nodes, with the multipliers of the root and with the node's own."""
    n, problem = 12, drawn(1, 12, kind, pattern, (9, 3))
    legal = np.unique(~legal_masks(problem).numpy(), axis=0).astype(float)
    task = dataclasses.replace(task_of(problem), start=legal[0] > 0)
    q, group, pruned = task.q, task.group, task.pruned
    costs = np.einsum("si,ij,sj->s", legal, q, legal)
    duals = qcr_duals(task)
    searched, random = QuadraticTree(task, duals), np.random.default_rng(0)
    fixings = tight = cuts = 0
    root = duals.with_margin(searched.objective)
    nothing = Relaxed(root, start_vectors(n, 1), Pool.empty(PLACES))
    for _ in range(60):
        # an incumbent that some masks beat
        cost = float(np.quantile(costs, random.uniform(0.02, 0.6)))
        state = np.full(n, -1, dtype=np.int8)
        chosen = random.choice(n, random.integers(0, 5), replace=False)
        state[chosen] = legal[random.integers(len(legal))][chosen]
        below = (legal[:, chosen] == state[chosen]).all(1)
        vectors, point = start_vectors(n, 1), np.full(n, 0.5)
        part = FreePart.of(searched.objective, state)
        own, _ = multipliers(part, vectors, point, 200)
        searched.cost = cost
        middle = np.full(n, pruned / group)
        above = Node(0.0, 0, state, middle, nothing)
        triangles = searched.convexify(above, Schedule((3.0, 1.0, 0.3)))
        cuts += len(triangles.pool.tau)
        for form in (nothing, nothing._replace(lam=own), triangles):
            searched.cost = cost
            bounded = searched.bounded(above._replace(form=form))
            value, after = bounded.bound, bounded.state
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


@pytest.mark.slow
def test_float32_and_turns_that_end_early_cost_no_proof(monkeypatch):
    for how in ({"dtype": torch.float32}, {"damping": 0.03}):
        problem = refit_layer(rows=2, n=14, **how)
        found, best = solve(problem, "branch", workers=0), solve(problem, "exhaustive")
        assert set(found.status) == {Status.OPTIMAL}
        close(found.objective, best.objective, rtol=1e-6, atol=1e-12)
        monkeypatch.setattr(branch, "_TURNS", 1)


@pytest.mark.slow
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
        tree, fixed = branch.LeastSquaresTree(task), []
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
    sets = tasks.twins_of(q, group)
    together = {pair for known in sets for pair in itertools.combinations(known.tolist(), 2)}
    for i, j in itertools.combinations(range(problem.n), 2):
        order = np.arange(problem.n)
        order[[i, j]] = j, i
        same = i // group == j // group and bool((q[order][:, order] == q).all())
        assert ((i, j) in together) is same
    # the first ones are pruned
    state = np.array([-1, 0, -1, -1, -1, 1, -1, -1], np.int8)
    assert tasks.in_order(state, [np.array([1, 3, 6]), np.array([0, 2, 5, 7])])
    assert state.tolist() == [1, 0, 1, 0, -1, 1, 0, -1]
    assert not tasks.in_order(np.array([0, 1, -1], np.int8), [np.array([0, 1, 2])])
    mask = tasks.put_in_order(np.array([0, 1, 0, 1, 1]), [np.array([0, 1, 4])])
    assert mask.tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("cardinality", [5, 9, 14])
def test_graphs_of_twins_take_few_nodes_and_are_checked(cardinality):
    """27 vertices in four parts; which masks cost least follows from the counts of the parts alone."""
    sizes = (10, 8, 6, 3)
    problem = RowProblem.from_quadratic(parts(sizes), cardinality=cardinality)
    solution = proven(problem)
    assert solution.status == (Status.OPTIMAL,)
    counts = itertools.product(*(range(size + 1) for size in sizes))
    best = min(cardinality**2 - sum(k * k for k in c) for c in counts if sum(c) == cardinality)
    assert problem.value(float(solution.objective[0])) == pytest.approx(best)
    assert int(solution.trace.nodes[0]) < 30


def copies(gram, times, pattern=HALF):
    """A row of ones, of so many copies of each input."""
    gram = gram.repeat_interleave(times, 0).repeat_interleave(times, 1)
    return LayerProblem(torch.ones(1, len(gram), dtype=torch.float64), gram, pattern)


def test_copies_of_inputs_on_both_patterns():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for pattern in (HALF, TWO_FOUR):
        problem = copies(x.T @ x, 2, pattern)
        close(proven(problem).objective, solve(problem, "exhaustive").objective)


def test_a_tree_of_twins_does_not_serve_a_row_whose_inputs_are_none():
    graph = parts((5, 4, 3))
    solution = proven(RowProblem.from_quadratic(graph, cardinality=6))
    other = graph.copy()
    other[4, 11] = other[11, 4] = 0  # the last of the first part has one neighbour less
    changed = RowProblem.from_quadratic(other, cardinality=6)
    best = float(solve(changed, "branch").objective[0])
    assert best < float(solution.objective[0])
    try:
        bound = float(check_proof(changed, solution.proof)[0])
    except VerificationError:
        bound = 0.0
    assert bound <= best


# --- SCIP
@pytest.mark.parametrize("formulation", [FORMULATIONS[0], *map(slow, FORMULATIONS[1:])])
@pytest.mark.parametrize("pattern", [HALF, slow(TWO_FOUR)], ids=str)
def test_every_formulation_proves_the_same_optimum(formulation, pattern):
    for kind in ("full", "duplicates"):
        problem = drawn(1, 12, kind, pattern, (4, 3))
        solution = verified(problem, "scip", formulation=formulation, workers=0)
        close(solution.objective, solve(problem, "exhaustive").objective, rtol=1e-6, atol=1e-12)
        assert solution.status == OPTIMAL


def test_symmetric_and_separable_rows_are_presolved():
    diagonal = drawn(3, 30, "diagonal")
    solution = solve(diagonal, "scip", workers=0)
    assert (solution.trace.ended, solution.status) == (("presolved",) * 3, OPTIMAL * 3)
    assert torch.allclose(solution.objective, solve(diagonal, "wanda").objective)
    # by a certificate, SCIP is not trusted
    assert verify(diagonal, solution, require="checked").checked
    # ten copies of each of three inputs: without symmetry breaking a tree of 10!³ twins
    few = drawn(1, 3, seeds=(1, 5)).gram
    solution = solve(copies(few, 10), "scip")
    assert solution.status == OPTIMAL
    counts = [(a, b, 15 - a - b) for a in range(11) for b in range(11) if 0 <= 15 - a - b <= 10]
    best = min(float(torch.tensor(k).double() @ few @ torch.tensor(k).double()) for k in counts)
    assert float(solution.objective[0]) == pytest.approx(best, rel=1e-6)


def test_qcr_starts_from_the_semidefinite_bound():
    problem = drawn(1, 30, "low-rank", SIXTY, (2, 3))
    plain = solve(problem, "scip", formulation="factored")
    convexified = solve(problem, "scip")
    assert convexified.status == plain.status == OPTIMAL
    assert float(convexified.objective[0]) == pytest.approx(float(plain.objective[0]), rel=1e-6)
    certified = float(lower_bound(problem, "sdp").value[0])
    assert convexified.trace.root_bound[0] >= certified * (1 - 1e-9)
    assert 0 < certified <= float(plain.objective[0])


@pytest.mark.slow
def test_scip_is_trusted_for_what_scip_itself_added():
    problem = layer(40)
    first = solve(problem, "scip", node_limit=1, presolve=False)
    assert first.trusted == (f"SCIP {pyscipopt.Model().version()}",)
    assert verify(problem, first).basis == (f"trusted: {first.trusted[0]}",)
    problem = layer(24, rows=3)
    tasks = [task_of(problem, row) for row in range(3)]
    answers = [RowAnswer(task.start, "timelimit") for task in tasks]
    duals = qcr_duals(tasks[1])
    own = {"certificate": duals.certificate, "certified": duals.certified}
    answers[1] = dataclasses.replace(answers[1], bound=duals.certified, **own)
    answers[2] = dataclasses.replace(answers[2], bound=0.01 * tasks[2].cost(tasks[2].start))
    solution = assemble(problem, answers, "SCIP 10.0")
    assert (solution.trusted, solution.lower_bound[0]) == (("", "", "SCIP 10.0"), 0)
    assert float(solution.lower_bound[1]) == pytest.approx(duals.certified, rel=1e-9)
    assert verify(problem, solution).basis == ("checked", "checked", "trusted: SCIP 10.0")


def test_limits_beyond_those_of_scip_are_none_and_instances_of_another_kind_are_refused(tmp_path):
    limits = {"time_limit": 1e300, "row_seconds": 1e300, "node_limit": 10**20}
    assert solve(layer(12), "scip", memory_limit=10**40, **limits).status == OPTIMAL
    row, solver = layer(8).row(0), Scip()
    for bad in ({"form": "txt"}, {"formulation": "qcr"}, {"form": "mps"}):
        fails(OptionError, None, solver.write_instance, row, tmp_path / "row", **bad)
    assert list(tmp_path.iterdir()) == []


# --- presolve of our own
class Blind(QuadraticTree):
    def _round(self, point, state):
        pass


@given(problems(max_n=12, max_rows=1))
def test_every_mask_below_the_cutoff_has_what_was_fixed(problem):
    """From a bad incumbent, which leaves many masks below it."""
    task = task_of(problem)
    if not 0 < task.pruned < task.group or task.cost(task.start) <= task.noise:
        return
    tree = Blind(task, qcr_duals(task))
    tree.probe()
    found = tree.start
    free = np.flatnonzero(found.state < 0)
    for p in ~legal_masks(problem).numpy():
        if task.cost(p) < tree.cutoff and tasks.in_order(p.astype(np.int8), task.twins):
            assert ((found.state < 0) | (found.state == p)).all()
            # a single mask that is left would have been kept, were this tree not blind
            if len(free):
                assert task.cost(p) >= found.bound - 1e-9 * task.cost(task.start)
    same = np.arange(problem.n) // task.group
    a = task.q + np.diag(found.form.lam) + tree.mu * (same[:, None] == same[None, :])
    least = np.linalg.eigvalsh(a[np.ix_(free, free)]).min(initial=0.0)
    assert least >= -1e-9 * max(np.abs(a).max(), 1e-300)


def test_twins_are_fixed_in_order():
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    problem = copies(x.T @ x, 2)
    task = task_of(problem)
    tree = QuadraticTree(task, qcr_duals(task))
    assert [known.tolist() for known in task.twins] == [[i, i + 1] for i in range(0, 12, 2)]
    tree.probe()
    assert tasks.in_order(tree.start.state, task.twins)
    solution = verified(problem, "scip", workers=0)
    assert tasks.in_order((~solution.mask[0].numpy()).astype(np.int8), task.twins)
    close(solution.objective, solve(problem, "exhaustive").objective)
    assert solution.status == OPTIMAL


@pytest.mark.slow
@pytest.mark.parametrize("misleading", [False, True])
def test_scip_has_what_is_left(monkeypatch, misleading):
    """The search sees the free inputs alone, also where the incumbent is not among what is allowed."""
    problem, seen, solved = layer(48), [], Scip._solved

    def watched(solver, task, duals, tree):
        if misleading:  # as of a mask below the incumbent, of which there is none
            state = tree.start.state
            state[np.flatnonzero(state >= 0)[0]] ^= 1
        seen.append((task, tree.start.state))
        return solved(solver, task, duals, tree)

    monkeypatch.setattr(Scip, "_solved", watched)
    solution = solve(problem, "scip", workers=0)
    ((task, state),) = seen
    assert 0 < (state < 0).sum() < problem.n
    allowed = bool(((state < 0) | (state == task.start)).all())
    assert (allowed, solution.status) == (not misleading, OPTIMAL)
    assert solution.trusted[0].startswith("presolve of maskopt and SCIP ")
    close(solution.objective, solve(problem, "branch").objective)


def test_no_time_leaves_everything_free_and_a_whole_number_below_the_incumbent_is_no_gap():
    task = task_of(layer(40)).with_incumbent()
    tree = QuadraticTree(task, qcr_duals(task))
    tree.task = dataclasses.replace(task, limits=Limits(seconds=0).begin())
    before = tree.start
    tree.probe()
    assert tree.start.state.tolist() == before.state.tolist()
    assert tree.start.bound == before.bound
    graph = np.triu(np.random.default_rng(3).random((24, 24)) < 0.5, 1)
    edges = (graph + graph.T).astype(float)
    problem = RowProblem.from_quadratic(edges, cardinality=8, maximize=True)
    solution, ours = solve(problem, "scip"), solve(problem, "branch")
    found = float(solution.objective[0])
    assert (solution.status, float(solution.lower_bound[0])) == (OPTIMAL, found)
    assert problem.value(found) == problem.value(float(ours.objective[0]))
