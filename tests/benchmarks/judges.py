"""Errors of a pruned model's layers on the same inputs, however its masks were fitted: what may foretell
its perplexity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt import PruneOptions, Unstructured
from maskopt.core.problem import LayerProblem
from maskopt.models.architecture.blocks import Layer, matrix
from maskopt.models.blockwise.gradients import row_sensitivity
from maskopt.models.blockwise.job import Job, open_job
from maskopt.models.options.prune import FISHER
from maskopt.models.pruning.prune_layer import layer_problem

#: of calibration text, cut with another seed than those that masks are fitted to
WINDOWS = 8
SEED = 1
#: of the mean energy of a layer's rows: what a row's own is at least taken for
_LEAST = 1e-3


@dataclass(frozen=True)
class Judge:
    """A layer on its inputs in the dense model.

    Attributes:
        block: that it is in.
        loss: what an error of each row costs a token of text, by the squared gradient of the loss.
    """

    block: int
    problem: LayerProblem
    energy: Float[Tensor, " rows"]
    loss: Float[Tensor, " rows"]


@cache
def judging_layers(dense: Path, calibration: str) -> Mapping[str, Judge]:
    """Of all layers of the dense model, by name."""
    job = open_job(dense, calibration, _options())
    found = {}
    with job, torch.no_grad():
        for block in job.blocks():
            grams = block.grams()
            for layer in block.layers:
                weight = matrix(job.source.model, layer).detach().float().clone()
                problem = layer_problem(
                    layer.name, weight, grams.of(layer.name), _options().pattern
                )
                loss = row_sensitivity(problem, FISHER, job.gradients, of_layer=True)
                energy = problem.output_energy()
                found[layer.name] = Judge(layer.block, problem, energy, loss)
            block.advance()
    return found


def dense_errors(pruned: Path, judges: Mapping[str, Judge]) -> dict[str, float]:
    """raw: summed over all rows of all layers; relative: to the layer's output, mean over the layers; rows:
    to each row's own, mean over rows and layers; loss: weighted by the squared gradient, summed: nats a
    token."""
    raw, relative, rows, loss = [], [], [], []
    for layer, weight in weights_of(open_job(pruned, None, _options())):
        judge = judges[layer.name]
        error = judge.problem.error(weight)
        least = _LEAST * float(judge.energy.mean())
        raw.append(float(error.sum()))
        relative.append(float(error.sum() / judge.energy.sum()))
        rows.append(float((error / judge.energy.clamp(min=least)).mean()))
        loss.append(float(judge.loss @ error))
    count = len(raw)
    return {
        "raw": sum(raw),
        "relative": sum(relative) / count,
        "rows": sum(rows) / count,
        "loss": sum(loss),
    }


def weights_of(job: Job) -> Iterator[tuple[Layer, Tensor]]:
    """Every layer's weight, float32 [rows, n], a block of the model in memory at a time."""
    for index in range(job.last + 1):
        with job.source.open(index):
            for layer in job.layers:
                if layer.block == index:
                    yield layer, matrix(job.source.model, layer).detach().float()


def _options() -> PruneOptions:
    return PruneOptions(
        Unstructured(sparsity=0.5),
        allocation="rows",
        sensitivity=FISHER,
        calibrate_on="dense",
        samples=WINDOWS,
        seq_len=512,
        seed=SEED,
    )
