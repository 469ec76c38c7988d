"""A model's count shared out over what trades, by curves of what pruning more or less costs.

The costs between those that were measured are read off the curves, and the cheapest choice with exactly the
model's count is a multiple-choice knapsack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from maskopt.core.knapsack import choose_levels
from maskopt.models.architecture.blocks import Layer
from maskopt.models.options.prune import PruneOptions

#: steps that a row's inputs are divided into, about
_STEPS = 128


@dataclass(frozen=True)
class Moves:
    """Layers that prune more or less together: from what they would alike on in even steps, so that their
    counts have large units in common.

    Attributes:
        middle, step: of each layer's rows, inputs.
        moves: how many steps, ascending; 0 is among them.
    """

    layers: tuple[Layer, ...]
    middle: tuple[int, ...]
    step: tuple[int, ...]
    moves: range

    @classmethod
    def of(cls, layers: Sequence[Layer], alike: Mapping[str, int], max_deviation: float) -> Moves:
        """All moves that leave every layer within the deviation, and something of it."""
        middle = tuple(alike[layer.name] for layer in layers)
        step = _steps([layer.n for layer in layers])
        sides = [ends(layer.n, m, max_deviation) for layer, m in zip(layers, middle, strict=True)]
        below = min((m - low) // s for m, s, (low, _) in zip(middle, step, sides, strict=True))
        above = min((high - m) // s for m, s, (_, high) in zip(middle, step, sides, strict=True))
        return cls(tuple(layers), middle, step, range(-below, above + 1))

    def counts(self, index: int) -> list[int]:
        """What each row of one of the layers prunes, by move."""
        return [self.middle[index] + move * self.step[index] for move in self.moves]

    def sizes(self) -> Int[np.ndarray, " moves"]:
        """What all of them prune, by move."""
        return np.sum([x.rows * np.array(self.counts(i)) for i, x in enumerate(self.layers)], 0)


@dataclass(frozen=True)
class Curve:
    """What pruning more or less of a layer costs, or of several that do so together.

    Attributes:
        pruned: inputs of each row of the first layer, ascending.
        costs: float64, of all rows together.
    """

    layers: tuple[Layer, ...]
    pruned: tuple[int, ...]
    costs: tuple[float, ...]

    def at(self, pruned: Sequence[int]) -> Float[np.ndarray, " levels"]:
        """Between those that were measured in a straight line on a logarithmic scale; from one that costs
        nothing on by the cube of what is pruned beyond it, as the squares of the smallest of many numbers
        add up that are as dense around 0."""
        costs = np.maximum(self.costs, 1e-12 * max(self.costs) or 1e-300)
        found = np.exp(np.interp(pruned, self.pruned, np.log(costs)))
        if self.costs[0] == 0 and len(self.costs) > 1:
            none, first = self.pruned[:2]
            part = (np.asarray(pruned) - none) / (first - none)
            found = np.where(part < 1, self.costs[1] * part.clip(0, 1) ** 3, found)
        return found


def _steps(inputs: Sequence[int]) -> tuple[int, ...]:
    """Of each layer; several that move together keep equal sparsities."""
    if len(inputs) == 1:
        return (max(1, round(inputs[0] / _STEPS)),)
    common = math.gcd(*inputs)
    parts = max(parts for parts in range(1, _STEPS + 1) if common % parts == 0)
    return tuple(n // parts for n in inputs)


def ends(n: int, middle: int, max_deviation: float) -> tuple[int, int]:
    """Of the counts that a row may have; something always stays."""
    reach = math.floor(max_deviation * n)
    return max(0, middle - reach), min(n - 1, middle + reach)


def share_out(
    layers: Sequence[Layer], curves: Sequence[Curve], options: PruneOptions
) -> dict[str, int]:
    """The cheapest counts of the layers; those without a curve have the model's sparsity."""
    alike = {layer.name: options.pattern.pruned_per_group(layer.n) for layer in layers}
    if not curves:
        return alike
    moves = [Moves.of(curve.layers, alike, options.layer_deviation) for curve in curves]
    choice = choose_levels(
        [move.sizes() for move in moves],
        [curve.at(move.counts(0)) for curve, move in zip(curves, moves, strict=True)],
        sum(layer.rows * alike[layer.name] for curve in curves for layer in curve.layers),
    )
    found = dict(alike)
    for move, level in zip(moves, choice.levels, strict=True):
        found |= {layer.name: move.counts(i)[level] for i, layer in enumerate(move.layers)}
    return found
