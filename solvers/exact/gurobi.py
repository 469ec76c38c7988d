"""A second exact opinion: Gurobi on the quadratic integer program itself.

Optional (`pip install gurobipy`); the licence that comes with the package serves rows of up to 200
inputs.
"""

from __future__ import annotations

import importlib.util
import time

import numpy as np

from maskopt.solver import Capabilities
from maskopt.solvers.exact.rowwise import RowwiseExact, unit_scale
from maskopt.solvers.exact.scip_model import RowAnswer, RowTask

#: n beyond which the branch and bound has no hope
LARGEST_N = 512


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


class GurobiSolver(RowwiseExact):
    """min pᵀQp with p binary, Q convex as it is; OPTIMAL only where Gurobi says so."""

    name = "gurobi"
    capabilities = Capabilities(
        devices=("cpu",), proves="optimality", largest_n=96, note="exact; optional gurobipy"
    )
    largest_n = LARGEST_N
    solve_row = staticmethod(solve_row)

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("gurobipy") is None:
            return "the package gurobipy is not installed; pip install 'maskopt[gurobi]'"
        import gurobipy

        try:
            gurobipy.Env(params={"OutputFlag": 0}).dispose()
        except gurobipy.GurobiError as error:
            return f"no valid Gurobi licence ({error})"
        return None
