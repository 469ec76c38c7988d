"""Branch and bound for refitted weights: the perspective relaxation at every node, best first.

The root's split d of A's diagonal, which the bound `perspective` makes, serves the whole tree. A node keeps
some inputs and has pruned others; inputs that cannot change sides without passing the incumbent are fixed by
their prices: with the dearest m of the free ones counted, one of them left out costs what it is dearer than
the next, and one of the others taken in what the last counted is dearer than it.
"""

from __future__ import annotations

import heapq
import math

import numpy as np

from maskopt.solvers.exact.refit_node import FREE, KEPT, OUT, relaxed
from maskopt.solvers.exact.refit_rows import RefitTask
from maskopt.solvers.exact.rows import RowAnswer

#: part of the objective that a node's bound is lowered by, besides the rounding of its sums
_MARGIN = 1e-9
#: parts of the sizes of its terms that C may be off by
_ROUNDING = 1e-14
#: part of the objective by which a mask must beat the incumbent to be looked for: half of what OPTIMAL allows
_WORTH = 5e-7
#: turns of v and z at a node, which begin where its parent's ended: few, since more nodes cost less than more
#: turns
_TURNS = 10


def search_refitted(task: RefitTask) -> RowAnswer:
    """One row; what the time leaves undone is left out."""
    return task.decided or _Tree(task).search()


class _Tree:
    """The tree of one row. Its fixings and its bounds hold for masks below `aim`."""

    def __init__(self, task: RefitTask) -> None:
        self.task = task
        self.best, self.cost = task.start, task.cost(task.start)
        self.kept = task.group - task.pruned
        self.open: list[tuple[float, int, np.ndarray, np.ndarray]] = []
        self.nodes = 0
        n = len(task.target)
        share = np.full(n, self.kept / task.group)
        self.root = self._add(np.zeros(n, dtype=np.int8), share, 0.0)

    @property
    def aim(self) -> float:
        """A node whose bound is no lower holds nothing that is worth looking for."""
        return self.cost * (1 - _WORTH)

    @property
    def proven(self) -> float:
        """No mask costs less."""
        return min(self.open[0][0], self.aim) if self.open else self.aim

    def search(self) -> RowAnswer:
        ended, bound = "optimal", self.proven
        try:
            while (bound := self.proven) < self.aim:
                if stopped := self._stopped(bound):
                    ended = stopped
                    break
                self._split(*heapq.heappop(self.open))
        except KeyboardInterrupt:  # the node in hand is of the bound
            ended = "userinterrupt"
        return RowAnswer(
            self.best,
            ended,
            bound=max(0.0, bound),
            slack=self.task.noise,
            nodes=self.nodes,
            root_bound=max(0.0, min(self.root, self.aim)),
        )

    def _stopped(self, bound: float) -> str:
        """The limit that is reached; empty: none."""
        task = self.task
        if task.gap_limit > 0 and bound >= self.cost * (1 - task.gap_limit):
            return "gaplimit"
        if task.limits.expired:
            return "timelimit"
        if task.node_limit is not None and self.nodes >= task.node_limit:
            return "nodelimit"
        return ""

    def _split(self, bound: float, _: int, state: np.ndarray, z: np.ndarray) -> None:
        """Both children of the free input that is nearest to neither side."""
        free = np.flatnonzero(state == FREE)
        chosen = free[np.argmin(np.abs(z[free] - 0.5))]
        for side in (KEPT, OUT):
            child = state.copy()
            child[chosen] = side
            self._add(child, z, bound)

    def _add(self, state: np.ndarray, z: np.ndarray, least: float) -> float:
        """Bound a node, and keep it where it can hold something better; its own bound."""
        self.nodes += 1
        task = self.task
        self._complete(state)
        found = relaxed(task.q, task.target, task.split, state, z, task.group, self.kept, _TURNS)
        self._round(state, found.z)
        raw = task.constant + found.value
        own = raw - _MARGIN * abs(raw) - found.rounding - _ROUNDING * task.constant
        bound = max(least, own)
        if bound >= self.aim:
            return own
        # by prices of this relaxation, and so from its own bound, not from that of its parent
        self._fix(state, found.price, self.aim - own)
        self._complete(state)
        if (state == FREE).any():
            heapq.heappush(self.open, (bound, self.nodes, state, found.z))
        else:  # one mask is left
            self._take(state != KEPT)
        return own

    def _complete(self, state: np.ndarray) -> None:
        """Groups whose count is reached have nothing free."""
        groups = state.reshape(-1, self.task.group)
        full = (groups == KEPT).sum(1) == self.kept
        groups[full[:, None] & (groups == FREE)] = OUT
        needed = (groups == OUT).sum(1) == self.task.pruned
        groups[needed[:, None] & (groups == FREE)] = KEPT

    def _fix(self, state: np.ndarray, price: np.ndarray, room: float) -> None:
        """Inputs whose other side costs more than there is room for below `aim`."""
        for first in range(0, len(state), self.task.group):
            inside = state[first : first + self.task.group]
            free = first + np.flatnonzero(inside == FREE)
            left = self.kept - int((inside == KEPT).sum())
            if not 0 < left < len(free):
                continue
            order = free[np.argsort(-price[free], kind="stable")]
            counted, others = order[:left], order[left:]
            state[counted[price[counted] - price[others[0]] > room]] = KEPT
            state[others[price[counted[-1]] - price[others] > room]] = OUT

    def _round(self, state: np.ndarray, z: np.ndarray) -> None:
        """The mask of the largest z."""
        score = np.where(state == FREE, z, np.where(state == KEPT, 2.0, -1.0))
        ranks = np.argsort(-score.reshape(-1, self.task.group), axis=1, kind="stable").argsort(1)
        self._take((ranks >= self.kept).ravel())

    def _take(self, pruned: np.ndarray) -> None:
        cost = self.task.cost(pruned)
        if cost < self.cost and not math.isnan(cost):
            self.best, self.cost = pruned, cost
