"""How much of each layer is pruned where the layers of a model share a budget.

The error of every layer is measured at a few sparsities around that of the model, on the dense model's inputs
and with Wanda's masks, and weighted by `sensitivity`. The cheapest choice with the model's count is a
multiple-choice knapsack (`choose_levels`): an item is a layer, a level how much of it is pruned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.core.knapsack import choose_levels
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.pattern import Unstructured
from maskopt.core.problem import LayerProblem
from maskopt.models.architecture.blocks import Layer, matrix
from maskopt.models.blockwise.gradients import row_sensitivity
from maskopt.models.blockwise.job import Block, Job
from maskopt.models.options.prune import LAYER_DEVIATION, NONE, PruneOptions
from maskopt.models.pruning.prune_layer import layer_problem
from maskopt.protocol.solver import solve

#: sparsities at which a layer's error is measured
_MEASURED = 5
#: steps that a row's inputs are divided into, about
_STEPS = 128


def allocate(job: Job, options: PruneOptions) -> dict[str, int]:
    """How many inputs each row of a layer prunes, on average over its rows, by the layer's name. Layers that
    see fewer tokens than `min_tokens` have the model's sparsity. The model is not changed: another job walks
    through it, with the layers and windows of `job`."""
    walk = dense_walk(job, options)
    with walk, torch.no_grad():
        curves = [curve for block in walk.blocks() for curve in _curves(walk, block, options)]
    return share_out(job.layers, curves, options)


def dense_walk(job: Job, options: PruneOptions) -> Job:
    """Another walk through the same model, which computes the Gram matrices of a block in one pass."""
    return job.again(
        replace(
            options,
            calibrate_on="dense",
            true_sequential=False,
            update=NONE,
            training={},
            damping=LeastSquaresUpdate.damping,
            damping_exponent=LeastSquaresUpdate.power,
            gram_shrinkage=0.0,
        )
    )


def _curves(job: Job, block: Block, options: PruneOptions) -> list[Curve]:
    """Of the chosen layers of a block that see enough tokens."""
    found = []
    samples = block.samples
    samples.drop(set(samples.active) - set(job.few))
    grams = block.grams()
    tick = block.ticker("allocation", len(block.layers))
    for layer in block.layers:
        gram = grams.of(layer.name)
        if gram is not None and gram.tokens >= options.min_tokens:
            weight = matrix(job.source.model, layer).detach().float().clone()
            problem = layer_problem(layer.name, weight, gram, options.pattern)
            counts = row_sensitivity(problem, options.sensitivity, job.gradients, of_layer=True)
            found.append(_curve(layer, problem, counts, options))
            tick(1)
    block.advance()
    return found


def _curve(layer: Layer, problem: LayerProblem, counts: Tensor, options: PruneOptions) -> Curve:
    least, middle, most = ends(layer, options)
    pruned = sorted({*np.linspace(least, most, _MEASURED).round().astype(int).tolist(), middle})
    costs = []
    for count in pruned:
        part = problem.under(Unstructured(keep=layer.n - count))
        costs.append(float(counts @ solve(part, "wanda").objective))
    return Curve(layer, tuple(pruned), tuple(costs))


@dataclass(frozen=True)
class Curve:
    """The `costs` of pruning so many inputs per row of a layer."""

    layer: Layer
    pruned: tuple[int, ...]
    costs: tuple[float, ...]

    def at(self, pruned: Sequence[int]) -> Float[np.ndarray, " levels"]:
        """The costs, log-linear between measured ones; from a cost of 0 on by the cube of the count."""
        costs = np.maximum(self.costs, 1e-12 * max(self.costs) or 1e-300)
        found = np.exp(np.interp(pruned, self.pruned, np.log(costs)))
        if self.costs[0] == 0 and len(self.costs) > 1:
            none, first = self.pruned[:2]
            part = (np.asarray(pruned) - none) / (first - none)
            found = np.where(part < 1, self.costs[1] * part.clip(0, 1) ** 3, found)
        return found


def levels_of(layer: Layer, options: PruneOptions) -> range:
    """What each row of a layer may prune, in even steps from the model's sparsity, so that the counts of
    layers have large common units."""
    low, middle, high = ends(layer, options)
    step = max(1, round(layer.n / _STEPS))
    first, last = (middle - low) // step, (high - middle) // step
    return range(middle - first * step, middle + last * step + 1, step)


def ends(layer: Layer, options: PruneOptions) -> tuple[int, int, int]:
    """The least count of a row, that of the model's sparsity, and the largest; at least one input stays."""
    middle, most = options.pattern.pruned_per_group(layer.n), options.max_deviation
    reach = math.floor((LAYER_DEVIATION if most is None else most) * layer.n)
    return max(0, middle - reach), middle, min(layer.n - 1, middle + reach)


def share_out(
    layers: Sequence[Layer], curves: Sequence[Curve], options: PruneOptions
) -> dict[str, int]:
    """The cheapest counts of the layers; layers without a curve have the model's sparsity."""
    uniform = {layer.name: options.pattern.pruned_per_group(layer.n) for layer in layers}
    if not curves:
        return uniform
    levels = [levels_of(curve.layer, options) for curve in curves]
    chosen = choose_levels(
        [curve.layer.rows * np.array(some) for curve, some in zip(curves, levels, strict=True)],
        [curve.at(some) for curve, some in zip(curves, levels, strict=True)],
        sum(curve.layer.rows * uniform[curve.layer.name] for curve in curves),
    )
    counts = zip(curves, levels, chosen, strict=True)
    return uniform | {curve.layer.name: some[level] for curve, some, level in counts}
