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

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from maskopt.core.files import join_rows
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.core.threads import one_thread_each, threads_on
from maskopt.protocol.solution import REFIT_FLOOR, SWAP_TOLERANCE, Solution
from maskopt.protocol.trace import Trace
from maskopt.solvers.least_squares.compiled_row import exchanges, one_sided
from maskopt.solvers.least_squares.state import DRIFT, Metric, Row, Scratch, Slots
from maskopt.solvers.shared_budget import OFFERED, Offers, by_count, searched, transfer

#: candidates on each side; on both together, where an input meets few others, those of its group
CANDIDATES, OF_GROUPS = 48, 256
#: part of the tolerance of SWAP_OPTIMAL that the search goes below, so that rounding never decides a claim
_PART = 0.5
#: part of what was promised that has to come of it
_KEPT = 0.5
#: part of the tolerance that r may be off by where all pairs are priced
_NOISE = 1e-3
#: rows whose M are made together, at most, and bytes of these
_TOGETHER, _TOGETHER_BYTES = 16, 2**25


@dataclass
class Found:
    """The result of a row, on the CPU.

    Attributes:
        mask: bool [n], True = kept.
        weight: updated weights, float64 [n].
        proven: whether the last scan found no improving pair.
        objectives: F at the start and after every round.
        offers: inputs for exchanges with other rows of a shared budget.
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
    """Swap inputs of a row in place, at most `most` times; `objective`: F of its mask, `mass`: Σⱼ wⱼ²Gⱼⱼ."""
    result = Found(row.mask(), row.weights(), objectives=[objective])
    if not len(row.kept) or not len(row.pruned):
        result.proven = True
        return result
    count = CANDIDATES if row.metric.group_size == len(row.target) else OF_GROUPS
    nothing_kept = objective + row.explained
    best = row.kept.clone(), row.pruned.clone(), row.v.clone()
    while True:
        threshold = _PART * SWAP_TOLERANCE * max(objective, 0.0) + REFIT_FLOOR * mass
        left, fresh = 0 if limits.expired else most - result.swaps, row.fresh
        made = _exchange(row, row.likely(count), threshold, left)
        if not made:
            # all pairs; of an M and a v that are good enough for a claim
            if not row.fresh and row.drift() > DRIFT:
                row.renew(row.kept, row.pruned)
            row.settle(_NOISE * threshold, objective)
            pairs = row.improving(count, threshold)
            result.scans += 1
            result.proven = pairs is None
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
        result.swaps += made
        result.rounds += 1
        result.objectives.append(objective)
    result.mask.zero_()[best[0]] = True
    result.weight.zero_()[best[0]] = best[2]
    result.pairs = row.formed
    return result


def _exchange(row: Row, slots: Slots, threshold: float, most: int) -> int:
    """Search among candidates, and exchange what pays; return the number of swaps."""
    if most <= 0:
        return 0
    (u, p), block = slots, row.block(*slots)
    count = len(u)
    group = torch.cat([row.kept[u], row.pruned[p]]) // row.metric.group_size
    z, y = block.z.clone().numpy(), block.y.clone().numpy()
    who, kept = np.arange(len(y)), np.zeros(len(y), np.bool_)
    made = exchanges(z, y, who, group.numpy(), count, threshold, min(most, 2**62))
    kept[who[:count]] = True
    left, came = np.flatnonzero(~kept[:count]), np.flatnonzero(kept[count:])
    if len(left):
        gone, back = torch.from_numpy(left), torch.from_numpy(came)
        row.exchange(u[gone], p[back], block.of(torch.cat([gone, count + back])))
    return made


def swap_refitted(
    problem: LayerProblem, start: Tensor, max_swaps: int | None, limits: Limits
) -> Solution:
    """Swap from a legal mask to proven 1-swap optima of F, or to a limit; a shared budget as a whole."""
    nothing = Offers.none(1, problem.device)

    def search(
        layer: LayerProblem, mask: Tensor, limits: Limits
    ) -> tuple[Solution, Callable[[], Offers]]:
        results = _searched(layer, mask, max_swaps, limits)
        return _solution(layer, results), lambda: Offers.joined(
            [r.offers or nothing for r in results]
        )

    return transfer(problem, start, search, limits)


def _searched(
    problem: LayerProblem, start: Tensor, max_swaps: int | None, limits: Limits
) -> list[Found]:
    """Search every row at the count of its own mask."""
    squares = problem.least_squares
    spread = squares.inverse.diagonal().cpu().clone()
    metric = Metric(squares.damped, spread, problem.group_size)
    target = squares.target(problem.weight, problem.correlation).cpu()
    if squares.flat:
        target.zero_()  # G is 0: every mask costs the same, whatever A says
    start, threads = start.cpu(), threads_on(problem.device)
    most = torch.iinfo(torch.int64).max if max_swaps is None else max_swaps
    of_thread, done = threading.local(), limits.counter(problem.rows)
    mass = problem.diagonal_mass().tolist()
    batches = _batches(start, threads)

    def search(number: int) -> list[Found] | None:
        """None: the time was over before the turn of these rows."""
        if limits.expired:
            return None
        if not hasattr(of_thread, "scratch"):
            of_thread.scratch = Scratch(problem.device)
        batch, found = batches[number], []
        rows = Row.several(metric, of_thread.scratch, target[batch], start[batch])
        weights = torch.stack([row.weights() for row in rows]).to(problem.device)
        objective = problem.take(batch).cost(weights).tolist()
        for index, row, cost in zip(batch.tolist(), rows, objective, strict=True):
            found.append(refine(row, cost, mass[index], most, limits))
            if problem.shared_budget and not squares.flat and found[-1].proven:
                found[-1].offers = _offers(row)
            done()
        return found

    rows: dict[int, Found] = {}
    for batch, found in zip(batches, one_thread_each(search, len(batches), threads), strict=True):
        if found is None:  # the start's masks, with their weights and costs
            part, masks = problem.take(batch), start[batch]
            weights = part.weights(masks.to(problem.device), limits)
            each = zip(masks, weights, part.cost(weights).tolist(), strict=True)
            found = [Found(mask, weight.cpu(), objectives=[cost]) for mask, weight, cost in each]
        rows.update(zip(batch.tolist(), found, strict=True))
    return [rows[index] for index in range(problem.rows)]


def _batches(start: Tensor, threads: int) -> list[Tensor]:
    """Batch rows that keep equally many, whose inverses are computed together."""
    batches: list[Tensor] = []
    for rows in by_count(start):
        fit = max(1, _TOGETHER_BYTES // (8 * max(1, int(start[rows[0]].sum())) ** 2))
        batches += rows.split(max(1, min(fit, _TOGETHER, -(-len(rows) // threads))))
    return batches


def _solution(problem: LayerProblem, rows: list[Found]) -> Solution:
    names = ("swaps", "scans", "rounds", "pairs")
    counts = {name: torch.tensor([getattr(row, name) for row in rows]) for name in names}
    history = join_rows([torch.tensor([row.objectives], dtype=torch.float64) for row in rows])
    trace = Trace(kernel="least squares", history=history, **counts)
    optimal = torch.tensor([row.proven for row in rows])
    mask = torch.stack([row.mask for row in rows]).to(problem.device)
    weight = torch.stack([row.weight for row in rows]).to(problem.device)
    squares = problem.least_squares
    if not squares.flat:
        target = squares.target(problem.weight, problem.correlation)
        # a search that stopped may have left weights that are not quite those of its mask
        weight = squares.settled(weight, target, mask)
    return searched(mask, problem.cost(weight), optimal, trace, weight)


def _offers(row: Row) -> Offers:
    """Return what a row whose M is good enough for a claim offers to others, in F, float64.

    On T = [[−M, B], [Bᵀ, C]] of some candidates, pruning u costs y_u²/M_uu, keeping p again saves y_p²/C_pp,
    and either is a pivot on one diagonal entry, after which the next is priced.
    """
    offers = Offers.none(1, row.m.device)
    cost = row.v.square() / row.m.diagonal().cpu()
    u = cost.topk(min(OFFERED, len(row.kept)), largest=False).indices
    p, count = _most_saving(row), len(u)
    block = row.block(u, p)
    z, y = block.z.numpy(), block.y.numpy()
    for part, inputs, into, prices in (
        (slice(0, count), row.kept[u], offers.removals, offers.costs),
        (slice(count, None), row.pruned[p], offers.returns, offers.gains),
    ):
        size = len(inputs)
        alone = np.zeros(size, np.int64), np.full(1, size)
        which, values = one_sided(z[part, part].copy(), y[part].copy(), *alone, size)
        into[0, : len(which)] = inputs[torch.from_numpy(which)]
        prices[0, : len(which)] = torch.from_numpy(values)
    return offers


def _most_saving(row: Row) -> Tensor:
    """Return slots of pruned inputs of largest r_p²/C_pp, the largest of all for certain.

    r_p²H_pp is no less, so that only what is above the best of the likely ones is priced.
    """
    most = row.r.square() * row.metric.spread[row.pruned]
    count = min(OFFERED, len(row.pruned))
    _, slots = row.likely(count)
    exact = row.gains(slots)
    if len(slots) < len(row.pruned):
        other = most > exact.max()
        other[slots] = False
        dearer = other.nonzero()[:, 0]
        slots, exact = torch.cat([slots, dearer]), torch.cat([exact, row.gains(dearer)])
    return slots[exact.topk(count).indices]
