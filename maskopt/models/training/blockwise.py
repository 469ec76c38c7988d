"""The reconstruction of a block: its kept weights are trained, part by part, towards the dense block.

While the block still has its dense weights its parts' outputs in the dense model are recorded. Once its
layers are pruned each part in turn, or the block as a whole, is given what it is given in the pruned model
(with the parts before it trained already), and its kept weights are trained to give what was recorded.
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
from maskopt.models.architecture.blocks import Layer
from maskopt.models.blockwise.activations import Activations
from maskopt.models.blockwise.collect import IN_DENSE, OpenBlock
from maskopt.models.blockwise.parts import Heard, Listener, Part, Recorded, called, parts_of
from maskopt.models.checkpoints.report import PartReport
from maskopt.models.options.training import ALL, BLOCK, CHANNELS, COSINE, SQUARE, Reconstruction
from maskopt.models.training.trainer import Task, train

#: of the mean square of a window's targets: what a token's own is at least taken for
_LEAST = 1e-6
#: of the mean square of all channels: what a channel's own is at least taken for
_LEAST_OF_CHANNEL = 1e-3


class Targets:
    """The parts of an open block, and what they give in the dense model.

    Attributes:
        trained_vectors: names in the model of the norms and biases that were trained.

    Args:
        index: of the block in the model.
        layers: whose weights may change.
        vectors: the block's parameters with one dimension that may change where all is trained: by name, the
            stored tensor and its dtype.
        stored: the dtype in which a layer's weights are written.
        seed: of the order of the windows.
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
        whole = Part("", block.module, layers)
        self.parts = (
            [whole]
            if how.granularity == BLOCK
            else parts_of(block.module, f"{block.name}.", layers)
        )
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

    def record(self, tick: Callable[[int], None], *, advance: bool) -> None:
        """Send the dense hidden states through the block, which still has its dense weights; what comes out
        takes their place where they are to advance."""
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
            if advance:
                dense[window] = output

    def train(
        self,
        masks: Mapping[str, tuple[Layer, Tensor]],
        ticker: Callable[[str, int], Callable[[int], None]],
    ) -> Iterator[PartReport]:
        """Train every part that has kept weights; the model's weights are changed in place.

        Args:
            masks: of the layers that may change, by name, True = kept.
        """
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
                task = Task(
                    part.name or "a block",
                    "leave its layers out with `exclude`",
                    part.module,
                    free,
                    stored,
                    self._loss(index, gives, fitted),
                    fitted,
                    held,
                    told=fitted,
                    how=self.how,
                )
                generator = torch.Generator().manual_seed((self._seed + number) % 2**63)
                tick = ticker(f"train {part.name}".rstrip(), self.how.epochs * len(fitted))
                found = train(task, self.block.threads, generator, tick)
            if found.epoch:
                self._changed(part, free, masks)
            yield PartReport(
                self.index,
                part.name,
                found.before.fitted,
                found.after.fitted,
                found.before.held,
                found.after.held,
                found.epoch,
                found.diverged,
                time.perf_counter() - began,
            )

    def _changed(
        self, part: Part, free: Mapping[str, Tensor], masks: Mapping[str, tuple[Layer, Tensor]]
    ) -> None:
        self.trained_layers |= {layer.name for layer in part.layers} & masks.keys()
        self.trained_vectors |= {f"{self._prefix(part)}.{name}" for name in free} & {*self._vectors}

    def close(self) -> None:
        """Free what was recorded."""
        for recorded in (*self._wanted, *self._given_dense):
            recorded.close()

    def _loss(
        self, index: int, gives: Callable[[int], Tensor], fitted: Sequence[int]
    ) -> Callable[[int], Float[Tensor, ""]]:
        """Of a window: how far what a part gives is from what it gives in the dense model."""
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
        """By parameter name inside the part: which entries may change, and the dtypes they are stored in."""
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
        if free:
            self._free_vectors(part, free, stored)
        return free, stored

    def _free_vectors(
        self, part: Part, free: dict[str, Tensor], stored: dict[str, torch.dtype]
    ) -> None:
        """Those of the part's norms and biases that may change, all of their entries."""
        prefix = self._prefix(part)
        for name, parameter in part.module.named_parameters():
            if f"{prefix}.{name}" in self._vectors:
                free[name] = torch.ones_like(parameter, dtype=torch.bool)
                stored[name] = self._vectors[f"{prefix}.{name}"][1]

    def _prefix(self, part: Part) -> str:
        """Of the part's parameters in the model, without its last dot."""
        return f"{self.block.name}.{part.name}".rstrip(".")

    @contextmanager
    def _outputs(
        self, index: int, ticker: Callable[[str, int], Callable[[int], None]]
    ) -> Iterator[Callable[[int], Tensor]]:
        """What a part gives of a window, in float32, on what it is given in the model as it is now."""
        module, block = self.parts[index].module, self.block
        samples, device = block.samples, block.device

        def again(given: Recorded) -> Callable[[int], Tensor]:
            return lambda window: given.call(module, window, device, torch.float32)

        if self.how.inputs == "dense":
            yield again(self._given_dense[index])
            return
        if self.how.granularity == BLOCK:
            # what it is given is what the walk holds
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
        """Every window through the block: what some parts heard, and what came out."""
        listener, block = Listener([self.parts[index] for index in indices]), self.block

        def one(window: int) -> tuple[list[Heard], Tensor]:
            listener.begin()
            output = block.run(window, states)
            if len(indices) == len(self.parts):
                self._order = listener.order()
            return listener.heard(), output

        with listener.listening():
            for wave in block.threads.waves(list(block.samples.active)):
                found = block.threads.run([lambda w=w: one(w) for w in wave])  # type: ignore[misc]
                for window, (heard, output) in zip(wave, found, strict=True):
                    yield window, heard, output
                tick(len(wave))


def _scales(recorded: Recorded, windows: Sequence[int]) -> Float[Tensor, " width"]:
    """Of every channel of what was recorded: one over its root mean square, float32, on the CPU.

    Every token counts as of length 1. A few channels of a hidden state may be many times larger than all
    others; where the norm that reads it has small entries there, as in Gemma, later layers see little of it.
    """
    total: Tensor | float = 0.0
    for window in windows:
        square = recorded.state(window).double().square().flatten(0, -2)
        total = total + (square / square.sum(-1, keepdim=True).clamp(min=1e-30)).sum(0).cpu()
    assert isinstance(total, Tensor)
    return (total / total.mean().clamp(min=1e-30)).clamp(min=_LEAST_OF_CHANNEL).rsqrt().float()


def _distance(found: Tensor, wanted: Tensor, loss: str) -> Float[Tensor, ""]:
    """Of two windows of states, [1, length, width], mean over the tokens."""
    if loss == COSINE:
        return 1 - nn.functional.cosine_similarity(found, wanted, dim=-1).mean()
    error, size = (found - wanted).square().sum(-1), wanted.square().sum(-1)
    if loss == SQUARE:
        return error.mean() / size.mean().clamp(min=1e-30)
    return (error / size.clamp(min=_LEAST * float(size.mean()) or 1.0)).mean()
