"""Greedy backward elimination: prune one weight at a time by its exact marginal cost.

With S pruned already and c = G(w⊙1_S), pruning j as well costs 2 w_j c_j + w_j² G_jj more. Each
step takes the cheapest j of every row that its group still allows, then updates c by one column of G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskopt.problem import LayerProblem
from maskopt.solution import Solution
from maskopt.solver import Capabilities

#: working memory per tile of rows
_TILE_BYTES = 256 * 2**20


class EliminationSolver:
    """O(rows·n·s) time, float64, rows in tiles; ties go to the lowest index."""

    name = "elimination"
    capabilities = Capabilities(note="greedy by exact marginal cost")
    default_warm_start: str | None = None

    def unavailable(self) -> str | None:
        return None

    def solve(self, problem: LayerProblem, *, warm_start: Tensor | None = None) -> Solution:
        """Starts from the dense row; a warm start is not used."""
        tile = max(1, _TILE_BYTES // (6 * 8 * problem.n))
        masks = [
            _eliminate(problem.take(slice(first, first + tile)))
            for first in range(0, problem.rows, tile)
        ]
        return Solution.of(problem, torch.cat(masks), solver=self.name)


def _eliminate(problem: LayerProblem) -> Tensor:
    weight = problem.weight.double()
    gram = problem.gram.double()
    rows, n, group = problem.rows, problem.n, problem.group_size
    own_cost = weight.square() * gram.diagonal()
    c = torch.zeros_like(weight)
    kept = torch.ones_like(weight, dtype=torch.bool)
    left = torch.full((rows, n // group), problem.pruned_per_group, device=weight.device)
    index = torch.arange(rows, device=weight.device)
    for _ in range(problem.pruned_per_group * (n // group)):
        allowed = kept & (left > 0).repeat_interleave(group, dim=1)
        cost = torch.where(allowed, 2 * weight * c + own_cost, torch.inf)
        chosen = cost.argmin(1)
        kept[index, chosen] = False
        left[index, chosen // group] -= 1
        c += weight[index, chosen, None] * gram[chosen]
    return kept
