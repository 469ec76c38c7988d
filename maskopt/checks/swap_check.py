"""The independent check of 1-swap optimality. Nothing here is shared with any solver.

A swap inside a row changes its objective by Δ(u, p) of `maskopt.checks.costs`. Rows do not interact: a swap
between two rows of a shared budget changes Σ ωᵣ fᵣ by what pruning costs the one, less what the other saves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from maskopt.checks.costs import AT_ONCE, costs_of
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.errors import VerificationError
from maskopt.protocol.solution import SWAP_TOLERANCE, swap_threshold


class SwapMove(NamedTuple):
    """Prune input `kept` of row `row`, and keep input `pruned` of row `other`, which the mask prunes: the
    objective, of a shared budget the sum Σ ωᵣ fᵣ, changes by `delta` (< 0)."""

    kept: int
    pruned: int
    delta: float
    row: int = 0
    other: int = 0


def improving_swap(
    problem: RowProblem | LayerProblem, mask: Tensor, tolerance: float = SWAP_TOLERANCE
) -> SwapMove | None:
    """The best legal swap of one row, or of a layer with a shared budget, in float64; ties: the lowest kept,
    then the lowest pruned index; None: none improves.

    Args:
        problem: a row, a layer of one row, or a layer with a shared budget; VerificationError for others.
        mask: bool [n], [1, n] or [rows, n], True = kept; must be legal.
        tolerance: a swap improves when it lowers the objective by more than this part of it and by more than
            float64 rounding (`swap_threshold`); 0 asks for any decrease above rounding.
    """
    layer = problem.as_layer()
    if layer.rows != layer.rows_per_budget:
        raise VerificationError("improving_swap takes one row; use problem.row(i)")
    mask = layer.check_mask(mask)
    found = [improving_swap_between_rows(layer, mask, tolerance)] if layer.rows > 1 else []
    found += [_inside(layer, mask, row, tolerance) for row in range(layer.rows)]
    return min((move for move in found if move), key=lambda move: move.delta, default=None)


def _inside(
    layer: LayerProblem, mask: Bool[Tensor, "rows n"], row: int, tolerance: float
) -> SwapMove | None:
    """The best swap of one row at its own count."""
    swaps = costs_of(layer).swaps(mask, row)
    share = float(layer.shares[row]) if layer.shared_budget else 1.0
    least = -float(swap_threshold(swaps.objective, swaps.mass, tolerance, update=layer.update))
    best: SwapMove | None = None
    for inside in torch.arange(layer.n, device=mask.device).split(layer.group_size):
        kept, pruned = inside[mask[row, inside]], inside[~mask[row, inside]]
        if not len(kept) or not len(pruned):
            continue
        for part in kept.split(max(1, AT_ONCE // len(pruned))):
            delta = swaps.delta(part, pruned)
            i, j = divmod(int(delta.argmin()), len(pruned))
            if (value := float(delta[i, j])) < least:
                best, least = SwapMove(int(part[i]), int(pruned[j]), value, row, row), value
    return best and best._replace(delta=share * (best.delta / swaps.scale / swaps.scale))


def improving_swap_between_rows(
    layer: LayerProblem, mask: Bool[Tensor, "rows n"], tolerance: float
) -> SwapMove | None:
    """The best swap between two rows of a shared budget that lowers the sum by more than `swap_threshold` of
    both."""
    prices, share = costs_of(layer).prices(mask), layer.shares
    mass = layer.diagonal_mass()
    slack = swap_threshold(prices.objective, mass, tolerance, update=layer.update)
    low, high = prices.prune.min(1), prices.keep.max(1)
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
    delta = float(share[row] * low.values[row] - share[other] * high.values[other])
    return SwapMove(int(low.indices[row]), int(high.indices[other]), delta, row, other)
