"""One row as a SCIP model. Arrays in, arrays out: runs in this process or in a worker process.

With A = Q + diag(λ) + Σ_g μ_g 1_g1_gᵀ ⪰ 0 (λ = μ = 0: A = Q), every legal p ∈ {0,1}ⁿ has

    f(p) = pᵀAp − λᵀp − Σ_g μ_g s²                 (s pruned in each group)

since p_i² = p_i and 1_gᵀp = s. The formulations, in the order of what they are worth:

- `qcr`: A = LLᵀ from the duals of the semidefinite relaxation, r = Lᵀp, ‖r‖² ≤ t;
- `factored`: the same with λ = μ = 0;
- `linear`: one variable for each product (McCormick);
- `epigraph`: pᵀQp ≤ t, the textbook formulation, which SCIP can hardly bound.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

FORMULATIONS = ("qcr", "factored", "linear", "epigraph")
#: the start's objective in the units of the SCIP model: far above SCIP's absolute tolerances
_SCALE = 1000.0
#: an optimum below this part of the start is solved again in its own units
_RESCALE = 0.01


@dataclass
class RowTask:
    """What a process needs to solve one row."""

    q: np.ndarray
    group: int
    pruned: int
    start: np.ndarray
    """p of the warm start, bool [n], True = pruned."""
    formulation: str = "factored"
    diagonal: np.ndarray | None = None
    """λ of `qcr`."""
    penalty: np.ndarray | None = None
    """μ of `qcr`, one a group."""
    bound: float = 0.0
    """A lower bound that is already certified."""
    order: tuple[tuple[int, int], ...] = ()
    """Pairs (i, j) of identical inputs: p_i ≥ p_j loses nothing."""
    time_limit: float | None = None
    node_limit: int | None = None
    gap_limit: float = 0.0
    memory_limit: int | None = None
    seed: int = 0
    verbose: bool = False


@dataclass
class RowAnswer:
    """What SCIP said about one row."""

    pruned: np.ndarray
    bound: float
    status: str
    """SCIP's own word, or `presolved`, `crashed`, `interrupted`."""
    nodes: int = 0
    root_bound: float = 0.0
    seconds: float = 0.0
    message: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


class RowModel:
    """A SCIP model of one row; `model` is the pyscipopt.Model, `p` its binaries."""

    def __init__(self, task: RowTask, factor: float | None = None) -> None:
        from pyscipopt import Model, quicksum

        self.task = task
        n = len(task.q)
        # a start of (nearly) no cost: the rounding of the sums is the least unit that means anything
        floor = 1e-10 * float(np.trace(task.q))
        self.factor = factor or _SCALE / (max(_cost(task, task.start), floor) or 1.0)
        q = task.q * self.factor
        self.model = model = Model("maskopt")
        model.hideOutput(not task.verbose)
        self.p = p = [model.addVar(f"p{i}", vtype="B") for i in range(n)]
        for first in range(0, n, task.group):
            model.addCons(quicksum(p[first : first + task.group]) == task.pruned)
        for i, j in task.order:
            model.addCons(p[i] - p[j] >= 0)
        self.t = model.addVar("t", lb=0.0)
        self.r: list[Any] = []
        self.factor_matrix = np.zeros((n, 0))
        if task.formulation == "linear":
            self._linear(q)
        elif task.formulation == "epigraph":
            products = quicksum(
                q[i, i] * p[i] * p[i]
                + quicksum(2 * q[i, j] * p[i] * p[j] for j in range(i) if q[i, j])
                for i in range(n)
            )
            model.addCons(products <= self.t)
            model.setObjective(self.t)
        else:
            self._factored(q)

    def _factored(self, q: np.ndarray) -> None:
        from pyscipopt import quicksum

        model, p, task = self.model, self.p, self.task
        n = len(q)
        lam = np.zeros(n) if task.diagonal is None else task.diagonal * self.factor
        groups = n // task.group
        mu = np.zeros(groups) if task.penalty is None else task.penalty * self.factor
        member = np.arange(n) // task.group
        same = np.where(member[:, None] == member[None, :], mu[member][:, None], 0.0)
        value, vector = np.linalg.eigh(q + np.diag(lam) + same)
        # what is missing to A ⪰ 0 goes into λ: dropping it would push the bound above the truth
        missing = max(0.0, -float(value[0]))
        lam, value = lam + missing, value + missing
        keep = value > 1e-12 * max(float(value[-1]), 0.0)
        self.factor_matrix = factor = vector[:, keep] * np.sqrt(value[keep])
        for k in range(factor.shape[1]):
            column = factor[:, k]
            low, high = np.minimum(column, 0).sum(), np.maximum(column, 0).sum()
            r = model.addVar(f"r{k}", lb=float(low) - 1e-6, ub=float(high) + 1e-6)
            model.addCons(quicksum(float(column[i]) * p[i] for i in range(n)) - r == 0)
            self.r.append(r)
        model.addCons(quicksum(r * r for r in self.r) <= self.t)
        constant = -float(mu.sum()) * task.pruned**2
        objective = self.t - quicksum(float(lam[i]) * p[i] for i in range(n)) + constant
        model.setObjective(objective)
        if task.bound > 0:
            # certified already: SCIP need not find its cuts again, a little below for its tolerance
            model.addCons(objective >= task.bound * self.factor * (1 - 1e-6))

    def _linear(self, q: np.ndarray) -> None:
        from pyscipopt import quicksum

        model, p = self.model, self.p
        terms = [float(q[i, i]) * p[i] for i in range(len(q))]
        self.products: dict[tuple[int, int], Any] = {}
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
        r = self.factor_matrix.T @ start
        for variable, value in zip(self.r, r, strict=True):
            model.setSolVal(solution, variable, float(value))
        for (j, i), variable in getattr(self, "products", {}).items():
            model.setSolVal(solution, variable, float(start[i] * start[j]))
        t = float(r @ r) if self.r else float(start @ task.q @ start) * self.factor
        model.setSolVal(solution, self.t, t * (1 + 1e-12))
        return bool(model.addSol(solution, free=True))


def presolve(task: RowTask) -> RowTask:
    """Break symmetry: of identical inputs of a group (dead ones included) prune the first ones.

    Exchanging two of them changes nothing, so p_i ≥ p_j for i < j loses no objective value; the start
    is put into that order.
    """
    order: list[tuple[int, int]] = []
    start = np.array(task.start, dtype=bool)
    for first in range(0, len(task.q), task.group):
        alike: dict[bytes, list[int]] = {}
        for i in range(first, first + task.group):
            # identical inputs have the same row of Q, whatever the order of its entries elsewhere
            alike.setdefault((task.q[i] + 0.0).tobytes(), []).append(i)
        for members in alike.values():
            order += itertools.pairwise(members)
            pruned = int(start[members].sum())
            start[members] = np.arange(len(members)) < pruned
    return replace(task, order=tuple(order), start=start)


def _separable(task: RowTask) -> RowAnswer | None:
    """The optimum of a diagonal Q, by sorting; None where Q is not diagonal."""
    diagonal = np.diagonal(task.q)
    if np.count_nonzero(task.q - np.diag(diagonal)):
        return None
    ranks = np.argsort(diagonal.reshape(-1, task.group), axis=1, kind="stable").argsort(axis=1)
    pruned = (ranks < task.pruned).ravel()
    return RowAnswer(pruned, _cost(task, pruned), "presolved")


def solve_row(task: RowTask) -> RowAnswer:
    """Solve one row; any limit reached returns SCIP's incumbent and SCIP's bound."""
    began = time.perf_counter()
    start = np.asarray(task.start, dtype=bool)
    if task.time_limit is not None and task.time_limit <= 0:
        return RowAnswer(start, task.bound, "timelimit", message="no time given")
    separable = _separable(task)
    if separable is not None:
        separable.seconds = time.perf_counter() - began
        return separable
    nodes = 0
    while True:
        left = None
        if task.time_limit is not None:
            left = max(task.time_limit - (time.perf_counter() - began), 0.0)
        answer = _solve_once(task, left)
        nodes += answer.nodes
        before, after = _cost(task, task.start), _cost(task, answer.pruned)
        # SCIP's tolerances are absolute, in units of the start: far below it, measure anew
        floor = 1e-10 * float(np.trace(task.q))
        if answer.status != "optimal" or after > _RESCALE * before or before <= floor:
            break
        task = replace(task, start=answer.pruned)
    answer.nodes = nodes
    answer.seconds = time.perf_counter() - began
    return answer


def _solve_once(task: RowTask, seconds: float | None) -> RowAnswer:
    row = RowModel(task)
    configure(row)
    row.add_start()
    if seconds is not None:
        row.model.setParam("limits/time", seconds)
    row.model.optimizeNogil()  # other Python threads go on
    return read_answer(row)


def _cost(task: RowTask, pruned: np.ndarray) -> float:
    p = np.asarray(pruned, dtype=float)
    return max(float(p @ task.q @ p), 0.0)


def configure(row: RowModel) -> None:
    task, model = row.task, row.model
    model.setParam("randomization/randomseedshift", task.seed % 2**31)
    if task.gap_limit > 0:
        model.setParam("limits/gap", task.gap_limit)
    if task.node_limit is not None:
        model.setParam("limits/nodes", task.node_limit)
    if task.memory_limit is not None:
        model.setParam("limits/memory", task.memory_limit / 2**20)
    if task.formulation in ("qcr", "factored"):
        model.setParam("misc/usesymmetry", 0)


def read_answer(row: RowModel) -> RowAnswer:
    task, model = row.task, row.model
    start = np.asarray(task.start, dtype=bool)
    best, best_cost = start, _cost(task, start)
    for solution in model.getSols():
        values = np.array([model.getSolVal(solution, v) for v in row.p]) > 0.5
        counts = values.reshape(-1, task.group).sum(1)
        cost = _cost(task, values)
        if (counts == task.pruned).all() and cost < best_cost:
            best, best_cost = values, cost
    dual = model.getDualbound() / row.factor
    root = model.getDualboundRoot() / row.factor
    # before the root is solved SCIP's bound is −1e20
    bound = max(task.bound, dual if abs(dual * row.factor) < 1e19 else 0.0, 0.0)
    return RowAnswer(
        pruned=best,
        bound=bound,
        status=str(model.getStatus()),
        nodes=int(model.getNTotalNodes()),
        root_bound=max(task.bound, root if abs(root * row.factor) < 1e19 else 0.0, 0.0),
    )


def write_row(task: RowTask, path: str) -> None:
    """Write the model of a row, unscaled, through SCIP; the format is the ending of the name."""
    RowModel(task, factor=1.0).model.writeProblem(path, trans=False, verbose=False)
