"""Run a causal LM block by block: what every block is called with, and samples through one block.

Samples run one at a time; on the CPU each on one thread of its own (`Threads`), several at once. All sums are
taken in the order of the samples, so the result does not depend on the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from maskopt.core.threads import fast_products, one_thread_pool, torch_threads
from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Blocks
from maskopt.models.architecture.source import Source
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
        done = min(done + count, total)  # other processes may have had fewer windows
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
            return [torch.no_grad()(piece)() for piece in pieces]
        with fast_products(), ExitStack() as at_the_end:
            try:
                futures = [self._pool.submit(torch.no_grad()(piece)) for piece in pieces]
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
        for start in range(0, len(items), self.count):
            wave = items[start : start + self.count]
            results = self.run([partial(function, item) for item in wave])[::-1]
            for item in wave:
                yield item, results.pop()

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            # new threads inherit the last value that any thread set: the pool's 1
            torch.set_num_threads(self.count)
        self._torch.close()


#: values that a block returns at most: hidden state, attention weights, router logits
MOST_OUTPUTS = 3
#: stands in a captured call for the hidden state
HIDDEN_STATE = object()
#: what a model raises that gets another number of values from a block than it unpacks
_MISFITS = (TypeError, ValueError, IndexError, RuntimeError, AttributeError)


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
            if leaf is HIDDEN_STATE:
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
    source: Source,
    tokens: Tensor,
    threads: Threads,
    samples: Sequence[int],
    activation_folder: Callable[[int], Path | None],
) -> Captured:
    """Run all before the blocks, and record how each block is called, without its weights.

    Args:
        tokens: int64 [all samples, length]; `samples` are those of this process.
        activation_folder: given the bytes of their hidden states, where to keep them (None: memory).
    """
    model, blocks, device = source.model, source.blocks, source.device
    local = threading.local()

    def records(last: bool, state: Any, args: Any, kwargs: Any) -> Any:
        local.calls.append((state, args, kwargs))
        if last:
            raise _LastBlock
        # a new tensor, so that no other argument is mistaken for the hidden state
        return state.clone()

    def record(sample: int, outputs: int) -> list[tuple[Tensor, Any, Any]]:
        local.calls, local.outputs = [], outputs
        with suppress(_LastBlock):
            model(input_ids=tokens[sample : sample + 1].to(device), use_cache=False)
        if len(local.calls) != len(blocks):
            raise ModelError(
                f"{len(local.calls)} of the {len(blocks)} blocks in {blocks.name} are called"
            )
        shape = getattr(local.calls[0][0], "shape", None)
        for state, _, _ in local.calls:
            if not isinstance(state, Tensor) or state.shape != shape:
                raise ModelError("the blocks do not pass on one hidden state of one shape")
        return local.calls

    with _replaced(blocks, records, local):
        probe = partial(_fitting, model, lambda outputs: (record(0, outputs)[0][0], outputs))
        [(first, outputs)] = threads.run([probe])
        folder = activation_folder(first.nbytes * len(samples))
        states = Activations(samples, first.shape, first.dtype, folder, lanes_to(device))
        calls: list[dict[int, Call]] = [{} for _ in blocks.modules]
        for sample, recorded in threads.each(lambda s: record(s, outputs), samples):
            states[sample] = recorded[0][0]
            merge_calls(calls, recorded, sample)
    return Captured(states, calls, outputs)


@contextmanager
def ending(source: Source, outputs: int) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """What a model does after its blocks: a function of token ids [1, length] and the last block's output [1,
    length, width] that returns the logits [1, length, vocabulary]. The model itself is called, with blocks
    that return their input, and a last one that returns that output."""
    model, blocks = source.model, source.blocks
    local = threading.local()

    def end(tokens: Tensor, state: Tensor) -> Tensor:
        def logits(outputs: int) -> Tensor:
            local.state, local.outputs = state, outputs
            found: Tensor = model(input_ids=tokens, use_cache=False).logits
            if len(blocks) == 1 and found.shape[:-1] != tokens.shape:
                raise ValueError(f"logits of shape {list(found.shape)}")
            return found

        # `capture` stops in the last block: with a single one it cannot see what the model unpacks
        return _fitting(model, logits) if len(blocks) == 1 else logits(outputs)

    with _replaced(blocks, lambda last, state, *_: local.state if last else state, local):
        yield end


def _fitting(model: nn.Module, run: Callable[[int], T]) -> T:
    """`run` with the number of values that the model unpacks from a block; 0: a bare tensor."""
    problems = []
    for outputs in range(MOST_OUTPUTS + 1):
        try:
            return run(outputs)
        except ModelError as error:
            problems.append(str(error))
        except _MISFITS as error:
            problems.append(f"{type(error).__name__}: {error}")
    raise ModelError(f"{type(model).__name__} cannot be run block by block: {problems[0]}")


@contextmanager
def _replaced(
    blocks: Blocks, stand_in: Callable[[bool, Any, Any, Any], Any], local: threading.local
) -> Iterator[None]:
    """Each block returns what `stand_in` makes of its call: whether it is the last one, its hidden state, and
    all of its arguments; in a tuple of `local.outputs`, the others None, unless that is 0."""

    def forward(index: int, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("hidden_states")
        state = stand_in(index == len(blocks) - 1, given, args, kwargs)
        return (state, *[None] * (local.outputs - 1)) if local.outputs else state

    with forwards((block, partial(forward, i)) for i, block in enumerate(blocks.modules)):
        yield


@contextmanager
def forwards(pairs: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Context in which modules have other forward functions."""
    with ExitStack() as changed:
        for module, forward in pairs:
            module.forward = forward
            changed.callback(module.__dict__.pop, "forward", None)
        yield


def merge_calls(
    calls: list[dict[int, Call]], recorded: list[tuple[Tensor, Any, Any]], sample: int
) -> None:
    """Add one sample's calls; calls equal to those of the first sample are shared with it."""
    compared: dict[tuple[int, int], bool] = {}
    for of_block, (state, args, kwargs) in zip(calls, recorded, strict=True):
        leaves, spec = tree_flatten((args, kwargs), is_leaf=_is_cache)
        leaves = [None if _is_cache(x) else HIDDEN_STATE if x is state else x for x in leaves]
        call = Call(leaves, spec)
        first = next(iter(of_block.values()), call)
        same = len(first.leaves) == len(leaves) and all(
            _equal(a, b, compared) for a, b in zip(first.leaves, leaves, strict=True)
        )
        of_block[sample] = first if same else call


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
