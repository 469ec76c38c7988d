"""The quadratic integer program itself in Gurobi, a second exact opinion.

Optional (`pip install gurobipy`); the licence that comes with the package serves rows of up to 200 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from maskopt.core.problem import LayerProblem
from maskopt.errors import SolverError
from maskopt.protocol.solver import Capabilities
from maskopt.solvers.exact.rows import RowSolver, exact
from maskopt.solvers.exact.tasks import CLOSED, UPDATED_CLOSED, RowAnswer, RowTask, UpdatedTask

#: Gurobi's tolerance on p being whole (IntFeasTol), absolute
_INTEGRALITY = 1e-5
#: part by which v may pass its bounds: what they are computed with rounds, too
_WIDER = 1e-6
#: seeds that Gurobi takes
_SEEDS = 2_000_000_000


@dataclass(frozen=True)
class Gurobi(RowSolver):
    """Gurobi on min pᵀQp with p binary, for updated weights on the perspective formulation."""

    name: ClassVar[str] = "gurobi"
    package: ClassVar[str] = "gurobipy"
    capabilities: ClassVar[Capabilities] = exact(
        trusted=("Gurobi",),
        largest_n=512,
        update=True,
        note="optional gurobipy; proves up to about 96 inputs, of updated weights 20",
    )

    @classmethod
    def unavailable(cls) -> str | None:
        if reason := super().unavailable():
            return reason
        import gurobipy

        try:
            gurobipy.Env(params={"OutputFlag": 0}).dispose()
        except gurobipy.GurobiError as error:
            return f"no valid Gurobi licence ({error})"
        return None

    def trusted_name(self, problem: LayerProblem) -> str:
        import gurobipy

        return f"{self.capabilities.trusted[0]} {'.'.join(map(str, gurobipy.gurobi.version()))}"

    def search_row(self, task: RowTask) -> RowAnswer:
        """Search one row in one thread. SolverError: the licence takes no such row, or Gurobi fails."""
        import gurobipy as gp

        with gp.Env(params={"OutputFlag": 0}) as environment, gp.Model(env=environment) as model:
            try:
                if isinstance(task, UpdatedTask):
                    return task.decided or _updated(task, model)
                return _unchanged(task.with_incumbent(), model)
            except gp.GurobiError as error:
                if error.errno == gp.GRB.Error.SIZE_LIMIT_EXCEEDED:
                    raise SolverError(
                        f"gurobi: a row of {len(task.q)} inputs is beyond this licence; use 'branch' "
                        "or row.restrict(columns)"
                    ) from None
                raise SolverError(f"gurobi: {error}") from None


def _unchanged(task: RowTask, model: Any) -> RowAnswer:
    """Minimise pᵀQp itself."""
    p = _binaries(task, model, task.pruned)
    model.setObjective(p @ (task.q * task.unit_scale) @ p)
    p.Start = task.start.astype(float)
    ended = _ended(task, model, CLOSED)
    pruned = p.X > 0.5 if model.SolCount > 0 else task.start
    # a p_i off by the tolerance moves f by that part of its slope, 2(Qp)_i
    slack = _INTEGRALITY * 2 * float(np.abs(task.q).sum())
    return task.answer(pruned, ended, model.ObjBound / task.unit_scale, slack, int(model.NodeCount))


def _updated(task: UpdatedTask, model: Any) -> RowAnswer:
    """Minimise F of updated weights, in units in which the start costs a thousand, with v times √scale.

    With A = B + diag(d) and z the kept inputs, min vᵀBv + dᵀu − 2bᵀv + C with vⱼ² ≤ uⱼzⱼ and as many z at 1
    as are kept.
    """
    n, scale = len(task.target), task.unit_scale
    root = np.sqrt(scale)
    low, high = (root * side for side in _between(task))
    z = _binaries(task, model, task.group - task.pruned)
    v, u = model.addMVar(n, lb=low, ub=high), model.addMVar(n)
    model.addConstr(v <= high * z)
    model.addConstr(v >= low * z)
    for j in range(n):
        model.addConstr(v[j] * v[j] <= u[j] * z[j])
    linear = task.split @ u - 2 * root * task.target @ v
    model.setObjective(v @ (task.q - np.diag(task.split)) @ v + linear + scale * task.constant)
    z.Start = (~task.start).astype(float)
    ended = _ended(task, model, UPDATED_CLOSED)
    pruned = z.X <= 0.5 if model.SolCount > 0 else task.start
    slack = _INTEGRALITY * _reached(task, low, high) / scale
    return task.answer(pruned, ended, model.ObjBound / scale, slack, int(model.NodeCount))


def _binaries(task: RowTask, model: Any, count: int) -> Any:
    """Add a binary variable for each input, `count` of them 1 in every group."""
    from gurobipy import GRB

    x = model.addMVar(len(task.q), vtype=GRB.BINARY)
    for first in range(0, len(task.q), task.group):
        model.addConstr(x[first : first + task.group].sum() == count)
    return x


def _between(task: UpdatedTask) -> tuple[np.ndarray, np.ndarray]:
    """Return bounds of all v that are no worse than the start: |v − v*|ⱼ ≤ √((F − F*)(A⁻¹)ⱼⱼ), v* = A⁻¹b.

    The interval includes 0, the value of a pruned weight.
    """
    inverse = np.linalg.inv(task.q)
    dense = inverse @ task.target
    above = task.cost(task.start) - (task.constant - float(task.target @ dense))
    half = np.sqrt(np.maximum(above, 0.0) * np.diagonal(inverse))
    wider = _WIDER * (np.abs(dense) + half).max()
    return np.minimum(dense - half - wider, 0.0), np.maximum(dense + half + wider, 0.0)


def _reached(task: UpdatedTask, low: np.ndarray, high: np.ndarray) -> float:
    """Return the sum of the sizes that tolerances are parts of, with v between `low` and `high`.

    A z that is off by one pays for a vⱼ with ∂ⱼ²/dⱼ, ∂ being the slope without the part of d.
    """
    target = np.abs(task.target) * np.sqrt(task.unit_scale)
    reach = np.maximum(-low, high)
    slope = target + np.abs(task.q - np.diag(task.split)) @ reach
    return float(reach @ reach + target @ reach + (slope**2 / task.split).sum())


def _ended(task: RowTask, model: Any, closed: float) -> str:
    """Optimize under the task's limits, and return what ended it. A relative gap up to `closed` is none."""
    from gurobipy import GRB

    words = {
        GRB.OPTIMAL: "optimal",
        GRB.TIME_LIMIT: "timelimit",
        GRB.NODE_LIMIT: "nodelimit",
        GRB.INTERRUPTED: "userinterrupt",
    }
    model.Params.Threads = 1
    model.Params.Seed = task.limits.seed % _SEEDS
    model.Params.MIPGap = max(task.gap_limit, closed if closed > CLOSED else 0.0)
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
