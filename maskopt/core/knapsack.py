"""The multiple-choice knapsack: one level for each item, at least cost, whose sizes add up to a total.

A price on the total gives the Lagrangian bound, and the cost of every level above the best at that price. A
dynamic program over the total goes through the choices within some slack of the bound, which grows until
there is one: the cheapest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from maskopt.errors import SolverError

#: halvings of the interval that the price is in
_HALVINGS = 100
#: by how much the slack grows at a time
_GROWTH = 4.0


def choose_levels(
    sizes: Sequence[Int[np.ndarray, " levels"]],
    costs: Sequence[Float[np.ndarray, " levels"]],
    total: int,
) -> tuple[int, ...]:
    """Return the cheapest choice of one level for each item whose sizes add up to exactly the total.

    `sizes` are whole numbers, `costs` finite. SolverError: there is no choice.
    """
    impossible = SolverError(f"no choice of levels adds up to {total}")
    # from each item's first level on, in the largest unit that all differences have in common
    steps = [np.asarray(size, dtype=np.int64) - size[0] for size in sizes]
    unit = max(1, int(np.gcd.reduce(np.concatenate(steps))))
    reach = total - sum(int(size[0]) for size in sizes)
    least, most = (sum(int(end(x)) for x in steps) for end in (np.min, np.max))
    if reach % unit or not least <= reach <= most:
        raise impossible
    steps, reach = [step // unit for step in steps], reach // unit
    price = _price(steps, costs, reach)
    priced = [cost + price * step for cost, step in zip(costs, steps, strict=True)]
    above = [x - x.min() for x in priced]
    positive = np.concatenate(above)
    positive = positive[positive > 0]
    slack = float(positive.min()) if len(positive) else 1.0
    everything = 2 * float(sum(x.max() for x in above)) + slack
    while True:
        levels = least_sum(steps, above, reach, slack)
        if levels is not None:
            return levels
        if slack > everything:
            raise impossible
        slack *= _GROWTH


def _price(
    steps: Sequence[Int[np.ndarray, " levels"]],
    costs: Sequence[Float[np.ndarray, " levels"]],
    total: int,
) -> float:
    """Return the price of a unit at which the cheapest levels come closest to the total."""

    def reached(price: float) -> int:
        pairs = zip(steps, costs, strict=True)
        return sum(int(step[(cost + price * step).argmin()]) for step, cost in pairs)

    spread = max(float(np.ptp(cost)) for cost in costs) or 1.0
    # beyond these every item takes its largest, its smallest level
    low, high = -2 * spread, 2 * spread
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if reached(middle) > total:
            low = middle
        else:
            high = middle
    return high


def least_sum(
    sizes: Sequence[Int[np.ndarray, " levels"]],
    costs: Sequence[Float[np.ndarray, " levels"]],
    total: int,
    most: float = math.inf,
) -> tuple[int, ...] | None:
    """Return a level for each item of least total cost whose sizes add up to `total`, by a dynamic program.

    Of equal sums the last item has its lowest level, then the item before. Costs are at least 0; choices that
    cost more than `most` are left out. None: there is no choice.
    """
    best, start = np.zeros(1), 0  # least costs of the totals from `start` on
    walked: list[tuple[np.ndarray, int]] = []
    for size, cost in zip(sizes, costs, strict=True):
        useful = np.flatnonzero(cost <= most)
        first, last = int(size[useful].min()), int(size[useful].max())
        new = np.full(len(best) + last - first, np.inf)
        by = np.zeros(len(new), dtype=np.int16)
        for level in useful:
            at = slice(int(size[level]) - first, int(size[level]) - first + len(best))
            sums = best + cost[level]
            better = sums < new[at]
            new[at][better], by[at][better] = sums[better], level
        inside = np.flatnonzero(new <= most)
        cut = slice(int(inside[0]), int(inside[-1]) + 1)
        best, start = np.where(new <= most, new, np.inf)[cut], start + first + cut.start
        walked.append((by[cut], start))
    if not 0 <= total - start < len(best) or not np.isfinite(best[total - start]):
        return None
    levels: list[int] = []
    for size, (by, start) in zip(reversed(sizes), reversed(walked), strict=True):
        levels.append(int(by[total - start]))
        total -= int(size[levels[-1]])
    return tuple(reversed(levels))
