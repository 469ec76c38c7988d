"""Exact integer programming with SCIP (PySCIPOpt)."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from maskopt.certificates.certificate import Certificate
from maskopt.core.fields import option
from maskopt.core.limits import Limits, torch_threads
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.errors import OptionError, SolverError
from maskopt.protocol.registry import missing_package
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities
from maskopt.solvers.exact.duals import Duals, qcr_duals
from maskopt.solvers.exact.incumbent import with_incumbent
from maskopt.solvers.exact.probing import probe
from maskopt.solvers.exact.refit_rows import solve_refitted
from maskopt.solvers.exact.rows import RowAnswer, RowSolver, RowTask
from maskopt.solvers.exact.scip_model import (
    FORMULATIONS,
    ScipTask,
    break_symmetry,
    presolved,
    solve_model,
    write_row,
)
from maskopt.solvers.exact.scip_refit import ScipRefitTask, search_refitted
from maskopt.solvers.exact.tree import BranchTask, Tree

FORMATS = ("cip", "lp", "mps")


@dataclass(frozen=True)
class Scip(RowSolver):
    """SCIP on one row at a time.

    A row is OPTIMAL only where SCIP says `optimal` and its bound closes the gap. Any limit gives
    SCIP's incumbent and SCIP's bound; `memory` is bytes a row. Ctrl-C ends the search: rows being
    solved return their incumbents, the rest their starts. Reports a `Trace`.
    """

    name: ClassVar[str] = "scip"
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=("cpu",),
        start="needed",
        default_start="wanda",
        proves="optimality",
        trusted=("SCIP", "presolve of maskopt and SCIP"),
        largest_n=512,
        refit=True,
        note="integer programming; proves up to about 128 inputs, beyond that a gap; of refitted weights 20",
    )

    formulation: str = option(
        "qcr",
        "of the objective; qcr: made convex by the duals of the `sdp` bound, which is handed in",
        choices=FORMULATIONS,
    )
    presolve: bool = option(
        True, "with qcr: inputs that bounds of our own fix are fixed, and SCIP has the rest"
    )
    verbose: bool = option(False, "let SCIP print (a worker process prints to stderr)")

    @classmethod
    def unavailable(cls) -> str | None:
        """See `Solver.unavailable`."""
        return missing_package("pyscipopt", "pyscipopt")

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        """See `Solver.run`."""
        assert start is not None
        if problem.refit is not None:
            return solve_refitted(
                self,
                problem,
                start,
                limits,
                search_refitted,
                self._word(),
                ScipRefitTask,
                verbose=self.verbose,
            )
        return self.solve_rows(
            problem,
            start,
            limits,
            search_row,
            self._word(presolved=self.presolve and self.formulation == "qcr"),
            ScipTask,
            formulation=self.formulation,
            presolve=self.presolve,
            verbose=self.verbose,
        )

    def _word(self, *, presolved: bool = False) -> str:
        from pyscipopt import Model

        return f"{self.capabilities.trusted[presolved]} {Model().version()}"

    def write_instance(
        self,
        row: RowProblem,
        path: str | os.PathLike[str],
        *,
        form: str = "cip",
        formulation: str = "factored",
    ) -> None:
        """See `WritesInstances.write_instance`: `cip`, `lp` or `mps`, in every formulation but `qcr`.

        Raises:
            OptionError: another format or formulation, or two that do not go together.
            SolverError: too many inputs.
        """
        if form not in FORMATS:
            raise OptionError(f"{self.name} writes {', '.join(FORMATS)}, not {form!r}")
        if formulation not in FORMULATIONS or formulation == "qcr":
            raise OptionError("formulation of an instance must be factored, linear or epigraph")
        if form == "mps" and formulation != "linear":
            raise OptionError("mps holds no quadratic constraint here: pass formulation linear")
        most = self.capabilities.largest_n
        if most is not None and row.n > most:
            raise SolverError(f"{self.name}: a row of {row.n} inputs is beyond it (at most {most})")
        layer = row.as_layer()
        first = np.arange(layer.n) % layer.group_size < layer.pruned_per_group
        task = ScipTask(
            q=row.q().cpu().numpy(),
            group=layer.group_size,
            pruned=layer.pruned_per_group,
            start=first,
            formulation=formulation,
        )
        target = Path(path)
        with tempfile.TemporaryDirectory(dir=target.absolute().parent) as folder:
            whole = Path(folder) / f"row.{form}"
            # Q has it in its entries, unless nothing is pruned
            linear = layer.linear if layer.pruned == 0 else None
            write_row(task, str(whole), 0.0 if linear is None else float(linear.constant[0]))
            os.replace(whole, target)


def search_row(task: ScipTask) -> RowAnswer:
    """Incumbent, duals, tree; what the time leaves undone is left out."""
    separable = _separable(task)
    if separable is not None:
        return separable
    task = break_symmetry(with_incumbent(task))
    if task.limits.expired:
        return RowAnswer(task.start, "timelimit")
    if task.formulation == "qcr":
        duals = qcr_duals(task)
        task = replace(task, duals=duals)
        if task.limits.expired:
            return RowAnswer(
                task.start,
                "timelimit",
                bound=duals.certified,
                root_bound=duals.certified,
                certificate=duals.certificate,
                certified=duals.certified,
            )
        if task.presolve and 0 < task.pruned < task.group and task.cost(task.start) > task.noise:
            task = _probed(task, duals)
            if task.probed is not None and task.probed.closed:
                return presolved(task)
    return solve_model(task)


def _probed(task: ScipTask, duals: Duals) -> ScipTask:
    """With what our own bounds fix, and the best mask that they came across."""
    like = {f.name: getattr(task, f.name) for f in fields(RowTask)}
    with torch_threads(1):  # its matrices are small
        tree = Tree(BranchTask(**like), duals)
        found = probe(tree)
    return break_symmetry(replace(task, start=tree.best, probed=found))


def _separable(task: ScipTask) -> RowAnswer | None:
    """The optimum of a diagonal Q, by sorting; None where Q is not diagonal.

    With λ = −diag(Q) the certificate's form is linear, and its minimum is that of the sort.
    """
    diagonal = np.diagonal(task.q)
    if np.count_nonzero(task.q - np.diag(diagonal)):
        return None
    ranks = np.argsort(diagonal.reshape(-1, task.group), axis=1, kind="stable").argsort(axis=1)
    pruned = (ranks < task.pruned).ravel()
    cost = task.cost(pruned)
    certificate = Certificate(
        diagonal=torch.from_numpy(-diagonal)[None],
        penalty=torch.zeros(1, len(diagonal) // task.group, dtype=torch.float64),
        point=torch.from_numpy(pruned.astype(float))[None],
    )
    return RowAnswer(
        pruned, "presolved", bound=cost, root_bound=cost, certificate=certificate, certified=cost
    )
