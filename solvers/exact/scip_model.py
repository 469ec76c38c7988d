"""A program in SCIP: its model, its limits, its solutions."""

from __future__ import annotations

from typing import Any

import numpy as np

from maskopt.solvers.exact.program import ABOVE, Program

#: SCIP's infinity is 1e20; before the root is solved its bounds are that
_INFINITE = 1e19
#: the greatest limits that SCIP takes
_MOST_SECONDS, _MOST_NODES, _MOST_MEMORY = 1e20, 2**63 - 1, 2**43 - 1


class ScipModel:
    """A program in SCIP: the pyscipopt.Model, its variables `x`, and masks that `rounding` came to (`found`).
    A quadratic objective becomes a constraint, as SCIP's own is linear."""

    def __init__(self, program: Program, *, verbose: bool = False) -> None:
        from pyscipopt import Model, quicksum

        self.program = program
        self.found: list[np.ndarray] = []
        self.model = model = Model("maskopt")
        model.hideOutput(not verbose)
        binaries = len(program.binaries)
        self.x = x = [
            model.addVar(
                name, "B" if k < binaries else "C", lb=low, ub=high if high < np.inf else None
            )
            for k, (name, low, high) in enumerate(
                zip(program.names, program.low, program.high, strict=True)
            )
        ]
        for variables, coefficients, low, high in program.rows:
            image = quicksum(c * x[i] for i, c in zip(variables, coefficients, strict=True))
            if low == high:
                model.addCons(image == low)
            else:
                model.addCons(image <= high if low == -np.inf else image >= low)
        for inside, u, z in program.cones:
            most = x[u] if z is None else x[u] * x[z]
            model.addCons(quicksum(x[i] * x[i] for i in inside) <= most)
        objective = quicksum(cost * v for cost, v in zip(program.cost, x, strict=True) if cost)
        if program.square is not None:
            objective = self.t = model.addVar("t", lb=0.0)
            model.addCons(self._quadratic(*program.square) <= objective)
        model.setObjective(objective + program.constant if program.constant else objective)

    def _quadratic(self, of: slice, q: np.ndarray) -> Any:
        from pyscipopt import quicksum

        x = self.x[of]
        return quicksum(
            q[i, i] * x[i] * x[i] + quicksum(2 * q[i, j] * x[i] * x[j] for j in range(i) if q[i, j])
            for i in range(len(q))
        )

    def solution(self, pruned: np.ndarray, heuristic: Any = None) -> Any:
        """A mask as a complete solution."""
        values = self.program.complete(pruned)
        solution = self.model.createSol(heuristic)
        for variable, value in zip(self.x, values, strict=True):
            self.model.setSolVal(solution, variable, float(value))
        if self.program.square is not None:
            of, q = self.program.square
            value = float(values[of] @ q @ values[of]) * (1 + ABOVE)
            self.model.setSolVal(solution, self.t, value)
        return solution

    def masks(self) -> list[np.ndarray]:
        """Of SCIP's solutions."""
        binaries = self.x[: len(self.program.binaries)]
        return [
            self.program.pruned([self.model.getSolVal(solution, v) for v in binaries])
            for solution in self.model.getSols()
        ]

    def limit(self, gap_limit: float) -> None:
        """Limits, but for the time, and seed."""
        model, task = self.model, self.program.task
        model.setParam("randomization/randomseedshift", task.limits.seed % 2**31)
        # its search for symmetries may crash the process (SCIP 10.0, dejavu)
        model.setParam("misc/usesymmetry", 0)
        if gap_limit > 0:
            model.setParam("limits/gap", gap_limit)
        if task.node_limit is not None:
            model.setParam("limits/nodes", min(task.node_limit, _MOST_NODES))
        if task.limits.memory is not None:
            model.setParam("limits/memory", min(task.limits.bytes(0) / 2**20, _MOST_MEMORY))

    def optimize(self) -> str:
        """Run in what is left of the time; SCIP's status."""
        limits = self.program.task.limits
        if limits.timed:
            self.model.setParam("limits/time", min(limits.left, _MOST_SECONDS))
        self.model.optimizeNogil()  # other Python threads go on
        return str(self.model.getStatus())

    @property
    def nodes(self) -> int:
        return int(self.model.getNTotalNodes())

    def bounds(self, none: float = 0.0) -> list[float]:
        """SCIP's bound, and that of its root, in units of the objective; `none` where it is +∞."""
        return [
            value / self.program.scale if abs(value) < _INFINITE else none * (value > 0)
            for value in (self.model.getDualbound(), self.model.getDualboundRoot())
        ]

    def add_rounding(self) -> None:
        """A heuristic: the mask of the relaxation's greatest z, with exact updated weights, unlike SCIP's
        own."""
        from pyscipopt import SCIP_RESULT, Heur

        row, task, program = self, self.program.task, self.program

        class Rounding(Heur):
            def heurexec(self, heurtiming: Any, nodeinfeasible: bool) -> dict[str, Any]:
                z = np.array([self.model.getSolVal(None, row.x[i]) for i in program.binaries])
                row.found.append(~task.first(-z, program.count))
                taken = self.model.trySol(row.solution(row.found[-1], self))
                return {"result": SCIP_RESULT.FOUNDSOL if taken else SCIP_RESULT.DIDNOTFIND}

        self.model.includeHeur(Rounding(), "refitted", "the mask of the greatest z", "r", freq=1)
