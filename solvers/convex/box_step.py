# mypy: disallow-untyped-defs=False
"""One ADMM step on all rows: everything of the box relaxation but the matrix product.

Given z = A-product of the last target, and per row q = w√h, D⁻¹ = 1/(q² + floor):

    z̃ = α z + (1 − α) q⊙x                over-relaxation
    v = (z̃ + u)⊙q⊙D⁻¹                   where the projection starts from
    v ← (v − θ/2)/(1 − θ),  D⁻¹ ← D⁻¹/(1 − θ)     the concave term (θ = 0: none)
    x = argmin Σ (x − v)²/D⁻¹ on {0 ≤ x ≤ 1, Σ_group x = s}:  x = clip(v − τD⁻¹, 0, 1), τ by Newton
    u ← u + z̃ − q⊙x;    next target: q⊙x − u

The sum of a group falls with its τ and is piecewise linear, so that Newton's step on τ is exact within a
piece; a τ that is warm needs two or three. In torch for any device, and compiled for the CPU, several times
faster by one pass over a row in cache: a row as one group, or all groups of a row side by side. For a shared
budget within limits, in torch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maskopt.solvers.kernels import njit

#: |Σ x − s| at which τ is good enough, per group; and as a part of s, of groups whose sum float32 rounds
_TOLERANCE, _RELATIVE = 1e-4, 1e-6
#: steps at most, guarded by a bracket; and before the bracket is looked for
_NEWTON = 40
_UNGUARDED = 6

#: what the compiled loops may do with sums; nothing in here is infinite or NaN
FAST = {"nnan", "ninf", "nsz", "reassoc", "contract", "arcp"}


@njit(fastmath=FAST, error_model="numpy")
def _sums(start, inverse, tau):
    """Return Σ clip(start − τ·inverse, 0, 1), and Σ inverse over what is strictly inside."""
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


@njit(fastmath=FAST, error_model="numpy")
def _multiplier(start, inverse, total, tau):
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


@njit(fastmath=FAST, error_model="numpy")
def _multipliers(start, inverse, total, tau, excess, slope):
    """Make Newton steps on τ of all groups, unguarded, from start and inverse [group, groups].

    Where the slope is 0, τ goes to where the first x of the group has moved far enough.
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


@njit(fastmath=FAST, error_model="numpy")
def _first_to_move(start, inverse, tau, excess):
    """Return the τ nearest to `tau` at which one x alone has made good the excess, or all that it can."""
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


@njit(fastmath=FAST, error_model="numpy")
def project_row(start, inverse, total, tau):
    """Set start ← clip(start − τ·inverse, 0, 1) of the wanted sum; return τ, with its factor 1/(1 − θ)."""
    zero = start[0] * 0
    one = zero + 1
    tau = _multiplier(start, inverse, total, tau)
    for j in range(len(start)):
        moved = start[j] - tau * inverse[j]
        moved = moved if moved > zero else zero
        start[j] = moved if moved < one else one
    return tau


@njit(fastmath=FAST, error_model="numpy")
def project_side_by_side(start, inverse, across, total, tau, turned, excess, slope):
    """Project all groups of a row likewise; `across` is inverse as [group, groups]."""
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


def project(start: Tensor, inverse: Tensor, total: int, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Return clip(start − τ·inverse, 0, 1) of row sums `total`, and τ [rows, 1], by bracketed Newton steps.

    `start`, `inverse`: [rows, n], a row is one group; `tau`: where to begin.
    """
    enough = max(_TOLERANCE, _RELATIVE * total)
    low = ((start - 1) / inverse).amin(1, keepdim=True)
    high = (start / inverse).amax(1, keepdim=True)
    tau = tau.clamp(min=low, max=high)
    for _ in range(_NEWTON):
        moved = start - tau * inverse
        excess = moved.clamp(0, 1).sum(1, keepdim=True) - total
        if float(excess.abs().max()) <= enough:
            break
        low = torch.where(excess > 0, tau, low)
        high = torch.where(excess < 0, tau, high)
        slope = torch.where((moved > 0) & (moved < 1), inverse, 0.0).sum(1, keepdim=True)
        newton = tau + excess / slope.clamp(min=1e-30)
        inside = (newton > low) & (newton < high)
        tau = torch.where(
            excess.abs() <= enough, tau, torch.where(inside, newton, (low + high) / 2)
        )
    return (start - tau * inverse).clamp(0, 1), tau


#: τ [1, 1] of a layer with a shared budget within limits; per row, [rows, 1], the τ at which it has the most
#: that it may, and the least
Multipliers = tuple[Tensor, Tensor, Tensor]


def project_within(
    start: Tensor, inverse: Tensor, total: int, limits: tuple[int, int], warm: Multipliers
) -> tuple[Tensor, Multipliers]:
    """Return clip(start − τᵣ·inverse, 0, 1) of sum `total`, whose row sums are within `limits`.

    All rows have one τ, except rows at a limit, whose own τ takes them there (Kuhn–Tucker conditions). So the
    sum is again one of τ alone, piecewise linear and falling.
    """
    (least, most), (tau, lowest, highest) = limits, warm
    lowest = project(start, inverse, most, lowest)[1]
    highest = project(start, inverse, least, highest)[1].maximum(lowest)
    enough = max(_TOLERANCE * len(start), _RELATIVE * total)
    low, high = lowest.amin(), highest.amax()
    tau = tau.clamp(min=low, max=high)
    for _ in range(_NEWTON):
        each = tau.clamp(min=lowest, max=highest)
        moved = start - each * inverse
        excess = moved.clamp(0, 1).sum() - total
        if float(excess.abs()) <= enough:
            break
        low, high = (tau, high) if excess > 0 else (low, tau)
        held = (each <= lowest) | (each >= highest)
        inside = (moved > 0) & (moved < 1) & ~held
        newton = tau + excess / torch.where(inside, inverse, 0.0).sum().clamp(min=1e-30)
        tau = newton if low < newton < high else (low + high) / 2
    each = tau.clamp(min=lowest, max=highest)
    return (start - each * inverse).clamp(0, 1), (tau, lowest, highest)


class TorchStep:
    """The step on any device."""

    def __init__(self, q: Tensor, inverse: Tensor, group: int, pruned: int) -> None:
        self.q, self.inverse, self.group, self.pruned = q, inverse, group, pruned
        self.x = torch.full_like(q, pruned / group)
        self.u = torch.zeros_like(q)
        self.target = q * self.x
        self.tau = q.new_zeros(q.numel() // group, 1)

    def advance(self, product: Tensor, relaxation: float, theta: float) -> None:
        mixed = relaxation * product + (1 - relaxation) * self.q * self.x
        start = (mixed + self.u) * self.q * self.inverse
        self.x = self._projected((start - theta / 2) / (1 - theta), 1 - theta)
        self.u += mixed - self.q * self.x
        self.target = self.q * self.x - self.u

    def _projected(self, start: Tensor, less: float) -> Tensor:
        shape = -1, self.group
        inverse = (self.inverse / less).view(shape)
        x, self.tau = project(start.view(shape), inverse, self.pruned, self.tau)
        return x.view_as(self.q)


class SharedBudgetStep(TorchStep):
    """The step for a shared budget, under which the layer is one group.

    `metric` [rows, n] is 1 over what a row counts in the sum; `limits`: least and most of a row.
    """

    def __init__(
        self, q: Tensor, inverse: Tensor, pruned: int, metric: Tensor, limits: tuple[int, int]
    ) -> None:
        super().__init__(q, inverse, q.numel(), pruned)
        self.metric, self.limits = metric, limits
        each = q.new_zeros(len(q), 1)
        self.multipliers = self.tau, each, each

    def _projected(self, start: Tensor, less: float) -> Tensor:
        inverse = self.metric / less
        if self.limits == (0, self.q.shape[1]):
            x, self.tau = project(start.view(1, -1), inverse.view(1, -1), self.pruned, self.tau)
            return x.view_as(self.q)
        x, self.multipliers = project_within(
            start, inverse, self.pruned, self.limits, self.multipliers
        )
        return x


class CompiledStep:
    """The step on the CPU, compiled."""

    def __init__(self, q: Tensor, inverse: Tensor, group: int, pruned: int) -> None:
        self.x = torch.full_like(q, pruned / group)
        self.target = q * self.x
        rows, n = q.shape
        groups = n // group
        # where groups are many their multipliers are sought side by side, so that SIMD has work
        across = inverse.view(rows, groups, group).mT if groups > 1 else inverse[:, :0, None]
        u, tau, scratch = torch.zeros_like(q), q.new_zeros(rows, groups), torch.empty_like(q)
        arrays = q, inverse, across.contiguous(), self.x, u, self.target, tau, scratch
        self._arrays = tuple(array.numpy() for array in arrays)
        self._group, self._pruned = group, pruned

    def advance(self, product: Tensor, relaxation: float, theta: float) -> None:
        numbers = map(self._arrays[0].dtype.type, (self._pruned, relaxation, theta))
        _advance(product.contiguous().numpy(), self._arrays, self._group, *numbers)


@njit(fastmath=FAST, error_model="numpy")
def _advance(product, arrays, group, total, relaxation, theta):
    """Make one step.

    `arrays`: q, inverse, x, u, target as above, and scratch, [rows, n]; `across`: D⁻¹ with a row's groups
    side by side [rows, group, groups], empty with one group; `tau`: multipliers [rows, groups].
    """
    q, inverse, across, x, u, target, tau, scratch = arrays
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
            project_side_by_side(s_row, i_row, across[row], total, tau[row], turned, excess, slope)
        else:
            tau[row, 0] = project_row(s_row, i_row, total, tau[row, 0])
        for j in range(n):
            x_row[j] = s_row[j]
        for j in range(n):
            u_row[j] -= q_row[j] * x_row[j]
        for j in range(n):
            t_row[j] = q_row[j] * x_row[j] - u_row[j]
