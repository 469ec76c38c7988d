"""A node of the tree of refitted weights: the perspective relaxation (`convex.perspective`) of what is left.

A node keeps some inputs (z = 1), has pruned some (v = 0, and no price) and relaxes the others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maskopt.solvers.convex.perspective import greatest, shares

#: of an input in the tree
OUT, FREE, KEPT = -1, 0, 1
_U = 2.0**-53


class Relaxed(NamedTuple):
    """The relaxation of a node.

    Attributes:
        z: float64 [n], the kept inputs.
        price: float64 [n], (b − Bv)ⱼ²/dⱼ; 0 of what is pruned.
        value: −vᵀBv less the prices that count: the bound, but for C.
        rounding: what that may be off by.
    """

    z: np.ndarray
    price: np.ndarray
    value: float
    rounding: float


def relaxed(
    a: np.ndarray,
    b: np.ndarray,
    d: np.ndarray,
    state: np.ndarray,
    z: np.ndarray,
    group: int,
    kept: int,
    turns: int,
) -> Relaxed:
    """The relaxation of a node.

    Args:
        a: A, float64 [n, n], of diagonal 1; b, d: float64 [n].
        state: int8 [n], OUT, FREE or KEPT, with something to decide or decided in every group.
        z: float64 [n], where the turns begin.
        kept: inputs of each group.
        turns: of v and z, at least 1.
    """
    n, active = len(b), np.flatnonzero(state != OUT)
    base = a[np.ix_(active, active)]
    split, target = d[active], b[active]
    on_diagonal = slice(None, None, len(active) + 1)
    base.reshape(-1)[on_diagonal] -= split
    size = np.zeros(n)
    size[state == KEPT] = np.inf
    free = state[active] == FREE
    z = np.where(state == KEPT, 1.0, z)
    for _ in range(turns):
        matrix = base.copy()
        matrix.reshape(-1)[on_diagonal] += split / z[active]
        v = np.linalg.solve(matrix, target)
        size[active[free]] = (np.sqrt(split) * np.abs(v))[free]
        z = shares(size, group, kept)
    image = base @ v
    price = np.zeros(n)
    price[active] = (target - image) ** 2 / split
    value = -float(v @ image) - greatest(price, group, kept, state == KEPT)
    # |B_ij| ≤ 1, so that b − Bv is off by no more than n·u times this
    reach = float(np.abs(v).sum() + np.abs(target).max(initial=0.0))
    dear = float(np.sqrt(price[active] / split).sum())
    terms = reach * (reach + 2 * dear) + abs(value)
    return Relaxed(z, price, value, 4 * (n + 8) * _U * terms)


def refitted(a: np.ndarray, b: np.ndarray, kept: np.ndarray) -> float:
    """b_SᵀA_SS⁻¹b_S of the kept inputs (their indices)."""
    wanted = b[kept]
    return float(wanted @ np.linalg.solve(a[np.ix_(kept, kept)], wanted))
