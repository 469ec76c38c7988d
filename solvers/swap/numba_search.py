# mypy: ignore-errors
"""Step 1 of 1-swap search on the CPU, compiled: choose candidates, swap among them, bring c up to date."""

from __future__ import annotations

import numpy as np

from maskopt.solvers.swap.numba_common import BIG, SMALL_GROUP, fast, minimum, price_groups, scores

#: kept candidates of a round at most, and pruned ones; a constant, so that loops over it unroll
WIDTH = 48
#: slots of a block of candidates
SLOTS = 2 * WIDTH


@fast
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


@fast
def _count(keys, cut):
    """How many keys are at most the cut."""
    count = np.int32(0)
    limit = np.int32(cut)
    for j in range(len(keys)):
        count += np.int32(keys[j] <= limit)
    return np.int64(count)


@fast
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


# The steps of a swap are functions of their own and of few arrays: LLVM makes SIMD of a loop only
# where it can tell that arrays do not overlap, and gives up on a long function with many of them.


@fast
def _gather(gram, at, block):
    """The block of G of some columns. Half of it is read, for what it costs to bring G in."""
    for s in range(SLOTS):
        line = gram[at[s]]
        for t in range(s + 1):
            value = line[at[t]]
            block[s, t] = value
            block[t, s] = value


@fast
def _cross(t, light, block, cross):
    """−2 x_s x_t G_st of one slot with all."""
    line, twice, out = block[t], light.dtype.type(-2) * light[t], cross[t]
    for s in range(SLOTS):
        out[s] = twice * (light[s] * line[s])


@fast
def _forbid(t, columns, group, cross):
    """BIG where another slot belongs to another group."""
    team = columns[t] // group
    for s in range(SLOTS):
        if columns[s] // group != team:
            cross[t, s] = BIG


@fast
def _candidate_scores(square, linear, bar_kept, bar_pruned, a, b):
    """a of kept slots and b of pruned ones in the dtype that proposes, BIG on the other side."""
    for s in range(SLOTS):
        a[s] = (square[s] + linear[s]) + bar_kept[s]
    for s in range(SLOTS):
        b[s] = (square[s] - linear[s]) + bar_pruned[s]


@fast
def _least_over_pruned(b, cross, pruned, count, lowest):
    """For every slot the least b_t + cross over the pruned slots t, four of them at a time."""
    for s in range(SLOTS):
        lowest[s] = BIG
    for i in range(0, count, 4):
        t0, t1, t2, t3 = pruned[i], pruned[i + 1], pruned[i + 2], pruned[i + 3]
        b0, b1, b2, b3 = b[t0], b[t1], b[t2], b[t3]
        cross0, cross1, cross2, cross3 = cross[t0], cross[t1], cross[t2], cross[t3]
        for s in range(SLOTS):
            one = minimum(b0 + cross0[s], b1 + cross1[s])
            two = minimum(b2 + cross2[s], b3 + cross3[s])
            lowest[s] = minimum(lowest[s], minimum(one, two))


@fast
def _least_sum(one, two, code, sums):
    """The slot s of the least one_s + two_s, of equal ones that of the lowest column.

    −1 where all are BIG.
    """
    best = one.dtype.type(BIG)
    for s in range(SLOTS):
        sums[s] = one[s] + two[s]
        best = minimum(best, sums[s])
    if best >= one.dtype.type(BIG / 10):
        return -1
    none = np.int32(2**31 - 1)
    found = none
    for s in range(SLOTS):
        found = min(found, code[s] if sums[s] == best else none)
    return np.int64(found % SLOTS)


@fast
def _move_linear(u, q, weight, block, linear):
    """2 x c of all slots after u and q changed sides."""
    line_u, line_q, w_u, w_q = block[u], block[q], weight[u], weight[q]
    for s in range(SLOTS):
        linear[s] += 2.0 * weight[s] * (w_u * line_u[s] - w_q * line_q[s])


@fast
def _exchange(
    gram, x, low, diagonal, kept, c, columns, k, p, group, objective, mass, relative, floor, most,
    state, changed,
):  # fmt: skip
    """Best swaps among k kept and p pruned candidates until none gains more than the threshold.

    Nothing outside the candidates' block of G is read until c is brought up to date at the end, and
    nothing of the block moves: a swap changes the bars that shut a slot for one of the two sides.
    → swaps, objective
    """
    block, cross, linear, square, weight, light, code, bars, a, b, lowest, sums, pruned = state
    bar_kept, bar_pruned = bars
    m = k + p
    columns[m:] = columns[0]
    _gather(gram, columns, block)
    for s in range(SLOTS):
        j = columns[s]
        weight[s], light[s] = x[j], low[j]
        square[s] = x[j] * x[j] * diagonal[j]
        linear[s] = 2.0 * x[j] * c[j]
        code[s] = np.int32(j) * np.int32(SLOTS) + np.int32(s)
        bar_kept[s] = 0.0 if s < k else BIG
        bar_pruned[s] = 0.0 if k <= s < m else BIG
        pruned[s] = k + s if s < p else k  # filled up with one that is there already
    grouped = group < len(x)
    for t in range(k, m):
        _cross(t, light, block, cross)
        if grouped:
            _forbid(t, columns, group, cross)
    made = 0
    while made < most:
        _candidate_scores(square, linear, bar_kept, bar_pruned, a, b)
        _least_over_pruned(b, cross, pruned, p, lowest)
        u = _least_sum(a, lowest, code, sums)
        if u < 0:
            break
        _cross(u, light, block, cross)  # and if u is pruned below, its row is there already
        if grouped:
            _forbid(u, columns, group, cross)
        q = _least_sum(b, cross[u], code, sums)
        delta = (square[u] + linear[u]) + (square[q] - linear[q])
        delta -= 2.0 * weight[u] * weight[q] * block[u, q]
        if delta >= -(relative * max(objective, 0.0) + floor * mass):
            break
        objective += delta
        made += 1
        _move_linear(u, q, weight, block, linear)
        bar_kept[u], bar_pruned[u] = BIG, 0.0
        bar_kept[q], bar_pruned[q] = 0.0, BIG
        for i in range(SLOTS):
            pruned[i] = u if pruned[i] == q else pruned[i]
    if made:
        count = 0
        for s in range(m):
            j = columns[s]
            if kept[j] != (bar_kept[s] == 0.0):
                kept[j] = bar_kept[s] == 0.0
                changed[count] = j
                count += 1
        changed[:count].sort()
        _add_columns(gram, x, kept, c, changed, count)
    return made, objective


@fast
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


@fast
def search_rows(
    gram, x, low, diagonal, kept, c, partner, cross, objective, mass, swaps, rounds, group,
    relative, floor, most, rows,
):  # fmt: skip
    """Rounds of candidates for some rows, until fresh candidates hold no improving pair."""
    n = x.shape[1]
    taken = np.zeros(n, np.uint8)
    score = np.empty(n, np.float64)
    rounded, keys = np.empty(n, np.float32), np.empty(n, np.int32)
    guess = np.zeros(2, np.int64)
    heap, place = np.empty(WIDTH, np.float64), np.empty(WIDTH, np.int64)
    columns, changed = np.zeros(SLOTS, np.int64), np.empty(SLOTS, np.int64)
    state = (
        np.empty((SLOTS, SLOTS), gram.dtype),  # block
        np.empty((SLOTS, SLOTS), low.dtype),  # cross
        np.empty(SLOTS), np.empty(SLOTS), np.empty(SLOTS),  # linear, square, weight
        np.empty(SLOTS, low.dtype), np.empty(SLOTS, np.int32),  # light, code
        (np.empty(SLOTS, low.dtype), np.empty(SLOTS, low.dtype)),  # bars
        np.empty(SLOTS, low.dtype), np.empty(SLOTS, low.dtype),  # a, b
        np.empty(SLOTS, low.dtype), np.empty(SLOTS, low.dtype),  # lowest, sums
        np.empty(SLOTS, np.int64),  # pruned
    )  # fmt: skip
    for r in rows:
        guess[:] = 0
        while swaps[r] < most:
            threshold = relative * max(objective[r], 0.0) + floor * mass[r]
            scores(x[r], diagonal, c[r], kept[r], score)
            if group <= SMALL_GROUP and group < n:
                price_groups(gram, x[r], kept[r], score, group, threshold, partner[r], cross[r])
            k, p = _choose(
                x[r], kept[r], score, partner[r], cross[r], threshold, WIDTH, group == n, taken,
                columns, heap, place, rounded, keys, guess,
            )  # fmt: skip
            if k == 0 or p == 0:
                break
            rounds[r] += 1
            made, objective[r] = _exchange(
                gram, x[r], low[r], diagonal, kept[r], c[r], columns, k, p, group, objective[r],
                mass[r], relative, floor, most - swaps[r], state, changed,
            )  # fmt: skip
            swaps[r] += made
            if made == 0:
                break
