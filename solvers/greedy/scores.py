"""Masks by a score, ranked once: magnitude, Wanda, RIA, and the two controls random and worst.

Scores are float64, whatever the dtype of the weights: half-precision scores tie by the thousand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities, Solver
from maskopt.solvers.greedy.select import keep_highest

#: every score answers for any weights and budget
_scored = partial(Capabilities, update=True, shared_budget=True)


def wanda_scores(problem: LayerProblem) -> Float[Tensor, "rows n"]:
    """|W_ij|·‖X_j‖₂ in float64."""
    norm = problem.gram.diagonal().double().clamp(min=0.0).sqrt()
    return problem.weight.double().abs() * norm


class _Score(Solver):
    """Keeps the highest scores of each row (or group); takes no start and proves nothing."""

    def as_start(self, layer: LayerProblem) -> tuple[Solver, LayerProblem]:
        """Scores look at no objective."""
        return self, layer.with_update(None)

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        """One pass over the scores; see `Solver.run`. With a shared budget √ω times the score ranks."""
        scores = self._scores(problem, limits)
        if problem.omega is not None:
            scores = scores * problem.shares.sqrt()[:, None]
        return Solution.of(problem, keep_highest(problem, scores))

    def _scores(self, problem: LayerProblem, limits: Limits) -> Float[Tensor, "rows n"]:
        raise NotImplementedError


@dataclass(frozen=True)
class Magnitude(_Score):
    """|W_ij|: the classical score, blind to the inputs."""

    name: ClassVar[str] = "magnitude"
    capabilities: ClassVar[Capabilities] = _scored(apart=True, note="|W|")

    def _scores(self, problem: LayerProblem, limits: Limits) -> Tensor:
        return problem.weight.double().abs()


@dataclass(frozen=True)
class Wanda(_Score):
    """|W_ij|·‖X_j‖₂ (Sun et al., arXiv 2306.11695); optimal where G is diagonal."""

    name: ClassVar[str] = "wanda"
    capabilities: ClassVar[Capabilities] = _scored(
        apart=True, note="|W|·‖X‖; optimal on diagonal G"
    )

    def _scores(self, problem: LayerProblem, limits: Limits) -> Tensor:
        return wanda_scores(problem)


@dataclass(frozen=True)
class Ria(_Score):
    """Relative importance and activations (Zhang et al., ICLR 2024): (|W_ij|/Σ_i'|W_i'j| +
    |W_ij|/Σ_j'|W_ij'|)·‖X_j‖₂^a. Column sums run over all rows of the problem, so a row alone is scored
    otherwise than inside its layer."""

    name: ClassVar[str] = "ria"
    capabilities: ClassVar[Capabilities] = _scored(
        note="relative |W|·‖X‖^a; column sums need the whole layer"
    )

    a: float = option(0.5, "exponent of the activation norm, 0.5 in the paper", least=0)

    def _scores(self, problem: LayerProblem, limits: Limits) -> Tensor:
        size = problem.weight.double().abs()
        columns, rows = (size.sum(axis, keepdim=True) for axis in (0, 1))
        # a zero column or row has only zero entries: any positive divisor leaves them zero
        relative = size / columns.where(columns > 0, 1.0) + size / rows.where(rows > 0, 1.0)
        norm = problem.gram.diagonal().double().clamp(min=0.0).sqrt()
        return relative * norm**self.a


@dataclass(frozen=True)
class Random(_Score):
    """A random legal mask by `Limits.seed`: the control that shows what a start is worth."""

    name: ClassVar[str] = "random"
    capabilities: ClassVar[Capabilities] = _scored(note="control: a seeded random mask")

    def _scores(self, problem: LayerProblem, limits: Limits) -> Tensor:
        generator = torch.Generator().manual_seed(limits.seed)
        score = torch.rand(problem.rows, problem.n, generator=generator, dtype=torch.float64)
        return score.to(problem.device)


@dataclass(frozen=True)
class Worst(_Score):
    """Keeps the smallest Wanda scores: the poorest start that a score can give."""

    name: ClassVar[str] = "worst"
    capabilities: ClassVar[Capabilities] = _scored(note="control: keeps the smallest Wanda scores")

    def _scores(self, problem: LayerProblem, limits: Limits) -> Tensor:
        return -wanda_scores(problem)
