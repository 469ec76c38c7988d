"""Threads that run independent pieces of work, with results in the order of the pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import torch

from maskopt.core.limits import one_thread_pool, torch_threads
from maskopt.core.products import fast_products
from maskopt.errors import ModelError

T = TypeVar("T")


class Threads:
    """Runs independent pieces of work; results come in the order of the pieces.

    Args:
        device: on a GPU pieces run one after the other.
        count: threads on the CPU, each with one thread inside torch; what the caller itself runs
            meanwhile gets as many.
    """

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
        with fast_products():
            return self._results(pieces)

    def _results(self, pieces: Sequence[Callable[[], T]]) -> list[T]:
        assert self._pool is not None
        try:
            futures = [self._pool.submit(_without_grad, piece) for piece in pieces]
        except RuntimeError as error:  # "can't start new thread"
            raise ModelError(
                f"the system does not start {self.count} threads ({error}); ask for fewer `threads`"
            ) from error
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

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
