"""The objectives f and F: the cost of the masks of a layer's rows.

For a row with weights w [n] and the Gram matrix G [n, n] of the layer's inputs (the mean of xxᵀ
over calibration tokens), a mask that prunes the set p ∈ {0,1}ⁿ changes the row's output by a mean
squared

    f(p) = (w⊙p)ᵀ G (w⊙p)                                          (SparseSwaps, arXiv 2512.10922)

A row whose output misses its target by r before anything is pruned, and by r + Σⱼ wⱼpⱼxⱼ afterwards, has a
linear term:

    f(p) = E[(r + Σⱼ wⱼpⱼxⱼ)²] = (w⊙p)ᵀG(w⊙p) + 2 gᵀ(w⊙p) + c,     g = E[r·x],  c = E[r²].

This is the case where a layer of a partly pruned model has the outputs of the dense model as its target.
[[G, g], [gᵀ, c]] is itself a Gram matrix, of (x, r): f ≥ 0, and every bound on the quadratic part has its
counterpart for f.

With `update` the cost of a mask is that after least squares for the weights that it keeps: with P the pruned
set, A = G + λD (see `LeastSquaresUpdate`) and H = A⁻¹,

    F(p) = min over v, zero on P, of (w−v)ᵀA(w−v) [+ 2 gᵀ(w−v) + c]  =  w_Pᵀ (H_PP)⁻¹ w_P

the last without a linear term: the Optimal Brain Surgeon's price of a whole set (Hassibi and Stork, NeurIPS
1992). F is at most f in the same metric A.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskopt.core.inputs import PSD_TOLERANCE, as_mask, of_shape
from maskopt.core.least_squares import LeastSquares, LeastSquaresUpdate
from maskopt.core.limits import Limits
from maskopt.core.pattern import Counts
from maskopt.core.units import ObjectiveTransform
from maskopt.errors import ProblemError

#: part of c by which f may fall below 0 by the rounding of float32 sums
_TOLERANCE = 1e-4
#: bytes of the columns of G that are brought to float64 at a time
_BLOCK_BYTES = 64 * 2**20
#: relative error of updated weights that a solve in float64 may leave
_SOLVED = 1e-8


@dataclass(frozen=True)
class LinearTerm:
    """The moments of r of every row: g = E[r·x], float64 [rows, n], and c = E[r²], float64 [rows].

    For the target W·x′ of other inputs x′, r = W(x′ − x): g = W·E[(x′ − x)xᵀ], c = diag(W·E[(x′ − x)(x′ −
    x)ᵀ]·Wᵀ).
    """

    correlation: Float[Tensor, "rows n"]
    constant: Float[Tensor, " rows"]

    def checked(self, weight: Float[Tensor, "rows n"], label: str) -> LinearTerm:
        """Return both in float64 on the device of the weight; ProblemError where they do not fit it."""
        label = f"{label}linear: "
        correlation = of_shape(self.correlation, tuple(weight.shape), f"{label}correlation")
        constant = of_shape(self.constant, (len(weight),), f"{label}constant")
        if bool((constant < 0).any()):
            raise ProblemError(f"{label}the constant is a mean of squares, and not below 0")
        device = weight.device
        return LinearTerm(correlation.to(device, torch.float64), constant.to(device, torch.float64))

    def take(self, rows: Tensor | slice | list[int]) -> LinearTerm:
        """Select rows."""
        return LinearTerm(self.correlation[rows], self.constant[rows])

    def restrict(self, columns: Tensor) -> LinearTerm:
        """Select inputs, the others being kept."""
        return LinearTerm(self.correlation[:, columns].contiguous(), self.constant)

    def value(self, dropped: Float[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
        """Compute 2 gᵀ(w⊙p) + c from w⊙p, float64."""
        return 2 * (self.correlation * dropped).sum(1) + self.constant

    def check_moments(self, gram: Float[Tensor, "n n"], label: str) -> None:
        """Raise ProblemError unless [[G, g], [gᵀ, c]] is semidefinite, up to rounding."""
        shifted = gram.double().clone()
        shifted.diagonal().add_(PSD_TOLERANCE * float(shifted.trace()) or 1.0)
        factor, broken = torch.linalg.cholesky_ex(shifted)
        if int(broken):
            return  # a G that was taken on trust: no factor decides
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


class Objective(Counts):
    """The cost of every row: f, or F with `update`. Its attributes are those of `LayerProblem`."""

    gram: Float[Tensor, "n n"]
    linear: LinearTerm | None
    update: LeastSquaresUpdate | None
    units: ObjectiveTransform | None
    _squares: LeastSquares | None

    @property
    def integral(self) -> bool:
        """Whether f of every mask is a whole number."""
        return self.units is not None and self.units.integral

    @property
    def correlation(self) -> Float[Tensor, "rows n"]:
        """The vector g of the linear term, float64; 0 without one."""
        if self.linear is None:
            return torch.zeros((), dtype=torch.float64, device=self.device).expand(
                self.rows, self.n
            )
        return self.linear.correlation

    @property
    def constant(self) -> Float[Tensor, " rows"]:
        """The constant c of the linear term, float64; 0 without one."""
        if self.linear is None:
            return torch.zeros(self.rows, dtype=torch.float64, device=self.device)
        return self.linear.constant

    @property
    def least_squares(self) -> LeastSquares:
        """The metric A, which the rows share; ProblemError without `update`."""
        if self.update is None:
            raise ProblemError(
                "the problem keeps its weights; give it update=LeastSquaresUpdate(damping)"
            )
        if self._squares is None:
            self._squares = LeastSquares.of(self.gram, self.update)
        return self._squares

    @property
    def ridge(self) -> Float[Tensor, " n"]:
        """The diagonal of λD in A = G + λD, float64; 0 for unchanged weights."""
        if self.update is None:
            return torch.zeros(self.n, dtype=torch.float64, device=self.device)
        return self.least_squares.ridge

    def objective(self, mask: Bool[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
        """Compute f of every row, or F with `update`, float64 [rows], ≥ 0, for a mask (True = kept)."""
        return self.cost(self.weights(mask))

    def weights(
        self, mask: Bool[Tensor, "rows n"], limits: Limits | None = None
    ) -> Float[Tensor, "rows n"]:
        """Return the weights under a mask, float64, zero where it prunes.

        They are w⊙m, or with `update` those of least squares, unless rounding makes them worse than w⊙m.
        """
        mask = as_mask(mask, self.weight)
        unchanged = torch.where(mask, self.weight.double(), 0.0)
        if self.update is None:
            return unchanged
        squares = self.least_squares
        updated = squares.solve(squares.target(self.weight, self.correlation), mask, limits)
        better = self.cost(updated) <= self.cost(unchanged)
        return torch.where(better[:, None], updated, unchanged)

    def cost(self, weight: Float[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
        """Compute the cost of weights v, float64 [rows]: `error`, or with `update` that in the metric A."""
        if self.update is None:
            return self.error(weight)
        lost, squares = self.weight.double() - weight, self.least_squares
        value = ((lost @ squares.damped) * lost).sum(1)
        if squares.flat:
            value.zero_()  # G is 0, and A is not
        return self._with_linear(value, lost).clamp_(min=0.0)

    def error(self, weight: Float[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
        """Compute f of weights v, float64 [rows]: the mean square of each output's distance to its target."""
        lost = self.weight.double() - weight.to(self.device).double()
        return self._with_linear(self._form(lost), lost).clamp_(min=0.0)

    def output_energy(self) -> Float[Tensor, " rows"]:
        """Compute the mean square of every row's target, float64 [rows], by products in G's dtype."""
        weight = self.weight.to(self.gram.dtype)
        energy = ((weight @ self.gram) * weight).sum(1, dtype=torch.float64)
        return self._with_linear(energy, self.weight.double()).clamp_(min=0.0)

    def diagonal_mass(self) -> Float[Tensor, " rows"]:
        """Compute Σⱼ wⱼ²Aⱼⱼ + c of every row, float64: the scale of rounding."""
        return self.weight.double().square() @ (self.gram.diagonal() + self.ridge) + self.constant

    def rounding(self, weight: Float[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
        """Bound the rounding error of the cost of weights v [rows, n] in float64, float64 [rows].

        γ (Σᵢⱼ |xᵢAᵢⱼxⱼ| + 2|x|ᵀ|g| + c) with x = w − v and γ = 4(n + 8)·2⁻⁵³ covers sums and products in any
        order (Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.1); n·2⁻¹⁰⁷⁴(1 + Σ|xᵢ|)
        covers underflow. Only terms of the sum count: for v = w⊙m the pruned weights.
        """

        def size(lost: Tensor) -> Tensor:
            """Sum the absolute values of all terms of the cost."""
            linear = 2 * (self.correlation.abs() * lost).sum(1) + self.constant
            return self._form(lost, torch.abs) + linear + lost.square() @ self.ridge

        lost = (self.weight.double() - weight).abs()
        bound = 4 * (self.n + 8) * 2.0**-53 * size(lost)
        if self.update is not None:  # the solution is the minimum of F, so its error counts squared
            bound += _SOLVED**2 * size(self.weight.double().abs())
        # sizes beyond float64 excuse nothing
        return bound.nan_to_num(posinf=0.0) + self.n * 2.0**-1074 * (1 + lost.sum(1))

    def _form(
        self, x: Float[Tensor, "rows n"], of: Callable[[Tensor], Tensor] = lambda gram: gram
    ) -> Float[Tensor, " rows"]:
        """Compute xᵀGx of every row, or with a function of G's entries in place of G."""
        value = torch.zeros(self.rows, dtype=torch.float64, device=self.device)
        step = max(1, _BLOCK_BYTES // (8 * self.n))
        for start in range(0, self.n, step):
            block = slice(start, start + step)
            value += ((x @ of(self.gram[:, block].double())) * x[:, block]).sum(1)
        return value

    def products(self, x: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """Compute xG of every row in float64, with a block of G's columns at a time."""
        step = max(1, _BLOCK_BYTES // (8 * self.n))
        return torch.cat([x @ block.double() for block in self.gram.split(step, 1)], 1)

    def _with_linear(
        self, value: Float[Tensor, " rows"], lost: Float[Tensor, "rows n"]
    ) -> Float[Tensor, " rows"]:
        return value + (2 * (self.correlation * lost).sum(1) + self.constant)
