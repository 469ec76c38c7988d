"""Compiled kernels: Numba's `njit` with a cache on disk, the notice of a compilation, and rows in threads.

A kernel over rows takes its arrays, then the rows that it is to work on, and releases the interpreter's lock.
Rows share only what is read, so that no bit depends on the number of threads. (Numba's own `prange` would
share a threading runtime with torch, change torch's number of threads, and take longer to compile.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import numba
import numpy as np
import torch
from numba.core import event
from threadpoolctl import ThreadpoolController

from maskopt.core.clock import clock

_log = logging.getLogger("maskopt.compile")
#: fewest rows of one piece, so that each tile of G that is read serves several
_LEAST_ROWS = 4
#: most pieces of a thread: each costs the interpreter some time, and a slow row holds up little
_PIECES = 3

#: the decorator of all kernels; Numba keeps their machine code beside the source, or in NUMBA_CACHE_DIR
njit: Any = partial(numba.njit, cache=True, nogil=True, no_cfunc_wrapper=True)


class _Compilation(event.Listener):
    """Reports the first compilation, and stops the clock of solvers during each."""

    def __init__(self) -> None:
        self._reported = False

    def on_start(self, event: event.Event) -> None:
        if not self._reported:
            self._reported = True
            _log.info("compiling kernels, once per installation …")
        clock.stop()

    def on_end(self, event: event.Event) -> None:
        clock.resume()


event.register("numba:compile", _Compilation())
_libraries = cache(ThreadpoolController)


def one_blas_thread() -> AbstractContextManager[object]:
    """Limit the BLAS of NumPy and SciPy to one thread.

    On small matrices several threads spin and gain nothing, and the last bits depend on their number.
    """
    limited: AbstractContextManager[object] = _libraries().limit(limits=1, user_api="blas")
    return limited


class RowThreads:
    """A pool of threads for kernels over rows: as many as torch has by default.

    Args:
        threads: their number.
        least: fewest rows of one piece.
    """

    def __init__(self, threads: int | None = None, least: int = _LEAST_ROWS) -> None:
        self.threads = threads or torch.get_num_threads()
        self._least = least
        self._pool = ThreadPoolExecutor(self.threads)

    def run(self, kernel: Callable[..., None], rows: np.ndarray, *arguments: Any) -> None:
        """Call kernel(*arguments, piece) for pieces of `rows` (int64), until all are done."""
        count = max(1, min(self.threads * _PIECES, -(-len(rows) // self._least)))
        pieces = iter(np.array_split(rows, count))

        def work() -> None:
            for piece in pieces:
                kernel(*arguments, piece)

        helpers = [self._pool.submit(work) for _ in range(min(self.threads, count) - 1)]
        try:
            work()
        finally:
            wait(helpers)
        for helper in helpers:
            helper.result()
