"""Offers of rows with a shared budget: inputs that each could prune, and inputs that it could keep again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: inputs on each side that a row offers at a time
OFFERED = 48


class Offers(NamedTuple):
    """Per row, in the order in which it would do so: inputs to prune (`removals`) with what they add to the
    row's objective, and inputs to keep again (`returns`) with what they take from it (`gains`).

    The first of each is the row's best. Each later one is priced as if those before it were done; the two
    sides are priced apart. Where there is no further input it is −1, its cost ∞ and its gain −∞, float64.
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
