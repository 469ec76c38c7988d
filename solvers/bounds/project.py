"""Projection onto {0 ≤ x ≤ 1, Σ over each group = s} in a diagonal metric."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor


def project(u: Tensor, inverse: Tensor, group: int, pruned: int, start: Tensor) -> Tensor:
    """x = clip(u − ν/d) with ν per group such that Σx = s; `start` holds ν and is updated.

    Args:
        u, inverse: [rows, n], the point and 1/d.
        start: [rows, groups].
    """
    if u.device.type == "cpu":
        x = torch.empty_like(u)
        _project(u.numpy(), inverse.numpy(), group, float(pruned), start.numpy(), x.numpy())
        return x
    rows, n = u.shape
    v, r = u.view(rows, -1, group), inverse.view(rows, -1, group)
    low = ((v - 1) / r).amin(-1, keepdim=True)
    high = (v / r).amax(-1, keepdim=True)
    for _ in range(40):
        middle = (low + high) / 2
        more = (v - middle * r).clamp(0, 1).sum(-1, keepdim=True) > pruned
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    start.copy_(((low + high) / 2)[..., 0])
    return (v - (low + high) / 2 * r).clamp(0, 1).view(rows, n)


@numba.njit(parallel=True, cache=True, fastmath=True)
def _project(u, inverse, group, pruned, start, x):  # type: ignore[no-untyped-def]
    rows, n = u.shape
    for row in numba.prange(rows):
        for g in range(n // group):
            first = g * group
            low, high = np.inf, -np.inf
            for i in range(first, first + group):
                low = min(low, (u[row, i] - 1) / inverse[row, i])
                high = max(high, u[row, i] / inverse[row, i])
            nu = min(max(start[row, g], low), high)
            for _ in range(60):
                total, slope = 0.0, 0.0
                for i in range(first, first + group):
                    value = u[row, i] - nu * inverse[row, i]
                    if value >= 1:
                        total += 1
                    elif value > 0:
                        total += value
                        slope += inverse[row, i]
                miss = total - pruned
                if abs(miss) <= 1e-6 * group:
                    break
                if miss > 0:
                    low = nu
                else:
                    high = nu
                guess = nu + miss / slope if slope > 0 else low
                nu = guess if low < guess < high else (low + high) / 2
                if high - low <= 1e-12 * (abs(low) + abs(high)):
                    break
            start[row, g] = nu
            for i in range(first, first + group):
                x[row, i] = min(max(u[row, i] - nu * inverse[row, i], 0.0), 1.0)
