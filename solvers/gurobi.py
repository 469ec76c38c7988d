"""A second exact opinion: Gurobi on the quadratic integer program itself.

Optional (`pip install gurobipy`); the licence that comes with the package serves rows of up to 200
inputs.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable

import numpy as np
from torch import Tensor

from maskopt.problem import LayerProblem
from maskopt.solution import Solution
from maskopt.solver import Capabilities
from maskopt.solvers.scip import assemble, check_limits, check_size, first_mask, run_rows
from maskopt.solvers.scip_model import RowAnswer, RowTask

#: n beyond which the branch and bound has no hope
LARGEST_N = 512
#: the start's objective in the units of the model, far above Gurobi's absolute tolerances
_SCALE = 1000.0


class GurobiSolver:
    """min pᵀQp with p binary, Q convex as it is; OPTIMAL only where Gurobi says so."""

    name = "gurobi"
    capabilities = Capabilities(
        devices=("cpu",), proves="optimality", largest_n=96, note="exact; optional gurobipy"
    )
    default_warm_start: str | None = "wanda"

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("gurobipy") is None:
            return "the package gurobipy is not installed; pip install 'maskopt[gurobi]'"
        import gurobipy

        try:
            gurobipy.Env(params={"OutputFlag": 0}).dispose()
        except gurobipy.GurobiError as error:
            return f"no valid Gurobi licence ({error})"
        return None

    def solve(
        self,
        problem: LayerProblem,
        *,
        warm_start: Tensor | None = None,
        time_limit: float | None = None,
        gap_limit: float = 0.0,
        node_limit: int | None = None,
        workers: int | None = None,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Solution:
        """Solve every row; limits are per row, as for `scip`."""
        check_limits(self.name, time_limit, gap_limit)
        check_size(self.name, problem, LARGEST_N)
        tasks = row_tasks(problem, warm_start, time_limit, gap_limit, node_limit, seed)
        if workers is None:
            workers = 0 if problem.rows == 1 else (os.cpu_count() or 1)
        return assemble(problem, run_rows(solve_row, tasks, workers, on_progress), self.name)


def row_tasks(
    problem: LayerProblem,
    warm_start: Tensor | None,
    time_limit: float | None,
    gap_limit: float,
    node_limit: int | None,
    seed: int,
) -> list[RowTask]:
    """What a process needs to solve each row."""
    start = warm_start if warm_start is not None else first_mask(problem)
    return [
        RowTask(
            q=problem.row(i).q().numpy(),
            group=problem.group_size,
            pruned=problem.pruned_per_group,
            start=(~start[i]).numpy(),
            time_limit=time_limit,
            node_limit=node_limit,
            gap_limit=gap_limit,
            seed=seed,
        )
        for i in range(problem.rows)
    ]


def unit_scale(task: RowTask) -> float:
    """The factor that brings the start's objective to _SCALE."""
    cost = float(task.start.astype(float) @ task.q @ task.start.astype(float))
    return _SCALE / (max(cost, 1e-10 * float(np.trace(task.q))) or 1.0)


def solve_row(task: RowTask) -> RowAnswer:
    """One row, one thread."""
    import gurobipy as gp
    from gurobipy import GRB

    began = time.perf_counter()
    start = np.asarray(task.start, dtype=bool)
    if task.time_limit is not None and task.time_limit <= 0:
        return RowAnswer(start, task.bound, "timelimit", message="no time given")
    scale = unit_scale(task)
    words = {
        GRB.OPTIMAL: "optimal",
        GRB.TIME_LIMIT: "timelimit",
        GRB.NODE_LIMIT: "nodelimit",
        GRB.INTERRUPTED: "userinterrupt",
    }
    with gp.Env(params={"OutputFlag": 0}) as environment, gp.Model(env=environment) as model:
        n = len(task.q)
        p = model.addMVar(n, vtype=GRB.BINARY)
        for first in range(0, n, task.group):
            model.addConstr(p[first : first + task.group].sum() == task.pruned)
        model.setObjective(p @ (task.q * scale) @ p)
        p.Start = start.astype(float)  # type: ignore[assignment, unused-ignore]
        model.Params.Threads = 1
        model.Params.Seed = task.seed % 2_000_000_000
        model.Params.MIPGap = task.gap_limit
        model.Params.MIPGapAbs = 0.0
        if task.time_limit is not None:
            model.Params.TimeLimit = task.time_limit
        if task.node_limit is not None:
            model.Params.NodeLimit = task.node_limit
        model.optimize()
        found = model.SolCount > 0
        status = words.get(model.Status, f"status {model.Status}")
        if status == "optimal" and model.MIPGap > 1e-9:
            status = "gaplimit"
        bound = float(model.ObjBound) / scale
        return RowAnswer(
            pruned=np.asarray(p.X) > 0.5 if found else start,
            bound=max(bound, 0.0) if np.isfinite(bound) else 0.0,
            status=status,
            nodes=int(model.NodeCount),
            seconds=time.perf_counter() - began,
        )
