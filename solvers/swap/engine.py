"""1-swap search by candidate pricing: the whole algorithm, for any kernel, and the state that kernels share.

Notation as in SparseSwaps (arXiv 2512.10922). For one row with weights x, pruned set P, kept set U
and c = G(x ⊙ pruned), exchanging a kept u for a pruned p changes the objective by

    Δ(u, p) = a_u + b_p − 2 x_u x_p G_up,   a_u = x_u²G_uu + 2 x_u c_u,   b_p = x_p²G_pp − 2 x_p c_p.

With a linear part 2gᵀ(x ⊙ pruned) + constant of f, c = G(x ⊙ pruned) + g, and the rest is the same.

The paper scans all |U|·|P| pairs for every single swap. Here, as in column generation, a row works on few
candidates until they hold no improving pair, and only then are all pairs priced:

1. *search*: take as candidates the kept of least a, the pruned of least b and the best pairs that pricing
   harvested; make the best swap among them, again and again; bring c up to date; repeat with fresh
   candidates until they hold no improving pair.
2. *price*: an exact scan over all pairs. None improves: the mask is **proven** 1-swap optimal. Else harvest
   the best partner of every column that has an improving one, and go to 1.

Rows are independent: kernels (torch, Numba, Triton) do the steps on a batch of them. A swap is made only if
its Δ in float64 is below −threshold, and the proof is rigorous (`Kernel.price`).

Rows are scaled by a power of two, which changes no comparison and no tie, so that Σ x_j²G_jj is in
[¼, 1): weights of any size, denormals included, then live in the middle of the floating-point range
and tolerances need no units. Everything that decides a swap is float64; float32 only proposes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskopt.core.clock import clock
from maskopt.core.objective import LinearTerm
from maskopt.core.problem import LayerProblem
from maskopt.protocol.solution import SWAP_TOLERANCE, swap_threshold

#: a swap is made when it gains more than this part of `swap_threshold`. Half of it leaves the proof
#: a margin far above the float64 rounding of Δ, in which no independent check can disagree.
ACCEPT = 0.5
#: float32 arithmetic needs Σ x²G_jj ≈ 1 to come out of factors of ordinary size
_FLOAT32_RANGE = 2.0**60
#: relative error that c may gather by updates before it is computed afresh, in parts of a threshold
DRIFT = 1e-3


@dataclass
class Batch:
    """Rows of one layer in scaled units, and the state of their search.

    All tensors are on the layer's device. Kernels change kept, c, objective and the counts in place.

    Attributes:
        x: float64 weights times a power of two per row.
        gram, diagonal: the layer's G as given (float32 or float64), never copied; float64 G_jj.
        kept: the masks. Swaps stay inside groups of `group` consecutive inputs (n for unstructured patterns).
        c: float64 G(x ⊙ pruned) (+ g).
        objective: float64 f; falls by −Δ with every swap; times `scale`, float64, the true one.
        mass: float64 Σ x_j²G_jj (+ constant).
        swaps, rounds: swaps made, and rounds of candidates.
        scans: exact scans over all pairs, the last one (the proof) included.
        proven: whether the last scan found no improving pair.
        history: the objective at the start and after each round of search, in true units.
        priced: pairs whose Δ an exact scan had to form.
        partner, cross: int32, a column on the other side that made a good pair when last priced, or −1; G
            between the two, in G's dtype.
        single: whether float32 may propose swaps; False for extreme ranges and for float64 G.
        linear: the linear part.
    """

    x: Float[Tensor, "rows n"]
    gram: Float[Tensor, "n n"]
    kept: Bool[Tensor, "rows n"]
    group: int
    c: Float[Tensor, "rows n"]
    objective: Float[Tensor, " rows"]
    mass: Float[Tensor, " rows"]
    scale: Float[Tensor, " rows"]
    swaps: Int[Tensor, " rows"]
    rounds: Int[Tensor, " rows"]
    scans: Int[Tensor, " rows"]
    priced: Int[Tensor, " rows"]
    partner: Int[Tensor, "rows n"]
    cross: Float[Tensor, "rows n"]
    diagonal: Float[Tensor, " n"]
    single: bool
    linear: LinearTerm | None
    proven: Bool[Tensor, " rows"]
    history: list[Float[Tensor, " rows"]] = field(default_factory=list)

    @classmethod
    def of(cls, problem: LayerProblem, kept: Bool[Tensor, "rows n"]) -> Batch:
        """Scale the rows of a layer with legal masks; c and the objective are still to be computed."""
        diagonal = problem.gram.diagonal().double()
        weight = problem.weight.double()
        # a first power of two keeps w² in range, a second one brings Σ x²G_jj to [¼, 1)
        first = _power_of_two(weight.abs().amax(1))
        spread = _power_of_two(diagonal.max()[None])
        x = weight / first[:, None]
        mass = x.square() @ (diagonal / spread)
        second = _power_of_two(mass, 2)
        root = _power_of_two(spread, 2).sqrt()
        x = x / (second.sqrt() * root)[:, None]
        scale = (first * second.sqrt() * root).square()
        mass = x.square() @ diagonal
        linear = None
        if problem.linear is not None:
            correlation = problem.linear.correlation / scale.sqrt()[:, None]
            linear = LinearTerm(correlation, problem.linear.constant / scale)
            mass = mass + linear.constant
        swaps, rounds, scans, priced = torch.zeros(4, len(x), dtype=torch.int64, device=x.device)
        in_range = float(x.abs().max()) < _FLOAT32_RANGE and float(spread) < _FLOAT32_RANGE**2
        return cls(
            x=x,
            gram=problem.gram,
            kept=kept.clone(),
            group=problem.group_size,
            c=torch.zeros_like(x),
            objective=torch.zeros_like(mass),
            mass=mass,
            scale=scale,
            swaps=swaps,
            rounds=rounds,
            scans=scans,
            priced=priced,
            partner=torch.full_like(kept, -1, dtype=torch.int32),
            cross=torch.zeros_like(kept, dtype=problem.gram.dtype),
            diagonal=diagonal,
            single=problem.gram.dtype == torch.float32 and in_range,
            linear=linear,
            proven=swaps < 0,
        )

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def n(self) -> int:
        return self.x.shape[1]

    @cached_property
    def low(self) -> Float[Tensor, "rows n"]:
        """The weights in the dtype that proposes swaps; exact for weights that have no more digits."""
        return self.x.to(torch.float32 if self.single else torch.float64)

    def add_linear(self, rows: Int[Tensor, " some"]) -> None:
        """Add the linear part of f to c and the objective."""
        if self.linear is None:
            return
        part = self.linear.take(rows)
        self.c[rows] += part.correlation
        self.objective[rows] += part.value(torch.where(self.kept[rows], 0.0, self.x[rows]))

    def threshold(self, rows: Int[Tensor, " some"] | slice = slice(None)) -> Float[Tensor, " some"]:
        """Return the least gain of a swap, float64, from the present objective of each row."""
        objective = self.objective[rows].clamp(min=0.0)
        return ACCEPT * swap_threshold(objective, self.mass[rows], SWAP_TOLERANCE)


def _power_of_two(value: Tensor, step: int = 1) -> Tensor:
    """Return the least power of 2**step above each value, exactly; 1 for 0."""
    numbers = value.cpu().numpy()
    exponent = -(-np.frexp(numbers)[1] // step) * step
    return torch.from_numpy(np.where(numbers > 0, np.ldexp(1.0, exponent), 1.0)).to(value.device)


class Kernel(Protocol):
    """The three steps, on some rows of the batch that the kernel is made for."""

    patience: int
    """Rows in one call at most, where a deadline or a listener waits for an answer."""

    def refresh(self, batch: Batch, rows: Int[Tensor, " some"]) -> None:
        """Compute c = G(x ⊙ pruned) (+ g) and f from scratch, in float64."""
        ...

    def search(self, batch: Batch, rows: Int[Tensor, " some"], most: int) -> None:
        """Swap each row until fresh candidates hold no improving pair, or it has `most` swaps in all.

        Keeps kept, c, objective, swaps, rounds current; every swap made has Δ < −threshold in float64.
        """
        ...

    def price(self, batch: Batch, rows: Int[Tensor, " some"]) -> Bool[Tensor, " some"]:
        """Return whether each row has an improving swap; False is a proof that it has none.

        Where float32 is used, a and b enter lowered by more than all rounding can add to a pair:
        |2 x_u x_p G_up| ≤ x_u²G_uu + x_p²G_pp, so a margin of a few 2⁻²⁴·(|a| + x²G_jj) on each
        side covers it. A pair that this flags is decided in float64. The harvest goes to batch.partner: the
        best partner of a column, or −1.
        """
        ...


def refine(
    batch: Batch,
    kernel: Kernel,
    *,
    max_swaps: int | None = None,
    deadline: float = float("inf"),
    progress: Callable[[int], None] | None = None,
) -> None:
    """Swap every row of the batch to a proven 1-swap optimum, in place.

    A row stops early after max_swaps swaps, all rows at the deadline (`clock()`). At the end c and the
    objective of every row are computed from its mask, in float64.
    """
    most = 2**62 if max_swaps is None else max_swaps
    active = torch.arange(batch.rows, device=batch.x.device)
    hurried = deadline < float("inf") or progress is not None

    def parts(rows: Tensor) -> list[Tensor]:
        return list(rows.split(kernel.patience)) if hurried else [rows]

    for rows in parts(active):
        kernel.refresh(batch, rows)
    fresh = batch.swaps.clone()  # swaps at which c was last computed from scratch
    scanned = torch.full_like(batch.swaps, -1)  # swaps at the last scan
    batch.history.append(batch.objective * batch.scale)
    while len(active):
        improving_rows = [active[:0]]
        for rows in parts(active):
            if clock() >= deadline:
                improving_rows = [active[:0]]
                break
            kernel.search(batch, rows, most)
            rows = rows[batch.swaps[rows] < most]
            drifted = rows[_drifted(batch, rows, batch.swaps[rows] - fresh[rows])]
            if len(drifted):
                kernel.refresh(batch, drifted)
                fresh[drifted] = batch.swaps[drifted]
            if not len(rows):
                continue
            improving = kernel.price(batch, rows)
            batch.scans[rows] += 1
            batch.proven[rows[~improving]] = True
            # a swap that a scan proposes and the next search does not make differs by rounding: no proof
            moved = batch.swaps[rows] > scanned[rows]
            scanned[rows] = batch.swaps[rows]
            improving_rows.append(rows[improving & moved])
            if progress is not None:
                progress(int(batch.proven.sum()))
        batch.history.append(batch.objective * batch.scale)
        active = torch.cat(improving_rows)
    for rows in parts((batch.swaps != fresh).nonzero()[:, 0]):
        kernel.refresh(
            batch, rows
        )  # the reported objective is computed from the mask, not by updates
    if progress is not None:
        progress(batch.rows)


def _drifted(batch: Batch, rows: Tensor, updates: Tensor) -> Tensor:
    """Return whether float64 updates of c since it was computed could matter to a decision.

    A swap adds at most about 2⁻⁵²·(√f + 2√mass)·√G_ii to the error of c_i, hence four times that times √mass
    to the error of a Δ.
    """
    root = batch.mass[rows].sqrt()
    error = 4 * 2.0**-52 * updates * (batch.objective[rows].clamp(min=0).sqrt() + 2 * root) * root
    return error > DRIFT * batch.threshold(rows)
