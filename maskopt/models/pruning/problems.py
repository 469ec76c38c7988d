"""Layer problems out of a real model, without pruning it."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskopt.core.gram import Gram
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.pattern import Pattern
from maskopt.core.problem import LayerProblem
from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer, matrix
from maskopt.models.blockwise.collect import Grams
from maskopt.models.blockwise.forward import OnBlockProgress
from maskopt.models.blockwise.gradients import counting
from maskopt.models.blockwise.job import Job, open_job
from maskopt.models.blockwise.windows import tokens_or_tokenizer
from maskopt.models.options.prune import AUTO, PruneOptions, prune_options
from maskopt.models.options.walk import name_patterns


def collect_problems(
    model: nn.Module | str | Path,
    tokenizer_or_tokens: Any = None,
    options: PruneOptions | None = None,
    *,
    layers: str | Sequence[str] = (),
    calibration: str | Path | Sequence[Any] | None = None,
    on_progress: OnBlockProgress | None = None,
    **shorthand: Any,
) -> Iterator[tuple[str, LayerProblem]]:
    """The layer problems of a dense model, block by block: (name, problem).

    Arguments are those of `prune_model`, with 32 samples of 512 tokens by default; `layers` adds to
    `include`. Layers that saw no token are left out.
    """
    if layers:
        shorthand["include"] = (*name_patterns(layers), *name_patterns(shorthand.get("include")))
    shorthand |= {"calibration": calibration, "on_progress": on_progress}
    found = layer_problems(model, tokenizer_or_tokens, options, **shorthand)
    return ((layer.name, problem) for layer, problem in found)


def layer_problems(
    model: nn.Module | str | Path,
    tokenizer_or_tokens: Any = None,
    options: PruneOptions | None = None,
    *,
    calibration: str | Path | Sequence[Any] | None = None,
    on_progress: OnBlockProgress | None = None,
    unseen: bool = False,
    **shorthand: Any,
) -> Generator[tuple[Layer, LayerProblem], None, None]:
    """As `collect_problems`, with the `Layer`; `unseen`: also layers without tokens, G the identity."""
    if options is None:
        shorthand = {"samples": 32, "seq_len": 512, **shorthand}
    dense = {"calibrate_on": "dense", "true_sequential": False}
    options = prune_options(options, {**shorthand, **dense})
    for name in ("gram_shrinkage", "damping"):
        if getattr(options, name) == AUTO:
            raise ModelError(
                f"`{name}` auto chooses by masks, and none are made here; give a number"
            )
    if options.layers_differ and not options.counts:
        raise ModelError(
            f"`allocation` {options.allocation} is computed by a prune; give its `counts`, or another one"
        )
    text, tokenizer = tokens_or_tokenizer(tokenizer_or_tokens, calibration, "Gram matrices need")
    job = open_job(model, text, options, tokenizer=tokenizer, on_progress=on_progress)
    return _walked(job, options, unseen=unseen)


def _walked(
    job: Job, options: PruneOptions, *, unseen: bool
) -> Generator[tuple[Layer, LayerProblem], None, None]:
    gram_shrinkage = float(options.gram_shrinkage)
    with job:
        for block in job.blocks():
            grams = block.grams()
            for layer in block.layers:
                gram = grams.of(layer.name)
                if gram is not None or unseen:
                    weight = matrix(job.source.model, layer).detach().float().clone()
                    how = options.pattern_of(layer), gram_shrinkage, options.least_squares
                    problem = layer_problem(layer, weight, gram, *how)
                    yield layer, counting(problem, options.sensitivity, job.gradients)
            block.advance()


def held_problem(
    layer: Layer, weight: Tensor, grams: Grams, pattern: Pattern
) -> LayerProblem | None:
    """The layer's problem on the held-out windows; None where it saw no token of them."""
    held = grams.held
    gram = None if held is None else held.of(layer.name)
    if held is None or gram is None:
        return None
    return layer_problem(layer, weight, gram, pattern)


def layer_problem(
    layer: Layer,
    weight: Tensor,
    gram: Gram | None,
    pattern: Pattern,
    gram_shrinkage: float = 0.0,
    least_squares: LeastSquaresUpdate | None = None,
) -> LayerProblem:
    """The problem of a layer with `weight` [rows, n] and the Gram matrix of its inputs, shrunk by α; without
    one G is the identity.

    Raises:
        ProblemError: a damping that leaves the Gram matrix indefinite.
    """
    how: dict[str, Any] = {"name": layer.name, "assume_psd": True, "update": least_squares}
    if gram is None:
        return LayerProblem(weight, torch.eye(layer.n, device=weight.device), pattern, **how)
    values = gram.value(shrinkage=gram_shrinkage)
    return LayerProblem(weight, values, pattern, moments=gram.moments(), **how)
