"""The mask of SparseGPT (Frantar and Alistarh, arXiv 2301.00774), with exact counts per row.

SparseGPT walks over the columns; a pruned weight's error is spread over the columns to its right by the
inverse Hessian, and later choices are made on the compensated weights. Only its *mask* is used here: the
objective reported is that of the original weights under the mask, as for every other solver. The
original ranks rows × 128 columns together, so that counts differ between rows; here every row has its own
quota in each block, and the quotas add up to the pattern's count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.fields import option
from maskopt.limits import Limits
from maskopt.problem import LayerProblem
from maskopt.solution import Solution
from maskopt.solver import Capabilities, Solver

#: columns between two lazy updates of everything to the right
BLOCK = 128


@dataclass(frozen=True)
class SparseGPT(Solver):
    """Depends on the order of the columns, as the original does; needs a few n × n float64 matrices.

    When the time limit comes, the columns that are left are ranked without further compensation.
    """

    name: ClassVar[str] = "sparsegpt"
    capabilities: ClassVar[Capabilities] = Capabilities(
        refit=True, note="the mask of SparseGPT, equal counts per row"
    )

    damping: float = option(
        0.01, "λ, 1% in the paper", unit="part of G's mean diagonal", least=1e-12
    )

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        """Walk over the columns once; see `Solver.run`."""
        return Solution.of(problem, _mask(problem, self.damping, limits))


def _mask(problem: LayerProblem, damping: float, limits: Limits) -> Tensor:
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
        for j in range(last - first):
            if grouped and j % problem.group_size == 0:
                part = slice(j, j + problem.group_size)
                count = problem.pruned_per_group
            elif not grouped and j == 0:
                part = slice(0, last - first)
                pruned, n = problem.pruned_per_group, problem.n
                count = pruned * last // n - pruned * first // n
            else:
                part = None
            if part is not None:
                score = (block[:, part] / corner.diagonal()[part]).square()
                order = score.argsort(dim=1, stable=True)[:, :count]
                kept[:, first:last][:, part].scatter_(1, order, False)
            if not compensate:
                continue
            error[:, j] = torch.where(kept[:, first + j], 0.0, block[:, j] / corner[j, j])
            block[:, j:] -= error[:, j, None] * corner[j, j:]
        if compensate:
            weight[:, last:] -= error @ factor[first:last, last:]
    return kept


def _inverse_factor(gram: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """Upper Cholesky factor of (G + λI)⁻¹ in float64; dead inputs get a unit diagonal."""
    hessian = gram.double().clone()
    diagonal = hessian.diagonal()
    alive = diagonal > 0
    scale = float(diagonal[alive].mean()) if bool(alive.any()) else 1.0
    hessian /= scale
    diagonal[~alive] = 1.0
    diagonal += damping
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)
