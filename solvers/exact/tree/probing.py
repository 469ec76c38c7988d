"""What is known before a search: inputs that no mask below the incumbent has otherwise, by our own bounds.

An input is set to the side that the relaxation has it least on. Where the bound of what is left reaches the
cutoff, it belongs to the other side. With what has been fixed the semidefinite relaxation is solved again,
which fixes more. On rows of 64 inputs that often leaves nothing to search.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maskopt.solvers.exact.tree.quadratic import QuadraticTree
from maskopt.solvers.exact.tree.relaxation import Relaxed

#: a pass ends after so many failures one after the other, as part of the inputs
_PATIENCE = 0.25


class Probed(NamedTuple):
    """What every legal mask below the cutoff has, the first ones of its twins being pruned.

    Attributes:
        state: 1 pruned, 0 kept, −1 free, int8 [n].
        lam: λ that makes Q + μΣ_g 1_g1_gᵀ + diag(λ) ⪰ 0 on the free inputs, float64 [n].
        bound: a lower bound of their objectives; at least the cutoff (see `BestFirst`) where there are none.
    """

    state: np.ndarray
    lam: np.ndarray
    bound: float
    cutoff: float

    @property
    def closed(self) -> bool:
        """Whether no mask is left below the cutoff."""
        return self.bound >= self.cutoff

    def allows(self, pruned: np.ndarray) -> bool:
        """Whether a mask (p, bool [n]) has the sides that were found."""
        return bool(((self.state < 0) | (self.state == pruned)).all())


def probe(tree: QuadraticTree) -> Probed:
    """Fix what can be fixed at the root of a tree, whose incumbent may become a better one."""
    root = tree.start
    state, point, form, bound = root.state.copy(), root.point, root.form.relaxed, root.bound
    while bound < tree.cutoff and not tree.task.limits.expired:
        before = int((state < 0).sum())
        _fix(tree, state, point, form)
        free = int((state < 0).sum())
        if not free:  # a single mask, which this looks at
            tree.bound(state, form)
            bound = tree.cutoff
        if free in (0, before):
            break
        own = tree.convexify(state, point, form)
        again = state.copy()
        value, relaxed, _ = tree.bound(again, own)
        if value > bound:
            state, point, form, bound = again, relaxed, own, value
    return Probed(state, form.lam, bound, tree.cutoff)


def _fix(tree: QuadraticTree, state: np.ndarray, point: np.ndarray, form: Relaxed) -> None:
    """One pass over the free inputs of `state`, in place: those first that the relaxation is surest of."""
    failures = 0
    for i in np.argsort(-np.abs(point - 0.5), kind="stable"):
        if failures > _PATIENCE * len(state) or tree.task.limits.expired:
            break
        if state[i] >= 0:
            continue
        side = int(point[i] < 0.5)
        other = state.copy()
        other[i] = side
        if tree.bound(other, form)[0] >= tree.cutoff:
            state[i] = 1 - side
            failures = 0
        else:
            failures += 1
