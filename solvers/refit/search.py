"""1-swap search on refitted weights, to a proven 1-swap optimum of F. One row at a time, all in float64.

1. *search*: kept inputs that cost little and pruned ones that save much are candidates; the best exchange
   among them is made again and again, on the small tableau of the candidates alone, and what was exchanged
   on the whole goes into M as one pivot, a matrix product. Again with fresh candidates, until they hold no
   improving pair.
2. *scan*: all pairs, by screening and exactly (`maskopt.solvers.refit.state`). None improves: the mask is
   proven 1-swap optimal. Else the inputs of the best pairs are the candidates, and it goes on with 1.

An M that drifted is made from scratch before anything more is searched or claimed on it: exchanges that do
not pay would follow each other for ever.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from maskopt.limits import Limits
from maskopt.solution import REFIT_FLOOR, SWAP_TOLERANCE
from maskopt.solvers.pooled.offers import Offers
from maskopt.solvers.refit.block import exchanges
from maskopt.solvers.refit.state import Pairs, Row

#: candidates on each side; on both together, where an input meets few others, those of its group
CANDIDATES, OF_GROUPS = 48, 256
#: relative error of M at which it is made anew
_DRIFT = 1e-9
#: part of the tolerance of SWAP_OPTIMAL that the search goes below, so that rounding never decides a claim
_PART = 0.5


@dataclass
class Found:
    """What became of a row.

    Attributes:
        mask: bool [n], True = kept.
        weight: float64 [n], refitted.
        proven: whether the last scan found no improving pair.
        objectives: F at the start, and after every round.
        offers: what it has to offer to other rows, where rows trade.
    """

    mask: Tensor
    weight: Tensor
    proven: bool = False
    swaps: int = 0
    scans: int = 0
    rounds: int = 0
    pairs: int = 0
    objectives: list[float] = field(default_factory=list)
    offers: Offers | None = None


def refine(row: Row, objective: float, mass: float, most: int, limits: Limits) -> Found:
    """Swap a row, which is used up.

    Args:
        objective: F of its mask.
        mass: Σⱼ wⱼ²Gⱼⱼ, the scale of rounding.
        most: swaps at most.
    """
    found = Found(row.mask(), row.weights(), objectives=[objective])
    if not len(row.kept) or not len(row.pruned):
        found.proven = True
        return found
    count = CANDIDATES if row.metric.group_size == len(row.target) else OF_GROUPS
    nothing_kept = objective + row.explained()
    while True:
        threshold = _PART * SWAP_TOLERANCE * max(objective, 0.0) + REFIT_FLOOR * mass
        left, fresh = 0 if limits.expired else most - found.swaps, row.fresh
        made = _exchange(row, row.likely(count), threshold, left)
        if not made:
            pairs = _scan(row, count, threshold)
            found.scans += 1
            found.proven = pairs is None
            made = 0 if pairs is None else _exchange(row, pairs, threshold, left)
        if not made:
            break
        if row.drift() > _DRIFT:
            row.renew()
        now = nothing_kept - row.explained()
        if not now <= objective:  # it promised too much: what was before stays
            if fresh:
                break
            row.begin(found.mask)
            continue
        objective = now
        found.mask, found.weight = row.mask(), row.weights()
        found.swaps += made
        found.rounds += 1
        found.objectives.append(objective)
    found.pairs = row.formed
    return found


def _scan(row: Row, count: int, threshold: float) -> Pairs | None:
    """All pairs; of an M that is good enough for a claim."""
    row.settle()
    pairs = row.improving(count, threshold)
    if pairs is None and not row.fresh and row.drift() > _DRIFT:
        row.renew()
        pairs = row.improving(count, threshold)
    return pairs


def _exchange(row: Row, pairs: Pairs, threshold: float, most: int) -> int:
    """Search among candidates, and exchange what pays; the number of swaps."""
    if most <= 0:
        return 0
    block = row.block(pairs)
    count, size = len(pairs.u), len(block.y)
    inputs = torch.cat([row.kept[pairs.u], row.pruned[pairs.p]]).cpu()
    who = torch.arange(size)
    made = exchanges(
        block.z.cpu().clone().numpy(),
        block.y.cpu().clone().numpy(),
        who.numpy(),
        (inputs // row.metric.group_size).numpy(),
        count,
        threshold,
        min(most, 2**62),
    )
    kept = torch.zeros(size, dtype=torch.bool).index_fill_(0, who[:count], True)
    left = (~kept[:count]).nonzero()[:, 0].to(row.v.device)
    came = kept[count:].nonzero()[:, 0].to(row.v.device)
    if len(left):
        both = torch.cat([left, count + came])
        block.columns, block.y = block.columns[:, both], block.y[both]
        block.z = block.z[both[:, None], both[None, :]]
        row.exchange(pairs.u[left], pairs.p[came], block)
    return made
