"""Patterns of sparsity: the masks that are allowed.

Both patterns are one idea: a row of n inputs is cut into n/g groups of g consecutive inputs, and
exactly k entries of every group are pruned. Unstructured sparsity is the case of a single group. With
`per="layer"` the count is that of the whole layer: a shared budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Rational, Real
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskopt.errors import PatternError

#: parts of a pattern as text
_KEEP, _PER_LAYER, _WITHIN = "keep ", " per layer", " ± "
#: largest denominator of a sparsity: two floats above such a fraction differ by < 1 / (it · 10⁹ entries)
_LARGEST_DENOMINATOR = 10**6


@dataclass(frozen=True)
class Unstructured:
    """Equal sparsity per row: ⌊sparsity·n⌋ entries of each row pruned, or `keep` entries kept.

    With `per="layer"` ⌊sparsity·rows·n⌋ of the layer are pruned, or rows·`keep` kept, in whichever rows; with
    a `max_deviation` no row's sparsity differs by more than that from the layer's.

    Sparsities are decimal numbers: 0.29 prunes 29 of 100, where the binary 0.29·100 is 28.999…;
    `Fraction(1, 3)` prunes 4 of 12, where the float 0.3333333333333333 prunes 3.
    """

    sparsity: float | None = None
    keep: int | None = None
    per: Literal["row", "layer"] = "row"
    max_deviation: float | None = None

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.keep is None):
            raise PatternError(
                "Unstructured takes either sparsity=… or keep=…, exactly one of them"
            )
        if self.sparsity is not None:
            share = _share(self.sparsity, "sparsity", "0.6 prunes 60% of every row")
            object.__setattr__(self, "sparsity", share)
        elif not _is_count(self.keep) or int(self.keep or 0) < 0:
            raise PatternError(f"keep must be a whole number of at least 0, not {self.keep!r}")
        else:
            object.__setattr__(self, "keep", int(self.keep or 0))
        if self.per not in ("row", "layer"):
            raise PatternError(f"per must be one of: row, layer; not {self.per!r}")
        if self.max_deviation is not None:
            if not self.shared_budget:
                raise PatternError("max_deviation=… needs per='layer'")
            share = _share(self.max_deviation, "max_deviation", "0.1 keeps rows within 10% of n")
            object.__setattr__(self, "max_deviation", share)

    @property
    def shared_budget(self) -> bool:
        """Whether only the layer has a count: its rows share a budget."""
        return self.per == "layer"

    def uniform(self) -> Unstructured:
        """Return the same sparsity with an equal count in every row."""
        return replace(self, per="row", max_deviation=None)

    def check(self, n: int) -> None:
        """Raise PatternError where the pattern does not fit rows of n inputs."""
        if n < 1:
            raise PatternError("a row needs at least one input")
        if self.keep is not None and self.keep > n:
            raise PatternError(f"keep={self.keep} is more than the {n} inputs of a row")

    def group_size(self, n: int) -> int:
        """Return n: the whole row is one group."""
        return n

    def pruned_per_group(self, n: int) -> int:
        """Count the pruned entries of a row; PatternError for a shared budget, which fixes no such count."""
        self.check(n)
        if self.shared_budget:
            raise PatternError(f"at {self} a row has no count of its own; the layer has")
        return self._part_of(n)

    def pruned_in(self, rows: int, n: int) -> int:
        """Count the entries of a layer that are pruned."""
        if not self.shared_budget:
            return rows * self.pruned_per_group(n)
        return self._part_of(rows * n) if self.keep is None else rows * (n - self.keep)

    def row_limits(self, rows: int, n: int) -> tuple[int, int]:
        """Return the least and the most that a row prunes; equal counts are always within."""
        if not self.shared_budget:
            pruned = self.pruned_per_group(n)
            return pruned, pruned
        if self.max_deviation is None:
            return 0, n
        total, reach = self.pruned_in(rows, n), as_written(self.max_deviation) * n
        mean = Fraction(total, rows)
        least, most = math.ceil(mean - reach), math.floor(mean + reach)
        return max(0, min(least, math.floor(mean))), min(n, max(most, math.ceil(mean)))

    def _part_of(self, entries: int) -> int:
        if self.keep is not None:
            return entries - self.keep
        return math.floor(as_written(self.sparsity or 0.0) * entries)

    def is_legal(self, mask: Bool[Tensor, "rows n"]) -> Bool[Tensor, " rows"]:
        """Decide for each row; with a shared budget none is legal where the layer has another count."""
        if not self.shared_budget:
            return _is_legal(self, mask)
        pruned = (~mask).sum(1)
        least, most = self.row_limits(*mask.shape)
        total_fits = int(pruned.sum()) == self.pruned_in(*mask.shape)
        return (pruned >= least) & (pruned <= most) & total_fits

    def __str__(self) -> str:
        share = f"{_KEEP}{self.keep}" if self.keep is not None else _shortly(self.sparsity or 0.0)
        within = "" if self.max_deviation is None else f"{_WITHIN}{_shortly(self.max_deviation)}"
        return f"{share}{_PER_LAYER if self.shared_budget else ''}{within}"


@dataclass(frozen=True)
class NM:
    """N:M sparsity: `keep` of every `of` consecutive inputs are kept (2:4 is keep=2, of=4)."""

    keep: int
    of: int
    #: no shared budgets
    shared_budget: ClassVar[bool] = False
    max_deviation: ClassVar[None] = None

    def __post_init__(self) -> None:
        for value in (self.keep, self.of):
            if not _is_count(value):
                raise PatternError(f"N:M takes whole numbers, not {value!r}")
        object.__setattr__(self, "keep", int(self.keep))
        object.__setattr__(self, "of", int(self.of))
        if self.of < 1 or not 0 <= self.keep <= self.of:
            raise PatternError(
                f"keep {self.keep} of every {self.of} is impossible; 2:4 is NM(keep=2, of=4)"
            )

    def uniform(self) -> NM:
        """Return the pattern, whose rows have equal counts."""
        return self

    def row_limits(self, rows: int, n: int) -> tuple[int, int]:
        """Return the count of every row as the least and the most that it prunes."""
        pruned = self.pruned_in(1, n)
        return pruned, pruned

    def check(self, n: int) -> None:
        """Raise PatternError where n is not a whole number of groups."""
        if n < 1:
            raise PatternError("a row needs at least one input")
        if n % self.of:
            raise PatternError(
                f"{n} inputs do not divide into groups of {self.of}; "
                f"choose an M that divides {n}, or leave this layer out"
            )

    def group_size(self, n: int) -> int:
        """Return M."""
        self.check(n)
        return self.of

    def pruned_per_group(self, n: int) -> int:
        """Return M − N."""
        self.check(n)
        return self.of - self.keep

    def pruned_in(self, rows: int, n: int) -> int:
        """Count the entries of a layer that are pruned."""
        return rows * (n // self.of) * self.pruned_per_group(n)

    def is_legal(self, mask: Bool[Tensor, "rows n"]) -> Bool[Tensor, " rows"]:
        """Decide for each row."""
        return _is_legal(self, mask)

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


Pattern = Unstructured | NM


def parse_sparsity(sparsity: Pattern | float | str) -> Pattern:
    """Parse `0.6`, `"0.6"` or `"60%"` to Unstructured(sparsity=0.6), `"2:4"` to NM(keep=2, of=4).

    The text of a pattern is parsed too: `"keep 3"`, `"0.6 per layer ± 0.1"`. PatternError for anything else.
    """
    if isinstance(sparsity, Pattern):
        return sparsity
    if not isinstance(sparsity, str):
        return Unstructured(sparsity=sparsity)
    share, limited, within = sparsity.strip().partition(_WITHIN)
    per: Literal["row", "layer"] = "layer" if share.endswith(_PER_LAYER) else "row"
    share = share.removesuffix(_PER_LAYER)
    try:
        max_deviation = float(within) if limited else None
        if share.startswith(_KEEP):
            return Unstructured(
                keep=int(share.removeprefix(_KEEP)), per=per, max_deviation=max_deviation
            )
        if ":" in share and per == "row" and not limited:
            keep, of = share.split(":")
            return NM(keep=int(keep), of=int(of))
        number = Decimal(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
        return Unstructured(sparsity=float(number), per=per, max_deviation=max_deviation)
    except PatternError:
        raise
    except (ValueError, ArithmeticError):
        raise PatternError(f"`sparsity` must be like 0.6, 60% or 2:4, not {sparsity!r}") from None


def _is_count(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _share(number: Any, what: str, example: str) -> float:
    """Return a share as a float that stands for the decimal number as written: 0.6 for NumPy's float32 0.6.

    A fraction such as 1/3 becomes the next float above, which prunes as much of every layer. PatternError
    where no float does, or out of range.
    """
    finite = number.is_finite() if isinstance(number, Decimal) else isinstance(number, Real)
    if not (finite and 0 <= number < 1):
        raise PatternError(f"{what} {number} is outside [0, 1); {example}")
    if not isinstance(number, Decimal | Rational):
        return float(str(number) if isinstance(number, np.floating) else number)
    exact = Fraction(number)
    share = float(exact)
    if as_written(share) != exact and exact.denominator > _LARGEST_DENOMINATOR:
        raise PatternError(f"{number} has too many digits for a share; write 15 of them, or keep=…")
    return math.nextafter(share, 1.0) if as_written(share) < exact else share


def _shortly(number: float) -> str:
    """Write a number with four digits if that is exact, else with all."""
    return f"{number:.4g}" if float(f"{number:.4g}") == number else repr(number)


def as_written(number: float) -> Fraction:
    """Return the decimal number that a float is written as."""
    return Fraction(repr(float(number)))


def _is_legal(pattern: Pattern, mask: Tensor) -> Tensor:
    rows, n = mask.shape
    group, pruned = pattern.group_size(n), pattern.pruned_per_group(n)
    groups = mask.reshape(rows, n // group, group)
    # NumPy on the CPU: torch would wake its threads, which then spin and slow down those of a solver
    on_cpu = mask.device.type == "cpu"
    counts = torch.from_numpy(groups.numpy().sum(-1)) if on_cpu else groups.sum(-1)
    return (counts == group - pruned).all(-1)


class Counts:
    """The counts of a pattern for a layer. Its attributes are those of `LayerProblem`."""

    weight: Float[Tensor, "rows n"]
    pattern: Pattern
    omega: Float[Tensor, " rows"] | None

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def n(self) -> int:
        """Number of inputs."""
        return self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def group_size(self) -> int:
        return self.pattern.group_size(self.n)

    @property
    def pruned_per_group(self) -> int:
        return self.pattern.pruned_per_group(self.n)

    @property
    def shared_budget(self) -> bool:
        """Whether the rows share a budget: only the layer has a count."""
        return self.pattern.shared_budget

    @property
    def rows_per_budget(self) -> int:
        """Rows that have one count together: all with a shared budget, else 1."""
        return self.rows if self.shared_budget else 1

    @property
    def pruned(self) -> int:
        """Entries of the layer that are pruned."""
        return self.pattern.pruned_in(self.rows, self.n)

    @property
    def row_limits(self) -> tuple[int, int]:
        """The least and the most entries that a row may prune."""
        return self.pattern.row_limits(self.rows, self.n)

    @property
    def one_mask(self) -> bool:
        """Whether every row has a single legal mask."""
        return not self.shared_budget and self.pruned_per_group in (0, self.group_size)

    @property
    def shares(self) -> Float[Tensor, " rows"]:
        """The weights ω, float64 [rows], of the rows' objectives in the layer's sum."""
        if self.omega is None:
            return torch.ones(self.rows, dtype=torch.float64, device=self.device)
        return self.omega

    def totals(self, values: Float[Tensor, " rows"]) -> Float[Tensor, " budgets"]:
        """Sum ωᵣ xᵣ over the rows of a shared budget; without one, return the values of the rows."""
        return (self.shares @ values.to(self.shares))[None] if self.shared_budget else values

    def fault(self, mask: Bool[Tensor, "rows n"]) -> str:
        """Describe the fault of an illegal mask as the end of a sentence; empty for a legal one."""
        bad = (~self.pattern.is_legal(mask)).nonzero()
        if not len(bad):
            return ""
        pruned, row, n = (~mask).sum(1), int(bad[0]), mask.shape[1]
        asks = f"the pattern ({self.pattern})"
        if self.shared_budget and int(pruned.sum()) != self.pruned:
            total = int(pruned.sum())
            return f" prunes {total} of {mask.numel()}; {asks} asks for exactly {self.pruned}"
        if self.shared_budget:
            allowed = "allows {} to {}".format(*self.row_limits)
        else:
            groups = "" if self.group_size == n else f" in each group of {self.group_size}"
            allowed = f"asks for exactly {self.pruned_per_group}{groups}"
        return f": row {row} prunes {int(pruned[row])} of {n}; {asks} {allowed}"
