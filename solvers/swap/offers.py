"""What rows of a shared budget offer where weights are unchanged: the objective f, for any device.

With c = G(w ⊙ pruned) (+ g), pruning a kept u costs w_u²G_uu + 2 w_u c_u, keeping a pruned p again saves
2 w_p c_p − w_p²G_pp, and each of either kind moves the price of another j by 2 w_j w_u G_ju.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from maskopt.core.problem import LayerProblem
from maskopt.solvers.shared_budget.transfer import OFFERED, Offers

#: rows whose offers are made at a time
_ROWS = 512


def offers(problem: LayerProblem, mask: Bool[Tensor, "rows n"]) -> Offers:
    """The offers of every row, in float64."""
    return Offers.joined([_some(part, mask[rows]) for rows, part in problem.tiles(_ROWS)])


def _some(problem: LayerProblem, mask: Tensor) -> Offers:
    w = problem.weight.double()
    twice = 2 * w * (problem.products(torch.where(mask, 0.0, w)) + problem.correlation)
    own = w.square() * problem.gram.diagonal().double()
    found = Offers.none(problem.rows, mask.device)
    price = (own + twice).masked_fill(~mask, torch.inf)
    _in_order(problem, price, found.removals, found.costs)
    # what a return costs is what it saves, negative
    price = (own - twice).masked_fill(mask, torch.inf)
    _in_order(problem, price, found.returns, found.gains.neg_())
    found.gains.neg_()
    return found


def _in_order(problem: LayerProblem, price: Tensor, inputs: Tensor, prices: Tensor) -> None:
    """The cheapest input of every row, again and again, among the inputs that are cheapest at first."""
    first = price.topk(min(OFFERED, problem.n), 1, largest=False)
    value, index = first.values.clone(), first.indices
    w = problem.weight.double().gather(1, index)
    cross = problem.gram[index[:, :, None], index[:, None, :]].double()
    cross *= 2 * w[:, :, None] * w[:, None, :]
    rows = torch.arange(problem.rows, device=price.device)
    for step in range(index.shape[1]):
        cheapest = value.min(1)
        there = cheapest.values < torch.inf
        if not bool(there.any()):
            return
        inputs[there, step] = index[rows, cheapest.indices][there]
        prices[there, step] = cheapest.values[there]
        value += cross[rows, cheapest.indices]
        value[rows, cheapest.indices] = torch.inf
