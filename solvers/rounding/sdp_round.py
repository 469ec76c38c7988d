"""The semidefinite relaxation as a mask: round its solution, then swap.

The bound `sdp` relaxes p = (1 + z)/2 to inner products ⟨vᵢ, v₀⟩. Pruning the s inputs of largest ⟨vᵢ, v₀⟩ in
each group gives a start from which `swap` ends better than from scores; the bound is that of the same
computation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.protocol.bounds import lower_bound
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities, Solver
from maskopt.protocol.trace import Stopwatch, Trace
from maskopt.solvers.greedy.select import keep_highest
from maskopt.solvers.rounding.relax import finished

#: part of a time limit that the bound takes at most; the swaps have the rest
_BOUND_SHARE = 0.8


@dataclass(frozen=True)
class SdpRound(Solver):
    """Relax, round, swap to 1-swap optimality, in seconds a row at n = 1000; never worse than a start."""

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
        watch = Stopwatch(problem.rows)
        bound = lower_bound(
            problem, "sdp", sweeps=self.sweeps, limits=limits.share(_BOUND_SHARE).quiet()
        )
        mask = keep_highest(problem, -bound.trace.relaxed.to(problem.device))
        nothing = torch.full((problem.rows,), torch.nan, dtype=torch.float64)
        trace = Trace(
            iterations=bound.trace.iterations,
            relaxed_objective=nothing,
            relaxed_gap=nothing,
            relax_seconds=watch.lap(),
        )
        known = bound.value, bound.certificate
        return finished(problem, mask, start, limits, trace, self.refine, *known)
