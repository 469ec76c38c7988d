# mypy: disallow-untyped-defs=False
"""The search among the candidates of one row, compiled: their small tableau, exchanged pair by pair."""

from __future__ import annotations

import numpy as np

from maskopt.solvers.compiled import loop, part


@part(nogil=True)
def _pivot(z, y, i, j, lines):
    """Slots i (kept) and j (pruned) change places: `Row.exchange` of a single pair."""
    size = len(y)
    scale = 1.0 / (z[i, i] * z[j, j] - z[i, j] * z[i, j])
    w_ii, w_ij, w_jj = z[j, j] * scale, -z[i, j] * scale, z[i, i] * scale
    y_i, y_j = y[i], y[j]
    for k in range(size):
        lines[0, k], lines[1, k] = z[i, k], z[j, k]
    for k in range(size):
        lines[2, k] = lines[0, k] * w_ii + lines[1, k] * w_ij
        lines[3, k] = lines[0, k] * w_ij + lines[1, k] * w_jj
    for k in range(size):
        left, right = lines[2, k], lines[3, k]
        y[k] -= left * y_i + right * y_j
        for m in range(size):
            z[k, m] -= left * lines[0, m] + right * lines[1, m]
    for k in range(size):
        z[k, i] = z[i, k] = lines[3, k]
        z[k, j] = z[j, k] = -lines[2, k]
    z[i, i], z[j, j] = -w_jj, -w_ii
    z[i, j] = z[j, i] = w_ij
    y[i] = w_ij * y_i + w_jj * y_j
    y[j] = -(w_ii * y_i + w_ij * y_j)


@loop(nogil=True)
def exchanges(z, y, who, group, count, threshold, most):
    """The best exchange among the candidates, again and again, until none is below −threshold.

    Args:
        z: [size, size], T of the candidates, the first `count` of them kept; changed in place.
        y: [size], their v and r; changed in place.
        who: int64 [size], which candidate is in a slot; changed in place.
        group: int64 [size], of each candidate; only those of one group are exchanged.
        most: exchanges at most.

    Returns:
        How many were made.
    """
    size = len(y)
    made = 0
    lines = np.empty((4, size))
    lone, saved, inverse = np.empty(size), np.empty(size), np.empty(size)
    while made < most:
        for j in range(count, size):
            inverse[j] = 1.0 / z[j, j]
            lone[j] = y[j] * inverse[j]
            saved[j] = y[j] * lone[j]
        best, u, p = -threshold, -1, -1
        for i in range(count):
            own, v, mine = -z[i, i], y[i], group[who[i]]
            for j in range(count, size):
                b = z[i, j]
                left = v - b * lone[j]
                delta = left * left / (own + b * b * inverse[j]) - saved[j]
                if delta < best and group[who[j]] == mine:
                    best, u, p = delta, i, j
        if u < 0:
            break
        _pivot(z, y, u, p, lines)
        who[u], who[p] = who[p], who[u]
        made += 1
    return made
