"""One level for each item, at the least cost with a given total: the multiple-choice knapsack.

It shares a model's budget out over its layers: an item is a layer, a level how much of it is pruned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from maskopt.errors import SolverError

#: of the cost, up to which it is proven: HiGHS compares floating-point sums
_GAP = 1e-9


@dataclass(frozen=True)
class Choice:
    """An optimal choice.

    Attributes:
        levels: the index of every item's level.
        cost: of all of them, float64.
        bound: what no choice with that total is below.
    """

    levels: tuple[int, ...]
    cost: float
    bound: float


def choose_levels(
    sizes: Sequence[Int[np.ndarray, " levels"]],
    costs: Sequence[Float[np.ndarray, " levels"]],
    total: int,
) -> Choice:
    """The cheapest choice of one level for each item whose sizes add up to the total, to the last one.

    Args:
        sizes, costs: of every item's levels; whole numbers, and finite ones.

    Raises:
        SolverError: no choice has that total.
    """
    # from each item's first level on, in the largest unit that all differences have in common
    first = np.array([size[0] for size in sizes], dtype=np.int64)
    steps = [np.asarray(size, dtype=np.int64) - size[0] for size in sizes]
    unit = max(1, int(np.gcd.reduce(np.concatenate(steps))))
    rest = total - int(first.sum())
    if rest % unit:
        raise SolverError(f"no choice of levels adds up to {total}")
    ends = np.cumsum([len(size) for size in sizes])
    variables, items = int(ends[-1]), len(sizes)
    item = np.repeat(np.arange(items), [len(size) for size in sizes])
    values = np.concatenate([np.ones(variables), np.concatenate(steps) // unit])
    places = (
        np.concatenate([item, np.full(variables, items)]),
        np.tile(np.arange(variables), 2),
    )
    rows = csr_array((values, places), shape=(items + 1, variables))
    sides = np.append(np.ones(items), rest // unit)
    cost = np.concatenate(costs).astype(np.float64)
    scale = float(np.abs(cost).max()) or 1.0
    found = milp(
        cost / scale,
        constraints=LinearConstraint(rows, sides, sides),
        integrality=np.ones(variables),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": _GAP},
    )
    if found.x is None:
        raise SolverError(f"no choice of levels adds up to {total}")
    levels = tuple(int(part.argmax()) for part in np.split(found.x, ends[:-1]))
    reached = sum(int(size[level]) for size, level in zip(sizes, levels, strict=True))
    if reached != total:
        raise SolverError(f"HiGHS gave levels that add up to {reached}, not to {total}")
    value = float(sum(c[level] for c, level in zip(costs, levels, strict=True)))
    return Choice(levels, value, min(value, float(found.mip_dual_bound) * scale))
