"""A second exact opinion: Gurobi on the quadratic integer program itself. Optional (`pip install gurobipy`);
the licence that comes with the package serves rows of up to 200 inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from maskopt.core.problem import LayerProblem
from maskopt.errors import SolverError
from maskopt.protocol.solver import Capabilities, missing_package
from maskopt.solvers.exact.program import CLOSED, Program, perspective, quadratic
from maskopt.solvers.exact.rows import RowSolver, exact
from maskopt.solvers.exact.tasks import UPDATED_CLOSED, RowAnswer, RowTask, UpdatedTask

#: Gurobi's tolerance on p being whole (IntFeasTol), absolute
_INTEGRALITY = 1e-5
#: seeds that Gurobi takes
_SEEDS = 2_000_000_000


@dataclass(frozen=True)
class Gurobi(RowSolver):
    """min pᵀQp with p binary, for updated weights the perspective formulation. Reports a `Trace`."""

    name: ClassVar[str] = "gurobi"
    capabilities: ClassVar[Capabilities] = exact(
        trusted=("Gurobi",),
        largest_n=512,
        update=True,
        note="optional gurobipy; proves up to about 96 inputs, of updated weights 20",
    )

    @classmethod
    def unavailable(cls) -> str | None:
        if reason := missing_package("gurobipy"):
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
        """One row, one thread. SolverError where the row is too large for the licence, or Gurobi fails."""
        import gurobipy as gp

        if isinstance(task, UpdatedTask):
            program, closed = perspective(task, convex=True), UPDATED_CLOSED
        else:
            task = task.with_incumbent()
            program, closed = quadratic(task, task.unit_scale, []), CLOSED
        with gp.Env(params={"OutputFlag": 0}) as environment, gp.Model(env=environment) as model:
            try:
                return _solved(program, model, closed)
            except gp.GurobiError as error:
                if error.errno == gp.GRB.Error.SIZE_LIMIT_EXCEEDED:
                    raise SolverError(
                        f"gurobi: a row of {len(task.q)} inputs is beyond this licence; use 'branch' "
                        "or row.restrict(columns)"
                    ) from None
                raise SolverError(f"gurobi: {error}") from None


def _solved(program: Program, model: Any, closed: float) -> RowAnswer:
    task = program.task
    binaries = _translate(program, model)
    binaries.Start = program.complete(task.start)[: len(task.q)]
    ended = _ended(task, model, closed)
    pruned = program.pruned(binaries.X) if model.SolCount > 0 else task.start
    if isinstance(task, UpdatedTask):
        slack = _INTEGRALITY * program.terms / program.scale
    else:
        # a p_i off by the tolerance moves f by that part of its slope, 2(Qp)_i
        slack = _INTEGRALITY * 2 * float(np.abs(task.q).sum())
    return program.answer(pruned, ended, float(model.ObjBound), slack, int(model.NodeCount))


def _translate(program: Program, model: Any) -> Any:
    """Fill in a gurobipy.Model; its binaries."""
    from gurobipy import GRB

    n = len(program.binaries)
    kinds = [GRB.BINARY] * n + [GRB.CONTINUOUS] * (len(program.names) - n)
    x = model.addMVar(len(kinds), lb=program.low, ub=program.high, vtype=kinds)
    for variables, coefficients, low, high in program.rows:
        image = np.array(coefficients) @ x[variables]
        if low == high:
            model.addConstr(image == low)
        else:
            model.addConstr(image <= high if low == -np.inf else image >= low)
    for (i,), u, z in program.cones:
        model.addConstr(x[i] * x[i] <= x[u] * x[z])
    assert program.square is not None
    of, q = program.square
    model.setObjective(x[of] @ q @ x[of] + np.array(program.cost) @ x + program.constant)
    return x[:n]


def _ended(task: RowTask, model: Any, closed: float) -> str:
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
