# mypy: disallow-untyped-defs=False
"""The compiled loops of kswap: candidate steps of a row, and their best compound. Notation as in `kswap`."""

from __future__ import annotations

import numpy as np

from maskopt.solvers.compiled import loop, part

# no reference is counted: arrays belong to the callers, and nothing is allocated
_part = part(_nrt=False)


def search_rows(x, gram, kept, c, group, candidates, threshold, most, made, rows):
    """Make improving compounds in some rows until none is left or a row has made `most`; see `made`.

    Args:
        x, c, threshold: float64, as in `maskopt.solvers.swap.batch`.
        kept: bool [rows, n], changed in place.
        candidates: K of unstructured rows; K² steps of grouped ones.
        made: int64 [rows], how many compounds there were.
        rows: int64.
    """
    work = (
        np.empty((2, candidates), np.int64), np.empty((2, candidates)),  # chosen, prices
        np.empty((2, candidates**2), np.int64), np.empty(candidates**2),  # steps, deltas
    )  # fmt: skip
    _search_rows(x, gram, kept, c, group, threshold, most, made, work, rows)


@_part
def _price(x, gram, c, j, kept):
    """a of a kept input, b of a pruned one."""
    own = x[j] * x[j] * gram[j, j]
    return own + 2 * x[j] * c[j] if kept else own - 2 * x[j] * c[j]


@_part
def _least(x, gram, kept, c, side, chosen, values):
    """The inputs of one side with the least price, ascending, ties by index; how many."""
    count = 0
    for j in range(x.shape[0]):
        if kept[j] != side:
            continue
        value = _price(x, gram, c, j, side)
        if count == len(chosen) and value >= values[count - 1]:
            continue
        at = count if count < len(chosen) else count - 1
        while at > 0 and values[at - 1] > value:
            chosen[at], values[at] = chosen[at - 1], values[at - 1]
            at -= 1
        chosen[at], values[at] = j, value
        count = min(count + 1, len(chosen))
    return count


@_part
def _exchanges(x, gram, kept, c, work):
    """All exchanges of the kept of least a with the pruned of least b. → how many"""
    chosen, values, steps, deltas = work
    count = drop = keep = 0
    for side in range(2):  # the pruned, then the kept
        drop, keep = keep, _least(x, gram, kept, c, side == 1, chosen[side], values[side])
    for i in range(keep):
        for k in range(drop):
            u, q = chosen[1, i], chosen[0, k]
            steps[0, count], steps[1, count] = u, q
            deltas[count] = values[1, i] + values[0, k] - 2 * x[u] * x[q] * gram[u, q]
            count += 1
    return count


@_part
def _group_steps(x, gram, kept, c, group, work):
    """The legal steps of least Δ over all groups, ascending. → how many"""
    steps, deltas = work[2], work[3]
    count = 0
    for i in range(x.shape[0]):
        if not kept[i]:
            continue
        a = _price(x, gram, c, i, kept[i])
        first = i // group * group
        for q in range(first, first + group):
            if kept[q]:
                continue
            delta = a + _price(x, gram, c, q, kept[q]) - 2 * x[i] * x[q] * gram[i, q]
            if count == len(deltas) and delta >= deltas[count - 1]:
                continue
            at = count if count < len(deltas) else count - 1
            while at > 0 and deltas[at - 1] > delta:
                steps[0, at], steps[1, at] = steps[0, at - 1], steps[1, at - 1]
                deltas[at] = deltas[at - 1]
                at -= 1
            steps[0, at], steps[1, at], deltas[at] = i, q, delta
            count = min(count + 1, len(deltas))
    return count


@_part
def _best_compound(x, gram, steps, deltas, count, threshold):
    """The pair of steps on four different inputs that lowers f most, or (−1, −1)."""
    best = -threshold
    first = second = -1
    for i in range(count):
        u, q = steps[0, i], steps[1, i]
        for k in range(i):
            v, r = steps[0, k], steps[1, k]
            if u == v or q == r:
                continue
            cross = x[u] * (x[v] * gram[u, v] - x[r] * gram[u, r])
            cross -= x[q] * (x[v] * gram[q, v] - x[r] * gram[q, r])
            delta = deltas[i] + deltas[k] + 2 * cross
            if delta < best:
                best, first, second = delta, i, k
    return first, second


@_part
def _search_row(x, gram, kept, c, group, threshold, most, work):
    """Compounds of one row. → how many"""
    steps, deltas = work[2], work[3]
    for move in range(most):
        if group == x.shape[0]:
            count = _exchanges(x, gram, kept, c, work)
        else:
            count = _group_steps(x, gram, kept, c, group, work)
        first, second = _best_compound(x, gram, steps, deltas, count, threshold)
        if first < 0:
            return move
        for step in (first, second):
            u, q = steps[0, step], steps[1, step]
            kept[u], kept[q] = False, True
            for j in range(x.shape[0]):
                c[j] += x[u] * gram[u, j] - x[q] * gram[q, j]
    return most


@loop(nogil=True, _nrt=False)
def _search_rows(x, gram, kept, c, group, threshold, most, made, work, rows):
    for row in rows:
        made[row] = _search_row(x[row], gram, kept[row], c[row], group, threshold[row], most, work)
