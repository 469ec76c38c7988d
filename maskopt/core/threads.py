"""Threads and matrix products of torch, and worker processes that end with their parent."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, TypeVar

import torch

_ALLOWED = "medium"
#: relative error of a product in float32, 3e-7 as measured, and not in bfloat16, 3e-3
_PRECISE = 1e-5
_products_lock, _products_users, _precision_before = threading.Lock(), 0, ""

Part = TypeVar("Part")


@cache
def end_with(parent: int) -> None:
    """End this process when its parent has ended, since a killed parent stops no worker."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def torch_threads(threads: int | None) -> Iterator[int]:
    """Set the number of torch's threads (None: unchanged) and reset it afterwards.

    It is also reset where a compiled loop that shares torch's threading runtime changed it.
    """
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def threads_on(device: torch.device) -> int:
    """Return the number of threads for work on single rows: that of torch on the CPU, elsewhere 1."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def one_thread_pool(threads: int) -> ThreadPoolExecutor:
    """Make a pool of threads with one thread inside torch each.

    Products that two threads share may differ in their last bits from those of one. Threads that start
    afterwards inherit the 1, until `torch.set_num_threads`.
    """
    return ThreadPoolExecutor(threads, initializer=_one_thread_inside)


def _one_thread_inside() -> None:
    # on its first use in a thread torch sets the number that any thread set last: let that happen before
    torch.get_num_threads()
    torch.set_num_threads(1)


def one_thread_each(work: Callable[[int], Part], count: int, threads: int) -> list[Part]:
    """Return work(0) … work(count − 1), each computed with one thread inside torch."""
    before = torch.get_num_threads()
    try:
        with one_thread_pool(threads) as pool:
            return list(pool.map(work, range(count)))
    finally:
        torch.set_num_threads(before)


def fast_products() -> AbstractContextManager[Any]:
    """Let float32 products on the CPU take the faster of torch's libraries, if that is as precise.

    torch multiplies with MKL, which on an AMD EPYC with AVX-512 is less than half as fast as oneDNN, at the
    same error. It uses oneDNN only where it may round to bfloat16
    (`torch.set_float32_matmul_precision("medium")`); a product shows first whether oneDNN rounds here. The
    setting is the process's, and is reset once all users are out. Nothing changes where there is an
    accelerator, whose products would be rounded, or where the setting was made by torch's newer means.
    """
    return _allowed() if _precise() else nullcontext()


@contextmanager
def _allowed() -> Iterator[bool]:
    """Allow rounded products; yields False, and changes nothing, where newer means made the setting."""
    global _products_users, _precision_before
    entered = True
    with _products_lock:
        if not _products_users:
            try:
                _precision_before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision(_ALLOWED)
            except RuntimeError:
                entered = False
        _products_users += entered
    try:
        yield entered
    finally:
        with _products_lock:
            _products_users -= entered
            if entered and not _products_users:
                torch.set_float32_matmul_precision(_precision_before)


@cache
def _precise() -> bool:
    """Return whether float32 products stay exact on this machine where rounding to bfloat16 is allowed."""
    if torch.accelerator.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    # independent of torch's default dtype and generator
    like: dict[str, Any] = {"generator": generator, "dtype": torch.float32}
    left, right = torch.randn(256, 256, **like), torch.randn(256, 256, **like)
    exact = left.double() @ right.double()
    with _allowed() as entered:
        error = (left @ right - exact).norm() / exact.norm()
    return entered and float(error) < _PRECISE
