"""Pentagonal inequalities that a relaxation violates, found from the triangles that bind.

An odd sum of signs is at least 1 in size: Σ_{i<j} b_ib_jz_iz_j ≥ −2 for five inputs (z_0 among them or not)
and b = ±1. There are too many to look at all of them: each triangle with a multiplier gets the two inputs
that lower its sum most, one after the other, and then single inputs are exchanged while that lowers it.
"""

from __future__ import annotations

import numpy as np

from maskopt.solvers.compiled import loop
from maskopt.solvers.convex.triangles import ABSENT, Pool

#: of the inequalities of a tree
PLACES = 5
#: violations below this are left alone
_FLOOR = 0.05
#: exchanges from one start, at most
_EXCHANGES = 8


def pentagons(z: np.ndarray, pool: Pool, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most so many that Z (float64 [N, N], z_0 last) violates, the most violated first: index int64 [m,
    5], ascending, sign int8 [m, 4] of all but the first. `pool`: inequalities of five places."""
    triangles = pool.keep((pool.index[:, 3] == ABSENT) & (pool.tau > 0))
    first = triangles.keep(np.argsort(-triangles.tau, kind="stable")[: 2 * most])
    index, sign = np.full((len(first.tau), 5), -1, np.int64), np.ones((len(first.tau), 5), np.int8)
    index[:, :3], sign[:, 1:3] = first.index[:, :3], first.sign[:, :2]
    violation = np.zeros(len(index))
    if len(z) >= 5:
        _extend(z, index, sign, violation, _EXCHANGES)
    found = violation > _FLOOR
    index, sign, violation = index[found], sign[found], violation[found]
    order = np.argsort(index, axis=1)
    index, sign = np.take_along_axis(index, order, 1), np.take_along_axis(sign, order, 1)
    sign *= sign[:, :1]
    best = np.argsort(-violation, kind="stable")
    both = np.column_stack([index, sign])[best]
    distinct = np.sort(np.unique(both, axis=0, return_index=True)[1])[:most]
    return index[best][distinct], sign[best][distinct, 1:]


@loop(nogil=True)
def _extend(z, index, sign, violation, exchanges):  # type: ignore[no-untyped-def]
    """Of three inputs each make five, and write by how much that is violated."""
    n = len(z)
    s = np.zeros(n)
    for t in range(len(index)):
        i, b = index[t], sign[t]
        for j in range(n):
            s[j] = b[0] * z[i[0], j] + b[1] * z[i[1], j] + b[2] * z[i[2], j]
        for size in (3, 4):
            best, least = -1, 1e-9
            for j in range(n):
                if abs(s[j]) > least:
                    taken = False
                    for q in range(size):
                        taken = taken or i[q] == j
                    if not taken:
                        best, least = j, abs(s[j])
            if best < 0:
                break
            i[size], b[size] = best, -1 if s[best] > 0 else 1
            for j in range(n):
                s[j] += b[size] * z[best, j]
        if i[4] < 0:
            continue
        for _ in range(exchanges):
            gain, out, come = 1e-6, -1, -1
            for q in range(5):
                now = b[q] * (s[i[q]] - b[q] * z[i[q], i[q]])
                for j in range(n):
                    better = now + abs(s[j] - b[q] * z[i[q], j])
                    if better > gain:
                        taken = False
                        for r in range(5):
                            taken = taken or i[r] == j
                        if not taken:
                            gain, out, come = better, q, j
            if out < 0:
                break
            for j in range(n):
                s[j] -= b[out] * z[i[out], j]
            i[out], b[out] = come, -1 if s[come] > 0 else 1
            for j in range(n):
                s[j] += b[out] * z[come, j]
        total = 0.0
        for q in range(5):
            total += b[q] * (s[i[q]] - b[q] * z[i[q], i[q]])
        violation[t] = -total / 2 - 2
