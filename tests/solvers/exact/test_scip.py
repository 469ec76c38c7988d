"""SCIP's formulations and certificates, and what a crash or an interrupt of a worker leaves."""

import errno
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pickle import PicklingError

import joblib
import pyscipopt
import pytest
import torch
from commands import import_path
from strategies import random_gram, random_weight

from maskopt import NM, LayerProblem, Status, Unstructured, lower_bound, solve, verify
from maskopt.errors import OptionError, SolverError
from maskopt.jobs import as_they_finish
from maskopt.solver import WritesInstances, make_solver
from maskopt.solvers import Scip
from maskopt.solvers.exact.duals import qcr_duals
from maskopt.solvers.exact.rows import RowAnswer, assemble
from maskopt.solvers.exact.scip_model import FORMULATIONS, ScipTask
from maskopt.solvers.exact.workers import WorkerCrash, run_tasks

HALF, SIXTY = Unstructured(sparsity=0.5), Unstructured(sparsity=0.6)


@pytest.fixture
def importable(monkeypatch):
    """Worker processes import what is defined here."""
    monkeypatch.setenv("PYTHONPATH", import_path(__file__))


def hard(n=60, rows=1):
    return LayerProblem(random_weight(rows, n, 1), random_gram(n, "full", 2), SIXTY)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("pattern", [HALF, NM(keep=2, of=4)], ids=str)
def test_every_formulation_proves_the_same_optimum(formulation, pattern):
    for kind in ("full", "low-rank", "duplicates"):
        problem = LayerProblem(random_weight(1, 12, 4), random_gram(12, kind, 3), pattern)
        solution = solve(problem, "scip", formulation=formulation, workers=0)
        exact = solve(problem, "exhaustive").objective
        torch.testing.assert_close(solution.objective, exact, rtol=1e-6, atol=1e-12)
        assert solution.status == (Status.OPTIMAL,)
        verify(problem, solution)


def test_limits_beyond_those_of_scip_are_none():
    limits = {"time_limit": 1e300, "row_seconds": 1e300, "node_limit": 10**20}
    assert solve(hard(12), "scip", memory_limit=10**40, **limits).status == (Status.OPTIMAL,)


# worker processes


def die_on_seven(task):
    if task == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return task * task


@pytest.mark.usefixtures("importable")
def test_a_crash_costs_its_task_alone():
    answers = dict(run_tasks(die_on_seven, [3, 7, 5, 6], workers=2, recycle=2))
    assert isinstance(answers.pop(1), WorkerCrash)
    assert answers == {0: 9, 2: 25, 3: 36}
    # and no task is begun after the deadline
    assert list(run_tasks(die_on_seven, [3, 7], workers=1, deadline=time.monotonic())) == []


def test_rows_whose_process_died_keep_their_start_and_that_is_said(monkeypatch, caplog):
    died = [(0, WorkerCrash("the worker process died with exit status -9"))]
    monkeypatch.setattr("maskopt.solvers.exact.rows._as_they_finish", lambda *_: iter(died))
    problem = LayerProblem(random_weight(1, 8, 1), random_gram(8, "low-rank", 2), HALF)
    assert solve(problem, "scip").status == (Status.FEASIBLE,)
    assert "1 rows keep their start: the worker process died with exit status -9" in caplog.text


@pytest.mark.usefixtures("importable")
def test_a_killed_job_is_one_error():
    calls = [joblib.delayed(die_on_seven)(task) for task in (7, 7)]
    with pytest.raises(SolverError, match=r"worker process was killed.*`jobs` 1"):
        list(as_they_finish(calls, jobs=2))


def test_what_cannot_be_started_or_pickled_is_one_error_and_no_hang(monkeypatch):
    with pytest.raises((AttributeError, PicklingError, TypeError)):
        list(run_tasks(lambda task: task, [1], workers=1))

    def refuse(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("maskopt.solvers.exact.workers.subprocess.Popen", refuse)
    with pytest.raises(SolverError, match="cannot be started: Cannot allocate memory"):
        list(run_tasks(die_on_seven, [3, 5], workers=2))


def say_so_and_stay(task):
    os.write(2, b"at work")
    while True:
        time.sleep(task)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(select, "poll"), reason="needs poll(), which Windows lacks")
@pytest.mark.parametrize(
    "begun",
    [
        "workers.run_tasks(say_so_and_stay, [1], workers=1)",
        "jobs.as_they_finish([joblib.delayed(say_so_and_stay)(1) for _ in range(2)], jobs=2)",
    ],
    ids=["workers", "jobs"],
)
@pytest.mark.usefixtures("importable")
def test_a_worker_ends_with_its_parent_however_that_ended(begun):
    code = (
        "import joblib; from maskopt import jobs; from maskopt.solvers.exact import workers\n"
        f"from test_scip import say_so_and_stay; list({begun})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    assert os.read(parent.stderr.fileno(), 7) == b"at work"
    parent.kill()
    parent.communicate(timeout=60)  # the worker holds it open as long as it lives


@pytest.mark.slow
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


# presolve and certificates


def test_symmetric_and_separable_rows_are_presolved():
    diagonal = LayerProblem(random_weight(3, 30, 1), random_gram(30, "diagonal", 2), HALF)
    solution = solve(diagonal, "scip", workers=0)
    assert solution.trace.ended == ("presolved",) * 3
    assert set(solution.status) == {Status.OPTIMAL}
    assert torch.allclose(solution.objective, solve(diagonal, "wanda").objective)
    assert verify(
        diagonal, solution, require="checked"
    ).checked  # a certificate, SCIP is not trusted
    # ten copies of each of three inputs: without symmetry breaking a tree of 10!³ twins
    few = random_gram(3, "full", 5)
    copies = few.repeat_interleave(10, 0).repeat_interleave(10, 1)
    twins = LayerProblem(torch.ones(1, 30, dtype=torch.float64), copies, HALF)
    solution = solve(twins, "scip")
    assert solution.status == (Status.OPTIMAL,)
    counts = [(a, b, 15 - a - b) for a in range(11) for b in range(11) if 0 <= 15 - a - b <= 10]
    best = min(float(torch.tensor(k).double() @ few @ torch.tensor(k).double()) for k in counts)
    assert float(solution.objective[0]) == pytest.approx(best, rel=1e-6)


def test_qcr_starts_from_the_semidefinite_bound():
    problem = LayerProblem(random_weight(1, 30, 2), random_gram(30, "low-rank", 3), SIXTY)
    plain = solve(problem, "scip", formulation="factored")
    convexified = solve(problem, "scip")
    assert convexified.status == plain.status == (Status.OPTIMAL,)
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
    starts, tasks, answers = (~solve(problem, "wanda").mask).numpy(), [], []
    for row, start in enumerate(starts):
        q, group = problem.row(row).q().numpy(), problem.group_size
        pruned = problem.pruned_per_group
        tasks.append(ScipTask(q=q, group=group, pruned=pruned, start=start, formulation="qcr"))
        answers.append(RowAnswer(start, "timelimit"))
    duals = qcr_duals(tasks[1])
    own = {"certificate": duals.certificate, "certified": duals.certified}
    answers[1] = replace(answers[1], bound=duals.certified, **own)
    answers[2] = replace(answers[2], bound=0.01 * tasks[2].cost(tasks[2].start))
    solution = assemble(problem, answers, "SCIP 10.0")
    assert solution.trusted == ("", "", "SCIP 10.0")
    assert solution.lower_bound[0] == 0
    assert float(solution.lower_bound[1]) == pytest.approx(duals.certified, rel=1e-9)
    assert verify(problem, solution).basis == ("checked", "checked", "trusted: SCIP 10.0")


def test_an_instance_of_another_kind_is_refused(tmp_path):
    row, solver = hard(8).row(0), Scip()
    assert isinstance(solver, WritesInstances)
    assert not isinstance(make_solver("wanda"), WritesInstances)
    for bad in ({"form": "txt"}, {"formulation": "qcr"}, {"form": "mps"}):
        with pytest.raises(OptionError):
            solver.write_instance(row, tmp_path / "row", **bad)
    assert list(tmp_path.iterdir()) == []
