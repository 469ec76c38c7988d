"""`branch`: exact optima of rows by branch and bound of our own, with a proof on request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt._version import __version__
from maskopt.core.fields import option
from maskopt.core.limits import Limits, torch_threads
from maskopt.core.problem import LayerProblem
from maskopt.errors import OptionError
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities
from maskopt.solvers.exact.incumbent import with_incumbent
from maskopt.solvers.exact.rows import RowSolver, exact
from maskopt.solvers.exact.tasks import RowAnswer, RowTask, UpdatedTask
from maskopt.solvers.exact.tree.convexify import qcr_duals
from maskopt.solvers.exact.tree.least_squares import LeastSquaresTree
from maskopt.solvers.exact.tree.quadratic import QuadraticTree
from maskopt.solvers.exact.tree.search import Step, row_proof

#: part of Σ Q_ii (of a posed problem over what is chosen) below which nodes prove nothing of an incumbent
_NOTHING = 1e-13


@dataclass(frozen=True)
class Branch(RowSolver):
    """Exact up to about 256 inputs, for updated weights 64; beyond, a gap within the time limit."""

    name: ClassVar[str] = "branch"
    capabilities: ClassVar[Capabilities] = exact(
        trusted=("branch of maskopt",),
        largest_n=512,
        update=True,
        note="branch and bound on the QCR form of the SDP bound; proves up to about 256 inputs, of "
        "updated weights 64",
    )

    candidates: int = option(
        1, "inputs whose two children are both bounded before one is branched on", least=1
    )
    proof: bool = option(
        False, "keep the tree of every row in the solution, as a proof that `verify` checks"
    )

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        if self.proof and problem.update is not None:
            raise OptionError("branch: the tree of updated weights is not kept; leave `proof` out")
        return super().run(problem, start, limits)

    def trusted_name(self, problem: LayerProblem) -> str:
        return f"{self.capabilities.trusted[0]} {__version__}"

    def search_row(self, task: RowTask) -> RowAnswer:
        """Incumbent, duals, tree; what the time leaves undone is left out."""
        if isinstance(task, UpdatedTask):
            return LeastSquaresTree(task).search()
        task = with_incumbent(task)
        best, cost = task.start, task.cost(task.start)
        # a single leaf: what counts settle is enough, or f ≥ 0
        proof = row_proof(Step(), len(task.q), 0.0) if self.proof else None
        if task.pruned in (0, task.group):
            return RowAnswer(best, "optimal", bound=cost, root_bound=cost, proof=proof)
        # of somebody's objective a penalty on what is not chosen must not hide what the values differ by
        counted = slice(None) if task.zero is None else task.start
        if cost <= _NOTHING * float(task.q.diagonal()[counted].sum()):
            # the sums of a node lose more than the cost; only one that is itself rounding is proven
            ended = "optimal" if cost <= task.rounding(best) else "precision"
            return RowAnswer(best, ended, proof=proof)
        if task.limits.expired:
            return RowAnswer(best, "timelimit")
        duals = qcr_duals(task)
        if task.limits.expired:
            return duals.answer(best, "timelimit")
        threads = task.limits.threads or torch.get_num_threads()
        with torch_threads(1):  # its matrices are small
            try:
                tree = QuadraticTree(task, duals, candidates=self.candidates, proof=self.proof)
            except KeyboardInterrupt:
                return duals.answer(best, "userinterrupt")
            return tree.search(threads)
