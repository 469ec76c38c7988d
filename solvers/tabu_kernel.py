"""The compiled inner loop of tabu search: one row a task, all cores, no allocation per move.

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

import numba as nb
import numpy as np
from numba import types
from numba.extending import intrinsic

#: stands for "not allowed"; far above any Δ of a row scaled to Σ x²G_jj ≈ 1
FORBIDDEN = np.float32(1e30)
_BLOCK = 64
#: groups of at most so many inputs are searched over all their pairs
SMALL = 16
# every flag but `ninf`/`afn`: FORBIDDEN is finite, and reductions may be vectorised
_FAST = {"nnan", "ninf", "nsz", "reassoc", "contract", "arcp"}


@intrinsic
def _less(typing: Any, left: Any, right: Any) -> Any:
    """min of two float32 as an instruction that LLVM takes for a reduction and vectorises.

    Numba puts no fast-math flags on comparisons, and without them a float minimum stays scalar.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        flags = ("nnan", "nsz")
        smaller = builder.fcmp_ordered("<", args[0], args[1], flags=flags)
        return builder.select(smaller, args[0], args[1], flags=flags)

    return types.float32(types.float32, types.float32), build


@nb.njit(fastmath=_FAST, cache=True, error_model="numpy")
def _minimum(values: np.ndarray) -> Any:
    least = FORBIDDEN
    for j in range(len(values)):
        least = _less(values[j], least)  # type: ignore[call-arg]
    return least


@nb.njit(fastmath=_FAST, cache=True, error_model="numpy")
def _least(values: np.ndarray) -> int:
    """The lowest index of the least value."""
    width = max(_BLOCK, (len(values) + 7) >> 3)
    best: Any = FORBIDDEN
    where = 0
    for start in range(0, len(values), width):
        least = _minimum(values[start : start + width])
        if least < best:
            best = least
            where = start
    for j in range(where, len(values)):
        if values[j] <= best:
            return j
    return where


@nb.njit(fastmath=_FAST, cache=True, error_model="numpy")
def _partner(
    own: np.ndarray, x: np.ndarray, line: np.ndarray, factor: float, out: np.ndarray
) -> int:
    """The j of least own_j + factor·x_j·line_j; the values are left in out."""
    for j in range(len(own)):
        out[j] = own[j] + factor * (x[j] * line[j])
    return _least(out)


@nb.njit(fastmath=_FAST, cache=True, error_model="numpy")
def _products(c: np.ndarray, x: np.ndarray, gram: np.ndarray, pruned: np.ndarray) -> float:
    """c ← G(x ⊙ pruned) from scratch; returns the objective."""
    c[:] = 0
    for j in range(len(c)):
        if pruned[j]:
            weight = x[j]
            line = gram[j]
            for i in range(len(c)):
                c[i] += weight * line[i]
    objective = 0.0
    for j in range(len(c)):
        if pruned[j]:
            objective += np.float64(x[j]) * np.float64(c[j])
    return objective


@nb.njit(fastmath=_FAST, cache=True, error_model="numpy")
def _gains(
    c: np.ndarray,
    x: np.ndarray,
    square: np.ndarray,
    shut_kept: np.ndarray,
    shut_pruned: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    out: np.ndarray,
) -> None:
    # three loops, since LLVM vectorises none that needs more than 8 checks of overlapping arrays
    for j in range(len(c)):
        out[j] = np.float32(2) * (x[j] * c[j])
    for j in range(len(c)):
        a[j] = square[j] + out[j] + shut_kept[j]
    for j in range(len(c)):
        b[j] = square[j] - out[j] + shut_pruned[j]


@nb.njit(fastmath=_FAST, cache=True, error_model="numpy")
def _exchange(
    c: np.ndarray, added: np.ndarray, plus: float, gone: np.ndarray, minus: float
) -> None:
    for j in range(len(c)):
        c[j] += plus * added[j] - minus * gone[j]


@nb.njit(cache=True)
def _random(state: np.ndarray) -> np.uint64:
    """SplitMix64."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@nb.njit(cache=True)
def _bar(
    j: int, pruned: np.ndarray, free: bool, shut_kept: np.ndarray, shut_pruned: np.ndarray
) -> None:
    """Open j for the role it plays now if it is free, and shut it for the other."""
    zero = np.float32(0)
    shut_kept[j] = zero if free and not pruned[j] else FORBIDDEN
    shut_pruned[j] = zero if free and pruned[j] else FORBIDDEN


@nb.njit(fastmath=_FAST, cache=True, error_model="numpy")
def _best_move(
    x: np.ndarray, gram: np.ndarray, a: np.ndarray, b: np.ndarray, out: np.ndarray, group: int
) -> Any:
    best = FORBIDDEN * np.float32(0.1)
    kept, pruned = -1, -1
    for first in range(0, len(x), group):
        last = first + group
        a_part, b_part, x_part = a[first:last], b[first:last], x[first:last]
        u = _least(a_part)
        if a_part[u] < FORBIDDEN * np.float32(0.1):
            line, factor = gram[first + u, first:last], np.float32(-2) * x_part[u]
            p = _partner(b_part, x_part, line, factor, out[:group])
            value = a_part[u] + out[p]
            if value < best:
                best, kept, pruned = value, first + u, first + p
        p = _least(b_part)
        if b_part[p] < FORBIDDEN * np.float32(0.1):
            line, factor = gram[first + p, first:last], np.float32(-2) * x_part[p]
            u = _partner(a_part, x_part, line, factor, out[:group])
            value = b_part[p] + out[u]
            if value < best:
                best, kept, pruned = value, first + u, first + p
    return kept, pruned, best


@nb.njit(fastmath=_FAST, cache=True, error_model="numpy")
def _best_of_small(a: np.ndarray, b: np.ndarray, cross: np.ndarray) -> Any:
    """All pairs of every group, where groups are small; cross[i, j] = −2 x_i x_j G_ij inside them."""
    allowed = FORBIDDEN * np.float32(0.1)
    best = allowed
    kept, pruned = -1, -1
    n, group = cross.shape
    for first in range(0, n, group):
        for i in range(first, first + group):
            if a[i] < allowed:
                for j in range(group):
                    value = a[i] + b[first + j] + cross[i, j]
                    if value < best:
                        best, kept, pruned = value, i, first + j
    return kept, pruned, best


@nb.njit(cache=True)
def _search_row(
    x: np.ndarray,
    gram: np.ndarray,
    square: np.ndarray,
    pruned: np.ndarray,
    best_pruned: np.ndarray,
    expiry: np.ndarray,
    state: np.ndarray,
    clock: np.ndarray,
    best_value: np.ndarray,
    group: int,
    moves: int,
    tenure: int,
    spread: int,
    patience: int,
    kick: int,
) -> None:
    n = len(x)
    c = np.empty(n, np.float32)
    a = np.empty(n, np.float32)
    b = np.empty(n, np.float32)
    out = np.empty(n, np.float32)
    shut_kept = np.empty(n, np.float32)
    shut_pruned = np.empty(n, np.float32)
    small = group <= SMALL
    cross = np.empty((n if small else 0, group if small else 1), np.float32)
    for i in range(len(cross)):
        first = i // group * group
        for j in range(group):
            cross[i, j] = np.float32(-2) * (x[i] * x[first + j]) * gram[i, first + j]
    # inputs whose tabu ends at the same move form a list: head by move, next by input
    longest = 2 * (tenure + spread) + 2
    head = np.full(longest, -1, np.int32)
    follow = np.full(n, -1, np.int32)
    now = clock[0]
    value = _products(c, x, gram, pruned)
    descending = clock[2] == 0
    if descending:
        best_value[0] = value
    for j in range(n):
        free = expiry[j] <= now
        if not free:
            slot = expiry[j] % longest
            follow[j] = head[slot]
            head[slot] = j
        _bar(j, pruned, free, shut_kept, shut_pruned)
    made = 0
    while made < moves:
        slot = now % longest
        j = head[slot]
        while j >= 0:
            if expiry[j] <= now:
                _bar(j, pruned, True, shut_kept, shut_pruned)
            j = follow[j]
        head[slot] = -1
        _gains(c, x, square, shut_kept, shut_pruned, a, b, out)
        if small:
            u, p, delta = _best_of_small(a, b, cross)
        else:
            u, p, delta = _best_move(x, gram, a, b, out, group)
        if u < 0:
            if descending:
                break
            # everything is tabu: let time pass
            now += 1
            made += 1
            continue
        if descending and value + delta >= best_value[0] * (1 - 1e-6):
            descending = False
            clock[2] = 1
        pruned[u] = 1
        pruned[p] = 0
        _exchange(c, gram[u], x[u], gram[p], x[p])
        value += delta
        now += 1
        if descending:
            _bar(u, pruned, True, shut_kept, shut_pruned)
            _bar(p, pruned, True, shut_kept, shut_pruned)
        else:
            made += 1
            for j in (u, p):
                expiry[j] = now + tenure + np.int64(_random(state) % np.uint64(spread + 1))
                slot = expiry[j] % longest
                follow[j] = head[slot]
                head[slot] = j
                _bar(j, pruned, False, shut_kept, shut_pruned)
        if value < best_value[0] * (1 - 1e-6):
            best_value[0] = value
            best_pruned[:] = pruned
            clock[1] = now
        elif not descending and patience > 0 and now - clock[1] >= patience:
            pruned[:] = best_pruned
            value = _products(c, x, gram, pruned)
            best_value[0] = value
            clock[1] = now
            head[:] = -1
            for j in range(n):
                expiry[j] = now
            for _ in range(kick):
                j = int(_random(state) % np.uint64(n))
                if expiry[j] <= now:
                    expiry[j] = now + 2 * tenure + np.int64(_random(state) % np.uint64(spread + 1))
                    slot = expiry[j] % longest
                    follow[j] = head[slot]
                    head[slot] = j
            for j in range(n):
                _bar(j, pruned, expiry[j] <= now, shut_kept, shut_pruned)
    clock[0] = now


@nb.njit(parallel=True, cache=True)
def search(
    x: np.ndarray,
    gram: np.ndarray,
    square: np.ndarray,
    pruned: np.ndarray,
    best_pruned: np.ndarray,
    expiry: np.ndarray,
    state: np.ndarray,
    clock: np.ndarray,
    best_value: np.ndarray,
    group: int,
    moves: int,
    tenure: int,
    spread: int,
    patience: int,
    kick: int,
) -> None:
    for row in nb.prange(len(x)):
        _search_row(
            x[row],
            gram,
            square[row],
            pruned[row],
            best_pruned[row],
            expiry[row],
            state[row],
            clock[row],
            best_value[row],
            group,
            moves,
            tenure,
            spread,
            patience,
            kick,
        )
