"""A convex quadratic program over {0 ≤ p ≤ 1, Σ over each group = s}, by an interior-point method.

Mehrotra's predictor and corrector on min pᵀAp + cᵀp. Only used to find good points: what they prove
is the business of `Certificate.check`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg as la


def interior_point(
    a: np.ndarray,
    c: np.ndarray,
    group: int,
    pruned: int,
    *,
    constant: float = 0.0,
    tolerance: float = 1e-4,
    iterations: int = 30,
) -> np.ndarray:
    """A point whose Frank–Wolfe gap is below tolerance·|objective + constant|, if all goes well."""
    n = len(a)
    groups = n // group
    if pruned in (0, group):
        return np.full(n, float(pruned > 0))
    p = np.full(n, pruned / group)
    size = max(float(np.abs(2 * a @ p + c).mean()), 1e-12)
    low, high, nu = np.full(n, size), np.full(n, size), np.zeros(groups)
    best, least = p, np.inf
    ones = np.kron(np.eye(groups), np.ones((group, 1))) if groups > 1 else np.ones((n, 1))
    for _ in range(iterations):
        gradient = 2 * a @ p + c
        value = float(p @ a @ p + c @ p)
        lowest = np.sort(gradient.reshape(groups, group), axis=1)[:, :pruned].sum()
        gap = float(gradient @ p - lowest)
        if gap < least:
            best, least = p, gap
        if gap <= tolerance * abs(value + constant):
            break
        residual = gradient - low + high - np.repeat(nu, group)
        hessian = 2 * a
        hessian[np.diag_indices(n)] += low / p + high / (1 - p)
        try:
            factor = la.cho_factor(hessian, lower=True, overwrite_a=True, check_finite=False)
        except la.LinAlgError:
            break
        inner = la.cho_solve(factor, ones, check_finite=False)
        schur = inner.reshape(groups, group, groups).sum(1)
        mu = (low @ p + high @ (1 - p)) / (2 * n)
        miss = pruned - p.reshape(groups, group).sum(1)
        newton = _Newton(p, low, high, residual, miss, factor, inner, schur, group)

        dp, dlow, dhigh, dnu, primal, dual = newton.direction(0.0, 0.0, 0.0)
        after = (low + dual * dlow) @ (p + primal * dp)
        after += (high + dual * dhigh) @ (1 - p - primal * dp)
        target = (after / (2 * n) / mu) ** 3 * mu
        dp, dlow, dhigh, dnu, primal, dual = newton.direction(target, dp * dlow, -dp * dhigh)
        if not np.isfinite(dp).all():
            break
        p = np.clip(p + primal * dp, 1e-15, 1 - 1e-15)
        low, high, nu = low + dual * dlow, high + dual * dhigh, nu + dual * dnu
    return best


@dataclass
class _Newton:
    """One factorised Newton system, solved for several right-hand sides."""

    p: np.ndarray
    low: np.ndarray
    high: np.ndarray
    residual: np.ndarray
    miss: np.ndarray
    factor: Any
    inner: np.ndarray
    schur: np.ndarray
    group: int

    def direction(
        self, target: float, cross_low: np.ndarray | float, cross_high: np.ndarray | float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float, float]:
        p, low, high = self.p, self.low, self.high
        right = (target - cross_low) / p - low - (target - cross_high) / (1 - p) + high
        free = la.cho_solve(self.factor, right - self.residual, check_finite=False)
        sums = free.reshape(-1, self.group).sum(1)
        dnu = np.linalg.lstsq(self.schur, self.miss - sums, rcond=None)[0]
        dp = free + self.inner @ dnu
        dlow = (target - cross_low - low * dp) / p - low
        dhigh = (target - cross_high + high * dp) / (1 - p) - high
        primal = min(_reach(p, dp), _reach(1 - p, -dp))
        dual = min(_reach(low, dlow), _reach(high, dhigh))
        return dp, dlow, dhigh, dnu, primal, dual


def _reach(x: np.ndarray, dx: np.ndarray) -> float:
    falling = dx < 0
    if not falling.any():
        return 1.0
    return min(1.0, 0.995 * float((-x[falling] / dx[falling]).min()))
