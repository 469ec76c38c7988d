# mypy: ignore-errors
"""Step 2 of 1-swap search on the CPU, compiled: the exact scan over all pairs."""

from __future__ import annotations

import numpy as np

from maskopt.solvers.swap.numba_common import BIG, fast, maximum, minimum, price_groups, scores

#: points at which `_envelope` samples a lower envelope; a multiple of four
GRID = 24
#: |x|·d is rounded up by this factor, ρ as well
SLACK = 1.0 + 2.0**-20


@fast
def _envelope(height, slope, count, top, grid, out):
    """out_k = min over i of (height_i − grid_k·slope_i), on a grid that falls from top to 0."""
    low = height.dtype.type
    value = top
    for k in range(GRID):
        grid[k] = low(value) if k < GRID - 1 else 0.0
        value *= 2.0**-0.5
    for k in range(0, GRID, 4):  # four at a time, for one pass over memory
        t0, t1, t2, t3 = low(grid[k]), low(grid[k + 1]), low(grid[k + 2]), low(grid[k + 3])
        least0 = least1 = least2 = least3 = low(BIG)
        for i in range(count):
            least0 = minimum(least0, height[i] - t0 * slope[i])
            least1 = minimum(least1, height[i] - t1 * slope[i])
            least2 = minimum(least2, height[i] - t2 * slope[i])
            least3 = minimum(least3, height[i] - t3 * slope[i])
        out[k], out[k + 1], out[k + 2], out[k + 3] = least0, least1, least2, least3


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
def _survivors(own, own_slope, count, other, other_slope, others, threshold, lines, bound, alive):
    """Which of `own` may be in an improving pair: own_i + other_j − own_slope_i·other_slope_j."""
    grid, values, start, rise = lines
    top = own_slope.dtype.type(0)
    for i in range(count):
        top = maximum(top, own_slope[i])
    _envelope(other, other_slope, others, float(top), grid, values)
    _chords(grid, values, start, rise)
    for i in range(count):
        bound[i] = BIG
    for k in range(0, GRID, 4):
        a0, a1, a2, a3 = start[k], start[k + 1], start[k + 2], start[k + 3]
        b0, b1, b2, b3 = rise[k], rise[k + 1], rise[k + 2], rise[k + 3]
        for i in range(count):
            t = np.float64(own_slope[i])
            one = minimum(a0 + b0 * t, a1 + b1 * t)
            two = minimum(a2 + b2 * t, a3 + b3 * t)
            bound[i] = minimum(bound[i], minimum(one, two))
    many = 0
    for i in range(count):
        alive[i] = own[i] + bound[i] < -threshold
        many += alive[i]
    return many


@fast
def price_rows(
    gram, x, low, diagonal, reach, rho, kept, c, partner, cross, objective, mass, improving, pairs, group,
    relative, floor, margin, rows,
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
    lines, bound = np.empty((4, GRID), np.float64), np.empty(n, np.float64)
    heights, slopes = np.empty(n, low.dtype), np.empty(n, low.dtype)
    full, factor = np.empty(n, low.dtype), np.empty(n, low.dtype)
    formed = np.empty(n, low.dtype)
    thin, heavy = np.empty(n, low.dtype), np.empty(n, low.dtype)
    big, two = low.dtype.type(BIG), low.dtype.type(2)
    for r in rows:
        threshold = relative * max(objective[r], 0.0) + floor * mass[r]
        scores(x[r], diagonal, c[r], kept[r], score)
        improving[r] = False
        if group < n:
            partner[r, :] = -1
            improving[r] = price_groups(
                gram, x[r], kept[r], score, group, threshold, partner[r], cross[r]
            )
            continue
        for j in range(n):
            e = abs(x[r, j]) * reach[j] * SLACK
            heights[j] = score[j] - margin * (abs(score[j]) + e * e) - 1e-24
            slopes[j] = 2.0 * e * rho[j] if kept[r, j] else e
        partner[r, :] = -1
        count = np.zeros(2, np.int64)
        for j in range(n):
            side = np.int64(kept[r, j])
            i = count[side]
            sides[side, i] = j
            height[side, i] = heights[j]
            slope[side, i] = slopes[j]
            count[side] = i + 1
        if count[0] == 0 or count[1] == 0:
            continue
        if not _survivors(
            height[1], slope[1], count[1], height[0], slope[0], count[0], threshold, lines, bound,
            alive[1],
        ):  # fmt: skip
            continue
        for side in (1, 0):
            if side == 0 and not _survivors(
                height[0], slope[0], count[0], height[1], slope[1], count[1], threshold, lines,
                bound, alive[0],
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
                    least = minimum(least, value)
            else:
                for k in range(count[far]):
                    value = heavy[k] + twice * (thin[k] * line[sides[far, k]])
                    formed[k] = value
                    least = minimum(least, value)
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
