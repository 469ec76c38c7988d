"""A model rewritten so that pruning loses less, and computing the same: the option `transform`.

- Within a value head any orthogonal basis does: rows of `v_proj` times R, columns of `o_proj` times Rᵀ, one R
  for every head that shares the values. R is found by Adam on rotations (Cayley's map of skew steps), after
  DenoiseRotator (arXiv 2505.23049), for the score that Wanda's mask prunes of both layers in place of an
  entropy: Σ over pruned (i, j) of W²ᵢⱼ Gⱼⱼ.
- Channels of an MLP have any order: `group_inputs` forms the groups of an N:M mask of `down_proj`.

Whether a block allows it is not derived from its family: its output is compared.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskopt.core.pattern import NM, Pattern
from maskopt.models.architecture.blocks import matrix
from maskopt.models.architecture.structures import Inner, inner_values
from maskopt.models.blockwise.collect import Grams
from maskopt.models.blockwise.job import Block, Job
from maskopt.models.checkpoints.bases import Bases, Basis
from maskopt.models.options.prune import FREE, ROTATION, PruneOptions
from maskopt.models.pruning.allocate import dense_walk
from maskopt.solvers.grouping import group_inputs

#: rows of the score that the speed of orders is measured on
_PROBE = 128
#: steps of Adam, and its rate in radians
_STEPS, _RATE = 60, 0.05
#: Adam's usual shares of the past
_ADAM = 0.9, 0.999
#: by how much a block's output may change, relative to its largest value, by the precision
_CHANGE = {torch.float64: 1e-10, torch.float32: 1e-4}
_ROUGH_CHANGE = 0.05

_log = logging.getLogger("maskopt.models")


def find_bases(job: Job, options: PruneOptions) -> Bases:
    """Bases in which pruning loses less, of the stored tensors of all blocks with chosen layers. The model in
    memory is left in them."""
    walk, found = dense_walk(job, options), dict[str, Basis]()
    with walk, torch.no_grad():
        for block in walk.blocks():
            found |= _of_block(walk, block, options)
            block.advance()
    return found


def order_seconds(job: Job, options: PruneOptions) -> float:
    """Seconds that the orders of all channels take: those of a small random score, scaled by rows·n²."""
    pattern, blocks = options.ordered, job.source.blocks
    if pattern is None:
        return 0.0
    score, seconds = np.random.default_rng(0).random((_PROBE, _PROBE * pattern.of)), 0.0
    for _ in range(2):  # the first one compiles
        began = time.perf_counter()
        group_inputs(score, pattern.keep, pattern.of)
        seconds = time.perf_counter() - began
    every = [x for index in range(len(blocks)) for x in inner_values(blocks, index) if not x.width]
    work = sum(x.consumer.rows * x.consumer.n**2 for x in every)
    return seconds * work / (score.shape[0] * score.shape[1] ** 2)


def _of_block(job: Job, block: Block, options: PruneOptions) -> Bases:
    found, source = dict[str, Basis](), job.source
    window = block.samples.active[0]
    state = block.samples.states[window].clone()

    def output() -> Tensor:
        return block.calls[window](block.module, state.to(block.device, copy=True))

    before, grams = job.ranks.agreed(output), block.grams()
    every = inner_values(source.blocks, block.index)
    tick = block.ticker("transform", len(every))
    for inner in every:
        tick(1)
        names = {name: str(source.stored_as_is(name)) for name in inner.axes}
        change = _change(job, inner, grams, options)
        if change is None or "None" in names.values():
            continue
        of = names[inner.consumer.parameter]
        bases = {name: Basis(of, change, axis) for name, axis in inner.axes.items()}
        kept = {name: source.model.get_parameter(name).clone() for name in bases}
        for name, basis in bases.items():
            source.model.get_parameter(name).copy_(basis.apply(kept[name]))
        after = job.ranks.agreed(output)
        apart = float((after - before).abs().max() / before.abs().max())
        if apart <= _CHANGE.get(before.dtype, _ROUGH_CHANGE):
            found |= {names[name]: basis for name, basis in bases.items()}
        else:
            for name, value in kept.items():
                source.model.get_parameter(name).copy_(value)
            _log.warning("%s keeps its basis: its block would compute another output", of)
    return found


def _change(job: Job, inner: Inner, grams: Grams, options: PruneOptions) -> Tensor | None:
    """The change that makes the pruned score least; None where there is nothing to choose, or by."""
    weights, inputs = dict[str, Tensor](), dict[str, Tensor]()
    for layer in (inner.producer, inner.consumer):
        gram = grams.of(layer.name)
        if gram is not None and gram.tokens >= options.min_tokens:
            weights[layer.name] = matrix(job.source.model, layer).double().cpu()
            inputs[layer.name] = gram.value(dtype=torch.float64).cpu()
    pattern, of = options.pattern, inner.consumer.name
    if inner.width and weights and options.transform in (ROTATION, FREE):
        return job.ranks.agreed(lambda: _rotations(inner, weights, inputs, pattern))
    if not inner.width and of in weights and (ordered := options.ordered) is not None:
        score = (weights[of].square() * inputs[of].diagonal()).numpy()
        order = partial(group_inputs, score, ordered.keep, ordered.of)
        return job.ranks.agreed(lambda: torch.from_numpy(order().order))
    return None


def _rotations(
    inner: Inner, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor], pattern: Pattern
) -> Float[Tensor, "groups d d"]:
    """One rotation for the heads that share values."""
    width, producer, consumer = inner.width, inner.producer, inner.consumer
    value = torch.zeros(producer.rows, 0, dtype=torch.float64)
    if producer.name in weights:
        value = weights[producer.name] * inputs[producer.name].diagonal().sqrt()
    found = []
    for rows, columns in zip(
        torch.arange(producer.rows).split(width),
        torch.arange(consumer.n).split(consumer.n // inner.groups),
        strict=True,
    ):
        taken = []
        if consumer.name in weights:
            weight, gram = weights[consumer.name], inputs[consumer.name]
            taken = [(weight[:, head], gram[head][:, head]) for head in columns.split(width)]
        found.append(rotation(value[rows], taken, pattern))
    return torch.stack(found)


def rotation(
    value: Float[Tensor, "d n"],
    taken: Sequence[tuple[Float[Tensor, "rows d"], Float[Tensor, "d d"]]],
    pattern: Pattern,
) -> Float[Tensor, "d d"]:
    """R, the best that was met from the identity on, for the score that masks prune of RV and of every ORᵀ.

    Args:
        value: V, its columns times the root mean squares of their inputs, float64.
        taken: O, and the Gram matrix of its inputs, of every head that takes the values.
    """
    one = torch.eye(len(value), dtype=torch.float64)
    found, mean, square = one, torch.zeros_like(one), torch.zeros_like(one)
    least, best = math.inf, one
    scales = (
        float(value.square().sum()) or 1.0,
        float(sum((o.square() * g.diagonal()).sum() for o, g in taken)) or 1.0,
    )
    for step in range(_STEPS + 1):
        score, gradient = _pruned(found, value, taken, pattern, scales)
        if score < least:
            least, best = score, found
        skew = gradient @ found.T
        skew = skew - skew.T
        mean.lerp_(skew, 1 - _ADAM[0])
        square.lerp_(skew.square(), 1 - _ADAM[1])
        size = (square / (1 - _ADAM[1] ** (step + 1))).sqrt() + 1e-300
        half = _RATE / 2 * mean / (1 - _ADAM[0] ** (step + 1)) / size
        found = torch.linalg.solve(one + half, (one - half) @ found)
    return best


def _pruned(
    r: Tensor,
    value: Tensor,
    taken: Sequence[tuple[Tensor, Tensor]],
    pattern: Pattern,
    scales: tuple[float, float],
) -> tuple[float, Tensor]:
    """The pruned share of the score of both layers, and its gradient by R while the masks stay."""
    made = r @ value
    gone = made * _least(made.square(), pattern)
    score = float(gone.square().sum()) / scales[0]
    gradient = 2 / scales[0] * gone @ value.T
    for weight, gram in taken:
        new, through = weight @ r.T, r @ gram
        energy = (through * r).sum(1)
        lost = new * _least(new.square() * energy, pattern)
        score += float((lost.square() * energy).sum()) / scales[1]
        by_energy = lost.square().sum(0)[:, None] * through
        gradient += 2 / scales[1] * ((lost * energy).T @ weight + by_energy)
    return score, gradient


def _least(score: Float[Tensor, "rows n"], pattern: Pattern) -> Bool[Tensor, "rows n"]:
    """What a mask of the pattern prunes; of a share or number of a row's inputs, that share of these."""
    size = pattern.of if isinstance(pattern, NM) else score.shape[1]
    if not score.numel() or score.shape[1] % size:
        return torch.zeros_like(score, dtype=torch.bool)
    count = pattern.pruned_per_group(size)
    groups = score.view(-1, size).numpy()
    highest = np.partition(groups, count - 1, axis=1)[:, count - 1 : count]
    return torch.from_numpy(groups <= highest).view(score.shape)
