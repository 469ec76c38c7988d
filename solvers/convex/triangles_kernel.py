# mypy: disallow-untyped-defs=False
"""Compiled kernels of the triangle cuts: separation over all triples, and the damped multipliers."""

from __future__ import annotations

import numpy as np

from maskopt.solvers.compiled import loop, part

#: bins of the histogram of violations; a triangle is violated by at most 2
BINS = 1024
#: minima as vectors have them; the order of sums stays, so that loops agree on what is violated
_FINITE = {"nnan", "nsz"}


#: first inputs that are counted side by side, so that what is read of an inner product serves them all
ABREAST = 4


@part(fastmath=_FINITE)
def _least(x, y, z):
    """min over signs of a·x + b·y + ab·z; at most one of the four is below −1 for a Gram matrix."""
    return min(x - abs(y + z), -x - abs(y - z))


@loop(nogil=True)
def histogram(inner, floor, stride, counts, firsts):
    """How many triangles of `inner` [n, n] are violated by more than `floor`, by size.

    Into counts, int32 [n, BINS], for the least index of the triangle, those of `firsts` only, with one of
    `stride` second indices; a bin is 2/BINS wide.
    """
    n = len(inner)
    for i in firsts:
        for j in range(i + 1 + i % stride, n, stride):
            for k in range(j + 1, n):
                violation = -1 - _least(inner[i, j], inner[i, k], inner[j, k])
                if violation > floor:
                    counts[i, min(int(violation * (BINS / 2)), BINS - 1)] += 1


@part(nogil=True, fastmath=_FINITE)
def _violated(x, first, second, floor):
    """Over all k, how many triangles of ⟨v_i, v_j⟩ = x, ⟨v_i, v_k⟩ and ⟨v_j, v_k⟩ are violated."""
    found = np.int32(0)
    for k in range(len(second)):
        found += np.int32(-1 - _least(x, first[k], second[k]) > floor)
    return found


@loop(nogil=True, fastmath=_FINITE)
def count(inner, floor, counts, blocks):
    """How many triangles i < j < k are violated by more than `floor`, into int32 [n, n] by i and j, for the
    ABREAST inputs i of every block. Without a branch inside, at the speed of vectors."""
    n = len(inner)
    for block in blocks:
        low = block * ABREAST
        high = min(low + ABREAST, n)
        for j in range(low + 1, n):
            second = inner[j, j + 1 :]
            if j < high or high - low < ABREAST:
                for i in range(low, min(j, high)):
                    counts[i, j] = _violated(inner[i, j], inner[i, j + 1 :], second, floor)
                continue
            a, b, c, d = low, low + 1, low + 2, low + 3
            x, y, z, w = inner[a, j], inner[b, j], inner[c, j], inner[d, j]
            of_a, of_b = inner[a, j + 1 :], inner[b, j + 1 :]
            of_c, of_d = inner[c, j + 1 :], inner[d, j + 1 :]
            found_a, found_b, found_c, found_d = np.int32(0), np.int32(0), np.int32(0), np.int32(0)
            for k in range(n - j - 1):
                s = second[k]
                found_a += np.int32(-1 - _least(x, of_a[k], s) > floor)
                found_b += np.int32(-1 - _least(y, of_b[k], s) > floor)
                found_c += np.int32(-1 - _least(z, of_c[k], s) > floor)
                found_d += np.int32(-1 - _least(w, of_d[k], s) > floor)
            counts[a, j], counts[b, j], counts[c, j], counts[d, j] = (
                found_a,
                found_b,
                found_c,
                found_d,
            )


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


@part(nogil=True, fastmath={"contract", "reassoc"})
def _dot(x, y):
    total = x.dtype.type(0)
    for a in range(len(x)):
        total += x[a] * y[a]
    return total


@loop(nogil=True)
def damp(v, pairs, entries, member, sign, step, follow, tau, used, value):
    """τ_used = max(0, τ − step·(triangle + 1)), τ follows by the part `follow`, and E from τ_used.

    Args:
        v: [n, k].
        pairs, entries: int32 [pairs, 2], inputs i < j (n: v_0, the first unit vector), and where E_ij
            and E_ji stand in `value` (−1: nowhere).
        member, sign: int32, float [cuts, 3], the pairs of a cut, and their signs a, b, ab.
        step, tau, used: float64 [cuts].
        value: float [entries].
    """
    product = np.empty(len(pairs), v.dtype)
    for p in range(len(pairs)):
        i, j = pairs[p, 0], pairs[p, 1]
        product[p] = v[i, 0] if j == len(v) else _dot(v[i], v[j])
    weight = np.zeros(len(pairs), v.dtype)
    for t in range(len(tau)):
        slack = 1.0
        for c in range(3):
            slack += sign[t, c] * product[member[t, c]]
        used[t] = max(0.0, tau[t] - step[t] * slack)
        tau[t] += follow * (used[t] - tau[t])
        half = v.dtype.type(used[t] / 2)
        for c in range(3):
            weight[member[t, c]] -= half * sign[t, c]
    for p in range(len(pairs)):
        value[entries[p, 0]] = weight[p]
        if entries[p, 1] >= 0:
            value[entries[p, 1]] = weight[p]


@loop(nogil=True)
def extend(z, index, sign, violation, exchanges):
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
