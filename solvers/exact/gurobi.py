"""A second exact opinion: Gurobi on the quadratic integer program itself.

Optional (`pip install gurobipy`); the licence that comes with the package serves rows of up to 200
inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.errors import SolverError
from maskopt.protocol.registry import missing_package
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities
from maskopt.solvers.exact.incumbent import with_incumbent
from maskopt.solvers.exact.refit_rows import (
    REFIT_CLOSED,
    RefitTask,
    between,
    reached,
    solve_refitted,
)
from maskopt.solvers.exact.rows import RowAnswer, RowSolver, RowTask

#: Gurobi's tolerance on p being whole (IntFeasTol), absolute
_INTEGRALITY = 1e-5
#: relative gap up to which Gurobi's `optimal` is one, and not the gap limit that was reached
_CLOSED = 1e-9
#: seeds that Gurobi takes
_SEEDS = 2_000_000_000


@dataclass(frozen=True)
class Gurobi(RowSolver):
    """min pᵀQp with p binary, Q convex as it is; of refitted weights the perspective formulation. OPTIMAL
    only where Gurobi says so. Reports a `Trace`.
    """

    name: ClassVar[str] = "gurobi"
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=("cpu",),
        start="needed",
        default_start="wanda",
        proves="optimality",
        trusted=("Gurobi",),
        largest_n=512,
        refit=True,
        note="optional gurobipy; proves up to about 96 inputs, of refitted weights 20",
    )

    @classmethod
    def unavailable(cls) -> str | None:
        """See `Solver.unavailable`."""
        if reason := missing_package("gurobipy", "'maskopt[gurobi]'"):
            return reason
        import gurobipy

        try:
            gurobipy.Env(params={"OutputFlag": 0}).dispose()
        except gurobipy.GurobiError as error:
            return f"no valid Gurobi licence ({error})"
        return None

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        """See `Solver.run`."""
        import gurobipy

        assert start is not None
        word = f"{self.capabilities.trusted[0]} {'.'.join(map(str, gurobipy.gurobi.version()))}"
        if problem.refit is not None:
            return solve_refitted(self, problem, start, limits, search_refitted, word)
        return self.solve_rows(problem, start, limits, search_row, word)


def search_row(task: RowTask) -> RowAnswer:
    """One row, one thread. From a good start: tolerances are absolute, and the start's cost the unit.

    Raises:
        SolverError: the row is too large for the licence, or Gurobi fails.
    """
    return _with_model(_optimized, with_incumbent(task))


def search_refitted(task: RefitTask) -> RowAnswer:
    """One row of refitted weights, one thread; raises as `search_row`."""
    return task.decided or _with_model(_optimized_refitted, task)


def _with_model(optimized: Callable[..., RowAnswer], task: RowTask) -> RowAnswer:
    import gurobipy as gp

    with gp.Env(params={"OutputFlag": 0}) as environment, gp.Model(env=environment) as model:
        try:
            return optimized(task, model)
        except gp.GurobiError as error:
            if error.errno == gp.GRB.Error.SIZE_LIMIT_EXCEEDED:
                raise SolverError(
                    f"gurobi: a row of {len(task.q)} inputs is beyond this licence; use 'branch' "
                    "or row.restrict(columns)"
                ) from None
            raise SolverError(f"gurobi: {error}") from None


def _optimized(task: RowTask, model):  # type: ignore[no-untyped-def]  # gurobipy is optional
    from gurobipy import GRB

    scale = task.unit_scale
    p = model.addMVar(len(task.q), vtype=GRB.BINARY)
    for first in range(0, len(task.q), task.group):
        model.addConstr(p[first : first + task.group].sum() == task.pruned)
    model.setObjective(p @ (task.q * scale) @ p)
    p.Start = task.start.astype(float)
    ended = _ended(task, model, _CLOSED)
    pruned = np.asarray(p.X) > 0.5 if model.SolCount > 0 else task.start
    bound = float(model.ObjBound) / scale
    # a p_i off by the tolerance moves f by that part of its slope, 2(Qp)_i
    slack = _INTEGRALITY * 2 * float(np.abs(task.q).sum())
    return RowAnswer(
        pruned=pruned if task.is_legal(pruned) else task.start,
        ended=ended,
        bound=task.raised(bound, slack) if np.isfinite(bound) else 0.0,
        slack=slack,
        nodes=int(model.NodeCount),
    )


def _optimized_refitted(task: RefitTask, model):  # type: ignore[no-untyped-def]  # gurobipy is optional
    from gurobipy import GRB

    n, scale = len(task.target), task.unit_scale
    low, high = between(task)
    low, high = np.sqrt(scale) * low, np.sqrt(scale) * high
    target = np.sqrt(scale) * task.target
    z = model.addMVar(n, vtype=GRB.BINARY)
    v, u = model.addMVar(n, lb=low, ub=high), model.addMVar(n, lb=0.0)
    for first in range(0, n, task.group):
        model.addConstr(z[first : first + task.group].sum() == task.group - task.pruned)
    model.addConstr(v <= high * z)
    model.addConstr(v >= low * z)
    for j in range(n):
        model.addConstr(v[j] * v[j] <= u[j] * z[j])
    rest = task.q - np.diag(task.split)
    model.setObjective(v @ rest @ v + task.split @ u - 2 * target @ v + scale * task.constant)
    z.Start = (~task.start).astype(float)
    ended = _ended(task, model, REFIT_CLOSED)
    pruned = np.asarray(z.X) < 0.5 if model.SolCount > 0 else task.start
    bound = float(model.ObjBound) / scale
    return RowAnswer(
        pruned=pruned if task.is_legal(pruned) else task.start,
        ended=ended,
        bound=max(task.certified, bound if np.isfinite(bound) else 0.0),
        slack=_INTEGRALITY * reached(task, low, high) / scale,
        nodes=int(model.NodeCount),
    )


def _ended(task: RowTask, model, closed: float) -> str:  # type: ignore[no-untyped-def]
    """Optimize under the task's limits; what ended it. A relative gap up to `closed` is none."""
    from gurobipy import GRB

    words = {
        GRB.OPTIMAL: "optimal",
        GRB.TIME_LIMIT: "timelimit",
        GRB.NODE_LIMIT: "nodelimit",
        GRB.INTERRUPTED: "userinterrupt",
    }
    model.Params.Threads = 1
    model.Params.Seed = task.limits.seed % _SEEDS
    model.Params.MIPGap = max(task.gap_limit, closed if closed > _CLOSED else 0.0)
    model.Params.MIPGapAbs = 0.0
    if task.limits.timed:
        model.Params.TimeLimit = task.limits.left
    if task.node_limit is not None:
        model.Params.NodeLimit = task.node_limit
    model.optimize()
    if model.Status == GRB.SUBOPTIMAL:
        # of some node its tolerances were missed: again, with more care
        model.reset()
        model.Params.NumericFocus = 3
        if task.limits.timed:
            model.Params.TimeLimit = task.limits.left
        model.optimize()
    ended = words.get(model.Status, f"status {model.Status}")
    return "gaplimit" if ended == "optimal" and model.MIPGap > closed else ended
