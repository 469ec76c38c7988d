"""The semidefinite relaxation as a mask: round its solution, then swap.

The bound `sdp` (maskopt.lower_bound) relaxes p = (1 + z)/2 to inner products ⟨vᵢ, v₀⟩. Pruning the s
inputs of largest ⟨vᵢ, v₀⟩ in each group gives a start from which `swap` ends better than from scores, and
the same computation gives the bound: mask and certificate at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from maskopt.bounds import lower_bound
from maskopt.problem import LayerProblem
from maskopt.solution import Solution, Status
from maskopt.solver import Capabilities
from maskopt.solvers.greedy.select import keep_highest
from maskopt.solvers.swap import SwapSolver


class SdpSolver:
    """Seconds a row at n of a thousand; takes no start of its own, keeps a better one."""

    name = "sdp"
    capabilities = Capabilities(
        proves="1-swap", note="semidefinite relaxation, rounded, then swap; the tightest bound"
    )
    default_warm_start: str | None = None

    def unavailable(self) -> str | None:
        return None

    def solve(
        self,
        problem: LayerProblem,
        *,
        warm_start: Tensor | None = None,
        sweeps: int | None = None,
        refine: bool = True,
        time_limit: float | None = None,
        memory_limit: int | None = None,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Solution:
        """Relax, round, swap to 1-swap optimality.

        Args:
            warm_start: a mask that the answer must not be worse than.
            sweeps, seed: of the coordinate descent (see the bound `sdp`).
            refine: end with `swap` (else the rounded mask, FEASIBLE).
            time_limit: seconds; the bound takes four fifths of them at most.
            memory_limit: handed to `swap`.
            on_progress: called with (rows done, rows), during the swaps.

        `trace`: bound_seconds, rounded_objective, swaps, and what the bound has to tell (`bound`).
        """
        began = time.monotonic()
        limit = None if time_limit is None else 0.8 * time_limit
        bound = lower_bound(problem, "sdp", sweeps=sweeps, seed=seed, time_limit=limit)
        bound_seconds = time.monotonic() - began
        relaxed = bound.trace.pop("relaxed").to(problem.device)
        mask = keep_highest(problem, -relaxed)
        rounded = problem.objective(mask)
        if warm_start is not None:
            better = problem.objective(warm_start) < rounded
            mask = torch.where(better[:, None], warm_start, mask)
        status: Status | tuple[Status, ...] = Status.FEASIBLE
        swaps = torch.zeros(problem.rows, dtype=torch.int64)
        if refine:
            left = math.inf if time_limit is None else began + time_limit - time.monotonic()
            refined = SwapSolver().solve(
                problem,
                warm_start=mask,
                time_limit=None if left == math.inf else max(0.0, left),
                memory_limit=memory_limit,
                on_progress=on_progress,
            )
            mask, status, swaps = refined.mask, refined.status, refined.trace["swaps"]
        return Solution.of(
            problem,
            mask,
            solver=self.name,
            status=status,
            lower_bound=bound.value,
            seconds=time.monotonic() - began,
            trace={
                "bound_seconds": bound_seconds,
                "rounded_objective": rounded,
                "swaps": swaps,
                "bound": bound.trace,
            },
            certificate=bound.certificate,
        )
