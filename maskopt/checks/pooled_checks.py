"""The independent checks of layers whose rows trade. Nothing here is shared with any solver.

Pruning one more input of a row, or keeping one again, is priced as a difference of two objectives by
definition, in float64:

    f:  w_u²G_uu + 2 w_u c_u  and  2 w_p c_p − w_p²G_pp,   c = G(w ⊙ pruned) + g
    F:  v_u²/M_uu  and  r_p²/K_pp                          (see `maskopt.checks.refit_checks`)

Rows do not interact, so a trade changes Σ ωᵣ fᵣ by the difference of two of these.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.checks.refit_checks import refit_prices, refitted_costs
from maskopt.core.problem import LayerProblem
from maskopt.protocol.solution import swap_threshold

#: numbers of G that are brought to float64 at a time
_AT_ONCE = 2**23


class Trade(NamedTuple):
    """Keep `pruned` of row `other` instead of `kept` of row `row`, which may be the same: Σ ωᵣ fᵣ changes by
    `delta` (< 0)."""

    kept: int
    pruned: int
    delta: float
    row: int
    other: int


def improving_trade(layer: LayerProblem, mask: Tensor, tolerance: float) -> Trade | None:
    """The best trade between two rows that lowers the sum by more than the tolerance of both; or None.

    Args:
        mask: bool [rows, n], legal.
        tolerance: of the objective of each of the two rows, beside the rounding (`swap_threshold`).
    """
    cost, gain, objective = _prices(layer, mask)
    refit, share = layer.refit is not None, layer.shares
    slack = swap_threshold(objective, layer.diagonal_mass(), tolerance, refit=refit)
    low, high = cost.min(1), gain.max(1)
    pruned, (least, most) = (~mask).sum(1), layer.row_limits
    low.values[pruned >= most], high.values[pruned <= least] = torch.inf, -torch.inf
    give, take = share * (low.values + slack), share * (high.values - slack)
    # the best of each side, and the next best where both are of one row: inside a row the two interact
    pairs = [
        (float(give[i] - take[j]), i, j)
        for i in give.argsort(stable=True)[:2].tolist()
        for j in take.argsort(descending=True, stable=True)[:2].tolist()
        if i != j
    ]
    if not pairs or not min(pairs)[0] < 0:
        return None
    _, row, other = min(pairs)
    value = share[row] * low.values[row] - share[other] * high.values[other]
    return Trade(int(low.indices[row]), int(high.indices[other]), float(value), row, other)


def _prices(layer: LayerProblem, mask: Tensor) -> tuple[Tensor, Tensor, Float[Tensor, " rows"]]:
    """What pruning costs (∞ for what is pruned) and keeping again saves (−∞ for what is kept), float64
    [rows, n], and the objectives."""
    if layer.refit is not None:
        parts = [refit_prices(layer.take([row]), mask[row]) for row in range(layer.rows)]
        cost, gain, objective = (torch.stack([part[i] for part in parts]) for i in range(3))
        return cost, gain, objective
    w, gram = layer.weight.double(), layer.gram
    dropped = w * ~mask
    step = max(1, _AT_ONCE // layer.n)
    c = torch.cat([dropped @ part.double().T for part in gram.split(step)], 1)
    objective = (dropped * c).sum(1)
    if layer.linear is not None:
        c = c + layer.linear.correlation
        objective = objective + layer.linear.value(dropped)
    alone = w.square() * gram.diagonal().double()
    cost = (alone + 2 * w * c).masked_fill(~mask, torch.inf)
    gain = (2 * w * c - alone).masked_fill(mask, -torch.inf)
    return cost, gain, objective.clamp(min=0.0)


def least_sum(layer: LayerProblem) -> float:
    """min Σ ωᵣ fᵣ over all legal masks, float64: all 2ⁿ masks of every row, and then counts
    put together row by row."""
    best, (least, most) = torch.zeros(1, dtype=torch.float64), layer.row_limits
    for row in range(layer.rows):
        own = _least_by_count(layer, row) * float(layer.shares[row])
        own[:least], own[most + 1 :] = torch.inf, torch.inf
        size = len(best) + layer.n
        longer = torch.full((size,), torch.inf, dtype=torch.float64)
        for count, value in enumerate(own):
            end = count + len(best)
            longer[count:end] = torch.minimum(longer[count:end], best + value)
        best = longer
    return float(best[layer.pruned])


def _least_by_count(layer: LayerProblem, row: int) -> Float[Tensor, " counts"]:
    """The least objective of a row with 0 … n inputs pruned."""
    masks = (torch.arange(2**layer.n)[:, None] >> torch.arange(layer.n)) & 1
    counts = masks.sum(1)
    least = []
    for count in range(layer.n + 1):
        p = masks[counts == count].double()
        if layer.refit is not None:
            costs = refitted_costs(layer, row, p)
        else:
            dropped = p * layer.weight[row].double().cpu()
            costs = ((dropped @ layer.gram.double().cpu()) * dropped).sum(1)
            if layer.linear is not None:
                one = layer.linear.take([row])
                costs = costs + 2 * dropped @ one.correlation[0].cpu() + one.constant.cpu()
        least.append(costs.min())
    return torch.stack(least).clamp(min=0.0)
