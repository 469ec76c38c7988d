"""From approximate duals of the semidefinite relaxation to what a certificate wants, one row at a time.

The duals y of the max-cut form (see `mixing`) are λ_i = 4y_i − Q_ii − ρ, μ = ρ in the terms of the convex
form A = Q + diag(λ) + ρΣ_g 1_g1_gᵀ. What is missing to A ⪰ 0 is made good by θD with D = 1 or D = y,
whichever costs less at the relaxed point. Last, p̂ minimises the convex form over the box and the sums, which
only raises the bound. All in the units of a scaled row (`mixing.scales_of`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.linalg as la

from maskopt.core.problem import LayerProblem
from maskopt.solvers.convex.interior_point import interior_point

#: part of λ_min, and of the unit of a scaled row, that the correction is larger than what was computed
_RELATIVE, _ABSOLUTE = 1e-6, 1e-9
#: least entry of D: an input without a dual gets a share of the correction all the same
_LEAST = 1e-6


class ScaledRow(NamedTuple):
    """f(p) = pᵀQp + 2lᵀp + c in the units of a scaled row.

    Attributes:
        q, linear: float64 [n, n], l [n].
        constant: c.
        group, pruned: inputs of a group, and how many of them are pruned.
    """

    q: np.ndarray
    linear: np.ndarray
    constant: float
    group: int
    pruned: int

    @classmethod
    def of(cls, problem: LayerProblem, gram: np.ndarray, row: int, scale: float) -> ScaledRow:
        """One row of a layer, whose G is given in float64."""
        w = problem.weight[row].double().cpu().numpy() * np.sqrt(scale)
        linear = w * problem.correlation[row].cpu().numpy() * np.sqrt(scale)
        constant = float(problem.constant[row]) * scale
        q = w[:, None] * gram * w[None, :]
        return cls(q, linear, constant, problem.group_size, problem.pruned_per_group)


class RowDuals(NamedTuple):
    """What a row's certificate is made of.

    Attributes:
        lam: λ [n] with A ⪰ 0.
        point: p̂ [n].
        loss: θΣD_i p̂_i(1 − p̂_i), the estimated loss to the correction.
        value: g(p̂).
    """

    lam: np.ndarray
    point: np.ndarray
    loss: float
    value: float


def penalty_of(group: int) -> float:
    """ρ for a row scaled by `scales_of`: what its sums stand up to, and no more.

    Chosen on rows of 64 … 2048 inputs, so that 400 sweeps come within 0.5% of the limit ρ → ∞.
    """
    return min(7.0, 450.0 / group**1.2)


def certify_row(
    row: ScaledRow,
    y: np.ndarray,
    inner: np.ndarray,
    rho: float,
    extra: tuple[np.ndarray, np.ndarray] | None = None,
) -> RowDuals:
    """λ with A ⪰ 0 and p̂ from approximate duals y and inner products ⟨v_i, v_0⟩.

    Args:
        extra: what was added to C in the sweeps: E [n, n] without a diagonal, and its column of v_0.
            zᵀEz + 2e_0ᵀz is then part of g.
    """
    q, group, pruned = row.q, row.group, row.pruned
    n = len(q)
    lam = 4 * y - np.diag(q) - rho
    same = np.arange(n) // group
    a = q + rho * (same[:, None] == same[None, :])
    a[np.diag_indices(n)] += lam
    linear, constant = 2 * row.linear, row.constant + rho * (n // group) * pruned**2
    if extra is not None:
        # z = 2p − 1
        matrix, column = extra
        sums = matrix.sum(1)
        a += 4 * matrix
        linear = linear + 4 * (column - sums)
        constant += float(sums.sum()) - 2 * float(column.sum())
    correction, loss = _correction(a, y, np.clip((1 + inner) / 2, 0, 1))
    lam = lam + correction
    a[np.diag_indices(n)] += correction
    linear = linear - (lam + 2 * rho * pruned)
    p = interior_point(a, linear, group, pruned, constant=constant)
    value = p @ a @ p + linear @ p + constant
    return RowDuals(lam, p, loss, float(value))


def _correction(a: np.ndarray, y: np.ndarray, relaxed: np.ndarray) -> tuple[np.ndarray, float]:
    """θD with A + θD ⪰ 0, of the D that costs least at the relaxed point, and what it costs."""
    loss, correction = np.inf, np.zeros(len(y))
    for d in (np.ones(len(y)), np.maximum(4 * y, _LEAST)):
        root = 1 / np.sqrt(d)
        least = la.eigh(
            root[:, None] * a * root[None, :],
            eigvals_only=True,
            subset_by_index=[0, 0],
            check_finite=False,
            overwrite_a=True,
        )[0]
        theta = max(0.0, -least * (1 + _RELATIVE)) + _ABSOLUTE
        cost = theta * float(d @ (relaxed * (1 - relaxed)))
        if cost < loss:
            loss, correction = cost, theta * d
    return correction, loss
