"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774), with exact counts.

SparseGPT walks over the columns; a pruned weight's error is spread over the columns to its right by the
inverse Hessian, and later choices see the compensated weights. Its mask may be taken alone, or with the
weights that the walk leaves (`update`). Under a shared budget rows × 128 columns are ranked together, as in
the original; else every row has a quota in each block, which add up to the pattern's count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.pattern import Pattern
from maskopt.core.problem import LayerProblem
from maskopt.errors import SolverError
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities, Solver

#: columns between two lazy updates of everything to the right
BLOCK = 128


@dataclass(frozen=True)
class SparseGPT(Solver):
    """SparseGPT with exact counts.

    The result depends on the order of the columns, as in the original. A linear part is ignored. The walk
    needs a few n × n float64 matrices. After the time limit the remaining columns are ranked without further
    compensation.
    """

    name: ClassVar[str] = "sparsegpt"
    capabilities: ClassVar[Capabilities] = Capabilities(
        update=True,
        shared_budget=True,
        limited=False,
        note="SparseGPT's mask; its weights with update=true",
    )

    damping: float = option(
        0.01, "λ, 1% in the paper", unit="part of G's mean diagonal", least=1e-12
    )

    update: bool = option(False, "its own weights instead of least squares, where they are updated")

    def as_start(self, layer: LayerProblem) -> tuple[Solver, LayerProblem]:
        """Drop the update of weights, on which the mask does not depend."""
        return replace(self, update=False), layer.with_update(None)

    def check_size(self, n: int, pattern: Pattern, *, update: bool) -> None:
        """Raise SolverError for `update` on a problem that keeps its weights."""
        if self.update and not update:
            raise SolverError(
                "sparsegpt: update=true updates weights, and the problem keeps them; give it "
                "update=LeastSquaresUpdate(damping), in a prune `update` least-squares, or leave "
                "update=true out"
            )

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        mask, weight = _walked(problem, self.damping, limits)
        return Solution.of(problem, mask, weight=weight.double() if self.update else None)


def _walked(problem: LayerProblem, damping: float, limits: Limits) -> tuple[Tensor, Tensor]:
    """Return the mask and the weights that the walk leaves, in G's dtype, zero where it prunes."""
    weight = problem.weight.to(problem.gram.dtype).clone()
    factor = _inverse_factor(problem.gram, damping).to(weight.dtype)
    weight[:, problem.gram.diagonal() <= 0] = 0  # an input that is always zero: nothing to lose
    # a block holds whole groups; the single group of an unstructured row spans all blocks
    grouped = problem.group_size < problem.n
    width = -(-BLOCK // problem.group_size) * problem.group_size if grouped else BLOCK
    kept = torch.ones_like(weight, dtype=torch.bool)
    for first in range(0, problem.n, width):
        last = min(first + width, problem.n)
        block, corner = weight[:, first:last], factor[first:last, first:last]
        error = torch.zeros_like(block)
        compensate = not limits.expired
        step = problem.group_size if grouped else last - first
        for j in range(last - first):
            if j % step == 0:
                part = slice(j, j + step)
                score = (block[:, part] / corner.diagonal()[part]).square()
                kept[:, first + j : first + j + step] = _chosen(problem, score, first + j)
            if not compensate:
                continue
            error[:, j] = torch.where(kept[:, first + j], 0.0, block[:, j] / corner[j, j])
            block[:, j:] -= error[:, j, None] * corner[j, j:]
        if compensate:
            weight[:, last:] -= error @ factor[first:last, last:]
    return kept, weight.masked_fill_(~kept, 0)


def _chosen(problem: LayerProblem, score: Float[Tensor, "rows part"], first: int) -> Tensor:
    """Return the mask of the inputs from `first` on: a group, or a block with its part of the quota."""
    n, last = problem.n, first + score.shape[1]

    def upto(pruned: int) -> int:
        return pruned * last // n - pruned * first // n

    if problem.shared_budget:
        ranked, count = (score * problem.shares[:, None]).view(1, -1), upto(problem.pruned)
    else:
        grouped = problem.group_size < n
        ranked = score
        count = problem.pruned_per_group if grouped else upto(problem.pruned_per_group)
    order = ranked.argsort(dim=1, stable=True)[:, :count]
    return torch.ones_like(ranked, dtype=torch.bool).scatter_(1, order, False).view(score.shape)


def _inverse_factor(gram: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """Return the upper Cholesky factor of (G + λI)⁻¹ in float64; dead inputs get a unit diagonal."""
    hessian = gram.double().clone()
    diagonal = hessian.diagonal()
    alive = diagonal > 0
    scale = float(diagonal[alive].mean()) if bool(alive.any()) else 1.0
    hessian /= scale
    diagonal[~alive] = 1.0
    diagonal += damping
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)
