"""Compiled loops over rows in threads of their own.

A loop takes its arrays, then the rows that it is to work on, and releases the interpreter's lock. Rows share
nothing but what is read, so that no bit depends on how many threads there are. (Numba's own `prange` would
share a threading runtime with torch, change torch's number of threads, and take several times as long to
compile.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

#: rows of one piece at least, so that each tile of G that is brought in serves several
_LEAST = 4
#: pieces a thread at most: each costs the interpreter some time, and a slow row holds up little
_PIECES = 3

Result = TypeVar("Result")


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def one_blas_thread() -> AbstractContextManager[object]:
    """The BLAS of NumPy and SciPy on one thread. On small matrices several spin and gain nothing, and their
    last bits depend on how many there are."""
    limited: AbstractContextManager[object] = _libraries().limit(limits=1, user_api="blas")
    return limited


def in_threads(work: Callable[[int], Result], rows: Iterable[int]) -> list[Result]:
    """work(row) of all rows, in as many threads as torch has, each with one BLAS thread."""
    with one_blas_thread(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(work, rows))


class RowThreads:
    """Threads for several loops, as many as torch has by default; `least`: rows of one piece at least."""

    def __init__(self, threads: int | None = None, least: int = _LEAST) -> None:
        self.threads = threads or torch.get_num_threads()
        self._least = least
        self._pool = ThreadPoolExecutor(self.threads)

    def run(self, loop: Callable[..., None], rows: np.ndarray, *arguments: Any) -> None:
        """loop(*arguments, piece) for pieces of `rows` (int64), until all are done."""
        count = max(1, min(self.threads * _PIECES, -(-len(rows) // self._least)))
        pieces = iter(np.array_split(rows, count))

        def work() -> None:
            for piece in pieces:
                loop(*arguments, piece)

        helpers = [self._pool.submit(work) for _ in range(min(self.threads, count) - 1)]
        try:
            work()
        finally:
            wait(helpers)
        for helper in helpers:
            helper.result()
