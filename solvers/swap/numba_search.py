# mypy: disallow-untyped-defs=False
"""Step 1 of 1-swap search on the CPU, compiled: choose candidates, swap among them, bring c up to date."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maskopt.solvers.swap.numba_common import (
    BIG,
    fast,
    kernel,
    minimum,
    price_groups,
    scores,
    sort,
)
from maskopt.solvers.swap.torch_kernel import SMALL_GROUP

#: kept candidates of a round at most, and pruned ones; a constant, so that loops over it unroll
WIDTH = 48
#: slots of a block of candidates
SLOTS = 2 * WIDTH
#: what is at least this large has BIG in it
SHUT = BIG / 10
#: the largest and the least key of a float32; a column that is no candidate has the largest
TOP, BOTTOM = np.int32(2**31 - 1), np.int32(-(2**31) + 1)
#: first step of a search for a cut, in keys: an eighth of a factor of two
STEP = 2**20


class _Choice(NamedTuple):
    """The workspace of a choice of candidates. `columns`: the chosen ones, shared with `_Slots`."""

    columns: np.ndarray
    score: np.ndarray
    taken: np.ndarray
    rounded: np.ndarray
    bits: np.ndarray
    keys: np.ndarray
    guess: np.ndarray
    chosen: np.ndarray
    place: np.ndarray
    heap: np.ndarray

    @classmethod
    def of(cls, columns, n):
        bits, keys = np.empty(n, np.int32), np.empty(n, np.int32)
        return cls(
            columns,
            score=np.empty(n),
            taken=np.zeros(n, np.uint8),
            rounded=bits.view(np.float32),
            bits=bits,
            keys=keys,
            guess=np.zeros(2, np.int64),
            chosen=np.zeros(SLOTS, np.int64),
            place=np.zeros(SLOTS, np.int64),
            heap=np.empty(SLOTS),
        )


class _Slots(NamedTuple):
    """Candidates of a row, one a slot: their columns, block of G, scores, and bars that shut a side."""

    columns: np.ndarray
    block: np.ndarray
    cross: np.ndarray
    code: np.ndarray
    pruned: np.ndarray
    changed: np.ndarray
    linear: np.ndarray
    square: np.ndarray
    weight: np.ndarray
    light: np.ndarray
    bar_kept: np.ndarray
    bar_pruned: np.ndarray
    a: np.ndarray
    b: np.ndarray
    lowest: np.ndarray
    sums: np.ndarray

    @classmethod
    def of(cls, columns, gram, single):
        block, cross = np.empty((SLOTS, SLOTS), gram.dtype), np.empty((SLOTS, SLOTS), single)
        pruned, changed = np.zeros(SLOTS, np.int64), np.zeros(SLOTS, np.int64)
        doubles = [np.empty(SLOTS) for _ in range(3)]
        singles = [np.empty(SLOTS, single) for _ in range(7)]
        code = np.empty(SLOTS, np.int32)
        return cls(columns, block, cross, code, pruned, changed, *doubles, *singles)


def search_rows(gram, diagonal, batch, swaps, rounds, rule, most, rows):
    """Swap among candidates of some rows, step 1 of the search.

    Args:
        batch: `Rows`.
        swaps, rounds: of all rows, changed.
        rule: `Rule`.
        most: swaps of a row at most.
        rows: int64.
    """
    columns = np.zeros(SLOTS, np.int64)
    choice = _Choice.of(columns, batch.low.shape[1])
    slots = _Slots.of(columns, gram, batch.low.dtype)
    _search_rows(gram, diagonal, batch, swaps, rounds, rule, most, choice, slots, rows)


@fast
def _order(kept, wanted, choice):
    """Write keys that order as the float32 scores of one side's free columns do; TOP for all others.

    Returns the least key, and the largest below TOP (BOTTOM where there is none).
    """
    score, taken, rounded = choice.score, choice.taken, choice.rounded
    bits, keys = choice.bits, choice.keys
    n = len(score)
    for j in range(n):
        rounded[j] = score[j] if (kept[j] == wanted) & (taken[j] == 0) else BIG
    for j in range(n):
        key = bits[j] ^ ((bits[j] >> np.int32(31)) & TOP)
        keys[j] = key if rounded[j] < np.float32(BIG) else TOP
    least, most = TOP, BOTTOM
    for j in range(n):
        least = min(least, keys[j])
    for j in range(n):
        most = max(most, keys[j] if keys[j] < TOP else BOTTOM)
    return least, most


@fast
def _count(keys, cut):
    """Count the keys up to the cut."""
    count = np.int32(0)
    limit = np.int32(cut)
    for j in range(len(keys)):
        count += np.int32(keys[j] <= limit)
    return np.int64(count)


@fast
def _least(kept, side, most, at, choice):
    """Write up to `most` columns of least score of one side, none taken, from place `at` on; return how many.

    A cut through the bits of the float32 scores separates them, which needs no branch a column: bisection,
    from the last cut on, to a key with `most`, or up to a quarter less, of the keys at or below it. Columns
    come out ascending; of equal scores the lowest columns are in.
    """
    keys, guess, columns = choice.keys, choice.guess, choice.columns
    if most <= 0:
        return 0
    least, largest = _order(kept, side == 1, choice)
    if largest == BOTTOM:
        return 0
    low, high = np.int64(least) - 1, np.int64(largest)
    cut, step = guess[side], np.int64(STEP)
    below, above, settled = False, False, _count(keys, high) <= most
    if settled:
        cut = high
    while not settled and high - low > 1:
        cut = min(max(cut, low + 1), high - 1)
        count = _count(keys, cut)
        if count > most:
            high, above = cut, True
        elif count < most - most // 4:
            low, below = cut, True
        else:
            settled = True
            break
        if below and above:
            cut = (low + high) // 2
        elif above:
            cut, step = cut - step, 2 * step
        else:
            cut, step = cut + step, 2 * step
    if not settled:
        cut = low  # too few up to here, too many equal ones next: the first of these
    guess[side] = cut
    size = 0
    for j in range(len(keys)):
        if keys[j] <= cut:
            columns[at + size] = j
            size += 1
    if not settled:
        for j in range(len(keys)):
            if size < most and keys[j] == high:
                columns[at + size] = j
                size += 1
        sort(columns, at, at + size)
    return size


@fast
def _harvest(x, kept, partner, cross, threshold, most, choice):
    """Choose the columns of the up to `most` best pairs of the harvest that still improve; return how many.

    A pair whose columns are both on one side by now is forgotten.
    """
    score, taken, chosen = choice.score, choice.taken, choice.chosen
    place, heap = choice.place, choice.heap
    size = 0
    for j in range(len(score)):
        i = partner[j]
        if i < 0:
            continue
        if kept[i] == kept[j]:
            partner[j] = -1
            continue
        value = score[i] + score[j] - 2.0 * x[i] * x[j] * cross[j]
        if value >= -threshold:
            continue
        if size < most:  # insertion sort, worst last
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
    total = 0
    for s in range(size):
        for column in (place[s], np.int64(partner[place[s]])):
            if not taken[column]:
                taken[column] = 1
                chosen[total] = column
                total += 1
    return total


@fast
def _choose(kept, total, fill, choice):
    """Choose candidates of one row and return k, m: columns up to k are kept, up to m pruned, each ascending.

    The harvest comes first, `total` columns; where `fill`, the kept of least a and the pruned of least b fill
    the remaining places.
    """
    taken, columns, chosen = choice.taken, choice.columns, choice.chosen
    k = at = np.int64(0)
    for side in (1, 0):
        first = at
        for s in range(total):
            if kept[chosen[s]] == (side == 1):
                columns[at] = chosen[s]
                at += 1
        if fill:
            at += _least(kept, side, WIDTH - (at - first), at, choice)
        if total:
            sort(columns, first, at)
        if side == 1:
            k = at
    for s in range(total):
        taken[chosen[s]] = 0
    return k, at


# The steps of a swap are functions of their own and of few arrays: LLVM makes SIMD of a loop only
# where it can tell that arrays do not overlap, and gives up on a long function with many of them.


@fast
def _gather(gram, at, block):
    """Copy the block of G of some columns. Half of it is read, for what it costs to bring G in."""
    for s in range(SLOTS):
        line = gram[at[s]]
        for t in range(s + 1):
            value = line[at[t]]
            block[s, t] = value
            block[t, s] = value


@fast
def _cross(t, light, block, cross):
    """Write −2 x_s x_t G_st of one slot with all."""
    line, twice, out = block[t], light.dtype.type(-2) * light[t], cross[t]
    for s in range(SLOTS):
        out[s] = twice * (light[s] * line[s])


@fast
def _forbid(t, columns, group, cross):
    """Write BIG where another slot belongs to another group."""
    team = columns[t] // group
    for s in range(SLOTS):
        if columns[s] // group != team:
            cross[t, s] = BIG


@fast
def _candidate_scores(square, linear, bar_kept, bar_pruned, a, b):
    """Write a of kept slots and b of pruned ones in the proposing dtype, BIG on the other side."""
    for s in range(SLOTS):
        a[s] = (square[s] + linear[s]) + bar_kept[s]
    for s in range(SLOTS):
        b[s] = (square[s] - linear[s]) + bar_pruned[s]


@fast
def _least_over_pruned(b, cross, pruned, count, lowest):
    """Write for every slot the least b_t + cross over the pruned slots t, four of them at a time."""
    for s in range(SLOTS):
        lowest[s] = BIG
    for i in range(0, count, 4):
        t0, t1, t2, t3 = pruned[i], pruned[i + 1], pruned[i + 2], pruned[i + 3]
        b0, b1, b2, b3 = b[t0], b[t1], b[t2], b[t3]
        cross0, cross1, cross2, cross3 = cross[t0], cross[t1], cross[t2], cross[t3]
        for s in range(SLOTS):
            first = minimum(b0 + cross0[s], b1 + cross1[s])
            second = minimum(b2 + cross2[s], b3 + cross3[s])
            lowest[s] = minimum(lowest[s], minimum(first, second))


@fast
def _least_sum(left, right, code, sums):
    """Return the slot s of the least left_s + right_s, −1 where all are BIG; ties: the lowest column."""
    best = left.dtype.type(BIG)
    for s in range(SLOTS):
        sums[s] = left[s] + right[s]
        best = minimum(best, sums[s])
    if best >= left.dtype.type(SHUT):
        return -1
    least_code = TOP
    for s in range(SLOTS):
        least_code = min(least_code, code[s] if sums[s] == best else TOP)
    return np.int64(least_code % SLOTS)


@fast
def _move_linear(u, q, weight, block, linear):
    """Update 2 x c of all slots after u and q changed sides."""
    line_u, line_q, w_u, w_q = block[u], block[q], weight[u], weight[q]
    for s in range(SLOTS):
        linear[s] += 2.0 * weight[s] * (w_u * line_u[s] - w_q * line_q[s])


@fast
def _load(gram, x, low, diagonal, c, k, m, group, slots):
    """Bring candidates into their slots: k kept ones, then pruned ones up to m, then fillers."""
    columns, pruned, code = slots.columns, slots.pruned, slots.code
    block, cross = slots.block, slots.cross
    linear, square, weight, light = slots.linear, slots.square, slots.weight, slots.light
    bar_kept, bar_pruned = slots.bar_kept, slots.bar_pruned
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
        pruned[s] = k + s if s < m - k else k  # filled up with the first pruned slot
    for t in range(k, m):
        _cross(t, light, block, cross)
        if group < len(x):
            _forbid(t, columns, group, cross)


@fast
def _store(kept, m, slots):
    """Write the sides of the slots into the mask, list what changed, ascending, and return how many."""
    columns, changed, bar_kept = slots.columns, slots.changed, slots.bar_kept
    count = first = np.int64(0)
    for s in range(m):
        j = columns[s]
        if kept[j] != (bar_kept[s] == 0.0):
            kept[j] = bar_kept[s] == 0.0
            changed[count] = j
            count += 1
    sort(changed, first, count)
    return count


@fast
def _exchange(pruned_count, grouped, objective, mass, rule, most, slots):
    """Make best swaps between slots, `pruned_count` of them pruned, until none gains more than the threshold.

    Nothing outside the candidates' block of G is read, and nothing of the block moves: a swap changes
    the bars that shut a slot for one of the two sides. Returns the number of swaps, `most` at most, and
    the objective.
    """
    columns, pruned, code = slots.columns, slots.pruned, slots.code
    block, cross, lowest, sums = slots.block, slots.cross, slots.lowest, slots.sums
    linear, square, weight, light = slots.linear, slots.square, slots.weight, slots.light
    bar_kept, bar_pruned, a, b = slots.bar_kept, slots.bar_pruned, slots.a, slots.b
    made = 0
    while made < most:
        _candidate_scores(square, linear, bar_kept, bar_pruned, a, b)
        _least_over_pruned(b, cross, pruned, pruned_count, lowest)
        u = _least_sum(a, lowest, code, sums)
        if u < 0:
            break
        _cross(u, light, block, cross)  # and if u is pruned below, its row is there already
        if grouped:
            _forbid(u, columns, rule.group, cross)
        q = _least_sum(b, cross[u], code, sums)
        delta = (square[u] + linear[u]) + (square[q] - linear[q])
        delta -= 2.0 * weight[u] * weight[q] * block[u, q]
        if delta >= -(rule.relative * max(objective, 0.0) + rule.floor * mass):
            break
        objective += delta
        made += 1
        _move_linear(u, q, weight, block, linear)
        bar_kept[u], bar_pruned[u] = BIG, 0.0
        bar_kept[q], bar_pruned[q] = 0.0, BIG
        for i in range(SLOTS):
            pruned[i] = u if pruned[i] == q else pruned[i]
    return made, objective


@fast
def _swap_harvested(partner, k, m, choice, slots):
    """Swap the best pair of the harvest and return how the objective changes.

    It improves by float64, where the lower precision proposed no pair that does.
    """
    bar_kept, bar_pruned = slots.bar_kept, slots.bar_pruned
    columns, j = slots.columns, choice.place[0]
    for s in range(m):
        if columns[s] == j or columns[s] == partner[j]:
            bar_kept[s], bar_pruned[s] = (BIG, 0.0) if s < k else (0.0, BIG)
    return choice.heap[0]


@fast
def _add_columns(gram, x, kept, c, changed, count):
    """Update c after the named columns changed sides: ± x_j G_j,: for each, four at a time."""
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


@kernel
def _search_rows(gram, diagonal, batch, swaps, rounds, rule, most, choice, slots, rows):
    """Swap in rounds of candidates, until fresh candidates hold no improving pair."""
    x, low, kept, c = batch.x, batch.low, batch.kept, batch.c
    partner, cross, objective, mass = batch.partner, batch.cross, batch.objective, batch.mass
    score, group = choice.score, rule.group
    grouped = group < len(score)
    most_pairs = WIDTH if grouped else WIDTH // 2
    for r in rows:
        choice.guess[:] = 0
        while swaps[r] < most:
            threshold = rule.relative * max(objective[r], 0.0) + rule.floor * mass[r]
            scores(x[r], diagonal, c[r], kept[r], score)
            if grouped and group <= SMALL_GROUP:
                price_groups(gram, x[r], kept[r], score, group, threshold, partner[r], cross[r])
            total = _harvest(x[r], kept[r], partner[r], cross[r], threshold, most_pairs, choice)
            k, m = _choose(kept[r], total, not grouped, choice)
            if k == 0 or k == m:
                break
            rounds[r] += 1
            _load(gram, x[r], low[r], diagonal, c[r], k, m, group, slots)
            left = most - swaps[r]
            made, objective[r] = _exchange(m - k, grouped, objective[r], mass[r], rule, left, slots)
            if made == 0 and total > 0:
                change = _swap_harvested(partner[r], k, m, choice, slots)
                made, objective[r] = 1, objective[r] + change
            if made == 0:
                break
            swaps[r] += made
            count = _store(kept[r], m, slots)
            _add_columns(gram, x[r], kept[r], c[r], slots.changed, count)
