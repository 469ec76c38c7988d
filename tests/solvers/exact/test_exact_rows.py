"""Exact backends: against enumeration, at every limit, in worker processes, and interrupted."""

import errno
import heapq
import itertools
import logging
import math
import os
import select
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pickle import PicklingError
from unittest.mock import Mock

import joblib
import numpy as np
import pytest
import torch
from commands import import_path, interrupt, shows
from forging import fails
from hypothesis import given, settings, strategies as st
from prunes import contents, slow
from strategies import HALF, KINDS, TWO_FOUR, drawn, floor, problems, refit_layer, verified
from tiny_models import tokens
from worker_tasks import die_on_seven, lie

import maskopt
from maskopt import NM, LayerProblem, Limits, Status, Unstructured, prune_model, solve, verify
from maskopt.core.clock import clock
from maskopt.errors import OptionError, SolverError, SolverUnavailableError
from maskopt.experiments.jobs import as_they_finish
from maskopt.models.evaluation.bound import bound_layers
from maskopt.models.options.prune import PruneOptions
from maskopt.models.pruning.prune_layer import solve_layer
from maskopt.protocol.solution import relative_gap
from maskopt.protocol.solver import available_solvers, is_trusted, make_solver
from maskopt.solvers.exact import exhaustive, gurobi, rows, tasks, workers
from maskopt.solvers.exact.rows import assemble, run_rows
from maskopt.solvers.exact.tasks import RowAnswer, RowTask
from maskopt.solvers.exact.tree import quadratic, search
from maskopt.solvers.exact.workers import WorkerCrash, run_tasks

NAMES = ("branch", "scip", "gurobi", "highs")
MODULES = {name: import_module(f"maskopt.solvers.exact.{name}") for name in NAMES}
SOLVERS = {name: getattr(module, name.title()) for name, module in MODULES.items()}
SIXTY, OPTIMAL = Unstructured(sparsity=0.6), {Status.OPTIMAL}
FEASIBLE, LATE = (Status.FEASIBLE,) * 3, ("timelimit",) * 3
#: solver and whether kept weights are updated, with the largest n and rows that are drawn, and the part of
#: its diagonal that an objective may be off
CASES = {
    ("branch", False): (10, 1, 1e-10), ("scip", False): (14, 1, 1e-10),
    ("highs", False): (12, 2, 1e-9), ("gurobi", False): (12, 2, 1e-9),
    ("branch", True): (10, 3, 1e-9), ("gurobi", True): (7, 2, 1e-9),
}  # fmt: skip
FIRST = ("full", "outliers")
PROCESSES = [("scip", False), ("branch", True), ("gurobi", True)]
PATTERNS = {12: (Unstructured(keep=5), TWO_FOUR, NM(keep=1, of=4))}
PATTERNS |= {16: (Unstructured(keep=8), NM(keep=4, of=8), Unstructured(0.25))}


@pytest.fixture(params=NAMES)
def name(request):
    return asked(request.param)


def asked(name):
    info = available_solvers()[name]
    if not info.available:
        pytest.skip(info.unavailable)
    return name


def layer(n=14, rows=3, kind="full", pattern=HALF, seed=1):
    return drawn(rows, n, kind, pattern, (seed, seed + 1))


HARD = layer(64, 1, pattern=SIXTY)


def tasks_of(problem):
    starts = (~solve(problem, "wanda").mask).numpy()
    size = {"group": problem.group_size, "pruned": problem.pruned_per_group, "limits": Limits()}
    return [RowTask(problem.row(i).q().numpy(), start=x, **size) for i, x in enumerate(starts)]


def test_a_bound_above_its_own_mask_is_not_believed(name, monkeypatch, caplog):
    search, part = SOLVERS[name].search_row, 0.01

    def lying(solver, task):
        """The backend's own search, with a bound above the cost of its own mask."""
        answer = search(solver, task)
        cost = task.cost(answer.pruned)
        return replace(answer, bound=cost + answer.slack + part * cost)

    monkeypatch.setattr(SOLVERS[name], "search_row", lying)
    with caplog.at_level(logging.WARNING, "maskopt.exact"):
        solution = solve(layer(), name, workers=0)
    assert (solution.status, solution.lower_bound.tolist()) == (FEASIBLE, [0.0] * 3)
    assert (solution.trusted, solution.trace.ended) == (("",) * 3, ("contradiction",) * 3)
    for row, message in enumerate(solution.trace.message):
        shows(message, f"row {row}", f"process {os.getpid()}")
        assert message in caplog.text
    verify(layer(), solution, require="checked")
    part = 1e-9  # within the tolerance of its backend it is cut to the mask
    solution = solve(layer(), name, workers=0)
    assert solution.status == (Status.OPTIMAL,) * 3
    assert torch.equal(solution.lower_bound, solution.objective)
    assert solution.trusted[0].rpartition(" ")[0] in available_solvers()[name].capabilities.trusted
    assert is_trusted(solution.trusted[0])


def test_wrong_roots_and_worse_masks_are_not_believed(monkeypatch):
    original = quadratic.bound_node

    def wrong(*args):
        value, point = original(*args)
        return 3 * value, point

    monkeypatch.setattr(quadratic, "bound_node", wrong)
    solution = solve(layer(), "branch", workers=0)
    assert (solution.status, solution.trace.ended) == (FEASIBLE, ("contradiction",) * 3)

    def worse(task):
        pruned = np.zeros(len(task.q), bool)
        pruned[np.argsort(-np.diagonal(task.q))[: task.pruned]] = True
        return RowAnswer(pruned, "timelimit")

    (task,) = tasks_of(layer(kind="diagonal", rows=1))
    (answer,) = run_rows(worse, [task], Limits(), workers=0)
    assert np.array_equal(answer.pruned, task.start)


@pytest.mark.slow
def test_the_process_that_contradicted_itself_is_named(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", import_path(__file__))
    problem = layer(8, rows=2)
    answers = run_rows(lie, tasks_of(problem), Limits(), workers=1)
    assert len({answer.pid for answer in answers}) == 1
    assert answers[0].pid != os.getpid()
    solution = assemble(problem, answers, "a liar")
    assert f"process {answers[0].pid}" in solution.trace.message[1]
    assert solution.lower_bound.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("n", "workers", "here"), [(8, None, 2), (40, None, 0), (8, 1, 0), (8, 0, 4), (40, 0, 4)]
)
def test_small_rows_begin_in_this_process(n, workers, here, monkeypatch):
    """Every look at the clock takes a second; three find a second row late."""
    handed, seconds = [], itertools.count()

    def run_tasks(answer, jobs, *, workers, deadline):
        handed.extend((task.limits.threads, workers, deadline) for _, task in jobs)
        return ((i, replace(answer(job), message="there")) for i, job in enumerate(jobs))

    monkeypatch.setattr(rows, "_IN_PROCESS_SECONDS", 5.0)
    monkeypatch.setattr(rows, "run_tasks", run_tasks)
    monkeypatch.setattr(rows, "clock", lambda: float(next(seconds)))
    limits, tasks = replace(Limits(threads=2), deadline=1e9), tasks_of(layer(n, 4))
    answers = run_rows(lambda task: RowAnswer(task.start, "optimal"), tasks, limits, workers)
    said = [(answer.ended, answer.message) for answer in answers]
    assert said == [("optimal", "")] * here + [("optimal", "there")] * (4 - here)
    assert handed == [(1, workers or 2, 1e9)] * (4 - here)


def test_no_time_at_all_leaves_the_start(name):
    problem = layer(n=30)
    for options in ({"time_limit": 0}, {"time_limit": 0, "workers": 1}, {"row_seconds": 0.0}):
        solution = solve(problem, name, **{"workers": 0, **options})
        assert torch.equal(solution.mask, solve(problem, "wanda").mask)
        found = solution.status, solution.trace.nodes.tolist(), solution.trace.ended
        assert found == (FEASIBLE, [0] * 3, LATE)
        verify(problem, solution, require="checked")


def delayed(still, owner, name, monkeypatch, by=1, before=lambda *_: None):
    """Every call takes so many seconds; returns the list of what `before` said of each."""
    original, calls = getattr(owner, name), []

    def slow(*args):
        calls.append(before(*args))
        answer = original(*args)
        still.now += by
        return answer

    monkeypatch.setattr(owner, name, slow)
    return calls


def test_rows_share_one_deadline(name, monkeypatch, still):
    left = lambda _, task: task.limits.left  # noqa: E731
    begun = delayed(still, SOLVERS[name], "search_row", monkeypatch, 10, left)
    problem = layer()
    solution = verified(problem, name, workers=0, time_limit=10)
    assert (begun, solution.status) == ([10], (Status.OPTIMAL, *FEASIBLE[1:]))
    assert solution.trace.nodes.tolist()[1:] == [0, 0]
    assert torch.equal(solution.mask[1:], solve(problem, "wanda").mask[1:])
    both = solve(problem, name, workers=0, time_limit=25, row_seconds=8)
    assert begun[1:] == [8, 8, 5]  # a row's own seconds, and what is left for all
    assert set(both.status) == {Status.OPTIMAL}


@pytest.mark.parametrize("solver", ["branch", "scip"])
def test_incumbents_and_duals_stop_at_the_deadline(solver, still, monkeypatch):
    with monkeypatch.context() as patched:
        calls = delayed(still, tasks, "_moves", patched)
        patched.setattr(MODULES[solver], "qcr_duals", None)  # must not be called any more
        solution = solve(layer(n=40, rows=2), solver, workers=0, time_limit=1)
    assert len(calls) == 1  # one piece of the first row's search, and nothing of the second
    assert (solution.trace.nodes.tolist(), solution.trace.ended) == ([0, 0], LATE[:2])
    # duals are the last thing where they take the time
    delayed(still, MODULES[solver], "qcr_duals", monkeypatch)
    problem = layer(n=30, rows=2)
    solution = solve(problem, solver, workers=0, time_limit=1)
    assert (solution.trace.nodes.tolist(), solution.trusted) == ([0, 0], ("", ""))
    # and what they prove is handed over with its certificate
    assert (solution.lower_bound > 0).tolist() == [True, False]
    verify(problem, solution, require="checked")


def test_trees_and_enumeration_stop_at_the_deadline(still, monkeypatch):
    nodes = delayed(still, quadratic.QuadraticTree, "branch", monkeypatch)
    solution = solve(HARD, "branch", time_limit=2)
    assert (len(nodes), solution.trace.ended) == (2, LATE[:1])
    assert 0 < float(solution.lower_bound[0]) <= float(solution.objective[0])
    monkeypatch.setattr(exhaustive, "_CHUNK", 10)
    problem = layer(n=8, rows=2)  # 70 masks
    solution = solve(problem, "exhaustive", time_limit=0)
    found = solution.trace.nodes.tolist(), solution.status, solution.trace.ended
    assert found == ([10, 0], FEASIBLE[:2], LATE[:2])
    verify(problem, solution, require="checked")
    whole = solve(problem, "exhaustive")
    assert whole.trace.nodes.tolist() == [70, 70]
    assert bool((whole.objective <= solution.objective).all())
    weight = problem.weight[:1] * torch.tensor([[1.0], [0.0]])  # positive bounds alone are trusted
    solution = solve(LayerProblem(weight, problem.gram, problem.pattern), "exhaustive")
    assert solution.trusted == (f"enumeration of maskopt {maskopt.__version__}", "")


def test_sizes_and_options_out_of_range_are_refused(name):
    most = make_solver(name).capabilities.largest_n
    problem = LayerProblem(torch.ones(1, most + 1), torch.eye(most + 1), Unstructured(0.5))
    fails(SolverError, f"at most {most}.*lower_bound", solve, problem, name)
    assert make_solver("exhaustive").capabilities.largest_n is None
    fails(SolverError, "masks, more than 3,000,000", solve, layer(n=60), "exhaustive")
    bad = {"gap_limit": 1, "node_limit": 0, "row_seconds": -1, "workers": -1}
    bad |= {"scip": {"formulation": "magic"}}.get(name, {})
    for option, value in bad.items():
        fails(OptionError, option, make_solver, name, **{option: value})
    fails(OptionError, "time_limit", solve, layer(), name, time_limit=-1.0)


# --- worker processes and interrupts
@pytest.mark.slow
def test_a_crash_costs_its_task_alone(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", import_path(__file__))
    found = dict(run_tasks(die_on_seven, [7, 3, 5, 6], workers=1, recycle=2))
    assert isinstance(found.pop(0), WorkerCrash)
    squares, (first, again, last) = zip(*(found[i] for i in (1, 2, 3)), strict=True)
    assert squares == (9, 25, 36)
    assert first == again != last
    assert list(run_tasks(die_on_seven, [3, 7], workers=1, deadline=clock())) == []
    calls = as_they_finish([joblib.delayed(die_on_seven)(task) for task in (7, 7)], jobs=2)
    fails(SolverError, r"worker process was killed.*`jobs` 1", list, calls)


def test_what_cannot_be_started_or_pickled_is_one_error_and_no_hang(monkeypatch, caplog):
    monkeypatch.setattr(workers, "_MAIN", "input()")
    no_pickle = AttributeError, PicklingError, TypeError
    fails(no_pickle, None, list, run_tasks(lambda task: task, [1], workers=1))
    refuse = Mock(side_effect=OSError(errno.ENOMEM, "Cannot allocate memory"))
    monkeypatch.setattr(workers.subprocess, "Popen", refuse)
    message = "cannot be started: Cannot allocate memory"
    fails(SolverError, message, list, run_tasks(die_on_seven, [3, 5], workers=2))
    died = [(0, WorkerCrash("the worker process died with exit status -9"))]
    monkeypatch.setattr(rows, "_as_they_finish", lambda *_: iter(died))
    assert solve(layer(8, 1), "scip").status == FEASIBLE[:1]
    assert "1 rows keep their start: the worker process died with exit status -9" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(select, "poll"), reason="needs poll(), which Windows lacks")
def test_workers_end_with_their_parent_however_that_ended(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", import_path(__file__))
    code = (
        "import joblib, threading; from worker_tasks import say_so_and_stay as stay\n"
        "from maskopt.experiments import jobs; from maskopt.solvers.exact import workers\n"
        "rows = lambda: list(workers.run_tasks(stay, [1], workers=1))\n"
        "threading.Thread(target=rows, daemon=True).start()\n"
        "list(jobs.as_they_finish([joblib.delayed(stay)(1) for _ in range(2)], jobs=2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    for _ in range(3):
        assert os.read(parent.stderr.fileno(), 7) == b"at work"
    parent.kill()
    parent.communicate(timeout=60)  # a worker holds it open as long as it lives


@pytest.mark.slow
def test_ctrl_c_returns_the_incumbent(tmp_path):
    layer(80, 1, pattern=SIXTY).save(tmp_path / "hard.npz")
    code = (
        "import os, signal, sys, threading; from maskopt import load_problem, solve, verify\n"
        "from maskopt.solvers.exact.scip import ScipModel; run = ScipModel.optimize\n"
        "def begun(*given):\n"
        "    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    return run(*given)\n"
        "ScipModel.optimize = begun; problem = load_problem(sys.argv[1])\n"
        "solution = solve(problem, 'scip', formulation='factored', time_limit=100)\n"
        "verify(problem, solution); print(solution.trace.ended, solution.status)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "hard.npz")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "('userinterrupt',)" in result.stdout, result.stdout + result.stderr
    assert "FEASIBLE" in result.stdout


@pytest.mark.parametrize("when", ["_start", "_send"])
def test_a_worker_that_an_interrupt_ends_has_not_crashed(when, monkeypatch):
    """It comes while the process is started, or before that can hand back anything."""
    monkeypatch.setattr(workers, "_MAIN", "import sys; sys.stdin.buffer.read(8)")
    crew = workers._Crew(abs, 512, math.inf)
    original = getattr(workers, when)

    def interrupted(*given):
        crew.stop.set()
        return original(*given)

    monkeypatch.setattr(workers, when, interrupted)
    assert crew.answer(7) is None


@pytest.mark.parametrize("where", ["a bound", "a node that was taken", "the duals"])
def test_the_incumbent_and_the_least_open_bound_are_returned(where, monkeypatch):
    if where == "a bound":
        interrupt(monkeypatch, quadratic, "bound_node", 9)
    elif where == "the duals":
        interrupt(monkeypatch, MODULES["branch"], "qcr_duals", 0)
    else:
        calls, take = itertools.count(), heapq.heappop

        def taken(nodes):
            node = take(nodes)
            if next(calls) == 9:
                nodes.clear()  # as if all others were being branched on, too
                raise KeyboardInterrupt
            return node

        monkeypatch.setattr(search.heapq, "heappop", taken)
    solution = solve(HARD, "branch")
    monkeypatch.undo()
    best = solve(HARD, "branch").objective
    assert (solution.trace.ended, solution.status) == (("userinterrupt",), (Status.FEASIBLE,))
    assert bool((solution.objective <= solve(HARD, "wanda").objective).all())
    if where == "the duals":
        assert solution.lower_bound.tolist() == [0.0]
    else:
        assert bool((solution.lower_bound > 0.8 * best).all())
        assert bool((solution.lower_bound < best * (1 - 1e-4)).all())  # nodes are still open
    verify(HARD, solution)


def test_what_goes_on_from_a_search_ends_with_it(monkeypatch):
    for goes_on in (
        lambda: solve(HARD, "swap", start="branch"),
        lambda: solve_layer(HARD, PruneOptions(HARD.pattern, "branch")),
        lambda: bound_layers([HARD], method="box", solver="branch"),
    ):
        with monkeypatch.context() as patched:
            interrupt(patched, quadratic, "bound_node", 9)
            fails(KeyboardInterrupt, None, goes_on)


@pytest.mark.slow
def test_a_prune_goes_on_after_the_layers_that_were_done(tmp_path, dense_folder, monkeypatch):
    how = {"sparsity": 0.9, "solver": "branch", "min_tokens": 1}
    how |= {"include": "self_attn.k_proj", "solver_options": {"workers": 0}}
    given, out = (dense_folder, tokens(6)), tmp_path / "out"
    prune_model(*given, output=tmp_path / "whole", **how)
    with monkeypatch.context() as patched:
        interrupt(patched, quadratic.QuadraticTree, "search", 20)  # in the second layer
        fails(KeyboardInterrupt, None, prune_model, *given, output=out, **how)
    prune_model(*given, output=out, resume=True, **how)
    assert contents(out) == contents(tmp_path / "whole")


# --- against enumeration, and at every limit


def case_id(case):
    return f"{case[0]}-{'refitted' if case[1] else 'kept'}"


@pytest.fixture(params=CASES, ids=case_id, scope="module")
def case(request):
    asked(request.param[0])
    return request.param


def slow_where(cases, late):
    """The cases, those in `late` for the slow tier alone."""
    return [slow(c) if late(c) else c for c in cases]


def options_of(case):
    """A search of updated weights by a general solver ends some time."""
    return {"workers": 0, **({"node_limit": 2000} if case[1] and case[0] != "branch" else {})}


@settings(max_examples=settings().max_examples // 2)  # 0.1 s each, of seven cases
@given(data=st.data())
def test_they_find_what_enumeration_finds(case, data):
    max_n, max_rows, off = CASES[case]
    problem = data.draw(problems(max_n=max_n, max_rows=max_rows))
    if case[1]:
        dampings = (0.001, 0.01, 0.3) if case[0] == "branch" else (0.01, 0.3)
        damping = data.draw(st.sampled_from(dampings))
        problem = problem.with_update(maskopt.LeastSquaresUpdate(damping))
    best = solve(problem, "exhaustive").objective
    found = solve(problem, case[0], **options_of(case))
    slack = 1e-6 * best + off * problem.diagonal_mass() + 1e-30
    assert bool(((found.objective - best).abs() <= slack).all())
    assert bool((found.lower_bound <= best + slack).all())
    checked = verify(problem, found).checked
    if case == ("branch", True):
        assert set(found.status) == OPTIMAL
        assert checked  # since so few masks are enumerated


def rows_of(case, kind):
    """Layers of every pattern and their starts; of kept weights, with rows of very different scales."""
    (name, refitted), update = case, maskopt.LeastSquaresUpdate(0.01) if case[1] else None
    if kind == "degenerate":
        ones, plain = torch.ones(2, 8, dtype=torch.float64), layer(8, 2, "full", HALF, 0)
        yield LayerProblem(0 * ones, plain.gram, HALF, update=update), None
        if name == "branch":
            yield LayerProblem(ones, 0 * plain.gram, HALF, update=update), None
        for keep in (0, 1, 5):
            yield refit_layer(Unstructured(keep=keep), n=5).with_update(update), None
    elif not refitted:
        for pattern in (Unstructured(keep=7), TWO_FOUR):
            problem = layer(16, 3, kind, pattern, 7 * KINDS.index(kind) + 1)
            spread = torch.randn(16, dtype=torch.float64).exp().square()
            scale = torch.stack([spread**0, spread, 1e-6 * spread])
            yield LayerProblem(problem.weight * scale, problem.gram, pattern), None
        for seed in range(4 if kind == "full" and name in ("gurobi", "highs") else 0):
            # the start costs 1e8 times the optimum, which is below tolerances in its units
            plain = drawn(1, 10, seeds=(seed, seed))
            large = torch.full((1, 10), 1e4).where(torch.arange(10) == 0, plain.weight)
            yield LayerProblem(large, plain.gram, HALF), "worst"
    else:
        damping, patterns = 0.1, (TWO_FOUR if kind == "duplicates" else HALF,)
        if name == "branch":
            damping = 0.03
            patterns = (TWO_FOUR if kind in ("full", "low-rank") else HALF, NM(keep=1, of=4))
        for pattern in patterns:
            linear = 3 if kind == "full" else None
            power = 0.5 if pattern == TWO_FOUR or kind == "zero-columns" else 0.0
            update = maskopt.LeastSquaresUpdate(damping, power)
            yield drawn(2, 12, kind, pattern, linear=linear, update=update), None


@pytest.mark.parametrize("kind", slow_where([*KINDS, "degenerate"], lambda k: k not in FIRST))
def test_rows_of_every_kind_are_proven(case, kind):
    for problem, start in rows_of(case, kind):
        best = solve(problem, "exhaustive")
        found = solve(problem, case[0], start=start, **options_of(case))
        off = floor(problem) if case[1] else 1e-10 * problem.diagonal_mass()
        slack = (1e-6 if case[1] else 2e-6) * best.objective + off
        if start is not None:
            slack = 1e-7 * best.objective
        assert bool(((found.objective - best.objective).abs() <= slack).all())
        assert bool((found.lower_bound <= best.objective + slack).all())
        # far below the mass of Q, SCIP's tolerances leave a relative gap: no OPTIMAL
        clear = torch.ones(problem.rows, dtype=torch.bool)
        if kind != "degenerate" and not case[1]:
            clear = best.objective > 1e-4 * problem.diagonal_mass()
        proven = torch.tensor([status == Status.OPTIMAL for status in found.status])
        assert bool((proven | ~clear).all())
        verify(problem, found)


BEYOND = [
    *(("scip", {}, layer(24, 1, kind, pattern, 3)) for pattern in (SIXTY, TWO_FOUR)
      for kind in ("full", "low-rank", "duplicates", "outliers")),
    *(("scip", {"presolve": False}, layer(22, 1, "full", pattern)) for pattern in (HALF, NM(1, 2))),
    *((name, {}, layer(20, 2, "low-rank", pattern, 2)) for pattern in (SIXTY, TWO_FOUR)
      for name in ("highs", "gurobi")),
    ("gurobi", {}, refit_layer(rows=1, n=22, damping=0.3)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "problem"), BEYOND, ids=str)
def test_they_agree_with_branch_where_enumeration_ends(name, options, problem):
    found, ours = solve(problem, asked(name), **options), solve(problem, "branch")
    assert set(found.status) == set(ours.status) == OPTIMAL
    torch.testing.assert_close(found.objective, ours.objective, rtol=2e-6, atol=1e-9)
    for solution in (found, ours):
        verify(problem, solution)


LIMITED = {
    ("branch", False): (HARD, 3, 0.5), ("scip", False): (layer(48, 1, pattern=SIXTY), 1, 0.9),
    ("highs", False): (layer(24, 1, "low-rank", SIXTY), None, 0.5),
    ("gurobi", False): (layer(24, 1, "low-rank", SIXTY), None, 0.5),
    ("branch", True): (refit_layer(rows=2, n=20, damping=0.03), 3, 0.6),
    ("gurobi", True): (refit_layer(rows=2, n=20, damping=0.3), 1, 0.6),
}  # fmt: skip


@pytest.mark.parametrize("case", slow_where(CASES, lambda c: c[1]), ids=case_id, indirect=True)
def test_limits_leave_an_incumbent_and_a_bound_that_holds(case):
    (name, refitted), (problem, nodes, gap) = case, LIMITED[case]
    limited = [(problem, {"limits": Limits(seconds=0)}), (problem, {"gap_limit": gap})]
    if nodes is not None:
        limited.append((problem, {"node_limit": nodes}))
    for pattern, part in () if refitted else ((TWO_FOUR, 0.02), (Unstructured(keep=6), 0.3)):
        limited.append((layer(16, 2, pattern=pattern, seed=2), {"gap_limit": part}))
    proven = {id(p): solve(p, "branch", workers=0).objective for p, _ in limited}
    for one, options in limited:
        best, off, (limit,) = proven[id(one)], floor(one), options
        found = solve(one, name, workers=0, **options)
        assert Status.FEASIBLE in found.status or limit == "gap_limit"
        most = best * (1 + (1e-9 if name == "branch" else 1e-6)) + off
        assert bool((found.lower_bound <= most).all())
        assert bool((found.objective >= best * (1 - 1e-6) - off).all())
        if not refitted:
            start = solve(one, "wanda")
            assert bool((found.objective <= start.objective).all())
            assert limit != "limits" or torch.equal(found.mask, start.mask)
        if limit == "limits":
            assert set(found.status) == {Status.FEASIBLE}
        elif one is problem and name in ("branch", "scip"):
            assert limit.replace("_", "") in found.trace.ended
        gap = relative_gap(found.objective, found.lower_bound)
        assert bool((gap <= options.get("gap_limit", 1.0) + 1e-9).all())
        verify(one, found)


@pytest.mark.parametrize("case", slow_where(PROCESSES, lambda c: c[1]), ids=case_id, indirect=True)
def test_workers_threads_and_a_row_alone_change_nothing(case):
    (name, update), seen = case, []
    problem = refit_layer(rows=3, n=8, damping=0.1) if update else layer(12, 3, pattern=TWO_FOUR)
    more = {"on_progress": lambda progress: seen.append((progress.done, progress.total))}
    two = 1 if update else 2
    found, *others = (solve(problem, name, workers=workers, **more) for workers in (0, two))
    if name == "branch":
        others.append(solve(problem, name, threads=2))
    for other in others:
        assert torch.equal(other.mask, found.mask)
        assert torch.equal(other.lower_bound, found.lower_bound)
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2
    for row in range(3):
        assert torch.equal(solve(problem.row(row), name, workers=0).mask[0], found.mask[row])


def test_missing_packages_and_licences_name_the_remedy(monkeypatch):
    gurobipy = pytest.importorskip("gurobipy")
    for more, reason in ((0, "beyond this licence; use 'branch'"), (1, "gurobi: ")):
        refused = gurobipy.GurobiError(gurobipy.GRB.Error.SIZE_LIMIT_EXCEEDED + more, "no")
        monkeypatch.setattr(gurobi, "_unchanged", Mock(side_effect=refused))
        fails(SolverError, reason, solve, layer(12), "gurobi", workers=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for solver, package in (("gurobi", "gurobipy"), ("highs", "highspy")):
        monkeypatch.setitem(sys.modules, package, None)
        reason = available_solvers()[solver].unavailable
        assert f"pip install {package}" in reason
        fails(SolverUnavailableError, package, make_solver, solver)


@pytest.mark.slow
@pytest.mark.parametrize("n", slow_where(PATTERNS, lambda n: n > 12))
@pytest.mark.parametrize("kind", slow_where(KINDS, lambda kind: kind not in FIRST))
def test_no_bound_passes_the_optimum_of_rows_of_very_different_scales(kind, n):
    for pattern in PATTERNS[n]:
        seed = 7 * KINDS.index(kind) + 1000 * n
        plain = drawn(36, n, kind, pattern, (seed + 1, seed))
        weight = plain.weight.clone()
        weight[0] = 0
        weight[10:] *= torch.randn(26, n, dtype=torch.float64).mul(2).exp()
        weight[20:30] *= 1e-6
        problem = LayerProblem(weight, plain.gram, pattern)
        exact = solve(problem, "exhaustive").objective
        crude = maskopt.lower_bound(problem, "sdp", sweeps=1, rank=2, seed=3)
        *bounds, sdp = (maskopt.lower_bound(problem, name) for name in ("box", "shift", "sdp"))
        for bound in (*bounds, sdp, crude):
            most = exact + 1e-13 * problem.diagonal_mass()
            assert bool(((bound.value >= 0) & (bound.value <= most)).all()), bound
        if kind in ("full", "diagonal"):  # and no idle zeros where the relaxation is any good
            assert float(sdp.value.sum()) >= 0.5 * float(exact.sum())
