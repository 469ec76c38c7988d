"""Proofs of optimality as data: the closed tree of a row's branch and bound, step by step.

What a tree proves is computed by `maskopt.certificates.proof_check`, which says what a step means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: in place of an input that is branched on: nothing follows; another step at the same node follows
LEAF, AGAIN = -1, -2
#: in place of a form: no bound but f ≥ 0
NO_FORM = -1
#: the arrays of a tree
KINDS = {
    "forms": np.float64,
    "cuts": np.int32,
    "cut_index": np.int32,
    "cut_sign": np.int8,
    "multiplier": np.float64,
    "form": np.int32,
    "branch": np.int32,
    "fixes": np.int32,
    "fixed": np.int32,
    "side": np.int8,
    "points": np.float64,
}


@dataclass(frozen=True)
class RowProof:
    """The tree of one row, its steps in preorder.

    Attributes:
        forms: float64 [forms, n], every λ.
        cuts: int32 [forms], how many triangle and pentagonal inequalities a form has.
        cut_index, cut_sign, multiplier: of all of them, as in `certificate.Cuts`, int32 and int8.
        penalty: μ.
        form: int32 [steps], which λ; NO_FORM: none.
        branch: int32 [steps], the input branched on; LEAF or AGAIN.
        fixes: int32 [steps], how many entries a step fixes.
        fixed: int32 [all of them], the inputs; side: int8, 1 pruned, 0 kept.
        points: float64, the free entries of the points of all steps that have a form.
    """

    forms: np.ndarray
    cuts: np.ndarray
    cut_index: np.ndarray
    cut_sign: np.ndarray
    multiplier: np.ndarray
    penalty: float
    form: np.ndarray
    branch: np.ndarray
    fixes: np.ndarray
    fixed: np.ndarray
    side: np.ndarray
    points: np.ndarray

    @property
    def leaves(self) -> int:
        """Where the tree ends, the other sides of fixed entries among them."""
        return int((self.branch == LEAF).sum()) + len(self.fixed)

    @property
    def nbytes(self) -> int:
        """In memory and in a file."""
        return sum(getattr(self, name).nbytes for name in KINDS)


@dataclass(frozen=True)
class Proof:
    """One tree a row; None where a row has none."""

    rows: Sequence[RowProof | None]

    @property
    def nbytes(self) -> int:
        """In memory and in a file."""
        return sum(tree.nbytes for tree in self.rows if tree is not None)
