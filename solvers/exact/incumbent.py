"""Best-swap tabu search on one small row, compiled: the incumbent of the exact solvers."""

from __future__ import annotations

import numba
import numpy as np


def tabu_row(
    q: np.ndarray, start: np.ndarray, group: int, *, moves: int, seed: int = 0
) -> np.ndarray:
    """The best p found (bool [n]), never worse than `start`; swaps stay inside groups."""
    p = np.ascontiguousarray(start, dtype=np.bool_).copy()
    return _tabu(np.ascontiguousarray(q), p, group, moves, seed % 2**31)


@numba.njit(cache=True, nogil=True)
def _tabu(q, p, group, moves, seed):  # type: ignore[no-untyped-def]
    np.random.seed(seed)  # noqa: NPY002
    n = len(p)
    c = q @ p.astype(np.float64)
    current = 0.0
    for i in range(n):
        if p[i]:
            current += c[i]
    best, best_cost = p.copy(), current
    until = np.zeros(n, np.int64)
    tenure = max(4, n // 8)
    for move in range(1, moves + 1):
        least, kept, pruned = np.inf, -1, -1
        for first in range(0, n, group):
            for i in range(first, first + group):
                if p[i]:
                    continue
                gain_i = 2 * c[i] + q[i, i]
                for j in range(first, first + group):
                    if not p[j]:
                        continue
                    delta = gain_i - 2 * c[j] + q[j, j] - 2 * q[i, j]
                    allowed = until[i] < move and until[j] < move
                    if delta < least and (allowed or current + delta < best_cost * (1 - 1e-12)):
                        least, kept, pruned = delta, i, j
        if kept < 0:
            break
        p[kept], p[pruned] = True, False
        for i in range(n):
            c[i] += q[i, kept] - q[i, pruned]
        current += least
        until[kept] = move + tenure + np.random.randint(0, tenure)  # noqa: NPY002
        until[pruned] = move + tenure + np.random.randint(0, tenure)  # noqa: NPY002
        if current < best_cost * (1 - 1e-12):
            best[:] = p
            best_cost = current
    return best
