"""`branch`: exact optima of rows by branch and bound of our own, with a proof on request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from maskopt._version import __version__
from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.core.threads import torch_threads
from maskopt.errors import OptionError
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities
from maskopt.solvers.convex.perspective import greatest, shares
from maskopt.solvers.exact.rows import RowSolver, exact
from maskopt.solvers.exact.tasks import RowAnswer, RowTask, UpdatedTask
from maskopt.solvers.exact.tree.node import fix_by_slope, qcr_duals, settle
from maskopt.solvers.exact.tree.quadratic import QuadraticTree
from maskopt.solvers.exact.tree.search import MARGIN, BestFirst, Node, Step, row_proof

#: part of Σ Q_ii (of a posed problem over what is chosen) below which nodes prove nothing of an incumbent
_NOTHING = 1e-13
#: parts of the sizes of its terms that C may be off by
_ROUNDING = 1e-14
#: turns of v and z at a node, which begin where those of its parent ended: few, since more nodes cost less
#: than more turns
_TURNS = 10
_U = 2.0**-53


@dataclass(frozen=True)
class Branch(RowSolver):
    """Branch and bound: exact up to about 256 inputs, for updated weights 64; beyond, a gap."""

    name: ClassVar[str] = "branch"
    capabilities: ClassVar[Capabilities] = exact(
        trusted=("branch of maskopt",),
        largest_n=512,
        update=True,
        note="branch and bound on the QCR form of the SDP bound; proves up to about 256 inputs, of "
        "updated weights 64",
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
        """Find an incumbent, then duals, then the tree, as far as the time allows."""
        if isinstance(task, UpdatedTask):
            return task.decided or LeastSquaresTree(task).search()
        task = task.with_incumbent()
        best, cost = task.start, task.cost(task.start)
        # a single leaf: what counts settle is enough, or f ≥ 0
        proof = row_proof(Step(), len(task.q), 0.0) if self.proof else None
        if task.pruned in (0, task.group):
            return RowAnswer(best, "optimal", bound=cost, root_bound=cost, proof=proof)
        # of a posed objective a penalty on what is not chosen must not hide how much values differ
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
                tree = QuadraticTree(task, duals, proof=self.proof)
            except KeyboardInterrupt:
                return duals.answer(best, "userinterrupt")
            return tree.search(threads)


class LeastSquaresTree(BestFirst):
    """The tree of a row whose kept weights are updated, by the perspective relaxation (`convex.perspective`).

    The root's split d of A's diagonal, which the bound `perspective` makes, serves the whole tree. A node
    keeps some inputs (z = 1), has pruned others (v = 0, and no price) and relaxes the rest; its `point` is z.
    Inputs that cannot change sides without passing the incumbent are fixed by their prices, of which as many
    count as are kept.
    """

    task: UpdatedTask

    def __init__(self, task: UpdatedTask) -> None:
        super().__init__(task)
        self.kept = task.group - task.pruned
        n = len(task.target)
        share = np.full(n, self.kept / task.group)
        self.root_bound, self.start = self.bounded(np.full(n, -1, dtype=np.int8), share, 0.0)

    def claims(self) -> dict[str, float]:
        return {"slack": self.task.noise}

    def branch(self, node: Node) -> list[Node]:
        """Return both children of the free input that is nearest to neither side."""
        free = np.flatnonzero(node.state < 0)
        chosen = free[np.argmin(np.abs(node.point[free] - 0.5))]
        children = []
        for side in (0, 1):
            state = node.state.copy()
            state[chosen] = side
            children.append(self.bounded(state, node.point, node.bound)[1])
        return children

    def bounded(self, state: np.ndarray, z: np.ndarray, least: float) -> tuple[float, Node]:
        """Return the bound that the relaxation of a node proves, and the node, no lower than its parent.

        Inputs of `state` are fixed in place; the turns begin at z, float64 [n].
        """
        task = self.task
        settle(state, task)
        z, price, proven = self._relaxed(state, z)
        score = np.where(state < 0, z, np.where(state == 0, 2.0, -1.0))
        self.take(~task.first(-score, self.kept))
        bound = max(least, proven)
        if bound < self.cutoff:
            groups = state.reshape(-1, task.group)
            slope = np.where(state < 0, -price, np.inf).reshape(groups.shape)
            left = self.kept - (groups == 0).sum(1)
            # by prices of this relaxation, and so from its own bound, not from that of its parent
            fix_by_slope(groups, slope, left, self.cutoff - proven, side=0)
            settle(state, task)
            if not (state < 0).any():  # one mask is left
                self.take(state == 1)
                bound = np.inf
        return proven, Node(bound, 0, state, z)

    def _relaxed(self, state: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Return z, prices and bound of a node that leaves something to keep in every group.

        The prices are (b − Bv)ⱼ²/dⱼ, 0 of what is pruned, float64 [n]; the bound is C − vᵀBv less the prices
        that count, and less what rounding may have added.
        """
        task, group = self.task, self.task.group
        n, active = len(z), np.flatnonzero(state != 1)
        base = task.q[np.ix_(active, active)]
        split, target = task.split[active], task.target[active]
        on_diagonal = np.diag_indices(len(active))
        base[on_diagonal] -= split
        size = np.zeros(n)
        size[state == 0] = np.inf
        free = state[active] < 0
        z = np.where(state == 0, 1.0, z)
        for _ in range(_TURNS):
            matrix = base.copy()
            matrix[on_diagonal] += split / z[active]
            v = np.linalg.solve(matrix, target)
            size[active[free]] = (np.sqrt(split) * np.abs(v))[free]
            z = shares(size, group, self.kept)
        image = base @ v
        price = np.zeros(n)
        price[active] = (target - image) ** 2 / split
        value = -float(v @ image) - greatest(price, group, self.kept, state == 0)
        raw = task.constant + value
        # |B_ij| ≤ 1, so that b − Bv is off by no more than n·u times this
        reach = float(np.abs(v).sum() + np.abs(target).max(initial=0.0))
        highest = float(np.sqrt(price[active] / split).sum())
        rounding = 4 * (n + 8) * _U * (reach * (reach + 2 * highest) + abs(value))
        return z, price, raw - MARGIN * abs(raw) - rounding - _ROUNDING * task.constant
