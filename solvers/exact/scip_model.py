"""One row as a SCIP model. Arrays in, arrays out: runs in this process or in a worker process.

With A = Q + diag(λ) + μΣ_g 1_g1_gᵀ ⪰ 0 (λ = μ = 0: A = Q), every legal p ∈ {0,1}ⁿ has

    f(p) = pᵀAp − λᵀp − μΣ_g (2s·1_gᵀp − s²)       (s pruned in each group)

since p_i² = p_i and 1_gᵀp = s. Where inputs are fixed, A is that of the others (`free_part`). The
formulations, in the order of what they are worth:

- `qcr`: A = LLᵀ from the duals of the semidefinite relaxation, r = Lᵀp, ‖r‖² ≤ t;
- `factored`: the same with λ = μ = 0;
- `linear`: one variable for each product (McCormick);
- `epigraph`: pᵀQp ≤ t, the textbook formulation, which SCIP can hardly bound.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from maskopt.solvers.exact.duals import Duals, same_group
from maskopt.solvers.exact.free_part import free_part
from maskopt.solvers.exact.probing import Probed
from maskopt.solvers.exact.rows import RowAnswer, RowTask
from maskopt.solvers.exact.twins import put_in_order, twins_of

FORMULATIONS = ("qcr", "factored", "linear", "epigraph")
#: SCIP's feasibility tolerance (numerics/feastol), absolute in the units of the model
FEASIBILITY = 1e-6
#: an optimum below this part of the start is solved again in its own units
_AGAIN_BELOW = 0.01
#: part of the greatest eigenvalue of A below which one is rounding, and no variable is made for it
EIGENVALUE = 1e-12
#: part by which a bound that is handed in stays below its value: SCIP's tolerance must not refuse the optimum
HANDED_IN = 1e-6
#: part by which t of the start lies above ‖r‖²: the rounding of SCIP's own sum
ABOVE = 1e-12
#: SCIP's infinity is 1e20; before the root is solved its bounds are that
INFINITE = 1e19
#: the greatest limits that SCIP takes
_MOST_SECONDS, _MOST_NODES, _MOST_MEMORY = 1e20, 2**63 - 1, 2**43 - 1


@dataclass(frozen=True)
class ScipTask(RowTask):
    """A row for SCIP.

    Attributes:
        formulation: one of FORMULATIONS.
        duals: of `qcr`; None: A = Q.
        order: pairs (i, j) of twins: p_i ≥ p_j loses nothing.
        presolve: of our own first, with `qcr`.
        probed: what it has found.
        verbose: let SCIP print.
    """

    formulation: str = "factored"
    duals: Duals | None = None
    order: tuple[tuple[int, int], ...] = ()
    presolve: bool = False
    probed: Probed | None = None
    verbose: bool = False


class RowModel:
    """A SCIP model of one row; `model` is the pyscipopt.Model, `p` its binaries."""

    def __init__(self, task: ScipTask, scale: float | None = None) -> None:
        from pyscipopt import Model, quicksum

        self.task = task
        n = len(task.q)
        self.scale = task.unit_scale if scale is None else scale
        q = task.q * self.scale
        self.model = model = Model("maskopt")
        model.hideOutput(not task.verbose)
        state = np.full(n, -1, np.int8) if task.probed is None else task.probed.state
        self.state = state
        self.p = p = [
            model.addVar(f"p{i}", vtype="B", lb=float(state[i] == 1), ub=float(state[i] != 0))
            for i in range(n)
        ]
        for first in range(0, n, task.group):
            model.addCons(quicksum(p[first : first + task.group]) == task.pruned)
        for i, j in task.order:
            model.addCons(p[i] - p[j] >= 0)
        self.t = model.addVar("t", lb=0.0)
        self.r: list[Any] = []
        self.root = np.zeros((n, 0))
        self.products: dict[tuple[int, int], Any] = {}
        #: Σ of the sizes of the terms that SCIP's tolerances apply to
        self.terms = float(np.abs(q).sum())
        if task.formulation == "linear":
            self._linear(q)
        elif task.formulation == "epigraph":
            self._epigraph(q)
        else:
            self._factored(q)

    def _epigraph(self, q: np.ndarray) -> None:
        from pyscipopt import quicksum

        p = self.p
        products = quicksum(
            q[i, i] * p[i] * p[i] + quicksum(2 * q[i, j] * p[i] * p[j] for j in range(i) if q[i, j])
            for i in range(len(q))
        )
        self.model.addCons(products <= self.t)
        self.model.setObjective(self.t)

    def _factored(self, q: np.ndarray) -> None:
        from pyscipopt import quicksum

        model, task = self.model, self.task
        lam, mu = np.zeros(len(q)), 0.0
        if task.duals is not None:
            lam, mu = task.duals.diagonal * self.scale, task.duals.penalty * self.scale
        if task.probed is not None:
            lam = task.probed.lam * self.scale
        part = free_part(q, mu, task.pruned, same_group(task), self.state)
        p, lam = [self.p[i] for i in part.free], lam[part.free]
        value, vector = np.linalg.eigh(part.b + np.diag(lam))
        # what is missing to A ⪰ 0 goes into λ: dropping it would push the bound above the truth
        missing = max(0.0, -float(value[0]))
        linear, value = part.linear - lam - missing, value + missing
        keep = value > EIGENVALUE * max(float(value[-1]), 0.0)
        self.root = root = np.zeros((len(q), int(keep.sum())))
        root[part.free] = vector[:, keep] * np.sqrt(value[keep])
        for k in range(root.shape[1]):
            column = root[part.free, k]
            low, high = np.minimum(column, 0).sum(), np.maximum(column, 0).sum()
            r = model.addVar(f"r{k}", lb=float(low) - FEASIBILITY, ub=float(high) + FEASIBILITY)
            model.addCons(quicksum(float(c) * x for c, x in zip(column, p, strict=True)) - r == 0)
            self.r.append(r)
        model.addCons(quicksum(r * r for r in self.r) <= self.t)
        rest = quicksum(float(c) * x for c, x in zip(linear, p, strict=True))
        objective = self.t + rest + part.constant
        model.setObjective(objective)
        self.terms += float(np.abs(linear).sum()) + abs(part.constant)
        if task.duals is not None and task.duals.certified > 0:
            # certified already: SCIP need not find its cuts again
            least = task.duals.certified * self.scale * (1 - HANDED_IN)
            model.addCons(objective >= least)

    def _linear(self, q: np.ndarray) -> None:
        from pyscipopt import quicksum

        model, p = self.model, self.p
        terms = [float(q[i, i]) * p[i] for i in range(len(q))]
        for i in range(len(q)):
            for j in range(i):
                if q[i, j]:
                    x = model.addVar(f"x{j}_{i}", lb=0.0, ub=1.0)
                    self.products[j, i] = x
                    if q[i, j] > 0:
                        model.addCons(x - p[i] - p[j] >= -1)
                    else:
                        model.addCons(x - p[i] <= 0)
                        model.addCons(x - p[j] <= 0)
                    terms.append(2 * float(q[i, j]) * x)
        model.addCons(quicksum(terms) <= self.t)
        model.setObjective(self.t)

    def add_start(self) -> bool:
        """Hand the warm start over as a complete solution."""
        model, task = self.model, self.task
        start = task.start.astype(float)
        solution = model.createSol()
        for variable, value in zip(self.p, start, strict=True):
            model.setSolVal(solution, variable, float(value))
        r = self.root.T @ start
        for variable, value in zip(self.r, r, strict=True):
            model.setSolVal(solution, variable, float(value))
        for (j, i), variable in self.products.items():
            model.setSolVal(solution, variable, float(start[i] * start[j]))
        t = float(r @ r) if self.r else float(start @ task.q @ start) * self.scale
        model.setSolVal(solution, self.t, t * (1 + ABOVE))
        return bool(model.addSol(solution, free=True))


def break_symmetry(task: ScipTask) -> ScipTask:
    """Of twins (identical and dead inputs among them) prune the first ones: p_i ≥ p_j for i < j loses no
    objective value. The start is put into that order."""
    twins = twins_of(task.q, task.group)
    order = tuple((int(i), int(j)) for known in twins for i, j in itertools.pairwise(known))
    return replace(task, order=order, start=put_in_order(task.start, twins))


def solve_model(task: ScipTask) -> RowAnswer:
    """SCIP's incumbent and SCIP's bound, at the optimum or at whatever limit comes first.

    SCIP's tolerances are absolute, in units of the start: an optimum far below it is measured anew.
    """
    nodes = 0
    while True:
        before = task.cost(task.start)
        answer = _solve_once(task)
        nodes += answer.nodes
        far_below = task.cost(answer.pruned) <= _AGAIN_BELOW * before
        if answer.ended != "optimal" or not far_below or before <= task.noise:
            return replace(answer, nodes=nodes)
        task = replace(task, start=answer.pruned)


def _solve_once(task: ScipTask) -> RowAnswer:
    row = RowModel(task)
    set_limits(task, row.model)
    # its search for symmetries may crash the process (SCIP 10.0, dejavu)
    row.model.setParam("misc/usesymmetry", 0)
    if task.probed is None or task.probed.allows(task.start):
        row.add_start()
    else:  # what is fixed holds for better masks alone
        row.model.setObjlimit(task.cost(task.start) * row.scale)
    set_time(task, row.model)
    row.model.optimizeNogil()  # other Python threads go on
    return read_answer(row)


def set_limits(task: RowTask, model: Any) -> None:
    """Limits, but for the time, and seed of a pyscipopt.Model."""
    model.setParam("randomization/randomseedshift", task.limits.seed % 2**31)
    if task.gap_limit > 0:
        model.setParam("limits/gap", task.gap_limit)
    if task.node_limit is not None:
        model.setParam("limits/nodes", min(task.node_limit, _MOST_NODES))
    if task.limits.memory is not None:
        model.setParam("limits/memory", min(task.limits.bytes(0) / 2**20, _MOST_MEMORY))


def set_time(task: RowTask, model: Any) -> None:
    """What is left of the time."""
    if task.limits.timed:
        model.setParam("limits/time", min(task.limits.left, _MOST_SECONDS))


def read_answer(row: RowModel) -> RowAnswer:
    """The best legal mask among SCIP's solutions and the start, by their true costs."""
    task, model = row.task, row.model
    best, best_cost = task.start, task.cost(task.start)
    for solution in model.getSols():
        values = np.array([model.getSolVal(solution, v) for v in row.p]) > 0.5
        cost = task.cost(values)
        if task.is_legal(values) and cost < best_cost:
            best, best_cost = values, cost
    certified = 0.0 if task.duals is None else task.duals.certified

    ended = str(model.getStatus())
    slack = FEASIBILITY * row.terms / row.scale

    def true_bound(value: float) -> float:
        known = max(certified, value / row.scale if abs(value) < INFINITE else 0.0)
        if task.probed is None:
            return max(known, task.raised(known, slack), task.raised(certified))
        # what is fixed holds below the cutoff alone
        return task.raised(min(task.probed.cutoff, max(known, task.probed.bound)))

    if task.probed is not None and ended == "infeasible":  # nothing is left below the cutoff
        return presolved(task)
    return RowAnswer(
        pruned=best,
        ended=ended,
        bound=true_bound(model.getDualbound()),
        slack=slack,
        nodes=int(model.getNTotalNodes()),
        root_bound=true_bound(model.getDualboundRoot()),
        certificate=None if task.duals is None else task.duals.certificate,
        certified=certified,
    )


def presolved(task: ScipTask) -> RowAnswer:
    """The start, below whose cutoff the presolve has left nothing."""
    assert task.duals is not None
    assert task.probed is not None
    certified = task.duals.certified
    bound = max(certified, task.raised(task.probed.cutoff))
    return RowAnswer(
        pruned=task.start,
        ended="presolved",
        bound=bound,
        root_bound=bound,
        certificate=task.duals.certificate,
        certified=certified,
    )


def write_row(task: ScipTask, path: str, constant: float = 0.0) -> None:
    """Write the model of a row, unscaled, through SCIP; the format is the ending of the name.

    Args:
        constant: of the objective, beside Q.
    """
    model = RowModel(task, scale=1.0).model
    model.addObjoffset(constant)
    model.writeProblem(path, trans=False, verbose=False)
