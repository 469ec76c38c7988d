# mypy: disallow-untyped-defs=False
"""Compiled kernels of the triangle cuts: separation over all triples, and the damped multipliers."""

from __future__ import annotations

import numpy as np

from maskopt.solvers.compiled import loop, part

#: bins of the histogram of violations; a triangle is violated by at most 2
BINS = 4096
#: minima as vectors have them; the order of sums stays, so that loops agree on what is violated
_FINITE = {"nnan", "nsz"}


@part(fastmath=_FINITE)
def _least(x, y, z):
    """min over signs of a·x + b·y + ab·z; at most one of the four is below −1 for a Gram matrix."""
    return min(min(x + y + z, x - y - z), min(z - x - y, y - x - z))


@loop(nogil=True)
def histogram(inner, floor, stride, counts, firsts):
    """How many triangles of `inner` [n, n] are violated by more than `floor`, by size.

    Into counts, int64 [n, BINS], for the least index of the triangle, those of `firsts` only, with one of
    `stride` second indices; a bin is 2/BINS wide.
    """
    n = len(inner)
    for i in firsts:
        for j in range(i + 1 + i % stride, n, stride):
            for k in range(j + 1, n):
                violation = -1 - _least(inner[i, j], inner[i, k], inner[j, k])
                if violation > floor:
                    counts[i, min(int(violation * (BINS / 2)), BINS - 1)] += 1


@loop(nogil=True, fastmath=_FINITE)
def count(inner, floor, counts, firsts):
    """How many triangles i < j < k are violated by more than `floor`, into int32 [n, n] by i and j, i of
    `firsts` only. Without a branch inside, at the speed of vectors."""
    n = len(inner)
    for i in firsts:
        for j in range(i + 1, n):
            x, found = inner[i, j], np.int32(0)
            for k in range(j + 1, n):
                found += np.int32(-1 - _least(x, inner[i, k], inner[j, k]) > floor)
            counts[i, j] = found


@loop(nogil=True)
def collect(inner, floor, counts, starts, index, sign, violations, firsts):
    """Write the triangles that `count` has counted, those of least index i from starts[i] on, for every i
    of `firsts`."""
    n = len(inner)
    for i in firsts:
        at = starts[i]
        for j in range(i + 1, n):
            last = at + counts[i, j]
            for k in range(j + 1, n):
                if at == last:
                    break
                x, y, z = inner[i, j], inner[i, k], inner[j, k]
                violation = -1 - _least(x, y, z)
                if violation > floor:
                    index[at, 0], index[at, 1], index[at, 2] = i, j, k
                    a, b = 1, 1
                    if x - y - z < -1:
                        b = -1
                    elif y - x - z < -1:
                        a = -1
                    elif z - x - y < -1:
                        a, b = -1, -1
                    sign[at, 0], sign[at, 1] = a, b
                    violations[at] = violation
                    at += 1


@loop(nogil=True)
def scatter(matrix, i, j, sign, of, tau):
    """Subtract τ/2 times the sign of every pair (`Pairs`) from both of its entries of a matrix."""
    for k in range(len(of)):
        w = tau[of[k]] / 2 * sign[k]
        matrix[i[k], j[k]] -= w
        matrix[j[k], i[k]] -= w


@loop(nogil=True)
def gather(matrix, i, j, sign, of, inner):
    """⟨T_t, Z⟩ of every inequality: add the signed entries of its pairs to `inner` [m]."""
    for k in range(len(of)):
        inner[of[k]] += matrix[i[k], j[k]] * sign[k]


@loop(nogil=True)
def damp(
    v, pairs, entries, cut_rows, pair_rows, member, sign, step, follow, tau, used, value, rows
):
    """τ_used = max(0, τ − step·(triangle + 1)), τ follows by the part `follow`, and E from τ_used.

    Args:
        v: [rows, n, k].
        pairs, entries: int64 [pairs, 2], inputs i < j (n: v_0, the first unit vector), and where E_ij
            and E_ji stand in `value` (−1: nowhere).
        cut_rows, pair_rows: int64 [rows + 1], where the cuts and the pairs of a row start.
        member, sign: int64, float64 [cuts, 3], the pairs of a cut and their signs a, b, ab.
        step, tau, used: float64 [cuts].
        rows: int64, which rows.
    """
    n, k = v.shape[1], v.shape[2]
    for row in rows:
        first, last = pair_rows[row], pair_rows[row + 1]
        product = np.zeros(last - first)
        for p in range(first, last):
            i, j = pairs[p, 0], pairs[p, 1]
            if j == n:
                product[p - first] = v[row, i, 0]
            else:
                total = v.dtype.type(0)
                for a in range(k):
                    total += v[row, i, a] * v[row, j, a]
                product[p - first] = total
        weight = np.zeros(last - first)
        for t in range(cut_rows[row], cut_rows[row + 1]):
            slack = 1.0
            for c in range(3):
                slack += sign[t, c] * product[member[t, c] - first]
            used[t] = max(0.0, tau[t] - step[t] * slack)
            tau[t] += follow * (used[t] - tau[t])
            for c in range(3):
                weight[member[t, c] - first] -= used[t] * sign[t, c] / 2
        for p in range(first, last):
            value[entries[p, 0]] = weight[p - first]
            if entries[p, 1] >= 0:
                value[entries[p, 1]] = weight[p - first]
