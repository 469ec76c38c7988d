# mypy: disallow-untyped-defs=False
"""A node of the tree of refitted weights, compiled: the perspective relaxation of what is left.

With d fixed for the row and B = A − diag(d), a node keeps some inputs (z = 1), has pruned some (v = 0) and
relaxes the others; v and z take turns as in `solvers/bounds/perspective.py`. At any v

    F ≥ C − vᵀBv − Σ of price over the kept and over the dearest of the others, as many as are to be kept,
    price_j = (b − Bv)ⱼ²/dⱼ,

whatever the turns came to.
"""

from __future__ import annotations

import numpy as np

from maskopt.solvers.compiled import loop, part

#: of an input in the tree
OUT, FREE, KEPT = -1, 0, 1
#: z is no less: an input that is out must be able to return
_OUT = 1e-9


@part(nogil=True)
def _shared_out(size, z, left):
    """z ← min(1, θ·size) with the sum `left`."""
    order = np.argsort(-size)
    rest = size.sum()
    theta = 0.0
    for m in range(left):
        theta = (left - m) / max(rest, 1e-300)
        if theta * size[order[m]] <= 1.0:
            break
        rest -= size[order[m]]
    for j in range(len(size)):
        z[j] = min(1.0, max(_OUT, theta * size[j]))


@part(nogil=True)
def _solved(matrix, right):
    """By Cholesky, of a definite matrix, which is used up; v [n]."""
    n = len(right)
    x = right.copy()
    for i in range(n):
        for j in range(i + 1):
            s = matrix[i, j]
            for k in range(j):
                s -= matrix[i, k] * matrix[j, k]
            if i == j:
                matrix[i, i] = np.sqrt(max(s, 1e-300))
            else:
                matrix[i, j] = s / matrix[j, j]
        s = x[i]
        for k in range(i):
            s -= matrix[i, k] * x[k]
        x[i] = s / matrix[i, i]
    for i in range(n - 1, -1, -1):
        s = x[i]
        for k in range(i + 1, n):
            s -= matrix[k, i] * x[k]
        x[i] = s / matrix[i, i]
    return x


@loop(nogil=True)
def refitted(a, b, kept):
    """bᵥ of the least squares on the kept inputs (indices): b_SᵀA_SS⁻¹b_S."""
    k = len(kept)
    matrix, right = np.empty((k, k)), np.empty(k)
    for i in range(k):
        right[i] = b[kept[i]]
        for j in range(k):
            matrix[i, j] = a[kept[i], kept[j]]
    v = _solved(matrix, right)
    total = 0.0
    for i in range(k):
        total += v[i] * right[i]
    return total


@loop(nogil=True)
def relaxed(a, b, d, state, z, group, most, turns):
    """The relaxation of a node.

    Args:
        a, b, d: A [n, n], b and d [n].
        state: int8 [n], OUT, FREE or KEPT.
        z: [n], where the turns begin; changed to where they end.
        group, most: inputs of a group, and how many of them are kept.
        turns: of v and z.

    Returns:
        v [n], price [n], and −vᵀBv − the prices that count: the bound but for C.
    """
    n = len(b)
    active = np.flatnonzero(state != OUT)
    m = len(active)
    matrix, right, v = np.empty((m, m)), np.empty(m), np.zeros(n)
    for i in range(m):
        right[i] = b[active[i]]
    for _ in range(turns):
        for i in range(m):
            p = active[i]
            for j in range(i):
                matrix[i, j] = a[p, active[j]]
            matrix[i, i] = a[p, p] - d[p] + d[p] / (1.0 if state[p] == KEPT else z[p])
        solution = _solved(matrix, right)
        for i in range(m):
            v[active[i]] = solution[i]
        for first in range(0, n, group):
            inside = state[first : first + group]
            free = first + np.flatnonzero(inside == FREE)
            left = most - (inside == KEPT).sum()
            if len(free):
                size = np.sqrt(d[free]) * np.abs(v[free])
                some = np.empty(len(free))
                _shared_out(size, some, left)
                z[free] = some
    value, price = 0.0, np.zeros(n)
    for i in range(m):
        p = active[i]
        image = -d[p] * v[p]
        for j in range(m):
            image += a[p, active[j]] * v[active[j]]
        value -= v[p] * image
        price[p] = (b[p] - image) ** 2 / d[p]
    for first in range(0, n, group):
        inside = state[first : first + group]
        for j in range(group):
            if inside[j] == KEPT:
                value -= price[first + j]
        free = first + np.flatnonzero(inside == FREE)
        left = most - (inside == KEPT).sum()
        dearest = np.sort(price[free])
        for j in range(left):
            value -= dearest[len(free) - 1 - j]
    return v, price, value
