"""Exact integer programming with SCIP (PySCIPOpt)."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from maskopt.certificates.certificate import Certificate
from maskopt.core.fields import option
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.core.threads import torch_threads
from maskopt.errors import OptionError
from maskopt.protocol.solver import Capabilities
from maskopt.solvers.exact.program import FEASIBILITY, Program
from maskopt.solvers.exact.rows import RowSolver, exact
from maskopt.solvers.exact.tasks import RowAnswer, RowTask
from maskopt.solvers.exact.tree.node import (
    Duals,
    FreePart,
    qcr_duals,
    with_penalty,
)
from maskopt.solvers.exact.tree.quadratic import QuadraticTree

FORMATS = ("cip", "lp", "mps")
#: convex by the duals of the semidefinite relaxation; Q = LLᵀ; a variable a product
FORMULATIONS = ("qcr", "factored", "linear")
#: an optimum below this part of the start is solved again in its own units
_AGAIN_BELOW = 0.01
#: SCIP's infinity is 1e20; before the root is solved its bounds are that
_INFINITE = 1e19
#: the greatest limits that SCIP takes
_MOST_SECONDS, _MOST_NODES, _MOST_MEMORY = 1e20, 2**63 - 1, 2**43 - 1


@dataclass(frozen=True)
class Scip(RowSolver):
    """SCIP on one row at a time; OPTIMAL only where SCIP says `optimal` and its bound closes the gap.

    Any limit gives SCIP's incumbent and bound; `memory` is bytes a row. After Ctrl-C rows being solved return
    their incumbents, the rest their starts.
    """

    name: ClassVar[str] = "scip"
    package: ClassVar[str] = "pyscipopt"
    capabilities: ClassVar[Capabilities] = exact(
        trusted=("SCIP", "presolve of maskopt and SCIP"),
        largest_n=512,
        note="integer programming; proves up to about 128 inputs, beyond that a gap",
    )

    formulation: str = option(
        "qcr",
        "of the objective; qcr: made convex by the duals of the `sdp` bound, which is handed in",
        choices=FORMULATIONS,
    )
    presolve: bool = option(
        True, "with qcr: inputs that bounds of our own fix are fixed, and SCIP has the rest"
    )

    def trusted_name(self, problem: LayerProblem) -> str:
        from pyscipopt import Model

        presolved = self.presolve and self.formulation == "qcr"
        return f"{self.capabilities.trusted[presolved]} {Model().version()}"

    def search_row(self, task: RowTask) -> RowAnswer:
        """Find an incumbent, then duals, then the tree, as far as the time allows."""
        separable = _separable(task)
        if separable is not None:
            return separable
        task = task.started(task.with_incumbent().start)
        if task.limits.expired:
            return RowAnswer(task.start, "timelimit")
        if self.formulation != "qcr":
            return self._solved(task, Duals.none(len(task.q)))
        duals = qcr_duals(task)
        if task.limits.expired:
            return duals.answer(task.start, "timelimit")
        tree, mixed = None, 0 < task.pruned < task.group
        if self.presolve and mixed and task.cost(task.start) > task.noise:
            with torch_threads(1):  # its matrices are small
                tree = QuadraticTree(task, duals)
                tree.probe()
            task = task.started(tree.best)
            if tree.start.bound >= tree.cutoff:
                return _presolved(task, duals, tree)
        return self._solved(task, duals, tree)

    def _solved(self, task: RowTask, duals: Duals, tree: QuadraticTree | None = None) -> RowAnswer:
        """Run SCIP to the optimum or to a limit, and return its incumbent and bound."""
        program = Program(task, task.unit_scale)
        program.order_twins()
        self._formulate(program, duals, tree)
        row = ScipModel(program)
        if program.allows(task.start):
            row.model.addSol(row.solution(task.start), free=True)
        else:  # the fixings hold for better masks alone
            row.model.setObjlimit(task.cost(task.start) * program.scale)
        ended = row.optimize(task.gap_limit)
        if tree is not None and ended == "infeasible":  # nothing is left below the cutoff
            return _presolved(task, duals, tree)
        best = min((task.start, *filter(task.is_legal, row.masks())), key=task.cost)
        before = task.cost(task.start)
        if ended == "optimal" and task.noise < before and task.cost(best) <= _AGAIN_BELOW * before:
            # SCIP's tolerances are absolute, in units of the start: again in units of this mask
            again = self._solved(replace(task, start=best), duals, tree)
            return replace(again, nodes=again.nodes + row.nodes)
        slack = FEASIBILITY * program.terms / program.scale

        def true_bound(value: float) -> float:
            bound = max(duals.certified, value)
            if tree is None:
                return max(bound, task.raised(bound, slack), task.raised(duals.certified))
            # the fixings hold below the cutoff alone
            return task.raised(min(tree.cutoff, max(bound, tree.start.bound)))

        bound, root_bound = map(true_bound, row.bounds())
        return RowAnswer(
            best,
            ended,
            bound=bound,
            slack=slack,
            nodes=row.nodes,
            root_bound=root_bound,
            certificate=duals.certificate,
            certified=duals.certified,
        )

    def _formulate(self, program: Program, duals: Duals, tree: QuadraticTree | None = None) -> None:
        """Complete a program in the formulation; `qcr` without duals is `factored`."""
        if self.formulation == "linear":
            program.linearise()
            return
        lam, state = duals.diagonal, np.full(len(program.q), -1, np.int8)
        if tree is not None:
            lam, state = tree.start.form.lam, tree.start.state
        objective = with_penalty(program.q, duals.penalty * program.scale, program.task)
        program.factor(FreePart.of(objective, state), lam * program.scale, duals.certified)

    def write_instance(
        self,
        row: RowProblem,
        path: str | os.PathLike[str],
        *,
        form: str = "cip",
        formulation: str = "factored",
    ) -> None:
        """Write a row as `cip`, `lp` or `mps`, in every formulation but `qcr`.

        Raises:
            OptionError: another format or formulation, or two that do not go together.
            SolverError: too many inputs.
        """
        if form not in FORMATS:
            raise OptionError(f"{self.name} writes {', '.join(FORMATS)}, not {form!r}")
        if formulation not in FORMULATIONS or formulation == "qcr":
            raise OptionError("formulation of an instance must be factored or linear")
        if form == "mps" and formulation != "linear":
            raise OptionError("mps holds no quadratic constraint here: pass formulation linear")
        self.check_size(row.n, row.pattern, update=False)
        layer = row.as_layer()
        group, pruned = layer.group_size, layer.pruned_per_group
        task = RowTask(row.q().cpu().numpy(), group, pruned, np.arange(layer.n) % group < pruned)
        program = Program(task, 1.0)
        replace(self, formulation=formulation)._formulate(program, Duals.none(layer.n))
        model = ScipModel(program).model
        if layer.pruned == 0:  # else Q has it in its entries
            model.addObjoffset(float(layer.constant[0]))
        with tempfile.TemporaryDirectory(dir=Path(path).absolute().parent) as folder:
            whole = Path(folder) / f"row.{form}"
            model.writeProblem(str(whole), trans=False, verbose=False)
            os.replace(whole, path)


def _presolved(task: RowTask, duals: Duals, tree: QuadraticTree) -> RowAnswer:
    """Return the start, below whose cutoff the presolve has left nothing."""
    bound = max(duals.certified, task.raised(tree.cutoff))
    return duals.answer(task.start, "presolved", bound)


def _separable(task: RowTask) -> RowAnswer | None:
    """Sort a diagonal Q, and return its optimum with the linear form of λ = −diag(Q); None for another Q."""
    diagonal = np.diagonal(task.q)
    if np.count_nonzero(task.q - np.diag(diagonal)):
        return None
    pruned = task.first(diagonal, task.pruned)
    cost = task.cost(pruned)
    penalty = torch.zeros(1, len(diagonal) // task.group, dtype=torch.float64)
    point = torch.from_numpy(pruned.astype(float))[None]
    certificate = Certificate(torch.from_numpy(-diagonal)[None], penalty, point)
    return Duals(-diagonal, 0.0, cost, certificate).answer(pruned, "presolved")


class ScipModel:
    """A program in SCIP: the pyscipopt.Model and its variables `x`."""

    def __init__(self, program: Program) -> None:
        from pyscipopt import Model, quicksum

        self.program = program
        self.model = model = Model("maskopt")
        model.hideOutput()
        self.x: list[Any] = []
        x = self.x
        for name, low, high in zip(program.names, program.low, program.high, strict=True):
            kind = "B" if len(x) < len(program.binaries) else "C"
            x.append(model.addVar(name, kind, lb=low, ub=high if high < np.inf else None))
        for variables, coefficients, low, high in program.rows:
            image = quicksum(c * x[i] for i, c in zip(variables, coefficients, strict=True))
            if low == high:
                model.addCons(image == low)
            elif low == -np.inf:
                model.addCons(image <= high)
            else:
                model.addCons(image >= low)
        if program.cone is not None:
            inside, t = program.cone
            model.addCons(quicksum(x[i] * x[i] for i in inside) <= x[t])
        objective = quicksum(cost * v for cost, v in zip(program.cost, x, strict=True) if cost)
        model.setObjective(objective + program.constant if program.constant else objective)

    def solution(self, pruned: np.ndarray) -> Any:
        """Return a mask as a complete solution."""
        solution = self.model.createSol()
        for variable, value in zip(self.x, self.program.complete(pruned), strict=True):
            self.model.setSolVal(solution, variable, float(value))
        return solution

    def masks(self) -> list[np.ndarray]:
        """Return the masks of SCIP's solutions."""
        binaries = self.x[: len(self.program.binaries)]
        return [
            self.program.pruned([self.model.getSolVal(solution, v) for v in binaries])
            for solution in self.model.getSols()
        ]

    def optimize(self, gap_limit: float) -> str:
        """Run within the limits of the task, and return SCIP's status."""
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
        if task.limits.timed:
            model.setParam("limits/time", min(task.limits.left, _MOST_SECONDS))
        model.optimizeNogil()  # other Python threads go on
        return str(model.getStatus())

    @property
    def nodes(self) -> int:
        return int(self.model.getNTotalNodes())

    def bounds(self) -> list[float]:
        """Return SCIP's bound, and that of its root, in units of the objective; 0 where there is none."""
        return [
            value / self.program.scale if abs(value) < _INFINITE else 0.0
            for value in (self.model.getDualbound(), self.model.getDualboundRoot())
        ]
