"""How many entries the rows of a layer prune, and which rows have one count together."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskopt.core.pattern import Pattern


class Counts:
    """The counts of a pattern for a layer. Its attributes are those of `LayerProblem`."""

    weight: Float[Tensor, "rows n"]
    pattern: Pattern
    omega: Float[Tensor, " rows"] | None

    @property
    def group_size(self) -> int:
        return self.pattern.group_size(self.weight.shape[1])

    @property
    def pruned_per_group(self) -> int:
        return self.pattern.pruned_per_group(self.weight.shape[1])

    @property
    def shared_budget(self) -> bool:
        """Whether the rows share a budget: only the layer has a count."""
        return self.pattern.shared_budget

    @property
    def rows_per_budget(self) -> int:
        """Rows that have one count together: all with a shared budget, else 1."""
        return len(self.weight) if self.shared_budget else 1

    @property
    def pruned(self) -> int:
        """Entries of the layer that are pruned."""
        return self.pattern.pruned_in(*self.weight.shape)

    @property
    def row_limits(self) -> tuple[int, int]:
        """The least and the most entries that a row may prune."""
        return self.pattern.row_limits(*self.weight.shape)

    @property
    def one_mask(self) -> bool:
        """Whether every row has a single legal mask."""
        return not self.shared_budget and self.pruned_per_group in (0, self.group_size)

    @property
    def shares(self) -> Float[Tensor, " rows"]:
        """ω, float64 [rows]: the weight of every row's objective in the layer's sum."""
        if self.omega is None:
            return torch.ones(len(self.weight), dtype=torch.float64, device=self.weight.device)
        return self.omega

    def totals(self, values: Float[Tensor, " rows"]) -> Float[Tensor, " budgets"]:
        """Σ ωᵣ xᵣ over the rows of a shared budget; without one, the values of the rows."""
        return (self.shares @ values.to(self.shares))[None] if self.shared_budget else values

    def fault(self, mask: Bool[Tensor, "rows n"]) -> str:
        """Why a mask is not legal, as the end of a sentence; empty where it is."""
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
