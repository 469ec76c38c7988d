"""Inputs that may be exchanged without any change, so that a tree need look at one order of theirs alone."""

from __future__ import annotations

import numpy as np


def twins_of(q: np.ndarray, group: int) -> list[np.ndarray]:
    """The sets of at least two inputs of a group (int64, ascending) any two of which may be exchanged: Q
    [n, n] stays what it is, to the last bit."""
    alike: dict[bytes, list[list[int]]] = {}  # by the entries of their rows, in any order
    for i, line in enumerate(q + 0.0):
        sets = alike.setdefault(np.sort(line).tobytes(), [])
        for known in sets:
            j, exchanged = known[0], line.copy()
            exchanged[i], exchanged[j] = line[j], line[i]
            if j // group == i // group and (exchanged == q[j]).all():
                known.append(i)
                break
        else:
            sets.append([i])
    return [np.array(known) for sets in alike.values() for known in sets if len(known) > 1]


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
