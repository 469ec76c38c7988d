"""How much of each layer is pruned where the layers of a model trade.

The error of every layer is measured at a few sparsities around that of the model, on the dense model's inputs
and with Wanda's masks, whose curves cost next to nothing and have the shape of better ones; it counts by
`importance`. The sparsities between are read off the curves, and the cheapest choice with exactly the model's
count is a multiple-choice knapsack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.knapsack import choose_levels
from maskopt.model.blocks import Layer, matrix
from maskopt.model.importance import row_importance
from maskopt.model.job import Block, Job
from maskopt.model.options import KEEP, PruneOptions
from maskopt.model.problems import layer_problem
from maskopt.pattern import Unstructured
from maskopt.problem import LayerProblem
from maskopt.solver import solve

#: sparsities at which a layer's error is measured
_MEASURED = 5
#: of a row's inputs, the steps in which it is chosen
_STEP = 1 / 128


@dataclass(frozen=True)
class Curve:
    """What pruning more or less of a layer costs.

    Attributes:
        pruned: inputs of each row, ascending.
        costs: float64, of all rows together.
    """

    layer: Layer
    pruned: tuple[int, ...]
    costs: tuple[float, ...]

    def at(self, pruned: Sequence[int]) -> Float[np.ndarray, " levels"]:
        """Between those that were measured in a straight line on a logarithmic scale."""
        costs = np.maximum(self.costs, 1e-12 * max(self.costs) or 1e-300)
        return np.exp(np.interp(pruned, self.pruned, np.log(costs)))


def allocate(job: Job, options: PruneOptions) -> dict[str, int]:
    """Of layers that trade: how many inputs each row of a layer prunes (in the mean, where rows trade then),
    by the layer's name.

    The model stays as it is. Layers that see fewer tokens than `min_tokens` prune as much as the model.

    Args:
        job: the model with the prune's layers and windows; it is walked through by another one.
    """
    dense = replace(
        options,
        one_pass=True,
        true_sequential=False,
        target="pruned",
        weights=KEEP,
        reconstruct={},
        shrink=0.0,
    )
    walk = job.again(dense)
    with walk, torch.no_grad():
        curves = [curve for block in walk.blocks() for curve in _curves(walk, block, dense)]
    return share_out(job.layers, curves, options)


def share_out(
    layers: Sequence[Layer], curves: Sequence[Curve], options: PruneOptions
) -> dict[str, int]:
    """The cheapest counts of the layers; those without a curve have the model's sparsity."""
    alike = {layer.name: options.pattern.pruned_per_group(layer.n) for layer in layers}
    total = sum(curve.layer.rows * alike[curve.layer.name] for curve in curves)
    levels = [
        _levels(curve.layer.n, alike[curve.layer.name], options.layer_spread) for curve in curves
    ]
    if not curves:
        return alike
    choice = choose_levels(
        [curve.layer.rows * np.array(x) for curve, x in zip(curves, levels, strict=True)],
        [curve.at(x) for curve, x in zip(curves, levels, strict=True)],
        total,
    )
    chosen = zip(curves, levels, choice.levels, strict=True)
    return alike | {curve.layer.name: x[level] for curve, x, level in chosen}


def _curves(job: Job, block: Block, options: PruneOptions) -> list[Curve]:
    found = []
    samples = block.opened.samples
    samples.drop(set(samples.active) - set(job.few()))
    grams = block.grams()
    tick = block.ticker("budget", len(block.layers))
    for layer in block.layers:
        gram = grams.of(layer.name)
        if gram is not None and gram.tokens >= options.min_tokens:
            weight = matrix(job.source.model, layer).detach().float()
            problem = layer_problem(layer, weight, gram, options.pattern)
            counts = row_importance(problem, options.importance, job.gradients, of_layer=True)
            found.append(_curve(layer, problem, counts, options))
        tick(1)
    block.advance()
    return found


def _curve(layer: Layer, problem: LayerProblem, counts: Tensor, options: PruneOptions) -> Curve:
    middle = options.pattern.pruned_per_group(layer.n)
    least, most = _ends(layer.n, middle, options.layer_spread)
    pruned = sorted({*np.linspace(least, most, _MEASURED).round().astype(int).tolist(), middle})
    costs = []
    for count in pruned:
        part = problem.under(Unstructured(keep=layer.n - count))
        costs.append(float(counts @ solve(part, "wanda").objective))
    return Curve(layer, tuple(pruned), tuple(costs))


def _ends(n: int, middle: int, spread: float) -> tuple[int, int]:
    """Of the counts that a row may have; something always stays."""
    reach = math.floor(spread * n)
    return max(0, middle - reach), min(n - 1, middle + reach)


def _levels(n: int, middle: int, spread: float) -> list[int]:
    """From `middle` on in even steps, so that layers' counts have large units in common."""
    least, most = _ends(n, middle, spread)
    step = max(1, round(n * _STEP))
    below = range(middle, least - 1, -step)
    return sorted({*below, *range(middle, most + 1, step)})
