"""`branch`: exact optima of rows by branch and bound of our own, with a proof where it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

import maskopt
from maskopt.core.fields import option
from maskopt.core.limits import Limits, torch_threads
from maskopt.core.problem import LayerProblem
from maskopt.errors import OptionError
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities
from maskopt.solvers.exact.duals import qcr_duals
from maskopt.solvers.exact.incumbent import with_incumbent
from maskopt.solvers.exact.proof_tree import nothing_known
from maskopt.solvers.exact.refit_rows import solve_refitted
from maskopt.solvers.exact.refit_tree import search_refitted
from maskopt.solvers.exact.rows import RowAnswer, RowSolver
from maskopt.solvers.exact.tree import BranchTask, Tree

#: part of Σ Q_ii (of a posed problem over what is chosen) below which nodes prove nothing of an incumbent
_NOTHING = 1e-13


@dataclass(frozen=True)
class Branch(RowSolver):
    """Exact for up to about 256 inputs; beyond, a gap within the time limit. Reports a `Trace`.

    Of refitted weights by the perspective relaxation (`solvers/exact/refit_tree.py`), up to about 64.
    """

    name: ClassVar[str] = "branch"
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=("cpu",),
        start="needed",
        default_start="wanda",
        proves="optimality",
        trusted=("branch of maskopt",),
        largest_n=512,
        refit=True,
        note="branch and bound on the QCR form of the SDP bound; proves up to about 256 inputs, of "
        "refitted weights 64",
    )

    candidates: int = option(
        1, "inputs whose two children are both bounded before one is branched on", least=1
    )
    proof: bool = option(
        False, "keep the tree of every row in the solution, as a proof that `verify` checks"
    )

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        """See `Solver.run`."""
        assert start is not None
        word = f"{self.capabilities.trusted[0]} {maskopt.__version__}"
        if problem.refit is not None:
            if self.proof:
                raise OptionError(
                    "branch: the tree of refitted weights is not kept; leave `proof` out"
                )
            return solve_refitted(self, problem, start, limits, search_refitted, word)
        own = {"candidates": self.candidates, "proof": self.proof}
        return self.solve_rows(problem, start, limits, search_row, word, BranchTask, **own)


def search_row(task: BranchTask) -> RowAnswer:
    """Incumbent, duals, tree; what the time leaves undone is left out."""
    task = with_incumbent(task)
    best, cost = task.start, task.cost(task.start)
    proof = nothing_known(len(task.q)) if task.proof else None
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
    certified = RowAnswer(
        best,
        "timelimit",
        bound=duals.certified,
        root_bound=duals.certified,
        certificate=duals.certificate,
        certified=duals.certified,
    )
    if task.limits.expired:
        return certified
    threads = task.limits.threads or torch.get_num_threads()
    with torch_threads(1):  # its matrices are small
        try:
            tree = Tree(task, duals)
        except KeyboardInterrupt:
            return replace(certified, ended="userinterrupt")
        return tree.search(threads)
