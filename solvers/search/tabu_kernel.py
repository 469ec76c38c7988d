# mypy: disallow-untyped-defs=False
"""The compiled inner loop of tabu search: no allocation per move.

For one row in scaled units, x = w·const, P the pruned and U the kept inputs, c = G(x ⊙ pruned):

    Δ(u, p) = a_u + b_p − 2 x_u x_p G_up,   a = x²·diag G + 2xc,   b = x²·diag G − 2xc.

A move considers all pairs where groups are small, and otherwise, in every group, the kept u of least a
with its best partner p, and the pruned p of least b with its best partner u, both exact: O(n) instead
of |U|·|P| pairs. Looking at fewer pairs is no loss: best-swap tabu over longer candidate lists (2 to 16
a side) was not better after the same number of moves on real q_proj, gate_proj and o_proj rows, and
mostly worse: the narrow list is a diversification of its own.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from maskopt.solvers.compiled import loop, part
from maskopt.solvers.swap.numba_common import minimum

#: stands for "not allowed"; far above any Δ of a row scaled to Σ x²G_jj ≈ 1
FORBIDDEN = np.float32(1e30)
#: groups of at most so many inputs are searched over all their pairs
SMALL = 16
#: least value that has FORBIDDEN in it
BEYOND = FORBIDDEN * np.float32(0.1)
#: a mask is better than another one from this part of its objective on; float32 cannot resolve less
BETTER = 1 - 1e-6
#: moves of a descent, for each input: many times as many as one has
DESCENT = 8
#: group size, moves, whether to compute c from scratch first, tenure, how much longer it may be, patience,
#: and how many inputs a restart holds
Settings = namedtuple("Settings", "group moves scratch tenure spread patience held")
#: float32 [n] and [group] (a, b, out), [n, group], int32 lists of moves and of inputs, float32 [n]
_Work = namedtuple("_Work", "bar_kept bar_pruned a b out cross head follow twice")
# no reference is counted: arrays belong to the callers, and nothing is allocated
_exact = part(error_model="numpy", _nrt=False)
# every flag but `afn`: FORBIDDEN is finite, and reductions may be vectorised
_FLAGS = {"nnan", "ninf", "nsz", "reassoc", "contract", "arcp"}
_fast = part(fastmath=_FLAGS, error_model="numpy", _nrt=False)


def search_rows(x, gram, state, settings, rows):
    """Moves of some rows.

    Args:
        x, gram: float32, scaled so that Σ x²G_jj = 1.
        state: where the rows stand, a `tabu._State`.
        settings: `Settings`.
        rows: int64.
    """
    n, group = x.shape[1], settings.group
    bar_kept, bar_pruned, twice = np.empty((3, n), np.float32)
    a, b, out = np.empty((3, group), np.float32)
    cross = np.empty((n, group) if group <= SMALL else (0, 1), np.float32)
    head = np.empty(2 * (settings.tenure + settings.spread) + 2, np.int32)
    work = _Work(bar_kept, bar_pruned, a, b, out, cross, head, np.empty(n, np.int32), twice)
    _search_rows(x, gram, state, settings, work, rows)


@_fast
def _where(values, least):
    """The lowest index of that value. No early exit: a reduction is vectorised, a search is not."""
    first = np.int32(len(values))
    for j in range(len(values)):
        first = minimum(first, np.int32(j) if values[j] == least else np.int32(len(values)))
    return first


@_fast
def _price(bar, slope, sign, out):
    """out ← a or b; the lowest index of the least."""
    least = FORBIDDEN
    for j in range(len(out)):
        value = bar[j] + sign * slope[j]
        out[j] = value
        least = minimum(value, least)
    return _where(out, least)


@_fast
def _partner(own, twice, line, weight, out):
    """The j of least own_j − 2·weight·x_j·line_j; the values are left in out."""
    least = FORBIDDEN
    for j in range(len(out)):
        value = own[j] - weight * (twice[j] * line[j])
        out[j] = value
        least = minimum(value, least)
    return _where(out, least)


@_fast
def _products(slope, x, gram, pruned, linear, constant):
    """slope ← 2x⊙G(x ⊙ pruned) + linear from scratch; returns the objective."""
    slope[:] = 0
    for j in range(len(slope)):
        if pruned[j]:
            weight = x[j]
            line = gram[j]
            for i in range(len(slope)):
                slope[i] += weight * line[i]
    objective = constant
    for j in range(len(slope)):
        if pruned[j]:
            objective += np.float64(x[j]) * np.float64(slope[j]) + np.float64(linear[j])
        slope[j] = slope[j] * (np.float32(2) * x[j]) + linear[j]
    return objective


@_fast
def _exchange(slope, twice, added, plus, gone, minus):
    for j in range(len(slope)):
        slope[j] += twice[j] * (plus * added[j] - minus * gone[j])


@_exact
def _random(state):
    """SplitMix64."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@_exact
def _bar(j, pruned, free, square, work):
    """Open j for the role it plays now if it is free, and shut it for the other."""
    work.bar_kept[j] = square[j] if free and not pruned[j] else FORBIDDEN
    work.bar_pruned[j] = square[j] if free and pruned[j] else FORBIDDEN


@_fast
def _best_move(x, gram, slope, work):
    """The best exchange of the least a with its partner, and of the least b with its, per group."""
    a, b, out = work.a, work.b, work.out
    best = BEYOND
    kept, pruned = -1, -1
    group = len(out)
    one = np.float32(1)
    for first in range(0, len(x), group):
        last = first + group
        slope_part, twice_part = slope[first:last], work.twice[first:last]
        u = _price(work.bar_kept[first:last], slope_part, one, a)
        p = _price(work.bar_pruned[first:last], slope_part, -one, b)
        if a[u] > BEYOND or b[p] > BEYOND:
            continue
        q = _partner(b, twice_part, gram[first + u, first:last], x[first + u], out)
        value = a[u] + out[q]
        if value < best:
            best, kept, pruned = value, first + u, first + q
        v = _partner(a, twice_part, gram[first + p, first:last], x[first + p], out)
        value = b[p] + out[v]
        if value < best:
            best, kept, pruned = value, first + v, first + p
    return kept, pruned, best


@_fast
def _best_of_small(slope, work):
    """All pairs of every group, where groups are small; cross[i, j] = −2 x_i x_j G_ij inside them."""
    cross, bar_kept, bar_pruned = work.cross, work.bar_kept, work.bar_pruned
    best = BEYOND
    kept, pruned = -1, -1
    n, group = cross.shape
    for first in range(0, n, group):
        for i in range(first, first + group):
            a = bar_kept[i] + slope[i]
            if a < BEYOND:
                for j in range(group):
                    p = first + j
                    value = a + bar_pruned[p] - slope[p] + cross[i, j]
                    if value < best:
                        best, kept, pruned = value, i, p
    return kept, pruned, best


# Inputs whose tabu ends at the same move form a list: `head` by move, modulo the longest tenure, and
# `follow` by input. No input is in two of them, since none is moved while it is tabu.


@_exact
def _shut(j, expiry, work):
    """Into the list of the move at which the tabu of j ends."""
    slot = expiry[j] % len(work.head)
    work.follow[j] = work.head[slot]
    work.head[slot] = j


@_exact
def _open(now, pruned, expiry, square, work):
    """Open the inputs whose tabu ends now."""
    slot = now % len(work.head)
    j = np.int64(work.head[slot])
    while j >= 0:
        _bar(j, pruned, expiry[j] <= now, square, work)
        j = np.int64(work.follow[j])
    work.head[slot] = -1


@_exact
def _hold(now, settings, expiry, random, work):
    """End every tabu, and hold up to `held` random inputs for twice the tenure and more."""
    work.head[:] = -1
    for j in range(len(expiry)):
        expiry[j] = now
    for _ in range(settings.held):
        chosen = np.int64(_random(random) % np.uint64(len(expiry)))
        if expiry[chosen] <= now:
            longer = np.int64(_random(random) % np.uint64(settings.spread + 1))
            expiry[chosen] = now + 2 * settings.tenure + longer
            _shut(chosen, expiry, work)


@_exact
def _enter(now, x, gram, square, pruned, expiry, work):
    """The workspace of a row, from where it stands at move `now`."""
    cross = work.cross
    group = cross.shape[1]
    for i in range(len(cross)):
        first = i // group * group
        for j in range(group):
            cross[i, j] = np.float32(-2) * (x[i] * x[first + j]) * gram[i, first + j]
    work.head[:] = -1
    for j in range(len(x)):
        work.twice[j] = np.float32(2) * x[j]
        if expiry[j] > now:
            _shut(j, expiry, work)
        _bar(j, pruned, expiry[j] <= now, square, work)


@loop(nogil=True, error_model="numpy", _nrt=False)
def _search_rows(all_x, gram, state, settings, work, rows):
    """Up to `settings.moves` moves of every row beyond its first descent, after the rest of that."""
    for row in rows:
        x, square, linear, slope = (
            all_x[row],
            state.square[row],
            state.linear[row],
            state.slope[row],
        )
        pruned, best, expiry = state.pruned[row], state.best[row], state.expiry[row]
        random, clock, values = state.random[row], state.clock[row], state.values[row]
        n, constant = len(x), state.constant[row]
        now, descending = clock[0], clock[2] == 0
        begun = now
        _enter(now, x, gram, square, pruned, expiry, work)
        if settings.scratch:
            values[0] = _products(slope, x, gram, pruned, linear, constant)
        value, best_value = values[0], values[1]
        if descending:
            best_value = value
        made = 0
        while made < settings.moves:
            _open(now, pruned, expiry, square, work)
            if settings.group <= SMALL:
                u, p, delta = _best_of_small(slope, work)
            else:
                u, p, delta = _best_move(x, gram, slope, work)
            if u < 0:
                if descending:
                    break
                # everything is tabu: let time pass
                now += 1
                made += 1
                continue
            if descending and (
                value + delta >= best_value * BETTER
                # by float32's rounding alone values could fall on and on, below 0
                or value + delta <= 0.0
                or now - begun >= DESCENT * n
            ):
                descending = False
                clock[2] = 1
            pruned[u], pruned[p] = 1, 0
            _exchange(slope, work.twice, gram[u], x[u], gram[p], x[p])
            value += delta
            now += 1
            if not descending:
                made += 1
            for j in (u, p):
                if not descending:
                    longer = np.int64(_random(random) % np.uint64(settings.spread + 1))
                    expiry[j] = now + settings.tenure + longer
                    _shut(j, expiry, work)
                _bar(j, pruned, descending, square, work)
            if value < best_value * BETTER:
                best_value = value
                for j in range(n):
                    best[j] = pruned[j]
                clock[1] = now
            elif not descending and 0 < settings.patience <= now - clock[1]:
                for j in range(n):
                    pruned[j] = best[j]
                value = best_value = _products(slope, x, gram, pruned, linear, constant)
                clock[1] = now
                _hold(now, settings, expiry, random, work)
                for j in range(n):
                    _bar(j, pruned, expiry[j] <= now, square, work)
        clock[0] = now
        values[0], values[1] = value, best_value
        state.moves[row] += made
