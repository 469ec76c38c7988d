# mypy: disallow-untyped-defs=False
"""Compiled loops of `Row`, on its vectors, and the search among candidates on their small tableau.

u and p are slots of kept and of pruned inputs, `kept` and `pruned` the inputs in them, `a` is A, and
`inverse_diagonal` the diagonal of M. Each call of torch releases Python's lock and waits for it again: with a
hundred small calls a row, two threads are no faster than one.
"""

from __future__ import annotations

import numpy as np

from maskopt.solvers.kernels import njit


@njit
def _take_away(a, lines, x, out):
    """Subtract Σ_j x_j a[lines_j] from `out`, four lines at a time."""
    n, whole = len(out), len(lines) - len(lines) % 4
    for j in range(0, whole, 4):
        one, two, three, four = a[lines[j]], a[lines[j + 1]], a[lines[j + 2]], a[lines[j + 3]]
        x1, x2, x3, x4 = x[j], x[j + 1], x[j + 2], x[j + 3]
        for i in range(n):
            out[i] -= (x1 * one[i] + x2 * two[i]) + (x3 * three[i] + x4 * four[i])
    for j in range(whole, len(lines)):
        line, x1 = a[lines[j]], x[j]
        for i in range(n):
            out[i] -= x1 * line[i]


@njit
def look(a, target, kept, pruned, v, residual, r, left):
    """Write r and what is left, and return what v explains; `residual` [n] is scratch memory."""
    residual[:] = target
    _take_away(a, kept, v, residual)
    explained = 0.0
    for i in range(len(kept)):
        left[i] = residual[kept[i]]
        explained += (target[kept[i]] + left[i]) * v[i]
    for i in range(len(pruned)):
        r[i] = residual[pruned[i]]
    return explained


@njit
def _in_groups(inputs, group_size, chosen):
    """Return slots of inputs whose group is chosen."""
    slots = np.empty(len(inputs), np.int64)
    count = 0
    for i in range(len(inputs)):
        if chosen[inputs[i] // group_size]:
            slots[count] = i
            count += 1
    return slots[:count].copy()


@njit
def _whole_groups(value, kept, pruned, group_size, count):
    """Return slots of the groups with the least values; groups of infinite value are left out."""
    most = min(max(1, count // group_size), np.sum(value < np.inf))
    chosen = np.zeros(len(value), np.bool_)
    chosen[np.argsort(value)[:most]] = True
    return _in_groups(kept, group_size, chosen), _in_groups(pruned, group_size, chosen)


@njit
def likely(inverse_diagonal, v, r, kept, pruned, alone, spread, group_size, count):
    """Return slots u and p of candidates; see `Row.likely`."""
    cost, gain = np.empty(len(kept)), np.empty(len(pruned))
    for i in range(len(kept)):
        cost[i] = v[i] * v[i] / inverse_diagonal[i]
    for i in range(len(pruned)):
        gain[i] = r[i] * r[i] * np.sqrt(spread[pruned[i]] / alone[pruned[i]])
    if group_size == len(alone):
        return np.argsort(cost)[:count].copy(), np.argsort(-gain)[:count].copy()
    groups = len(alone) // group_size
    cheapest, dearest = np.full(groups, np.inf), np.zeros(groups)
    for i in range(len(kept)):
        cheapest[kept[i] // group_size] = min(cheapest[kept[i] // group_size], cost[i])
    for i in range(len(pruned)):
        dearest[pruned[i] // group_size] = max(dearest[pruned[i] // group_size], gain[i])
    return _whole_groups(cheapest - dearest, kept, pruned, group_size, count)


@njit
def move_weights(v, u, scaled, w, y):
    """Change v by the exchanges of a block, in place; see `Row.exchange`."""
    count = len(u)
    for i in range(len(v)):
        moved = 0.0
        for j in range(2 * count):
            moved += scaled[i, j] * y[j]
        v[i] -= moved
    for i in range(count):
        value = 0.0
        for j in range(2 * count):
            value += w[count + i, j] * y[j]
        v[u[i]] = value


@njit
def _priced(inverse_diagonal, v, r, pruned, kept, spread, safety):
    """Return per kept input its cost, what (2) asks of a gain, and v_u/M_uu; per pruned input the gain."""
    cost, need, price = np.empty(len(v)), np.empty(len(v)), np.empty(len(v))
    gain = np.empty(len(r))
    for i in range(len(v)):
        cost[i], price[i] = v[i] * v[i] / inverse_diagonal[i], v[i] / inverse_diagonal[i]
        ratio = max(1.0, spread[kept[i]] / inverse_diagonal[i])
        root = np.sqrt(ratio) + np.sqrt(ratio - 1.0)
        need[i] = cost[i] / (root * root)
    for i in range(len(r)):
        gain[i] = r[i] * r[i] * spread[pruned[i]] * (1.0 + safety)
    return cost, need, price, gain


@njit
def screen(inverse_diagonal, v, r, kept, pruned, spread, safety):
    """Return the slots that (2) leaves, and what (1) takes.

    These are u by what they need, the least first; p by their gains, the largest first; how many of p a u
    needs; cost and price of u; r², 2r and the least C of p; and no flags.
    """
    cost, need, price, gain = _priced(inverse_diagonal, v, r, pruned, kept, spread, safety)
    low, high = need.min(), gain.max()
    u, p = np.argsort(need), np.argsort(-gain)
    kept_count, pruned_count = 0, 0
    while kept_count < len(u) and need[u[kept_count]] < high:
        kept_count += 1
    while pruned_count < len(p) and gain[p[pruned_count]] > low:
        pruned_count += 1
    u, p = u[:kept_count].copy(), p[:pruned_count].copy()
    widths = np.empty(kept_count, np.int64)
    width = pruned_count
    for i in range(kept_count):
        while width > 0 and not gain[p[width - 1]] > need[u[i]]:
            width -= 1
        widths[i] = width
    square, twice, least = np.empty(pruned_count), np.empty(pruned_count), np.empty(pruned_count)
    for j in range(pruned_count):
        square[j], twice[j] = r[p[j]] * r[p[j]], 2.0 * r[p[j]]
        least[j] = (1.0 - safety) / spread[pruned[p[j]]]
    return u, p, widths, cost[u], price[u], square, twice, least, np.zeros(pruned_count, np.bool_)


@njit
def flag(b, cost, price, square, twice, least, flagged):
    """Flag the first of p by (1) for some u, the lines of b."""
    for i in range(b.shape[0]):
        for j in range(b.shape[1]):
            flagged[j] |= square[j] + twice[j] * (price[i] * b[i, j]) > cost[i] * least[j]


@njit
def suspects_of_groups(inverse_diagonal, v, r, kept, pruned, m, a, spread, group_size, safety):
    """Return the pruned slots that (2) and (1) leave inside groups, and how many pairs (1) looked at."""
    cost, need, price, gain = _priced(inverse_diagonal, v, r, pruned, kept, spread, safety)
    slot = np.full(len(spread), -1)
    for i in range(len(kept)):
        slot[kept[i]] = i
    flagged, formed = np.zeros(len(r), np.bool_), 0
    for j in range(len(r)):
        line, first = a[pruned[j]], pruned[j] - pruned[j] % group_size
        least = (1.0 - safety) / spread[pruned[j]]
        for other in range(first, first + group_size):
            i = slot[other]
            if i < 0 or not need[i] < gain[j]:
                continue
            formed += 1
            b = 0.0
            for other_slot in range(len(kept)):
                b += m[i, other_slot] * line[kept[other_slot]]
            if r[j] * r[j] + 2.0 * r[j] * price[i] * b > cost[i] * least:
                flagged[j] = True
    return np.flatnonzero(flagged), formed


@njit
def best_pairs(
    b, outer, inverse_diagonal, v, r, kept, pruned, p, alone, group_size, threshold, count
):
    """Return slots u and p out of all pairs of Δ < −threshold with the suspects p.

    Each suspect has a line of `b`, B, and of `outer`, A_pS.
    """
    k, suspects = len(kept), len(p)
    by_kept, by_pruned = np.full(k, np.inf), np.full(suspects, np.inf)
    for j in range(suspects):
        inside = 0.0
        for i in range(k):
            inside += outer[j, i] * b[j, i]
        c, left = alone[pruned[p[j]]] - inside, r[p[j]]
        lone, inverse, saved = left / c, 1.0 / c, left * left / c
        group = pruned[p[j]] // group_size
        for i in range(k):
            if kept[i] // group_size != group:
                continue
            miss = v[i] - b[j, i] * lone
            delta = miss * miss / (inverse_diagonal[i] + b[j, i] * b[j, i] * inverse) - saved
            by_kept[i] = min(by_kept[i], delta)
            by_pruned[j] = min(by_pruned[j], delta)
    if not by_pruned.min() < -threshold:
        return p[:0].copy(), p[:0].copy()
    if group_size < len(alone):
        value = np.full(len(alone) // group_size, np.inf)
        for j in range(suspects):
            group = pruned[p[j]] // group_size
            value[group] = min(value[group], by_pruned[j])
        return _whole_groups(value, kept, pruned, group_size, count)
    u, best = np.argsort(by_kept)[:count], np.argsort(by_pruned)[:count]
    return u[by_kept[u] < 0].copy(), p[best[by_pruned[best] < 0]].copy()


@njit
def _pivot(z, y, i, j, lines):
    """Exchange slots i (kept) and j (pruned): `Row.exchange` of a single pair."""
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


@njit
def exchanges(z, y, who, group, count, threshold, most):
    """Make the best exchange among the candidates until none is below −threshold; return how many were made.

    z [size, size] is T of the candidates, the first `count` kept; y [size] their v and r; who, int64 [size],
    the candidate in each slot: all changed in place. Exchanges stay inside a `group`, int64 [size] of each
    candidate; `most`: exchanges at most.
    """
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
            inverse_i, v, group_i = -z[i, i], y[i], group[who[i]]
            for j in range(count, size):
                b = z[i, j]
                left = v - b * lone[j]
                delta = left * left / (inverse_i + b * b * inverse[j]) - saved[j]
                if delta < best and group[who[j]] == group_i:
                    best, u, p = delta, i, j
        if u < 0:
            break
        _pivot(z, y, u, p, lines)
        who[u], who[p] = who[p], who[u]
        made += 1
    return made


@njit
def one_sided(z, y, group, room, most):
    """Prune the kept candidate of least y²/|z_ii|, or keep the pruned one of greatest again; and so on.

    Each is priced after the ones before it. Returns the order, and the cost or saving of each in its turn. z
    [size, size] is −M of kept candidates, or C of pruned ones, y [size] their v or r, `room` int64, how many
    of each group may go: all changed in place; `group`: int64 [size]; `most`: how many at most.
    """
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
