"""Blockwise training: the kept weights of a block are trained, part by part, towards the dense block.

While the block has its dense weights, the outputs of its parts in the dense model are recorded as targets.
Once its layers are pruned, each part in turn, or the block as a whole, is trained on its inputs in the pruned
model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer, Part, parts_of
from maskopt.models.architecture.loading import merged
from maskopt.models.blockwise.activations import Activations
from maskopt.models.blockwise.collect import IN_DENSE
from maskopt.models.blockwise.forward import Call, HiddenState, merge_calls
from maskopt.models.blockwise.job import Block
from maskopt.models.checkpoints.report import PartReport
from maskopt.models.options.training import ALL, BLOCK, CHANNELS, COSINE, SQUARE, Reconstruction
from maskopt.models.training.trainer import Task, train

#: of a part that cannot be trained by itself
_WHOLE = "and cannot be trained by itself; take `training` granularity=block"
#: lower limit of a token's mean square, relative to that of its window's targets
_LEAST = 1e-6
#: lower limit of a channel's mean square, relative to that of all channels
_LEAST_OF_CHANNEL = 1e-3


class Targets:
    """The parts of an open block, and their outputs in the dense model.

    Attributes:
        trained_layers, trained_vectors: names of the layers, and of the norms and biases, that were trained.

    Args:
        folder: for files of hidden states, where those of the walk are in one.
    """

    def __init__(self, block: Block, how: Reconstruction, seed: int, folder: Path) -> None:
        self.block, self.how = block, how
        self.folder = folder if self.block.samples.states.in_file else None
        self.parts = [Part("", block.module, block.layers)]
        if how.granularity != BLOCK:
            self.parts = parts_of(block.module, f"{block.name}.", block.layers)
        source = block.job.source
        #: norms and biases that may change: the stored tensor and its dtype by name
        self._vectors = dict(source.vectors(block.index)) if how.train == ALL else {}
        self._stored = source.stored_dtype
        self.trained_layers: set[str] = set()
        self.trained_vectors: set[str] = set()
        self._seed = seed * 1_000_003 + block.index
        self._order = list(range(len(self.parts)))
        self._wanted = [self._recorded() for _ in self.parts]
        self._given_dense = [self._recorded() for _ in self.parts]

    def _recorded(self) -> Recorded:
        return Recorded(self.block.samples.count, self.folder)

    def record(self) -> None:
        """Record the outputs of the dense block, and replace the dense states by them."""
        dense = self.block.samples.dense
        assert dense is not None
        for window, heard, output in self._passes(range(len(self.parts)), dense, "targets"):
            if not bool(torch.isfinite(output).all()):
                self.block.samples.leave_out(window, self.block.name + IN_DENSE)
                continue
            for index, one in enumerate(heard):
                self._wanted[index].put(window, one.output)
                if self.how.inputs == "dense":
                    self._given_dense[index].put_call(window, one)
            dense[window] = output
        self.block.dense_advanced = True

    def train(self, masks: Mapping[str, tuple[Layer, Tensor]]) -> Iterator[PartReport]:
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
            with self._outputs(index) as gives:
                name, remedy = part.name or "a block", "leave its layers out with `exclude`"
                loss = self._loss(index, gives, fitted)
                task = Task(
                    name, remedy, part.module, free, stored, loss, fitted, held, fitted, self.how
                )
                generator = torch.Generator().manual_seed((self._seed + number) % 2**63)
                tick = self.block.ticker(
                    f"train {part.name}".rstrip(), self.how.epochs * len(fitted)
                )
                found = train(task, self.block.threads, generator, tick)
            if found.epoch:
                self.trained_layers |= {layer.name for layer in part.layers} & masks.keys()
                prefix = self._prefix(part)
                self.trained_vectors |= {f"{prefix}.{name}" for name in free} & {*self._vectors}
            losses = (found.before.fitted, found.after.fitted, found.before.held, found.after.held)
            seconds = time.perf_counter() - began
            yield PartReport(
                self.block.index, part.name, *losses, found.epoch, found.diverged, seconds
            )

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
        mine = {layer.name: masks[layer.name] for layer in part.layers if layer.name in masks}
        dtypes = {layer.parameter: self._stored(layer) for layer, _ in mine.values()}
        for place, mask in merged(self.block.model, mine, False).items():
            name = names[id(self.block.model.get_parameter(place))]
            free[name], stored[name] = mask.to(self.block.device), dtypes[place]
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
    def _outputs(self, index: int) -> Iterator[Callable[[int], Tensor]]:
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
            for window, heard, _ in self._passes([index], samples.states, "inputs"):
                given.put_call(window, heard[0])
            yield again(given)
        finally:
            given.close()

    def _passes(
        self, indices: Sequence[int], states: Activations, stage: str
    ) -> Iterator[tuple[int, list[Heard], Tensor]]:
        """Send every window through the block: the calls of some parts, and the block's output."""
        listener, block = Listener([self.parts[index] for index in indices]), self.block
        tick = self.block.ticker(stage, len(block.samples.active))

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


@dataclass(frozen=True)
class Heard:
    """One call of a part."""

    state: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


class Listener:
    """While it is `listening`, the calls and outputs of some parts in a pass, by thread."""

    def __init__(self, parts: Sequence[Part], remedy: str = _WHOLE) -> None:
        self.parts, self._remedy = parts, remedy
        self._local = threading.local()

    @contextmanager
    def listening(self) -> Iterator[None]:
        handles = []
        try:
            for index, part in enumerate(self.parts):
                before, after = self._hooks(index)
                handles.append(part.module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(part.module.register_forward_hook(after))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self) -> None:
        """A pass begins on this thread."""
        self._local.calls = {}
        self._local.outputs = {}

    def heard(self) -> list[Heard]:
        """The calls of this thread's last pass, by part; ModelError for a part not called once."""
        calls, outputs = self._local.calls, self._local.outputs
        for index, part in enumerate(self.parts):
            if (times := len(calls.get(index, ()))) != 1:
                raise ModelError(
                    f"{part.name or 'a block'} is called {times} times in a pass, {self._remedy}"
                )
        return [
            Heard(state, args, kwargs, outputs[index])
            for index, ((state, args, kwargs),) in sorted(calls.items())
        ]

    def order(self) -> list[int]:
        """The parts' indices in the order of the calls on this thread."""
        return list(self._local.calls)

    def _hooks(self, index: int) -> tuple[Any, Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            state = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(state, Tensor):
                raise ModelError(
                    f"{type(module).__name__} is called without a hidden state, {self._remedy}"
                )
            # the model may change its own input in place
            kept = state.clone()
            args = tuple(kept if value is state else value for value in args)
            kwargs = {name: kept if value is state else value for name, value in kwargs.items()}
            self._local.calls.setdefault(index, []).append((kept, args, kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._local.outputs[index] = first(output).clone()

        return before, after


def first(output: Any) -> Tensor:
    """The hidden state in a module's return value."""
    found = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(found, Tensor):
        raise ModelError("a part of a block does not return a hidden state")
    return found


def called(part: nn.Module, call: Call, state: Tensor) -> Tensor:
    """A part's output for a hidden state, in the state's precision."""

    def as_given(leaf: Any) -> Any:
        if leaf is HiddenState:
            return state
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(state.dtype) if floating else leaf

    args, kwargs = tree_unflatten([as_given(leaf) for leaf in call.leaves], call.spec)
    return first(part(*args, **kwargs))


class Recorded:
    """Calls or outputs of a part with so many windows; in memory, or in files in `folder`."""

    def __init__(self, windows: int, folder: Path | None) -> None:
        self._windows, self._folder = windows, folder
        self._states: Activations | None = None
        self._calls: list[dict[int, Call]] = [{}]

    def put(self, window: int, state: Tensor) -> None:
        """Keep a state; all are of one shape."""
        if self._states is None:
            self._states = Activations(range(self._windows), state.shape, state.dtype, self._folder)
        self._states[window] = state

    def put_call(self, window: int, heard: Heard) -> None:
        """Keep a call with its hidden state; arguments equal in several windows are kept once."""
        self.put(window, heard.state)
        merge_calls(self._calls, [(heard.state, heard.args, heard.kwargs)], window)

    def state(self, window: int) -> Tensor:
        """The kept state."""
        assert self._states is not None
        return self._states[window]

    def call(
        self, part: nn.Module, window: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """The part's output of the same call, in a precision."""
        return called(part, self._calls[0][window], self.state(window).to(device, dtype))

    def close(self) -> None:
        """Free what it holds."""
        if self._states is not None:
            self._states.close()


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
