"""Relax, harden, round, swap.

The relaxation is `convex.box`; its steps end under a growing concave term, which bends the relaxed solution
towards a mask. Hardening from the first step on (`max_iterations=0`, as the start of another solver) gives
masks as good as after a full relaxation, but no bound.

The bound is that of Frank–Wolfe, f(x) + min_v ∇f(x)ᵀ(v − x), in float64 with a margin for rounding and for
what a float32 G lacks to be semidefinite: valid at any x, which is the solution's certificate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.certificates.certificate import Certificate
from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.errors import OptionError
from maskopt.protocol.solution import Solution, Status, relative_gap
from maskopt.protocol.solver import Capabilities, Solver
from maskopt.protocol.trace import Stopwatch, Trace
from maskopt.solvers.convex.box import BoxPlan, provable, relax_box
from maskopt.solvers.greedy.select import keep_highest
from maskopt.solvers.swap import Swap


@dataclass(frozen=True)
class Relax(Solver):
    """Relax all rows at once, harden, round, and swap to 1-swap optimality. The answer is never worse than a
    start. When the time is over the relaxation stops, is rounded, and the swaps have what is left."""

    name: ClassVar[str] = "relax"
    capabilities: ClassVar[Capabilities] = Capabilities(
        start="optional",
        proves="1-swap",
        shared_budget=True,
        apart=True,
        note="relaxation by ADMM, hardened, rounded, then swap; gives a lower bound",
    )

    tolerance: float = option(
        0.01,
        "stop when the Frank–Wolfe gap, averaged over the rows, is at most this; measured every 20 steps",
        unit="part of the relaxed objective",
        least=0,
    )
    max_iterations: int | None = option(
        None,
        "steps at most; 0: harden at once, and give no bound; None: 200, or 0 as another solver's start",
        unit="steps",
        least=0,
    )
    harden: int = option(
        20,
        "further steps under the growing concave term; 0 rounds the relaxed point",
        unit="steps",
        least=0,
    )
    hardness: float = option(0.85, "θ at the end", least=0, below=1)
    refine: bool | None = option(
        None,
        "end with 1-swap search (else the rounded mask, FEASIBLE); None: yes, but not as another "
        "solver's start",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._steps + self.harden < 1:
            raise OptionError("relax: max_iterations and harden must not both be 0")

    def as_start(self, layer: LayerProblem) -> tuple[Relax, LayerProblem]:
        """Whoever starts from the rounded mask swaps by itself and has no use for the bound."""
        steps = 0 if self.max_iterations is None else self.max_iterations
        less = replace(self, max_iterations=steps, refine=bool(self.refine))
        return less, layer.with_update(None)

    @property
    def _steps(self) -> int:
        return 200 if self.max_iterations is None else self.max_iterations

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        watch = Stopwatch(problem.rows)
        plan = BoxPlan(self.tolerance, self._steps, self.harden, self.hardness)
        box = relax_box(problem, plan, limits)
        certificate = Certificate.box(problem, box.point) if plan.max_iterations > 0 else None
        bound = box.bound if certificate is None else provable(problem, box.bound, certificate)
        mask = keep_highest(problem, -box.last)
        trace = Trace(
            iterations=box.iterations,
            relaxed_objective=torch.where(box.value.isfinite(), box.value, torch.nan),
            relaxed_gap=relative_gap(box.value, bound),
            relax_seconds=watch.lap(),
        )
        refine = self.refine is not False
        return finished(problem, mask, start, limits, trace, refine, bound, certificate)


def finished(
    problem: LayerProblem,
    mask: Tensor,
    start: Tensor | None,
    limits: Limits,
    trace: Trace,
    refine: bool,
    bound: Tensor,
    certificate: Certificate | None,
) -> Solution:
    """From rounded masks to the answer: 1-swap optima with `refine`, and no worse than the start."""
    watch = Stopwatch(problem.rows)
    # of a mask that is the answer the objective is computed anyway, and once is enough
    rounded = problem.objective(mask) if refine or start is not None else None
    status: tuple[Status, ...] = (Status.FEASIBLE,) * problem.rows
    swaps = torch.zeros(problem.rows, dtype=torch.int64)
    if refine:
        mask, status, swaps = swapped(problem, mask, start, limits)
    elif start is not None:
        mask = better(problem, mask, start)
    solution = Solution.of(problem, mask, status=status, lower_bound=bound, certificate=certificate)
    trace = replace(
        trace,
        rounded_objective=solution.objective if rounded is None else rounded,
        swaps=swaps,
        swap_seconds=watch.lap(),
    )
    return replace(solution, trace=trace)


def swapped(
    problem: LayerProblem, mask: Tensor, start: Tensor | None, limits: Limits
) -> tuple[Tensor, tuple[Status, ...], Tensor]:
    """1-swap optima of the rounded masks, and of the start where that alone costs less already."""
    refined = Swap().run(problem, mask, limits)
    if problem.shared_budget and start is not None:  # all rows or none
        other = Swap().run(problem, start, limits.quiet())
        if problem.shares @ other.objective < problem.shares @ refined.objective:
            refined = other
        start = None
    mask, status, swaps = refined.mask, list(refined.status), refined.trace.swaps
    if start is None:
        return mask, tuple(status), swaps
    worse = (problem.objective(start) < refined.objective).nonzero()[:, 0].tolist()
    if worse:
        other = Swap().run(problem.take(worse), start[worse], limits.quiet())
        mask, swaps = mask.clone(), swaps.clone()
        mask[worse], swaps[worse] = other.mask, other.trace.swaps
        for row, ended in zip(worse, other.status, strict=True):
            status[row] = ended
    return mask, tuple(status), swaps


def better(problem: LayerProblem, mask: Tensor, other: Tensor) -> Tensor:
    """The cheaper of two masks, row by row, or all rows or none of a shared budget."""
    cost, rest = (problem.totals(problem.objective(m)) for m in (mask, other))
    return torch.where((cost <= rest)[:, None], mask, other)
