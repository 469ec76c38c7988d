"""The clock of solvers, which stands still while loops are compiled."""

from __future__ import annotations

import threading
import time


class _Clock:
    """Seconds without compilation, which counts neither for a solution nor towards a time limit."""

    def __init__(self) -> None:
        self._lock, self._depth = threading.Lock(), 0
        #: seconds of past compilations, and the start of the current one
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
