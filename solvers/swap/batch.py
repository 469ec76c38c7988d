"""The state of a batch of rows under 1-swap search, shared by every kernel.

Notation as in SparseSwaps (arXiv 2512.10922). For one row with weights x, pruned set P, kept set U
and c = G(x ⊙ pruned), exchanging a kept u for a pruned p changes the objective by

    Δ(u, p) = a_u + b_p − 2 x_u x_p G_up,   a_u = x_u²G_uu + 2 x_u c_u,   b_p = x_p²G_pp − 2 x_p c_p.

With a linear part 2gᵀ(x ⊙ pruned) + constant of f, c = G(x ⊙ pruned) + g, and the rest is the same.

Rows are scaled by a power of two, which changes no comparison and no tie, so that Σ x_j²G_jj is in
[¼, 1): weights of any size, denormals included, then live in the middle of the floating-point range
and tolerances need no units. Everything that decides a swap is float64; float32 only proposes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskopt.core.objective import LinearTerm
from maskopt.core.problem import LayerProblem
from maskopt.protocol.solution import SWAP_TOLERANCE, swap_threshold

#: a swap is made when it gains more than this part of `swap_threshold`. Half of it leaves the proof
#: a margin far above the float64 rounding of Δ, in which no independent check can disagree.
ACCEPT = 0.5
#: float32 arithmetic needs Σ x²G_jj ≈ 1 to come out of factors of ordinary size
_FLOAT32_RANGE = 2.0**60


@dataclass
class Batch:
    """Rows of one layer, and where each of them stands. All tensors are on the layer's device; kernels change
    kept, c, objective and the counts in place. Units are scaled.

    Attributes:
        x: float64 weights times a power of two per row.
        gram, diagonal: the layer's G as given (float32 or float64), never copied; float64 G_jj.
        kept: the masks. Swaps stay inside groups of `group` consecutive inputs (n for unstructured patterns).
        c: float64 G(x ⊙ pruned) (+ g).
        objective: float64 f; falls by −Δ with every swap; times `scale`, float64, the true one.
        mass: float64 Σ x_j²G_jj (+ constant).
        swaps, rounds: swaps made, and rounds of candidates.
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
    priced: Int[Tensor, " rows"]
    partner: Int[Tensor, "rows n"]
    cross: Float[Tensor, "rows n"]
    diagonal: Float[Tensor, " n"]
    single: bool
    linear: LinearTerm | None
    _low: Tensor | None = None

    @classmethod
    def of(cls, problem: LayerProblem, kept: Bool[Tensor, "rows n"]) -> Batch:
        """Scaled rows with the given legal masks; c and objective still to be computed."""
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
        zeros = torch.zeros_like(mass)
        none = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        in_range = float(x.abs().max()) < _FLOAT32_RANGE and float(spread) < _FLOAT32_RANGE**2
        return cls(
            x=x,
            gram=problem.gram,
            kept=kept.clone(),
            group=problem.group_size,
            c=torch.zeros_like(x),
            objective=zeros,
            mass=mass,
            scale=scale,
            swaps=none,
            rounds=none.clone(),
            priced=none.clone(),
            partner=torch.full_like(kept, -1, dtype=torch.int32),
            cross=torch.zeros_like(kept, dtype=problem.gram.dtype),
            diagonal=diagonal,
            single=problem.gram.dtype == torch.float32 and in_range,
            linear=linear,
        )

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def n(self) -> int:
        return self.x.shape[1]

    def proposing(self, dtype: torch.dtype) -> Float[Tensor, "rows n"]:
        """x in the dtype that proposes swaps; exact for weights that have no more digits."""
        if self._low is None or self._low.dtype != dtype:
            self._low = self.x.to(dtype)
        return self._low

    def add_linear(self, rows: Int[Tensor, " some"]) -> None:
        """Bring c and the objective from those of the quadratic part to those of f."""
        if self.linear is None:
            return
        part = self.linear.take(rows)
        self.c[rows] += part.correlation
        self.objective[rows] += part.value(torch.where(self.kept[rows], 0.0, self.x[rows]))

    def result(self) -> Batch:
        """The batch without its large arrays: what is wanted of it when it is done."""
        # new tensors: a view of no columns would hold on to all of them
        empty, none = self.c.new_empty(self.rows, 0), self.partner.new_empty(self.rows, 0)
        return replace(self, x=empty, c=empty, cross=empty, partner=none, linear=None, _low=None)

    def threshold(self, rows: Int[Tensor, " some"] | slice = slice(None)) -> Float[Tensor, " some"]:
        """A swap is made when Δ < −threshold: float64, from the row's present objective."""
        objective = self.objective[rows].clamp(min=0.0)
        return ACCEPT * swap_threshold(objective, self.mass[rows], SWAP_TOLERANCE)


def _power_of_two(value: Tensor, step: int = 1) -> Tensor:
    """The least power of 2**step that is above the value; 1 for 0. Exact."""
    numbers = value.cpu().numpy()
    exponent = -(-np.frexp(numbers)[1] // step) * step
    return torch.from_numpy(np.where(numbers > 0, np.ldexp(1.0, exponent), 1.0)).to(value.device)


def by_count(kept: Bool[Tensor, "rows n"]) -> list[Int[Tensor, " some"]]:
    """Places of the rows that keep as many each; without a shared budget all in one."""
    counts = kept.sum(1)
    return [(counts == count).nonzero()[:, 0] for count in counts.unique()]
