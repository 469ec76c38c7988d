"""What the model's output loses where one of its blocks is pruned more or less, and all others are dense.

Of every block a few variants, by Wanda's masks at a few sparsities on what the block is given in the dense
model, go through the rest of the model side by side: 3·N²/2 passes through single blocks for N blocks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from maskopt.core.pattern import Unstructured
from maskopt.core.problem import LayerProblem
from maskopt.errors import OptionError
from maskopt.models.architecture.blocks import Layer, matrix
from maskopt.models.blockwise.job import Block, Job
from maskopt.models.blockwise.memory import by_block
from maskopt.models.blockwise.variants import Variants, divergences, place, through
from maskopt.models.calibration.token_weights import GRADIENT, UNIFORM
from maskopt.models.options.prune import VARIANT_WINDOWS, VARIANTS, PruneOptions
from maskopt.models.pruning.problems import layer_problem
from maskopt.models.pruning.share_out import Curve, Moves
from maskopt.protocol.solver import solve


def measured_curves(job: Job, options: PruneOptions) -> list[Curve]:
    """The model stays as it is.

    Args:
        job: the model with the prune's layers and windows; it is walked through by another one.
        options: of the dense model's inputs; a block's samples stay while its Gram matrices are made.
    """
    # the gradients that count tokens are those of all windows, of another walk
    token_weights = UNIFORM if options.token_weights == GRADIENT else options.token_weights
    walk = job.whole_again(
        replace(options, token_weights=token_weights), job.few()[:VARIANT_WINDOWS]
    )
    windows = range(walk.count)
    check_moves(job, options)
    most = VARIANTS * len(job.source.blocks)
    folder = place(walk, most, Path(tempfile.gettempdir()))
    moves: dict[int, Moves] = {}
    held = Variants[tuple[int, int]](walk, most, folder)
    with walk, torch.no_grad(), held:
        for block in walk.blocks():
            entered = block.opened.samples.states
            problems = _problems(walk, block, options)
            tick = block.ticker("allocation", len(held) + VARIANTS)
            for states in held.values():
                through(block, states, windows)
                tick(1)
            if problems:
                chosen = [layer for layer, _ in problems]
                alike = {x.name: options.pattern.pruned_per_group(x.n) for x in chosen}
                move = moves[block.index] = Moves.of(chosen, alike, options.layer_deviation)
                for level in _measured(move):
                    counts = [move.counts(index)[level] for index in range(len(chosen))]
                    key = block.index, move.counts(0)[level]
                    with _pruned(walk, problems, counts):
                        through(block, held.begin(key, entered, entered), windows)
                    tick(1)
            block.advance()
        costs = divergences(walk, held)
    found = []
    for index, move in moves.items():
        pruned = tuple(count for block_index, count in held if block_index == index)
        kl = tuple(max(0.0, costs[index, count]) for count in pruned)
        found.append(Curve(move.layers, pruned, kl))
    return found


def check_moves(job: Job, options: PruneOptions) -> None:
    """Raise OptionError where no block's layers can prune more or less together."""
    alike = {layer.name: options.pattern.pruned_per_group(layer.n) for layer in job.layers}
    moves = [
        Moves.of(layers, alike, options.layer_deviation) for layers in by_block(job.layers).values()
    ]
    if all(len(move.moves) == 1 for move in moves):
        widths = sorted({layer.n for layer in job.layers})
        raise OptionError(
            f"`sensitivity` kl: layers of {', '.join(map(str, widths))} inputs have no step in common "
            "that is within `max_deviation`; take a larger one, or `sensitivity` fisher"
        )


def _problems(job: Job, block: Block, options: PruneOptions) -> list[tuple[Layer, LayerProblem]]:
    """Of the chosen layers that see enough tokens."""
    grams = block.grams()
    found = []
    for layer in block.layers:
        gram = grams.of(layer.name)
        if gram is not None and gram.tokens >= options.min_tokens:
            weight = matrix(job.source.model, layer).detach().float().clone()
            found.append((layer, layer_problem(layer, weight, gram, options.pattern)))
    return found


def _measured(move: Moves) -> list[int]:
    """Places among the moves: the first, that of 0, and the last."""
    return sorted({0, move.moves.index(0), len(move.moves) - 1})


@contextmanager
def _pruned(
    job: Job, problems: Sequence[tuple[Layer, LayerProblem]], counts: Sequence[int]
) -> Iterator[None]:
    """The block with so many inputs of each row of its layers pruned by Wanda, and afterwards as it was."""
    before: list[tuple[Tensor, Tensor]] = []
    for (layer, problem), count in zip(problems, counts, strict=True):
        weight = matrix(job.source.model, layer)
        before.append((weight, weight.clone()))
        mask = solve(problem.under(Unstructured(keep=layer.n - count)), "wanda").mask
        weight.masked_fill_(~mask.to(weight.device), 0)
    try:
        yield
    finally:
        for weight, old in before:
            weight.copy_(old)
