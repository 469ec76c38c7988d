"""One row of refitted weights as a SCIP model: the perspective formulation, as second-order cones.

With A = B + diag(d), B = LLᵀ (see `refit_rows`), z the kept inputs, v* = A⁻¹b the dense optimum, F* its cost
and r = Lᵀ(v − v*),

    min  F* + t + Σ dⱼ(uⱼ − 2v*ⱼvⱼ + v*ⱼ²),     ‖r‖² ≤ t,   vⱼ² ≤ uⱼzⱼ,   Σ z = as many as are kept:

SCIP's tolerances are parts of the numbers that it sees, and these are of the order of F, not of C.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from maskopt.solvers.exact.refit_rows import REFIT_CLOSED, RefitTask, between, reached
from maskopt.solvers.exact.rows import RowAnswer
from maskopt.solvers.exact.scip_model import (
    ABOVE,
    EIGENVALUE,
    FEASIBILITY,
    HANDED_IN,
    INFINITE,
    set_limits,
    set_time,
)

#: SCIP's feasibility tolerance here: a z that is off by it lets a pruned weight in
_TIGHTER = 1e-7
#: nodes without a better mask after which SCIP's tolerances are what keeps it going
_STALLED = 50_000


@dataclass(frozen=True)
class ScipRefitTask(RefitTask):
    """`verbose`: let SCIP print."""

    verbose: bool = False


class RefitModel:
    """A SCIP model of one row in units in which the start costs a thousand: v is √scale of what it was."""

    def __init__(self, task: ScipRefitTask) -> None:
        from pyscipopt import Model, quicksum

        self.task, n = task, len(task.target)
        self.scale = task.unit_scale
        root = np.sqrt(self.scale)
        dense = np.linalg.solve(task.q, task.target)
        least = task.constant - float(task.target @ dense)
        self.dense = dense = root * dense
        self.low, self.high = (root * side for side in between(task))
        self.model = model = Model("maskopt")
        model.hideOutput(not task.verbose)
        self.z = z = [model.addVar(f"z{j}", vtype="B") for j in range(n)]
        for first in range(0, n, task.group):
            count = task.group - task.pruned
            model.addCons(quicksum(z[first : first + task.group]) == count)
        self.v = v = [model.addVar(f"v{j}", lb=self.low[j], ub=self.high[j]) for j in range(n)]
        self.u = u = [model.addVar(f"u{j}", lb=0.0) for j in range(n)]
        for j in range(n):
            model.addCons(v[j] - self.high[j] * z[j] <= 0)
            model.addCons(v[j] - self.low[j] * z[j] >= 0)
            model.addCons(v[j] * v[j] <= u[j] * z[j])
        value, vector = np.linalg.eigh(task.q - np.diag(task.split))
        keep = value > EIGENVALUE * max(float(value[-1]), 0.0)
        self.factor = vector[:, keep] * np.sqrt(value[keep])
        reach = np.maximum(np.abs(self.low - dense), np.abs(self.high - dense))
        self.r = []
        for k in range(self.factor.shape[1]):
            column = self.factor[:, k]
            most = float(np.abs(column) @ reach) + FEASIBILITY
            r = model.addVar(f"r{k}", lb=-most, ub=most)
            image = quicksum(float(column[j]) * v[j] for j in range(n))
            model.addCons(image - r == float(column @ dense))
            self.r.append(r)
        self.t = model.addVar("t", lb=0.0)
        model.addCons(quicksum(r * r for r in self.r) <= self.t)
        terms: list[Any] = [self.t]
        terms += [task.split[j] * (u[j] - 2 * dense[j] * v[j] + dense[j] ** 2) for j in range(n)]
        objective = quicksum(terms) + self.scale * least
        model.setObjective(objective)
        if task.certified > 0:  # SCIP need not find its cuts again
            model.addCons(objective >= task.certified * self.scale * (1 - HANDED_IN))
        #: Σ of the sizes of what SCIP's tolerances apply to
        self.terms = reached(task, self.low, self.high)
        #: masks of the rounding heuristic, the last one it came to at the end
        self.found: list[np.ndarray] = []

    def solution(self, pruned: np.ndarray, heuristic: Any) -> Any:
        """A mask with its refitted weights."""
        task, kept = self.task, np.flatnonzero(~pruned)
        v = np.zeros(len(task.target))
        v[kept] = np.linalg.solve(task.q[np.ix_(kept, kept)], task.target[kept])
        v *= np.sqrt(self.scale)
        r = self.factor.T @ (v - self.dense)
        solution = self.model.createSol(heuristic)
        for variables, values in (
            (self.z, ~pruned),
            (self.v, v),
            (self.u, v**2 * (1 + ABOVE)),
            (self.r, r),
            ([self.t], [float(r @ r) * (1 + ABOVE)]),
        ):
            for variable, value in zip(variables, values, strict=True):
                self.model.setSolVal(solution, variable, float(value))
        return solution


def _rounding(row: RefitModel, task: ScipRefitTask) -> Any:
    """A heuristic for SCIP: the mask of the relaxation's greatest z, with its refitted weights to the last
    digit. SCIP's own end at weights that only its tolerances allow, and it cannot tell what is better."""
    from pyscipopt import SCIP_RESULT, Heur

    class Rounding(Heur):
        def heurexec(self, heurtiming: Any, nodeinfeasible: bool) -> dict[str, Any]:
            z = np.array([self.model.getSolVal(None, variable) for variable in row.z])
            ranks = np.argsort(-z.reshape(-1, task.group), axis=1, kind="stable").argsort(axis=1)
            row.found.append((ranks >= task.group - task.pruned).ravel())
            taken = self.model.trySol(row.solution(row.found[-1], self))
            return {"result": SCIP_RESULT.FOUNDSOL if taken else SCIP_RESULT.DIDNOTFIND}

    return Rounding()


def search_refitted(task: ScipRefitTask) -> RowAnswer:
    """SCIP's incumbent and SCIP's bound, at the optimum or at whatever limit comes first.

    It looks only for what beats the start by more than the gap that is left open: so it need not tell apart
    what its tolerances do not, and where nothing is found, `infeasible`, that gap is closed.
    """
    from pyscipopt import SCIP_PARAMSETTING

    if (decided := task.decided) is not None:
        return decided
    row, gap = RefitModel(task), max(task.gap_limit, REFIT_CLOSED)
    best, cost = task.start, task.cost(task.start)
    aim = cost * (1 - gap)
    set_limits(replace(task, gap_limit=gap), row.model)
    row.model.setObjlimit(aim * row.scale)
    row.model.setParam("numerics/feastol", _TIGHTER)
    row.model.setParam("limits/stallnodes", _STALLED)
    row.model.setHeuristics(SCIP_PARAMSETTING.OFF)
    # its search for symmetries may crash the process (SCIP 10.0, dejavu)
    row.model.setParam("misc/usesymmetry", 0)
    # presolving fixes and joins variables, and such have no values of their own
    row.model.setParam("presolving/maxrounds", 0)
    rounding = _rounding(row, task)
    row.model.includeHeur(rounding, "refitted", "the mask of the greatest z", "r", freq=1)
    # beyond 1e-10 SoPlex only complains
    row.model.setParam("constraints/nonlinear/tightenlpfeastol", False)
    set_time(task, row.model)
    row.model.optimizeNogil()  # other Python threads go on
    for pruned in row.found:
        if task.cost(pruned) < cost:
            best, cost = pruned, task.cost(pruned)
    ended = str(row.model.getStatus())
    if ended in ("gaplimit", "infeasible"):
        ended = "optimal" if task.gap_limit <= REFIT_CLOSED else "gaplimit"

    def true_bound(value: float) -> float:
        """What a bound of SCIP proves: of an infinite one, that nothing lies below `aim`."""
        proven = value / row.scale if abs(value) < INFINITE else aim * (value > 0)
        return max(task.certified, min(proven, aim))

    return RowAnswer(
        pruned=best,
        ended=ended,
        bound=true_bound(row.model.getDualbound()),
        slack=_TIGHTER * row.terms / row.scale,
        nodes=int(row.model.getNTotalNodes()),
        root_bound=true_bound(row.model.getDualboundRoot()),
    )
