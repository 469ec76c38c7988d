"""What all exact solvers share: one deadline for all rows, and no belief in a self-contradiction."""

import dataclasses
import itertools
import logging
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import import_path
from strategies import random_gram, random_weight

from maskopt import (
    LayerProblem,
    Limits,
    Status,
    Unstructured,
    __version__,
    available_solvers,
    solve,
    verify,
)
from maskopt.errors import OptionError, SolverError
from maskopt.solver import make_solver
from maskopt.solvers.exact import branch, exhaustive, gurobi, highs, incumbent, rows, scip, tree
from maskopt.solvers.exact.rows import RowAnswer, RowTask, assemble, run_rows

MODULES = {"branch": branch, "scip": scip, "gurobi": gurobi, "highs": highs}


@pytest.fixture(params=MODULES)
def name(request):
    info = available_solvers()[request.param]
    if not info.available:
        pytest.skip(info.unavailable)
    return request.param


def layer(n=14, rows=3, kind="full"):
    return LayerProblem(random_weight(rows, n, 1), random_gram(n, kind, 2), Unstructured(0.5))


def lying(search, by):
    """The backend's own search, with a bound above the cost of its own mask."""

    def lie(task):
        answer = search(task)
        cost = task.cost(answer.pruned)
        return dataclasses.replace(answer, bound=cost + answer.slack + by * cost)

    return lie


def test_a_bound_above_its_own_mask_is_not_believed(name, monkeypatch, caplog):
    problem = layer()
    module = MODULES[name]
    monkeypatch.setattr(module, "search_row", lying(module.search_row, 0.01))
    with caplog.at_level(logging.WARNING, "maskopt.exact"):
        solution = solve(problem, name, workers=0)
    assert solution.status == (Status.FEASIBLE,) * 3
    assert solution.lower_bound.tolist() == [0.0] * 3
    assert solution.trusted == ("",) * 3
    assert solution.trace.ended == ("contradiction",) * 3
    for row, message in enumerate(solution.trace.message):
        assert f"row {row}" in message
        assert f"process {os.getpid()}" in message
        assert message in caplog.text
    verify(problem, solution, require="checked")


def test_a_bound_within_the_tolerance_of_its_backend_is_cut_to_the_mask(name, monkeypatch):
    problem = layer()
    module = MODULES[name]
    monkeypatch.setattr(module, "search_row", lying(module.search_row, 1e-9))
    solution = solve(problem, name, workers=0)
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
    assert solution.status == (Status.FEASIBLE,) * 3
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
    ("n", "workers", "threads", "here"),
    [(8, None, 2, 2), (40, None, 2, 0), (8, 1, 2, 0), (8, 0, 2, 4), (40, 0, 2, 4)],
)
def test_small_rows_begin_in_this_process(n, workers, threads, here, monkeypatch):
    """By a clock that goes on by a second whenever it is looked at; three are what it takes to find a second
    row late."""
    monkeypatch.setenv("PYTHONPATH", import_path(__file__))
    monkeypatch.setattr(rows, "_HERE", 5.0)
    seconds = itertools.count()
    monkeypatch.setattr(rows, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    tasks = tasks_of(layer(n=n, rows=4))
    answers = run_rows(start_again, tasks, Limits(threads=threads), workers)
    assert [answer.ended for answer in answers] == ["optimal"] * 4
    mine = [answer.pid == os.getpid() for answer in answers]
    assert mine == [True] * here + [False] * (4 - here)


def tasks_of(problem, limits=None):
    start = ~solve(problem, "wanda").mask
    return [
        RowTask(
            q=problem.row(i).q().numpy(),
            group=problem.group_size,
            pruned=problem.pruned_per_group,
            start=start[i].numpy(),
            limits=limits or Limits(),
        )
        for i in range(problem.rows)
    ]


def worse(task):
    order = np.argsort(-np.diagonal(task.q))
    pruned = np.zeros(len(task.q), bool)
    pruned[order[: task.pruned]] = True
    return RowAnswer(pruned, "timelimit")


def test_a_backend_never_answers_worse_than_the_start():
    problem = layer(kind="diagonal", rows=1)
    (answer,) = run_rows(worse, tasks_of(problem), Limits(), workers=0)
    assert np.array_equal(answer.pruned, tasks_of(problem)[0].start)


def test_no_time_at_all_leaves_the_start(name):
    problem = layer(n=30)
    for options in ({"time_limit": 0}, {"row_seconds": 0.0}):
        for workers in (0, 1):
            if workers and options != {"time_limit": 0}:
                continue  # a process would only be started to say the same
            solution = solve(problem, name, workers=workers, **options)
            assert torch.equal(solution.mask, solve(problem, "wanda").mask)
            assert solution.status == (Status.FEASIBLE,) * 3
            assert solution.trace.nodes.tolist() == [0] * 3
            assert solution.trace.ended == ("timelimit",) * 3
            verify(problem, solution, require="checked")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what the test adds to it."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


def test_rows_share_one_deadline(name, monkeypatch, clock):
    """The first row takes all of the time; the others are not begun."""
    module = MODULES[name]
    search, begun = module.search_row, []

    def slow(task):
        begun.append(task.limits.left)
        answer = search(task)
        clock.now += 10
        return answer

    monkeypatch.setattr(module, "search_row", slow)
    problem = layer()
    solution = solve(problem, name, workers=0, time_limit=10)
    assert begun == [10]
    assert solution.status == (Status.OPTIMAL, Status.FEASIBLE, Status.FEASIBLE)
    assert solution.trace.nodes.tolist()[1:] == [0, 0]
    assert torch.equal(solution.mask[1:], solve(problem, "wanda").mask[1:])
    verify(problem, solution)
    del begun[:]
    both = solve(problem, name, workers=0, time_limit=25, row_seconds=8)
    assert begun == [8, 8, 5]  # a row's own seconds, and what is left for all
    assert set(both.status) == {Status.OPTIMAL}


def test_the_incumbent_of_a_tree_stops_at_the_deadline(clock, monkeypatch):
    calls = []
    original = incumbent._moves

    def counted(*args):
        calls.append(args)
        clock.now += 1
        return original(*args)

    monkeypatch.setattr(incumbent, "_moves", counted)
    monkeypatch.setattr(branch, "qcr_duals", None)  # must not be called any more
    monkeypatch.setattr(scip, "qcr_duals", None)
    for solver in ("branch", "scip"):
        del calls[:]
        solution = solve(layer(n=40, rows=2), solver, workers=0, time_limit=1)
        assert len(calls) == 1  # one piece of the first row's search, and nothing of the second
        assert solution.trace.nodes.tolist() == [0, 0]
        assert solution.trace.ended == ("timelimit", "timelimit")


@pytest.mark.parametrize("solver", ["branch", "scip"])
def test_duals_are_the_last_thing_where_they_take_the_time(solver, clock, monkeypatch):
    module = MODULES[solver]
    original = module.qcr_duals

    def slow(task):
        duals = original(task)
        clock.now += 1
        return duals

    monkeypatch.setattr(module, "qcr_duals", slow)
    problem = layer(n=30, rows=2)
    solution = solve(problem, solver, workers=0, time_limit=1)
    assert solution.trace.nodes.tolist() == [0, 0]
    # and what they prove is handed over with its certificate
    assert float(solution.lower_bound[0]) > 0
    assert solution.lower_bound[1] == 0
    assert solution.trusted == ("", "")
    verify(problem, solution, require="checked")


def test_the_tree_of_branch_stops_after_the_node_of_the_deadline(clock, monkeypatch):
    original, nodes = branch.Tree._branch, []

    def slow(self, node):
        nodes.append(node)
        clock.now += 1
        return original(self, node)

    monkeypatch.setattr(branch.Tree, "_branch", slow)
    problem = LayerProblem(random_weight(1, 64, 1), random_gram(64, "full", 2), Unstructured(0.6))
    solution = solve(problem, "branch", time_limit=2)
    assert len(nodes) == 2
    assert solution.trace.ended == ("timelimit",)
    assert 0 < float(solution.lower_bound[0]) <= float(solution.objective[0])


def test_enumeration_stops_at_the_deadline(monkeypatch):
    monkeypatch.setattr(exhaustive, "_CHUNK", 10)
    problem = layer(n=8, rows=2)  # 70 masks
    solution = solve(problem, "exhaustive", time_limit=0)
    assert solution.trace.nodes.tolist() == [10, 0]
    assert solution.status == (Status.FEASIBLE,) * 2
    assert solution.trace.ended == ("timelimit",) * 2
    verify(problem, solution, require="checked")
    whole = solve(problem, "exhaustive")
    assert whole.trace.nodes.tolist() == [70, 70]
    assert bool((whole.objective <= solution.objective).all())


def test_who_is_trusted_is_named_with_its_version(name):
    problem = layer(n=24, rows=1)
    word = solve(problem, name).trusted[0]
    assert word.rpartition(" ")[0] in available_solvers()[name].capabilities.trusted
    assert any(character.isdigit() for character in word)


def test_enumeration_is_trusted_with_positive_bounds_alone():
    problem = layer(rows=2)
    zero = LayerProblem(
        torch.cat([problem.weight[:1], 0 * problem.weight[:1]]), problem.gram, problem.pattern
    )
    solution = solve(zero, "exhaustive")
    assert solution.trusted == (f"enumeration of maskopt {__version__}", "")


def test_progress_counts_rows(name):
    told = []
    solve(layer(), name, workers=0, on_progress=told.append)
    assert [(progress.done, progress.total) for progress in told] == [(1, 3), (2, 3), (3, 3)]


def test_what_is_beyond_a_solver_is_refused(name):
    most = make_solver(name).capabilities.largest_n
    problem = LayerProblem(torch.ones(1, most + 1), torch.eye(most + 1), Unstructured(0.5))
    with pytest.raises(SolverError, match=f"at most {most}"):
        solve(problem, name)
    assert make_solver("exhaustive").capabilities.largest_n is None
    with pytest.raises(SolverError, match="masks"):
        solve(layer(n=60), "exhaustive")


def test_options_are_checked_when_a_solver_is_made(name):
    for bad in ({"gap_limit": 1}, {"node_limit": 0}, {"row_seconds": -1}, {"workers": -1}):
        with pytest.raises(OptionError, match=next(iter(bad))):
            make_solver(name, **bad)
    with pytest.raises(OptionError, match="candidates"):
        make_solver("branch", candidates=0)
