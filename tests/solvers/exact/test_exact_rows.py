"""What all exact solvers share: one deadline for all rows, and no belief in a self-contradiction."""

import itertools
import logging
import os
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import import_path
from strategies import random_gram, random_weight

import maskopt
from maskopt import LayerProblem, Limits, Status, Unstructured, available_solvers, solve, verify
from maskopt.errors import OptionError, SolverError
from maskopt.solver import make_solver
from maskopt.solvers.exact import branch, exhaustive, gurobi, highs, incumbent, rows, scip, tree
from maskopt.solvers.exact.rows import RowAnswer, RowTask, assemble, run_rows

MODULES = {"branch": branch, "scip": scip, "gurobi": gurobi, "highs": highs}
FEASIBLE, LATE = (Status.FEASIBLE,) * 3, ("timelimit",) * 3


@pytest.fixture(params=MODULES)
def name(request):
    info = available_solvers()[request.param]
    if not info.available:
        pytest.skip(info.unavailable)
    return request.param


def layer(n=14, rows=3, kind="full"):
    return LayerProblem(random_weight(rows, n, 1), random_gram(n, kind, 2), Unstructured(0.5))


def solved(problem, name, **options):
    """A solution that holds, found in this process."""
    solution = solve(problem, name, workers=0, **options)
    verify(problem, solution)
    return solution


def tasks_of(problem):
    start = (~solve(problem, "wanda").mask).numpy()
    group, pruned = problem.group_size, problem.pruned_per_group
    return [
        RowTask(
            q=problem.row(i).q().numpy(),
            group=group,
            pruned=pruned,
            start=start[i],
            limits=Limits(),
        )
        for i in range(problem.rows)
    ]


def lying(search, by):
    """The backend's own search, with a bound above the cost of its own mask."""

    def lie(task):
        answer = search(task)
        cost = task.cost(answer.pruned)
        return replace(answer, bound=cost + answer.slack + by * cost)

    return lie


def test_a_bound_above_its_own_mask_is_not_believed(name, monkeypatch, caplog):
    monkeypatch.setattr(MODULES[name], "search_row", lying(MODULES[name].search_row, 0.01))
    with caplog.at_level(logging.WARNING, "maskopt.exact"):
        solution = solved(layer(), name)
    assert solution.status == FEASIBLE
    assert solution.lower_bound.tolist() == [0.0] * 3
    assert solution.trusted == ("",) * 3
    assert solution.trace.ended == ("contradiction",) * 3
    for row, message in enumerate(solution.trace.message):
        assert f"row {row}" in message
        assert f"process {os.getpid()}" in message
        assert message in caplog.text
    verify(layer(), solution, require="checked")


def test_a_bound_within_the_tolerance_of_its_backend_is_cut_to_the_mask(name, monkeypatch):
    monkeypatch.setattr(MODULES[name], "search_row", lying(MODULES[name].search_row, 1e-9))
    solution = solve(layer(), name, workers=0)
    assert solution.status == (Status.OPTIMAL,) * 3
    assert torch.equal(solution.lower_bound, solution.objective)


def test_a_tree_whose_root_contradicts_its_incumbent_says_so(monkeypatch):
    """`branch` must not call a row optimal because its own root bound is wrong."""
    original = tree.bound_node

    def wrong(*args):
        value, point = original(*args)
        return 3 * value, point

    monkeypatch.setattr(tree, "bound_node", wrong)
    solution = solve(layer(), "branch", workers=0)
    assert solution.status == FEASIBLE
    assert solution.trace.ended == ("contradiction",) * 3


def lie_in_a_worker(task):
    return RowAnswer(task.start, "optimal", bound=2 * task.cost(task.start))


def test_the_process_that_contradicted_itself_is_named(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", import_path(__file__))
    problem = layer(rows=2)
    answers = run_rows(lie_in_a_worker, tasks_of(problem), Limits(), workers=1)
    assert len({answer.pid for answer in answers}) == 1
    assert answers[0].pid != os.getpid()
    solution = assemble(problem, answers, "a liar")
    assert f"process {answers[0].pid}" in solution.trace.message[1]
    assert solution.lower_bound.tolist() == [0.0, 0.0]


def start_again(task):
    return RowAnswer(task.start, "optimal")


@pytest.mark.parametrize(
    ("n", "workers", "here"),
    [
        (8, None, 2),
        (40, None, 0),
        pytest.param(8, 1, 0, marks=pytest.mark.slow),
        (8, 0, 4),
        (40, 0, 4),
    ],
)
def test_small_rows_begin_in_this_process(n, workers, here, monkeypatch):
    """By a clock that goes on by a second whenever it is looked at; three are what it takes to find a second
    row late."""
    monkeypatch.setenv("PYTHONPATH", import_path(__file__))
    monkeypatch.setattr(rows, "_HERE", 5.0)
    seconds = itertools.count()
    monkeypatch.setattr(rows, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    answers = run_rows(start_again, tasks_of(layer(n, 4)), Limits(threads=2), workers)
    assert [answer.ended for answer in answers] == ["optimal"] * 4
    mine = [answer.pid == os.getpid() for answer in answers]
    assert mine == [True] * here + [False] * (4 - here)


def worse(task):
    pruned = np.zeros(len(task.q), bool)
    pruned[np.argsort(-np.diagonal(task.q))[: task.pruned]] = True
    return RowAnswer(pruned, "timelimit")


def test_a_backend_never_answers_worse_than_the_start():
    (task,) = tasks_of(layer(kind="diagonal", rows=1))
    (answer,) = run_rows(worse, [task], Limits(), workers=0)
    assert np.array_equal(answer.pruned, task.start)


@pytest.mark.parametrize(
    "options",
    [
        {"time_limit": 0, "workers": 0},
        {"time_limit": 0, "workers": 1},
        {"row_seconds": 0.0, "workers": 0},
    ],
    ids=str,
)
def test_no_time_at_all_leaves_the_start(name, options):
    problem = layer(n=30)
    solution = solve(problem, name, **options)
    assert torch.equal(solution.mask, solve(problem, "wanda").mask)
    assert solution.status == FEASIBLE
    assert solution.trace.nodes.tolist() == [0] * 3
    assert solution.trace.ended == LATE
    verify(problem, solution, require="checked")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what the test adds to it."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def delayed(clock, owner, name, monkeypatch, by=1, before=lambda *_: None):
    """Every call takes so many seconds; returns the list of what `before` said of each."""
    original, calls = getattr(owner, name), []

    def slow(*args):
        calls.append(before(*args))
        answer = original(*args)
        clock.now += by
        return answer

    monkeypatch.setattr(owner, name, slow)
    return calls


def test_rows_share_one_deadline(name, monkeypatch, clock):
    """The first row takes all of the time; the others are not begun."""
    begun = delayed(clock, MODULES[name], "search_row", monkeypatch, 10, lambda t: t.limits.left)
    problem = layer()
    solution = solved(problem, name, time_limit=10)
    assert begun == [10]
    assert solution.status == (Status.OPTIMAL, *FEASIBLE[1:])
    assert solution.trace.nodes.tolist()[1:] == [0, 0]
    assert torch.equal(solution.mask[1:], solve(problem, "wanda").mask[1:])
    both = solve(problem, name, workers=0, time_limit=25, row_seconds=8)
    assert begun[1:] == [8, 8, 5]  # a row's own seconds, and what is left for all
    assert set(both.status) == {Status.OPTIMAL}


@pytest.mark.parametrize("solver", ["branch", "scip"])
def test_the_incumbent_of_a_tree_stops_at_the_deadline(solver, clock, monkeypatch):
    calls = delayed(clock, incumbent, "_moves", monkeypatch)
    monkeypatch.setattr(MODULES[solver], "qcr_duals", None)  # must not be called any more
    solution = solve(layer(n=40, rows=2), solver, workers=0, time_limit=1)
    assert len(calls) == 1  # one piece of the first row's search, and nothing of the second
    assert solution.trace.nodes.tolist() == [0, 0]
    assert solution.trace.ended == LATE[:2]


@pytest.mark.parametrize("solver", ["branch", "scip"])
def test_duals_are_the_last_thing_where_they_take_the_time(solver, clock, monkeypatch):
    delayed(clock, MODULES[solver], "qcr_duals", monkeypatch)
    problem = layer(n=30, rows=2)
    solution = solve(problem, solver, workers=0, time_limit=1)
    assert solution.trace.nodes.tolist() == [0, 0]
    # and what they prove is handed over with its certificate
    assert float(solution.lower_bound[0]) > 0
    assert solution.lower_bound[1] == 0
    assert solution.trusted == ("", "")
    verify(problem, solution, require="checked")


def test_the_tree_of_branch_stops_after_the_node_of_the_deadline(clock, monkeypatch):
    nodes = delayed(clock, branch.Tree, "_branch", monkeypatch)
    problem = LayerProblem(random_weight(1, 64, 1), random_gram(64, "full", 2), Unstructured(0.6))
    solution = solve(problem, "branch", time_limit=2)
    assert len(nodes) == 2
    assert solution.trace.ended == LATE[:1]
    assert 0 < float(solution.lower_bound[0]) <= float(solution.objective[0])


def test_enumeration_stops_at_the_deadline(monkeypatch):
    monkeypatch.setattr(exhaustive, "_CHUNK", 10)
    problem = layer(n=8, rows=2)  # 70 masks
    solution = solve(problem, "exhaustive", time_limit=0)
    assert solution.trace.nodes.tolist() == [10, 0]
    assert solution.status == FEASIBLE[:2]
    assert solution.trace.ended == LATE[:2]
    verify(problem, solution, require="checked")
    whole = solve(problem, "exhaustive")
    assert whole.trace.nodes.tolist() == [70, 70]
    assert bool((whole.objective <= solution.objective).all())


def test_who_is_trusted_is_named_with_its_version(name):
    word = solve(layer(n=24, rows=1), name).trusted[0]
    assert word.rpartition(" ")[0] in available_solvers()[name].capabilities.trusted
    assert any(character.isdigit() for character in word)


def test_enumeration_is_trusted_with_positive_bounds_alone():
    problem = layer(rows=2)
    weight = problem.weight[:1] * torch.tensor([[1.0], [0.0]])
    solution = solve(LayerProblem(weight, problem.gram, problem.pattern), "exhaustive")
    assert solution.trusted == (f"enumeration of maskopt {maskopt.__version__}", "")


def test_what_is_beyond_a_solver_is_refused(name):
    most = make_solver(name).capabilities.largest_n
    problem = LayerProblem(torch.ones(1, most + 1), torch.eye(most + 1), Unstructured(0.5))
    with pytest.raises(SolverError, match=f"at most {most}.*lower_bound"):
        solve(problem, name)
    assert make_solver("exhaustive").capabilities.largest_n is None
    with pytest.raises(SolverError, match="masks"):
        solve(layer(n=60), "exhaustive")


def test_options_are_checked_when_a_solver_is_made(name):
    bad = {"gap_limit": 1, "node_limit": 0, "row_seconds": -1, "workers": -1}
    bad |= {"branch": {"candidates": 0}, "scip": {"formulation": "magic"}}.get(name, {})
    for option, value in bad.items():
        with pytest.raises(OptionError, match=option):
            make_solver(name, **{option: value})
    with pytest.raises(OptionError, match="time_limit"):
        solve(layer(), name, time_limit=-1.0)
