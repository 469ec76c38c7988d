# mypy: disallow-untyped-defs=False
"""The search among the candidates of one row, compiled: their small tableau, exchanged pair by pair, or one
side of it alone."""

from __future__ import annotations

import numpy as np

from maskopt.solvers.compiled import loop, part


@part(nogil=True)
def _pivot(z, y, i, j, lines):
    """Slots i (kept) and j (pruned) change places: `Row.exchange` of a single pair."""
    size = len(y)
    scale = 1.0 / (z[i, i] * z[j, j] - z[i, j] * z[i, j])
    w_ii, w_ij, w_jj = z[j, j] * scale, -z[i, j] * scale, z[i, i] * scale
    y_i, y_j = y[i], y[j]
    for k in range(size):
        lines[0, k], lines[1, k] = z[i, k], z[j, k]
    for k in range(size):
        lines[2, k] = lines[0, k] * w_ii + lines[1, k] * w_ij
        lines[3, k] = lines[0, k] * w_ij + lines[1, k] * w_jj
    for k in range(size):
        left, right = lines[2, k], lines[3, k]
        y[k] -= left * y_i + right * y_j
        for m in range(size):
            z[k, m] -= left * lines[0, m] + right * lines[1, m]
    for k in range(size):
        z[k, i] = z[i, k] = lines[3, k]
        z[k, j] = z[j, k] = -lines[2, k]
    z[i, i], z[j, j] = -w_jj, -w_ii
    z[i, j] = z[j, i] = w_ij
    y[i] = w_ij * y_i + w_jj * y_j
    y[j] = -(w_ii * y_i + w_ij * y_j)


@loop(nogil=True)
def exchanges(z, y, who, group, count, threshold, most):
    """The best exchange among the candidates, again and again, until none is below −threshold; the number
    made. z [size, size] is T of the candidates, the first `count` kept; y [size] their v and r; who, int64
    [size], the candidate in each slot: all changed in place. Exchanges stay inside a `group`, int64 [size] of
    each candidate; `most`: exchanges at most."""
    size = len(y)
    made = 0
    lines = np.empty((4, size))
    lone, saved, inverse = np.empty(size), np.empty(size), np.empty(size)
    while made < most:
        for j in range(count, size):
            inverse[j] = 1.0 / z[j, j]
            lone[j] = y[j] * inverse[j]
            saved[j] = y[j] * lone[j]
        best, u, p = -threshold, -1, -1
        for i in range(count):
            own, v, mine = -z[i, i], y[i], group[who[i]]
            for j in range(count, size):
                b = z[i, j]
                left = v - b * lone[j]
                delta = left * left / (own + b * b * inverse[j]) - saved[j]
                if delta < best and group[who[j]] == mine:
                    best, u, p = delta, i, j
        if u < 0:
            break
        _pivot(z, y, u, p, lines)
        who[u], who[p] = who[p], who[u]
        made += 1
    return made


@loop(nogil=True)
def exchanged(z, y, group, count, threshold, most):
    """`exchanges` on copies: how many, the candidates no longer kept, and those no longer pruned, from 0."""
    size = len(y)
    who = np.arange(size)
    made = exchanges(z.copy(), y.copy(), who, group, count, threshold, most)
    kept = np.zeros(size, np.bool_)
    for slot in range(count):
        kept[who[slot]] = True
    return made, np.flatnonzero(~kept[:count]), np.flatnonzero(kept[count:])


@loop(nogil=True)
def one_sided(z, y, group, room, most):
    """Prune the kept candidate of least y²/|z_ii|, or keep the pruned one of greatest again; and so on, each
    priced after the ones before it. Returns the order, and the cost or saving of each in its turn. z [size,
    size] is −M of kept candidates, or C of pruned ones, y [size] their v or r, `room` int64, how many of each
    group may go: all changed in place; `group`: int64 [size]; `most`: how many at most."""
    size = len(y)
    order, prices = np.empty(min(most, size), np.int64), np.empty(min(most, size))
    left = np.ones(size, np.bool_)
    for step in range(len(order)):
        best, at = np.inf, -1
        for i in range(size):
            price = -y[i] * y[i] / z[i, i]  # a cost, or a gain with its sign turned
            if left[i] and room[group[i]] > 0 and price < best:
                best, at = price, i
        if at < 0:
            return order[:step], prices[:step]
        order[step], prices[step] = at, abs(best)
        left[at] = False
        room[group[at]] -= 1
        line, scale, value = z[at].copy(), 1.0 / z[at, at], y[at]
        for i in range(size):
            if left[i]:
                y[i] -= line[i] * scale * value
                for j in range(size):
                    z[i, j] -= line[i] * scale * line[j]
    return order, prices
