"""SCIP's formulations and certificates, and what bounds of our own fix before it begins: nothing that a
better mask has otherwise."""

import dataclasses
import itertools

import numpy as np
import pyscipopt
import pytest
import torch
from hypothesis import given
from strategies import problems, random_gram, random_weight

from maskopt import NM, LayerProblem, Limits, RowProblem, Status, Unstructured, solve, verify
from maskopt.errors import OptionError
from maskopt.protocol.bounds import lower_bound
from maskopt.protocol.solver import WritesInstances, make_solver
from maskopt.solvers import Scip
from maskopt.solvers.exact.incumbent import with_incumbent
from maskopt.solvers.exact.rows import assemble
from maskopt.solvers.exact.scip import FORMULATIONS
from maskopt.solvers.exact.tasks import RowAnswer, RowTask
from maskopt.solvers.exact.tree.convexify import qcr_duals
from maskopt.solvers.exact.tree.node import in_order
from maskopt.solvers.exact.tree.probing import probe
from maskopt.solvers.exact.tree.quadratic import QuadraticTree

HALF, SIXTY = Unstructured(sparsity=0.5), Unstructured(sparsity=0.6)
OPTIMAL = (Status.OPTIMAL,)
TWO_FOUR = pytest.param(NM(keep=2, of=4), marks=pytest.mark.slow)
close = torch.testing.assert_close


def hard(n=60, rows=1, pattern=SIXTY, seed=2):
    return LayerProblem(random_weight(rows, n, 1), random_gram(n, "full", seed), pattern)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=str)
def test_every_formulation_proves_the_same_optimum(formulation, pattern):
    for kind in ("full", "duplicates"):
        problem = LayerProblem(random_weight(1, 12, 4), random_gram(12, kind, 3), pattern)
        solution = solve(problem, "scip", formulation=formulation, workers=0)
        close(solution.objective, solve(problem, "exhaustive").objective, rtol=1e-6, atol=1e-12)
        assert solution.status == OPTIMAL
        verify(problem, solution)


def test_symmetric_and_separable_rows_are_presolved():
    diagonal = LayerProblem(random_weight(3, 30, 1), random_gram(30, "diagonal", 2), HALF)
    solution = solve(diagonal, "scip", workers=0)
    assert (solution.trace.ended, solution.status) == (("presolved",) * 3, OPTIMAL * 3)
    assert torch.allclose(solution.objective, solve(diagonal, "wanda").objective)
    # by a certificate, SCIP is not trusted
    assert verify(diagonal, solution, require="checked").checked
    # ten copies of each of three inputs: without symmetry breaking a tree of 10!³ twins
    few = random_gram(3, "full", 5)
    copies = few.repeat_interleave(10, 0).repeat_interleave(10, 1)
    twins = LayerProblem(torch.ones(1, 30, dtype=torch.float64), copies, HALF)
    solution = solve(twins, "scip")
    assert solution.status == OPTIMAL
    counts = [(a, b, 15 - a - b) for a in range(11) for b in range(11) if 0 <= 15 - a - b <= 10]
    best = min(float(torch.tensor(k).double() @ few @ torch.tensor(k).double()) for k in counts)
    assert float(solution.objective[0]) == pytest.approx(best, rel=1e-6)


def test_qcr_starts_from_the_semidefinite_bound():
    problem = LayerProblem(random_weight(1, 30, 2), random_gram(30, "low-rank", 3), SIXTY)
    plain = solve(problem, "scip", formulation="factored")
    convexified = solve(problem, "scip")
    assert convexified.status == plain.status == OPTIMAL
    assert float(convexified.objective[0]) == pytest.approx(float(plain.objective[0]), rel=1e-6)
    certified = float(lower_bound(problem, "sdp").value[0])
    assert convexified.trace.root_bound[0] >= certified * (1 - 1e-9)
    assert 0 < certified <= float(plain.objective[0])


def test_scip_is_trusted_for_what_scip_itself_added():
    problem = hard(40)
    first = solve(problem, "scip", node_limit=1, presolve=False)
    assert first.trusted == (f"SCIP {pyscipopt.Model().version()}",)
    assert verify(problem, first).basis == (f"trusted: {first.trusted[0]}",)
    problem = hard(24, rows=3)
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
    assert solve(hard(12), "scip", memory_limit=10**40, **limits).status == OPTIMAL
    row, solver = hard(8).row(0), Scip()
    assert isinstance(solver, WritesInstances)
    assert not isinstance(make_solver("wanda"), WritesInstances)
    for bad in ({"form": "txt"}, {"formulation": "qcr"}, {"form": "mps"}):
        with pytest.raises(OptionError):
            solver.write_instance(row, tmp_path / "row", **bad)
    assert list(tmp_path.iterdir()) == []


# --- presolve of our own
def task_of(problem, row=0):
    group, pruned, row = problem.group_size, problem.pruned_per_group, problem.row(row)
    start = np.arange(problem.n) % group < pruned
    return RowTask(row.q().numpy(), group, pruned, start, values=row.values())


def masks(problem):
    """Every legal p, bool [masks, n]."""
    size, count = problem.group_size, problem.pruned_per_group
    sides = [np.isin(np.arange(size), c) for c in itertools.combinations(range(size), count)]
    groups = problem.n // size
    return np.array([np.concatenate(c) for c in itertools.product(sides, repeat=groups)])


class Blind(QuadraticTree):
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


def test_twins_are_fixed_in_order():
    """Pairs of copies: what is fixed is in order, and so is the mask."""
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gram = (x.T @ x).repeat_interleave(2, 0).repeat_interleave(2, 1)
    problem = LayerProblem(torch.ones(1, 12, dtype=torch.float64), gram, HALF)
    task = task_of(problem)
    tree = QuadraticTree(task, qcr_duals(task))
    assert [known.tolist() for known in tree.twins] == [[i, i + 1] for i in range(0, 12, 2)]
    assert in_order(probe(tree).state, tree.twins)
    solution = solve(problem, "scip", workers=0)
    assert in_order((~solution.mask[0].numpy()).astype(np.int8), tree.twins)
    close(solution.objective, solve(problem, "exhaustive").objective)
    assert solution.status == OPTIMAL
    verify(problem, solution)


@pytest.mark.slow
@pytest.mark.parametrize("misleading", [False, True])
def test_scip_has_what_is_left(monkeypatch, misleading):
    """The search sees the free inputs alone, also where the incumbent is not among what is allowed."""
    problem, seen = hard(48), []

    solved = Scip._solved

    def watched(solver, task, known):
        if misleading:  # as of a mask below the incumbent, of which there is none
            state = known.probed.state.copy()
            state[np.flatnonzero(state >= 0)[0]] ^= 1
            known = known._replace(probed=known.probed._replace(state=state))
        seen.append((task, known.probed))
        return solved(solver, task, known)

    monkeypatch.setattr(Scip, "_solved", watched)
    solution = solve(problem, "scip", workers=0)
    ((task, probed),) = seen
    assert 0 < (probed.state < 0).sum() < problem.n
    assert probed.allows(task.start) is not misleading
    assert solution.status == OPTIMAL
    assert solution.trusted[0].startswith("presolve of maskopt and SCIP ")
    close(solution.objective, solve(problem, "branch").objective)


def test_no_time_leaves_everything_free_and_a_whole_number_below_the_incumbent_is_no_gap():
    task = with_incumbent(task_of(hard(40)))
    tree = QuadraticTree(task, qcr_duals(task))
    tree.task = dataclasses.replace(task, limits=Limits(seconds=0).begin())
    found = probe(tree)
    assert (found.state.tolist(), found.bound) == (tree.start.state.tolist(), tree.start.bound)
    graph = np.triu(np.random.default_rng(3).random((24, 24)) < 0.5, 1)
    edges = (graph + graph.T).astype(float)
    problem = RowProblem.from_quadratic(edges, cardinality=8, maximise=True)
    solution, ours = solve(problem, "scip"), solve(problem, "branch")
    assert solution.status == OPTIMAL
    assert float(solution.lower_bound[0]) == float(solution.objective[0])
    assert problem.value(float(solution.objective[0])) == problem.value(float(ours.objective[0]))
