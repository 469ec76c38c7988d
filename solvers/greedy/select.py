"""Exact-count selection, shared by every solver that ranks inputs by a score."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from maskopt.problem import LayerProblem


def keep_highest(problem: LayerProblem, score: Shaped[Tensor, "rows n"]) -> Bool[Tensor, "rows n"]:
    """Prune exactly `pruned_per_group` of least score in every group, or where rows trade so many of the
    layer; of equals the lowest index.

    Where a row's count has limits, what it prunes in any case goes first, and what it keeps in any case last:
    the least sum there is, since the costs of one input more of a row only rise.

    Threshold rules (`score <= sorted[k]`) prune every tie; here those beyond the count stay.
    """
    if problem.pooled:
        grouped, pruned = within_limits(problem, score).reshape(1, 1, -1), problem.pruned
    else:
        grouped, pruned = (
            score.reshape(problem.rows, -1, problem.group_size),
            problem.pruned_per_group,
        )
    if pruned == 0:
        return torch.ones_like(score, dtype=torch.bool)
    highest = grouped.kthvalue(pruned, dim=-1, keepdim=True).values  # of those that go
    tied = grouped == highest
    last = pruned - (grouped < highest).sum(-1, keepdim=True)
    mask = (grouped > highest) | (tied & (tied.cumsum(-1) > last))
    return mask.view(problem.rows, problem.n)


def within_limits(
    problem: LayerProblem, score: Shaped[Tensor, "rows n"]
) -> Shaped[Tensor, "rows n"]:
    """Of rows that trade: −∞ for the least scores of a row that its least count takes, of equals the lowest
    index, and ∞ for those that are beyond its most."""
    least, most = problem.row_limits
    if (least, most) == (0, problem.n):
        return score
    rank = score.argsort(dim=1, stable=True).argsort(1)
    return score.masked_fill(rank < least, -torch.inf).masked_fill(rank >= most, torch.inf)
