"""Exact-count selection, shared by every solver that ranks inputs by a score."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from maskopt.core.problem import LayerProblem

#: up to so many of torch's threads, numpy's one is no slower: it partitions by vector instructions, in a
#: fifth to a sixth of the time of one of torch's
_THREADS = 6


def keep_highest(problem: LayerProblem, score: Shaped[Tensor, "rows n"]) -> Bool[Tensor, "rows n"]:
    """Prune exactly `pruned_per_group` of least score in every group, or of a shared budget so many of the
    layer; ties: the lowest index. Within limits of a row's count, what it prunes in any case goes first, and
    what it keeps in any case last, which gives the least sum."""
    if problem.shared_budget:
        gone = _least_of_layer(problem, score)
    else:
        gone = _least(score.reshape(-1, problem.group_size), problem.pruned_per_group)
    return ~gone.view(problem.rows, problem.n)


def highest(score: Shaped[Tensor, "... n"], count: int) -> Bool[Tensor, "... n"]:
    """The `count` highest along the last axis; of equals the lowest index."""
    order = score.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)


def _least_of_layer(
    problem: LayerProblem, score: Shaped[Tensor, "rows n"]
) -> Bool[Tensor, "rows n"]:
    fewest, most = problem.row_limits
    if (fewest, most) == (0, problem.n):
        return _least(score.reshape(1, -1), problem.pruned)
    gone = _least(score, fewest)
    free = _least(score, most) & ~gone
    gone[free] = _least(score[None, free], problem.pruned - fewest * problem.rows)[0]
    return gone


def _least(score: Shaped[Tensor, "groups n"], count: int) -> Bool[Tensor, "groups n"]:
    """The `count` least of every group; of equals the lowest index."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    highest = _last_of(score, count)
    within = score <= highest
    if int(within.sum()) == count * len(score):
        return within
    tied = score == highest
    left = count - (score < highest).sum(1, keepdim=True)
    return within & ~(tied & (tied.cumsum(1) > left))


def _last_of(score: Shaped[Tensor, "groups n"], count: int) -> Shaped[Tensor, "groups 1"]:
    """Of each group's `count` least the highest."""
    threads = min(len(score), torch.get_num_threads())
    if score.device.type == "cpu" and threads <= _THREADS:
        parted = np.partition(score.numpy(), count - 1, axis=1)
        return torch.from_numpy(parted[:, count - 1 : count])
    return score.kthvalue(count, dim=1, keepdim=True).values
