"""The tree as a search grows it, and as the proof that `maskopt.certificates.proof_check` reads."""

from __future__ import annotations

import numpy as np

from maskopt.certificates.cuts import NO_INPUT, OF_Z0
from maskopt.certificates.proof import KINDS, LEAF, NO_FORM, RowProof
from maskopt.solvers.convex.triangles import ABSENT, Pool
from maskopt.solvers.exact.tree.relaxation import Relaxed

_NOTHING = np.zeros(0)


class Step:
    """One bounding of a node: λ and triangles, the free entries of the point, the inputs that it fixed and to
    which side (1 pruned, 0 kept), and what follows below: nothing as long as the node is open, or closed.

    Without a form it is a node of which counts, or fixings, leave one mask or none.
    """

    __slots__ = ("below", "branch", "fixed", "form", "point", "side")

    def __init__(
        self,
        form: Relaxed | None = None,
        point: np.ndarray = _NOTHING,
        fixed: np.ndarray = _NOTHING,
        side: np.ndarray = _NOTHING,
    ) -> None:
        self.form, self.point, self.fixed, self.side = form, point, fixed, side
        self.branch = LEAF
        self.below: tuple[Step, ...] = ()

    @classmethod
    def of(cls, form: Relaxed, point: np.ndarray, before: np.ndarray, after: np.ndarray) -> Step:
        """A node's step, from its state with counts settled, and the state after its fixings."""
        free = before < 0
        if not free.any():
            return cls()
        fixed = np.flatnonzero(free & (after >= 0))
        return cls(form, point[free], fixed, after[fixed])

    def then(self, branch: int, *below: Step) -> None:
        """What follows: AGAIN with a step at the same node, or an input with its children, pruned first."""
        self.branch, self.below = branch, below


def row_proof(root: Step, n: int, penalty: float) -> RowProof:
    """The tree below a step, in preorder."""
    steps: list[Step] = []
    left = [root]
    while left:
        step = left.pop()
        steps.append(step)
        left += reversed(step.below)
    forms = {id(step.form): step.form for step in steps if step.form is not None}
    number = {key: place for place, key in enumerate(forms)}
    pools = [form.pool for form in forms.values()] or [Pool.empty()]
    index, sign = (np.concatenate([getattr(pool, x) for pool in pools]) for x in ("index", "sign"))
    if (index[:, 3:] == ABSENT).all():  # triangles alone
        index, sign = index[:, :3], sign[:, :2]
    parts = {
        "forms": np.array([form.lam for form in forms.values()]).reshape(-1, n),
        "cuts": [len(form.pool.tau) for form in forms.values()],
        "cut_index": np.select([index == n, index == ABSENT], [OF_Z0, NO_INPUT], index),
        "cut_sign": sign,
        "multiplier": np.concatenate([pool.tau for pool in pools]),
        "form": [NO_FORM if step.form is None else number[id(step.form)] for step in steps],
        "branch": [step.branch for step in steps],
        "fixes": [len(step.fixed) for step in steps],
        "fixed": np.concatenate([step.fixed for step in steps]),
        "side": np.concatenate([step.side for step in steps]),
        "points": np.concatenate([step.point for step in steps]),
    }
    return RowProof(penalty=penalty, **{k: np.asarray(parts[k], dtype=KINDS[k]) for k in KINDS})
