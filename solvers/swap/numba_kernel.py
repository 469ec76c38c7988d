# mypy: disallow-untyped-defs=False
"""The CPU kernel: step 2 of 1-swap search, the exact scan over all pairs.

`NumbaKernel` runs the compiled loops of both steps in threads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskopt.protocol.solution import SWAP_FLOOR, SWAP_TOLERANCE
from maskopt.solvers.kernels import RowThreads
from maskopt.solvers.swap.engine import ACCEPT, Batch
from maskopt.solvers.swap.numba_common import (
    BIG,
    Rows,
    Rule,
    fast,
    kernel,
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


class _Scan(NamedTuple):
    """The workspace of a scan. `columns`, `height` and `slope`: of the pruned side, then of the kept one."""

    score: np.ndarray
    bound: np.ndarray
    grid: np.ndarray
    envelope: np.ndarray
    start: np.ndarray
    rise: np.ndarray
    columns: np.ndarray
    sizes: np.ndarray
    height: np.ndarray
    slope: np.ndarray
    full: np.ndarray
    factor: np.ndarray
    heavy: np.ndarray
    thin: np.ndarray
    formed: np.ndarray

    @classmethod
    def of(cls, n, single):
        return cls(
            score=np.empty(n),
            bound=np.empty(n),
            grid=np.empty(GRID),
            envelope=np.empty(GRID),
            start=np.empty(GRID),
            rise=np.empty(GRID),
            columns=np.empty((2, n), np.int64),
            sizes=np.empty(2, np.int64),
            height=np.empty((2, n), single),
            slope=np.empty((2, n), single),
            full=np.empty(n, single),
            factor=np.empty(n, single),
            heavy=np.empty(n, single),
            thin=np.empty(n, single),
            formed=np.empty(n, single),
        )


def price_rows(gram, reach, batch, improving, pairs, rule, margin, rows):
    """Scan all pairs of some rows, step 2 of the search.

    Args:
        reach: G's diagonal, d and ρ (`Reach`).
        batch: `Rows`.
        improving, pairs: of all rows, written: is there an improving swap, and pairs whose Δ was formed.
        rule: `Rule`.
        margin: the margin for rounding.
        rows: int64.
    """
    scan = _Scan.of(batch.low.shape[1], batch.low.dtype)
    _price_rows(gram, *reach, batch, improving, pairs, rule, margin, scan, rows)


@fast
def _envelope(height, slope, count, top, grid, out):
    """Write min over i of (height_i − grid_k·slope_i) to out_k, on a grid that falls from top to 0."""
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
    """Write the chords between samples as start_k + rise_k·t.

    A concave envelope is above the least of them.
    """
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
def _bound(slope, count, start, rise, bound):
    """Write the least of the chords at the slopes of a side."""
    for i in range(count):
        t, least = np.float64(slope[i]), BIG
        for k in range(GRID):
            least = minimum(least, start[k] + rise[k] * t)
        bound[i] = least


@fast
def _lower(x, score, kept, reach, rho, margin, heights, slopes):
    """Write scores lowered by more than rounding can add to a pair, and |x|d (for the kept: 2ρ|x|d)."""
    for j in range(len(score)):
        e = abs(x[j]) * reach[j] * SLACK
        heights[j] = score[j] - margin * (abs(score[j]) + e * e) - FLUSHED
        slopes[j] = 2.0 * e * rho[j] if kept[j] else e


@fast
def _split(kept, heights, slopes, columns, height, slope, count):
    """List the columns of each side (0: pruned, 1: kept)."""
    count[:] = 0
    for j in range(len(kept)):
        side = np.int64(kept[j])
        i = count[side]
        columns[side, i] = j
        height[side, i] = heights[j]
        slope[side, i] = slopes[j]
        count[side] = i + 1


@fast
def _survivors(side, threshold, scan):
    """Keep the columns of a side that may be in an improving pair, and return their number.

    A pair may improve by height_i + height_j − slope_i·slope_j.
    """
    bound, count = scan.bound, scan.sizes
    other, size = 1 - side, count[side]
    columns, heights, slopes = scan.columns[side], scan.height[side], scan.slope[side]
    top = slopes.dtype.type(0)
    for i in range(size):
        top = maximum(top, slopes[i])
    heights_far, slopes_far = scan.height[other], scan.slope[other]
    _envelope(heights_far, slopes_far, count[other], float(top), scan.grid, scan.envelope)
    _chords(scan.grid, scan.envelope, scan.start, scan.rise)
    _bound(slopes, size, scan.start, scan.rise, bound)
    m = 0
    for i in range(size):
        if heights[i] + bound[i] < -threshold:
            columns[m] = columns[i]
            heights[m] = heights[i]
            slopes[m] = slopes[i]
            m += 1
    count[side] = m
    return m


@fast
def _spread(low, columns, height, size, dense, scan):
    """Write the far side's heights and weights in a row, and where `dense` at their columns as well."""
    full, factor, heavy, thin = scan.full, scan.factor, scan.heavy, scan.thin
    if dense:
        full[:] = full.dtype.type(BIG)
        factor[:] = full.dtype.type(0)
    for i in range(size):
        j = columns[i]
        thin[i] = low[j]
        heavy[i] = height[i]
        if dense:
            full[j] = height[i]
            factor[j] = low[j]


@fast
def _where(formed, least):
    """Return the first place of the least value."""
    at = 0
    while formed[at] > least:
        at += 1
    return at


@fast
def _decide(line, x, score, s, columns, size, threshold):
    """Return the partner of s that lowers the objective most by float64, or −1."""
    best = -threshold
    partner = np.int64(-1)
    for k in range(size):
        j = columns[k]
        value = (score[s] + score[j]) - 2.0 * x[s] * x[j] * line[j]
        if value < best:
            best = value
            partner = j
    return partner


@fast
def _price_row(gram, x, low, partner, cross, threshold, scan):
    """Write the best partner of every survivor on the shorter side; return the number of improving pairs."""
    score, sides, count, height = scan.score, scan.columns, scan.sizes, scan.height
    full, factor, heavy, thin, formed = scan.full, scan.factor, scan.heavy, scan.thin, scan.formed
    near = 0 if count[0] < count[1] else 1  # the side whose rows of G are read
    far, size = sides[1 - near], count[1 - near]
    dense = size * DENSE > len(x)
    _spread(low, far, height[1 - near], size, dense, scan)
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
            for k in range(size):
                value = heavy[k] + twice * (thin[k] * line[far[k]])
                formed[k] = value
                least = minimum(least, value)
        if float(height[near, i]) + float(least) >= -threshold:
            continue
        at = _where(formed, least)
        j = at if dense else far[at]
        value = (score[s] + score[j]) - 2.0 * x[s] * x[j] * line[j]
        if value >= -threshold:  # so little that rounding decides: float64 for this column
            j = _decide(line, x, score, s, far, size, threshold)
            if j < 0:
                continue
        partner[s] = j
        cross[s] = line[j]
        improving += 1
    return improving


@kernel
def _price_rows(gram, diagonal, d, rho, batch, improving, pairs, rule, margin, scan, rows):
    """Find out which rows have an improving swap; every column's best partner goes to `partner`.

    A bound first (see docs): pairs that cannot improve by |G_up| ≤ ρ d_u d_p are not looked at. Then
    the rest in the proposing dtype with a and b lowered by more than rounding can add, so that what
    is passed over is proven; what is not passed over is decided in float64. `pairs` counts.
    """
    x, low, kept, score, count = batch.x, batch.low, batch.kept, scan.score, scan.sizes
    partner, cross = batch.partner, batch.cross
    heights, slopes = scan.full, scan.factor
    for r in rows:
        threshold = rule.relative * max(batch.objective[r], 0.0) + rule.floor * batch.mass[r]
        scores(x[r], diagonal, batch.c[r], kept[r], score)
        if rule.group < len(score):
            improving[r] = price_groups(
                gram, x[r], kept[r], score, rule.group, threshold, partner[r], cross[r]
            )
            continue
        partner[r, :] = -1
        _lower(x[r], score, kept[r], d, rho, margin, heights, slopes)
        _split(kept[r], heights, slopes, scan.columns, scan.height, scan.slope, count)
        if not count[0] or not count[1]:
            continue
        left = 1
        for side in (1, 0):
            left = left and _survivors(side, threshold, scan)
        if left:
            pairs[r] += count[0] * count[1]
            improving[r] = _price_row(gram, x[r], low[r], partner[r], cross[r], threshold, scan) > 0


class NumbaKernel:
    """Compiled loops over rows; threads share nothing but G."""

    patience = 256

    def __init__(self, batch: Batch, threads: int) -> None:
        self._threads = RowThreads(threads)
        self._gram = batch.gram.numpy()
        self._margin = 4.0 * torch.finfo(batch.low.dtype).eps
        self._diagonal = batch.diagonal.numpy()
        reach = Reach.of(batch.gram, single=batch.single)
        self._reach = self._diagonal, reach.d.numpy(), reach.rho.numpy()
        self._rule = Rule(batch.group, _RELATIVE, _FLOOR)

    def refresh(self, batch: Batch, rows: Tensor) -> None:
        """Sum over pruned columns in one fixed order; see `Kernel.refresh`."""
        arrays = (batch.x, batch.kept, batch.c, batch.objective)
        self._threads.run(product_rows, rows.numpy(), self._gram, *(x.numpy() for x in arrays))
        batch.add_linear(rows)

    def search(self, batch: Batch, rows: Tensor, most: int) -> None:
        """Run each row through all its rounds; see `Kernel.search`."""
        counts = batch.swaps.numpy(), batch.rounds.numpy()
        arrays = self._gram, self._diagonal, _rows_of(batch)
        self._threads.run(search_rows, rows.numpy(), *arrays, *counts, self._rule, most)

    def price(self, batch: Batch, rows: Tensor) -> Tensor:
        """Scan all pairs; see `Kernel.price`."""
        improving = np.zeros(batch.rows, np.bool_)
        arrays = self._gram, self._reach, _rows_of(batch), improving, batch.priced.numpy()
        self._threads.run(price_rows, rows.numpy(), *arrays, self._rule, self._margin)
        return torch.from_numpy(improving)[rows]


def _rows_of(batch: Batch) -> Rows:
    return Rows(*(getattr(batch, name).numpy() for name in Rows._fields))
