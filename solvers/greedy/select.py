"""Exact-count selection, shared by every solver that ranks inputs by a score."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from maskopt.problem import LayerProblem


def keep_highest(problem: LayerProblem, score: Shaped[Tensor, "rows n"]) -> Bool[Tensor, "rows n"]:
    """Prune exactly `pruned_per_group` of least score in every group; of equals the lowest index.

    Threshold rules (`score <= sorted[k]`) prune every tie; ranks by a stable sort do not.
    """
    grouped = score.reshape(problem.rows, -1, problem.group_size)
    order = grouped.argsort(dim=-1, stable=True)
    mask = torch.ones_like(grouped, dtype=torch.bool)
    mask.scatter_(-1, order[..., : problem.pruned_per_group], False)
    return mask.view(problem.rows, problem.n)
