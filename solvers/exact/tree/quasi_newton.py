# mypy: disallow-untyped-defs=False
"""A limited-memory quasi-Newton method for smooth convex functions, some variables of which stay at 0 or up.

A step is the two-loop recursion of BFGS among the variables that may move, which are all but those at 0 that
would go below; it is taken along its projection (Bertsekas, SIAM J. Control and Optimization 20, 1982). What
is known of the curvature outlives a call, for a function that changes a little or gets further variables.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from maskopt.solvers.compiled import loop

#: part of what the slope promises that a step must bring
_ENOUGH = 1e-4
#: a step is shortened so often, to a tenth at least each time
_SHORTENED, _SHORTEST = 20, 0.1
#: a step that brings less, as part of the value, is the last
_SETTLED = 1e-9
#: least curvature along a step, in units of the square of the slope's change
_CURVED = 1e-12


class QuasiNewton:
    """What is known of the curvature of a function, and steps downhill: of the last moves the step and the
    slope's change, float64 [memory, n], as a ring, and how many were ever remembered. Variables from `free`
    on stay at 0 or above."""

    def __init__(self, free: int, memory: int) -> None:
        self.free, self.known = free, 0
        self.steps, self.changes = np.zeros((2, memory, free))

    def keep(self, chosen: np.ndarray) -> None:
        """The other variables, bool [n], are there no more."""
        self.steps, self.changes = (
            np.ascontiguousarray(x[:, chosen]) for x in (self.steps, self.changes)
        )

    def descend(
        self,
        function: Callable[[np.ndarray], tuple[float, np.ndarray]],
        x: np.ndarray,
        iterations: int,
    ) -> tuple[np.ndarray, float]:
        """At most so many steps from x, float64 [n], legal, and the value there; variables beyond those known
        are new. `function`: value and slope at x; where nothing is known of its curvature yet, a step is
        −slope."""
        new = ((0, 0), (0, len(x) - self.steps.shape[1]))
        self.steps, self.changes = np.pad(self.steps, new), np.pad(self.changes, new)
        value, slope = function(x)
        for _ in range(iterations):
            direction = np.empty(len(x))
            _downhill(x, slope, self.free, self.steps, self.changes, self.known, direction)
            found = self._search(function, x, value, slope, direction)
            if found is None:
                if not self.known:
                    break
                self.known = 0
                continue
            before = value
            step, change = found[0] - x, found[2] - slope
            x, value, slope = found
            if step @ change > _CURVED * (change @ change):
                place = self.known % len(self.steps)
                self.steps[place], self.changes[place] = step, change
                self.known += 1
            if before - value <= _SETTLED * max(abs(before), abs(value)):
                break
        return x, value

    def _search(
        self,
        function: Callable[[np.ndarray], tuple[float, np.ndarray]],
        x: np.ndarray,
        value: float,
        slope: np.ndarray,
        direction: np.ndarray,
    ) -> tuple[np.ndarray, float, np.ndarray] | None:
        """A point along the projected direction that is enough below, with value and slope; None: none."""
        step = 1.0
        for _ in range(_SHORTENED):
            trial = x + step * direction
            np.maximum(trial[self.free :], 0.0, out=trial[self.free :])
            there, slope_there = function(trial)
            along = float(slope @ (trial - x))
            if there <= value + _ENOUGH * along:
                return trial, there, slope_there
            above = there - value - along
            # the least of the parabola through what is known
            best = -along / (2 * above) if above > 0 else 0.5
            step *= min(max(best, _SHORTEST), 0.5)
        return None


@loop(nogil=True, fastmath={"reassoc", "contract"})
def _downhill(x, slope, free, steps, changes, known, direction):
    """The two-loop recursion (Nocedal and Wright, *Numerical Optimization*, algorithm 7.4) among the
    variables that may move, into `direction`."""
    n, count = len(x), min(known, len(steps))
    moves = np.zeros(n)
    for j in range(n):
        moves[j] = 1.0 if j < free or x[j] > 0 or slope[j] < 0 else 0.0
        direction[j] = -slope[j] * moves[j]
    scale = 0.0
    curved, along = np.zeros(count), np.zeros(count)
    for k in range(count):
        step, change = steps[(known - 1 - k) % len(steps)], changes[(known - 1 - k) % len(steps)]
        both = square = dot = 0.0
        for j in range(n):
            both += step[j] * change[j] * moves[j]
            square += change[j] * change[j] * moves[j]
            dot += step[j] * direction[j]
        if both <= _CURVED * square:
            continue
        if scale == 0:
            scale = both / square
        curved[k], along[k] = both, dot / both
        weight = dot / both
        for j in range(n):
            direction[j] -= weight * change[j] * moves[j]
    if scale > 0:
        for j in range(n):
            direction[j] *= scale
    for k in range(count - 1, -1, -1):
        if curved[k] == 0:
            continue
        step, change = steps[(known - 1 - k) % len(steps)], changes[(known - 1 - k) % len(steps)]
        dot = 0.0
        for j in range(n):
            dot += change[j] * direction[j]
        weight = along[k] - dot / curved[k]
        for j in range(n):
            direction[j] += weight * step[j] * moves[j]
