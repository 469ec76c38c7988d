"""1-swap search by candidate pricing: the whole algorithm, for any kernel.

The paper scans all |U|·|P| pairs for every single swap. Here, as in column generation, a row works on few
candidates until they hold no improving pair, and only then are all pairs priced:

1. *search*: take as candidates the kept of least a, the pruned of least b and the best pairs that pricing
   harvested; make the best swap among them, again and again; bring c up to date; repeat with fresh
   candidates until they hold no improving pair.
2. *price*: an exact scan over all pairs. None improves: the mask is **proven** 1-swap optimal. Else harvest
   the best partner of every column that has an improving one, and go to 1.

Rows are independent: kernels (torch, Numba, Triton) do the steps on a batch of them. A swap is made only if
its Δ in float64 is below −threshold, and the proof is rigorous (`Kernel.price`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskopt.core.limits import clock
from maskopt.solvers.swap.batch import Batch

#: relative error that c may gather by updates before it is computed afresh, in parts of a threshold
DRIFT = 1e-3


class Kernel(Protocol):
    """The three steps, on some rows of a batch. A kernel is made for one layer."""

    name: str
    patience: int
    """Rows in one call at most, where a deadline or a listener waits for an answer."""
    single: bool
    """Whether it proposes in float32 (`Batch.single`)."""

    def refresh(self, batch: Batch, rows: Int[Tensor, " some"]) -> None:
        """c = G(x ⊙ pruned) and its quadratic form from scratch, in float64."""
        ...

    def search(self, batch: Batch, rows: Int[Tensor, " some"], most: int) -> None:
        """Step 1 for each row: swap until fresh candidates hold no improving pair, or it has `most` swaps in
        all. Keeps kept, c, objective, swaps, rounds current; every swap made has Δ < −threshold in float64.
        """
        ...

    def price(self, batch: Batch, rows: Int[Tensor, " some"]) -> Bool[Tensor, " some"]:
        """Step 2: whether a row has an improving swap; False is a proof that it has none.

        Where float32 is used, a and b enter lowered by more than all rounding can add to a pair:
        |2 x_u x_p G_up| ≤ x_u²G_uu + x_p²G_pp, so a margin of a few 2⁻²⁴·(|a| + x²G_jj) on each
        side covers it. A pair that this flags is decided in float64.
        Writes the harvest to batch.partner: the best partner of a column, or −1.
        """
        ...


@dataclass
class Outcome:
    """What happened to the rows of a batch."""

    proven: Bool[Tensor, " rows"]
    scans: Int[Tensor, " rows"]
    """Exact scans over all pairs, the last one (the proof) included."""
    objectives: list[Float[Tensor, " rows"]] = field(default_factory=list)
    """The objective at the start and after each round of search, in true units."""


def refine(
    batch: Batch,
    kernel: Kernel,
    *,
    max_swaps: int | None = None,
    deadline: float = float("inf"),
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Swap every row of the batch to a proven 1-swap optimum, in place.

    A row stops early after max_swaps swaps, all rows at the deadline (`clock()`). At the end c and the
    objective of every row are computed from its mask, in float64.
    """
    most = 2**62 if max_swaps is None else max_swaps
    active = torch.arange(batch.rows, device=batch.x.device)
    outcome = Outcome(proven=active < 0, scans=torch.zeros_like(batch.swaps))
    hurried = deadline < float("inf") or progress is not None

    def parts(rows: Tensor) -> list[Tensor]:
        return list(rows.split(kernel.patience)) if hurried else [rows]

    def refresh(rows: Tensor) -> None:
        kernel.refresh(batch, rows)
        batch.add_linear(rows)

    for rows in parts(active):
        refresh(rows)
    fresh = batch.swaps.clone()  # swaps at which c was last computed from scratch
    scanned = torch.full_like(batch.swaps, -1)  # swaps at the last scan
    outcome.objectives.append(batch.objective * batch.scale)
    while len(active):
        left: list[Tensor] = []
        for rows in parts(active):
            if clock() >= deadline:
                left = []
                break
            kernel.search(batch, rows, most)
            rows = rows[batch.swaps[rows] < most]
            drifted = rows[_drifted(batch, rows, batch.swaps[rows] - fresh[rows])]
            if len(drifted):
                refresh(drifted)
                fresh[drifted] = batch.swaps[drifted]
            if not len(rows):
                continue
            improving = kernel.price(batch, rows)
            outcome.scans[rows] += 1
            outcome.proven[rows[~improving]] = True
            # what a scan finds and the search that follows does not make differs by rounding: no proof
            moved = batch.swaps[rows] > scanned[rows]
            scanned[rows] = batch.swaps[rows]
            left.append(rows[improving & moved])
            if progress is not None:
                progress(int(outcome.proven.sum()))
        outcome.objectives.append(batch.objective * batch.scale)
        active = torch.cat(left) if left else active[:0]
    for rows in parts((batch.swaps != fresh).nonzero()[:, 0]):
        refresh(rows)  # what is reported is computed from the mask, not from updates
    if progress is not None:
        progress(batch.rows)
    return outcome


def _drifted(batch: Batch, rows: Tensor, updates: Tensor) -> Tensor:
    """Whether float64 updates of c since it was computed could matter to a decision: a swap adds at most
    about 2⁻⁵²·(√f + 2√mass)·√G_ii to the error of c_i, hence four times that times √mass to the error of a Δ.
    """
    root = batch.mass[rows].sqrt()
    error = 4 * 2.0**-52 * updates * (batch.objective[rows].clamp(min=0).sqrt() + 2 * root) * root
    return error > DRIFT * batch.threshold(rows)
