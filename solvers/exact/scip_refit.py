"""One row of refitted weights as a SCIP model: the perspective formulation, as second-order cones.

With A = B + diag(d), B = LLᵀ (see `refit_rows`), z the kept inputs, and r = Lᵀv,

    min  t + Σ dⱼuⱼ − 2bᵀv + C,     ‖r‖² ≤ t,   vⱼ² ≤ uⱼzⱼ,   Σ z = as many as are kept.
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
)


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
        target, self.constant = root * task.target, self.scale * task.constant
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
        reach = np.maximum(np.abs(self.low), np.abs(self.high))
        self.r = []
        for k in range(self.factor.shape[1]):
            column = self.factor[:, k]
            most = float(np.abs(column) @ reach) + FEASIBILITY
            r = model.addVar(f"r{k}", lb=-most, ub=most)
            model.addCons(quicksum(float(column[j]) * v[j] for j in range(n)) - r == 0)
            self.r.append(r)
        self.t = model.addVar("t", lb=0.0)
        model.addCons(quicksum(r * r for r in self.r) <= self.t)
        terms: list[Any] = [self.t]
        terms += [float(task.split[j]) * u[j] - 2 * float(target[j]) * v[j] for j in range(n)]
        objective = quicksum(terms) + self.constant
        model.setObjective(objective)
        if task.certified > 0:  # SCIP need not find its cuts again
            model.addCons(objective >= task.certified * self.scale * (1 - HANDED_IN))
        #: Σ of the sizes of what SCIP's tolerances apply to
        self.terms = reached(task, self.low, self.high)

    def add_start(self) -> None:
        """Hand the warm start over as a complete solution."""
        model, task = self.model, self.task
        kept = np.flatnonzero(~task.start)
        v = np.zeros(len(task.target))
        v[kept] = np.linalg.solve(task.q[np.ix_(kept, kept)], task.target[kept])
        v = np.clip(v * np.sqrt(self.scale), self.low, self.high)
        r = self.factor.T @ v
        solution = model.createSol()
        for variables, values in (
            (self.z, ~task.start),
            (self.v, v),
            (self.u, v**2 * (1 + ABOVE)),
            (self.r, r),
            ([self.t], [float(r @ r) * (1 + ABOVE)]),
        ):
            for variable, value in zip(variables, values, strict=True):
                model.setSolVal(solution, variable, float(value))
        model.addSol(solution, free=True)


def search_refitted(task: ScipRefitTask) -> RowAnswer:
    """SCIP's incumbent and SCIP's bound, at the optimum or at whatever limit comes first."""
    if (decided := task.decided) is not None:
        return decided
    row = RefitModel(task)
    set_limits(replace(task, gap_limit=max(task.gap_limit, REFIT_CLOSED)), row.model)
    # beyond 1e-10 SoPlex only complains
    row.model.setParam("constraints/nonlinear/tightenlpfeastol", False)
    row.add_start()
    if task.limits.timed:
        row.model.setParam("limits/time", task.limits.left)
    row.model.optimizeNogil()  # other Python threads go on
    best, cost = task.start, task.cost(task.start)
    for solution in row.model.getSols():
        pruned = np.array([row.model.getSolVal(solution, z) for z in row.z]) < 0.5
        if task.is_legal(pruned) and task.cost(pruned) < cost:
            best, cost = pruned, task.cost(pruned)

    def true_bound(value: float) -> float:
        return max(task.certified, value / row.scale if abs(value) < INFINITE else 0.0)

    ended = str(row.model.getStatus())
    if ended == "gaplimit" and task.gap_limit <= REFIT_CLOSED:
        ended = "optimal"
    return RowAnswer(
        pruned=best,
        ended=ended,
        bound=true_bound(row.model.getDualbound()),
        slack=FEASIBILITY * row.terms / row.scale,
        nodes=int(row.model.getNTotalNodes()),
        root_bound=true_bound(row.model.getDualboundRoot()),
    )
