# mypy: disallow-untyped-defs=False
"""The CPU kernel: step 2 of 1-swap search, the exact scan over all pairs, compiled; and the class that runs
the loops of both steps in threads."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maskopt.protocol.solution import SWAP_FLOOR, SWAP_TOLERANCE
from maskopt.solvers.kernels import RowThreads
from maskopt.solvers.swap.engine import ACCEPT, Batch
from maskopt.solvers.swap.numba_common import (
    BIG,
    fast,
    maximum,
    minimum,
    price_groups,
    product_rows,
    scores,
)
from maskopt.solvers.swap.numba_search import search_rows
from maskopt.solvers.swap.torch_kernel import SLACK, Reach

_RELATIVE, _FLOOR = ACCEPT * SWAP_TOLERANCE, ACCEPT * SWAP_FLOOR
#: points at which `_envelope` samples a lower envelope
GRID = 24
#: every height is lowered by this too: more than products that float32 flushes to zero amount to
FLUSHED = 1e-24
#: the side with fewer survivors has its rows of G read in full where the other has more than n over this
DENSE = 4


def price_rows(gram, bounds, batch, improving, pairs, plan, rows):
    """Step 2 of some rows.

    Args:
        bounds: G's diagonal, d and ρ (`Reach`).
        batch: x, low, kept, c, partner, cross, objective and mass of all rows.
        improving, pairs: of all rows, written: is there an improving swap, and pairs whose Δ was formed.
        plan: group, the relative and the absolute part of a threshold, and the margin for rounding.
    """
    n, single = batch[1].shape[1], batch[1].dtype
    work = (
        np.empty(n), np.empty(n),  # score, bound
        np.empty((4, GRID)),  # lines
        np.empty((2, n), np.int64), np.empty(2, np.int64),  # sides, count
        np.empty((2, n), single), np.empty((2, n), single),  # height, slope
    )  # fmt: skip
    # heights and slopes, then those of the far side; heavy, thin, formed
    wide = tuple(np.empty(n, single) for _ in range(5))
    _price_rows(gram, bounds, batch, improving, pairs, plan, work, wide, rows)


@fast
def _envelope(height, slope, count, top, grid, out):
    """out_k = min over i of (height_i − grid_k·slope_i), on a grid that falls from top to 0."""
    low = height.dtype.type
    value = top
    for k in range(GRID):
        grid[k] = low(value) if k < GRID - 1 else 0.0
        value *= 2.0**-0.5
        t, least = low(grid[k]), low(BIG)
        for i in range(count):
            least = minimum(least, height[i] - t * slope[i])
        out[k] = least


@fast
def _chords(grid, values, start, rise):
    """The chords between samples as start_k + rise_k·t; a concave envelope is above the least of them."""
    for k in range(GRID - 1):
        span = grid[k] - grid[k + 1]
        if span > 0.0:
            rise[k] = (values[k] - values[k + 1]) / span
            start[k] = values[k + 1] - rise[k] * grid[k + 1]
        else:
            rise[k] = 0.0
            start[k] = min(values[k], values[k + 1])
    rise[GRID - 1], start[GRID - 1] = rise[GRID - 2], start[GRID - 2]


@fast
def _bound(slope, count, lines, bound):
    """The least of the chords at the slopes of a side."""
    start, rise = lines[2], lines[3]
    for i in range(count):
        t, least = np.float64(slope[i]), BIG
        for k in range(GRID):
            least = minimum(least, start[k] + rise[k] * t)
        bound[i] = least


@fast
def _lower(x, score, kept, reach, rho, margin, heights, slopes):
    """Scores lowered by more than all rounding can add to a pair, and |x|d (for the kept: 2ρ|x|d)."""
    for j in range(len(score)):
        e = abs(x[j]) * reach[j] * SLACK
        heights[j] = score[j] - margin * (abs(score[j]) + e * e) - FLUSHED
        slopes[j] = 2.0 * e * rho[j] if kept[j] else e


@fast
def _split(kept, heights, slopes, sides, height, slope, count):
    """The columns of each side (0: pruned, 1: kept) one after the other."""
    count[:] = 0
    for j in range(len(kept)):
        side = np.int64(kept[j])
        i = count[side]
        sides[side, i] = j
        height[side, i] = heights[j]
        slope[side, i] = slopes[j]
        count[side] = i + 1


@fast
def _survivors(side, threshold, work):
    """Keep the columns of a side that may be in an improving pair: height_i + height_j − slope_i·slope_j.

    → how many
    """
    _, bound, lines, sides, count, height, slope = work
    other, many = 1 - side, count[side]
    columns, heights, slopes = sides[side], height[side], slope[side]
    top = slopes.dtype.type(0)
    for i in range(many):
        top = maximum(top, slopes[i])
    _envelope(height[other], slope[other], count[other], float(top), lines[0], lines[1])
    _chords(lines[0], lines[1], lines[2], lines[3])
    _bound(slopes, many, lines, bound)
    m = 0
    for i in range(many):
        if heights[i] + bound[i] < -threshold:
            columns[m] = columns[i]
            heights[m] = heights[i]
            slopes[m] = slopes[i]
            m += 1
    count[side] = m
    return m


@fast
def _spread(low, columns, height, many, dense, wide):
    """The far side's heights and weights in a row, and where `dense` at their columns as well."""
    full, factor, heavy, thin, _ = wide
    if dense:
        full[:] = full.dtype.type(BIG)
        factor[:] = full.dtype.type(0)
    for i in range(many):
        j = columns[i]
        thin[i] = low[j]
        heavy[i] = height[i]
        if dense:
            full[j] = height[i]
            factor[j] = low[j]


@fast
def _where(formed, least):
    """The first place of a value that is there."""
    at = 0
    while formed[at] > least:
        at += 1
    return at


@fast
def _decide(line, x, score, s, columns, many, threshold):
    """The partner of s that lowers the objective most by float64, or −1."""
    best = -threshold
    found = np.int64(-1)
    for k in range(many):
        j = columns[k]
        value = (score[s] + score[j]) - 2.0 * x[s] * x[j] * line[j]
        if value < best:
            best = value
            found = j
    return found


@fast
def _price_row(gram, x, low, partner, cross, threshold, work, wide):
    """The best partner of every surviving column of the side with fewer. → how many of them improve"""
    score, sides, count, height = work[0], work[3], work[4], work[5]
    near = 0 if count[0] < count[1] else 1  # the side whose rows of G are read
    far, many = sides[1 - near], count[1 - near]
    dense = many * DENSE > len(x)
    _spread(low, far, height[1 - near], many, dense, wide)
    full, factor, heavy, thin, formed = wide
    improving = 0
    for i in range(count[near]):
        s = sides[near, i]
        line = gram[s]
        twice = -low.dtype.type(2) * low[s]
        least = formed.dtype.type(BIG)
        if dense:
            for j in range(len(line)):
                value = full[j] + twice * (factor[j] * line[j])
                formed[j] = value
                least = minimum(least, value)
        else:
            for k in range(many):
                value = heavy[k] + twice * (thin[k] * line[far[k]])
                formed[k] = value
                least = minimum(least, value)
        if float(height[near, i]) + float(least) >= -threshold:
            continue
        at = _where(formed, least)
        j = at if dense else far[at]
        value = (score[s] + score[j]) - 2.0 * x[s] * x[j] * line[j]
        if value >= -threshold:  # so little that rounding decides: float64 for this column
            j = _decide(line, x, score, s, far, many, threshold)
            if j < 0:
                continue
        partner[s] = j
        cross[s] = line[j]
        improving += 1
    return improving


@fast
def _price_rows(gram, bounds, batch, improving, pairs, plan, work, wide, rows):
    """The exact scan: is there an improving swap? Every column's best partner goes to `partner`.

    A bound first (see docs): pairs that cannot improve by |G_up| ≤ ρ d_u d_p are not looked at. Then
    the rest in the proposing dtype with a and b lowered by more than rounding can add, so that what
    is passed over is proven; what is not passed over is decided in float64. `pairs` counts.
    """
    diagonal, reach, rho = bounds
    x, low, kept, c, partner, cross, objective, mass = batch
    group, relative, floor, margin = plan
    score, _, _, sides, count, height, slope = work
    heights, slopes = wide[0], wide[1]
    for r in rows:
        threshold = relative * max(objective[r], 0.0) + floor * mass[r]
        scores(x[r], diagonal, c[r], kept[r], score)
        if group < len(score):
            improving[r] = price_groups(
                gram, x[r], kept[r], score, group, threshold, partner[r], cross[r]
            )
            continue
        partner[r, :] = -1
        _lower(x[r], score, kept[r], reach, rho, margin, heights, slopes)
        _split(kept[r], heights, slopes, sides, height, slope, count)
        if not count[0] or not count[1]:
            continue
        left = 1
        for side in (1, 0):
            left = left and _survivors(side, threshold, work)
        if left:
            pairs[r] += count[0] * count[1]
            improving[r] = (
                _price_row(gram, x[r], low[r], partner[r], cross[r], threshold, work, wide) > 0
            )


class NumbaKernel:
    """Compiled loops over rows; threads share nothing but G."""

    patience = 256

    def __init__(self, batch: Batch, threads: int) -> None:
        self.single = batch.single
        self._threads = RowThreads(threads)
        self._gram = batch.gram.numpy()
        self._margin = 4.0 * torch.finfo(batch.low.dtype).eps
        self._diagonal = batch.diagonal.numpy()
        reach = Reach.of(batch.gram, single=batch.single)
        self._bounds = self._diagonal, reach.d.numpy(), reach.rho.numpy()

    def refresh(self, batch: Batch, rows: Tensor) -> None:
        """As in `Kernel`; the sum over pruned columns in one fixed order."""
        arrays = (batch.x, batch.kept, batch.c, batch.objective)
        self._threads.run(product_rows, rows.numpy(), self._gram, *(x.numpy() for x in arrays))
        batch.add_linear(rows)

    def search(self, batch: Batch, rows: Tensor, most: int) -> None:
        """As in `Kernel`; a row runs through all its rounds in one go."""
        counts = batch.swaps.numpy(), batch.rounds.numpy()
        plan = batch.group, _RELATIVE, _FLOOR, most
        arrays = self._gram, self._diagonal, self._arrays(batch)
        self._threads.run(search_rows, rows.numpy(), *arrays, counts, plan)

    def price(self, batch: Batch, rows: Tensor) -> Tensor:
        """As in `Kernel`."""
        improving = np.zeros(batch.rows, np.bool_)
        arrays = self._gram, self._bounds, self._arrays(batch), improving, batch.priced.numpy()
        plan = batch.group, _RELATIVE, _FLOOR, self._margin
        self._threads.run(price_rows, rows.numpy(), *arrays, plan)
        return torch.from_numpy(improving)[rows]

    def _arrays(self, batch: Batch) -> tuple[np.ndarray, ...]:
        """The rows as the loops of both steps take them."""
        rows = batch.x, batch.low, batch.kept, batch.c
        found = batch.partner, batch.cross, batch.objective, batch.mass
        return tuple(tensor.numpy() for tensor in rows + found)
