"""Limits of a solve, which its start, search and bound share, and its listener."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from maskopt.core.clock import clock
from maskopt.core.fields import option, options_of
from maskopt.errors import OptionError

#: more threads than any machine has cores for only exhaust the system
MOST_THREADS = 1024
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
#: keywords of `solve` and `lower_bound`, and the fields of `Limits` that they set
KEYWORDS = {
    "time_limit": "seconds",
    "memory_limit": "memory",
    "threads": "threads",
    "seed": "seed",
    "on_progress": "on_progress",
}


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
    """Limits of one solve: start, search and bound together. `begin` sets the deadline, of `clock()`.

    OptionError: a value outside its range.
    """

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
        """Start the clock; one that runs already is never set back."""
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
        """Set an earlier deadline, after `part` of the time that is left."""
        if not self.timed:
            return self
        return replace(self, deadline=clock() + part * self.left)

    def quiet(self) -> Limits:
        """Remove the listener."""
        return replace(self, on_progress=None)

    def report(
        self, done: int, total: int, step: str = "", step_done: int = 0, step_total: int = 0
    ) -> None:
        """Report progress to the listener, if there is one."""
        if self.on_progress is not None:
            self.on_progress(Progress(done, total, step, step_done, step_total))

    def counter(self, total: int) -> Callable[[], None]:
        """Make a function that threads call for each of `total` that is done; it reports their number."""
        done, lock = itertools.count(1), threading.Lock()

        def count() -> None:
            with lock:
                self.report(next(done), total)

        return count

    def bytes(self, default: int) -> int:
        """Return `memory`, or the default."""
        return default if self.memory is None else int(self.memory)


def parse_bytes(text: str) -> int:
    """Parse `8GiB`, `500MB`, `1.5g`, or a number of bytes; OptionError for anything else."""
    cleaned = text.strip().lower().removesuffix("b")
    number = cleaned.rstrip("kmgti")
    try:
        value = float(number) * _UNITS[cleaned[len(number) :].strip()]
    except (ValueError, KeyError):
        value = math.nan
    if not 0 <= value < 2**62:
        raise OptionError(f"{text!r} is no amount of memory; write 8GiB or 500MB")
    return int(value)
