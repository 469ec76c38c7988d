"""How much of each layer is pruned where the layers of a model trade.

The error of every layer is measured at a few sparsities around that of the model, on the dense model's inputs
and with Wanda's masks, whose curves cost next to nothing and have the shape of better ones; it counts by
`sensitivity`. Where that is `measured`, the layers of a block prune more or less together, and what counts is
what the model's output loses where that block alone is pruned so (`block_curves`). From there on it is
`share_out`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from maskopt.core.least_squares import Refit
from maskopt.core.pattern import Unstructured
from maskopt.core.problem import LayerProblem
from maskopt.models.architecture.blocks import Layer, matrix
from maskopt.models.blockwise.gradients import row_sensitivity
from maskopt.models.blockwise.job import Block, Job
from maskopt.models.options.prune import KL, NONE, PruneOptions
from maskopt.models.pruning.block_curves import measured_curves
from maskopt.models.pruning.problems import layer_problem
from maskopt.models.pruning.share_out import Curve, ends, share_out
from maskopt.protocol.solver import solve

#: sparsities at which a layer's error is measured
_MEASURED = 5


def allocate(job: Job, options: PruneOptions) -> dict[str, int]:
    """Of layers that trade: how many inputs each row of a layer prunes (in the mean, where rows trade then),
    by the layer's name.

    The model stays as it is. Layers that see fewer tokens than `min_tokens` prune as much as the model.

    Args:
        job: the model with the prune's layers and windows; it is walked through by another one.
    """
    dense = replace(
        options,
        calibrate_on="pruned" if options.sensitivity == KL else "dense",
        true_sequential=False,
        target="pruned",
        update=NONE,
        training={},
        damping=Refit.damping,
        damping_exponent=Refit.power,
        gram_shrinkage=0.0,
    )
    if options.sensitivity == KL:
        return share_out(job.layers, measured_curves(job, dense), options)
    walk = job.again(dense)
    with walk, torch.no_grad():
        curves = [curve for block in walk.blocks() for curve in _curves(walk, block, dense)]
    return share_out(job.layers, curves, options)


def _curves(job: Job, block: Block, options: PruneOptions) -> list[Curve]:
    found = []
    samples = block.opened.samples
    samples.drop(set(samples.active) - set(job.few()))
    grams = block.grams()
    tick = block.ticker("allocation", len(block.layers))
    for layer in block.layers:
        gram = grams.of(layer.name)
        if gram is not None and gram.tokens >= options.min_tokens:
            weight = matrix(job.source.model, layer).detach().float()
            problem = layer_problem(layer, weight, gram, options.pattern)
            counts = row_sensitivity(problem, options.sensitivity, job.gradients, of_layer=True)
            found.append(_curve(layer, problem, counts, options))
        tick(1)
    block.advance()
    return found


def _curve(layer: Layer, problem: LayerProblem, counts: Tensor, options: PruneOptions) -> Curve:
    middle = options.pattern.pruned_per_group(layer.n)
    least, most = ends(layer.n, middle, options.layer_deviation)
    pruned = sorted({*np.linspace(least, most, _MEASURED).round().astype(int).tolist(), middle})
    costs = []
    for count in pruned:
        part = problem.under(Unstructured(keep=layer.n - count))
        costs.append(float(counts @ solve(part, "wanda").objective))
    return Curve((layer,), tuple(pruned), tuple(costs))
