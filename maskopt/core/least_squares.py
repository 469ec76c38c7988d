"""Least squares for the weights that a mask keeps, which give the objective F (see `maskopt.core.problem`).

For a row with the kept set S, of all v that are zero outside S the best is

    v_S = A_SS⁻¹ b_S,     v = argmin (w−v)ᵀA(w−v) + 2gᵀ(w−v) + c,     A = G + λD,  b = Aw + g.

The damping λD keeps v near w where the calibration inputs say little.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskopt.core.inputs import range_scale
from maskopt.core.limits import Limits
from maskopt.core.threads import fast_products, one_thread_each
from maskopt.errors import OptionError, ProblemError

#: least damping: below it float64 could not tell one kept set from another where G is singular
LEAST_DAMPING = 1e-6
#: bytes of gathered matrices that one thread works on, usually and at most, and rows that share a pass over A
_TILE_BYTES, _MOST_BYTES, _TILE_ROWS = 2**25, 2**26, 16
#: size below which LAPACK factorises
_LEAF = 32
#: relative residual in float64 at which a row is done, and steps of refinement in which it must be
_DONE, _REFINEMENTS = 1e-10, 12


@dataclass(frozen=True)
class LeastSquaresUpdate:
    """The objective F: the kept weights are updated by least squares.

    With μ the mean of G's diagonal, D has μ (Gⱼⱼ/μ)^power on its diagonal: ridge regression on the inputs at
    power 0, on inputs scaled to one size at 1. OptionError: a value out of range.

    Attributes:
        damping: λ, at least 0; every input has LEAST_DAMPING·μ at least.
        power: 0 to 1.
    """

    damping: float = 0.01
    power: float = 0.0

    def __post_init__(self) -> None:
        ranges = ("damping", sys.float_info.max, "at least 0"), ("power", 1, "0 to 1")
        for name, most, words in ranges:
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not number or not 0 <= float(value) <= most:
                raise OptionError(f"`{name}` must be {words}, not {value!r}")
            object.__setattr__(self, name, float(value))


@dataclass(frozen=True, eq=False)
class LeastSquares:
    """The damped metric A = G + λD that the rows of a layer share.

    Attributes:
        gram: G in its dtype.
        ridge: the diagonal of λD, float64, in the units of G; 0 where G is 0.
    """

    gram: Float[Tensor, "n n"]
    ridge: Float[Tensor, " n"]

    @classmethod
    def of(cls, gram: Float[Tensor, "n n"], update: LeastSquaresUpdate) -> LeastSquares:
        diagonal = gram.diagonal().double()
        mean = diagonal.mean()
        # by rounding an entry may be below 0; 0/0 where G is 0
        parts = (diagonal / mean).nan_to_num().clamp(min=0.0) ** update.power
        ridge = update.damping * mean * parts
        return cls(gram, ridge.clamp(min=LEAST_DAMPING * mean))

    @cached_property
    def flat(self) -> bool:
        """Whether G is 0, so that every mask costs the same."""
        return not bool(self.ridge.any())

    @property
    def _added(self) -> Float[Tensor, " n"]:
        return torch.ones_like(self.ridge) if self.flat else self.ridge

    @cached_property
    def damped(self) -> Float[Tensor, "n n"]:
        """A in float64; the identity where G is 0."""
        exact = self.gram.double().clone()
        exact.diagonal().add_(self._added)
        return exact

    @cached_property
    def factor(self) -> Float[Tensor, "n n"]:
        """The lower Cholesky factor of A, float64."""
        return torch.linalg.cholesky(self.damped)

    @cached_property
    def inverse(self) -> Float[Tensor, "n n"]:
        """H = A⁻¹, float64."""
        return torch.cholesky_inverse(self.factor)

    def check(self, label: str) -> None:
        """Raise ProblemError where G + λD/2 is not definite: G has a negative eigenvalue by rounding."""
        nearer = self.damped.clone()
        nearer.diagonal().sub_(self._added / 2)
        if int(torch.linalg.cholesky_ex(nearer).info):
            raise ProblemError(
                f"{label}gram is not safely positive definite with damping, of {float(self.ridge.min()):.3g} "
                "and more on its diagonal, so kept weights "
                "cannot be updated; take a larger damping (0.01), or accumulate gram in float64"
            )

    def target(
        self, weight: Float[Tensor, "rows n"], correlation: Float[Tensor, "rows n"]
    ) -> Float[Tensor, "rows n"]:
        """Compute b = Aw + g, float64."""
        return weight.double() @ self.damped + correlation

    def solve(
        self,
        target: Float[Tensor, "rows n"],
        mask: Bool[Tensor, "rows n"],
        limits: Limits | None = None,
    ) -> Float[Tensor, "rows n"]:
        """Solve for v of every row, float64, zero where the mask prunes.

        Each A_SS is factorised (Cholesky, k³/3 operations for k kept): in float32 with refinement in float64
        where G is float32 and that converges, else in float64.
        """
        rows, n = mask.shape
        sizes = ((mask.sum(1) + _LEAF - 1) // _LEAF * _LEAF).clamp(max=n)
        most_kept = int(sizes.max())
        limits = limits or Limits()
        threads = (limits.threads or torch.get_num_threads()) if mask.device.type == "cpu" else 1
        row_bytes = 2 * self.gram.element_size() * max(most_kept, 1) ** 2 + 64 * n
        most = limits.bytes(threads * _MOST_BYTES) // threads // row_bytes
        tile = max(1, min(max(_TILE_BYTES // row_bytes, _TILE_ROWS), most, rows))
        equal = [(sizes == size).nonzero()[:, 0] for size in sizes.unique()]
        parts = [part for rows in equal for part in rows.split(tile)]
        _ = self.damped  # made once, not by every thread
        thread = threading.local()

        def solve_part(part: int) -> Tensor:
            if not hasattr(thread, "pages"):
                thread.pages = _Pages(tile, most_kept, n)
            rows = parts[part]
            kept, wanted = _Kept.of(mask[rows], int(sizes[rows[0]])), target[rows]
            weight, residual = self._refined(wanted, kept, self.gram.dtype, thread.pages)
            poor = (~(residual <= _DONE)).nonzero()[:, 0]
            if len(poor) and self.gram.dtype != torch.float64:
                again = self._refined(wanted[poor], kept.take(poor), torch.float64, thread.pages)
                weight[poor] = again[0]
            return weight

        with fast_products():
            weight = torch.cat(one_thread_each(solve_part, len(parts), threads))
        return torch.empty_like(weight).index_copy_(0, torch.cat(parts), weight)

    def settled(
        self, weight: Float[Tensor, "rows n"], target: Float[Tensor, "rows n"], mask: Tensor
    ) -> Float[Tensor, "rows n"]:
        """Solve again for the rows whose ‖b − Av‖/‖b‖ of the kept inputs is not small enough."""
        residual = target - weight @ self.damped
        wanted, residual = (torch.where(mask, x, 0.0) for x in (target, residual))
        poor = (~(_relative(residual, wanted) <= _DONE)).nonzero()[:, 0]
        if len(poor):
            weight = weight.index_copy(0, poor, self.solve(target[poor], mask[poor]))
        return weight

    def _refined(
        self, target: Tensor, kept: _Kept, dtype: torch.dtype, pages: _Pages
    ) -> tuple[Tensor, Tensor]:
        """Solve by factors in this dtype and refine in float64.

        Returns the weights and their relative residuals, ∞ where a factorisation breaks down.
        """
        wanted = kept.of_rows(target)
        factor = self._factor(kept, dtype, pages)
        full = torch.zeros_like(target)
        best, least = full.clone(), torch.full_like(target[:, 0], torch.inf)
        residual = wanted
        for _ in range(_REFINEMENTS):
            step = _substituted(factor, residual.to(dtype)).double()
            full = full.scatter_add(1, kept.index, step)
            residual = wanted - kept.of_rows(full @ self.damped)
            size = _relative(residual, wanted).nan_to_num(nan=torch.inf)
            better = size < least
            best = torch.where(better[:, None], full, best)
            least = torch.where(better, size, least)
            if not bool((better & (size > _DONE)).any()):
                break
        return best, least

    def _factor(self, kept: _Kept, dtype: torch.dtype, pages: _Pages) -> Tensor:
        """Factorise A_SS (Cholesky): [rows, k, k], padded by the identity; NaN where it is not definite."""
        source = self.damped if dtype == torch.float64 else self.gram
        matrix, lines = pages.of(kept.index, source)
        for row, (inputs, count) in enumerate(zip(kept.index, kept.counts, strict=True)):
            torch.index_select(source, 0, inputs, out=lines)
            torch.index_select(lines, 1, inputs, out=matrix[row])
            matrix[row, count:] = 0  # below the diagonal: nothing else is read
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        if source is self.gram:
            diagonal.add_(self._added.to(matrix.dtype)[kept.index])
        diagonal.masked_fill_(~kept.real, 1)
        broken = ~_factorise(matrix)
        if bool(broken.any()):
            matrix.masked_fill_(broken[:, None, None], torch.nan)
        return matrix


@dataclass(frozen=True, eq=False)
class _Kept:
    """The kept inputs of some rows, padded with pruned ones to one size, and their counts."""

    index: Tensor
    real: Bool[Tensor, "rows k"]
    counts: list[int]

    @classmethod
    def of(cls, mask: Bool[Tensor, "rows n"], size: int) -> _Kept:
        index = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]
        return cls(index, mask.gather(1, index), mask.sum(1).tolist())

    def take(self, rows: Tensor) -> _Kept:
        return _Kept(self.index[rows], self.real[rows], [self.counts[row] for row in rows.tolist()])

    def of_rows(self, x: Float[Tensor, "rows n"]) -> Float[Tensor, "rows k"]:
        """Gather the kept entries of x; 0 for the padding."""
        return x.gather(1, self.index).masked_fill_(~self.real, 0)


def _relative(residual: Float[Tensor, "rows k"], wanted: Float[Tensor, "rows k"]) -> Tensor:
    """Compute ‖residual‖/‖wanted‖ of every row, scaled by a power of two so that squares are in range."""
    if not wanted.shape[1]:
        return wanted.new_zeros(len(wanted))
    size = range_scale(wanted)[:, None]
    return (residual * size).norm(dim=1) / (wanted * size).norm(dim=1).clamp(min=1e-300)


def _factorise(matrix: Float[Tensor, "rows k k"]) -> Bool[Tensor, " rows"]:
    """Replace matrices by their lower Cholesky factors, by halves: mostly products, which are fast.

    Returns False where a matrix is not definite.
    """
    size = matrix.shape[1]
    if size <= _LEAF:
        factor, broken = torch.linalg.cholesky_ex(matrix)
        matrix.copy_(factor)
        return broken == 0
    half = size // 2
    upper, lower, below = matrix[:, :half, :half], matrix[:, half:, half:], matrix[:, half:, :half]
    definite = _factorise(upper)
    _divide(below, upper)
    lower.baddbmm_(below, below.mT, alpha=-1)
    return definite & _factorise(lower)


def _divide(x: Float[Tensor, "rows m k"], factor: Float[Tensor, "rows k k"]) -> None:
    """Replace x by x L⁻ᵀ, likewise by halves."""
    size = factor.shape[1]
    if size <= _LEAF:
        x.copy_(torch.linalg.solve_triangular(factor, x.mT, upper=False).mT)
        return
    half = size // 2
    left, right = x[:, :, :half], x[:, :, half:]
    _divide(left, factor[:, :half, :half])
    right.baddbmm_(left, factor[:, half:, :half].mT, alpha=-1)
    _divide(right, factor[:, half:, half:])


def _substituted(factor: Float[Tensor, "rows k k"], right: Float[Tensor, "rows k"]) -> Tensor:
    """Solve LLᵀx = b."""
    middle = torch.linalg.solve_triangular(factor, right[..., None], upper=False)
    return torch.linalg.solve_triangular(factor.mT, middle, upper=True)[..., 0]


class _Pages:
    """Memory that one thread gathers its rows in, tile after tile: fresh pages cost more than the work."""

    def __init__(self, tile: int, kept: int, n: int) -> None:
        self._sizes = tile * kept * kept, kept * n
        self._made: dict[torch.dtype, list[Tensor]] = {}

    def of(self, index: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """Return views [rows, k, k] and [k, n] in the dtype of the source, for `index` [rows, k]."""
        if source.dtype not in self._made:
            self._made[source.dtype] = [source.new_empty(size) for size in self._sizes]
        matrix, lines = self._made[source.dtype]
        rows, kept = index.shape
        n = source.shape[1]
        return matrix[: rows * kept * kept].view(rows, kept, kept), lines[: kept * n].view(kept, n)
