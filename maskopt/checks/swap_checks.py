"""The independent check of 1-swap optimality. Nothing here is shared with any solver.

Everything is computed in float64 from the definition: f(p) = pᵀQp with Q = diag(w)·G·diag(w), and a
swap of a kept u against a pruned p changes f by

    Δ(u, p) = 2 w_u c_u + w_u² G_uu − 2 w_p c_p + w_p² G_pp − 2 w_u w_p G_up,   c = G (w ⊙ p)

(SparseSwaps, arXiv 2512.10922), with c = G (w ⊙ p) + g where f has a linear part 2 gᵀ(w ⊙ p). For refitted
weights see `maskopt.checks.refit_checks`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maskopt.checks.pooled_checks import Trade, improving_trade
from maskopt.checks.refit_checks import improving_refit_swap, within_range
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.errors import VerificationError
from maskopt.protocol.solution import SWAP_TOLERANCE, swap_threshold

#: pairs whose Δ is formed at a time
PAIRS_AT_ONCE = 2**22


class Exchange(NamedTuple):
    """Keep input `pruned`, which the mask prunes now, instead of `kept`, which it keeps: the objective
    changes by `delta` (< 0)."""

    kept: int
    pruned: int
    delta: float


def improving_swap(
    problem: RowProblem | LayerProblem, mask: Tensor, tolerance: float = SWAP_TOLERANCE
) -> Exchange | Trade | None:
    """The best legal 1-swap of one row in float64, or None where none improves. Of a layer whose rows trade,
    the best inside a row or between two.

    Args:
        problem: a row (or a layer of one row), or a layer whose rows trade.
        mask: bool [n] or [1, n] or [rows, n], True = kept; must be legal.
        tolerance: a swap improves when it lowers f (F with `refit`) by more than tolerance·f (and by more
            than float64 rounding, see `swap_threshold`); 0 asks for any decrease above rounding.

    Returns:
        (kept, pruned, delta), ties broken by lowest kept, then lowest pruned index; or None. Of a
        layer whose rows trade (kept, pruned, delta, row, other), `delta` of its sum.
    """
    layer = problem.as_layer() if isinstance(problem, RowProblem) else problem
    if layer.pooled:
        return _improving_in_layer(layer, layer.check_mask(mask), tolerance)
    if layer.rows != 1:
        raise VerificationError("improving_swap takes one row; use problem.row(i)")
    mask = layer.check_mask(mask)[0]
    if layer.refit is not None:
        found = improving_refit_swap(layer, mask, tolerance)
        return None if found is None else Exchange(*found)
    w = layer.weight[0].double()
    scale = within_range(w)
    w = w * scale
    gram = layer.gram
    dropped = torch.where(mask, 0.0, w)
    c = torch.cat([part.double() @ dropped for part in gram.split(max(1, PAIRS_AT_ONCE // len(w)))])
    objective, diagonal = dropped @ c, w.square() * gram.diagonal().double()
    mass = diagonal.sum()
    if layer.linear is not None:
        correlation, constant = (
            layer.linear.correlation[0] * scale,
            layer.linear.constant[0] * scale * scale,
        )
        objective = objective + 2 * dropped @ correlation + constant
        c, mass = c + correlation, mass + constant
    threshold = float(swap_threshold(objective.clamp(min=0.0), mass, tolerance))
    gain_kept = 2 * w * c + diagonal
    gain_pruned = diagonal - 2 * w * c

    group = layer.group_size
    best: Exchange | None = None
    for first in range(0, layer.n, group):
        inside = torch.arange(first, first + group, device=mask.device)
        kept, pruned = inside[mask[inside]], inside[~mask[inside]]
        if not len(kept) or not len(pruned):
            continue
        for part in kept.split(max(1, PAIRS_AT_ONCE // len(pruned))):
            cross = gram[part][:, pruned].double()
            delta = gain_kept[part][:, None] + gain_pruned[pruned][None, :]
            delta = delta - 2 * w[part][:, None] * w[pruned][None, :] * cross
            position = int(delta.argmin())
            value = float(delta.flatten()[position])
            if value < -threshold and (best is None or value < best.delta):
                row, column = divmod(position, len(pruned))
                best = Exchange(int(part[row]), int(pruned[column]), value)
    return best and best._replace(delta=best.delta / scale / scale)


def _improving_in_layer(layer: LayerProblem, mask: Tensor, tolerance: float) -> Trade | None:
    """The best swap of any row at its own count, or the best trade of two, where that is better."""
    found = improving_trade(layer, mask, tolerance)
    for row in range(layer.rows):
        swap = improving_swap(layer.at_count_of(mask, row), mask[row], tolerance)
        if swap is not None:
            delta = swap.delta * float(layer.shares[row])
            if found is None or delta < found.delta:
                found = Trade(swap.kept, swap.pruned, delta, row, row)
    return found
