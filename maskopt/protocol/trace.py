"""What a solver has to tell beside its masks: one typed record per family, always per row.

A quantity has the same name in every record. A field is a tensor whose first axis counts rows, a tuple with
one word a row, or a single word that holds for all rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Trace:
    """Nothing to tell: one pass over a score."""

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended a row's search: its answer is the best that was known by then."""
        return False

    def columns(self, rows: int) -> dict[str, list[Any]]:
        """The fields that hold one value a row, as lists of Python numbers and words."""
        found: dict[str, list[Any]] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.ndim == 1:
                found[field.name] = value.tolist()
            elif isinstance(value, str):
                found[field.name] = [value] * rows
            elif isinstance(value, tuple):
                found[field.name] = list(value)
        return found

    def joined(self, parts: Sequence[Self]) -> Self:
        """All rows of a layer, of what one solver told of its parts, this one among them."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            values = [getattr(part, field.name) for part in parts]
            first = values[0]
            if isinstance(first, Tensor):
                found[field.name] = torch.cat(_of_one_width(values))
            else:
                words = isinstance(first, tuple)
                found[field.name] = tuple(w for v in values for w in v) if words else first
        return type(self)(**found)

    def taken(self, rows: Tensor) -> Self:
        """Of some rows of a layer, by their indices, in their order."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value = value[rows]
            elif isinstance(value, tuple):
                value = tuple(value[row] for row in rows.tolist())
            found[field.name] = value
        return type(self)(**found)


def _of_one_width(parts: Sequence[Tensor]) -> list[Tensor]:
    """Histories of different lengths: each stays where it ended."""
    if parts[0].ndim == 1:
        return list(parts)
    most = max(part.shape[1] for part in parts)
    return [torch.cat([x, x[:, -1:].expand(-1, most - x.shape[1])], 1) for x in parts]


@dataclass(frozen=True)
class SwapTrace(Trace):
    """1-swap search.

    Attributes:
        kernel: what did the steps.
        swaps: made.
        scans: exact scans over all pairs, the proof included.
        rounds: of candidates.
        pairs: whose Δ the scans had to form.
        history: float64 [rows, rounds + 1], the objective at the start and after each round of
            search and scan; of rows that trade, after the 1-swap search of each round of trades.
        trades: inputs that rows gave to others or took from them; None where rows do not trade.
    """

    kernel: str
    swaps: Int[Tensor, " rows"]
    scans: Int[Tensor, " rows"]
    rounds: Int[Tensor, " rows"]
    pairs: Int[Tensor, " rows"]
    history: Float[Tensor, "rows rounds"]
    trades: Int[Tensor, " rows"] | None = None


@dataclass(frozen=True)
class SearchTrace(Trace):
    """Searches beyond one swap: tabu, memetic, kswap, portfolio.

    Attributes:
        moves: made beyond 1-swap search (kswap: compounds of two; memetic on refitted weights: swaps of the
            children); None for a portfolio.
        swaps: of the 1-swap searches in between and at the end; None for a portfolio.
        rounds: of moves, generations, or members that were run.
        start_objective: float64, of the mask that the search began with.
        search_seconds, swap_seconds: the row's share of the wall-clock time that the moves, and the
            1-swap searches, took.
        history: float64 [rows, rounds], the best objective after each round (tabu, memetic: in float32
            accuracy, but of refitted weights; memetic begins with the start and the first pool), each 1-swap
            search of kswap, or each member of a portfolio.
        winner: the member of a portfolio whose mask the row has, or `start`.
        stopped: whether the row was stopped by the time limit: `yes` or `no`; of a portfolio also
            `interrupted`, in a member that Ctrl-C ended.
    """

    moves: Int[Tensor, " rows"] | None = None
    swaps: Int[Tensor, " rows"] | None = None
    rounds: Int[Tensor, " rows"] | None = None
    start_objective: Float[Tensor, " rows"] | None = None
    search_seconds: Float[Tensor, " rows"] | None = None
    swap_seconds: Float[Tensor, " rows"] | None = None
    history: Float[Tensor, "rows rounds"] | None = None
    winner: tuple[str, ...] | None = None
    stopped: tuple[str, ...] | None = None

    @property
    def interrupted(self) -> bool:
        return "interrupted" in (self.stopped or ())


@dataclass(frozen=True)
class RelaxTrace(Trace):
    """A relaxation that is rounded: relax, sdp, frank_wolfe.

    Attributes:
        iterations: steps or sweeps of the relaxation.
        relaxed_objective: float64, f of the relaxed point; NaN where there is none.
        relaxed_gap: float64, of the bound to it, relative.
        rounded_objective: float64, of the rounded point, before any swap.
        swaps: made afterwards.
        relax_seconds, swap_seconds: the row's share of the wall-clock time of each phase.
    """

    iterations: Int[Tensor, " rows"]
    relaxed_objective: Float[Tensor, " rows"]
    relaxed_gap: Float[Tensor, " rows"]
    rounded_objective: Float[Tensor, " rows"]
    swaps: Int[Tensor, " rows"]
    relax_seconds: Float[Tensor, " rows"]
    swap_seconds: Float[Tensor, " rows"]


@dataclass(frozen=True)
class TreeTrace(Trace):
    """Exact search: scip, branch, gurobi, highs, exhaustive.

    Attributes:
        ended: the backend's own word for how it ended (`optimal`, `timelimit`, …).
        nodes: of the tree, or masks that were enumerated.
        root_bound: float64, the bound before branching; NaN where it is not told.
        relaxations: convex programs solved in the tree; −1 where it is not told.
        convexified: nodes that had a semidefinite relaxation of their own; −1 where it is not told.
        search_seconds: of wall-clock time, of this row alone.
        message: empty, or what went wrong.
    """

    ended: tuple[str, ...]
    nodes: Int[Tensor, " rows"]
    root_bound: Float[Tensor, " rows"]
    relaxations: Int[Tensor, " rows"]
    convexified: Int[Tensor, " rows"]
    search_seconds: Float[Tensor, " rows"]
    message: tuple[str, ...]

    @property
    def interrupted(self) -> bool:
        return any(word in ("userinterrupt", "interrupted") for word in self.ended)


@dataclass(frozen=True)
class CycleTrace(Trace):
    """DSnoT.

    Attributes:
        swaps: weights regrown and pruned.
    """

    swaps: Int[Tensor, " rows"]


@dataclass(frozen=True)
class SplittingTrace(Trace):
    """ADMM.

    Attributes:
        iterations: until a row's support stood still, or a limit came.
    """

    iterations: Int[Tensor, " rows"]


@dataclass(frozen=True)
class EliminationTrace(Trace):
    """OBS.

    Attributes:
        rounds: panels that were eliminated; 0 where the time was over before the row's turn.
    """

    rounds: Int[Tensor, " rows"]


@dataclass(frozen=True)
class BoundTrace(Trace):
    """How a lower bound was found.

    Attributes:
        iterations: steps or sweeps; −1 where it is not told.
        correction: float64, loss to the correction that makes A ⪰ 0, as part of the bound; NaN
            where there was none.
        cuts: triangle inequalities in the certificate.
        cut_correction: the same of the bound with cuts; NaN where the plain one is kept.
        shifted: `yes` where the row uses the common diagonal shift.
        printed: float64, what a conic solver printed (not a bound); NaN where there is none.
        relaxed: float64 [rows, n], the relaxed point, 1 = pruned.
    """

    iterations: Int[Tensor, " rows"] | None = None
    correction: Float[Tensor, " rows"] | None = None
    cuts: Int[Tensor, " rows"] | None = None
    cut_correction: Float[Tensor, " rows"] | None = None
    shifted: tuple[str, ...] | None = None
    printed: Float[Tensor, " rows"] | None = None
    relaxed: Float[Tensor, "rows n"] | None = None


def shared_out(seconds: float, rows: int) -> Float[Tensor, " rows"]:
    """The time of a batch as each row's share, float64 [rows]."""
    return torch.full((rows,), seconds / max(rows, 1), dtype=torch.float64)


def trace_arrays(trace: Trace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The words of a trace (for a JSON header) and its tensors, by field."""
    words: dict[str, Any] = {"kind": type(trace).__name__}
    tensors: dict[str, Any] = {}
    for field in dataclasses.fields(trace):
        value = getattr(trace, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value.cpu().numpy()
        elif value is not None:
            words[field.name] = list(value) if isinstance(value, tuple) else value
    return words, tensors


def trace_from(words: dict[str, Any], tensors: dict[str, Tensor]) -> Trace:
    """Inverse of `trace_arrays`; the empty `Trace` for a kind that is not defined here."""
    kinds: Sequence[type[Trace]] = Trace.__subclasses__()
    kind = next((k for k in kinds if k.__name__ == words.get("kind")), Trace)
    names = {field.name for field in dataclasses.fields(kind)}
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in words.items() if k in names}
    return kind(**lists, **{k: v for k, v in tensors.items() if k in names})
