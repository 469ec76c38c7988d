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

from typing import Any, NamedTuple

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
# every flag but `afn`: FORBIDDEN is finite, and reductions may be vectorised
_FLAGS = {"nnan", "ninf", "nsz", "reassoc", "contract", "arcp"}
_fast = njit(fastmath=_FLAGS, error_model="numpy")


class MovePlan(NamedTuple):
    """A round of moves: their number, and the rules of tenures and restarts.

    Attributes:
        scratch: whether c is computed from scratch first.
        spread: the most that a tenure may be longer than `tenure`.
        held: inputs that a restart holds.
    """

    group: int
    moves: int
    scratch: bool
    tenure: int
    spread: int
    patience: int
    held: int


class _Workspace(NamedTuple):
    """Arrays of one row.

    Attributes:
        bars: x²G_jj of an input that may be pruned, or kept again; FORBIDDEN where it may not.
        of_moves: values of the moves of a group.
        cross: see `_pairs`; empty where groups are large.
        head, follow: the lists of inputs whose tabu ends at the same move.
        twice: 2x.
    """

    bars: np.ndarray
    of_moves: np.ndarray
    cross: np.ndarray
    head: np.ndarray
    follow: np.ndarray
    twice: np.ndarray


@_fast
def _where(values, least):
    """Return the lowest index of that value.

    There is no early exit: a reduction is vectorised, a search is not.
    """
    first = np.int32(len(values))
    for j in range(len(values)):
        first = min(first, np.int32(j) if values[j] == least else np.int32(len(values)))
    return first


@_fast
def _price(bar, slope, sign, out):
    """Write a or b to out, and return the lowest index of the least."""
    least = FORBIDDEN
    for j in range(len(out)):
        value = bar[j] + sign * slope[j]
        out[j] = value
        least = minimum(value, least)
    return _where(out, least)


@_fast
def _partner(price, twice, line, weight, out):
    """Return the j of least price_j − 2·weight·x_j·line_j; the values are left in out."""
    least = FORBIDDEN
    for j in range(len(out)):
        value = price[j] - weight * (twice[j] * line[j])
        out[j] = value
        least = minimum(value, least)
    return _where(out, least)


@_fast
def _products(slope, x, gram, pruned, linear, constant):
    """Compute slope = 2x⊙G(x ⊙ pruned) + linear from scratch, and return the objective."""
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


@njit
def _random(state):
    """Return the next number of SplitMix64."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit
def _bar(j, pruned, free, square, bars):
    """Open j for the role it plays now if it is free, and shut it for the other."""
    bars[0, j] = square[j] if free and not pruned[j] else FORBIDDEN
    bars[1, j] = square[j] if free and pruned[j] else FORBIDDEN


@_fast
def _best_move(x, twice, gram, slope, bars, of_moves):
    """Return the best exchange of the least a with its partner, or of the least b with its, of all groups."""
    bar_kept, bar_pruned = bars[0], bars[1]
    a, b, out = of_moves[0], of_moves[1], of_moves[2]
    best = BEYOND
    kept, pruned = -1, -1
    group = len(out)
    for first in range(0, len(x), group):
        last = first + group
        slope_part, twice_part = slope[first:last], twice[first:last]
        u = _price(bar_kept[first:last], slope_part, np.float32(1), a)
        p = _price(bar_pruned[first:last], slope_part, np.float32(-1), b)
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
    """Return the best of all pairs of small groups; cross[i, j] = −2 x_i x_j G_ij inside them."""
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


@njit
def _copy(source, target):
    for j in range(len(target)):
        target[j] = source[j]


@njit
def _pairs(x, gram, cross):
    """Write cross[i, j] = −2 x_i x_j G_ij for the j-th input of i's group."""
    group = cross.shape[1]
    for i in range(len(cross)):
        first = i // group * group
        for j in range(group):
            cross[i, j] = np.float32(-2) * (x[i] * x[first + j]) * gram[i, first + j]


# Inputs whose tabu ends at the same move form a list: `head` by move, modulo the longest tenure, and
# `follow` by input. No input is in two of them, since none is moved while it is tabu.


@njit
def _shut(j, expiry, head, follow):
    """Enter j into the list of the move at which its tabu ends."""
    slot = expiry[j] % len(head)
    follow[j] = head[slot]
    head[slot] = j


@njit
def _open(now, pruned, expiry, head, follow, square, bars):
    """Open the inputs whose tabu ends now."""
    slot = now % len(head)
    j = head[slot]
    while j >= 0:
        _bar(j, pruned, expiry[j] <= now, square, bars)
        j = follow[j]
    head[slot] = -1


@njit
def _hold(now, plan, pruned, expiry, random, square, work):
    """End every tabu, and hold up to `held` random inputs for twice the tenure and more."""
    bars, head, follow = work.bars, work.head, work.follow
    head[:] = -1
    for j in range(len(expiry)):
        expiry[j] = now
    for _ in range(plan.held):
        j = int(_random(random) % np.uint64(len(expiry)))
        if expiry[j] <= now:
            longer = np.int64(_random(random) % np.uint64(plan.spread + 1))
            expiry[j] = now + 2 * plan.tenure + longer
            _shut(j, expiry, head, follow)
    for j in range(len(expiry)):
        _bar(j, pruned, expiry[j] <= now, square, bars)


@njit
def _enter(now, x, gram, square, pruned, expiry, work):
    """Fill the workspace of a row, from its state at move `now`."""
    bars, head, follow, twice = work.bars, work.head, work.follow, work.twice
    for j in range(len(x)):
        twice[j] = np.float32(2) * x[j]
    _pairs(x, gram, work.cross)
    head[:] = -1
    for j in range(len(x)):
        if expiry[j] > now:
            _shut(j, expiry, head, follow)
        _bar(j, pruned, expiry[j] <= now, square, bars)


@njit
def _search_row(scaled, state, plan, work, row):
    """Finish a row's first descent, then make up to `moves` moves, and return the number of these."""
    x, gram, linear, constant = scaled.x[row], scaled.gram, scaled.linear[row], scaled.constant[row]
    pruned, best_pruned, expiry = state.pruned[row], state.best[row], state.expiry[row]
    random, clock, slope = state.random[row], state.clock[row], state.slope[row]
    square, values = state.square[row], state.values[row]
    bars, head, follow, twice = work.bars, work.head, work.follow, work.twice
    now, descending = clock[0], clock[2] == 0
    _enter(now, x, gram, square, pruned, expiry, work)
    if plan.scratch:
        values[0] = _products(slope, x, gram, pruned, linear, constant)
    value, best_value = values
    if descending:
        best_value = value
    made = 0
    while made < plan.moves:
        _open(now, pruned, expiry, head, follow, square, bars)
        if plan.group <= SMALL:
            u, p, delta = _best_of_small(work.cross, slope, bars)
        else:
            u, p, delta = _best_move(x, twice, gram, slope, bars, work.of_moves)
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
                longer = np.int64(_random(random) % np.uint64(plan.spread + 1))
                expiry[j] = now + plan.tenure + longer
                _shut(j, expiry, head, follow)
            _bar(j, pruned, descending, square, bars)
        if value < best_value * BETTER:
            best_value = value
            _copy(pruned, best_pruned)
            clock[1] = now
        elif not descending and 0 < plan.patience <= now - clock[1]:
            _copy(best_pruned, pruned)
            value = best_value = _products(slope, x, gram, pruned, linear, constant)
            clock[1] = now
            _hold(now, plan, pruned, expiry, random, square, work)
    clock[0] = now
    values[0], values[1] = value, best_value
    return made


def make_moves(scaled: Any, state: Any, plan: MovePlan, rows: np.ndarray) -> None:
    """Make a round of moves in some rows (int64) of a `tabu.ScaledRows` and its `tabu._State`."""
    n = scaled.x.shape[1]
    work = _Workspace(
        bars=np.empty((2, n), np.float32),
        of_moves=np.empty((3, plan.group), np.float32),
        cross=np.empty((n, plan.group) if plan.group <= SMALL else (0, 1), np.float32),
        head=np.empty(2 * (plan.tenure + plan.spread) + 2, np.int32),
        follow=np.empty(n, np.int32),
        twice=np.empty(n, np.float32),
    )
    _make_moves(scaled, state, plan, work, rows)


@njit
def _make_moves(scaled, state, plan, work, rows):
    for row in rows:
        state.moves[row] += _search_row(scaled, state, plan, work, row)
