"""A node of the quadratic tree: the Frank–Wolfe bound of a convex program over what its fixings leave.

    min pᵀAp + cᵀp + constant,   A = base + diag(λ),   over {0 ≤ p ≤ 1, Σ over each group = s, fixings}

The point is found on the free inputs alone, by the interior-point method of the bounds; its bound holds at
every point, so that nothing depends on how far the method came. It stops as soon as its point decides what
becomes of the node. Of twins, inputs that may be exchanged without any change, the first ones are pruned.
"""

from __future__ import annotations

import numpy as np

from maskopt.solvers.compiled import loop
from maskopt.solvers.convex.interior_point import least_first, minimise

#: stop where the gap to the bound is this part of the cutoff; or this part of what the relaxed value lies
#: below it: the node cannot be cut off, and what is left to gain does not matter
_SETTLED, _HOPELESS = 1e-5, 0.02


def bound_node(
    base: np.ndarray,
    lam: np.ndarray,
    c: np.ndarray,
    constant: float,
    group: int,
    pruned: int,
    state: np.ndarray,
    cutoff: float,
    twins: list[np.ndarray],
) -> tuple[float, np.ndarray]:
    """(bound, point) of a node, the bound ∞ where no legal mask is left; fixes inputs of `state` (1 pruned, 0
    kept, −1 free, int8 [n]) that no mask below `cutoff` has otherwise."""
    if not settle(state, group, pruned, twins):
        return np.inf, np.zeros(len(c))
    point = (state == 1).astype(float)
    index = np.flatnonzero(state < 0)
    product, linear = np.zeros(len(c)), np.empty(len(index))
    q = np.empty((len(index), len(index)))
    offset = _gather(base, lam, c, constant, state, index, product, q, linear)
    if len(index) == 0:
        return offset, point
    left, size = _choices(state, group, pruned)
    bound, value, free_point, gradient = minimise(
        q, linear, offset, left, size, cutoff, _SETTLED, _HOPELESS
    )
    point[index] = free_point
    if bound < cutoff and np.isfinite(value):
        _fix(state, index, gradient, gradient.copy(), left, size, bound, cutoff)
    return bound, point


def settle(state: np.ndarray, group: int, pruned: int, twins: list[np.ndarray]) -> bool:
    """A group whose count is reached leaves nothing free, and of `twins` the first ones are pruned; False
    where a count cannot be reached, or twins have another order."""
    groups = state.reshape(-1, group)
    while True:
        before = np.count_nonzero(state < 0)
        if not in_order(state, twins):
            return False
        ones, free = (groups == 1).sum(1), (groups < 0).sum(1)
        if (ones > pruned).any() or (ones + free < pruned).any():
            return False
        groups[(ones == pruned)[:, None] & (groups < 0)] = 0
        groups[(ones + free == pruned)[:, None] & (groups < 0)] = 1
        if not twins or np.count_nonzero(state < 0) == before:
            return True


def twins_of(q: np.ndarray, group: int) -> list[np.ndarray]:
    """The sets of at least two inputs of a group (int64, ascending) any two of which may be exchanged: Q
    [n, n] stays what it is, to the last bit."""
    candidates: dict[bytes, list[list[int]]] = {}  # by the entries of their rows, in any order
    for i, line in enumerate(q + 0.0):
        sets = candidates.setdefault(np.sort(line).tobytes(), [])
        for known in sets:
            j, exchanged = known[0], line.copy()
            exchanged[i], exchanged[j] = line[j], line[i]
            if j // group == i // group and (exchanged == q[j]).all():
                known.append(i)
                break
        else:
            sets.append([i])
    return [np.array(known) for sets in candidates.values() for known in sets if len(known) > 1]


def put_in_order(pruned: np.ndarray, twins: list[np.ndarray]) -> np.ndarray:
    """The mask (p, bool [n]) of equal objective that prunes the first ones of all twins."""
    ordered = np.array(pruned, dtype=bool)
    for known in twins:
        ordered[known] = np.arange(len(known)) < ordered[known].sum()
    return ordered


def in_order(state: np.ndarray, twins: list[np.ndarray]) -> bool:
    """Fix what follows where of all twins the first ones are pruned, in place; False: they are not."""
    for known in twins:
        ones, zeros = np.flatnonzero(state[known] == 1), np.flatnonzero(state[known] == 0)
        last, first = ones.max(initial=-1), zeros.min(initial=len(known))
        if first < last:
            return False
        state[known[: last + 1]] = 1
        state[known[first:]] = 0
    return True


def _choices(state: np.ndarray, group: int, pruned: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the groups that still have a choice: how many of the free inputs are to be pruned, and how
    many there are."""
    groups = state.reshape(-1, group)
    ones, free = (groups == 1).sum(1), (groups < 0).sum(1)
    return pruned - ones[free > 0], free[free > 0]


@loop(nogil=True, _nrt=False)
def _gather(base, lam, c, constant, state, index, product, q, linear):  # type: ignore[no-untyped-def]
    """The program in the free inputs alone: its offset, returned, and `q` and `linear`; `product` is 0."""
    n, m = len(c), len(index)
    for i in range(n):
        if state[i] == 1:
            line = base[i]
            for j in range(n):
                product[j] += line[j]
            product[i] += lam[i]
    offset = constant
    for i in range(n):
        if state[i] == 1:
            offset += product[i] + c[i]
    for x in range(m):
        line = base[index[x]]
        for y in range(m):
            q[x, y] = line[index[y]]
        q[x, x] += lam[index[x]]
        linear[x] = 2 * product[index[x]] + c[index[x]]
    return offset


@loop(nogil=True, _nrt=False)
def _fix(state, index, gradient, parts, left, size, bound, cutoff):  # type: ignore[no-untyped-def]
    """Reduced costs: the same linear form with one input on its other side reaches the cutoff. `parts`, a
    copy of the gradient, is reordered."""
    first = 0
    for g in range(len(left)):
        last = first + size[g]
        part = parts[first:last]
        least_first(part, left[g])
        inside, outside = part[0], part[left[g]]
        for x in range(left[g]):
            inside = max(inside, part[x])
        for x in range(left[g], size[g]):
            outside = min(outside, part[x])
        for x in range(first, last):
            slope = gradient[x]
            if slope <= inside and slope < outside:
                if bound + outside - slope >= cutoff:
                    state[index[x]] = 1
            elif slope >= outside and bound + slope - inside >= cutoff:
                state[index[x]] = 0
        first = last
