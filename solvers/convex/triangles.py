# mypy: disallow-untyped-defs=False
"""Triangle and pentagonal inequalities of one row: a pool, the most violated of all, and what they add to C.

For signs z_i = ±1 (with z_0 = 1) and a, b = ±1, a·z_iz_j + b·z_iz_k + ab·z_jz_k + 1 ≥ 0; with z_0 these
are p_ip_j ≥ 0, p_ip_j ≤ p_i and p_ip_j ≥ p_i + p_j − 1. A multiplier τ of one adds −τ/2 times its signs
to the entries of C. Where a pool has five places, an inequality may have five inputs in place of three: an
odd sum of signs is at least 1 in size, so that Σ_{i<j} b_ib_jz_iz_j + 2 ≥ 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from maskopt.certificates.cuts import NO_INPUT, OF_Z0
from maskopt.solvers.kernels import RowThreads, njit

#: violations below this are left alone
_FLOOR = 0.02
#: the step of a triangle, times the least dual of its inputs over the root of their degree
_STEP = 0.1
#: a dual below this part of the mean makes an input no softer
_SOFTEST = 0.05
#: triangles are looked for in so many interleaved parts: the first inputs are in the most
_INTERLEAVED = 16
#: up to so many vectors violations are counted in full; beyond, of so many second indices of every first, so
#: that thousands of them are seen however many there are
_ALL, _SAMPLED = 400, 25
#: of a violation in float32
_ROUNDING = 1e-6
#: places of the inequalities of a tree
PLACES = 5
#: violations of five inputs below this are left alone
_FLOOR_OF_FIVE = 0.05
#: exchanges from one start, at most
_EXCHANGES = 8
#: bins of the histogram of violations; a triangle is violated by at most 2
_BINS = 1024
#: minima as vectors have them; the order of sums stays, so that loops agree on what is violated
_FINITE = {"nnan", "nsz"}


@dataclass(frozen=True)
class Pool:
    """The inequalities of one row.

    Attributes:
        index: int64 [m, k], an odd number of inputs, ascending, OF_Z0 after them, then NO_INPUT.
        sign: int8 [m, k − 1], of all but the first, whose sign is 1.
        tau: τ, float64 [m].
    """

    index: np.ndarray
    sign: np.ndarray
    tau: np.ndarray

    @classmethod
    def empty(cls, places: int = 3) -> Pool:
        index, sign = np.zeros((0, places), np.int64), np.zeros((0, places - 1), np.int8)
        return cls(index, sign, np.zeros(0))

    @property
    def least(self) -> np.ndarray:
        """The most that −Σ_{i<j} b_ib_jz_iz_j may be, int64 [m]: 1 of a triangle."""
        return np.asarray((self.index != NO_INPUT).sum(1) // 2)

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the terms b_ib_jz_iz_j: i, j int64 [p], b_ib_j float64 [p], and the inequality of each [p].

        They are many times as large as the pool, and not kept.
        """
        x, y = np.triu_indices(self.index.shape[1], 1)
        of, pair = np.nonzero(self.index[:, y] != NO_INPUT)
        sign = np.column_stack([np.ones(len(self.tau)), self.sign])
        x, y = x[pair], y[pair]
        return self.index[of, x], self.index[of, y], sign[of, x] * sign[of, y], of

    def keep(self, chosen: np.ndarray) -> Pool:
        return Pool(self.index[chosen], self.sign[chosen], self.tau[chosen])

    def merged(self, n: int) -> Pool:
        """Join equal inequalities, and add up their multipliers."""
        keys, first, which = np.unique(
            _keys(self.index, self.sign, n), return_index=True, return_inverse=True
        )
        tau = np.bincount(which, self.tau, minlength=len(keys))
        return Pool(self.index[first], self.sign[first], tau)

    def join(self, index: np.ndarray, sign: np.ndarray, n: int) -> Pool:
        """Add the inequalities that are not here yet, at τ = 0; of as many places, or fewer."""
        lacking = self.index.shape[1] - index.shape[1]
        index = np.pad(index, ((0, 0), (0, lacking)), constant_values=NO_INPUT)
        sign = np.pad(sign, ((0, 0), (0, lacking)))
        new = ~np.isin(_keys(index, sign, n), _keys(self.index, self.sign, n))
        return Pool(
            np.concatenate([self.index, index[new]]),
            np.concatenate([self.sign, sign[new]]),
            np.concatenate([self.tau, np.zeros(int(new.sum()))]),
        )


def separate(
    inner: np.ndarray, most: int, threads: RowThreads | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the `most` most violated triangles, the most violated first; beyond _ALL inputs about so many.

    These are index int64 [m, 3], ascending with OF_Z0 last, sign int8 [m, 2] and violation float64 [m].
    `inner`: ⟨v_i, v_j⟩ [n + 1, n + 1] with v_0 last.
    """
    inner = np.ascontiguousarray(inner, dtype=np.float32)
    threads = threads or RowThreads()
    n = len(inner)
    order = np.concatenate([np.arange(part, n, _INTERLEAVED) for part in range(_INTERLEAVED)])
    bins = np.zeros((n, _BINS), np.int32)
    stride = 1 if n <= _ALL else n // _SAMPLED
    threads.run(histogram, order, inner, np.float32(_FLOOR), stride, bins)
    above = stride * np.cumsum(bins.sum(0, dtype=np.int64)[::-1])[::-1]
    # the bin that straddles `most` is collected too and cut off after sorting
    least = max(int(np.searchsorted(-above, -most, side="left")) - 1, 0)
    floor = np.float32(max(_FLOOR, least * 2 / _BINS - _ROUNDING))
    counts = np.zeros((n, n), np.int32)
    threads.run(count, order, inner, floor, counts)
    per_input = counts.sum(1, dtype=np.int64)
    total = int(per_input.sum())
    starts = np.cumsum(per_input) - per_input
    index, sign = np.zeros((total, 3), np.int64), np.zeros((total, 2), np.int8)
    violation = np.zeros(total)
    threads.run(collect, order, inner, floor, counts, starts, index, sign, violation)
    index[index == n - 1] = OF_Z0
    first = np.argsort(-violation, kind="stable")[:most]
    return index[first], sign[first], violation[first]


def _keys(index: np.ndarray, sign: np.ndarray, n: int) -> np.ndarray:
    keys = np.zeros(len(index), np.int64)
    for column in index.T:
        keys = keys * (n + 2) + column - NO_INPUT
    for column in sign.T:
        keys = 2 * keys + (column > 0)
    return keys


class Incidence(NamedTuple):
    """The distinct pairs of the triangles of a row, and the sparse symmetric matrix that they make.

    Attributes:
        member: int32 [m, 3], the pairs of a triangle.
        pairs: int32 [p, 2], i < j; entries: int32 [p, 2], where (i, j) and (j, i) stand; −1: v_0 has no row.
        starts: int64 [n + 1], where the entries of an input start.
        partners: int32 [entries], j, ascending within an input.
    """

    member: np.ndarray
    pairs: np.ndarray
    entries: np.ndarray
    starts: np.ndarray
    partners: np.ndarray

    @classmethod
    def of(cls, index: np.ndarray, n: int) -> Incidence:
        """Return the pairs of triangles, int64 [m, 3]."""
        first, second = index[:, [0, 0, 1]], index[:, [1, 2, 2]]
        used = np.zeros((n + 1, n + 1), bool)
        used[first, second] = True
        i, j = np.nonzero(used)
        place = np.full(used.shape, -1, np.int32)
        place[i, j] = np.arange(len(i))
        member = place[first, second]
        owner, partners = np.nonzero((used | used.T)[:n])
        place[owner, partners] = np.arange(len(owner))
        return cls(
            member,
            np.column_stack([i, j]).astype(np.int32),
            np.column_stack([place[i, j], place[j, i]]),
            np.searchsorted(owner, np.arange(n + 1)),
            partners.astype(np.int32),
        )


def steps_of(index: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the steps of τ: small where an input bends easily (small y) or is in many triangles."""
    n = len(y)
    # v_0 is fixed: it does not bend, in however many triangles it is
    stiff = np.append(np.maximum(y, _SOFTEST * y.mean()), np.inf)
    degree = np.append(np.bincount(index[index != OF_Z0], minlength=n), 1)
    return np.asarray(
        _STEP
        * stiff[index].min(1, initial=np.inf)
        / np.sqrt(np.maximum(degree[index], 1).max(1, initial=1))
    )


def dense(pool: Pool, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return E [n, n] and its column of v_0."""
    e = np.zeros((n + 1, n + 1))
    scatter(e, *pool.pairs(), pool.tau)
    return e[:n, :n], e[:n, n]


def pentagons(z: np.ndarray, pool: Pool, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `most` inequalities of five inputs that Z violates, the most violated first.

    These are index int64 [m, 5], ascending with OF_Z0 last, and sign int8 [m, 4] of all but the first. `z`:
    float64 [N, N], z_0 last; `pool`: inequalities of five places.

    There are too many to look at all of them: each triangle with a multiplier gets the two inputs that lower
    its sum most, one after the other, and then single inputs are exchanged while that lowers it.
    """
    triangles = pool.keep((pool.index[:, 3] == NO_INPUT) & (pool.tau > 0))
    first = triangles.keep(np.argsort(-triangles.tau, kind="stable")[: 2 * most])
    index, sign = np.full((len(first.tau), 5), -1, np.int64), np.ones((len(first.tau), 5), np.int8)
    index[:, :3], sign[:, 1:3] = first.index[:, :3] % len(z), first.sign[:, :2]
    violation = np.zeros(len(index))
    if len(z) >= 5:
        extend(z, index, sign, violation, _EXCHANGES)
    large = violation > _FLOOR_OF_FIVE
    index, sign, violation = index[large], sign[large], violation[large]
    order = np.argsort(index, axis=1)
    index, sign = np.take_along_axis(index, order, 1), np.take_along_axis(sign, order, 1)
    sign *= sign[:, :1]
    best = np.argsort(-violation, kind="stable")
    both = np.column_stack([index, sign])[best]
    distinct = np.sort(np.unique(both, axis=0, return_index=True)[1])[:most]
    index[index == len(z) - 1] = OF_Z0
    return index[best][distinct], sign[best][distinct, 1:]


@njit(fastmath=_FINITE)
def _least_signed_sum(x, y, z):
    """Return min over signs of a·x + b·y + ab·z; at most one of the four is below −1 for a Gram matrix."""
    return min(x - abs(y + z), -x - abs(y - z))


@njit
def histogram(inner, floor, stride, counts, firsts):
    """Count the triangles of `inner` [n, n] that are violated by more than `floor`, by size.

    Into counts, int32 [n, _BINS], for the least index of the triangle, those of `firsts` only, with one of
    `stride` second indices; a bin is 2/_BINS wide.
    """
    n = len(inner)
    for i in firsts:
        for j in range(i + 1 + i % stride, n, stride):
            for k in range(j + 1, n):
                violation = -1 - _least_signed_sum(inner[i, j], inner[i, k], inner[j, k])
                if violation > floor:
                    counts[i, min(int(violation * (_BINS / 2)), _BINS - 1)] += 1


@njit(fastmath=_FINITE)
def _violated(x, first, second, floor):
    """Count, over all k, the violated triangles of ⟨v_i, v_j⟩ = x, ⟨v_i, v_k⟩ and ⟨v_j, v_k⟩."""
    violated = np.int32(0)
    for k in range(len(second)):
        violated += np.int32(-1 - _least_signed_sum(x, first[k], second[k]) > floor)
    return violated


@njit
def count(inner, floor, counts, firsts):
    """Count triangles i < j < k violated by more than `floor`, in int32 [n, n] by i and j, i of `firsts`."""
    n = len(inner)
    for i in firsts:
        for j in range(i + 1, n):
            counts[i, j] = _violated(inner[i, j], inner[i, j + 1 :], inner[j, j + 1 :], floor)


@njit
def collect(inner, floor, counts, starts, index, sign, violations, firsts):
    """Write the triangles that `count` has counted, those of least index i of `firsts` from starts[i] on."""
    n = len(inner)
    for i in firsts:
        at = starts[i]
        for j in range(i + 1, n):
            last = at + counts[i, j]
            for k in range(j + 1, n):
                if at == last:
                    break
                x, y, z = inner[i, j], inner[i, k], inner[j, k]
                violation = -1 - _least_signed_sum(x, y, z)
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


@njit
def scatter(matrix, i, j, sign, of, tau):
    """Subtract τ/2 times the sign of every pair (`Pool.pairs`) from both of its entries of a matrix."""
    for k in range(len(of)):
        w = tau[of[k]] / 2 * sign[k]
        matrix[i[k], j[k]] -= w
        matrix[j[k], i[k]] -= w


@njit
def gather(matrix, i, j, sign, of, inner):
    """Add the signed entries of the pairs of every inequality, ⟨T_t, Z⟩, to `inner` [m]."""
    for k in range(len(of)):
        inner[of[k]] += matrix[i[k], j[k]] * sign[k]


@njit(fastmath={"contract", "reassoc"})
def _dot(x, y):
    total = x.dtype.type(0)
    for a in range(len(x)):
        total += x[a] * y[a]
    return total


@njit
def damp(v, pairs, entries, member, sign, step, follow, tau, used, value):
    """Set τ_used = max(0, τ − step·(triangle + 1)), τ by the part `follow` of the way, and E from τ_used.

    Args:
        v: [n, k]; v_0 is the first unit vector.
        pairs, entries, member: of `Incidence`.
        sign: float [cuts, 3], the signs a, b, ab of the pairs of a cut.
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


@njit
def extend(z, index, sign, violation, exchanges):
    """Extend three inputs each to five (−1: none yet), and write by how much that is violated."""
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
