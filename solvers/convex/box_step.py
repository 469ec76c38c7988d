# mypy: disallow-untyped-defs=False
"""One ADMM step on all rows: everything of the box relaxation but the matrix product.

Given z = A-product of the last target, and per row q = w√h, D⁻¹ = 1/(q² + floor):

    z̃ = α z + (1 − α) q⊙x                over-relaxation
    v = (z̃ + u)⊙q⊙D⁻¹                   where the projection starts from
    v ← (v − θ/2)/(1 − θ),  D⁻¹ ← D⁻¹/(1 − θ)     the concave term (θ = 0: none)
    x = argmin Σ (x − v)²/D⁻¹ on {0 ≤ x ≤ 1, Σ_group x = s}:  x = clip(v − τD⁻¹, 0, 1), τ by Newton
    u ← u + z̃ − q⊙x;    next target: q⊙x − u

In torch for any device, and compiled for the CPU, several times faster by one pass over a row in cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskopt.solvers.compiled import loop
from maskopt.solvers.convex.projection import (
    FAST,
    Multipliers,
    project,
    project_row,
    project_side_by_side,
    project_within,
)


class TorchStep:
    """On any device."""

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


class PooledStep(TorchStep):
    """With a shared budget the layer is one group, in a metric of what its rows count in the sum (`metric`: 1
    over that, [rows, n]); `limits`: least and most of a row."""

    def __init__(
        self, q: Tensor, inverse: Tensor, pruned: int, metric: Tensor, limits: tuple[int, int]
    ) -> None:
        super().__init__(q, inverse, q.numel(), pruned)
        self.metric, self.limits = metric, limits
        each = q.new_zeros(len(q), 1)
        self.multipliers = Multipliers(self.tau, each, each)

    def _projected(self, start: Tensor, less: float) -> Tensor:
        inverse = self.metric / less
        if self.limits == (0, self.q.shape[1]):
            x, self.tau = project(start.view(1, -1), inverse.view(1, -1), self.pruned, self.tau)
            return x.view_as(self.q)
        x, self.multipliers = project_within(
            start, inverse, self.pruned, self.limits, self.multipliers
        )
        return x


class _Rows(NamedTuple):
    """Of a step [rows, n]: q, inverse, x, u, target as above, and scratch. `across`: D⁻¹ with a row's groups
    side by side [rows, group, groups], empty with one group; `tau`: multipliers [rows, groups]."""

    q: np.ndarray
    inverse: np.ndarray
    across: np.ndarray
    x: np.ndarray
    u: np.ndarray
    target: np.ndarray
    tau: np.ndarray
    scratch: np.ndarray


class CompiledStep:
    """The same on the CPU."""

    def __init__(self, q: Tensor, inverse: Tensor, group: int, pruned: int) -> None:
        self.x = torch.full_like(q, pruned / group)
        self.target = q * self.x
        rows, n = q.shape
        groups = n // group
        # where groups are many their multipliers are sought side by side, so that SIMD has work
        across = inverse.view(rows, groups, group).mT if groups > 1 else inverse[:, :0, None]
        self._rows = _Rows(
            q.numpy(),
            inverse.numpy(),
            across.contiguous().numpy(),
            self.x.numpy(),
            torch.zeros_like(q).numpy(),
            self.target.numpy(),
            q.new_zeros(rows, groups).numpy(),
            torch.empty_like(q).numpy(),
        )
        self._group, self._pruned = group, pruned

    def advance(self, product: Tensor, relaxation: float, theta: float) -> None:
        kind = self._rows.q.dtype.type
        advance: Any = _advance
        advance(
            product.contiguous().numpy(),
            self._rows,
            self._group,
            kind(self._pruned),
            kind(relaxation),
            kind(theta),
        )


@loop(nogil=True, fastmath=FAST, error_model="numpy")
def _advance(product, of, group, total, relaxation, theta):
    q, inverse, across, x, u, target, tau, scratch = of
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
