"""Best-swap tabu search on one small row, compiled: the incumbent of the exact solvers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from maskopt.core.limits import clock
from maskopt.solvers.compiled import loop
from maskopt.solvers.exact.tasks import RowTask

#: moves between two looks at the clock
_CHUNK = 256
#: part of the best objective by which another one must be lower: below it is rounding
_BETTER = 1e-12


def with_incumbent(task: RowTask) -> RowTask:
    """The task from a far better start, which trees hardly ever improve on."""
    moves = 50 * len(task.q) + 500
    seed, deadline = task.limits.seed, task.limits.deadline
    best = tabu_row(task.q, task.start, task.group, moves=moves, seed=seed, deadline=deadline)
    return replace(task, start=best)


def tabu_row(
    q: np.ndarray,
    start: np.ndarray,
    group: int,
    *,
    moves: int,
    seed: int = 0,
    deadline: float = math.inf,
) -> np.ndarray:
    """The best p found (bool [n]), never worse than `start`; swaps stay inside groups."""
    q = np.ascontiguousarray(q)
    p = np.ascontiguousarray(start, dtype=np.bool_).copy()
    best, c = p.copy(), q @ p.astype(np.float64)
    costs = np.full(2, c[p].sum())
    until = np.zeros(len(p), np.int64)
    for first in range(1, moves + 1, _CHUNK):
        last = min(first + _CHUNK - 1, moves)
        more = _moves(q, p, c, best, costs, until, group, first, last, seed % 2**31)
        if not more or clock() >= deadline:
            break
    return best


@loop(nogil=True)
def _moves(q, p, c, best, costs, until, group, first, last, seed):  # type: ignore[no-untyped-def]
    """Moves first … last; False where every move is tabu.

    All arrays are changed: c = Qp, costs = f of p and of `best`. The generator of random numbers is
    that of the thread; the first move seeds it.
    """
    if first == 1:
        np.random.seed(seed)  # noqa: NPY002
    n = len(p)
    current, best_cost = costs[0], costs[1]
    tenure = max(4, n // 8)
    for move in range(first, last + 1):
        least, kept, pruned = np.inf, -1, -1
        for low in range(0, n, group):
            for i in range(low, low + group):
                if p[i]:
                    continue
                gain_i = 2 * c[i] + q[i, i]
                for j in range(low, low + group):
                    if not p[j]:
                        continue
                    delta = gain_i - 2 * c[j] + q[j, j] - 2 * q[i, j]
                    allowed = until[i] < move and until[j] < move
                    if delta < least and (allowed or current + delta < best_cost * (1 - _BETTER)):
                        least, kept, pruned = delta, i, j
        if kept < 0:
            return False
        p[kept], p[pruned] = True, False
        for i in range(n):
            c[i] += q[i, kept] - q[i, pruned]
        current += least
        until[kept] = move + tenure + np.random.randint(0, tenure)  # noqa: NPY002
        until[pruned] = move + tenure + np.random.randint(0, tenure)  # noqa: NPY002
        if current < best_cost * (1 - _BETTER):
            for i in range(n):  # compiles in a tenth of the time of best[:] = p
                best[i] = p[i]
            best_cost = current
    costs[0], costs[1] = current, best_cost
    return True
