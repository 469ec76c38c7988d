"""From approximate duals of the semidefinite relaxation to a certificate, one row at a time.

The duals y of the max-cut form (see `mixing`) are λ_i = 4y_i − Q_ii − ρ, μ = ρ in the terms of the convex
form A = Q + diag(λ) + ρΣ_g 1_g1_gᵀ. A missing A ⪰ 0 is made good by θD with D = 1 or D = y, whichever costs
less at the relaxed point. Last, p̂ minimises the convex form over the box and the sums, which only raises the
bound. All in the units of a scaled row (`mixing.scales_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg as la
import torch
from torch import Tensor

from maskopt.certificates.certificate import Certificate
from maskopt.certificates.cuts import Cuts
from maskopt.core.problem import LayerProblem
from maskopt.solvers.convex.interior_point import interior_point

#: part of λ_min, and of the unit of a scaled row, that the correction is larger than what was computed
_RELATIVE, _ABSOLUTE = 1e-6, 1e-9
#: least entry of D: an input without a dual gets a share of the correction all the same
_LEAST = 1e-6


class ScaledRow(NamedTuple):
    """f(p) = pᵀQp + 2lᵀp + c of a scaled row, Q [n, n] and l [n] float64; `pruned` inputs of each group."""

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
    """Of a row's certificate: λ [n] with A ⪰ 0, p̂ [n], the loss θΣD_i p̂_i(1 − p̂_i) to the correction,
    g(p̂)."""

    lam: np.ndarray
    point: np.ndarray
    loss: float
    value: float


def certificate_of(
    problem: LayerProblem,
    rows: Sequence[RowDuals],
    penalty: np.ndarray,
    scale: np.ndarray,
    cuts: Sequence[Cuts] | None = None,
) -> tuple[Certificate, Tensor]:
    """The certificate of all rows, and the loss to the correction as part of the bound, float64 [rows].
    `penalty`, `scale`: ρ of every row, and the factor of its Q, float64 [rows]; `cuts`: in the units of the
    objective."""
    like: dict[str, Any] = {"dtype": torch.float64, "device": problem.device}
    groups = problem.n // problem.group_size
    certificate = Certificate(
        torch.as_tensor(np.stack([row.lam for row in rows]) / scale[:, None], **like),
        torch.as_tensor(penalty / scale, **like)[:, None].repeat(1, groups),
        torch.as_tensor(np.stack([row.point for row in rows]), **like),
        cuts=cuts,
    )
    loss, value = np.array([row.loss for row in rows]), np.array([row.value for row in rows])
    part = np.divide(loss, value, out=np.zeros(len(rows)), where=value > 0)
    return certificate, torch.from_numpy(np.where(np.isnan(loss), np.nan, part))


def penalty_of(group: int) -> float:
    """ρ for a scaled row: chosen at n = 64 … 2048 so that 400 sweeps come within 0.5% of ρ → ∞."""
    return min(7.0, 450.0 / group**1.2)


def certify_row(
    row: ScaledRow,
    y: np.ndarray,
    inner: np.ndarray,
    rho: float,
    extra: tuple[np.ndarray, np.ndarray] | None = None,
) -> RowDuals:
    """λ with A ⪰ 0 and p̂ from approximate duals y and inner products ⟨v_i, v_0⟩. `extra`: E [n, n] without a
    diagonal, and its column of v_0, in the sweeps' C; then g has zᵀEz + 2e_0ᵀz, too."""
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
    relaxed = np.clip((1 + inner) / 2, 0, 1)
    added, loss = correction(a, np.maximum(4 * y, _LEAST), relaxed, _enough)
    lam = lam + added
    a[np.diag_indices(n)] += added
    linear = linear - (lam + 2 * rho * pruned)
    p = interior_point(a, linear, group, pruned, constant=constant)
    value = p @ a @ p + linear @ p + constant
    return RowDuals(lam, p, loss, float(value))


def correction(
    a: np.ndarray,
    weights: np.ndarray,
    point: np.ndarray,
    enough: Callable[[float, np.ndarray], float],
) -> tuple[np.ndarray, float]:
    """θd with A + diag(θd) ⪰ 0, and its cost θΣ dᵢxᵢ(1 − xᵢ) at a point: of d = 1 and d = `weights` the
    cheaper one. `enough`: θ by the least eigenvalue of A, scaled by d, and that matrix."""
    loss, found = np.inf, np.zeros(len(a))
    for d in (np.ones(len(a)), weights):
        root = 1 / np.sqrt(d)
        scaled = root[:, None] * a * root
        least = la.eigh(scaled, eigvals_only=True, subset_by_index=[0, 0], check_finite=False)[0]
        theta = enough(least, scaled)
        cost = theta * float(d @ (point * (1 - point)))
        if cost < loss:
            loss, found = cost, theta * d
    return found, loss


def _enough(least: float, _: np.ndarray) -> float:
    return max(0.0, -least * (1 + _RELATIVE)) + _ABSOLUTE
