"""What a node leaves free, as the relaxations of `reconvex` and `relaxation` have it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.linalg as la

#: unit roundoff of float64
_U = 2.0**-53


class FreePart(NamedTuple):
    """f with the penalty as xᵀbx + linearᵀx + constant of the free inputs x.

    Attributes:
        state: 1 pruned, 0 kept, −1 free, int8 [n].
        free: int64 [m], the free inputs.
        b: float64 [m, m], of Q + μΣ_g 1_g1_gᵀ.
        linear: float64 [m].
        constant: of the inputs that are fixed, and of the penalty.
    """

    state: np.ndarray
    free: np.ndarray
    b: np.ndarray
    linear: np.ndarray
    constant: float


def free_part(
    q: np.ndarray, mu: float, pruned: int, same: np.ndarray, state: np.ndarray
) -> FreePart:
    """Of a node.

    Args:
        q: float64 [n, n].
        mu: μ of the penalty Σ_g (1_gᵀp − pruned)².
        same: whether two inputs share a group, float64 [n, n].
        state: see `FreePart`.
    """
    free = np.flatnonzero(state < 0)
    ones = (state == 1).astype(float)
    b = q[np.ix_(free, free)] + mu * same[np.ix_(free, free)]
    linear = 2 * (q @ ones + mu * (same @ ones))[free] - 2 * mu * pruned
    constant = float(ones @ q @ ones) + mu * float(ones @ same @ ones)
    constant += mu * pruned * (pruned * float((1 / same.sum(1)).sum()) - 2 * float(ones.sum()))
    return FreePart(state, free, b, linear, constant)


def definite(
    matrix: np.ndarray, weights: np.ndarray, point: np.ndarray, least: float
) -> np.ndarray:
    """θd with matrix + diag(θd) ⪰ 0, d = 1 or `weights`, whichever costs less at a point: θΣ d x(1 − x).

    Args:
        least: by which θ is larger than what eigenvalues ask for.
    """
    loss, correction = np.inf, np.zeros(len(matrix))
    for d in (np.ones(len(matrix)), weights):
        root = 1 / np.sqrt(d)
        m = root[:, None] * matrix * root
        low = la.eigh(m, eigvals_only=True, subset_by_index=[0, 0], check_finite=False)[0]
        # the residual of a computed eigenvalue is a small multiple of n·u·‖M‖
        rounding = 16 * len(matrix) * _U * float(np.linalg.norm(m))
        theta = max(0.0, -low) + rounding + least
        cost = theta * float(d @ (point * (1 - point)))
        if cost < loss:
            loss, correction = cost, theta * d
    return correction
