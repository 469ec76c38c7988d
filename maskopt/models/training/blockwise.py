"""Blockwise training: the kept weights of a block are trained towards the dense block.

While the block has its dense weights, its outputs in the dense model are recorded as targets. Once its layers
are pruned, the block is trained on its inputs in the pruned model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer, merged
from maskopt.models.blockwise.activations import Activations
from maskopt.models.blockwise.collect import IN_DENSE
from maskopt.models.blockwise.job import Block
from maskopt.models.checkpoints.report import TrainedBlock
from maskopt.models.options.walk import ALL, Reconstruction
from maskopt.models.training.trainer import Task, train

#: lower limit of a token's mean square, relative to that of its window's targets
_LEAST = 1e-6
#: lower limit of a channel's mean square, relative to that of all channels
_LEAST_OF_CHANNEL = 1e-3


class Targets:
    """The outputs of an open block in the dense model.

    Attributes:
        trained_layers, trained_vectors: names of the layers, and of the norms and biases, that were trained.

    Args:
        folder: for a file of hidden states, where those of the walk are in one.
    """

    def __init__(self, block: Block, how: Reconstruction, seed: int, folder: Path) -> None:
        self.block, self.how = block, how
        dense = block.samples.dense
        assert dense is not None
        place = folder if block.samples.states.in_file else None
        self._wanted = Activations(range(block.samples.count), dense.shape, dense.dtype, place)
        source = block.job.source
        #: norms and biases that may change: the stored tensor and its dtype by name
        self._vectors = dict(source.vectors(block.index)) if how.train == ALL else {}
        self._stored = source.stored_dtype
        self.trained_layers: set[str] = set()
        self.trained_vectors: set[str] = set()
        self._seed = seed * 1_000_003 + block.index

    def record(self) -> None:
        """Record the outputs of the dense block, and replace the dense states by them."""
        block, dense = self.block, self.block.samples.dense
        assert dense is not None
        tick = block.ticker("targets", len(block.samples.active))

        def one(window: int) -> Tensor:
            return block.run(window, dense)

        for window, output in block.threads.each(one, list(block.samples.active)):
            if bool(torch.isfinite(output).all()):
                self._wanted[window] = dense[window] = output
            else:
                block.samples.leave_out(window, block.name + IN_DENSE)
            tick(1)
        block.dense_advanced = True

    def train(self, masks: Mapping[str, tuple[Layer, Tensor]]) -> list[TrainedBlock]:
        """Train the kept weights in place, if there are any; `masks` are of layers that may change, True =
        kept."""
        began, block, samples = time.perf_counter(), self.block, self.block.samples
        fitted = [window for window in samples.active if window not in samples.held]
        held = [window for window in samples.active if window in samples.held]
        if not held:
            raise ModelError(
                f"{block.name}: no held-out window is left to judge the training; give a larger `holdout`"
            )
        free, stored = self._free(masks)
        if not free:
            return []
        by = _scales(self._wanted, fitted).to(block.device)
        calls, states, device = block.calls, samples.states, block.device

        def loss(window: int) -> Float[Tensor, ""]:
            given = states[window].to(device, torch.float32)
            wanted = self._wanted[window].to(device, torch.float32)
            return _distance(calls[window](block.module, given, cast=True) * by, wanted * by)

        remedy = "leave its layers out with `exclude`"
        task = Task(
            "a block", remedy, block.module, free, stored, loss, fitted, held, fitted, self.how
        )
        generator = torch.Generator().manual_seed(self._seed % 2**63)
        tick = block.ticker("train", self.how.epochs * len(fitted))
        found = train(task, block.threads, generator, tick)
        if found.epoch:
            self.trained_layers |= masks.keys()
            self.trained_vectors |= {f"{block.name}.{name}" for name in free} & {*self._vectors}
        losses = (found.before.fitted, found.after.fitted, found.before.held, found.after.held)
        seconds = time.perf_counter() - began
        return [TrainedBlock(block.index, *losses, found.epoch, found.diverged, seconds)]

    def close(self) -> None:
        """Free what was recorded."""
        self._wanted.close()

    def _free(
        self, masks: Mapping[str, tuple[Layer, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
        """By parameter name inside the block: the entries that may change, and the dtypes of storage."""
        free: dict[str, Tensor] = {}
        stored: dict[str, torch.dtype] = {}
        names = {id(p): name for name, p in self.block.module.named_parameters()}
        dtypes = {layer.parameter: self._stored(layer) for layer, _ in masks.values()}
        for place, mask in merged(self.block.model, dict(masks), False).items():
            name = names[id(self.block.model.get_parameter(place))]
            free[name], stored[name] = mask.to(self.block.device), dtypes[place]
        for name, parameter in self.block.module.named_parameters():
            vector = self._vectors.get(f"{self.block.name}.{name}")
            if free and vector is not None:
                free[name] = torch.ones_like(parameter, dtype=torch.bool)
                stored[name] = vector[1]
        return free, stored


def _scales(recorded: Activations, windows: Sequence[int]) -> Float[Tensor, " width"]:
    """One over the root mean square of every recorded channel, float32, on the CPU, every token taken with
    length 1. A few channels of a hidden state may be many times larger than all others; where the next norm
    has small entries there, as in Gemma, later layers see little of it."""
    total: Tensor | float = 0.0
    for window in windows:
        square = recorded[window].double().square().flatten(0, -2)
        total = total + (square / square.sum(-1, keepdim=True).clamp(min=1e-30)).sum(0).cpu()
    assert isinstance(total, Tensor)
    return (total / total.mean().clamp(min=1e-30)).clamp(min=_LEAST_OF_CHANNEL).rsqrt().float()


def _distance(found: Tensor, wanted: Tensor) -> Float[Tensor, ""]:
    """Squared error of a token relative to the square of its target, mean over the tokens; both are
    [1, length, width]."""
    error, size = (found - wanted).square().sum(-1), wanted.square().sum(-1)
    return (error / size.clamp(min=_LEAST * float(size.mean()) or 1.0)).mean()
