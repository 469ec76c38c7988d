"""Limits of a solve, and its listener: of start, search and bound together; threads, products, processes."""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch

from maskopt.core.fields import option, options_of
from maskopt.errors import OptionError

#: more threads than any machine has cores for only exhaust the system
MOST_THREADS = 1024
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_ALLOWED = "medium"
#: relative error of a product in float32, 3e-7 as measured, and not in bfloat16, 3e-3
_PRECISE = 1e-5
_products_lock, _products_users, _precision_before = threading.Lock(), 0, ""


Part = TypeVar("Part")
#: what a keyword of `solve` or `lower_bound` sets in `Limits`
KEYWORDS = {
    "time_limit": "seconds",
    "memory_limit": "memory",
    "threads": "threads",
    "seed": "seed",
    "on_progress": "on_progress",
}


class _Clock:
    """Seconds of `time.monotonic()` without compilation, which counts neither as `seconds` of a solution nor
    towards a time limit."""

    def __init__(self) -> None:
        self._lock, self._depth = threading.Lock(), 0
        #: seconds of compilation so far, and when the one under way began
        self._compiled: tuple[float, float | None] = 0.0, None

    def __call__(self) -> float:
        before, since = self._compiled
        return (time.monotonic() if since is None else since) - before

    def stop(self) -> None:
        """Stop the clock until `resume` was called as often as `stop`, in any thread."""
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._compiled = self._compiled[0], time.monotonic()

    def resume(self) -> None:
        """Let the clock run again."""
        with self._lock:
            self._depth -= 1
            before, since = self._compiled
            if self._depth == 0 and since is not None:
                self._compiled = before + time.monotonic() - since, None


clock = _Clock()


@dataclass(frozen=True)
class Progress:
    """`done` of `total` rows, and `step_done` of `step_total` (0: not counted) of a named step."""

    done: int
    total: int
    step: str = ""
    step_done: int = 0
    step_total: int = 0


@dataclass(frozen=True)
class Limits:
    """Limits of one solve, start, search and bound together; `begin` sets the deadline, of `clock()`.
    OptionError: a value outside its range."""

    seconds: float | None = option(
        None, "wall-clock time, after which a solver ends its step and returns its best", least=0
    )
    memory: int | str | None = option(
        None,
        'bytes beyond weight and G, or "2GiB", by the number of rows at a time; None: a default',
        least=1,
    )
    threads: int | None = option(
        None,
        "on the CPU; None: as many as torch uses. Results do not depend on it",
        least=1,
        most=MOST_THREADS,
    )
    seed: int = option(0, "of everything random", least=0, most=2**63 - 1)
    on_progress: Callable[[Progress], None] | None = option(None, "called with a `Progress`")
    deadline: float = math.inf

    def __post_init__(self) -> None:
        if isinstance(self.memory, str):
            object.__setattr__(self, "memory", parse_bytes(self.memory))
        if self.seconds == math.inf:
            object.__setattr__(self, "seconds", None)
        called = {name: f"`{keyword}`" for keyword, name in KEYWORDS.items()}
        for known in options_of(Limits):
            value = known.checked(getattr(self, known.name), called[known.name])
            object.__setattr__(self, known.name, value)

    def begin(self) -> Limits:
        """The same with the clock running. A clock that runs already is never set back."""
        if self.seconds is None:
            return self
        return replace(self, deadline=min(self.deadline, clock() + self.seconds))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"deadline": self.left}  # the clock of another process is another one

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, deadline=state["deadline"] + clock())

    @property
    def timed(self) -> bool:
        return self.deadline < math.inf

    @property
    def left(self) -> float:
        """Seconds until the deadline, at least 0; ∞ without one."""
        return max(0.0, self.deadline - clock())

    @property
    def expired(self) -> bool:
        return clock() >= self.deadline

    def share(self, part: float) -> Limits:
        """The same with an earlier deadline, after `part` of what is left."""
        if not self.timed:
            return self
        return replace(self, deadline=clock() + part * self.left)

    def quiet(self) -> Limits:
        """The same without a listener."""
        return replace(self, on_progress=None)

    def report(
        self, done: int, total: int, step: str = "", step_done: int = 0, step_total: int = 0
    ) -> None:
        """Tell the listener, where there is one."""
        if self.on_progress is not None:
            self.on_progress(Progress(done, total, step, step_done, step_total))

    def counter(self, total: int) -> Callable[[], None]:
        """A function for threads to call when one of `total` is done, which reports how many are."""
        done, lock = itertools.count(1), threading.Lock()

        def count() -> None:
            with lock:
                self.report(next(done), total)

        return count

    def bytes(self, default: int) -> int:
        """`memory`, or the default."""
        return default if self.memory is None else int(self.memory)


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
    """The number of torch's threads (None: unchanged), reset afterwards, also where a compiled loop that
    shares torch's threading runtime changed it."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def threads_on(device: torch.device) -> int:
    """For work on single rows: as many threads as torch has on the CPU, elsewhere 1."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def one_thread_pool(threads: int) -> ThreadPoolExecutor:
    """Threads with one thread inside torch each: products that two threads share may differ in their last
    bits from those of one. (Threads started afterwards inherit the 1, until `torch.set_num_threads`.)"""
    return ThreadPoolExecutor(threads, initializer=_one_thread_inside)


def _one_thread_inside() -> None:
    # on its first use in a thread torch sets the number that any thread set last: let that happen before
    torch.get_num_threads()
    torch.set_num_threads(1)


def one_thread_each(work: Callable[[int], Part], count: int, threads: int) -> list[Part]:
    """work(0 … count − 1), each with one thread inside torch."""
    before = torch.get_num_threads()
    try:
        with one_thread_pool(threads) as pool:
            return list(pool.map(work, range(count)))
    finally:
        torch.set_num_threads(before)


def fast_products() -> AbstractContextManager[Any]:
    """Within it float32 products on the CPU take the faster of torch's libraries, if that is as precise.

    torch multiplies with MKL, which on an AMD EPYC with AVX-512 is less than half as fast as oneDNN, at the
    same error. It uses oneDNN only where it may round to bfloat16
    (`torch.set_float32_matmul_precision("medium")`); a product shows first whether oneDNN rounds here. The
    setting is the process's, and is reset once all users are out. Nothing changes where there is an
    accelerator, whose products would be rounded, or where the setting was made by torch's newer means.
    """
    return _allowed() if _precise() else nullcontext()


@contextmanager
def _allowed() -> Iterator[bool]:
    """Products may be rounded; yields False, and changes nothing, where newer means made the setting."""
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
    """Are float32 products that may be rounded to bfloat16 not rounded here?"""
    if torch.accelerator.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    # whatever torch makes numbers of where nothing is said
    like: dict[str, Any] = {"generator": generator, "dtype": torch.float32}
    left, right = torch.randn(256, 256, **like), torch.randn(256, 256, **like)
    exact = left.double() @ right.double()
    with _allowed() as entered:
        error = (left @ right - exact).norm() / exact.norm()
    return entered and float(error) < _PRECISE


def parse_bytes(text: str) -> int:
    """`8GiB`, `500MB`, `1.5g`, or a number of bytes; OptionError for anything else."""
    cleaned = text.strip().lower().removesuffix("b")
    number = cleaned.rstrip("kmgti")
    try:
        value = float(number) * _UNITS[cleaned[len(number) :].strip()]
    except (ValueError, KeyError):
        value = math.nan
    if not 0 <= value < 2**62:
        raise OptionError(f"{text!r} is no amount of memory; write 8GiB or 500MB")
    return int(value)
