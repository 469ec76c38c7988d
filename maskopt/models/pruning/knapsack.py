"""One level for each item, at the least cost with a given total: the multiple-choice knapsack.

It divides a model's budget among its layers: an item is a layer, a level how much of it is pruned. A price on
the total gives the Lagrangian bound, and what every level costs above the best at that price. A dynamic
program over the total goes through the choices within some slack of the bound, which grows until one is
found: the cheapest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from maskopt.errors import SolverError

#: halvings of the interval that the price is in
_HALVINGS = 100
#: by how much the slack grows at a time
_GROWTH = 4.0


@dataclass(frozen=True)
class Choice:
    """The level of every item, their cost, and the Lagrangian bound of all choices of that total."""

    levels: tuple[int, ...]
    cost: float
    bound: float


def choose_levels(
    sizes: Sequence[Int[np.ndarray, " levels"]],
    costs: Sequence[Float[np.ndarray, " levels"]],
    total: int,
) -> Choice:
    """The cheapest choice of one level for each item whose sizes add up to exactly the total; SolverError
    where there is none. `sizes` are whole numbers, `costs` finite."""
    impossible = SolverError(f"no choice of levels adds up to {total}")
    # from each item's first level on, in the largest unit that all differences have in common
    steps = [np.asarray(size, dtype=np.int64) - size[0] for size in sizes]
    unit = max(1, int(np.gcd.reduce(np.concatenate(steps))))
    rest = total - sum(int(size[0]) for size in sizes)
    least, most = (sum(int(end(x)) for x in steps) for end in (np.min, np.max))
    if rest % unit or not least <= rest <= most:
        raise impossible
    steps, rest = [step // unit for step in steps], rest // unit
    price = _price(steps, costs, rest)
    priced = [cost + price * step for cost, step in zip(costs, steps, strict=True)]
    bound = float(sum(x.min() for x in priced)) - price * rest
    above = [x - x.min() for x in priced]
    positive = np.concatenate(above)
    positive = positive[positive > 0]
    slack = float(positive.min()) if len(positive) else 1.0
    everything = 2 * float(sum(x.max() for x in above)) + slack
    while (levels := _within(steps, above, rest, slack)) is None:
        if slack > everything:
            raise impossible
        slack *= _GROWTH
    value = float(sum(cost[level] for cost, level in zip(costs, levels, strict=True)))
    return Choice(levels, value, min(bound, value))


def _price(
    steps: Sequence[Int[np.ndarray, " levels"]],
    costs: Sequence[Float[np.ndarray, " levels"]],
    rest: int,
) -> float:
    """Of a unit, at which the cheapest levels come closest to the total: the dearer, the less of it."""

    def reached(price: float) -> int:
        pairs = zip(steps, costs, strict=True)
        return sum(int(step[(cost + price * step).argmin()]) for step, cost in pairs)

    spread = max(float(np.ptp(cost)) for cost in costs) or 1.0
    # beyond these every item takes its largest, its smallest level
    low, high = -2 * spread, 2 * spread
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if reached(middle) > rest:
            low = middle
        else:
            high = middle
    return high


def _within(
    steps: Sequence[Int[np.ndarray, " levels"]],
    above: Sequence[Float[np.ndarray, " levels"]],
    rest: int,
    slack: float,
) -> tuple[int, ...] | None:
    """The cheapest levels with that total within the slack above the bound; None: there are none."""
    best, start = np.zeros(1), 0  # what totals from `start` on cost at least
    walked: list[tuple[np.ndarray, int]] = []
    for step, cost in zip(steps, above, strict=True):
        useful = np.flatnonzero(cost <= slack)
        first, last = int(step[useful].min()), int(step[useful].max())
        new = np.full(len(best) + last - first, np.inf)
        by = np.zeros(len(new), dtype=np.int16)
        for level in useful:
            at = slice(int(step[level]) - first, int(step[level]) - first + len(best))
            found = best + cost[level]
            better = found < new[at]
            new[at][better], by[at][better] = found[better], level
        inside = np.flatnonzero(new <= slack)
        cut = slice(int(inside[0]), int(inside[-1]) + 1)
        best, start = np.where(new <= slack, new, np.inf)[cut], start + first + cut.start
        walked.append((by[cut], start))
    if not 0 <= rest - start < len(best) or not np.isfinite(best[rest - start]):
        return None
    levels: list[int] = []
    for step, (by, start) in zip(reversed(steps), reversed(walked), strict=True):
        levels.append(int(by[rest - start]))
        rest -= int(step[levels[-1]])
    return tuple(reversed(levels))
