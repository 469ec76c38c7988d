"""The values that an objective of whole numbers can take.

Where all Q_ii and 2Q_ij are whole and every legal mask prunes s inputs, exchanging one for another changes
f = pᵀQp by Q_ii − Q_jj and by twices of entries off the diagonal. So f lies on offset + step·ℤ with
offset = s·Q_11 and step the greatest common divisor of all Q_ii − Q_11 and 2Q_ij: 2 where Q_ij is 1 for the
edges of a graph. A lower bound holds up to the next of these values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

#: whole numbers below it, and their sums, are exact in float64
MOST_WHOLE = 2.0**52

_Real = TypeVar("_Real", float, Fraction)


@dataclass(frozen=True)
class Values:
    """offset + step·k for all whole k; step 0: the offset alone."""

    offset: int
    step: int

    def at_least(self, bound: _Real) -> _Real:
        """The least value that is not below a bound, exact for a Fraction; the bound itself without such a
        value."""
        if not abs(bound) < MOST_WHOLE or (not self.step and bound > self.offset):
            return bound
        # each operation is monotone: rounding never moves the bound past a value
        steps = math.ceil((bound - self.offset) / self.step) if self.step else 0
        return type(bound)(self.offset + self.step * steps)


def values_of(q: Float[Tensor, "n n"], pruned: int) -> Values:
    """Of Q with whole Q_ii and 2Q_ij, and s."""
    twice = (2 * q.cpu().numpy()).astype(np.int64)
    diagonal = twice.diagonal() // 2
    step = np.gcd.reduce(twice[np.triu_indices(len(twice), 1)], initial=0)
    step = np.gcd.reduce(diagonal - diagonal[0], initial=int(step))
    return Values(pruned * int(diagonal[0]), abs(int(step)))
