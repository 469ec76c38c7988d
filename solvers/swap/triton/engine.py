"""The search on a GPU: rows in lockstep, each step one launch for all rows that need it.

Candidate pricing as in `maskopt.solvers.swap`, shaped for the device:

1. *Search.* From c, price every column; take the K kept of least a and the K pruned of least b;
   `swap_block` makes the best swaps among them; c moves by the columns that changed, in float64.
2. *Scan*, for rows whose candidates hold no improving pair. All pairs, in float32, pessimistically
   rounded: no pair found is a proof, and the row is done. Otherwise the best pairs found, one for
   each of the best kept columns, are the next candidates.
3. A row whose found pairs turn out not to improve (rounding decides) is scanned in float64 instead.

For N:M with small groups all pairs are few, so every step is a scan and the best groups are the
candidates. Importing this module needs the package `triton`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskopt.solvers.swap.batch import Batch
from maskopt.solvers.swap.literal import refresh
from maskopt.solvers.swap.triton import launch

#: candidate columns of a block: half of them kept, half pruned
WIDTH = 64
#: bytes that a step takes per row and column, for temporaries
_STEP_BYTES = 128
#: the largest N:M group that `launch.scan_groups` takes
_SMALL_GROUP = 32


def refine(
    batch: Batch,
    *,
    max_swaps: int | None,
    deadline: float,
    memory: int,
    progress: Callable[[int], None],
    width: int = WIDTH,
    tiled: bool = False,
    trace: dict[str, Any] | None = None,
) -> Bool[Tensor, " rows"]:
    """Swap every row to 1-swap optimality; returns bool [rows], whether it is proven.

    A row stops early at max_swaps, all rows at the deadline (time.monotonic).

    Args:
        width: candidates of a block, a power of two from 16 to 128.
        tiled: scan tile of G by tile of G instead of by each row's surviving pairs.
        trace: filled with the seconds of each stage (this waits for the device between stages),
            the full scans of each row and the total error after each round.
    """
    search = _Search(batch, max_swaps, memory, width, tiled, trace)
    with search.stage("correlation"):
        refresh(batch, search.index, memory)
    with search.stage("reach of G"):
        search.prepare()
    while time.monotonic() < deadline and search.step():
        progress(int(search.done.sum()))
    if trace is not None:
        trace["full_scans"] = search.scans.cpu()
    return search.proven


class _Search:
    """Where every row stands: searching, waiting for a scan, or done."""

    def __init__(
        self,
        batch: Batch,
        max_swaps: int | None,
        memory: int,
        width: int,
        tiled: bool,
        trace: dict[str, Any] | None,
    ) -> None:
        device = batch.x.device
        self.batch = batch
        self.max_swaps = max_swaps
        self.width = width
        self.tiled = tiled
        self.trace = trace
        self.index = torch.arange(batch.rows, device=device)
        self.proven = torch.zeros(batch.rows, dtype=torch.bool, device=device)
        self.full = torch.zeros_like(self.proven)
        """Stopped by max_swaps."""
        self.waiting = torch.zeros_like(self.proven)
        """For a full scan."""
        self.double = torch.full_like(self.proven, not batch.single)
        """Float32 is not good enough for this row any more."""
        self.scans = torch.zeros(batch.rows, dtype=torch.int64, device=device)
        self.chunk = max(1, memory // (_STEP_BYTES * batch.n))
        self.group = batch.group if batch.group < batch.n else None
        self.small = batch.group <= _SMALL_GROUP

    def prepare(self) -> None:
        """What is computed once for a Gram matrix."""
        self.reach = launch.Reach.of(self.batch.gram)
        if self.small:
            size, n = self.batch.group, self.batch.n
            columns = torch.arange(n, device=self.index.device).view(-1, size)
            self.blocks = self.batch.gram[columns[:, :, None], columns[:, None, :]]

    @property
    def done(self) -> Bool[Tensor, " rows"]:
        return self.proven | self.full

    def step(self) -> bool:
        """One launch for every row that searches, else for every row that waits. False: all done."""
        if self.max_swaps is not None:
            self.full = self.batch.swaps >= self.max_swaps
        idle = self.done
        searching = ~idle & ~self.waiting
        if self.small:
            act, rows = self._swap_groups, ~idle
        elif bool(searching.any()):
            act, rows = self._search, searching
        else:
            act, rows = self._scan, ~idle
        busy = False
        for double in (False, True):
            chosen = (rows & (self.double == double)).nonzero()[:, 0]
            for part in chosen.split(self.chunk):
                if len(part):
                    act(part, torch.float64 if double else torch.float32)
                    busy = True
        if busy and self.trace is not None:
            self.trace.setdefault("error", []).append(self._error())
        return busy

    def _search(self, rows: Int[Tensor, " some"], dtype: torch.dtype) -> None:
        with self.stage("candidates"):
            x, c, kept, a, b = self._terms(rows)
            half = self.width // 2
            columns = torch.cat([_least(a, half), _least(b, half)], 1)
            columns = columns.sort(1).values.to(torch.int32)
        made = self._swap(rows, x, c, kept, columns, dtype)
        self.waiting[rows[made == 0]] = True

    def _scan(self, rows: Int[Tensor, " some"], dtype: torch.dtype) -> None:
        with self.stage("scan"):
            x, c, kept, a, b = self._terms(rows)
            narrow = x.to(dtype)
            e = self.reach.e(x, dtype)
            a, b = (launch.pessimistic(side, e, dtype) for side in (a, b))
            limit = self.batch.threshold(rows)
            value, partner = launch.scan(
                self.batch.gram, narrow, a, b, self.reach, limit, group=self.group, tiled=self.tiled
            )
            self.scans[rows] += 1
            open_rows = (value < torch.inf).any(1)
            self.proven[rows[~open_rows]] = True
            keep = open_rows.nonzero()[:, 0]
            if not len(keep):
                return
            if partner is None:
                a, b, narrow = a[keep], b[keep], narrow[keep]
            rows, x, c, kept, value = rows[keep], x[keep], c[keep], kept[keep], value[keep]
            best = _least(value, self.width // 2)
            if partner is None:
                mates = launch.partners(self.batch.gram, narrow, a, b, best)
            else:
                mates = partner[keep].gather(1, best.clamp(min=0)).masked_fill(best < 0, -1)
            columns = _distinct(torch.cat([best.to(torch.int32), mates], 1))
        made = self._swap(rows, x, c, kept, columns, dtype)
        self._settle(rows, made, dtype)
        self.waiting[rows[made > 0]] = False

    def _swap_groups(self, rows: Int[Tensor, " some"], dtype: torch.dtype) -> None:
        with self.stage("scan"):
            x, c, kept, a, b = self._terms(rows)
            narrow = x.to(dtype)
            e = self.reach.e(x, dtype)
            a, b = (launch.pessimistic(side, e, dtype) for side in (a, b))
            value, _, _ = launch.scan_groups(self.blocks, narrow, a, b)
            self.scans[rows] += 1
            size = self.batch.group
            limit = self.batch.threshold(rows).to(dtype)
            value = torch.where(value < -limit[:, None], value, torch.inf)
            open_rows = (value < torch.inf).any(1)
            self.proven[rows[~open_rows]] = True
            keep = open_rows.nonzero()[:, 0]
            if not len(keep):
                return
            rows, x, c, kept, value = rows[keep], x[keep], c[keep], kept[keep], value[keep]
            groups = _least(value, self.width // size).sort(1).values
            inside = torch.arange(size, device=groups.device)
            columns = torch.where(groups[..., None] < 0, -1, groups[..., None] * size + inside)
            columns = torch.nn.functional.pad(columns.flatten(1), (0, self.width), value=-1)
            columns = columns[:, : self.width].to(torch.int32)
        made = self._swap(rows, x, c, kept, columns, dtype)
        self._settle(rows, made, dtype)

    def _settle(self, rows: Int[Tensor, " some"], made: Tensor, dtype: torch.dtype) -> None:
        """Pairs that a scan promised and that did not improve: float64, and there they prove it."""
        stuck = rows[made == 0]
        if dtype == torch.float64:
            self.proven[stuck] = True
        else:
            self.double[stuck] = True

    def _terms(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        batch = self.batch
        x, c, kept = batch.x[rows], batch.c[rows], batch.kept[rows]
        return x, c, kept, *launch.linear_terms(x, batch.diagonal, c, kept)

    def _swap(
        self,
        rows: Int[Tensor, " some"],
        x: Float[Tensor, "some n"],
        c: Float[Tensor, "some n"],
        kept: Bool[Tensor, "some n"],
        columns: Int[Tensor, "some N"],
        dtype: torch.dtype,
    ) -> Int[Tensor, " some"]:
        """Swap among the candidates, and bring kept, c, objective and counts up to date."""
        batch = self.batch
        with self.stage("swaps"):
            room = None
            if self.max_swaps is not None:
                room = self.max_swaps - batch.swaps[rows]
            _, made, after = launch.swap_block(
                batch.gram,
                x.to(dtype),
                c,
                kept,
                columns,
                batch.threshold(rows),
                group=self.group,
                room=room,
            )
        with self.stage("update"):
            live = columns >= 0
            at = columns.clamp(min=0).long()
            change = x.gather(1, at) * (kept.gather(1, at).double() - after.double())
            change.masked_fill_(~live, 0.0)
            launch.move_correlation(batch.gram, c, columns, change)
            line, slot = live.nonzero(as_tuple=True)
            kept[line, at[line, slot]] = after[line, slot]
            batch.kept[rows], batch.c[rows] = kept, c
            batch.swaps[rows] += made
            batch.objective[rows] = (c * x).masked_fill_(kept, 0.0).sum(1)
        return made

    def _error(self) -> float:
        return float((self.batch.objective * self.batch.scale).sum())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that passes inside to a stage, if there is a trace to write it into."""
        if self.trace is None:
            yield
            return
        began = self._now()
        yield
        stages = self.trace.setdefault("stages", {})
        stages[name] = stages.get(name, 0.0) + self._now() - began

    def _now(self) -> float:
        if self.batch.x.is_cuda:
            torch.cuda.synchronize(self.batch.x.device)
        return time.perf_counter()


def _least(values: Float[Tensor, "rows m"], many: int) -> Int[Tensor, "rows many"]:
    """Positions of the least finite values of each row, in no order; −1 where there are no more.

    Which of several equal values is taken is made definite by the position: the lowest.
    """
    many = min(many, values.shape[1])
    found, position = values.topk(many, dim=1, largest=False, sorted=True)
    # topk leaves open which of the values equal to the last one it takes
    edge = found[:, -1:]
    tied = (values == edge).sum(1) > (found == edge).sum(1)
    if bool((tied & (edge[:, 0] < torch.inf)).any()):
        order = values[tied].sort(dim=1, stable=True)
        found[tied], position[tied] = order.values[:, :many], order.indices[:, :many]
    return position.masked_fill(found == torch.inf, -1)


def _distinct(columns: Int[Tensor, "rows N"]) -> Int[Tensor, "rows N"]:
    """Ascending, every repetition replaced by −1."""
    ordered = columns.sort(1).values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(repeated, -1)
