"""Exact integer programming with SCIP (PySCIPOpt)."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskopt.bounds import lower_bound
from maskopt.errors import OptionError, SolverError
from maskopt.problem import LayerProblem, RowProblem
from maskopt.solution import OPTIMAL_TOLERANCE, Solution, Status
from maskopt.solver import Capabilities
from maskopt.solvers.exact.incumbent import tabu_row
from maskopt.solvers.exact.scip_model import (
    FORMULATIONS,
    RowAnswer,
    RowTask,
    presolve,
    solve_row,
    write_row,
)
from maskopt.solvers.exact.workers import WorkerCrash, run_tasks

#: n above which the model itself takes minutes to build
LARGEST_N = 512


class ScipSolver:
    """SCIP on one row at a time, in this process for one row, in worker processes for more.

    A row is OPTIMAL only where SCIP says `optimal` and its bound closes the gap. Any limit gives
    SCIP's incumbent and SCIP's bound. `trace` holds per row SCIP's status, nodes, root bound,
    seconds and, for a crash, its message.
    """

    name = "scip"
    capabilities = Capabilities(
        devices=("cpu",),
        proves="optimality",
        largest_n=128,
        note="exact; a few hundred inputs with a gap",
    )
    default_warm_start: str | None = "wanda"

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("pyscipopt") is None:
            return "the package pyscipopt is not installed; pip install pyscipopt"
        return None

    def solve(
        self,
        problem: LayerProblem,
        *,
        warm_start: Tensor | None = None,
        formulation: str = "qcr",
        time_limit: float | None = None,
        gap_limit: float = 0.0,
        node_limit: int | None = None,
        memory_limit: int | None = None,
        workers: int | None = None,
        seed: int = 0,
        verbose: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Solution:
        """Solve every row.

        Args:
            formulation: `qcr` (the duals of the `sdp` bound convexify the objective, and the bound
                is handed in), `factored`, `linear` or `epigraph`.
            time_limit: seconds a row, the bound of `qcr` included.
            gap_limit: stop where SCIP's relative gap falls to this.
            node_limit: branch-and-bound nodes a row.
            memory_limit: bytes a row that SCIP may use.
            workers: processes; None: none for one row, else one a core; 0: this process.
            seed: SCIP's random seed shift.
            verbose: let SCIP print (to stderr from a worker).
            on_progress: called with (finished rows, rows).

        Ctrl-C ends the search: rows being solved return their incumbents, the rest their starts.
        """
        check_limits(self.name, time_limit, gap_limit)
        check_size(self.name, problem, LARGEST_N)
        if formulation not in FORMULATIONS:
            raise OptionError(f"scip: formulation must be one of {', '.join(FORMULATIONS)}")
        start = warm_start if warm_start is not None else first_mask(problem)
        tasks = [
            presolve(
                RowTask(
                    q=(q := problem.row(i).q().numpy()),
                    group=problem.group_size,
                    pruned=problem.pruned_per_group,
                    start=_searched(q, (~start[i]).numpy(), problem.group_size, time_limit, seed),
                    formulation=formulation,
                    time_limit=time_limit,
                    node_limit=node_limit,
                    gap_limit=gap_limit,
                    memory_limit=memory_limit,
                    seed=seed,
                    verbose=verbose,
                )
            )
            for i in range(problem.rows)
        ]
        if formulation == "qcr":
            _convexify(problem, tasks, time_limit, seed)
        if workers is None:
            workers = 0 if problem.rows == 1 else (os.cpu_count() or 1)
        answers = run_rows(solve_row, tasks, workers, on_progress)
        return assemble(problem, answers, self.name)

    def extract(
        self,
        row: RowProblem,
        path: str | os.PathLike[str],
        *,
        form: str = "cip",
        formulation: str = "factored",
    ) -> None:
        """Write a row as an integer program that other solvers read: `cip`, `lp` or `mps`."""
        if formulation not in FORMULATIONS or formulation == "qcr":
            raise OptionError("extract: formulation must be factored, linear or epigraph")
        if form == "mps" and formulation != "linear":
            raise OptionError("mps holds no quadratic constraint here: pass formulation linear")
        layer = row.as_layer()
        check_size(self.name, layer, LARGEST_N)
        task = RowTask(
            q=row.q().cpu().numpy(),
            group=layer.group_size,
            pruned=layer.pruned_per_group,
            start=(~first_mask(layer)[0]).cpu().numpy(),
            formulation=formulation,
        )
        target = Path(path)
        with tempfile.TemporaryDirectory(dir=target.absolute().parent) as folder:
            whole = Path(folder) / f"row.{form}"
            write_row(task, str(whole))
            os.replace(whole, target)


def _searched(
    q: np.ndarray, start: np.ndarray, group: int, time_limit: float | None, seed: int
) -> np.ndarray:
    """The start after tabu search, which SCIP's own heuristics hardly ever improve on."""
    if time_limit == 0:
        return start
    return tabu_row(q, start, group, moves=50 * len(q) + 500, seed=seed)


def _convexify(
    problem: LayerProblem, tasks: list[RowTask], time_limit: float | None, seed: int
) -> None:
    """Hand each task the duals and the value of its semidefinite bound."""
    if time_limit == 0:
        return
    began = time.perf_counter()
    share = None if time_limit is None else 0.5 * time_limit * len(tasks)
    bound = lower_bound(problem, "sdp", tolerance=1e-3, seed=seed, time_limit=share)
    spent = (time.perf_counter() - began) / len(tasks)
    for row, task in enumerate(tasks):
        task.diagonal = bound.certificate.diagonal[row].numpy()
        task.penalty = bound.certificate.penalty[row].numpy()
        task.bound = float(bound.value[row])
        if time_limit is not None:
            task.time_limit = max(time_limit - spent, 0.0)


def run_rows(
    function: Callable[[RowTask], RowAnswer],
    tasks: list[RowTask],
    workers: int,
    on_progress: Callable[[int, int], None] | None,
) -> list[RowAnswer]:
    """Answers in the order of the tasks; a crash or an interrupt leaves a row with its start."""
    answers = [RowAnswer(task.start, task.bound, "interrupted") for task in tasks]
    finished = 0
    results: Iterable[tuple[int, Any]]
    if workers:
        results = run_tasks(function, tasks, workers=workers)
    else:
        results = ((i, function(task)) for i, task in enumerate(tasks))
    try:
        for index, answer in results:
            if isinstance(answer, WorkerCrash):
                task = tasks[index]
                answer = RowAnswer(task.start, task.bound, "crashed", message=str(answer))
            answers[index] = answer
            finished += 1
            if on_progress is not None:
                on_progress(finished, len(tasks))
            if answer.status == "userinterrupt" and not workers:
                break
    except KeyboardInterrupt:
        if not finished and not workers:
            raise
    return answers


def assemble(problem: LayerProblem, answers: list[RowAnswer], solver: str) -> Solution:
    """The Solution: statuses never better than the backend's, bounds never above the objective."""
    mask = torch.from_numpy(~np.stack([a.pruned for a in answers]))
    objective = problem.objective(mask)
    # a backend's feasibility tolerance can push its bound above the mask's true objective
    bound = torch.tensor([a.bound for a in answers], dtype=torch.float64)
    bound = bound.clamp(min=0.0).minimum(objective)
    floor = 1e-13 * problem.diagonal_mass()
    closed = objective - bound <= OPTIMAL_TOLERANCE * objective + floor
    status = [
        Status.OPTIMAL
        if bool(closed[i]) and a.status in ("optimal", "presolved")
        else Status.FEASIBLE
        for i, a in enumerate(answers)
    ]
    trace = {
        "proof": f"{solver}: {{"
        + ", ".join(sorted({a.status for a in answers}))
        + "}, bound as proven by the backend within its feasibility tolerance",
        "status": [a.status for a in answers],
        "nodes": [a.nodes for a in answers],
        "root_bound": [a.root_bound for a in answers],
        "seconds": [a.seconds for a in answers],
        "message": [a.message for a in answers],
        "extra": [a.extra for a in answers],
    }
    return Solution.of(problem, mask, solver=solver, status=status, lower_bound=bound, trace=trace)


def first_mask(problem: LayerProblem) -> Tensor:
    """The first legal mask, for the caller that hands over none."""
    mask = torch.ones(problem.rows, problem.n // problem.group_size, problem.group_size).bool()
    mask[..., : problem.pruned_per_group] = False
    return mask.view(problem.rows, problem.n)


def check_limits(solver: str, time_limit: float | None, gap_limit: float) -> None:
    if time_limit is not None and not time_limit >= 0:
        raise OptionError(f"{solver}: time_limit must be at least 0 seconds, not {time_limit}")
    if not 0 <= gap_limit < 1:
        raise OptionError(f"{solver}: gap_limit must lie in [0, 1), not {gap_limit}")


def check_size(solver: str, problem: LayerProblem, largest: int) -> None:
    if problem.n > largest:
        raise SolverError(
            f"{solver}: a row of {problem.n} inputs is beyond exact solving (at most {largest}); "
            "use maskopt.lower_bound for a certified gap, or row.restrict(columns)"
        )
