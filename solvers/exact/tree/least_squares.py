"""The tree of a row whose kept weights are updated: the perspective relaxation (`convex.perspective`).

The root's split d of A's diagonal, which the bound `perspective` makes, serves the whole tree. A node keeps
some inputs (z = 1), has pruned others (v = 0, and no price) and relaxes the rest. Inputs that cannot change
sides without passing the incumbent are fixed by their prices: with the most expensive m of the free ones
counted, leaving one of them out costs its difference from the next, and taking one of the others in costs
the difference of the last counted from it.
"""

from __future__ import annotations

import numpy as np

from maskopt.solvers.convex.perspective import greatest, shares
from maskopt.solvers.exact.tasks import UpdatedTask
from maskopt.solvers.exact.tree.node import settle
from maskopt.solvers.exact.tree.search import MARGIN, BestFirst, Node

#: parts of the sizes of its terms that C may be off by
_ROUNDING = 1e-14
#: turns of v and z at a node, which begin where those of its parent ended: few, since more nodes cost less
#: than more turns
_TURNS = 10
_U = 2.0**-53


class LeastSquaresTree(BestFirst):
    """The tree of one row; `point` of a node is z."""

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
        """Both children of the free input that is nearest to neither side."""
        free = np.flatnonzero(node.state < 0)
        chosen = free[np.argmin(np.abs(node.point[free] - 0.5))]
        children = []
        for side in (0, 1):
            state = node.state.copy()
            state[chosen] = side
            children.append(self.bounded(state, node.point, node.bound)[1])
        return children

    def bounded(self, state: np.ndarray, z: np.ndarray, least: float) -> tuple[float, Node]:
        """What the relaxation of a node proves, and the node, whose bound is at least that of its parent.
        Inputs of `state` are fixed; the turns begin at z, float64 [n]."""
        task = self.task
        settle(state, task.group, task.pruned, [])
        z, price, value, rounding = self._relaxed(state, z)
        score = np.where(state < 0, z, np.where(state == 0, 2.0, -1.0))
        self._take(~task.first(-score, self.kept))
        raw = task.constant + value
        own = raw - MARGIN * abs(raw) - rounding - _ROUNDING * task.constant
        bound = max(least, own)
        if bound < self.cutoff:
            # by prices of this relaxation, and so from its own bound, not from that of its parent
            self._fix(state, price, self.cutoff - own)
            settle(state, task.group, task.pruned, [])
            if not (state < 0).any():  # one mask is left
                self._take(state == 1)
                bound = np.inf
        return own, Node(bound, 0, state, z)

    def _take(self, pruned: np.ndarray) -> None:
        self.take(pruned, self.task.cost(pruned))

    def _relaxed(
        self, state: np.ndarray, z: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, float, float]:
        """The relaxation of a node that leaves something to keep in every group: z, and the prices (b −
        Bv)ⱼ²/dⱼ, 0 of what is pruned, float64 [n]; the bound less C, −vᵀBv less the prices that count; its
        rounding."""
        task, group = self.task, self.task.group
        n, active = len(z), np.flatnonzero(state != 1)
        base = task.q[np.ix_(active, active)]
        split, target = task.split[active], task.target[active]
        on_diagonal = slice(None, None, len(active) + 1)
        base.reshape(-1)[on_diagonal] -= split
        size = np.zeros(n)
        size[state == 0] = np.inf
        free = state[active] < 0
        z = np.where(state == 0, 1.0, z)
        for _ in range(_TURNS):
            matrix = base.copy()
            matrix.reshape(-1)[on_diagonal] += split / z[active]
            v = np.linalg.solve(matrix, target)
            size[active[free]] = (np.sqrt(split) * np.abs(v))[free]
            z = shares(size, group, self.kept)
        image = base @ v
        price = np.zeros(n)
        price[active] = (target - image) ** 2 / split
        value = -float(v @ image) - greatest(price, group, self.kept, state == 0)
        # |B_ij| ≤ 1, so that b − Bv is off by no more than n·u times this
        reach = float(np.abs(v).sum() + np.abs(target).max(initial=0.0))
        highest = float(np.sqrt(price[active] / split).sum())
        terms = reach * (reach + 2 * highest) + abs(value)
        return z, price, value, 4 * (n + 8) * _U * terms

    def _fix(self, state: np.ndarray, price: np.ndarray, room: float) -> None:
        """Inputs whose other side costs more than there is room for below the cutoff."""
        for first in range(0, len(state), self.task.group):
            inside = state[first : first + self.task.group]
            free = first + np.flatnonzero(inside < 0)
            left = self.kept - int((inside == 0).sum())
            if not 0 < left < len(free):
                continue
            order = free[np.argsort(-price[free], kind="stable")]
            counted, others = order[:left], order[left:]
            state[counted[price[counted] - price[others[0]] > room]] = 0
            state[others[price[counted[-1]] - price[others] > room]] = 1
