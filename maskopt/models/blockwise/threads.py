"""Threads for independent pieces of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

import torch

from maskopt.core.limits import fast_products, one_thread_pool, torch_threads
from maskopt.errors import ModelError

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
