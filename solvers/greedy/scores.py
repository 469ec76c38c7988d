"""Masks in one pass: scores ranked once (magnitude, Wanda, RIA, the controls random and worst), elimination.

Scores are float64, whatever the dtype of the weights: half-precision scores tie by the thousand. Every solver
that ranks inputs by a score selects exact counts by `keep_highest` or `lowest`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities, Solver

#: most torch threads that are no faster than the one of NumPy, which partitions by vector instructions;
#: measured on an AMD EPYC with AVX-512
_THREADS = 6
#: what all scores are capable of: updated weights and shared budgets
_scored = partial(Capabilities, update=True, shared_budget=True)
#: working memory per tile of rows, where the caller sets no limit
_TILE_BYTES = 256 * 2**20
#: float64 arrays [rows, n] that a step holds
_ARRAYS = 6


def keep_highest(problem: LayerProblem, score: Shaped[Tensor, "rows n"]) -> Bool[Tensor, "rows n"]:
    """Prune the inputs of least score, as many as the pattern asks for; ties: the lowest index.

    A shared budget ranks the inputs of the whole layer. Where it limits a row's count, the row's least inputs
    up to the lower limit are pruned first, and those beyond the upper limit kept, which gives the least sum.
    """
    fewest, most = problem.row_limits
    if not problem.shared_budget:
        pruned = lowest(score.reshape(-1, problem.group_size), problem.pruned_per_group)
    elif (fewest, most) == (0, problem.n):
        pruned = lowest(score.reshape(1, -1), problem.pruned)
    else:
        pruned = lowest(score, fewest)
        free = lowest(score, most) & ~pruned
        pruned[free] = lowest(score[None, free], problem.pruned - fewest * problem.rows)[0]
    return ~pruned.view(problem.rows, problem.n)


def lowest(score: Shaped[Tensor, "groups n"], count: int) -> Bool[Tensor, "groups n"]:
    """Mark the `count` lowest of every group; ties: the lowest index."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threads = min(len(score), torch.get_num_threads())
    if score.device.type == "cpu" and threads <= _THREADS:
        parted = np.partition(score.numpy(), count - 1, axis=1)
        limit = torch.from_numpy(parted[:, count - 1 : count])
    else:
        limit = score.kthvalue(count, dim=1, keepdim=True).values
    within = score <= limit
    if int(within.sum()) == count * len(score):
        return within
    tied = score == limit
    left = count - (score < limit).sum(1, keepdim=True)
    return within & ~(tied & (tied.cumsum(1) > left))


def _input_norms(problem: LayerProblem) -> Float[Tensor, " n"]:
    return problem.gram.diagonal().double().clamp(min=0.0).sqrt()


def wanda_scores(problem: LayerProblem) -> Float[Tensor, "rows n"]:
    """Compute |W_ij|·‖X_j‖₂ in float64."""
    return problem.weight.double().abs() * _input_norms(problem)


class _Score(Solver):
    """A solver that keeps the highest scores of each row or group; it takes no start and proves nothing."""

    def as_start(self, layer: LayerProblem) -> tuple[Solver, LayerProblem]:
        """Drop the update of weights, on which scores do not depend."""
        return self, layer.with_update(None)

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        """Rank the scores; see `Solver.run`. A shared budget ranks √ω times the score."""
        scores = self._scores(problem, limits)
        if problem.omega is not None:
            scores = scores * problem.shares.sqrt()[:, None]
        return Solution.of(problem, keep_highest(problem, scores))

    def _scores(self, problem: LayerProblem, limits: Limits) -> Float[Tensor, "rows n"]:
        raise NotImplementedError


@dataclass(frozen=True)
class Magnitude(_Score):
    """The magnitude |W_ij|, which ignores the inputs."""

    name: ClassVar[str] = "magnitude"
    capabilities: ClassVar[Capabilities] = _scored(apart=True, note="|W|")

    def _scores(self, problem: LayerProblem, limits: Limits) -> Tensor:
        return problem.weight.double().abs()


@dataclass(frozen=True)
class Wanda(_Score):
    """The score |W_ij|·‖X_j‖₂ (Sun et al., arXiv 2306.11695); optimal where G is diagonal."""

    name: ClassVar[str] = "wanda"
    capabilities: ClassVar[Capabilities] = _scored(
        apart=True, note="|W|·‖X‖; optimal on diagonal G"
    )

    def _scores(self, problem: LayerProblem, limits: Limits) -> Tensor:
        return wanda_scores(problem)


@dataclass(frozen=True)
class Ria(_Score):
    """Relative importance and activations (Zhang et al., ICLR 2024).

    The score is (|W_ij|/Σ_i'|W_i'j| + |W_ij|/Σ_j'|W_ij'|)·‖X_j‖₂^a. Column sums run over all rows of the
    problem, so a single row is scored differently than inside its layer.
    """

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
        return relative * _input_norms(problem) ** self.a


@dataclass(frozen=True)
class Random(_Score):
    """A random legal mask by `Limits.seed`: the control for the value of a start."""

    name: ClassVar[str] = "random"
    capabilities: ClassVar[Capabilities] = _scored(note="control: a seeded random mask")

    def _scores(self, problem: LayerProblem, limits: Limits) -> Tensor:
        generator = torch.Generator().manual_seed(limits.seed)
        score = torch.rand(problem.rows, problem.n, generator=generator, dtype=torch.float64)
        return score.to(problem.device)


@dataclass(frozen=True)
class Worst(_Score):
    """The smallest Wanda scores kept: the poorest start that a score can give."""

    name: ClassVar[str] = "worst"
    capabilities: ClassVar[Capabilities] = _scored(note="control: keeps the smallest Wanda scores")

    def _scores(self, problem: LayerProblem, limits: Limits) -> Tensor:
        return -wanda_scores(problem)


@dataclass(frozen=True)
class Elimination(Solver):
    """Greedy elimination: prune the input of least marginal cost, one after the other.

    O(rows·n·s) operations in float64; ties: the lowest index. After the time limit Wanda's score decides.
    """

    name: ClassVar[str] = "elimination"
    capabilities: ClassVar[Capabilities] = Capabilities(
        apart=True, note="greedy by exact marginal cost"
    )

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        tile = max(1, limits.bytes(_TILE_BYTES) // (_ARRAYS * 8 * problem.n))
        masks = []
        for rows, part in problem.tiles(tile):
            masks.append(_eliminate(part, limits))
            limits.report(rows.stop, problem.rows)
        return Solution.of(problem, torch.cat(masks))


def _eliminate(problem: LayerProblem, limits: Limits) -> Tensor:
    weight = problem.weight.double()
    gram = problem.gram.double()
    rows, n, group = problem.rows, problem.n, problem.group_size
    own_cost = weight.square() * gram.diagonal()
    c = problem.correlation.clone()
    kept = torch.ones_like(weight, dtype=torch.bool)
    left = torch.full((rows, n // group), problem.pruned_per_group, device=weight.device)
    index = torch.arange(rows, device=weight.device)
    for _ in range(problem.pruned_per_group * (n // group)):
        if limits.expired:
            # what is pruned stays pruned; the rest by Wanda's score
            return keep_highest(problem, torch.where(kept, wanda_scores(problem), -1.0))
        allowed = kept & (left > 0).repeat_interleave(group, dim=1)
        cost = torch.where(allowed, 2 * weight * c + own_cost, torch.inf)
        chosen = cost.argmin(1)
        kept[index, chosen] = False
        left[index, chosen // group] -= 1
        c += weight[index, chosen, None] * gram[chosen]
    return kept
