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

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities, Solver
from maskopt.protocol.trace import Stopwatch, Trace
from maskopt.solvers.parallel import RowThreads
from maskopt.solvers.shared_budget.transfer import proven, statuses
from maskopt.solvers.swap import Swap
from maskopt.solvers.swap.batch import Batch
from maskopt.solvers.swap.literal import refresh

#: compound moves of a row between two 1-swap searches
_MOVES_A_ROUND = 64
#: rows between two looks at the clock, of 16 candidates; the others take as long together
_TILE = 128
#: what c may take while it is computed
_REFRESH_BYTES = 2**28


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
        """Make one round of compound moves in some rows; returns the rows that changed."""
        kept, made = compound_moves(self.problem.take(rows), self.mask[rows], candidates, threads)
        self.mask[rows] = kept
        self.moves[rows] += made
        self.rounds[rows] += 1
        self.settled[rows] = made == 0
        self.proven[rows] &= made == 0
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


def compound_moves(
    problem: LayerProblem, mask: Tensor, candidates: int, threads: RowThreads
) -> tuple[Bool[Tensor, "rows n"], Int[Tensor, " rows"]]:
    """Masks after compounds that improve, until none is left or a round is full; and the number of moves."""
    from maskopt.solvers.search.kswap_kernel import search_rows

    batch = Batch.of(problem, mask)
    rows, made = torch.arange(batch.rows), torch.zeros(batch.rows, dtype=torch.int64)
    refresh(batch, rows, _REFRESH_BYTES)
    batch.add_linear(rows)
    arrays = [x.numpy() for x in (batch.x, batch.gram, batch.kept, batch.c)]
    plan = batch.group, candidates, batch.threshold().numpy(), _MOVES_A_ROUND
    threads.run(search_rows, rows.numpy(), *arrays, *plan, made.numpy())
    return batch.kept, made
