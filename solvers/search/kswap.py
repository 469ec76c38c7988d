# mypy: disallow-untyped-defs=False
"""Beyond one exchange: compounds of two 1-swaps, exact among candidates.

Write a 1-swap of kept u against pruned q as the step d = e_u − e_q of p. Two steps on four different inputs,
made together, change f by

    Δ(d₁) + Δ(d₂) + 2 d₁ᵀQd₂,     d₁ᵀQd₂ = Q_{u₁u₂} − Q_{u₁q₂} − Q_{q₁u₂} + Q_{q₁q₂}

so that both may be bad alone and good together. All pairs of candidates² steps are tried: for an unstructured
row of the kept of least a and the pruned of least b, for N:M of least Δ inside any group. Rounds alternate
with 1-swap search until neither finds anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities, Solver
from maskopt.protocol.trace import Stopwatch, Trace
from maskopt.solvers.compiled import RowThreads, loop, part
from maskopt.solvers.shared_budget import proven, statuses
from maskopt.solvers.swap import Swap
from maskopt.solvers.swap.engine import Batch
from maskopt.solvers.swap.literal import refresh

#: compound moves of a row between two 1-swap searches
_MOVES_A_ROUND = 64
#: rows between two looks at the clock, of 16 candidates; the others take as long together
_TILE = 128
#: what c may take while it is computed
_REFRESH_BYTES = 2**28
# no reference is counted: arrays belong to the callers, and nothing is allocated
_part = part(_nrt=False)


@dataclass(frozen=True)
class KSwap(Solver):
    """2-swap local search among candidates, ending at proven 1-swap optima, never above the start. A row that
    is SWAP_OPTIMAL, and not stopped by the time limit, has no improving compound of candidates either."""

    name: ClassVar[str] = "kswap"
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=("cpu",),
        start="needed",
        default_start="swap",
        proves="1-swap",
        note="compounds of two exchanges, exact among candidates",
    )

    candidates: int = option(
        16,
        "K kept and K pruned inputs, or for N:M K² exchanges, that are combined; time goes with K⁴",
        least=2,
        most=64,
    )

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        assert start is not None
        state = _State(problem, start)
        state.descend(torch.arange(problem.rows), limits)
        threads = RowThreads()
        tile = max(threads.threads, min(_TILE, _TILE * 16**4 // self.candidates**4))
        active = torch.arange(problem.rows)
        while len(active) and not limits.expired:
            moved = [
                state.compound(part, self.candidates, threads)
                for part in active.split(tile)
                if not limits.expired
            ]
            active = torch.cat(moved)
            state.descend(active, limits)
            settled = int(state.settled.sum())
            limits.report(settled, problem.rows, "rounds", int(state.rounds.max()))
        return state.solution()


class _State:
    """Where the rows stand."""

    def __init__(self, problem: LayerProblem, start: Tensor) -> None:
        rows = problem.rows
        self.problem, self.mask = problem, start.clone()
        self.start_objective = problem.objective(start)
        self.objective = self.start_objective.clone()
        self.proven = torch.zeros(rows, dtype=torch.bool)
        #: rows without an improving compound of candidates
        self.settled = torch.zeros(rows, dtype=torch.bool)
        self.moves, self.swaps, self.rounds = torch.zeros(3, rows, dtype=torch.int64)
        self.history: list[Tensor] = []
        self.watch = Stopwatch(rows)
        self.search_seconds, self.swap_seconds = torch.zeros(2, rows, dtype=torch.float64)

    def descend(self, rows: Int[Tensor, " some"], limits: Limits) -> None:
        """1-swap search of some rows."""
        if len(rows):
            found = Swap().run(self.problem.take(rows), self.mask[rows], limits.quiet())
            self.mask[rows], self.objective[rows] = found.mask, found.objective
            self.proven[rows] = proven(found)
            self.swaps[rows] += found.trace.swaps
        self.history.append(self.objective.clone())
        self.swap_seconds += self.watch.lap()

    def compound(
        self, rows: Int[Tensor, " some"], candidates: int, threads: RowThreads
    ) -> Int[Tensor, " moved"]:
        """Make compounds that improve in some rows, until none is left or a round is full; returns the rows
        that changed."""
        batch, made = Batch.of(self.problem.take(rows), self.mask[rows]), torch.zeros_like(rows)
        every = torch.arange(len(rows))
        refresh(batch, every, _REFRESH_BYTES)
        arrays = [x.numpy() for x in (batch.x, batch.gram, batch.kept, batch.c)]
        plan = batch.group, candidates, batch.threshold().numpy(), _MOVES_A_ROUND
        threads.run(search_rows, every.numpy(), *arrays, *plan, made.numpy())
        self.mask[rows] = batch.kept
        self.moves[rows] += made
        self.rounds[rows] += 1
        self.settled[rows] = made == 0
        self.search_seconds += self.watch.lap()
        return rows[made > 0]

    def solution(self) -> Solution:
        trace = Trace(
            moves=self.moves,
            swaps=self.swaps,
            rounds=self.rounds,
            start_objective=self.start_objective,
            search_seconds=self.search_seconds,
            swap_seconds=self.swap_seconds,
            history=torch.stack(self.history, 1),
            stopped=tuple("no" if settled else "yes" for settled in self.settled.tolist()),
        )
        status = statuses(self.proven)
        return Solution.of(self.problem, self.mask, status=status, trace=trace)


def search_rows(x, gram, kept, c, group, candidates, threshold, most, made, rows):
    """Make improving compounds in some rows until none is left or a row has made `most`; see `made`.

    Args:
        x, c, threshold: float64, as in `maskopt.solvers.swap.engine`.
        kept: bool [rows, n], changed in place.
        candidates: K of unstructured rows; K² steps of grouped ones.
        made: int64 [rows], how many compounds there were.
        rows: int64.
    """
    work = (
        np.empty((2, candidates), np.int64), np.empty((2, candidates)),  # chosen, prices
        np.empty((2, candidates**2), np.int64), np.empty(candidates**2),  # steps, deltas
    )  # fmt: skip
    _search_rows(x, gram, kept, c, group, threshold, most, made, work, rows)


@_part
def _price(x, gram, c, j, kept):
    """a of a kept input, b of a pruned one."""
    own = x[j] * x[j] * gram[j, j]
    return own + 2 * x[j] * c[j] if kept else own - 2 * x[j] * c[j]


@_part
def _least(x, gram, kept, c, side, chosen, values):
    """The inputs of one side with the least price, ascending, ties by index; how many."""
    count = 0
    for j in range(x.shape[0]):
        if kept[j] != side:
            continue
        value = _price(x, gram, c, j, side)
        if count == len(chosen) and value >= values[count - 1]:
            continue
        at = count if count < len(chosen) else count - 1
        while at > 0 and values[at - 1] > value:
            chosen[at], values[at] = chosen[at - 1], values[at - 1]
            at -= 1
        chosen[at], values[at] = j, value
        count = min(count + 1, len(chosen))
    return count


@_part
def _exchanges(x, gram, kept, c, work):
    """All exchanges of the kept of least a with the pruned of least b. → how many"""
    chosen, values, steps, deltas = work
    count = drop = keep = 0
    for side in range(2):  # the pruned, then the kept
        drop, keep = keep, _least(x, gram, kept, c, side == 1, chosen[side], values[side])
    for i in range(keep):
        for k in range(drop):
            u, q = chosen[1, i], chosen[0, k]
            steps[0, count], steps[1, count] = u, q
            deltas[count] = values[1, i] + values[0, k] - 2 * x[u] * x[q] * gram[u, q]
            count += 1
    return count


@_part
def _group_steps(x, gram, kept, c, group, work):
    """The legal steps of least Δ over all groups, ascending. → how many"""
    steps, deltas = work[2], work[3]
    count = 0
    for i in range(x.shape[0]):
        if not kept[i]:
            continue
        a = _price(x, gram, c, i, kept[i])
        first = i // group * group
        for q in range(first, first + group):
            if kept[q]:
                continue
            delta = a + _price(x, gram, c, q, kept[q]) - 2 * x[i] * x[q] * gram[i, q]
            if count == len(deltas) and delta >= deltas[count - 1]:
                continue
            at = count if count < len(deltas) else count - 1
            while at > 0 and deltas[at - 1] > delta:
                steps[0, at], steps[1, at] = steps[0, at - 1], steps[1, at - 1]
                deltas[at] = deltas[at - 1]
                at -= 1
            steps[0, at], steps[1, at], deltas[at] = i, q, delta
            count = min(count + 1, len(deltas))
    return count


@_part
def _best_compound(x, gram, steps, deltas, count, threshold):
    """The pair of steps on four different inputs that lowers f most, or (−1, −1)."""
    best = -threshold
    first = second = -1
    for i in range(count):
        u, q = steps[0, i], steps[1, i]
        for k in range(i):
            v, r = steps[0, k], steps[1, k]
            if u == v or q == r:
                continue
            cross = x[u] * (x[v] * gram[u, v] - x[r] * gram[u, r])
            cross -= x[q] * (x[v] * gram[q, v] - x[r] * gram[q, r])
            delta = deltas[i] + deltas[k] + 2 * cross
            if delta < best:
                best, first, second = delta, i, k
    return first, second


@_part
def _search_row(x, gram, kept, c, group, threshold, most, work):
    """Compounds of one row. → how many"""
    steps, deltas = work[2], work[3]
    for move in range(most):
        if group == x.shape[0]:
            count = _exchanges(x, gram, kept, c, work)
        else:
            count = _group_steps(x, gram, kept, c, group, work)
        first, second = _best_compound(x, gram, steps, deltas, count, threshold)
        if first < 0:
            return move
        for step in (first, second):
            u, q = steps[0, step], steps[1, step]
            kept[u], kept[q] = False, True
            for j in range(x.shape[0]):
                c[j] += x[u] * gram[u, j] - x[q] * gram[q, j]
    return most


@loop(nogil=True, _nrt=False)
def _search_rows(x, gram, kept, c, group, threshold, most, made, work, rows):
    for row in rows:
        made[row] = _search_row(x[row], gram, kept[row], c[row], group, threshold[row], most, work)
