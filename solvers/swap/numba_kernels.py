# mypy: ignore-errors
"""The compiled inner loops of 1-swap search on the CPU. Importing this module needs Numba.

Notation as in `batch.py`. Every function works on a list of rows, one after the other, releases the
interpreter lock, and touches nothing but its rows; `numba_kernel.py` runs several in threads. The
order of all arithmetic in a row depends on the row alone, so that a mask never depends on the number
of threads or on the rows beside it.

`x`, `c` and everything that decides is float64. `low` is x in the dtype that proposes: float32, or
float64 where the range of the data asks for it. Inner loops run over contiguous memory, and are
written so that LLVM turns them into SIMD: reductions without a branch first, the position after.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

#: +inf that survives fast-math, in every dtype
BIG = 1e37
#: points at which `_envelope` samples a lower envelope
GRID = 24
#: |x|·d is rounded up by this factor, ρ as well
SLACK = 1.0 + 2.0**-20
#: G is brought in tiles of so many rows and columns when c is computed: half a MiB, in L2
TILE_J, TILE_I = 256, 512
#: kept candidates of a round at most, and pruned ones; a constant, so that loops over it unroll
WIDTH = 48
#: N:M groups up to this size are priced whole in every round; it costs less than one update of c
SMALL_GROUP = 64


def _reduction(name):
    """min or max of two floats of one dtype, as the LLVM intrinsic.

    A loop around it becomes SIMD; around Python's min, or a comparison, it does not, since Numba's
    selects do not carry the fast-math flags that LLVM asks for. Measured: 15 times.
    """

    @intrinsic
    def function(typing_context, a, b):
        if a != b or a not in (types.float32, types.float64):
            return None

        def generate(context, builder, signature, arguments):
            kind = arguments[0].type
            call = builder.module.declare_intrinsic(name, [kind], ir.FunctionType(kind, [kind] * 2))
            return builder.call(call, arguments, fastmath=("fast",))

        return a(a, b), generate

    return function


_min, _max = _reduction("llvm.minnum"), _reduction("llvm.maxnum")
_fast = njit(cache=True, nogil=True, fastmath={"nnan", "ninf", "nsz", "contract", "reassoc"})


@_fast
def reach_rows(gram, inverse, diagonal_at, out, first, last):
    """out_i = max over j ≠ i of |G_ij|·inverse_i·inverse_j, for rows first … last of G."""
    n = gram.shape[1]
    for i in range(first, last):
        line = gram[i]
        most = inverse.dtype.type(0)
        for j in range(diagonal_at + i):
            most = _max(most, abs(line[j]) * inverse[j])
        for j in range(diagonal_at + i + 1, n):
            most = _max(most, abs(line[j]) * inverse[j])
        out[i] = most * inverse[diagonal_at + i]


@_fast
def product_rows(gram, x, kept, c, objective, rows):
    """c = G(x ⊙ pruned) and f = (x ⊙ pruned)ᵀc of some rows, float64, G tile by tile."""
    n = x.shape[1]
    count = len(rows)
    columns = np.empty((count, TILE_J), np.int64)
    weights = np.empty((count, TILE_J), np.float64)
    many = np.empty(count, np.int64)
    for r in rows:
        c[r, :] = 0.0
    for j0 in range(0, n, TILE_J):
        for k in range(count):
            r = rows[k]
            m = 0
            for j in range(j0, min(n, j0 + TILE_J)):
                if not kept[r, j] and x[r, j] != 0.0:
                    columns[k, m] = j
                    weights[k, m] = x[r, j]
                    m += 1
            while m % 4:  # a multiple of four, filled up with zero weights
                columns[k, m] = j0
                weights[k, m] = 0.0
                m += 1
            many[k] = m
        for i0 in range(0, n, TILE_I):
            i1 = min(n, i0 + TILE_I)
            for k in range(count):
                out = c[rows[k], i0:i1]
                for m in range(0, many[k], 4):
                    g0 = gram[columns[k, m], i0:i1]
                    g1 = gram[columns[k, m + 1], i0:i1]
                    g2 = gram[columns[k, m + 2], i0:i1]
                    g3 = gram[columns[k, m + 3], i0:i1]
                    w0, w1 = weights[k, m], weights[k, m + 1]
                    w2, w3 = weights[k, m + 2], weights[k, m + 3]
                    for i in range(i1 - i0):
                        out[i] = w3 * g3[i] + (w2 * g2[i] + (w1 * g1[i] + (w0 * g0[i] + out[i])))
    for r in rows:
        total = 0.0
        for j in range(n):
            if not kept[r, j]:
                total += x[r, j] * c[r, j]
        objective[r] = total


@_fast
def _scores(x, diagonal, c, kept, out):
    """a_u for kept u, b_p for pruned p, float64."""
    for j in range(len(out)):
        square = x[j] * x[j] * diagonal[j]
        linear = 2.0 * x[j] * c[j]
        out[j] = square + linear if kept[j] else square - linear


@_fast
def _least(score, kept, side, taken, most, columns, at, rounded, keys, guess):
    """Write up to `most` columns of least score of one side, none taken, to columns[at:]. → how many

    By bisection over the bits of the float32 scores, which needs no branch a column: keys order as
    scores do. It stops at any cut with up to a quarter less than `most` below it. Columns come out
    ascending; of equal scores the lowest columns are in. guess[side] starts at the last cut.
    """
    n = len(score)
    if most <= 0:
        return 0
    for j in range(n):
        rounded[j] = score[j] if (kept[j] == side) & (taken[j] == 0) else BIG
    bits = rounded.view(np.int32)
    top = np.int32(2**31 - 1)
    for j in range(n):
        key = bits[j] ^ ((bits[j] >> np.int32(31)) & top)
        keys[j] = key if rounded[j] < np.float32(BIG) else top
    least, most_key = top, np.int32(-(2**31) + 1)
    for j in range(n):
        least = min(least, keys[j])
    for j in range(n):
        most_key = max(most_key, keys[j] if keys[j] < top else np.int32(-(2**31) + 1))
    if most_key == -(2**31) + 1:
        return 0
    low, high = np.int64(least) - 1, np.int64(most_key)
    cut, step = guess[int(side)], np.int64(2**20)
    below, above, found = False, False, False
    count = 0
    if _count(keys, high) <= most:
        cut, found = high, True
    while not found and high - low > 1:
        cut = min(max(cut, low + 1), high - 1)
        count = _count(keys, cut)
        if count > most:
            high, above = cut, True
        elif count < most - most // 4:
            low, below = cut, True
        else:
            found = True
            break
        if below and above:
            cut = (low + high) // 2
        elif above:
            cut, step = cut - step, 2 * step
        else:
            cut, step = cut + step, 2 * step
    if not found:
        cut = low  # too few up to here, too many equal ones next: the first of these
    guess[int(side)] = cut
    size = 0
    for j in range(n):
        if keys[j] <= cut:
            columns[at + size] = j
            size += 1
    if not found:
        for j in range(n):
            if size < most and keys[j] == high:
                columns[at + size] = j
                size += 1
        columns[at : at + size].sort()
    return size


@_fast
def _count(keys, cut):
    """How many keys are at most the cut."""
    count = np.int32(0)
    limit = np.int32(cut)
    for j in range(len(keys)):
        count += np.int32(keys[j] <= limit)
    return np.int64(count)


@_fast
def _choose(
    x, kept, score, partner, cross, threshold, width, fill, taken, columns, heap, place, rounded, keys, guess,
):  # fmt: skip
    """Candidates of one row: columns[:k] kept, columns[k:k+p] pruned, each ascending. → k, p

    Up to half of them are the best of the pairs that pricing harvested and that still improve, the
    rest (where `fill`) are the kept of least a and the pruned of least b.
    """
    n = len(score)
    half = width // 2 if fill else width
    size = 0
    for j in range(n):
        i = partner[j]
        if i < 0:
            continue
        if kept[i] == kept[j]:
            partner[j] = -1
            continue
        value = score[i] + score[j] - 2.0 * x[i] * x[j] * cross[j]
        if value >= -threshold:
            continue
        if size < half:  # insertion sort, worst last
            at = size
            size += 1
        elif value < heap[size - 1]:
            at = size - 1
        else:
            continue
        while at > 0 and heap[at - 1] > value:
            heap[at], place[at] = heap[at - 1], place[at - 1]
            at -= 1
        heap[at], place[at] = value, j
    chosen = np.empty(2 * width, np.int64)
    total = 0
    for s in range(size):
        for j in (place[s], np.int64(partner[place[s]])):
            if not taken[j]:
                taken[j] = 1
                chosen[total] = j
                total += 1
    k = 0
    for s in range(total):
        if kept[chosen[s]]:
            columns[k] = chosen[s]
            k += 1
    if fill:
        k += _least(score, kept, True, taken, width - k, columns, k, rounded, keys, guess)
    p = k
    for s in range(total):
        if not kept[chosen[s]]:
            columns[p] = chosen[s]
            p += 1
    if fill:
        p += _least(score, kept, False, taken, width - (p - k), columns, p, rounded, keys, guess)
    for s in range(total):
        taken[chosen[s]] = 0
    if total:
        columns[:k].sort()
        columns[k:p].sort()
    return k, p - k


@_fast
def _exchange(
    gram, x, low, diagonal, kept, c, columns, k, p, group, objective, mass, relative, floor, most,
    block, linear, square, weight, light, score, changed,
):  # fmt: skip
    """Best swaps among k kept and p pruned candidates until none gains more than the threshold.

    Slots 0 … k−1 always hold kept columns and k … k+p−1 pruned ones: a swap exchanges two slots.
    Nothing outside the block is read until c is brought up to date at the end. → swaps, objective
    """
    m = k + p
    grouped = group < len(x)
    for s in range(m):
        j = columns[s]
        line = gram[j]
        for t in range(s + 1):
            block[s, t] = line[columns[t]]
            block[t, s] = block[s, t]
        weight[s] = x[j]
        light[s] = low[j]
        square[s] = x[j] * x[j] * diagonal[j]
        linear[s] = 2.0 * x[j] * c[j]
    big, two = light.dtype.type(BIG), light.dtype.type(2)
    team = np.empty(2 * WIDTH, np.int32)
    for s in range(m):
        team[s] = columns[s] // group if grouped else 0
    slope, lowest = np.zeros(WIDTH, light.dtype), np.empty(WIDTH, light.dtype)
    made = 0
    while made < most:
        for s in range(k):
            score[s] = square[s] + linear[s]
            slope[s] = -two * light[s]
        for s in range(k, m):
            score[s] = square[s] - linear[s]
        for s in range(WIDTH):
            lowest[s] = big
        for t in range(k, m):  # lanes are kept slots, and all WIDTH of them: no remainders
            line = block[t]
            height, factor, team_t = score[t], light[t], team[t]
            if grouped:
                for s in range(WIDTH):
                    value = height + slope[s] * (factor * line[s])
                    value = value if team[s] == team_t else big
                    lowest[s] = value if value < lowest[s] else lowest[s]
            else:
                for s in range(WIDTH):
                    value = height + slope[s] * (factor * line[s])
                    lowest[s] = value if value < lowest[s] else lowest[s]
        best = big
        u = -1
        for s in range(k):
            lowest[s] += score[s]
            best = _min(best, lowest[s])
        for s in range(k):
            if lowest[s] == best and (u < 0 or columns[s] < columns[u]):
                u = s
        if u < 0 or best >= big:
            break
        line = block[u]
        best = big
        q = -1
        for t in range(k, m):
            if team[t] != team[u]:
                continue
            value = score[t] + slope[u] * (light[t] * line[t])
            if value < best or (value == best and columns[t] < columns[q]):
                best = value
                q = t
        if q < 0:
            break
        delta = (square[u] + linear[u]) + (square[q] - linear[q])
        delta -= 2.0 * weight[u] * weight[q] * block[u, q]
        if delta >= -(relative * max(objective, 0.0) + floor * mass):
            break
        objective += delta
        made += 1
        for s in range(m):
            linear[s] += 2.0 * weight[s] * (weight[u] * block[u, s] - weight[q] * block[q, s])
        columns[u], columns[q] = columns[q], columns[u]
        team[u], team[q] = team[q], team[u]
        weight[u], weight[q] = weight[q], weight[u]
        light[u], light[q] = light[q], light[u]
        square[u], square[q] = square[q], square[u]
        linear[u], linear[q] = linear[q], linear[u]
        for s in range(m):
            block[u, s], block[q, s] = block[q, s], block[u, s]
        for s in range(m):
            block[s, u], block[s, q] = block[s, q], block[s, u]
    if made:
        count = 0
        for s in range(m):
            j = columns[s]
            if kept[j] != (s < k):
                kept[j] = s < k
                changed[count] = j
                count += 1
        changed[:count].sort()
        _add_columns(gram, x, kept, c, changed, count)
    return made, objective


@_fast
def _add_columns(gram, x, kept, c, changed, count):
    """c after the named columns changed sides: ± x_j G_j,: for each, four at a time."""
    n = len(c)
    for s in range(0, count - count % 4, 4):
        j0, j1, j2, j3 = changed[s], changed[s + 1], changed[s + 2], changed[s + 3]
        w0 = -x[j0] if kept[j0] else x[j0]
        w1 = -x[j1] if kept[j1] else x[j1]
        w2 = -x[j2] if kept[j2] else x[j2]
        w3 = -x[j3] if kept[j3] else x[j3]
        g0, g1, g2, g3 = gram[j0], gram[j1], gram[j2], gram[j3]
        for i in range(n):
            c[i] = w3 * g3[i] + (w2 * g2[i] + (w1 * g1[i] + (w0 * g0[i] + c[i])))
    for s in range(count - count % 4, count):
        j = changed[s]
        w = -x[j] if kept[j] else x[j]
        line = gram[j]
        for i in range(n):
            c[i] += w * line[i]


@_fast
def search_rows(
    gram, x, low, diagonal, kept, c, partner, cross, objective, mass, swaps, rounds, rows, width, group,
    relative, floor, most,
):  # fmt: skip
    """Rounds of candidates for some rows, until fresh candidates hold no improving pair."""
    n = x.shape[1]
    taken = np.zeros(n, np.uint8)
    score = np.empty(n, np.float64)
    rounded, keys = np.empty(n, np.float32), np.empty(n, np.int32)
    guess = np.zeros(2, np.int64)
    heap, place = np.empty(width, np.float64), np.empty(width, np.int64)
    columns, changed = np.empty(2 * width, np.int64), np.empty(2 * width, np.int64)
    block = np.empty((2 * width, 2 * width), gram.dtype)
    linear, square = np.empty(2 * width), np.empty(2 * width)
    weight = np.empty(2 * width)
    light, proposed = np.empty(2 * width, low.dtype), np.empty(2 * width, low.dtype)
    for r in rows:
        guess[:] = 0
        while swaps[r] < most:
            threshold = relative * max(objective[r], 0.0) + floor * mass[r]
            _scores(x[r], diagonal, c[r], kept[r], score)
            if group <= SMALL_GROUP and group < n:
                _price_groups(gram, x[r], kept[r], score, group, threshold, partner[r], cross[r])
            k, p = _choose(
                x[r], kept[r], score, partner[r], cross[r], threshold, width, group == n, taken,
                columns, heap, place, rounded, keys, guess,
            )  # fmt: skip
            if k == 0 or p == 0:
                break
            rounds[r] += 1
            made, objective[r] = _exchange(
                gram, x[r], low[r], diagonal, kept[r], c[r], columns, k, p, group, objective[r],
                mass[r], relative, floor, most - swaps[r], block, linear, square, weight, light,
                proposed, changed,
            )  # fmt: skip
            swaps[r] += made
            if made == 0:
                break


@_fast
def _price_groups(gram, x, kept, score, group, threshold, partner, cross):
    """Best partner of every kept column inside its group, where it improves; float64. → whether"""
    n = len(x)
    found = False
    for first in range(0, n, group):
        for u in range(first, first + group):
            partner[u] = -1
            if not kept[u]:
                continue
            best = -threshold
            for p in range(first, first + group):
                if not kept[p]:
                    value = (score[u] + score[p]) - 2.0 * x[u] * x[p] * gram[u, p]
                    if value < best:
                        best = value
                        partner[u] = p
                        cross[u] = gram[u, p]
            found = found or partner[u] >= 0
    return found


@_fast
def _envelope(height, slope, count, top, grid, out):
    """out_k = min over i of (height_i − grid_k·slope_i), on a grid that falls from top to 0."""
    step = 2.0**-0.5
    value = top
    for k in range(GRID):
        grid[k] = value if k < GRID - 1 else 0.0
        value *= step
        t = height.dtype.type(grid[k])
        grid[k] = t
        least = height.dtype.type(BIG)
        for i in range(count):
            least = _min(least, height[i] - t * slope[i])
        out[k] = least


@_fast
def _below(t, grid, values):
    """A lower bound of the envelope at t: it is concave, so the chord between samples is below."""
    k = 0
    while k < GRID - 2 and grid[k + 1] > t:
        k += 1
    span = grid[k] - grid[k + 1]
    if span <= 0.0:
        return min(values[k], values[k + 1])
    part = (t - grid[k + 1]) / span
    return values[k + 1] + part * (values[k] - values[k + 1])


@_fast
def _survivors(own, own_slope, count, other, other_slope, others, threshold, grid, values, alive):
    """Which of `own` may be in an improving pair: own_i + other_j − own_slope_i·other_slope_j."""
    top = 0.0
    for i in range(count):
        top = max(top, float(own_slope[i]))
    _envelope(other, other_slope, others, top, grid, values)
    many = 0
    for i in range(count):
        bound = own[i] + _below(float(own_slope[i]), grid, values)
        alive[i] = bound < -threshold
        many += alive[i]
    return many


@_fast
def price_rows(
    gram, x, low, diagonal, reach, rho, kept, c, partner, cross, objective, mass, improving, pairs, rows,
    group, relative, floor, margin,
):  # fmt: skip
    """The exact scan: is there an improving swap? Every column's best partner goes to `partner`.

    A bound first (see docs): pairs that cannot improve by |G_up| ≤ ρ d_u d_p are not looked at. Then
    the rest in the proposing dtype with a and b lowered by more than rounding can add, so that what
    is passed over is proven; what is not passed over is decided in float64. `pairs` counts.
    """
    n = x.shape[1]
    score = np.empty(n, np.float64)
    sides = np.empty((2, n), np.int64)
    height, slope = np.empty((2, n), low.dtype), np.empty((2, n), low.dtype)
    alive = np.empty((2, n), np.uint8)
    grid, values = np.empty(GRID, np.float64), np.empty(GRID, np.float64)
    full, factor = np.empty(n, low.dtype), np.empty(n, low.dtype)
    formed = np.empty(n, low.dtype)
    thin, heavy = np.empty(n, low.dtype), np.empty(n, low.dtype)
    big, two = low.dtype.type(BIG), low.dtype.type(2)
    for r in rows:
        threshold = relative * max(objective[r], 0.0) + floor * mass[r]
        _scores(x[r], diagonal, c[r], kept[r], score)
        improving[r] = False
        if group < n:
            partner[r, :] = -1
            improving[r] = _price_groups(
                gram, x[r], kept[r], score, group, threshold, partner[r], cross[r]
            )
            continue
        count = np.zeros(2, np.int64)
        for j in range(n):
            side = 1 if kept[r, j] else 0
            i = count[side]
            e = abs(x[r, j]) * reach[j] * SLACK
            sides[side, i] = j
            height[side, i] = score[j] - margin * (abs(score[j]) + e * e) - 1e-24
            slope[side, i] = 2.0 * e * rho[j] if side else e
            partner[r, j] = -1
            count[side] += 1
        if count[0] == 0 or count[1] == 0:
            continue
        if not _survivors(
            height[1], slope[1], count[1], height[0], slope[0], count[0], threshold, grid, values,
            alive[1],
        ):  # fmt: skip
            continue
        for side in (1, 0):
            if side == 0 and not _survivors(
                height[0], slope[0], count[0], height[1], slope[1], count[1], threshold, grid,
                values, alive[0],
            ):  # fmt: skip
                count[0] = 0
                break
            m = 0
            for i in range(count[side]):
                if alive[side, i]:
                    sides[side, m] = sides[side, i]
                    height[side, m] = height[side, i]
                    slope[side, m] = slope[side, i]
                    m += 1
            count[side] = m
        if count[0] == 0:
            continue
        near = 0 if count[0] < count[1] else 1  # the side whose rows of G are read
        far = 1 - near
        pairs[r] += count[0] * count[1]
        dense = count[far] * 4 > n
        if dense:
            full[:] = big
            factor[:] = low.dtype.type(0)
        for i in range(count[far]):
            j = sides[far, i]
            thin[i] = low[r, j]
            heavy[i] = height[far, i]
            if dense:
                full[j] = height[far, i]
                factor[j] = low[r, j]
        for i in range(count[near]):
            s = sides[near, i]
            line = gram[s]
            twice = -two * low[r, s]
            least = big
            if dense:
                for j in range(n):
                    value = full[j] + twice * (factor[j] * line[j])
                    formed[j] = value
                    least = _min(least, value)
            else:
                for k in range(count[far]):
                    value = heavy[k] + twice * (thin[k] * line[sides[far, k]])
                    formed[k] = value
                    least = _min(least, value)
            if float(height[near, i]) + float(least) >= -threshold:
                continue
            at = 0
            while formed[at] > least:
                at += 1
            j = at if dense else sides[far, at]
            value = (score[s] + score[j]) - 2.0 * x[r, s] * x[r, j] * line[j]
            if value >= -threshold:  # so little that rounding decides: float64 for this column
                best = -threshold
                for k in range(count[far]):
                    i2 = sides[far, k]
                    value = (score[s] + score[i2]) - 2.0 * x[r, s] * x[r, i2] * line[i2]
                    if value < best:
                        best = value
                        j = i2
                if best >= -threshold:
                    continue
            partner[r, s] = j
            cross[r, s] = line[j]
            improving[r] = True
