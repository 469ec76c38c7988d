"""Calls and outputs of parts of a decoder block, window by window. A part is a module that the block calls
once in a pass: its attention, its MLP, or the block itself; its calls can be repeated."""

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
from maskopt.models.architecture.blocks import Part
from maskopt.models.blockwise.activations import Activations
from maskopt.models.blockwise.forward import Call, HiddenState, merge_calls


@dataclass(frozen=True)
class Heard:
    """One call of a part."""

    state: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


class Listener:
    """While it is `listening`, the calls and outputs of some parts in a pass, by thread."""

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
        """The calls of this thread's last pass, by part; ModelError for a part not called once."""
        calls, outputs = self._local.calls, self._local.outputs
        for index, part in enumerate(self.parts):
            if (times := len(calls.get(index, ()))) != 1:
                raise ModelError(
                    f"{part.name or 'a block'} is called {times} times in a pass, and "
                    "cannot be trained by itself; take `training` granularity=block"
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
                    f"{type(module).__name__} is called without a hidden state, and cannot be trained by "
                    "itself; take `training` granularity=block"
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
