"""Relax, round, swap: a convex relaxation, rounded to a mask, with a lower bound and its certificate.

`Relax` takes the relaxation, hardening and bound of `convex.box`; the x of the bound is the solution's
certificate. Hardening from the first step on (`max_iterations=0`, as the start of another solver) gives masks
as good as after a full relaxation, but no bound.

`SdpRound` takes the bound `sdp`, which relaxes p = (1 + z)/2 to inner products ⟨vᵢ, v₀⟩. Pruning the s inputs
of largest ⟨vᵢ, v₀⟩ in each group gives a start from which `swap` ends better than from scores; the bound is
that of the same computation.

`FrankWolfe` is SparseFW ("Don't be greedy, just relax", arXiv 2510.13713). With x ∈ [0,1]ⁿ, Σ x = s per group
(x = 1: pruned) the objective f(x) = (w⊙x)ᵀG(w⊙x) is convex. Each step selects the s least entries of the
gradient 2 w⊙G(w⊙x) and moves 2/(t+2) of the way. A part α of the kept budget can be fixed to the highest
Wanda scores: the paper found that pure local optimisation (α = 0) often gives worse perplexity. The bound is
that of `Relax`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskopt.certificates.certificate import Certificate
from maskopt.core.fields import option
from maskopt.core.inputs import range_scale
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.errors import OptionError
from maskopt.protocol.bounds import lower_bound
from maskopt.protocol.solution import Solution, Status, relative_gap
from maskopt.protocol.solver import Capabilities, Solver
from maskopt.protocol.trace import Stopwatch, Trace
from maskopt.solvers.convex.box import BoxPlan, linear_bound, provable, relax_box
from maskopt.solvers.greedy.scores import keep_highest, lowest, wanda_scores
from maskopt.solvers.swap import Swap

#: part of a time limit that the bound takes at most; the swaps have the rest
_BOUND_SHARE = 0.8


@dataclass(frozen=True)
class Relax(Solver):
    """Masks that are relaxed all at once, hardened, rounded, and swapped to 1-swap optimality.

    The answer is never worse than a start. When the time is over the relaxation stops, is rounded, and the
    swaps have the rest.
    """

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
        """Leave out the bound and the swaps, for which the solver that starts from the mask has no use."""
        steps = 0 if self.max_iterations is None else self.max_iterations
        rounding = replace(self, max_iterations=steps, refine=bool(self.refine))
        return rounding, layer.with_update(None)

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
        value = torch.where(box.value.isfinite(), box.value, torch.nan)
        trace = _relaxed(watch, box.iterations, value, bound)
        refine = self.refine is not False
        return _finished(problem, mask, start, limits, refine, trace, bound, certificate)


def _relaxed(watch: Stopwatch, iterations: Tensor, objective: Tensor, bound: Tensor) -> Trace:
    """Return the trace of a relaxation that has just ended."""
    return Trace(
        iterations=iterations,
        relaxed_objective=objective,
        relaxed_gap=relative_gap(objective, bound),
        relax_seconds=watch.lap(),
    )


def _finished(
    problem: LayerProblem,
    mask: Tensor,
    start: Tensor | None,
    limits: Limits,
    refine: bool,
    trace: Trace,
    bound: Tensor,
    certificate: Certificate | None,
) -> Solution:
    """Make rounded masks an answer: 1-swap optima with `refine`, and never worse than the start."""
    watch = Stopwatch(problem.rows)
    status: Status | tuple[Status, ...] = Status.FEASIBLE
    swaps = torch.zeros(problem.rows, dtype=torch.int64)
    if refine:
        refined = swapped(problem, mask, start, limits)
        mask, status, swaps = refined.mask, refined.status, refined.trace.swaps
    elif start is not None:  # of a shared budget all rows or none
        cost, start_cost = (problem.totals(problem.objective(m)) for m in (mask, start))
        mask = torch.where((cost <= start_cost)[:, None], mask, start)
    solution = Solution.of(problem, mask, status=status, lower_bound=bound, certificate=certificate)
    return replace(solution, trace=replace(trace, swaps=swaps, swap_seconds=watch.lap()))


def swapped(problem: LayerProblem, mask: Tensor, start: Tensor | None, limits: Limits) -> Solution:
    """Swap to 1-swap optima from the rounded masks, or from the start where that costs less than these."""
    refined = Swap().run(problem, mask, limits)
    if start is None:
        return refined
    if problem.shared_budget:  # all rows or none
        other = Swap().run(problem, start, limits.quiet())
        better = problem.shares @ other.objective < problem.shares @ refined.objective
        return other if better else refined
    rows = (problem.objective(start) < refined.objective).nonzero()[:, 0].tolist()
    if not rows:
        return refined
    other = Swap().run(problem.take(rows), start[rows], limits.quiet())
    return refined.with_rows(rows, other)


@dataclass(frozen=True)
class SdpRound(Solver):
    """Masks of the semidefinite relaxation, rounded and swapped; seconds a row at n = 1000.

    The answer is never worse than a start.
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
        watch = Stopwatch(problem.rows)
        bound = lower_bound(
            problem, "sdp", sweeps=self.sweeps, limits=limits.share(_BOUND_SHARE).quiet()
        )
        mask = keep_highest(problem, -bound.trace.relaxed.to(problem.device))
        unknown = torch.full((problem.rows,), torch.nan, dtype=torch.float64)
        trace = _relaxed(watch, bound.trace.iterations, unknown, bound.value)
        proven = bound.value, bound.certificate
        return _finished(problem, mask, start, limits, self.refine, trace, *proven)


@dataclass(frozen=True)
class FrankWolfe(Solver):
    """SparseFW: Frank–Wolfe steps on the relaxed mask, batched as matrix products over all rows.

    The mask is the better of rounding and start. After the time limit the present point is rounded. Reports
    a `Trace`.
    """

    name: ClassVar[str] = "frank_wolfe"
    capabilities: ClassVar[Capabilities] = Capabilities(
        start="needed",
        default_start="wanda",
        note="SparseFW: relax, Frank–Wolfe, round; gives a lower bound",
    )

    iterations: int = option(2000, "T in the paper, 2000 there", unit="steps", least=0)
    alpha: float = option(
        0.0,
        "share of the kept budget that is fixed to the top Wanda scores (SparseFW: 0 to 0.9)",
        least=0,
        most=1,
    )

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        assert start is not None
        watch = Stopwatch(problem.rows)
        count = math.floor(self.alpha * (problem.group_size - problem.pruned_per_group))
        score = wanda_scores(problem).view(-1, problem.group_size)
        fixed = lowest(-score, count).view(problem.rows, problem.n)
        x, done = _minimise(problem, start, fixed, self.iterations, limits)
        # what is fixed stays kept, and of the other inputs the largest x are pruned
        rounded = keep_highest(problem, torch.where(fixed, torch.inf, -x))
        relaxed, bound = linear_bound(problem, x)
        certificate = Certificate.box(problem, x)
        bound = provable(problem, bound, certificate)
        trace = _relaxed(watch, torch.full((problem.rows,), done), relaxed, bound)
        return _finished(problem, rounded, start, limits, False, trace, bound, certificate)


def _minimise(
    problem: LayerProblem,
    start: Bool[Tensor, "rows n"],
    fixed: Bool[Tensor, "rows n"],
    iterations: int,
    limits: Limits,
) -> tuple[Float[Tensor, "rows n"], int]:
    """Return x after the iterations, in G's dtype, and their number."""
    # powers of two keep float32 in range and change nothing else
    down = range_scale(problem.weight)[:, None]
    weight = problem.weight.double() * down
    scale = float(problem.gram.diagonal().max()) or 1.0
    pull = (weight * (problem.correlation * down / scale)).to(problem.gram.dtype)
    weight = weight.to(problem.gram.dtype)
    # the start's mask, but for what is fixed: then others are pruned in its place
    x = _vertex(problem, start.to(weight), fixed).to(weight)
    gram = problem.gram / scale
    for t in range(iterations):
        if limits.expired:
            return x, t
        gradient = weight * ((weight * x) @ gram) + pull
        vertex = _vertex(problem, gradient, fixed).to(x)
        x += (vertex - x) * (2.0 / (t + 2))
        if (t + 1) % 50 == 0:
            limits.report(0, problem.rows, "Frank–Wolfe steps", t + 1, iterations)
    return x, iterations


def _vertex(problem: LayerProblem, gradient: Tensor, fixed: Tensor) -> Tensor:
    """Return the legal p of least gradientᵀp that prunes nothing fixed."""
    return ~keep_highest(problem, gradient.where(~fixed, torch.inf))
