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

from typing import Any

import numpy as np

from maskopt.solvers.kernels import njit
from maskopt.solvers.swap.numba_common import minimum

#: stands for "not allowed"; far above any Δ of a row scaled to Σ x²G_jj ≈ 1
FORBIDDEN = np.float32(1e30)
#: groups of at most so many inputs are searched over all their pairs
SMALL = 16
#: least value that has FORBIDDEN in it
BEYOND = FORBIDDEN * np.float32(0.1)
#: a mask counts as better below this share of the objective: float32 resolves no smaller difference
BETTER = 1 - 1e-6
#: moves of a descent, for each input: many times as many as one has
DESCENT = 8
# no reference is counted: arrays belong to the callers, and nothing is allocated
_exact = njit()
# every flag but `afn`: FORBIDDEN is finite, and reductions may be vectorised
_FLAGS = {"nnan", "ninf", "nsz", "reassoc", "contract", "arcp"}
_fast = njit(fastmath=_FLAGS, error_model="numpy")


@_fast
def _where(values, least):
    """The lowest index of that value. No early exit: a reduction is vectorised, a search is not."""
    first = np.int32(len(values))
    for j in range(len(values)):
        first = min(first, np.int32(j) if values[j] == least else np.int32(len(values)))
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
def _bar(j, pruned, free, square, bars):
    """Open j for the role it plays now if it is free, and shut it for the other."""
    bars[0, j] = square[j] if free and not pruned[j] else FORBIDDEN
    bars[1, j] = square[j] if free and pruned[j] else FORBIDDEN


@_fast
def _best_move(x, twice, gram, slope, bars, of_moves):
    """The best exchange of the least a with its partner, and of the least b with its, per group."""
    bar_kept, bar_pruned = bars[0], bars[1]
    a, b, out = of_moves[0], of_moves[1], of_moves[2]
    best = BEYOND
    kept, pruned = -1, -1
    group = len(out)
    one = np.float32(1)
    for first in range(0, len(x), group):
        last = first + group
        slope_part, twice_part = slope[first:last], twice[first:last]
        u = _price(bar_kept[first:last], slope_part, one, a)
        p = _price(bar_pruned[first:last], slope_part, -one, b)
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
def _best_of_small(cross, slope, bars):
    """All pairs of every group, where groups are small; cross[i, j] = −2 x_i x_j G_ij inside them."""
    bar_kept, bar_pruned = bars[0], bars[1]
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


@_exact
def _copy(source, target):
    for j in range(len(target)):
        target[j] = source[j]


@_exact
def _pairs(x, gram, cross):
    """cross[i, j] = −2 x_i x_j G_ij for the j-th input of i's group."""
    group = cross.shape[1]
    for i in range(len(cross)):
        first = i // group * group
        for j in range(group):
            cross[i, j] = np.float32(-2) * (x[i] * x[first + j]) * gram[i, first + j]


# Inputs whose tabu ends at the same move form a list: `head` by move, modulo the longest tenure, and
# `follow` by input. No input is in two of them, since none is moved while it is tabu.


@_exact
def _shut(j, expiry, head, follow):
    """Into the list of the move at which the tabu of j ends."""
    slot = expiry[j] % len(head)
    follow[j] = head[slot]
    head[slot] = j


@_exact
def _open(now, pruned, expiry, head, follow, square, bars):
    """Open the inputs whose tabu ends now."""
    slot = now % len(head)
    j = head[slot]
    while j >= 0:
        _bar(j, pruned, expiry[j] <= now, square, bars)
        j = follow[j]
    head[slot] = -1


@_exact
def _hold(now, plan, pruned, expiry, random, square, work):
    """End every tabu, and hold up to `kick` random inputs for twice the tenure and more."""
    bars, _, _, head, follow, _ = work
    _, _, _, tenure, spread, _, kick = plan
    head[:] = -1
    for j in range(len(expiry)):
        expiry[j] = now
    for _ in range(kick):
        j = int(_random(random) % np.uint64(len(expiry)))
        if expiry[j] <= now:
            expiry[j] = now + 2 * tenure + np.int64(_random(random) % np.uint64(spread + 1))
            _shut(j, expiry, head, follow)
    for j in range(len(expiry)):
        _bar(j, pruned, expiry[j] <= now, square, bars)


@_exact
def _enter(now, x, gram, square, pruned, expiry, work):
    """The workspace of a row, from where it stands at move `now`."""
    bars, _, cross, head, follow, twice = work
    for j in range(len(x)):
        twice[j] = np.float32(2) * x[j]
    _pairs(x, gram, cross)
    head[:] = -1
    for j in range(len(x)):
        if expiry[j] > now:
            _shut(j, expiry, head, follow)
        _bar(j, pruned, expiry[j] <= now, square, bars)


@_exact
def _search_row(scaled, state, plan, work, row):
    """Up to `moves` moves of a row beyond the first descent, after the rest of that. How many there were."""
    x, gram, linear, constant = scaled.x[row], scaled.gram, scaled.linear[row], scaled.constant[row]
    pruned, best_pruned, expiry = state.pruned[row], state.best[row], state.expiry[row]
    random, clock, slope = state.random[row], state.clock[row], state.slope[row]
    square, values = state.square[row], state.values[row]
    group, moves, scratch, tenure, spread, patience, _ = plan
    bars, of_moves, cross, head, follow, twice = work
    now, descending = clock[0], clock[2] == 0
    _enter(now, x, gram, square, pruned, expiry, work)
    if scratch:
        values[0] = _products(slope, x, gram, pruned, linear, constant)
    value, best_value = values
    if descending:
        best_value = value
    made = 0
    while made < moves:
        _open(now, pruned, expiry, head, follow, square, bars)
        if group <= SMALL:
            u, p, delta = _best_of_small(cross, slope, bars)
        else:
            u, p, delta = _best_move(x, twice, gram, slope, bars, of_moves)
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
            or now - clock[0] >= DESCENT * len(x)
        ):
            descending = False
            clock[2] = 1
        pruned[u], pruned[p] = 1, 0
        _exchange(slope, twice, gram[u], x[u], gram[p], x[p])
        value += delta
        now += 1
        if not descending:
            made += 1
        for j in (u, p):
            if not descending:
                expiry[j] = now + tenure + np.int64(_random(random) % np.uint64(spread + 1))
                _shut(j, expiry, head, follow)
            _bar(j, pruned, descending, square, bars)
        if value < best_value * BETTER:
            best_value = value
            _copy(pruned, best_pruned)
            clock[1] = now
        elif not descending and patience > 0 and now - clock[1] >= patience:
            _copy(best_pruned, pruned)
            value = best_value = _products(slope, x, gram, pruned, linear, constant)
            clock[1] = now
            _hold(now, plan, pruned, expiry, random, square, work)
    clock[0] = now
    values[0], values[1] = value, best_value
    return made


def search_rows(scaled: Any, state: Any, plan: Any, rows: np.ndarray) -> None:
    """Moves of some rows.

    Args:
        scaled: the problem, a `tabu.Scaled`.
        state: where the rows stand, a `tabu._State`.
        plan: group, moves, whether to compute c from scratch first, tenure, how much longer it may be,
            patience, and how many inputs a restart holds.
        rows: int64.
    """
    n, group, tenure, spread = scaled.x.shape[1], plan[0], plan[3], plan[4]
    work = (
        np.empty((2, n), np.float32),  # bars
        np.empty((3, group), np.float32),  # values of moves
        np.empty((n, group) if group <= SMALL else (0, 1), np.float32),  # cross
        np.empty(2 * (tenure + spread) + 2, np.int32),  # head
        np.empty(n, np.int32),  # follow
        np.empty(n, np.float32),  # twice x
    )
    _search_rows(scaled, state, plan, work, rows)


@njit
def _search_rows(scaled, state, plan, work, rows):
    for row in rows:
        state.moves[row] += _search_row(scaled, state, plan, work, row)
