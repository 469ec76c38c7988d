"""Parts of a decoder block: what each is called with and what it gives, window by window.

A part is a module that the block calls once in a pass: its attention, its MLP, or the block itself. It is
found by structure (a child of the block that holds layers), and called again as the model called it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer
from maskopt.models.blockwise.activations import Activations
from maskopt.models.blockwise.forward import Call, HiddenState, merge_calls


@dataclass(frozen=True)
class Part:
    """A module and the layers in it.

    Attributes:
        name: inside the block; empty: the block itself.
    """

    name: str
    module: nn.Module
    layers: Sequence[Layer]


def parts_of(block: nn.Module, prefix: str, layers: Sequence[Layer]) -> list[Part]:
    """The children of a block that hold any of the layers.

    Args:
        prefix: of the block's parameters in the model, with its last dot.
    """
    found = []
    for name, child in block.named_children():
        mine = [layer for layer in layers if layer.parameter.startswith(f"{prefix}{name}.")]
        if mine:
            found.append(Part(name, child, mine))
    return found


@dataclass(frozen=True)
class Heard:
    """One call of a part."""

    state: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


class Listener:
    """While it is `listening`, what some parts are called with and what they give in a pass, by thread."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
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
        """Of the pass that has ended on this thread, part by part in the order of the parts.

        Raises:
            ModelError: a part that was not called once.
        """
        calls, outputs = self._local.calls, self._local.outputs
        for index, part in enumerate(self.parts):
            if len(calls.get(index, ())) != 1:
                raise ModelError(
                    f"{part.name or 'a block'} is called {len(calls.get(index, ()))} times in a pass, and "
                    "cannot be trained by itself; take `training` granularity=block"
                )
        found = []
        for index in range(len(self.parts)):
            state, args, kwargs = calls[index][0]
            found.append(Heard(state, args, kwargs, outputs[index]))
        return found

    def order(self) -> list[int]:
        """The parts' places as the pass on this thread called them."""
        return list(self._local.calls)

    def _hooks(self, index: int) -> tuple[Any, Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            state = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(state, Tensor):
                raise ModelError(
                    f"{type(module).__name__} is called without a hidden state, and cannot be trained by "
                    "itself; take `training` granularity=block"
                )
            # what the model itself is given may be changed in place on the way
            kept = state.clone()
            args = tuple(kept if value is state else value for value in args)
            kwargs = {name: kept if value is state else value for name, value in kwargs.items()}
            self._local.calls.setdefault(index, []).append((kept, args, kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._local.outputs[index] = first(output).clone()

        return before, after


def first(output: Any) -> Tensor:
    """Of what a module returns, the hidden state."""
    found = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(found, Tensor):
        raise ModelError("a part of a block does not return a hidden state")
    return found


def called(part: nn.Module, call: Call, state: Tensor) -> Tensor:
    """What a part gives of a hidden state, called so, in the state's precision."""

    def as_given(leaf: Any) -> Any:
        if leaf is HiddenState:
            return state
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(state.dtype) if floating else leaf

    args, kwargs = tree_unflatten([as_given(leaf) for leaf in call.leaves], call.spec)
    return first(part(*args, **kwargs))


class Recorded:
    """What a part is called with, of all windows; or what it gave.

    Args:
        windows: how many the model has in all.
        folder: for files of hidden states; None keeps them in memory.
    """

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
        """Keep a call with its hidden state; what windows are called alike with is kept once."""
        self.put(window, heard.state)
        merge_calls(self._calls, [(heard.state, heard.args, heard.kwargs)], window)

    def state(self, window: int) -> Tensor:
        """As it was kept."""
        assert self._states is not None
        return self._states[window]

    def call(
        self, part: nn.Module, window: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """The part's output, called again as it was, in a precision."""
        return called(part, self._calls[0][window], self.state(window).to(device, dtype))

    def close(self) -> None:
        """Free what it holds."""
        if self._states is not None:
            self._states.close()
