"""Streaming accumulation of a Gram matrix: G = (1/T) Σ_t x_t x_tᵀ, token by token batch.

Products are taken in float32 (float64 for float64 inputs) over at most `CHUNK` tokens and summed in
float64, so the result does not drift with the number of tokens. Only the upper triangle is computed, in
column tiles of a fixed size: the bits do not depend on how many threads worked on it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.core.inputs import all_finite
from maskopt.errors import ProblemError

#: tokens whose products are summed in float32 before they go to float64
CHUNK = 512
#: rows of G that one tile computes
TILE = 512


class Gram:
    """The Gram matrix of a layer's n inputs, accumulated over sequences of tokens [tokens, n] on a device."""

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        if n < 1:
            raise ProblemError(f"a Gram matrix needs at least one input, not {n}")
        self.n = n
        self.tokens = 0
        self._sum: Float[Tensor, "n n"] = torch.zeros(n, n, dtype=torch.float64, device=device)
        self._total: Float[Tensor, " n"] = torch.zeros(n, dtype=torch.float64, device=device)
        self._between: Float[Tensor, " n"] = torch.zeros_like(self._total)

    def add(self, inputs: Float[Tensor, "tokens n"]) -> None:
        """Add the tokens of one sequence; ProblemError for another shape, or NaN or infinite values."""
        if inputs.ndim != 2 or inputs.shape[1] != self.n or not inputs.is_floating_point():
            raise ProblemError(
                f"inputs must be floating point [tokens, {self.n}], not {list(inputs.shape)} "
                f"of {inputs.dtype}"
            )
        if not all_finite(inputs):
            raise ProblemError("inputs hold NaN or infinite values")
        for task in self.tasks(inputs):
            task()

    def tasks(
        self,
        inputs: Float[Tensor, "tokens n"],
        weights: Float[Tensor, " tokens"] | None = None,
        tiles: Container[int] | None = None,
    ) -> Iterator[Callable[[], None]]:
        """Split `add`, without its checks, into independent tasks for threads.

        All must be done before those of the next batch. `weights`: of each token, with a mean of 1; `tiles`:
        the tiles that this process sums, None: all.
        """
        self.tokens += inputs.shape[0]
        for start in self.tiles():
            if tiles is None or start in tiles:
                yield lambda start=start: self._add_tile(inputs, weights, start)  # type: ignore[misc]

    def tiles(self) -> range:
        """Return the first row of every tile of the upper triangle."""
        return range(0, self.n, TILE)

    def tile(self, start: int) -> list[Tensor]:
        """Return views of the sums of a tile."""
        rows = slice(start, min(start + TILE, self.n))
        return [self._sum[rows, start:], self._total[rows], self._between[rows]]

    def _add_tile(self, inputs: Tensor, weights: Tensor | None, start: int) -> None:
        stop = min(start + TILE, self.n)
        target = self._sum[start:stop, start:]
        total = torch.zeros_like(self._total[start:stop])
        for first in range(0, len(inputs), CHUNK):
            part = slice(first, first + CHUNK)
            right = inputs[part, start:]
            right = right if right.dtype == torch.float64 else right.float()
            left = right[:, : stop - start]
            if weights is not None:
                left = left * weights[part, None].to(left)
            target += left.T @ right
            total += left.sum(0, dtype=torch.float64)
        self._total[start:stop] += total
        self._between[start:stop] += total.square() / max(len(inputs), 1)

    def state(self) -> dict[str, Tensor]:
        """Return all sums for `restored`, exactly; of the products the upper triangle, row after row."""
        rows, columns = torch.triu_indices(self.n, self.n, device=self._sum.device)
        return {
            "sum": self._sum[rows, columns],
            "total": self._total,
            "between": self._between,
            "tokens": torch.tensor([self.tokens]),
        }

    @classmethod
    def restored(cls, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Gram:
        """Invert `state`; ProblemError where its parts do not fit, or are no sums of squares."""
        n = len(state["total"])
        if len(state["sum"]) != n * (n + 1) // 2 or state["between"].shape != state["total"].shape:
            raise ProblemError(f"the state of a Gram matrix of {n} inputs does not fit together")
        gram = cls(n, device)
        rows, columns = torch.triu_indices(n, n, device=gram._sum.device)
        gram._sum[rows, columns] = state["sum"].to(gram._sum)
        # definiteness is not checked later: G is taken for a sum of xxᵀ, and no rounding makes x² negative
        if not bool(torch.isfinite(gram._sum).all() & (gram._sum.diagonal() >= 0).all()):
            raise ProblemError(
                "its diagonal is below 0, or values are not finite: no sum of squares is so"
            )
        gram._total.copy_(state["total"])
        gram._between.copy_(state["between"])
        gram.tokens = int(state["tokens"])
        return gram

    def moments(self, *, dtype: torch.dtype = torch.float32) -> Float[Tensor, "2 n"]:
        """Return the mean of every input, and its variance about its mean in a sequence, both over tokens.

        They are zeros where no token was seen.
        """
        within = (self._sum.diagonal() - self._between).clamp(min=0.0)
        return (torch.stack([self._total, within]) / max(self.tokens, 1)).to(dtype)

    def value(
        self, *, shrinkage: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "n n"]:
        """Return the mean over tokens, [n, n], symmetric; zeros where no token was seen.

        `shrinkage`: α in [0, 1] of G ← (1−α)·G + α·diag(G); Wanda's problem at 1.
        """
        if not 0 <= shrinkage <= 1:
            raise ProblemError(f"shrinkage must lie in [0, 1], not {shrinkage}")
        result = torch.empty(self.n, self.n, dtype=dtype, device=self._sum.device)
        scale = 1.0 / max(self.tokens, 1)
        for start in self.tiles():
            stop = min(start + TILE, self.n)
            rows = self._sum[start:stop, start:] * scale
            square = rows[:, : stop - start].triu()
            rows[:, : stop - start] = square + square.triu(1).T
            result[start:stop, start:] = rows
            result[start:, start:stop] = rows.T
        if shrinkage:
            diagonal = result.diagonal().clone()
            result.mul_(1.0 - shrinkage).diagonal().copy_(diagonal)
        return result
