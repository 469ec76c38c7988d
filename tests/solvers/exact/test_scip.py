"""SCIP against enumeration, and what a limit, a crash or an interrupt leaves."""

import dataclasses
import errno
import os
import select
import signal
import subprocess
import sys
import time
from pickle import PicklingError

import joblib
import numpy as np
import pyscipopt
import pytest
import torch
from commands import import_path
from hypothesis import given, settings
from strategies import problems, random_gram, random_weight

from maskopt import NM, LayerProblem, Status, Unstructured, solve, verify
from maskopt.bounds import lower_bound
from maskopt.errors import OptionError, SolverError
from maskopt.jobs import as_they_finish
from maskopt.solver import WritesInstances, make_solver
from maskopt.solvers import Scip
from maskopt.solvers.exact.duals import qcr_duals
from maskopt.solvers.exact.rows import RowAnswer, assemble
from maskopt.solvers.exact.scip_model import FORMULATIONS, ScipTask
from maskopt.solvers.exact.workers import WorkerCrash, run_tasks


@given(problems(max_n=14, max_rows=1))
@settings(max_examples=100)
def test_scip_equals_exhaustive(problem):
    exact = solve(problem, "exhaustive").objective
    solution = solve(problem, "scip", workers=0)
    slack = 1e-6 * exact + 1e-10 * problem.diagonal_mass()
    assert bool(((solution.objective - exact).abs() <= slack).all())
    assert bool((solution.lower_bound <= exact + slack).all())
    verify(problem, solution)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.5), NM(keep=2, of=4)], ids=str)
def test_every_formulation_proves_the_same_optimum(formulation, pattern):
    for kind in ("full", "low-rank", "duplicates"):
        problem = LayerProblem(random_weight(1, 12, 4), random_gram(12, kind, 3), pattern)
        solution = solve(problem, "scip", formulation=formulation)
        exact = solve(problem, "exhaustive").objective
        torch.testing.assert_close(solution.objective, exact, rtol=1e-6, atol=1e-12)
        assert solution.status == (Status.OPTIMAL,)
        verify(problem, solution)


def hard(n=60, rows=1):
    return LayerProblem(random_weight(rows, n, 1), random_gram(n, "full", 2), Unstructured(0.6))


def test_limits_return_the_incumbent_and_an_honest_bound():
    problem = hard()
    start = solve(problem, "wanda").objective
    for options in ({"time_limit": 0}, {"node_limit": 1}, {"gap_limit": 0.9}):
        solution = solve(problem, "scip", **options)
        assert solution.status == (Status.FEASIBLE,)
        assert bool((solution.objective <= start).all())
        verify(problem, solution)
    assert float(solution.gap) <= 0.9 + 1e-9


def test_rows_run_in_worker_processes_and_agree():
    problem = LayerProblem(random_weight(3, 12, 1), random_gram(12, "full", 2), NM(2, 4))
    seen = []
    solution = solve(
        problem, "scip", workers=2, on_progress=lambda told: seen.append((told.done, told.total))
    )
    torch.testing.assert_close(solution.objective, solve(problem, "exhaustive").objective)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    verify(problem, solution)


def die_on_seven(task):
    if task == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return task * task


def test_a_crash_costs_its_task_alone(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", import_path(__file__))
    answers = dict(run_tasks(die_on_seven, [3, 7, 5, 6], workers=2, recycle=2))
    assert isinstance(answers.pop(1), WorkerCrash)
    assert answers == {0: 9, 2: 25, 3: 36}


def test_rows_whose_process_died_keep_their_start_and_that_is_said(monkeypatch, caplog):
    died = [(0, WorkerCrash("the worker process died with exit status -9"))]
    monkeypatch.setattr("maskopt.solvers.exact.rows._as_they_finish", lambda *_: iter(died))
    problem = LayerProblem(random_weight(1, 8, 1), random_gram(8, "low-rank", 2), Unstructured(0.5))
    found = solve(problem, "scip")
    assert found.status == (Status.FEASIBLE,)
    assert "1 rows keep their start: the worker process died with exit status -9" in caplog.text


def test_a_killed_job_is_one_error(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", import_path(__file__))
    calls = [joblib.delayed(die_on_seven)(task) for task in (7, 7)]
    with pytest.raises(SolverError, match=r"worker process was killed.*`jobs` 1"):
        list(as_they_finish(calls, jobs=2))


def test_a_process_that_cannot_be_started_is_one_error(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("maskopt.solvers.exact.workers.subprocess.Popen", refuse)
    with pytest.raises(SolverError, match="cannot be started: Cannot allocate memory"):
        list(run_tasks(die_on_seven, [3, 5], workers=2))


def test_no_task_is_begun_after_the_deadline(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", import_path(__file__))
    assert list(run_tasks(die_on_seven, [3, 7], workers=1, deadline=time.monotonic())) == []


def say_so_and_stay(task):
    os.write(2, b"at work")
    while True:
        time.sleep(task)


@pytest.mark.skipif(not hasattr(select, "poll"), reason="needs poll(), which Windows lacks")
@pytest.mark.parametrize(
    "begun",
    [
        "workers.run_tasks(say_so_and_stay, [1], workers=1)",
        "jobs.as_they_finish([joblib.delayed(say_so_and_stay)(1) for _ in range(2)], jobs=2)",
    ],
    ids=["workers", "jobs"],
)
def test_a_worker_ends_with_its_parent_however_that_ended(begun, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", import_path(__file__))
    code = (
        "import joblib; from maskopt import jobs; from maskopt.solvers.exact import workers\n"
        f"from test_scip import say_so_and_stay; list({begun})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    assert os.read(parent.stderr.fileno(), 7) == b"at work"
    parent.kill()
    parent.communicate(timeout=60)  # the worker holds it open as long as it lives


def test_what_cannot_be_pickled_is_an_error_and_no_hang():
    with pytest.raises((AttributeError, PicklingError, TypeError)):
        list(run_tasks(lambda task: task, [1], workers=1))


def test_ctrl_c_returns_the_incumbent():
    code = (
        "import torch, sys; sys.path[:0] = sys.argv[1].split(':')\n"
        "from test_scip import hard; from maskopt import solve, verify\n"
        "problem = hard(80)\n"
        "import threading, os, signal\n"
        "threading.Timer(4, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "solution = solve(problem, 'scip', formulation='epigraph', time_limit=100)\n"
        "verify(problem, solution); print(solution.trace.ended, solution.status)\n"
    )
    command = [sys.executable, "-c", code, import_path(__file__)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "('userinterrupt',)" in result.stdout, result.stdout + result.stderr
    assert "FEASIBLE" in result.stdout


def test_limits_beyond_those_of_scip_are_none():
    solution = solve(
        hard(12),
        "scip",
        time_limit=1e300,
        row_seconds=1e300,
        node_limit=10**20,
        memory_limit=10**40,
    )
    assert solution.status == (Status.OPTIMAL,)


def test_bad_options_are_named():
    problem = hard(8)
    with pytest.raises(OptionError, match="time_limit"):
        solve(problem, "scip", time_limit=-1)
    with pytest.raises(OptionError, match="gap_limit"):
        solve(problem, "scip", gap_limit=1.5)
    with pytest.raises(OptionError, match="formulation"):
        solve(problem, "scip", formulation="magic")
    with pytest.raises(OptionError, match="row_seconds"):
        solve(problem, "scip", row_seconds=-1.0)
    with pytest.raises(OptionError, match="node_limit"):
        Scip(node_limit=0)
    big = LayerProblem(np.ones((1, 600)), np.eye(600), Unstructured(0.5))
    with pytest.raises(SolverError, match="lower_bound"):
        solve(big, "scip")


def test_symmetric_and_separable_rows_are_presolved():
    diagonal = LayerProblem(
        random_weight(3, 30, 1), random_gram(30, "diagonal", 2), Unstructured(sparsity=0.5)
    )
    solution = solve(diagonal, "scip", workers=0)
    assert solution.trace.ended == ("presolved",) * 3
    assert set(solution.status) == {Status.OPTIMAL}
    assert torch.allclose(solution.objective, solve(diagonal, "wanda").objective)
    assert verify(diagonal, solution, require="checked").checked  # a certificate, not SCIP's word
    # ten copies of each of three inputs: without symmetry breaking a tree of 10!³ twins
    few = random_gram(3, "full", 5)
    copies = few.repeat_interleave(10, 0).repeat_interleave(10, 1)
    twins = LayerProblem(torch.ones(1, 30, dtype=torch.float64), copies, Unstructured(sparsity=0.5))
    solution = solve(twins, "scip", time_limit=60)
    assert solution.status == (Status.OPTIMAL,)
    counts = [(a, b, 15 - a - b) for a in range(11) for b in range(11) if 0 <= 15 - a - b <= 10]
    best = min(float(torch.tensor(k).double() @ few @ torch.tensor(k).double()) for k in counts)
    assert float(solution.objective[0]) == pytest.approx(best, rel=1e-6)


def test_qcr_starts_from_the_semidefinite_bound():
    problem = LayerProblem(
        random_weight(1, 30, 2), random_gram(30, "low-rank", 3), Unstructured(sparsity=0.6)
    )
    plain = solve(problem, "scip", formulation="factored", time_limit=60)
    convexified = solve(problem, "scip", time_limit=60)
    assert convexified.status == plain.status == (Status.OPTIMAL,)
    assert float(convexified.objective[0]) == pytest.approx(float(plain.objective[0]), rel=1e-6)
    certified = float(lower_bound(problem, "sdp").value[0])
    assert convexified.trace.root_bound[0] >= certified * (1 - 1e-9)
    assert 0 < certified <= float(plain.objective[0])


def test_the_bound_of_the_relaxation_is_checked_where_the_tree_had_no_time():
    """SCIP is trusted only for what SCIP itself added."""
    problem = hard(40)
    first = solve(problem, "scip", node_limit=1, presolve=False)
    assert first.trusted == (f"SCIP {pyscipopt.Model().version()}",)
    assert verify(problem, first).basis == (f"trusted: {first.trusted[0]}",)
    task = dataclasses.replace(row_task(problem), duals=(duals := qcr_duals(row_task(problem))))
    answer = RowAnswer(
        task.start, "timelimit", duals.certified, certificate=duals.certificate,
        certified=duals.certified,
    )  # fmt: skip
    solution = assemble(problem, [answer], "SCIP 10.0")
    assert solution.trusted == ("",)
    assert float(solution.lower_bound[0]) == pytest.approx(duals.certified, rel=1e-9)
    assert verify(problem, solution, require="checked").checked


def row_task(problem, row=0):
    start = ~solve(problem, "wanda").mask[row]
    return ScipTask(
        q=problem.row(row).q().numpy(),
        group=problem.group_size,
        pruned=problem.pruned_per_group,
        start=start.numpy(),
        formulation="qcr",
    )


def test_rows_that_rest_on_a_certificate_lie_beside_rows_that_do_not():
    problem = hard(24, rows=3)
    tasks = [row_task(problem, row) for row in range(3)]
    duals = qcr_duals(tasks[1])
    answers = [RowAnswer(task.start, "timelimit") for task in tasks]
    answers[1] = dataclasses.replace(
        answers[1], bound=duals.certified, certificate=duals.certificate, certified=duals.certified
    )
    answers[2] = dataclasses.replace(answers[2], bound=0.01 * tasks[2].cost(tasks[2].start))
    solution = assemble(problem, answers, "SCIP 10.0")
    assert solution.trusted == ("", "", "SCIP 10.0")
    assert solution.lower_bound[0] == 0
    assert verify(problem, solution).basis == ("checked", "checked", "trusted: SCIP 10.0")


def test_an_instance_of_another_kind_is_refused(tmp_path):
    row = hard(8).row(0)
    solver = Scip()
    assert isinstance(solver, WritesInstances)
    assert not isinstance(make_solver("wanda"), WritesInstances)
    for bad in ({"form": "txt"}, {"formulation": "qcr"}, {"form": "mps"}):
        with pytest.raises(OptionError):
            solver.write_instance(row, tmp_path / "row", **bad)
    assert list(tmp_path.iterdir()) == []
