"""What a row that trades offers where weights are refitted: the objective F, from the row's tableau.

On T = [[−M, B], [Bᵀ, C]] of some candidates, pruning u costs y_u²/M_uu, keeping p again saves y_p²/C_pp, and
either is a pivot on one diagonal entry, after which the next is priced.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.solvers.pooled.offers import OFFERED, Offers
from maskopt.solvers.refit.block import one_sided
from maskopt.solvers.refit.state import Pairs, Row


def offers(row: Row) -> Offers:
    """Of a row whose M is good enough for a claim; float64."""
    found = Offers.none(1, row.v.device)
    cheapest = row.costs().topk(min(OFFERED, len(row.kept)), largest=False).indices
    pairs = Pairs(cheapest, _dearest(row))
    block, count = row.block(pairs), len(pairs.u)
    z, y = block.z.cpu().clone().numpy(), block.y.cpu().clone().numpy()
    for part, inputs, into, prices in (
        (slice(0, count), row.kept[pairs.u], found.removals, found.costs),
        (slice(count, None), row.pruned[pairs.p], found.returns, found.gains),
    ):
        size = len(inputs)
        alone = np.zeros(size, np.int64), np.full(1, size)
        which, values = one_sided(z[part, part].copy(), y[part].copy(), *alone, size)
        into[0, : len(which)] = inputs[torch.from_numpy(which).to(inputs.device)]
        prices[0, : len(which)] = torch.from_numpy(values)
    return found


def _dearest(row: Row) -> Tensor:
    """Slots of pruned inputs of largest r_p²/C_pp, the largest of all for certain.

    r_p²H_pp is no less than that, so that only what is above the best of those that seem good is priced.
    """
    most, count = row.gains(), min(OFFERED, len(row.pruned))
    slots = row.likely(count).p
    exact = _gains(row, slots)
    if len(slots) < len(row.pruned):
        other = most > exact.max()
        other[slots] = False
        rest = other.nonzero()[:, 0]
        slots, exact = torch.cat([slots, rest]), torch.cat([exact, _gains(row, rest)])
    return slots[exact.topk(count).indices]


def _gains(row: Row, slots: Tensor) -> Float[Tensor, " some"]:
    """r_p²/C_pp."""
    if not len(slots):
        return row.r[slots]
    return row.r[slots].square() / row.columns(slots)[1]
