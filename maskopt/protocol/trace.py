"""The record that a solver or a bound returns with its result, always per row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.core.clock import clock


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The course of a search. Each solver fills in the fields that apply to it; the others are None.

    A field is a tensor whose first axis counts rows, a tuple with one word a row, or a single word for all
    rows.

    Attributes:
        kernel: `swap`: the kernel of the steps.
        swaps: made by 1-swap search, or (dsnot) weights regrown and pruned.
        scans: exact scans over all pairs, the proof included.
        pairs: whose Δ the scans had to form.
        transfers: inputs that rows of a shared budget passed to each other.
        moves: beyond 1-swap search (memetic with updated weights: swaps of the children).
        rounds: of candidates (swap), of moves or generations (searches), of eliminated panels (obs).
        history: float64 [rows, rounds], the best objective after each round, or (swap) the objective at the
            start and after each round of search and scan; of a shared budget after each round between rows.
            tabu, memetic: in float32 accuracy unless weights are updated; memetic begins with the start and
            the first pool.
        start_objective: float64, of the mask that the search began with.
        stopped: whether the time limit stopped the row: `yes` or `no`.
        iterations: steps or sweeps of a relaxation or of ADMM; −1 where unknown.
        relaxed_objective: float64, f of the relaxed point; relaxed_gap: of the bound to it, relative; NaN:
            none.
        relax_seconds, swap_seconds, search_seconds: the row's share of the wall-clock time of each phase; of
            an exact search, of this row alone.
        ended: the word of an exact search for how it ended (`optimal`, `timelimit`, …).
        nodes: of the tree, or masks that were enumerated.
        root_bound: float64, the bound before branching; NaN where unknown.
        relaxations, convexified: convex programs solved in the tree, and nodes with a semidefinite relaxation
            of their own; −1 where unknown.
        message: empty, or an error.
        correction: float64, the cost of the correction that makes A ⪰ 0, as part of the bound; NaN without
            one.
        cuts: triangle inequalities in the certificate.
        shifted: `yes` where the row uses the common diagonal shift.
        relaxed: float64 [rows, n], the relaxed point, 1 = pruned.
    """

    kernel: Any = None
    swaps: Any = None
    scans: Any = None
    pairs: Any = None
    transfers: Any = None
    moves: Any = None
    rounds: Any = None
    history: Any = None
    start_objective: Any = None
    stopped: Any = None
    iterations: Any = None
    relaxed_objective: Any = None
    relaxed_gap: Any = None
    relax_seconds: Any = None
    swap_seconds: Any = None
    search_seconds: Any = None
    ended: Any = None
    nodes: Any = None
    root_bound: Any = None
    relaxations: Any = None
    convexified: Any = None
    message: Any = None
    correction: Any = None
    cuts: Any = None
    shifted: Any = None
    relaxed: Any = None

    @property
    def interrupted(self) -> bool:
        """True if Ctrl-C ended a row's search: the result is the best mask known by then."""
        return not {"interrupted", "userinterrupt"}.isdisjoint(self.ended or ())

    def columns(self, rows: int) -> dict[str, list[Any]]:
        """Return the fields that hold one value a row, as lists of Python numbers and words."""
        lists: dict[str, list[Any]] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.ndim == 1:
                lists[field.name] = value.tolist()
            elif value is not None and not isinstance(value, Tensor):
                lists[field.name] = [value] * rows if isinstance(value, str) else list(value)
        return lists


class Stopwatch:
    """The wall-clock time of a batch of rows, as the share of each row."""

    def __init__(self, rows: int) -> None:
        self._rows, self._began = rows, clock()

    def lap(self) -> Float[Tensor, " rows"]:
        """Return the seconds since the last lap, or the start, float64 [rows]."""
        began, self._began = self._began, clock()
        share = (self._began - began) / max(self._rows, 1)
        return torch.full((self._rows,), share, dtype=torch.float64)
