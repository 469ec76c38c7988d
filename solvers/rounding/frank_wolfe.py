"""SparseFW: relax the mask, Frank–Wolfe, round ("Don't be greedy, just relax", arXiv 2510.13713).

With x ∈ [0,1]ⁿ, Σ x = s per group (x = 1: pruned) the objective f(x) = (w⊙x)ᵀG(w⊙x) is convex. Each step
selects the s least entries of the gradient 2 w⊙G(w⊙x) and moves 2/(t+2) of the way. A part α of the kept
budget can be fixed to the highest Wanda scores: the paper found that pure local optimisation (α = 0) often
gives worse perplexity. By convexity f(v) ≥ f(x) + ∇f(x)ᵀ(v − x) for every legal v, a bound for free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskopt.certificates.certificate import Certificate
from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.protocol.solution import Solution, relative_gap
from maskopt.protocol.solver import Capabilities, Solver
from maskopt.protocol.trace import Stopwatch, Trace
from maskopt.solvers.convex.box import linear_bound, provable
from maskopt.solvers.greedy.scores import wanda_scores
from maskopt.solvers.greedy.select import highest, keep_highest


@dataclass(frozen=True)
class FrankWolfe(Solver):
    """Batched as matrix products over all rows; the mask is the better of rounding and start. After the time
    limit the present point is rounded. Reports a `Trace`."""

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
        fixed = _top_wanda(problem, self.alpha)
        x, done = _minimise(problem, start, fixed, self.iterations, limits)
        # what is fixed stays kept, and of the rest the largest x are pruned
        rounded = keep_highest(problem, torch.where(fixed, torch.inf, -x))
        start_objective, objective = problem.objective(start), problem.objective(rounded)
        better = objective <= start_objective
        relaxed, bound = linear_bound(problem, x)
        certificate = Certificate.box(problem, x)
        bound = provable(problem, bound, certificate)
        trace = Trace(
            iterations=torch.full((problem.rows,), done),
            relaxed_objective=relaxed,
            relaxed_gap=relative_gap(relaxed, bound),
            rounded_objective=objective,
            swaps=torch.zeros(problem.rows, dtype=torch.int64),
            relax_seconds=watch.lap(),
            swap_seconds=torch.zeros(problem.rows, dtype=torch.float64),
        )
        return Solution.of(
            problem,
            torch.where(better[:, None], rounded, start),
            lower_bound=bound,
            trace=trace,
            certificate=certificate,
        )


def _minimise(
    problem: LayerProblem,
    start: Bool[Tensor, "rows n"],
    fixed: Bool[Tensor, "rows n"],
    iterations: int,
    limits: Limits,
) -> tuple[Float[Tensor, "rows n"], int]:
    """x after the iterations (in G's dtype), and how many there were."""
    weight = problem.weight.double()
    # powers of two keep float32 in range and change nothing else
    down = torch.exp2(-weight.abs().amax(1, keepdim=True).clamp(min=1e-300).log2().ceil())
    weight = weight * down
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
    """The legal p of least gradientᵀp that prunes nothing fixed."""
    return ~keep_highest(problem, gradient.where(~fixed, torch.inf))


def _top_wanda(problem: LayerProblem, alpha: float) -> Bool[Tensor, "rows n"]:
    """The ⌊α·keep⌋ highest Wanda scores of each group."""
    count = math.floor(alpha * (problem.group_size - problem.pruned_per_group))
    score = wanda_scores(problem).view(problem.rows, -1, problem.group_size)
    return highest(score, count).view(problem.rows, problem.n)
