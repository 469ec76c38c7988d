"""The kernel for any device: the steps of the engine as torch operations, rows in lockstep."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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
    """How far G can couple two columns: |G_ij| ≤ d_i d_j, and |G_ij| ≤ ρ_i d_i d_j for all j ≠ i."""

    d: Float[Tensor, " n"]
    """float64; √G_jj, or √max_i|G_ij| for all j where G is not quite positive semidefinite."""
    rho: Float[Tensor, " n"]
    """float64, rounded up, at most about 1."""

    @classmethod
    def of(
        cls, gram: Float[Tensor, "n n"], *, single: bool = False, block_bytes: int = 2**24
    ) -> Reach:
        """One pass over G, blockwise (two where G is indefinite), in float32 (`single`) or float64."""
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
    """Batched tensor operations; what is held at a time stays below `memory` bytes."""

    patience = 256

    def __init__(self, batch: Batch, memory: int) -> None:
        self.single = batch.single
        self._memory = memory
        self._gram = batch.gram

    @cached_property
    def _reach(self) -> Tensor:
        return Reach.of(self._gram, single=self.single, block_bytes=self._memory // 4).d

    def refresh(self, batch: Batch, rows: Tensor) -> None:
        refresh(batch, rows, self._memory)

    def search(self, batch: Batch, rows: Tensor, most: int) -> None:
        """As in `Kernel`: a round for all rows that still swap, again and again."""
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
        half = CANDIDATES // 2 if fill else CANDIDATES
        own = least(gain, half)
        harvest = torch.cat([own, partner.gather(1, own.clamp(min=0)).masked_fill(own < 0, -1)], 1)
        if not fill:
            return distinct(harvest)
        columns = torch.cat([harvest, least(a, half), least(b, half)], 1)
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
        # c ← c + Σ_k change_k G[at_k, :], in one fixed order
        for k in range(width):
            some = (change[:, k] != 0).nonzero()[:, 0]
            if len(some):
                moved = change[some, k, None] * batch.gram[at[some, k]].double()
                batch.c[rows[some]] += moved
        where, slot = (live & (kept != before)).nonzero(as_tuple=True)
        batch.kept[rows[where], at[where, slot]] = kept[where, slot]
        batch.swaps[rows] = swaps
        return swaps - started

    def _price_all(self, batch: Batch, rows: Tensor) -> Tensor:
        """Every kept column against all pruned ones, some at a time: which rows are not optimal."""
        same_count = by_count(batch.kept[rows])
        if len(same_count) > 1:
            parts = torch.cat([self._price_all(batch, rows[some]) for some in same_count])
            return parts[torch.cat(same_count).argsort()]
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
            found = line, u[line, slot], p[line, slot]
            improving[self._settled(batch, rows, (a, b), found)] = True
        return improving

    def _settled(self, batch: Batch, rows: Tensor, sides: _Tensors, found: _Tensors) -> Tensor:
        """Decide flagged pairs in float64; where rounding flagged one, its whole kept column. Returns the
        lines that improve."""
        (a, b), (line, u, p) = sides, found
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


def _sides(batch: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
    """a, +inf where not kept, and b, +inf where not pruned; float64."""
    x, kept = batch.x[rows], batch.kept[rows]
    square, linear = x.square() * batch.diagonal, 2 * x * batch.c[rows]
    a, b = square + linear, square - linear
    return torch.where(kept, a, torch.inf), torch.where(kept, torch.inf, b)


def least(values: Float[Tensor, "rows m"], many: int) -> Int[Tensor, "rows many"]:
    """Positions of the least finite values of each row, in no order; ties: the lowest; −1 where there are no
    more."""
    many = min(many, values.shape[1])
    found, position = values.topk(many, dim=1, largest=False, sorted=True)
    # topk leaves open which of the values equal to the last one it takes
    edge = found[:, -1:]
    tied = (values == edge).sum(1) > (found == edge).sum(1)
    if bool((tied & (edge[:, 0] < torch.inf)).any()):
        order = values[tied].sort(dim=1, stable=True)
        found[tied], position[tied] = order.values[:, :many], order.indices[:, :many]
    return position.masked_fill(found == torch.inf, -1)


def distinct(columns: Tensor) -> Tensor:
    """Ascending, every repetition replaced by −1."""
    ordered = columns.sort(1).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(again, -1)
