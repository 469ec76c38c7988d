"""How much of a matrix is pruned by the pattern that a manifest names.

Shares no code with the patterns that prunes are made with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from maskopt.errors import VerificationError


@dataclass(frozen=True)
class Rule:
    """How many entries of every group of a row are pruned, or of a layer whose rows trade."""

    record: Mapping[str, Any]

    @property
    def pooled(self) -> bool:
        return self.record.get("per") == "layer"

    @property
    def max_deviation(self) -> float | None:
        return self.record.get("max_deviation")

    def groups(self, n: int) -> tuple[int, int]:
        """Size of a group, and how many of it are pruned, where rows do not trade.

        Raises:
            VerificationError: rows of n inputs cannot be divided so.
        """
        keep = self.record["keep"]
        if self.record["kind"] == "nm":
            of = self.record["of"]
            if n % of:
                raise VerificationError(f"{n} inputs do not divide into groups of {of}")
            return of, of - keep
        if keep is not None:
            return n, n - keep
        return n, self._part_of(n)

    def pruned(self, rows: int, n: int) -> int:
        """Pruned entries of a matrix."""
        if self.pooled and self.record["keep"] is None:
            return self._part_of(rows * n)
        group, pruned = self.groups(n)
        return rows * (n // group) * pruned

    def _part_of(self, entries: int) -> int:
        return math.floor(Fraction(repr(float(self.record["sparsity"]))) * entries)

    def __str__(self) -> str:
        if self.record["kind"] == "nm":
            return f"{self.record['keep']}:{self.record['of']}"
        keep = self.record["keep"]
        share = f"keep {keep}" if keep is not None else _decimal(float(self.record["sparsity"]))
        within = "" if self.max_deviation is None else f" ± {_decimal(float(self.max_deviation))}"
        return f"{share}{' per layer' if self.pooled else ''}{within}"

    @property
    def two_four(self) -> bool:
        return (self.record["keep"], self.record.get("of")) == (2, 4)


def _decimal(number: float) -> str:
    """With four digits, where they are the number."""
    four = f"{number:.4g}"
    return four if float(four) == number else repr(number)


def row_limits(pruned: int, rows: int, n: int, max_deviation: float | None) -> tuple[int, int]:
    """Whole numbers no further from the mean than the deviation, and those next to the mean in any case."""
    if max_deviation is None:
        return 0, n
    mean, reach = Fraction(pruned, rows), Fraction(repr(float(max_deviation))) * n
    least = min(math.ceil(mean - reach), math.floor(mean))
    most = max(math.floor(mean + reach), math.ceil(mean))
    return max(0, least), min(n, most)
