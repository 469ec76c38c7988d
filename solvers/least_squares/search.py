"""1-swap search on updated weights, to a proven 1-swap optimum of F. One row at a time, all in float64.

1. *search*: kept inputs that cost little and pruned ones that save much are candidates; the best exchange
   among them is made again and again, on the small tableau of the candidates alone, and all exchanges go into
   M as one pivot. Again with fresh candidates, until they hold no improving pair.
2. *scan*: all pairs, by screening and exactly (`state`). None improves: the mask is proven 1-swap optimal.
   Else the inputs of the best pairs are the candidates, and it goes on with 1.

The gain of a round is computed from the weights. Where it is less than M promised, M has drifted: the round
is undone, and M made from scratch, as before any claim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from maskopt.core.limits import Limits
from maskopt.protocol.solution import REFIT_FLOOR, SWAP_TOLERANCE
from maskopt.solvers.least_squares.block import exchanged
from maskopt.solvers.least_squares.state import DRIFT, Pairs, Row
from maskopt.solvers.shared_budget.transfer import Offers

#: candidates on each side; on both together, where an input meets few others, those of its group
CANDIDATES, OF_GROUPS = 48, 256
#: part of the tolerance of SWAP_OPTIMAL that the search goes below, so that rounding never decides a claim
_PART = 0.5
#: part of what was promised that has to come of it
_KEPT = 0.5
#: part of the tolerance that r may be off by where all pairs are priced
_NOISE = 1e-3


@dataclass
class Found:
    """The result of a row: mask bool [n] and updated weights float64 [n], whether the last scan found no
    improving pair, F at the start and after every round, and offers to other rows of a shared budget."""

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
    """Swap a row, which is used up, at most so often; `objective`: F of its mask, `mass`: Σⱼ wⱼ²Gⱼⱼ."""
    found = Found(row.mask(), row.weights(), objectives=[objective])
    if not len(row.kept) or not len(row.pruned):
        found.proven = True
        return found
    count = CANDIDATES if row.metric.group_size == len(row.target) else OF_GROUPS
    nothing_kept = objective + row.explained
    best = row.kept.clone(), row.pruned.clone(), row.v.clone()
    while True:
        threshold = _PART * SWAP_TOLERANCE * max(objective, 0.0) + REFIT_FLOOR * mass
        left, fresh = 0 if limits.expired else most - found.swaps, row.fresh
        made = _exchange(row, row.likely(count), threshold, left)
        if not made:
            pairs = _scan(row, count, threshold, objective)
            found.scans += 1
            found.proven = pairs is None
            made = 0 if pairs is None else _exchange(row, pairs, threshold, left)
        if not made:
            best = row.kept, row.pruned, row.v
            break
        now = nothing_kept - row.explained
        if not fresh and not objective - now > _KEPT * made * threshold:
            row.renew(*best[:2])  # M promised more than came of it
            continue
        if not now < objective:  # what is left is rounding
            break
        objective = now
        best = row.kept.clone(), row.pruned.clone(), row.v.clone()
        found.swaps += made
        found.rounds += 1
        found.objectives.append(objective)
    found.mask.zero_()[best[0]] = True
    found.weight.zero_()[best[0]] = best[2]
    found.pairs = row.formed
    return found


def _scan(row: Row, count: int, threshold: float, objective: float) -> Pairs | None:
    """All pairs; of an M and a v that are good enough for a claim."""
    if not row.fresh and row.drift() > DRIFT:
        row.renew(row.kept, row.pruned)
    row.settle(_NOISE * threshold, objective)
    return row.improving(count, threshold)


def _exchange(row: Row, pairs: Pairs, threshold: float, most: int) -> int:
    """Search among candidates, and exchange what pays; the number of swaps."""
    if most <= 0:
        return 0
    block = row.block(pairs)
    count = len(pairs.u)
    group = torch.cat([row.kept[pairs.u], row.pruned[pairs.p]]).cpu() // row.metric.group_size
    made, left, came = exchanged(
        block.z.cpu().numpy(),
        block.y.cpu().numpy(),
        group.numpy(),
        count,
        threshold,
        min(most, 2**62),
    )
    if len(left):
        gone, back = (torch.from_numpy(x).to(row.v.device) for x in (left, came))
        row.exchange(pairs.u[gone], pairs.p[back], block.of(torch.cat([gone, count + back])))
    return made
