"""Rows of refitted weights for the exact backends: what the search of a row is given.

With A = G + λD scaled to a diagonal of 1, b the target and C the constant, keeping S costs

    F = min {vᵀAv − 2bᵀv + C : v is 0 outside S} = C − b_SᵀA_SS⁻¹b_S,

and with the split d of A's diagonal that the bound `perspective` makes, A = B + diag(d), B ⪰ 0, every term
dⱼvⱼ² may be replaced by dⱼvⱼ²/zⱼ, which is the same for zⱼ = 1, and convex in both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskopt.certificates.certificate import missing
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.protocol.bounds import lower_bound
from maskopt.protocol.solution import Solution
from maskopt.solvers.exact.refit_node import refitted
from maskopt.solvers.exact.rows import (
    NOISE,
    RowAnswer,
    RowSolver,
    RowTask,
    Search,
    assemble,
    run_rows,
)
from maskopt.solvers.refit.rows import swap_refitted

#: relative gap that a general solver closes: half of what OPTIMAL allows. Its cones have tolerances of
#: their own, and it would branch on them
REFIT_CLOSED = 5e-7
#: part by which v may pass its bounds: what they are computed with rounds, too
_WIDER = 1e-6
#: parts of what is left of the time that the incumbent and the split may take
_SEARCH_SHARE, _SPLIT_SHARE = 0.2, 0.3


@dataclass(frozen=True)
class RefitTask(RowTask):
    """A row of refitted weights: `q` is A, and its inputs are scaled to A_jj = 1.

    Attributes:
        target: b [n].
        constant: C: F is C − b_SᵀA_SS⁻¹b_S.
        split: d [n].
        certified: what `perspective` proves of the row.
    """

    target: np.ndarray = field(default_factory=lambda: np.zeros(0))
    constant: float = 0.0
    split: np.ndarray = field(default_factory=lambda: np.zeros(0))
    certified: float = 0.0

    def cost(self, pruned: np.ndarray) -> float:
        """F of a mask."""
        kept = np.flatnonzero(~np.asarray(pruned, dtype=bool))
        return max(self.constant - refitted(self.q, self.target, kept), 0.0)

    @property
    def noise(self) -> float:
        return NOISE * self.constant

    @property
    def decided(self) -> RowAnswer | None:
        """The answer where there is nothing to search: a start that costs nothing, or is proven already, or a
        single mask."""
        cost = self.cost(self.start)
        if cost == 0:
            return RowAnswer(self.start, "optimal")
        if self.pruned in (0, self.group):
            return RowAnswer(self.start, "optimal", bound=cost, root_bound=cost)
        if self.certified >= cost * (1 - REFIT_CLOSED):
            known = min(self.certified, cost)
            return RowAnswer(self.start, "optimal", bound=known, root_bound=known)
        return None


def solve_refitted(
    solver: RowSolver,
    problem: LayerProblem,
    start: Tensor,
    limits: Limits,
    search: Search,
    word: str,
    kind: type[RefitTask] = RefitTask,
    **own: Any,
) -> Solution:
    """Every row of a problem with `refit`, from its 1-swap optimum; arguments as of
    `RowSolver.solve_rows`."""
    start = swap_refitted(problem, start, None, limits.share(_SEARCH_SHARE).quiet()).mask
    bound = lower_bound(problem, "perspective", limits=limits.share(_SPLIT_SHARE).quiet())
    squares = problem.least_squares
    size = squares.damped.diagonal().sqrt()
    a = (squares.damped / size / size[:, None]).numpy()
    target = squares.target(problem.weight, problem.correlation)
    constant = (problem.weight.double() * target).sum(1)
    if problem.linear is not None:
        constant += (problem.weight.double() * problem.linear.correlation).sum(1)
        constant += problem.linear.constant
    split = (bound.certificate.diagonal / squares.damped.diagonal()).numpy()
    tasks = [
        kind(
            q=a,
            **solver.asked(problem, start[i], limits),
            target=(target[i] / size).numpy(),
            constant=0.0 if squares.flat else float(constant[i]),
            split=_safe(a, split[i]),
            certified=float(bound.value[i]),
            **own,
        )
        for i in range(problem.rows)
    ]
    return assemble(problem, run_rows(search, tasks, limits, solver.workers), word)


def between(task: RefitTask) -> tuple[np.ndarray, np.ndarray]:
    """Between which v lies, 0 among it, where F is no more than that of the start: in the ellipsoid around
    the dense optimum v*, |v − v*|ⱼ ≤ √((F − F*)(A⁻¹)ⱼⱼ)."""
    inverse = np.linalg.inv(task.q)
    dense = inverse @ task.target
    above = task.cost(task.start) - (task.constant - float(task.target @ dense))
    half = np.sqrt(np.maximum(above, 0.0) * np.diagonal(inverse))
    wider = _WIDER * (np.abs(dense) + half).max()
    return np.minimum(dense - half - wider, 0.0), np.maximum(dense + half + wider, 0.0)


def reached(task: RefitTask, low: np.ndarray, high: np.ndarray) -> float:
    """Of a model with v between `low` and `high`, in its units: the sum of the sizes that tolerances are
    parts of. A z that is off by one pays for a vⱼ with ∂ⱼ²/dⱼ, ∂ being the slope of what d leaves."""
    target = np.abs(task.target) * np.sqrt(task.unit_scale)
    reach = np.maximum(-low, high)
    slope = target + np.abs(task.q - np.diag(task.split)) @ reach
    return float(reach @ reach + target @ reach + (slope**2 / task.split).sum())


def _safe(a: np.ndarray, split: np.ndarray) -> np.ndarray:
    """d with A − diag(d) ⪰ 0 for certain."""
    lack = missing(torch.from_numpy(a - np.diag(split)))
    return np.maximum(split - lack, 1e-300)
