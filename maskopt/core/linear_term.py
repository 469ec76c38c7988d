"""The linear part of an objective: outputs that are off their target whatever is pruned.

A row whose output misses its target by r before anything is pruned, and by r + Σⱼ wⱼpⱼxⱼ afterwards, costs

    f(p) = E[(r + Σⱼ wⱼpⱼxⱼ)²] = (w⊙p)ᵀG(w⊙p) + 2 gᵀ(w⊙p) + c,     g = E[r·x],  c = E[r²].

So it is where a layer of a partly pruned model is to give what it gave in the dense model. [[G, g], [gᵀ, c]]
is itself a Gram matrix, of (x, r): f ≥ 0, and every bound on the quadratic part has its counterpart here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.errors import ProblemError

#: part of c by which f may fall below 0 by the rounding of float32 sums
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class LinearTerm:
    """r of every row, by its moments g = E[r·x], float64 [rows, n], and c = E[r²], float64 [rows]."""

    correlation: Float[Tensor, "rows n"]
    constant: Float[Tensor, " rows"]

    @classmethod
    def of_inputs(
        cls,
        weight: Float[Tensor, "rows n"],
        cross: Float[Tensor, "n n"],
        moved: Float[Tensor, "n n"],
    ) -> LinearTerm:
        """For the target W·x′ of other inputs x′, from E[x(x′ − x)ᵀ] and E[(x′ − x)(x′ − x)ᵀ]."""
        w = weight.double()
        constant = ((w @ moved.double()) * w).sum(1).clamp(min=0.0)
        return cls(w @ cross.double().T, constant)

    def take(self, rows: Tensor | slice | Sequence[int]) -> LinearTerm:
        """Of some rows only."""
        index: Any = list(rows) if isinstance(rows, Sequence) else rows
        return LinearTerm(self.correlation[index], self.constant[index])

    def restrict(self, columns: Tensor) -> LinearTerm:
        """Of some inputs only; the others are kept."""
        return LinearTerm(self.correlation[:, columns].contiguous(), self.constant)

    def value(self, dropped: Float[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
        """2 gᵀ(w⊙p) + c of w⊙p, float64."""
        return 2 * (self.correlation * dropped).sum(1) + self.constant

    def check_moments(self, gram: Float[Tensor, "n n"], ridge: float, label: str) -> None:
        """Raise ProblemError unless [[G + ridge·I, g], [gᵀ, c]] is semidefinite, up to rounding."""
        shifted = gram.double().clone()
        shifted.diagonal().add_(ridge)
        factor, broken = torch.linalg.cholesky_ex(shifted)
        if int(broken):
            return  # a G that was taken on trust; nothing can be said
        solved = torch.linalg.solve_triangular(factor, self.correlation.T, upper=False)
        needed = solved.square().sum(0)
        bad = (needed > self.constant * (1 + _TOLERANCE)).nonzero()
        if len(bad):
            row = int(bad[0])
            raise ProblemError(
                f"{label}linear: the constant of row {row} is {float(self.constant[row]):.6g}, its "
                f"correlation with the inputs needs {float(needed[row]):.6g} at least; they must be "
                "E[r·x] and E[r²] of the same r and the same x as gram"
            )
