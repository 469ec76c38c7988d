"""The kernel for any device: the steps of the engine as torch operations, rows in lockstep."""

from __future__ import annotations

import torch
from torch import Tensor

from maskopt.solvers.swap.batch import Batch, by_count
from maskopt.solvers.swap.literal import refresh

#: kept and pruned candidates of a round
CANDIDATES = 32
#: N:M groups up to this size are priced whole in every round
SMALL_GROUP = 64


class TorchKernel:
    """Batched tensor operations; what is held at a time stays below `memory` bytes."""

    name = "torch"
    patience = 256

    def __init__(self, batch: Batch, memory: int, candidates: int = CANDIDATES) -> None:
        self.single = batch.single
        self._memory = memory
        self._width = candidates

    def refresh(self, batch: Batch, rows: Tensor) -> None:
        refresh(batch, rows, self._memory)

    def search(self, batch: Batch, rows: Tensor, most: int) -> None:
        """As in `Kernel`: a round for all rows that still swap, again and again."""
        per_row = 8 * (8 * batch.n + 4 * (2 * self._width) ** 2)
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
        batch.partner[rows] = -1
        grouped = batch.group < batch.n
        per_row = 8 * 3 * batch.n * batch.group if grouped else 4 * 3 * batch.n * min(batch.n, 64)
        step = self._price_groups if grouped else self._price_all
        return torch.cat([step(batch, p) for p in rows.split(max(1, self._memory // per_row))])

    def _choose(self, batch: Batch, rows: Tensor) -> Tensor:
        """Candidates [rows, 2K], ascending, −1 where there are no more; see the engine."""
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
        half = self._width // 2 if fill else self._width
        own = _least(gain, half)
        harvest = torch.cat([own, partner.gather(1, own.clamp(min=0)).masked_fill(own < 0, -1)], 1)
        if not fill:
            return distinct(harvest)
        columns = torch.cat([harvest, _least(a, half), _least(b, half)], 1)
        return distinct(columns)

    def _exchange(self, batch: Batch, rows: Tensor, columns: Tensor, most: int) -> Tensor:
        """Best swaps among the candidates until none improves; float64. Returns swaps a row."""
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
        self._move(batch, rows, at, change)
        where, slot = (live & (kept != before)).nonzero(as_tuple=True)
        batch.kept[rows[where], at[where, slot]] = kept[where, slot]
        batch.swaps[rows] = swaps
        return swaps - started

    def _move(self, batch: Batch, rows: Tensor, at: Tensor, change: Tensor) -> None:
        """c ← c + Σ_k change_k G[at_k, :], in one fixed order."""
        for k in range(at.shape[1]):
            some = (change[:, k] != 0).nonzero()[:, 0]
            if len(some):
                moved = change[some, k, None] * batch.gram[at[some, k]].double()
                batch.c[rows[some]] += moved

    def _price_all(self, batch: Batch, rows: Tensor) -> Tensor:
        """Every kept column against all pruned ones: which rows are not optimal."""
        improving = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for some in by_count(batch.kept[rows]):
            improving[some] = self._price_alike(batch, rows[some])
        return improving

    def _price_alike(self, batch: Batch, rows: Tensor) -> Tensor:
        """Of rows that keep as many each, some kept columns of each at a time."""
        a, b = _sides(batch, rows)
        count = int(batch.kept[rows[0]].sum())
        threshold = batch.threshold(rows)
        improving = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        if count == 0 or count == batch.n:
            return improving
        x = batch.x[rows]
        dtype = torch.float32 if batch.single else torch.float64
        margin = 4 * torch.finfo(dtype).eps
        reach = (x.abs() * self._reach(batch)).square()
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
            self._settle(batch, rows, line, u[line, slot], p[line, slot], a, b, improving)
        return improving

    def _settle(
        self,
        batch: Batch,
        rows: Tensor,
        line: Tensor,
        u: Tensor,
        p: Tensor,
        a: Tensor,
        b: Tensor,
        improving: Tensor,
    ) -> None:
        """Decide flagged pairs in float64; where rounding flagged one, its whole kept column."""
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
        improving[line[good]] = True
        batch.partner[rows[line[good]], u[good]] = p[good].to(torch.int32)
        batch.cross[rows[line[good]], u[good]] = cross[good]

    def _price_groups(self, batch: Batch, rows: Tensor) -> Tensor:
        """N:M: all pairs inside groups, float64; some groups at a time."""
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

    def _reach(self, batch: Batch) -> Tensor:
        """d with |G_ij| ≤ d_i d_j: √G_jj, unless G is indefinite by more than rounding allows."""
        if not hasattr(self, "_d"):
            root = batch.diagonal.clamp(min=0).sqrt()
            step = max(1, self._memory // (8 * 2 * batch.n))
            most = torch.cat([part.abs().amax(1).double() for part in batch.gram.split(step)])
            fits = all(
                bool((part.double().abs() <= 1.001 * root[start : start + step, None] * root).all())
                for start, part in zip(range(0, batch.n, step), batch.gram.split(step), strict=True)
            )
            self._d = root if fits else most.sqrt()
        return self._d


def _sides(batch: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
    """a, +inf where not kept, and b, +inf where not pruned; float64."""
    x, kept = batch.x[rows], batch.kept[rows]
    square, linear = x.square() * batch.diagonal, 2 * x * batch.c[rows]
    a, b = square + linear, square - linear
    return torch.where(kept, a, torch.inf), torch.where(kept, torch.inf, b)


def _least(values: Tensor, many: int) -> Tensor:
    """Columns of the least finite values of each row, ties by lowest index; −1 where no more."""
    found = values.sort(dim=1, stable=True)
    most = min(many, values.shape[1])
    return found.indices[:, :most].masked_fill(found.values[:, :most] == torch.inf, -1)


def distinct(columns: Tensor) -> Tensor:
    """Ascending, every repetition replaced by −1."""
    ordered = columns.sort(1).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(again, -1)
