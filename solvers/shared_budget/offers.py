"""Offers of rows with a shared budget: inputs that each could prune, and inputs that it could keep again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: inputs on each side that a row offers at a time
OFFERED = 48


class Offers(NamedTuple):
    """Per row, in the order in which it would do so: what to prune, and what to keep again.

    The first of each is the row's best. Each later one is priced as if those before it were done, so that
    any number from the front of one side is worth the sum; the two sides are priced apart.

    Attributes:
        removals: inputs to prune; −1 where there is no further one.
        costs: float64, what they add to the row's objective; ∞ where there is none.
        returns: inputs to keep again; −1 where there is none.
        gains: float64, what they take from the objective; −∞ where there is none.
    """

    removals: Int[Tensor, "rows some"]
    costs: Float[Tensor, "rows some"]
    returns: Int[Tensor, "rows some"]
    gains: Float[Tensor, "rows some"]

    @classmethod
    def none(cls, rows: int, device: torch.device) -> Offers:
        nothing = torch.full((rows, OFFERED), -1, device=device)
        endless = torch.full((rows, OFFERED), torch.inf, dtype=torch.float64, device=device)
        return cls(nothing, endless, nothing.clone(), -endless)

    @classmethod
    def joined(cls, parts: list[Offers]) -> Offers:
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def put(self, rows: Int[Tensor, " some"], other: Offers) -> None:
        """Some rows offer something else now."""
        for mine, new in zip(self, other, strict=True):
            mine[rows] = new
