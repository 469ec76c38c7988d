"""Any quadratic objective as the cost of a mask, and back.

min or max pᵀUp + constant over p ∈ {0,1}ⁿ with s ones is mask selection with w = 1 and G = ±U + shift·I, the
shift making G semidefinite: since 1ᵀp = s, it changes f by shift·s on every legal mask.

Where all Q_ii and 2Q_ij are whole, exchanging one pruned input for another changes f = pᵀQp by Q_ii − Q_jj
and by twices of entries off the diagonal. So f lies on offset + step·ℤ with offset = s·Q_11 and step the
greatest common divisor of all Q_ii − Q_11 and 2Q_ij: 2 where Q_ij is 1 for the edges of a graph. A lower
bound holds up to the next of these values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from maskopt.errors import ProblemError

#: whole numbers below it, and their sums, are exact in float64
MOST_WHOLE = 2.0**52
#: entries from which every float64 is a whole number, whatever its objective means
MOST_EXACT_ENTRY = 2.0**53
#: inputs up to which a matrix that is read is decided in whole numbers, within a second; larger ones are
#: shifted where float64 leaves a doubt
MOST_EXACT_READ = 64
#: part of the entries that shifting may round off, of the least that count
_LOST = 1e-6

Real = TypeVar("Real", float, Fraction)


@dataclass(frozen=True)
class ObjectiveTransform:
    """value = sign·(f − shift·s) + constant, s entries of a row being pruned.

    Attributes:
        sign: 1 where the value is minimised, −1 where it is maximized.
        integral: weights, Gᵢᵢ and 2Gᵢⱼ are whole, so that a bound holds up to the next whole value of f.

    Raises:
        ProblemError: another sign, or numbers that are not finite.
    """

    sign: int = 1
    shift: float = 0.0
    constant: float = 0.0
    integral: bool = False

    def __post_init__(self) -> None:
        try:
            sound = self.sign in (-1, 1) and math.isfinite(self.shift + self.constant)
            sound &= isinstance(self.integral, bool)
        except (TypeError, OverflowError):
            sound = False
        if not sound:
            raise ProblemError(f"{self} describes no units")

    def value(self, cost: float, pruned: int) -> float:
        """Convert an objective f, or a bound of it, to the original units."""
        return self.sign * (cost - self.shift * pruned) + self.constant

    def zero(self, pruned: int) -> float:
        """Return the objective f whose value is 0."""
        return self.shift * pruned - self.sign * self.constant


class OriginalValues(NamedTuple):
    """The value of a mask in the original units, a bound of it and their gap.

    No legal mask has a better value than the bound. The gap is a part of the value, 0 where they are equal.
    """

    value: float
    bound: float
    gap: float

    @classmethod
    def of(cls, value: float, bound: float) -> OriginalValues:
        if value == bound:
            return cls(value, bound, 0.0)
        return cls(value, bound, abs(value - bound) / abs(value) if value else math.inf)


def semidefinite(
    quadratic: Any, maximize: bool, constant: float
) -> tuple[np.ndarray, ObjectiveTransform]:
    """Return G [n, n] float64 and the units of its costs.

    ProblemError for no square matrix of finite numbers, or sizes that float64 does not hold together.
    """
    u = _real(quadratic, "a quadratic objective")
    number = _real(constant, "the constant")
    if number.size != 1:
        raise ProblemError(f"the constant is one number, not {list(number.shape)}")
    constant = float(number.item())
    if u.ndim != 2 or u.shape[0] != u.shape[1] or not u.size:
        raise ProblemError(f"a quadratic objective is [n, n], not {list(u.shape)}")
    if not np.isfinite(u).all() or not np.isfinite(constant):
        raise ProblemError("a quadratic objective must be finite")
    sign = -1 if maximize else 1
    with np.errstate(over="ignore", invalid="ignore"):
        gram = sign * (u + u.T) / 2
        largest_sum = 2 * np.abs(gram).sum()
    if not np.isfinite(largest_sum):
        raise ProblemError("a quadratic objective must have sums within float64; scale it down")
    whole = bool(np.abs(gram).max() < MOST_EXACT_ENTRY and _is_whole_quadratic(gram))
    if whole:
        shift = _whole_shift(gram, constant)
    else:
        least, size = float(np.linalg.eigvalsh(gram)[0]), float(np.abs(gram).sum(1).max())
        shift = -least + 1e-12 * size if least < 0 else 0.0
        _check_shift(gram, shift)
    gram = gram + shift * np.eye(len(gram))
    return gram, ObjectiveTransform(sign, shift, float(constant), whole)


def _is_whole_quadratic(gram: np.ndarray) -> bool:
    """Return whether all Gᵢᵢ and 2Gᵢⱼ are whole numbers."""
    twice = 2 * gram
    return bool((twice == twice.round()).all() and (twice.diagonal() % 2 == 0).all())


def _whole_shift(gram: np.ndarray, constant: float) -> float:
    """Return a whole number ≥ 0 that makes G + shift·I semidefinite for certain.

    Raises:
        ProblemError: sums of the shifted matrix are not exact in float64.
    """
    n = len(gram)
    shift = 0.0
    while True:
        sums = float(np.abs(gram).sum()) + 2 * n * shift + abs(constant)
        if sums >= MOST_WHOLE:
            raise ProblemError(
                f"a quadratic objective of whole numbers whose sums reach {sums:.3g}: beyond 2⁵² they are "
                "not exact; divide by a common factor, or scale penalties down to what they need"
            )
        shifted = gram + shift * np.eye(n)
        if surely_semidefinite(shifted, MOST_EXACT_READ):
            return shift
        least = float(np.linalg.eigvalsh(shifted)[0])
        shift += max(1.0, math.ceil(-least + _rounding_of_pivots(shifted)))


def _rounding_of_pivots(gram: np.ndarray) -> float:
    """Return c such that G ⪰ 0 if float64 Cholesky of G − c·I succeeds (Rump, BIT 46, 2006)."""
    return 4 * (len(gram) + 2) * 2.0**-53 * float(np.abs(gram.diagonal()).sum())


def surely_semidefinite(gram: np.ndarray, most_exact: int) -> bool:
    """Decide without tolerance whether a symmetric matrix of whole Gᵢᵢ and 2Gᵢⱼ is positive semidefinite.

    `gram` is [n, n] float64. Diagonal dominance, or a Cholesky factorisation with a margin for its rounding,
    shows it for most matrices. The others are decided in whole numbers where n ≤ `most_exact`; beyond, the
    answer is False.
    """
    diagonal = gram.diagonal()
    if diagonal.min() < 0:
        return False
    others = np.abs(gram).sum(1) - np.abs(diagonal)
    exact_sums = float(np.abs(gram).sum()) < MOST_WHOLE
    if exact_sums and (diagonal >= others).all():
        return True
    try:
        np.linalg.cholesky(gram - _rounding_of_pivots(gram) * np.eye(len(gram)))
    except np.linalg.LinAlgError:
        pass
    else:
        return True
    least = float(np.linalg.eigvalsh(gram)[0])
    if least < -1e-10 * float(np.abs(gram).sum()) or len(gram) > most_exact:
        return False
    return exactly_semidefinite(
        np.array([Fraction(x) for x in gram.ravel().tolist()]).reshape(gram.shape)
    )


def exactly_semidefinite(matrix: np.ndarray) -> bool:
    """Decide whether a symmetric object array of Fractions is positive semidefinite.

    Bareiss' fraction-free elimination (Math. Comp. 22, 1968): all pivots are ≥ 0, and the column of a
    pivot 0 is 0.
    """
    scale = math.lcm(*(x.denominator for x in matrix.ravel())) if matrix.size else 1
    remaining = np.array([int(x * scale) for x in matrix.ravel()], dtype=object).reshape(
        matrix.shape
    )
    previous = 1
    while len(remaining):
        pivot, column, minor = remaining[0, 0], remaining[1:, 0], remaining[1:, 1:]
        if pivot < 0 or (pivot == 0 and column.any()):
            return False
        if pivot:
            minor, previous = (minor * pivot - np.outer(column, column)) // previous, pivot
        remaining = minor
    return True


def _check_shift(gram: np.ndarray, shift: float) -> None:
    """Raise ProblemError where the shift rounds off the diagonal, or a tenth of the other entries."""
    for entries, share in ((gram.diagonal(), 1.0), (gram[np.triu_indices(len(gram), 1)], 0.1)):
        sizes = np.abs(entries[entries != 0])
        if len(sizes) and 2.0**-52 * shift > _LOST * (least := float(np.quantile(sizes, share))):
            raise ProblemError(
                f"a quadratic objective with entries of {least:.3g} that float64 cannot hold next to its "
                f"largest (a shift of {shift:.3g}); scale penalties down to what they need, set to 0 what "
                "is but rounding"
            )


def _real(values: Any, what: str) -> np.ndarray:
    """Return the values as a float64 array."""
    try:
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            values = values.numpy() if values.is_complex() else values.double().numpy()
        array = np.asarray(values)
        if array.dtype.kind in "biufO" and array.size:
            return array.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ProblemError(f"{what} must hold real numbers within float64")


@dataclass(frozen=True)
class Values:
    """The numbers offset + step·k for all whole k; step 0: the offset alone."""

    offset: int
    step: int

    def at_least(self, bound: Real) -> Real:
        """Return the least value that is not below a bound, exact for a Fraction; else the bound itself."""
        if not abs(bound) < MOST_WHOLE or (not self.step and bound > self.offset):
            return bound
        # each operation is monotone: rounding never moves the bound past a value
        steps = math.ceil((bound - self.offset) / self.step) if self.step else 0
        return type(bound)(self.offset + self.step * steps)


def values_of(q: Float[Tensor, "n n"], pruned: int) -> Values:
    """Return the values of f for Q with whole Q_ii and 2Q_ij, and s pruned inputs."""
    twice = (2 * q.cpu().numpy()).astype(np.int64)
    diagonal = twice.diagonal() // 2
    step = np.gcd.reduce(twice[np.triu_indices(len(twice), 1)], initial=0)
    step = np.gcd.reduce(diagonal - diagonal[0], initial=int(step))
    return Values(pruned * int(diagonal[0]), abs(int(step)))
