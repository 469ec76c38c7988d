"""Greedy backward elimination: prune one weight at a time by its exact marginal cost.

With S pruned already and c = G(w⊙1_S), pruning j as well costs 2 w_j c_j + w_j² G_jj more. Each
step takes the cheapest j of every row that its group still allows, then updates c by one column of G.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities, Solver
from maskopt.solvers.greedy.scores import wanda_scores
from maskopt.solvers.greedy.select import keep_highest

#: working memory per tile of rows, where the caller sets no limit
_TILE_BYTES = 256 * 2**20
#: float64 arrays [rows, n] that a step holds
_ARRAYS = 6


@dataclass(frozen=True)
class Elimination(Solver):
    """O(rows·n·s), float64, in tiles; ties: the lowest index. After the time limit Wanda's score decides."""

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
