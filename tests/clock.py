"""A clock for tests of limits, which assert no wall-clock time."""

from __future__ import annotations


class Clock:
    """A second goes by with every look at it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now
