# mypy: disallow-untyped-defs=False
"""A row of updated weights on the CPU: what `Row` does with vectors, in one compiled call each.

Products are torch's. Each call of torch releases Python's lock and waits for it again: with a hundred small
calls a row, two threads are no faster than one.

First the loops; u and p are slots of kept and of pruned inputs, `kept` and `pruned` the inputs in them, `a`
is A. Then the search among candidates, by loops alone: their small tableau, exchanged pair by pair, or one
side of it alone. Then `CompiledRow`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maskopt.solvers.compiled import loop, part
from maskopt.solvers.least_squares.state import CHUNK, SAFETY, Block, Row, Slots


@part(nogil=True)
def _take_away(a, lines, x, out):
    """out − Σ_j x_j a[lines_j], four lines at a time."""
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


@loop(nogil=True)
def look(a, target, kept, pruned, v, rest, r, left):
    """r and what is left, written; returns what v explains. `rest` [n] is used."""
    rest[:] = target
    _take_away(a, kept, v, rest)
    explained = 0.0
    for i in range(len(kept)):
        left[i] = rest[kept[i]]
        explained += (target[kept[i]] + left[i]) * v[i]
    for i in range(len(pruned)):
        r[i] = rest[pruned[i]]
    return explained


@part(nogil=True)
def _in_groups(inputs, group_size, chosen):
    """Slots of inputs whose group is chosen."""
    slots = np.empty(len(inputs), np.int64)
    count = 0
    for i in range(len(inputs)):
        if chosen[inputs[i] // group_size]:
            slots[count] = i
            count += 1
    return slots[:count].copy()


@part(nogil=True)
def _whole_groups(value, kept, pruned, group_size, count):
    """Slots of the groups with the least values; groups of infinite value are left out."""
    most = min(max(1, count // group_size), np.sum(value < np.inf))
    chosen = np.zeros(len(value), np.bool_)
    chosen[np.argsort(value)[:most]] = True
    return _in_groups(kept, group_size, chosen), _in_groups(pruned, group_size, chosen)


@loop(nogil=True)
def likely(m, v, r, kept, pruned, alone, spread, group_size, count):
    """Slots u and p of candidates; see `Row.likely`."""
    cost, gain = np.empty(len(kept)), np.empty(len(pruned))
    for i in range(len(kept)):
        cost[i] = v[i] * v[i] / m[i, i]
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


@loop(nogil=True)
def tableau(a, m, v, r, pruned, u, p, columns, inner):
    """z and y of candidates, and −M of u in `columns`, where B of p is already; `inner` is A_pS B."""
    few, size = len(u), len(u) + len(p)
    for i in range(len(v)):
        for j in range(few):
            columns[i, j] = -m[i, u[j]]
    z, y = np.empty((size, size)), np.empty(size)
    for i in range(few):
        y[i] = v[u[i]]
        for j in range(few):
            z[i, j] = (columns[u[i], j] + columns[u[j], i]) / 2
        for j in range(few, size):
            z[i, j] = z[j, i] = columns[u[i], j]
    for i in range(len(p)):
        y[few + i] = r[p[i]]
        line = a[pruned[p[i]]]
        for j in range(len(p)):
            z[few + i, few + j] = line[pruned[p[j]]] - (inner[i, j] + inner[j, i]) / 2
    return z, y


@loop(nogil=True)
def settle_in(m, v, kept, pruned, u, p, scaled, w, y):
    """After M's product: the lines of what came, v, and who is in which slot; see `Row.exchange`."""
    pairs = len(u)
    for i in range(len(v)):
        moved = 0.0
        for j in range(2 * pairs):
            moved += scaled[i, j] * y[j]
        v[i] -= moved
        for j in range(pairs):
            m[i, u[j]] = -scaled[i, pairs + j]
    for j in range(pairs):
        for i in range(len(v)):
            m[u[j], i] = -scaled[i, pairs + j]
    for i in range(pairs):
        value = 0.0
        for j in range(2 * pairs):
            value += w[pairs + i, j] * y[j]
        v[u[i]] = value
        for j in range(pairs):
            m[u[i], u[j]] = w[pairs + i, pairs + j]
        kept[u[i]], pruned[p[i]] = pruned[p[i]], kept[u[i]]


@part(nogil=True)
def _priced(m, v, r, pruned, kept, spread, safety):
    """Per kept input its cost, what (2) asks of a gain, and v_u/M_uu; per pruned input the gain."""
    cost, need, price = np.empty(len(v)), np.empty(len(v)), np.empty(len(v))
    gain = np.empty(len(r))
    for i in range(len(v)):
        cost[i], price[i] = v[i] * v[i] / m[i, i], v[i] / m[i, i]
        ratio = max(1.0, spread[kept[i]] / m[i, i])
        root = np.sqrt(ratio) + np.sqrt(ratio - 1.0)
        need[i] = cost[i] / (root * root)
    for i in range(len(r)):
        gain[i] = r[i] * r[i] * spread[pruned[i]] * (1.0 + safety)
    return cost, need, price, gain


@loop(nogil=True)
def screen(m, v, r, kept, pruned, spread, safety):
    """What (2) leaves, and what (1) takes: u by what they need, the least first, p by their gains, the
    largest first; how many of p a u needs; cost and price of u, and of p r², 2r and the least C; no flags."""
    cost, need, price, gain = _priced(m, v, r, pruned, kept, spread, safety)
    low, high = need.min(), gain.max()
    u, p = np.argsort(need), np.argsort(-gain)
    few, some = 0, 0
    while few < len(u) and need[u[few]] < high:
        few += 1
    while some < len(p) and gain[p[some]] > low:
        some += 1
    u, p = u[:few].copy(), p[:some].copy()
    widths = np.empty(few, np.int64)
    width = some
    for i in range(few):
        while width > 0 and not gain[p[width - 1]] > need[u[i]]:
            width -= 1
        widths[i] = width
    square, twice, least = np.empty(some), np.empty(some), np.empty(some)
    for j in range(some):
        square[j], twice[j] = r[p[j]] * r[p[j]], 2.0 * r[p[j]]
        least[j] = (1.0 - safety) / spread[pruned[p[j]]]
    return u, p, widths, cost[u], price[u], square, twice, least, np.zeros(some, np.bool_)


@loop(nogil=True)
def flag(b, cost, price, square, twice, least, flagged):
    """(1) for some u (lines of b) and the first of p."""
    for i in range(b.shape[0]):
        for j in range(b.shape[1]):
            flagged[j] |= square[j] + twice[j] * (price[i] * b[i, j]) > cost[i] * least[j]


@loop(nogil=True)
def suspects_of_groups(m, v, r, kept, pruned, a, spread, group_size, safety):
    """Slots of pruned inputs that (2) and (1) leave inside groups, and how many pairs (1) looked at."""
    cost, need, price, gain = _priced(m, v, r, pruned, kept, spread, safety)
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


@loop(nogil=True)
def best_pairs(b, outer, m, v, r, kept, pruned, p, alone, group_size, threshold, count):
    """Slots u and p out of all pairs with the suspects p (one a line of b, B, and outer, A_pS) of Δ <
    −threshold."""
    k, some = len(kept), len(p)
    own = np.empty(k)
    for i in range(k):
        own[i] = m[i, i]
    by_kept, by_pruned = np.full(k, np.inf), np.full(some, np.inf)
    for j in range(some):
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
            delta = miss * miss / (own[i] + b[j, i] * b[j, i] * inverse) - saved
            by_kept[i] = min(by_kept[i], delta)
            by_pruned[j] = min(by_pruned[j], delta)
    if not by_pruned.min() < -threshold:
        return p[:0].copy(), p[:0].copy()
    if group_size < len(alone):
        value = np.full(len(alone) // group_size, np.inf)
        for j in range(some):
            group = pruned[p[j]] // group_size
            value[group] = min(value[group], by_pruned[j])
        return _whole_groups(value, kept, pruned, group_size, count)
    u, best = np.argsort(by_kept)[:count], np.argsort(by_pruned)[:count]
    return u[by_kept[u] < 0].copy(), p[best[by_pruned[best] < 0]].copy()


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


class CompiledRow(Row):
    """See `Row`; the same to within rounding."""

    def look(self) -> None:
        rest = self.scratch("rest", len(self.target))
        slots = self.kept, self.pruned, self.v, rest, self.r, self.left
        self.explained = look(*_arrays(self.metric.damped, self.target, *slots))

    def likely(self, count: int) -> Slots:
        diagonals = _arrays(self.metric.alone, self.metric.spread)
        u, p = likely(*self._state(), *diagonals, self.metric.group_size, count)
        return torch.from_numpy(u), torch.from_numpy(p)

    def block(self, u: Tensor, p: Tensor) -> Block:
        outer = self.lines(p)
        columns = self.scratch("block", len(self.kept), len(u) + len(p))
        b = torch.mm(self.m, outer.T, out=columns[:, len(u) :])
        inner = torch.mm(outer, b, out=self.scratch("inner", len(p), len(p)))
        state = self.metric.damped, self.m, self.v, self.r, self.pruned
        z, y = tableau(*_arrays(*state, u, p, columns, inner))
        return Block(columns, torch.from_numpy(z), torch.from_numpy(y))

    def exchange(self, u: Tensor, p: Tensor, block: Block) -> None:
        w = torch.linalg.inv(block.z)
        scaled = torch.mm(block.columns, w, out=self.scratch("scaled", *block.columns.shape))
        self.m.addmm_(scaled, block.columns.T)
        state = self.m, self.v, self.kept, self.pruned
        settle_in(*_arrays(*state, u, p, scaled, w, block.y))
        self.fresh = False
        self.look()

    def improving(self, count: int, threshold: float) -> Slots | None:
        p = self._suspects()
        if not len(p):
            return None
        outer = self.lines(p)
        b = torch.mm(outer, self.m, out=self.scratch("columns", *outer.shape))
        self.formed += b.numel()
        state = *_arrays(b, outer), *self._state(), *_arrays(p, self.metric.alone)
        u, best = best_pairs(*state, self.metric.group_size, threshold, count)
        return (torch.from_numpy(u), torch.from_numpy(best)) if len(best) else None

    def _suspects(self) -> Tensor:
        metric, state = self.metric, self._state()
        if metric.group_size < len(self.target):
            shared = _arrays(metric.damped, metric.spread)
            flagged, formed = suspects_of_groups(*state, *shared, metric.group_size, SAFETY)
            self.formed += formed
            return torch.from_numpy(flagged)
        left = screen(*state, metric.spread.numpy(), SAFETY)
        u, p, widths, cost, price, square, twice, least, flagged = left
        outer, slots = self.lines(torch.from_numpy(p)), torch.from_numpy(u)
        for first in range(0, len(u), CHUNK):
            part, width = slots[first : first + CHUNK], int(widths[first])
            lines = self.scratch("lines", len(part), len(self.kept))
            torch.index_select(self.m, 0, part, out=lines)
            b = torch.mm(lines, outer[:width].T, out=self.scratch("b", len(part), width))
            self.formed += b.numel()
            flag(b.numpy(), cost[first:], price[first:], square, twice, least, flagged)
        return torch.from_numpy(np.sort(p[flagged]))

    def _state(self) -> list[np.ndarray]:
        """M, v, r, and the inputs in the slots."""
        return _arrays(self.m, self.v, self.r, self.kept, self.pruned)


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in tensors]
