"""The semidefinite relaxation as a mask: round its solution, then swap.

The bound `sdp` (maskopt.lower_bound) relaxes p = (1 + z)/2 to inner products ⟨vᵢ, v₀⟩. Pruning the s
inputs of largest ⟨vᵢ, v₀⟩ in each group gives a start from which `swap` ends better than from scores, and
the same computation gives the bound: mask and certificate at once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.protocol.bounds import lower_bound
from maskopt.protocol.solution import Solution, Status
from maskopt.protocol.solver import Capabilities, Solver
from maskopt.protocol.trace import Trace, shared_out
from maskopt.solvers.greedy.select import keep_highest
from maskopt.solvers.rounding.relax import better, swapped

#: part of a time limit that the bound takes at most; the swaps have the rest
_BOUND_SHARE = 0.8


@dataclass(frozen=True)
class SdpRound(Solver):
    """Relax, round, swap to 1-swap optimality: seconds a row at n of a thousand.

    A start is a mask that the answer is never worse than. Reports a `Trace`.
    """

    name: ClassVar[str] = "sdp"
    capabilities: ClassVar[Capabilities] = Capabilities(
        start="optional",
        proves="1-swap",
        note="semidefinite relaxation, rounded, then swap; the tightest bound",
    )

    sweeps: int | None = option(
        None, "passes of coordinate descent (see the bound `sdp`)", unit="passes", least=1
    )
    refine: bool = option(True, "end with 1-swap search (else the rounded mask, FEASIBLE)")

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        """See `Solver.run`."""
        began = time.monotonic()
        bound = lower_bound(
            problem, "sdp", sweeps=self.sweeps, limits=limits.share(_BOUND_SHARE).quiet()
        )
        bound_seconds = time.monotonic() - began
        assert bound.trace.relaxed is not None
        mask = keep_highest(problem, -bound.trace.relaxed.to(problem.device))
        # of a mask that is the answer the objective is computed anyway, and once is enough
        rounded = problem.objective(mask) if self.refine or start is not None else None
        status: Status | tuple[Status, ...] = Status.FEASIBLE
        swaps = torch.zeros(problem.rows, dtype=torch.int64)
        if self.refine:
            mask, status, swaps = swapped(problem, mask, start, limits)
        elif start is not None:
            mask = better(problem, mask, start)
        assert bound.trace.iterations is not None
        solution = Solution.of(
            problem, mask, status=status, lower_bound=bound.value, certificate=bound.certificate
        )
        nothing = torch.full((problem.rows,), torch.nan, dtype=torch.float64)
        trace = Trace(
            iterations=bound.trace.iterations,
            relaxed_objective=nothing,
            relaxed_gap=nothing,
            rounded_objective=solution.objective if rounded is None else rounded,
            swaps=swaps,
            relax_seconds=shared_out(bound_seconds, problem.rows),
            swap_seconds=shared_out(time.monotonic() - began - bound_seconds, problem.rows),
        )
        return replace(solution, trace=trace)
