"""The steps of 1-swap search on a GPU: rows in lockstep, one launch for all rows that need it.

- *Search.* The first candidates are the pairs that pricing harvested; after that, from c, the K kept of least
  a and the K pruned of least b. `launch.swap_block` makes the best swaps among them in float32, c moves by
  the columns that changed, in float64, and the objective follows. A block whose objective in float64 did not
  fall is undone and searched in float64.
- *Price.* A scan over all pairs, in float32, pessimistically rounded: finding no pair is a proof. A found
  pair is decided in float64; where none improves, the row is scanned in float64.

For N:M with groups of up to 32 every step scans all pairs, and the best groups are the candidates. Importing
this module needs the package `triton`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from maskopt.solvers.swap import literal
from maskopt.solvers.swap.engine import Batch
from maskopt.solvers.swap.torch_kernel import Reach, distinct, least
from maskopt.solvers.swap.triton import launch

#: candidate columns of a block, a power of two from 16 to 128: half of them kept, half pruned
WIDTH = 64
#: bytes that a step takes per row and column, for temporaries
_STEP_BYTES = 128
#: the largest N:M group that `launch.scan_groups` takes
_SMALL_GROUP = 32
#: a pair counts as improving from this multiple of the threshold on, so that pricing and search,
#: which round differently in float64, never contradict each other
_CLEARLY = 1.0 + 1e-6


class TritonKernel:
    """The three steps on a GPU; `memory`: bytes for temporaries."""

    #: rows in one call at most, where a deadline or a listener waits: a GPU wants them all
    patience = 2**31

    def __init__(self, batch: Batch, *, memory: int) -> None:
        self._memory = memory
        self._chunk = max(1, memory // (_STEP_BYTES * batch.n))
        self._proposing = torch.float32 if batch.single else torch.float64
        self._small = batch.group <= _SMALL_GROUP
        shape = (batch.rows, WIDTH)
        self._harvest = torch.full(shape, -1, dtype=torch.int32, device=batch.x.device)
        self._reach = Reach.of(batch.gram, single=batch.single)
        if self._small:
            columns = torch.arange(batch.n, device=batch.x.device).view(-1, batch.group)
            self._blocks = batch.gram[columns[:, :, None], columns[:, None, :]]

    def refresh(self, batch: Batch, rows: Int[Tensor, " some"]) -> None:
        """Compute c and f from scratch; see `Kernel.refresh`."""
        with _device(batch):
            for part in rows.split(self._chunk):
                literal.refresh(batch, part, self._memory)

    def search(self, batch: Batch, rows: Int[Tensor, " some"], most: int) -> None:
        """Swap each row until fresh candidates hold no improving pair, or it has `most` swaps."""
        with _device(batch):
            rows = rows[batch.swaps[rows] < most]
            while len(rows):
                made = [self._round(batch, part, most) for part in rows.split(self._chunk)]
                rows = rows[(torch.cat(made) > 0) & (batch.swaps[rows] < most)]

    def price(self, batch: Batch, rows: Int[Tensor, " some"]) -> Bool[Tensor, " some"]:
        """Return whether each row has an improving swap; False is a proof that it has none."""
        with _device(batch):
            parts = [self._price(batch, part, self._proposing) for part in rows.split(self._chunk)]
        return torch.cat(parts)

    def _round(self, batch: Batch, rows: Int[Tensor, " some"], most: int) -> Tensor:
        """Swap among one block of candidates for each row, and return the swaps made."""
        columns = self._harvest[rows]
        harvested = (columns >= 0).any(1)
        bare = (~harvested).nonzero()[:, 0]
        if len(bare):
            columns[bare] = self._candidates(batch, rows[bare])
        self._harvest[rows] = -1
        batch.rounds[rows] += 1
        made, undone = self._swap(batch, rows, columns, self._proposing, most)
        again = undone | (harvested & (made == 0))
        if self._proposing == torch.float32 and bool(again.any()):
            made[again], _ = self._swap(batch, rows[again], columns[again], torch.float64, most)
        return made

    def _candidates(self, batch: Batch, rows: Int[Tensor, " some"]) -> Int[Tensor, "some N"]:
        state = batch.x, batch.c, batch.kept, batch.diagonal, self._reach
        a, b, _ = launch.column_terms(*state, self._proposing, rows, lowered=False)
        if self._small:
            x = batch.x[rows].to(self._proposing)
            return self._columns_of_groups(batch, launch.scan_groups(self._blocks, x, a, b)[0])
        half = WIDTH // 2
        columns = torch.cat([least(a, half), least(b, half)], 1).sort(1).values
        return self._padded(columns)

    def _columns_of_groups(self, batch: Batch, value: Tensor) -> Int[Tensor, "rows N"]:
        """Return all columns of the groups of least value."""
        groups = least(value, WIDTH // batch.group).sort(1).values
        inside = torch.arange(batch.group, device=groups.device)
        columns = groups[..., None] * batch.group + inside
        return self._padded(torch.where(groups[..., None] < 0, -1, columns).flatten(1))

    def _padded(self, columns: Tensor) -> Int[Tensor, "rows N"]:
        missing = WIDTH - columns.shape[1]
        return torch.nn.functional.pad(columns.to(torch.int32), (0, missing), value=-1)

    def _swap(
        self,
        batch: Batch,
        rows: Int[Tensor, " some"],
        columns: Int[Tensor, "some N"],
        dtype: torch.dtype,
        most: int,
    ) -> tuple[Int[Tensor, " some"], Bool[Tensor, " some"]]:
        """Swap among the candidates; kept, c, objective and counts follow.

        Returns the swaps made, and whether a block was undone because its objective did not fall.
        """
        threshold = batch.threshold(rows)
        state = batch.gram, batch.x, batch.c, batch.kept, columns, threshold, rows
        room = (most - batch.swaps[rows]).clamp(max=2 * WIDTH)
        made, after = launch.swap_block(*state, group=batch.group, room=room, dtype=dtype)
        at = columns.clamp(min=0).long()
        line = rows[:, None]
        change = batch.x[line, at] * (batch.kept[line, at].double() - after.double())
        change.masked_fill_(columns < 0, 0.0)
        # v → v + d moves f = vᵀGv by dᵀ(c before + c after)
        before = batch.c[line, at]
        launch.move_correlation(batch.gram, batch.c, columns, change, rows)
        step = (change * (before + batch.c[line, at])).sum(1)
        undone = (made > 0) & ~(step < -0.5 * threshold)
        back = undone.nonzero()[:, 0]
        if len(back):
            launch.move_correlation(batch.gram, batch.c, columns[back], -change[back], rows[back])
        made = made.masked_fill(undone, 0)
        flip = (columns >= 0) & (made > 0)[:, None]
        batch.kept[line.expand_as(at)[flip], at[flip]] = after[flip]
        batch.objective[rows] += torch.where(made > 0, step, 0.0)
        batch.swaps[rows] += made
        return made, undone

    def _price(
        self, batch: Batch, rows: Int[Tensor, " some"], dtype: torch.dtype
    ) -> Bool[Tensor, " some"]:
        threshold = batch.threshold(rows)
        x = batch.x[rows].to(dtype)
        state = batch.x, batch.c, batch.kept, batch.diagonal, self._reach
        a, b, e = launch.column_terms(*state, dtype, rows, lowered=True)
        if self._small:
            value, u, p = launch.scan_groups(self._blocks, x, a, b)
            value = torch.where(value < -threshold[:, None], value, torch.inf)
            columns = self._columns_of_groups(batch, value)
        else:
            terms = x, a, b, e, self._reach, threshold
            value, partner, pairs = launch.scan(batch.gram, *terms, batch.group)
            batch.priced[rows] += pairs
            u = least(value, WIDTH // 2)
            value = value.gather(1, u.clamp(min=0)).masked_fill(u < 0, torch.inf)
            p = partner.gather(1, u.clamp(min=0))
            columns = self._padded(distinct(torch.cat([u, p.masked_fill(u < 0, -1)], 1)))
        flagged = (value < torch.inf).any(1)
        # Δ of the flagged pairs, in float64
        line, u, p = rows[:, None], u.clamp(min=0).long(), p.clamp(min=0).long()
        x_u, x_p = batch.x[line, u], batch.x[line, p]
        delta = x_u * (x_u * batch.diagonal[u] + 2 * batch.c[line, u])
        delta += x_p * (x_p * batch.diagonal[p] - 2 * batch.c[line, p])
        delta -= 2 * x_u * x_p * batch.gram[u, p].double()
        delta.masked_fill_(value == torch.inf, torch.inf)
        sure = (delta < -_CLEARLY * threshold[:, None]).any(1)
        self._harvest[rows] = torch.where(sure[:, None], columns, -1)
        doubtful = (flagged & ~sure).nonzero()[:, 0]
        if dtype == torch.float32 and len(doubtful):
            sure[doubtful] = self._price(batch, rows[doubtful], torch.float64)
        return sure


def _device(batch: Batch) -> AbstractContextManager[object]:
    """Return a context in which Triton, which launches on the current device, uses the problem's."""
    return torch.cuda.device(batch.x.device) if batch.x.is_cuda else nullcontext()
