"""Blockwise training: the kept weights of a block are trained, part by part, towards the dense block.

While the block has its dense weights, the outputs of its parts in the dense model are recorded as targets.
Once its layers are pruned, each part in turn, or the block as a whole, is trained on its inputs in the pruned
model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer, Part, parts_of
from maskopt.models.blockwise.activations import Activations
from maskopt.models.blockwise.collect import IN_DENSE, OpenBlock
from maskopt.models.checkpoints.report import PartReport
from maskopt.models.options.training import ALL, BLOCK, CHANNELS, COSINE, SQUARE, Reconstruction
from maskopt.models.training.parts import Heard, Listener, Recorded, called
from maskopt.models.training.trainer import Task, train

#: lower limit of a token's mean square, relative to that of its window's targets
_LEAST = 1e-6
#: lower limit of a channel's mean square, relative to that of all channels
_LEAST_OF_CHANNEL = 1e-3


class Targets:
    """The parts of an open block, and their outputs in the dense model.

    Attributes:
        trained_layers, trained_vectors: names of the layers, and of the norms and biases, that were trained.

    Args:
        vectors: norms and biases that may change where all is trained: the stored tensor and its dtype by
            name.
        stored: returns the dtype in which a layer's weights are written.
        folder: for files of hidden states; None keeps them in memory.
    """

    def __init__(
        self,
        block: OpenBlock,
        index: int,
        layers: Sequence[Layer],
        vectors: Mapping[str, tuple[str, torch.dtype]],
        stored: Callable[[Layer], torch.dtype],
        how: Reconstruction,
        seed: int,
        folder: Path | None,
    ) -> None:
        self.block, self.index, self.how, self.folder = block, index, how, folder
        self.parts = [Part("", block.module, layers)]
        if how.granularity != BLOCK:
            self.parts = parts_of(block.module, f"{block.name}.", layers)
        self._vectors = dict(vectors) if how.train == ALL else {}
        self._stored = stored
        self.trained_layers: set[str] = set()
        self.trained_vectors: set[str] = set()
        self._seed = seed * 1_000_003 + index
        self._order = list(range(len(self.parts)))
        self._wanted = [self._recorded() for _ in self.parts]
        self._given_dense = [self._recorded() for _ in self.parts]

    def _recorded(self) -> Recorded:
        return Recorded(self.block.samples.count, self.folder)

    def record(self, tick: Callable[[int], None]) -> None:
        """Record the outputs of the dense block, and replace the dense states by them."""
        dense = self.block.samples.dense
        assert dense is not None
        for window, heard, output in self._passes(range(len(self.parts)), dense, tick):
            if not bool(torch.isfinite(output).all()):
                self.block.samples.leave_out(window, self.block.name + IN_DENSE)
                continue
            for index, one in enumerate(heard):
                self._wanted[index].put(window, one.output)
                if self.how.inputs == "dense":
                    self._given_dense[index].put_call(window, one)
            dense[window] = output

    def train(
        self,
        masks: Mapping[str, tuple[Layer, Tensor]],
        ticker: Callable[[str, int], Callable[[int], None]],
    ) -> Iterator[PartReport]:
        """Train every part that has kept weights, in place; `masks` are of layers that may change, True =
        kept."""
        samples = self.block.samples
        fitted = [window for window in samples.active if window not in samples.held]
        held = [window for window in samples.active if window in samples.held]
        if not held:
            raise ModelError(
                f"{self.block.name}: no held-out window is left to judge the training; give a larger "
                "`holdout`"
            )
        for number, index in enumerate(self._order):
            began, part = time.perf_counter(), self.parts[index]
            free, stored = self._free(part, masks)
            if not free:
                continue
            with self._outputs(index, ticker) as gives:
                name, remedy = part.name or "a block", "leave its layers out with `exclude`"
                loss = self._loss(index, gives, fitted)
                task = Task(
                    name, remedy, part.module, free, stored, loss, fitted, held, fitted, self.how
                )
                generator = torch.Generator().manual_seed((self._seed + number) % 2**63)
                tick = ticker(f"train {part.name}".rstrip(), self.how.epochs * len(fitted))
                found = train(task, self.block.threads, generator, tick)
            if found.epoch:
                self.trained_layers |= {layer.name for layer in part.layers} & masks.keys()
                prefix = self._prefix(part)
                self.trained_vectors |= {f"{prefix}.{name}" for name in free} & {*self._vectors}
            losses = (found.before.fitted, found.after.fitted, found.before.held, found.after.held)
            seconds = time.perf_counter() - began
            yield PartReport(self.index, part.name, *losses, found.epoch, found.diverged, seconds)

    def close(self) -> None:
        """Free what was recorded."""
        for recorded in (*self._wanted, *self._given_dense):
            recorded.close()

    def _loss(
        self, index: int, gives: Callable[[int], Tensor], fitted: Sequence[int]
    ) -> Callable[[int], Float[Tensor, ""]]:
        """A function of a window: the distance of a part's output from its output in the dense model."""
        recorded, device = self._wanted[index], self.block.device
        by = _scales(recorded, fitted).to(device) if self.how.loss == CHANNELS else None

        def of(window: int) -> Tensor:
            found = gives(window)
            wanted = recorded.state(window).to(device, torch.float32)
            if by is not None:
                found, wanted = found * by, wanted * by
            return _distance(found, wanted, self.how.loss)

        return of

    def _free(
        self, part: Part, masks: Mapping[str, tuple[Layer, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
        """By parameter name inside the part: the entries that may change, and the dtypes of storage."""
        free: dict[str, Tensor] = {}
        stored: dict[str, torch.dtype] = {}
        names = {id(p): name for name, p in part.module.named_parameters()}
        for layer in part.layers:
            if layer.name not in masks:
                continue
            parameter = self.block.model.get_parameter(layer.parameter)
            name = names[id(parameter)]
            if name not in free:
                stored[name] = self._stored(layer)
                free[name] = torch.zeros_like(parameter, dtype=torch.bool)
            whole = free[name] if layer.expert is None else free[name][layer.expert]
            view = whole if layer.input_axis == 1 else whole.T
            view.copy_(masks[layer.name][1])
        for name, parameter in part.module.named_parameters():
            vector = self._vectors.get(f"{self._prefix(part)}.{name}")
            if free and vector is not None:
                free[name] = torch.ones_like(parameter, dtype=torch.bool)
                stored[name] = vector[1]
        return free, stored

    def _prefix(self, part: Part) -> str:
        """Of the part's parameters in the model, without the last dot."""
        return f"{self.block.name}.{part.name}".rstrip(".")

    @contextmanager
    def _outputs(
        self, index: int, ticker: Callable[[str, int], Callable[[int], None]]
    ) -> Iterator[Callable[[int], Tensor]]:
        """A function of a window: the part's output, float32, on its inputs in the model as it is now."""
        module, block = self.parts[index].module, self.block
        samples, device = block.samples, block.device

        def again(given: Recorded) -> Callable[[int], Tensor]:
            return lambda window: given.call(module, window, device, torch.float32)

        if self.how.inputs == "dense":
            yield again(self._given_dense[index])
            return
        if self.how.granularity == BLOCK:
            # the walk holds its inputs
            yield lambda window: called(
                module, block.calls[window], samples.states[window].to(device, torch.float32)
            )
            return
        given = self._recorded()
        try:
            tick = ticker("inputs", len(samples.active))
            for window, heard, _ in self._passes([index], samples.states, tick):
                given.put_call(window, heard[0])
            yield again(given)
        finally:
            given.close()

    def _passes(
        self, indices: Sequence[int], states: Activations, tick: Callable[[int], None]
    ) -> Iterator[tuple[int, list[Heard], Tensor]]:
        """Send every window through the block: the calls of some parts, and the block's output."""
        listener, block = Listener([self.parts[index] for index in indices]), self.block

        def one(window: int) -> tuple[list[Heard], Tensor]:
            listener.begin()
            output = block.run(window, states)
            if len(indices) == len(self.parts):
                self._order = listener.order()
            return listener.heard(), output

        with listener.listening():
            for window, (heard, output) in block.threads.each(one, list(block.samples.active)):
                yield window, heard, output
                tick(1)


def _scales(recorded: Recorded, windows: Sequence[int]) -> Float[Tensor, " width"]:
    """One over the root mean square of every recorded channel, float32, on the CPU, every token taken with
    length 1. A few channels of a hidden state may be many times larger than all others; where the next norm
    has small entries there, as in Gemma, later layers see little of it."""
    total: Tensor | float = 0.0
    for window in windows:
        square = recorded.state(window).double().square().flatten(0, -2)
        total = total + (square / square.sum(-1, keepdim=True).clamp(min=1e-30)).sum(0).cpu()
    assert isinstance(total, Tensor)
    return (total / total.mean().clamp(min=1e-30)).clamp(min=_LEAST_OF_CHANNEL).rsqrt().float()


def _distance(found: Tensor, wanted: Tensor, loss: str) -> Float[Tensor, ""]:
    """Distance of two windows of states, [1, length, width], mean over the tokens."""
    if loss == COSINE:
        return 1 - nn.functional.cosine_similarity(found, wanted, dim=-1).mean()
    error, size = (found - wanted).square().sum(-1), wanted.square().sum(-1)
    if loss == SQUARE:
        return error.mean() / size.mean().clamp(min=1e-30)
    return (error / size.clamp(min=_LEAST * float(size.mean()) or 1.0)).mean()
