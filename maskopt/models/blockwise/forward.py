"""Run a causal LM block by block: what every block is called with, and samples through one block.

Samples run one at a time; on the CPU each on one thread of its own (`Threads`), several at once. All sums are
taken in the order of the samples, so the result does not depend on the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from maskopt.core.limits import fast_products, one_thread_pool, torch_threads
from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Blocks
from maskopt.models.blockwise.activations import Activations, lanes_to
from maskopt.models.checkpoints.report import LayerReport


@dataclass(frozen=True)
class BlockProgress:
    """`done` of `total` samples or layers of a stage of a block; `layer`: one that is done."""

    block: int
    blocks: int
    stage: str
    done: int
    total: int
    layer: LayerReport | None = None


OnBlockProgress = Callable[[BlockProgress], None]


#: called with a number of samples or layers that are done, and the report of a layer
Tick = Callable[..., None]


def ticker(report: OnBlockProgress, block: int, blocks: int, stage: str, total: int) -> Tick:
    """Report that a stage begins; the result is called with what is done of it."""
    done = 0

    def tick(count: int, layer: LayerReport | None = None, /) -> None:
        nonlocal done
        done += count
        report(BlockProgress(block, blocks, stage, done, total, layer))

    report(BlockProgress(block, blocks, stage, 0, total))
    return tick


T = TypeVar("T")
Item = TypeVar("Item")


class Threads:
    """Runs pieces of work in order: on the CPU on `count` threads, on a GPU one by one."""

    def __init__(self, device: torch.device, count: int) -> None:
        self.count = count if device.type == "cpu" else 1
        self._pool: ThreadPoolExecutor | None = None
        self._torch = ExitStack()
        if device.type == "cpu":
            self._torch.enter_context(torch_threads(self.count))
            self._pool = one_thread_pool(self.count)

    def run(self, pieces: Sequence[Callable[[], T]]) -> list[T]:
        if self._pool is None:
            return [_without_grad(piece) for piece in pieces]
        with fast_products(), ExitStack() as at_the_end:
            try:
                futures = [self._pool.submit(_without_grad, piece) for piece in pieces]
            except RuntimeError as error:  # "can't start new thread"
                raise ModelError(
                    f"the system does not start {self.count} threads ({error}); ask for fewer `threads`"
                ) from error
            for future in futures:
                at_the_end.callback(future.cancel)
            return [future.result() for future in futures]

    def each(
        self, function: Callable[[Item], T], items: Sequence[Item]
    ) -> Iterator[tuple[Item, T]]:
        """The items with their results, several at a time; a result that was taken is freed."""
        for wave in self.waves(items):
            results = self.run([partial(function, item) for item in wave])[::-1]
            for item in wave:
                yield item, results.pop()

    def waves(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        """The items, as many at a time as run at once."""
        for start in range(0, len(items), self.count):
            yield items[start : start + self.count]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            # new threads inherit the last value that any thread set: the pool's 1
            torch.set_num_threads(self.count)
        self._torch.close()

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _without_grad(piece: Callable[[], T]) -> T:
    with torch.no_grad():
        return piece()


#: values that a block returns at most: hidden state, attention weights, router logits
MOST_OUTPUTS = 3
#: what a model raises that gets another number of values from a block than it unpacks
_MISFITS = (TypeError, ValueError, IndexError, RuntimeError, AttributeError)


class HiddenState:
    """Stands in a captured call for the hidden state."""


class _LastBlock(Exception):
    """Stops a forward pass once every block has been called."""


@dataclass(frozen=True, eq=False)
class Call:
    """All arguments of one block's call, but for the hidden state."""

    leaves: list[Any]
    spec: Any

    def __call__(self, block: nn.Module, state: Tensor, *, cast: bool = False) -> Tensor:
        """The block's output hidden state; `cast`: other arguments in the precision of the state."""

        def given(leaf: Any) -> Any:
            if leaf is HiddenState:
                return state
            floating = cast and isinstance(leaf, Tensor) and leaf.is_floating_point()
            return leaf.to(state.dtype) if floating else leaf

        leaves = [given(leaf) for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        output = block(*args, **kwargs)
        if isinstance(output, tuple | list):
            output = output[0]
        if not isinstance(output, Tensor) or output.shape != state.shape:
            raise ModelError(f"{type(block).__name__} does not return its hidden state")
        return output


class Captured(NamedTuple):
    """What the blocks of a model are called with, for every sample.

    Attributes:
        states: the input of block 0, per sample.
        calls: per block, by sample; samples with equal calls share one `Call`.
        outputs: how many values the model unpacks from a block; 0 where it takes a bare tensor.
    """

    states: Activations
    calls: list[dict[int, Call]]
    outputs: int


def capture(
    model: nn.Module,
    blocks: Blocks,
    tokens: Tensor,
    threads: Threads,
    device: torch.device,
    samples: Sequence[int],
    activation_folder: Callable[[int], Path | None] = lambda _: None,
) -> Captured:
    """Run all before the blocks, and record how each block is called, without its weights.

    Args:
        tokens: int64 [all samples, length]; `samples` are those of this process.
        activation_folder: given the bytes of their hidden states, where to keep them (None: memory).
    """
    recorders = _Recorders(model, blocks, device)
    with _replaced(blocks, recorders.recorder):
        [first] = threads.run([lambda: recorders.probe(tokens[:1])])
        state = first[0][0]
        size = state.nbytes * len(samples)
        folder = activation_folder(size)
        states = Activations(samples, state.shape, state.dtype, folder, lanes_to(device))
        calls: list[dict[int, Call]] = [{} for _ in blocks.modules]
        for sample, recorded in threads.each(
            lambda s: recorders.record(tokens[s : s + 1]), samples
        ):
            states[sample] = recorded[0][0]
            merge_calls(calls, recorded, sample)
    return Captured(states, calls, recorders.outputs)


@contextmanager
def ending(
    model: nn.Module, blocks: Blocks, outputs: int
) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """What a model does after its blocks: a function of token ids [1, length] and the last block's output [1,
    length, width] that returns the logits [1, length, vocabulary]. The model itself is called, with blocks
    that return their input, and a last one that returns that output."""
    local = threading.local()
    # `capture` stops in the last block: with a single one it cannot see what the model unpacks
    counts = range(MOST_OUTPUTS + 1) if len(blocks) == 1 else (outputs,)

    def stand_in(index: int) -> Callable[..., Any]:
        def passes_on(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs.get("hidden_states")
            passed = local.state if index == len(blocks) - 1 else given
            return _returned(passed, local.outputs)

        return passes_on

    def end(tokens: Tensor, state: Tensor) -> Tensor:
        local.state, problem = state, ""
        for local.outputs in counts:
            try:
                logits: Tensor = model(input_ids=tokens, use_cache=False).logits
            except _MISFITS as error:
                if len(counts) == 1:
                    raise
                problem = problem or f"{type(error).__name__}: {error}"
            else:
                if len(counts) == 1 or logits.shape[:-1] == tokens.shape:
                    return logits
        raise ModelError(f"{type(model).__name__} cannot be run block by block: {problem}")

    with _replaced(blocks, stand_in):
        yield end


@contextmanager
def _replaced(blocks: Blocks, stand_in: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Each block with another forward function, by its index."""
    try:
        for index, block in enumerate(blocks.modules):
            block.forward = stand_in(index)
        yield
    finally:
        for block in blocks.modules:
            block.__dict__.pop("forward", None)


class _Recorders:
    """Stand-ins for the blocks, which record their calls."""

    def __init__(self, model: nn.Module, blocks: Blocks, device: torch.device) -> None:
        self.model, self.blocks, self.device = model, blocks, device
        self.local = threading.local()
        self.outputs = 0

    def recorder(self, index: int) -> Callable[..., Any]:
        def records(*args: Any, **kwargs: Any) -> Any:
            state: Any = args[0] if args else kwargs.get("hidden_states")
            self.local.calls.append((state, args, kwargs))
            if index == len(self.blocks) - 1:
                raise _LastBlock
            # a new tensor, so that no other argument is mistaken for the hidden state
            return _returned(state.clone(), self.outputs)

        return records

    def probe(self, tokens: Tensor) -> list[tuple[Tensor, Any, Any]]:
        """Find out what the model expects blocks to return: a tensor, or a tuple that begins with it."""
        problems = []
        for self.outputs in range(MOST_OUTPUTS + 1):
            try:
                calls = self.record(tokens)
            except ModelError as error:
                problems.append(str(error))
            except _MISFITS as error:
                problems.append(f"{type(error).__name__}: {error}")
            else:
                return calls
        raise ModelError(f"{type(self.model).__name__} cannot be run block by block: {problems[0]}")

    def record(self, tokens: Tensor) -> list[tuple[Tensor, Any, Any]]:
        self.local.calls = []
        with suppress(_LastBlock):
            self.model(input_ids=tokens.to(self.device), use_cache=False)
        calls = self.local.calls
        if len(calls) != len(self.blocks):
            raise ModelError(
                f"{len(calls)} of the {len(self.blocks)} blocks in {self.blocks.name} are called"
            )
        shape = getattr(calls[0][0], "shape", None)
        for state, _, _ in calls:
            if not isinstance(state, Tensor) or state.shape != shape:
                raise ModelError("the blocks do not pass on one hidden state of one shape")
        return calls


def _returned(state: Any, outputs: int) -> Any:
    """A block's return value; None for all but the hidden state (attention weights)."""
    return (state, *[None] * (outputs - 1)) if outputs else state


def merge_calls(
    calls: list[dict[int, Call]], recorded: list[tuple[Tensor, Any, Any]], sample: int
) -> None:
    """Add one sample's calls; calls equal to those of the first sample are shared with it."""
    compared: dict[tuple[int, int], bool] = {}
    for block, (state, args, kwargs) in enumerate(recorded):
        kwargs = {k: None if _is_cache(v) else v for k, v in kwargs.items()}
        args = tuple(None if _is_cache(v) else v for v in args)
        leaves, spec = tree_flatten((args, kwargs))
        leaves = [HiddenState if leaf is state else leaf for leaf in leaves]
        if calls[block]:
            first = next(iter(calls[block].values()))
            if len(first.leaves) == len(leaves) and all(
                _equal(a, b, compared) for a, b in zip(first.leaves, leaves, strict=True)
            ):
                calls[block][sample] = first
                continue
        calls[block][sample] = Call(leaves, spec)


def _equal(a: Any, b: Any, compared: dict[tuple[int, int], bool]) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        key = (id(a), id(b))
        if key not in compared:
            same = a.shape == b.shape and a.dtype == b.dtype
            compared[key] = same and bool(torch.equal(a, b))
        return compared[key]
    return type(a) is type(b) and isinstance(a, bool | int | float | str) and a == b


def _is_cache(value: Any) -> bool:
    return any(kind.__name__ in ("Cache", "DynamicCache") for kind in type(value).__mro__)
