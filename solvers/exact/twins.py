"""Inputs that may be exchanged without any change, so that a tree need look at one order of theirs alone."""

from __future__ import annotations

import numpy as np


def twins_of(q: np.ndarray, group: int) -> list[np.ndarray]:
    """The sets of at least two inputs of a group (int64, ascending) any two of which may be exchanged: Q
    [n, n] stays what it is, to the last bit."""
    sets: list[list[int]] = []
    for i in range(len(q)):
        exchanged = q[i].copy()
        for known in sets:
            j = known[0]
            if j // group != i // group or q[i, i] != q[j, j]:
                continue
            exchanged[[i, j]] = exchanged[[j, i]]
            if (exchanged == q[j]).all():
                known.append(i)
                break
            exchanged[[i, j]] = exchanged[[j, i]]
        else:
            sets.append([i])
    return [np.array(known) for known in sets if len(known) > 1]


def put_in_order(pruned: np.ndarray, twins: list[np.ndarray]) -> np.ndarray:
    """The mask (p, bool [n]) of equal objective that prunes the first ones of all twins."""
    ordered = np.array(pruned, dtype=bool)
    for known in twins:
        ordered[known] = np.arange(len(known)) < ordered[known].sum()
    return ordered


def in_order(state: np.ndarray, twins: list[np.ndarray]) -> bool:
    """Fix what follows where of all twins the first ones are pruned, in place; False: they are not.

    Args:
        state: 1 pruned, 0 kept, −1 free, int8 [n].
    """
    for known in twins:
        ones, zeros = np.flatnonzero(state[known] == 1), np.flatnonzero(state[known] == 0)
        last, first = ones.max(initial=-1), zeros.min(initial=len(known))
        if first < last:
            return False
        state[known[: last + 1]] = 1
        state[known[first:]] = 0
    return True
