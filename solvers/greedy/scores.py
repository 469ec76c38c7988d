"""Masks by a score, ranked once: magnitude, Wanda, RIA, and the two controls random and worst.

Scores are float64, whatever the dtype of the weights: half-precision scores tie by the thousand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskopt.errors import OptionError
from maskopt.problem import LayerProblem
from maskopt.solution import Solution
from maskopt.solver import Capabilities
from maskopt.solvers.greedy.select import keep_highest


class _ScoreSolver:
    """Keeps the highest scores of each row (or group); takes no start and proves nothing."""

    name: str
    capabilities: Capabilities
    default_warm_start: str | None = None

    def unavailable(self) -> str | None:
        return None

    def answer(self, problem: LayerProblem, score: Tensor) -> Solution:
        return Solution.of(problem, keep_highest(problem, score), solver=self.name)


class MagnitudeSolver(_ScoreSolver):
    """|W_ij|: the classical score, blind to the inputs."""

    name = "magnitude"
    capabilities = Capabilities(note="|W|")

    def solve(self, problem: LayerProblem, *, warm_start: Tensor | None = None) -> Solution:
        return self.answer(problem, problem.weight.double().abs())


class WandaSolver(_ScoreSolver):
    """|W_ij|·‖X_j‖₂ (Sun et al., arXiv 2306.11695); optimal where G is diagonal."""

    name = "wanda"
    capabilities = Capabilities(note="|W|·‖X‖; optimal on diagonal G")

    def solve(self, problem: LayerProblem, *, warm_start: Tensor | None = None) -> Solution:
        norm = problem.gram.diagonal().double().clamp(min=0.0).sqrt()
        return self.answer(problem, problem.weight.double().abs() * norm)


class RiaSolver(_ScoreSolver):
    """Relative importance and activations (Zhang et al., ICLR 2024), per row.

    (|W_ij|/Σ_i'|W_i'j| + |W_ij|/Σ_j'|W_ij'|)·‖X_j‖₂^a. The column sums run over all rows of the
    problem, so a single row taken out of a layer is scored otherwise than inside it.
    """

    name = "ria"
    capabilities = Capabilities(note="relative |W|·‖X‖^a; column sums need the whole layer")

    def solve(
        self, problem: LayerProblem, *, warm_start: Tensor | None = None, a: float = 0.5
    ) -> Solution:
        """`a` is the exponent of the activation norm, 0.5 in the paper."""
        if not a >= 0:
            raise OptionError(f"ria: a must be at least 0, not {a}")
        size = problem.weight.double().abs()
        columns = size.sum(0, keepdim=True)
        rows = size.sum(1, keepdim=True)
        # a zero column or row has only zero entries: any positive divisor leaves them zero
        relative = size / columns.where(columns > 0, 1.0) + size / rows.where(rows > 0, 1.0)
        norm = problem.gram.diagonal().double().clamp(min=0.0).sqrt()
        return self.answer(problem, relative * norm**a)


class RandomSolver(_ScoreSolver):
    """A random legal mask, seeded: the control that shows what a start is worth."""

    name = "random"
    capabilities = Capabilities(note="control: a seeded random mask")

    def solve(
        self, problem: LayerProblem, *, warm_start: Tensor | None = None, seed: int = 0
    ) -> Solution:
        generator = torch.Generator().manual_seed(seed)
        score = torch.rand(problem.rows, problem.n, generator=generator, dtype=torch.float64)
        return self.answer(problem, score.to(problem.device))


class WorstSolver(_ScoreSolver):
    """Keeps the smallest Wanda scores: the poorest start that a score can give."""

    name = "worst"
    capabilities = Capabilities(note="control: keeps the smallest Wanda scores")

    def solve(self, problem: LayerProblem, *, warm_start: Tensor | None = None) -> Solution:
        norm = problem.gram.diagonal().double().clamp(min=0.0).sqrt()
        return self.answer(problem, -problem.weight.double().abs() * norm)
