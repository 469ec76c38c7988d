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


@loop(nogil=True)
def number(index, numbers, member):
    """Number the pairs of triangles (int64 [m, 3], i < j < k) in their order, i first: their number, and in
    `member` [m, 3] those of a triangle. `numbers` [n + 1, n + 1], zeros before, holds them plus one."""
    for t in range(len(index)):
        i, j, k = index[t]
        numbers[i, j] = numbers[i, k] = numbers[j, k] = 1
    found = 0
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            if numbers[i, j]:
                found += 1
                numbers[i, j] = found
    for t in range(len(index)):
        i, j, k = index[t]
        member[t, 0], member[t, 1] = numbers[i, j] - 1, numbers[i, k] - 1
        member[t, 2] = numbers[j, k] - 1
    return found


@loop(nogil=True)
def places(numbers, pairs, entries, starts, partners):
    """What `number` found as a symmetric sparse matrix without the row of v_0, the last.

    Args:
        pairs: int32 [pairs, 2], written: i < j.
        entries: int32 [pairs, 2], written: where (i, j) and (j, i) stand; −1 of v_0.
        starts: int64 [n + 1], written: the entries of an input are starts[i] … starts[i + 1].
        partners: int32 [entries], written: j, ascending for every input.
    """
    n = len(numbers) - 1
    starts[:] = 0
    for i in range(n):
        for j in range(i + 1, n + 1):
            if numbers[i, j]:
                starts[i + 1] += 1
                if j < n:
                    starts[j + 1] += 1
    for i in range(n):
        starts[i + 1] += starts[i]
    free = starts[:-1].copy()
    at = 0
    for i in range(n):
        for j in range(i + 1, n + 1):
            if numbers[i, j]:
                pairs[at, 0], pairs[at, 1] = i, j
                entries[at, 0], entries[at, 1] = free[i], -1
                partners[free[i]] = j
                free[i] += 1
                if j < n:
                    entries[at, 1] = free[j]
                    partners[free[j]] = i
                    free[j] += 1
                at += 1


@part(nogil=True, fastmath={"contract", "reassoc"})
def _dot(x, y):
    total = x.dtype.type(0)
    for a in range(len(x)):
        total += x[a] * y[a]
    return total


@loop(nogil=True)
def damp(
    v,
    pairs,
    entries,
    cut_rows,
    pair_rows,
    entry_rows,
    member,
    sign,
    step,
    follow,
    tau,
    used,
    value,
    rows,
):
    """τ_used = max(0, τ − step·(triangle + 1)), τ follows by the part `follow`, and E from τ_used.

    Args:
        v: [rows, n, k].
        pairs, entries: int32 [pairs, 2], inputs i < j (n: v_0, the first unit vector), and where E_ij
            and E_ji stand in a row's part of `value` (−1: nowhere).
        cut_rows, pair_rows, entry_rows: int64 [rows + 1], where the cuts, the pairs and the entries of a row
            start.
        member, sign: int32, float [cuts, 3], the pairs of a cut, counted from its row's first, and their
            signs a, b, ab.
        step, tau, used: float64 [cuts].
        value: float [entries].
        rows: int64, which rows.
    """
    n = v.shape[1]
    for row in rows:
        first, last = pair_rows[row], pair_rows[row + 1]
        product = np.empty(last - first, v.dtype)
        for p in range(first, last):
            i, j = pairs[p, 0], pairs[p, 1]
            if j == n:
                product[p - first] = v[row, i, 0]
            else:
                product[p - first] = _dot(v[row, i], v[row, j])
        weight = np.zeros(last - first, v.dtype)
        for t in range(cut_rows[row], cut_rows[row + 1]):
            slack = 1.0
            for c in range(3):
                slack += sign[t, c] * product[member[t, c]]
            used[t] = max(0.0, tau[t] - step[t] * slack)
            tau[t] += follow * (used[t] - tau[t])
            half = v.dtype.type(used[t] / 2)
            for c in range(3):
                weight[member[t, c]] -= half * sign[t, c]
        own = value[entry_rows[row] : entry_rows[row + 1]]
        for p in range(first, last):
            own[entries[p, 0]] = weight[p - first]
            if entries[p, 1] >= 0:
                own[entries[p, 1]] = weight[p - first]
