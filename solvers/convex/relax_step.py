"""One ADMM step on all rows: everything of `relax` that is not the matrix product.

Given z = A-product of the last target, and per row q = w√h, D⁻¹ = 1/(q² + floor):

    z̃ = α z + (1 − α) q⊙x                over-relaxation
    v = (z̃ + u)⊙q⊙D⁻¹                   where the projection starts from
    v ← (v − θ/2)/(1 − θ),  D⁻¹ ← D⁻¹/(1 − θ)     the concave term (θ = 0: none)
    x = argmin Σ (x − v)²/D⁻¹ on {0 ≤ x ≤ 1, Σ_group x = s}:  x = clip(v − τD⁻¹, 0, 1), τ by Newton
    u ← u + z̃ − q⊙x;    next target: q⊙x − u

In torch for any device, and compiled for the CPU, where one pass over a row that stays in cache is several
times faster than a dozen passes over all rows.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import torch
from torch import Tensor

#: |Σ x − s| at which τ is good enough, per group
_TOLERANCE = 1e-4
_NEWTON = 40
_UNGUARDED = 6


class TorchStep:
    def __init__(self, q: Tensor, inverse: Tensor, group: int, pruned: int) -> None:
        self.q, self.inverse, self.group, self.pruned = q, inverse, group, pruned
        self.x = torch.full_like(q, pruned / group)
        self.u = torch.zeros_like(q)
        self.target = q * self.x
        self.tau = q.new_zeros(q.shape[0] * (q.shape[1] // group), 1)

    def advance(self, product: Tensor, relaxation: float, theta: float) -> None:
        mixed = relaxation * product + (1 - relaxation) * self.q * self.x
        start = (mixed + self.u) * self.q * self.inverse
        start = (start - theta / 2) / (1 - theta)
        x, self.tau = project(
            start.view(-1, self.group),
            (self.inverse / (1 - theta)).view(-1, self.group),
            self.pruned,
            self.tau,
        )
        self.x = x.view_as(self.q)
        self.u += mixed - self.q * self.x
        self.target = self.q * self.x - self.u


def project(start: Tensor, inverse: Tensor, total: int, tau: Tensor) -> tuple[Tensor, Tensor]:
    """clip(start − τ·inverse, 0, 1) of row sums `total`; bracketed Newton on τ, warm.

    The sum falls with τ and is piecewise linear, so that Newton's step is exact within a piece.
    """
    low = ((start - 1) / inverse).amin(1, keepdim=True)
    high = (start / inverse).amax(1, keepdim=True)
    tau = tau.clamp(min=low, max=high)
    for _ in range(_NEWTON):
        moved = start - tau * inverse
        excess = moved.clamp(0, 1).sum(1, keepdim=True) - total
        if float(excess.abs().max()) <= _TOLERANCE:
            break
        low = torch.where(excess > 0, tau, low)
        high = torch.where(excess < 0, tau, high)
        slope = torch.where((moved > 0) & (moved < 1), inverse, 0.0).sum(1, keepdim=True)
        newton = tau + excess / slope.clamp(min=1e-30)
        inside = (newton > low) & (newton < high)
        tau = torch.where(
            excess.abs() <= _TOLERANCE, tau, torch.where(inside, newton, (low + high) / 2)
        )
    return (start - tau * inverse).clamp(0, 1), tau


class CompiledStep:
    """The same on the CPU."""

    def __init__(self, q: Tensor, inverse: Tensor, group: int, pruned: int) -> None:
        self.x = torch.full_like(q, pruned / group)
        self.target = q * self.x
        rows, n = q.shape
        groups = n // group
        # where groups are many their multipliers are sought side by side, so that SIMD has work
        across = inverse.view(rows, groups, group).mT if groups > 1 else inverse[:, :0, None]
        self._arrays = [
            t.contiguous().numpy()
            for t in (
                q,
                inverse,
                across,
                self.x,
                torch.zeros_like(q),
                self.target,
                q.new_zeros(rows, groups),
                torch.empty_like(q),
            )
        ]
        self._group, self._pruned = group, pruned

    def advance(self, product: Tensor, relaxation: float, theta: float) -> None:
        kind = self._arrays[0].dtype.type
        advance: Any = _advance
        advance(
            product.contiguous().numpy(),
            *self._arrays,
            self._group,
            kind(self._pruned),
            kind(relaxation),
            kind(theta),
        )


def make_step(q: Tensor, inverse: Tensor, group: int, pruned: int) -> TorchStep | CompiledStep:
    return (CompiledStep if q.device.type == "cpu" else TorchStep)(q, inverse, group, pruned)


_FAST = {"nnan", "ninf", "nsz", "reassoc", "contract", "arcp"}


@nb.njit(fastmath=_FAST, cache=True, error_model="numpy")
def _sums(start: np.ndarray, inverse: np.ndarray, tau: float) -> tuple[float, float]:
    """Σ clip(start − τ·inverse, 0, 1), and Σ inverse over what is strictly inside."""
    zero = start[0] * 0
    one = zero + 1
    total = zero
    slope = zero
    for j in range(len(start)):
        moved = start[j] - tau * inverse[j]
        slope += inverse[j] if (moved > zero and moved < one) else zero
        moved = moved if moved > zero else zero
        total += moved if moved < one else one
    return total, slope


@nb.njit(fastmath=_FAST, cache=True, error_model="numpy")
def _multiplier(start: np.ndarray, inverse: np.ndarray, total: float, tau: float) -> float:
    # a warm τ needs two or three Newton steps; the bracket, a pass of divisions, only if they fail
    for _ in range(_UNGUARDED):
        value, slope = _sums(start, inverse, tau)
        excess = value - total
        if abs(excess) <= _TOLERANCE:
            return tau
        if not slope > 0:
            break
        tau += excess / slope
    low = (start[0] - 1) / inverse[0]
    high = start[0] / inverse[0]
    for j in range(len(start)):
        low = min(low, (start[j] - 1) / inverse[j])
        high = max(high, start[j] / inverse[j])
    tau = min(max(tau, low), high)
    for _ in range(_NEWTON):
        value, slope = _sums(start, inverse, tau)
        excess = value - total
        if abs(excess) <= _TOLERANCE:
            break
        if excess > 0:
            low = tau
        else:
            high = tau
        newton = tau + excess / slope if slope > 0 else low
        tau = newton if low < newton < high else (low + high) / 2
    return tau


@nb.njit(fastmath=_FAST, cache=True, error_model="numpy")
def _multipliers(
    start: np.ndarray,
    inverse: np.ndarray,
    total: float,
    tau: np.ndarray,
    excess: np.ndarray,
    slope: np.ndarray,
) -> None:
    """Newton steps on τ of all groups, from start and inverse [group, groups]; unguarded.

    Where all x of a group are 0 or 1 and the slope is 0, τ goes to where the first has moved far enough.
    """
    zero = total * 0
    one = zero + 1
    groups = len(tau)
    for _ in range(_UNGUARDED):
        excess[:] = -total
        slope[:] = zero
        for i in range(len(start)):
            s_part, i_part = start[i], inverse[i]
            for g in range(groups):
                moved = s_part[g] - tau[g] * i_part[g]
                slope[g] += i_part[g] if (moved > zero and moved < one) else zero
                moved = moved if moved > zero else zero
                excess[g] += moved if moved < one else one
        worst = zero
        for g in range(groups):
            off = abs(excess[g])
            worst = max(worst, off)
            tau[g] += excess[g] / slope[g] if (off > _TOLERANCE and slope[g] > zero) else zero
        if worst <= _TOLERANCE:
            return
        for g in range(groups):
            if abs(excess[g]) > _TOLERANCE and not slope[g] > zero:
                tau[g] = _first_to_move(start[:, g], inverse[:, g], tau[g], excess[g])


@nb.njit(fastmath=_FAST, cache=True, error_model="numpy")
def _first_to_move(start: np.ndarray, inverse: np.ndarray, tau: float, excess: float) -> float:
    """The τ nearest to `tau` at which one x alone has made good the excess, or all that it can."""
    zero = excess * 0
    one = zero + 1
    part = min(max(excess, -one), one)
    best = tau
    found = False
    for i in range(len(start)):
        moved = start[i] - tau * inverse[i]
        if (moved >= one) if part > zero else (moved <= zero):
            reached = (start[i] + part - (one if part > zero else zero)) / inverse[i]
            if not found or abs(reached - tau) < abs(best - tau):
                best, found = reached, True
    return best


@nb.njit(fastmath=_FAST, cache=True, error_model="numpy")
def _project(start: np.ndarray, inverse: np.ndarray, total: float, tau: float) -> float:
    """start ← clip(start − τ·inverse, 0, 1) of the sum wanted; returns τ.

    In the metric of D⁻¹ itself: its factor 1/(1 − θ) goes into τ.
    """
    zero = start[0] * 0
    one = zero + 1
    tau = _multiplier(start, inverse, total, tau)
    for j in range(len(start)):
        moved = start[j] - tau * inverse[j]
        moved = moved if moved > zero else zero
        start[j] = moved if moved < one else one
    return tau


@nb.njit(fastmath=_FAST, cache=True, error_model="numpy")
def _project_side_by_side(
    start: np.ndarray,
    inverse: np.ndarray,
    across: np.ndarray,
    total: float,
    tau: np.ndarray,
    turned: np.ndarray,
    excess: np.ndarray,
    slope: np.ndarray,
) -> None:
    """The same for all groups of a row; `across` is inverse as [group, groups]."""
    group, groups = turned.shape
    zero = start[0] * 0
    one = zero + 1
    for i in range(group):
        for g in range(groups):
            turned[i, g] = start[g * group + i]
    _multipliers(turned, across, total, tau, excess, slope)
    for g in range(groups):
        if abs(excess[g]) > _TOLERANCE:
            part = slice(g * group, (g + 1) * group)
            tau[g] = _multiplier(start[part], inverse[part], total, tau[g])
    for i in range(group):
        t_part, i_part = turned[i], across[i]
        for g in range(groups):
            moved = t_part[g] - tau[g] * i_part[g]
            moved = moved if moved > zero else zero
            t_part[g] = moved if moved < one else one
    for i in range(group):
        for g in range(groups):
            start[g * group + i] = turned[i, g]


@nb.njit(nogil=True, fastmath=_FAST, cache=True, error_model="numpy")
def _advance(
    product: np.ndarray,
    q: np.ndarray,
    inverse: np.ndarray,
    across: np.ndarray,
    x: np.ndarray,
    u: np.ndarray,
    target: np.ndarray,
    tau: np.ndarray,
    scratch: np.ndarray,
    group: int,
    total: float,
    relaxation: float,
    theta: float,
) -> None:
    rows, n = q.shape
    kind = q.dtype.type
    one = kind(1)
    sharp = one / (one - theta)
    shift = theta / kind(2)
    groups = n // group
    turned = np.empty((group if groups > 1 else 0, groups), q.dtype)
    excess = np.empty(groups, q.dtype)
    slope = np.empty(groups, q.dtype)
    for row in range(rows):
        q_row, i_row, x_row = q[row], inverse[row], x[row]
        u_row, p_row, s_row, t_row = u[row], product[row], scratch[row], target[row]
        for j in range(n):
            u_row[j] += relaxation * p_row[j] + (one - relaxation) * q_row[j] * x_row[j]
        for j in range(n):
            s_row[j] = (u_row[j] * q_row[j] * i_row[j] - shift) * sharp
        if groups > 1:
            _project_side_by_side(s_row, i_row, across[row], total, tau[row], turned, excess, slope)
        else:
            tau[row, 0] = _project(s_row, i_row, total, tau[row, 0])
        for j in range(n):
            x_row[j] = s_row[j]
        for j in range(n):
            u_row[j] -= q_row[j] * x_row[j]
        for j in range(n):
            t_row[j] = q_row[j] * x_row[j] - u_row[j]
