"""The kernel for any device: the steps of the engine as torch operations, rows in lockstep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskopt.solvers.shared_budget import by_count
from maskopt.solvers.swap.engine import Batch
from maskopt.solvers.swap.literal import refresh

#: kept and pruned candidates of a round
CANDIDATES = 32
#: N:M groups up to this size are priced whole in every round; it costs less than one update of c
SMALL_GROUP = 64
#: |x|·d is rounded up by this factor, ρ as well
SLACK = 1.0 + 2.0**-20
_Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Reach:
    """Bounds of G's entries: |G_ij| ≤ d_i d_j, and |G_ij| ≤ ρ_i d_i d_j for all j ≠ i.

    Attributes:
        d: float64; √G_jj, or √max_i|G_ij| for all j where G is not quite positive semidefinite.
        rho: float64, rounded up, at most about 1.
    """

    d: Float[Tensor, " n"]
    rho: Float[Tensor, " n"]

    @classmethod
    def of(
        cls, gram: Float[Tensor, "n n"], *, single: bool = False, block_bytes: int = 2**24
    ) -> Reach:
        """Pass over G blockwise, in float32 (`single`) or float64; twice where G is indefinite."""
        dtype = torch.float32 if single else torch.float64
        step = max(1, block_bytes // (8 * len(gram)))
        reach = cls._with(gram, gram.diagonal().double().clamp(min=0.0).sqrt(), dtype, step)
        if bool(reach.rho.max() <= 1.0 + 1e-3):
            return reach
        return cls._with(gram, gram.abs().amax(1).double().sqrt(), dtype, step)

    @classmethod
    def _with(cls, gram: Tensor, d: Tensor, dtype: torch.dtype, step: int) -> Reach:
        scale = float(d.max())
        most = 1e12 / scale if scale > 0 else 0.0
        inverse = torch.where(d > 1e-12 * scale, 1.0 / d, most).to(dtype)
        rho = torch.empty_like(d)
        for start in range(0, len(d), step):
            part = slice(start, start + step)
            ratio = gram[part].abs() * inverse
            ratio.diagonal(start).zero_()
            rho[part] = ratio.amax(1) * inverse[part]
        return cls(d=d, rho=rho * SLACK)


class TorchKernel:
    """Batched tensor operations whose temporaries stay below `memory` bytes."""

    patience = 256

    def __init__(self, batch: Batch, memory: int) -> None:
        self._memory = memory
        self._reach = Reach.of(batch.gram, single=batch.single, block_bytes=memory // 4).d

    def refresh(self, batch: Batch, rows: Tensor) -> None:
        """Compute c and f from scratch; see `Kernel.refresh`."""
        refresh(batch, rows, self._memory)

    def search(self, batch: Batch, rows: Tensor, most: int) -> None:
        """Make rounds with all rows that still swap; see `Kernel.search`."""
        per_row = 8 * (8 * batch.n + 4 * (2 * CANDIDATES) ** 2)
        rows = rows[batch.swaps[rows] < most]
        while len(rows):
            made = []
            for part in rows.split(max(1, self._memory // per_row)):
                if batch.group <= SMALL_GROUP and batch.group < batch.n:
                    self.price(batch, part)
                columns = self._choose(batch, part)
                made.append(self._exchange(batch, part, columns, most))
                batch.rounds[part] += 1
            rows = rows[(torch.cat(made) > 0) & (batch.swaps[rows] < most)]

    def price(self, batch: Batch, rows: Tensor) -> Tensor:
        """Scan all pairs; see `Kernel.price`."""
        batch.partner[rows] = -1
        grouped = batch.group < batch.n
        per_row = 8 * 3 * batch.n * batch.group if grouped else 4 * 3 * batch.n * min(batch.n, 64)
        step = self._price_groups if grouped else self._price_all
        return torch.cat([step(batch, p) for p in rows.split(max(1, self._memory // per_row))])

    def _choose(self, batch: Batch, rows: Tensor) -> Tensor:
        """Return candidates [rows, 2K], ascending, −1 where there are no more; see the engine."""
        a, b = _sides(batch, rows)
        partner = batch.partner[rows].long()
        score = torch.where(batch.kept[rows], a, b)
        mate = partner.clamp(min=0)
        x = batch.x[rows]
        gain = score + score.gather(1, mate) - 2 * x * x.gather(1, mate) * batch.cross[rows]
        stale = (partner < 0) | (batch.kept[rows] == batch.kept[rows].gather(1, mate))
        gain = gain.masked_fill_(stale, torch.inf)
        gain = torch.where(gain < -batch.threshold(rows)[:, None], gain, torch.inf)
        fill = batch.group == batch.n
        half = CANDIDATES // 2 if fill else CANDIDATES
        best = least(gain, half)
        columns = [best, partner.gather(1, best.clamp(min=0)).masked_fill(best < 0, -1)]
        if fill:
            columns += [least(a, half), least(b, half)]
        return distinct(torch.cat(columns, 1))

    def _exchange(self, batch: Batch, rows: Tensor, columns: Tensor, most: int) -> Tensor:
        """Make best swaps among the candidates until none improves, and return the swaps of each row."""
        live = columns >= 0
        at = columns.clamp(min=0)
        x = batch.x[rows].gather(1, at).masked_fill_(~live, 0.0)
        kept = batch.kept[rows].gather(1, at)
        before = kept.clone()
        square = x.square() * batch.diagonal[at]
        linear = 2 * x * batch.c[rows].gather(1, at)
        cross = batch.gram[at[:, :, None], at[:, None, :]].double()
        cross *= 2 * x[:, :, None] * x[:, None, :]
        blocked = ~(live[:, :, None] & live[:, None, :])
        blocked |= (at // batch.group)[:, :, None] != (at // batch.group)[:, None, :]
        objective, swaps = batch.objective[rows], batch.swaps[rows]
        started = swaps.clone()
        line = torch.arange(len(rows), device=rows.device)
        width = columns.shape[1]
        while True:
            a = torch.where(kept, square + linear, torch.inf)
            b = torch.where(kept, torch.inf, square - linear)
            delta = a[:, :, None] + b[:, None, :] - cross
            delta.masked_fill_(blocked, torch.inf)
            best, position = delta.flatten(1).min(1)
            threshold = batch.threshold(rows)
            go = (best < -threshold) & (swaps < most)
            if not bool(go.any()):
                break
            u, p = position // width, position % width
            linear += torch.where(go[:, None], cross[line, u] - cross[line, p], 0.0)
            kept[line[go], u[go]] = False
            kept[line[go], p[go]] = True
            swaps += go
            objective += torch.where(go, best, 0.0)
            batch.objective[rows] = objective
        change = torch.where(live & (kept != before), x * (before.double() - kept.double()), 0.0)
        # c ← c + Σ_k change_k G[at_k, :], in one fixed order
        for k in range(width):
            changed = (change[:, k] != 0).nonzero()[:, 0]
            if len(changed):
                moved = change[changed, k, None] * batch.gram[at[changed, k]].double()
                batch.c[rows[changed]] += moved
        where, slot = (live & (kept != before)).nonzero(as_tuple=True)
        batch.kept[rows[where], at[where, slot]] = kept[where, slot]
        batch.swaps[rows] = swaps
        return swaps - started

    def _price_all(self, batch: Batch, rows: Tensor) -> Tensor:
        """Scan all pruned columns for every kept one, and return which rows are not optimal."""
        places = by_count(batch.kept[rows])
        if len(places) > 1:
            parts = torch.cat([self._price_all(batch, rows[place]) for place in places])
            return parts[torch.cat(places).argsort()]
        a, b = _sides(batch, rows)
        count = int(batch.kept[rows[0]].sum())
        threshold = batch.threshold(rows)
        improving = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        if count == 0 or count == batch.n:
            return improving
        x = batch.x[rows]
        dtype = torch.float32 if batch.single else torch.float64
        margin = 4 * torch.finfo(dtype).eps
        reach = (x.abs() * self._reach).square()
        low_a, low_b = (
            (side - margin * (side.abs() + reach) - 1e-24).nan_to_num(nan=torch.inf).to(dtype)
            for side in (a, b)
        )
        x_low = x.to(dtype)
        kept = batch.kept[rows].nonzero()[:, 1].view(len(rows), count)
        step = max(1, self._memory // (4 * 3 * batch.n * len(rows)))
        for u in kept.split(step, dim=1):
            delta = batch.gram[u].to(dtype)
            delta *= x_low[:, None, :]
            delta *= -2 * x_low.gather(1, u)[:, :, None]
            delta += low_b[:, None, :]
            value, p = delta.min(2)
            flagged = value.double() + low_a.gather(1, u).double() < -threshold[:, None]
            line, slot = flagged.nonzero(as_tuple=True)
            if not len(line):
                continue
            batch.priced[rows] += flagged.sum(1) * batch.n
            pairs = line, u[line, slot], p[line, slot]
            improving[self._improving(batch, rows, (a, b), pairs)] = True
        return improving

    def _improving(self, batch: Batch, rows: Tensor, sides: _Tensors, pairs: _Tensors) -> Tensor:
        """Decide flagged pairs in float64 and return the lines that improve.

        Where rounding flagged a pair that does not improve, its whole kept column is scanned.
        """
        (a, b), (line, u, p) = sides, pairs
        x, limit = batch.x[rows], -batch.threshold(rows)[line]
        cross = batch.gram[u, p]
        delta = a[line, u] + b[line, p] - 2 * x[line, u] * x[line, p] * cross.double()
        unsure = (delta >= limit).nonzero()[:, 0]
        for part in unsure.split(max(1, self._memory // (8 * 4 * batch.n))):
            full = b[line[part]] - 2 * x[line[part], u[part], None] * x[line[part]] * (
                batch.gram[u[part]].double()
            )
            best, place = full.min(1)
            delta[part] = best + a[line[part], u[part]]
            p[part] = place
            cross[part] = batch.gram[u[part], place]
        good = delta < limit
        batch.partner[rows[line[good]], u[good]] = p[good].to(torch.int32)
        batch.cross[rows[line[good]], u[good]] = cross[good]
        return line[good]

    def _price_groups(self, batch: Batch, rows: Tensor) -> Tensor:
        """Scan all pairs inside the groups of N:M, float64."""
        a, b = (side.view(len(rows), -1, batch.group) for side in _sides(batch, rows))
        x = batch.x[rows].view(a.shape)
        limit = -batch.threshold(rows)[:, None, None]
        size, groups = batch.group, batch.n // batch.group
        improving = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        step = max(1, self._memory // (8 * 3 * size * size * len(rows)))
        inside = torch.arange(batch.n, device=rows.device).view(groups, size)
        for first in range(0, groups, step):
            part = slice(first, first + step)
            gram = batch.gram[inside[part, :, None], inside[part, None, :]]
            delta = a[:, part, :, None] + b[:, part, None, :]
            delta -= 2 * x[:, part, :, None] * x[:, part, None, :] * gram.double()
            value, mate = delta.min(3)
            good = value < limit
            improving |= good.flatten(1).any(1)
            line, group, u = good.nonzero(as_tuple=True)
            p = mate[line, group, u]
            start = (group + first) * size
            batch.partner[rows[line], start + u] = (start + p).to(torch.int32)
            batch.cross[rows[line], start + u] = gram[group, u, p]
        return improving


def _sides(batch: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return a, +inf where not kept, and b, +inf where not pruned; float64."""
    x, kept = batch.x[rows], batch.kept[rows]
    square, linear = x.square() * batch.diagonal, 2 * x * batch.c[rows]
    a, b = square + linear, square - linear
    return torch.where(kept, a, torch.inf), torch.where(kept, torch.inf, b)


def least(values: Float[Tensor, "rows m"], count: int) -> Int[Tensor, "rows count"]:
    """Return the places of the least finite values of each row, in no order; −1 where there are no more.

    Ties: the lowest place.
    """
    count = min(count, values.shape[1])
    top, place = values.topk(count, dim=1, largest=False, sorted=True)
    # topk leaves open which of the values equal to the last one it takes
    edge = top[:, -1:]
    tied = (values == edge).sum(1) > (top == edge).sum(1)
    if bool((tied & (edge[:, 0] < torch.inf)).any()):
        order = values[tied].sort(dim=1, stable=True)
        top[tied], place[tied] = order.values[:, :count], order.indices[:, :count]
    return place.masked_fill(top == torch.inf, -1)


def distinct(columns: Tensor) -> Tensor:
    """Sort the columns of each row, and replace every repetition by −1."""
    ordered = columns.sort(1).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(again, -1)
