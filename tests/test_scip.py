"""SCIP against enumeration, and what a limit, a crash or an interrupt leaves."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from strategies import problems, random_gram, random_weight

from maskopt import NM, LayerProblem, Status, Unstructured, solve, verify
from maskopt.errors import OptionError, SolverError
from maskopt.solvers.scip_model import FORMULATIONS
from maskopt.solvers.workers import WorkerCrash, run_tasks


@given(problems(max_n=10, max_rows=1))
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
        problem, "scip", workers=2, on_progress=lambda done, rows: seen.append((done, rows))
    )
    torch.testing.assert_close(solution.objective, solve(problem, "exhaustive").objective)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    verify(problem, solution)


def die_on_seven(task):
    if task == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return task * task


def test_a_crash_costs_its_task_alone(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    answers = dict(run_tasks(die_on_seven, [3, 7, 5, 6], workers=2, recycle=2))
    assert isinstance(answers.pop(1), WorkerCrash)
    assert answers == {0: 9, 2: 25, 3: 36}


def test_ctrl_c_returns_the_incumbent():
    code = (
        "import torch, sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_scip import hard; from maskopt import solve, verify\n"
        "problem = hard(80)\n"
        "import threading, os, signal\n"
        "threading.Timer(4, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "solution = solve(problem, 'scip', formulation='epigraph', time_limit=100)\n"
        "verify(problem, solution); print(solution.trace['status'], solution.status)\n"
    )
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "['userinterrupt']" in result.stdout, result.stdout + result.stderr
    assert "FEASIBLE" in result.stdout


def test_bad_options_are_named():
    problem = hard(8)
    with pytest.raises(OptionError, match="time_limit"):
        solve(problem, "scip", time_limit=-1)
    with pytest.raises(OptionError, match="gap_limit"):
        solve(problem, "scip", gap_limit=1.5)
    with pytest.raises(OptionError, match="formulation"):
        solve(problem, "scip", formulation="magic")
    big = LayerProblem(np.ones((1, 600)), np.eye(600), Unstructured(0.5))
    with pytest.raises(SolverError, match="lower_bound"):
        solve(big, "scip")
