"""Swaps between the rows of a layer, until it is 1-swap optimal under its shared budget.

An exchange between two rows has no interaction term: pruning u in row i and keeping p of row j again changes
Σ ωᵣ fᵣ by ωᵢ·cost(u) − ωⱼ·gain(p). So a layer is 1-swap optimal if every row is, and the cheapest removal of
any row does not pay for the dearest return of another.

1. *search*: every row that changed is swapped to a 1-swap optimum at its own count.
2. *transfer*: removals by cost and returns by gain are paired off while they pay; each row gives or takes,
   not both. None pays: the layer is proven 1-swap optimal. Else again with 1.

Both steps only lower the layer's sum, and keep its count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.protocol.solution import Solution, Status, swap_threshold
from maskopt.protocol.trace import Trace

#: part of the tolerance of SWAP_OPTIMAL that transfers go below, so that rounding never decides a claim
_PART = 0.5
#: inputs on each side that a row offers at a time
OFFERED = 48


class Offers(NamedTuple):
    """The inputs that rows offer to prune (`removals`) or to keep again (`returns`), with float64 prices.

    Costs and gains are in units of the row's objective. Each input is priced as if those before it on its
    side were done. Where there is no further input it is −1, its cost ∞ and its gain −∞.
    """

    removals: Int[Tensor, "rows offered"]
    costs: Float[Tensor, "rows offered"]
    returns: Int[Tensor, "rows offered"]
    gains: Float[Tensor, "rows offered"]

    @classmethod
    def none(cls, rows: int, device: torch.device) -> Offers:
        no_input = torch.full((rows, OFFERED), -1, device=device)
        endless = torch.full((rows, OFFERED), torch.inf, dtype=torch.float64, device=device)
        return cls(no_input, endless, no_input.clone(), -endless)

    @classmethod
    def joined(cls, parts: list[Offers]) -> Offers:
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


#: (rows, their masks) → 1-swap optima at the masks' own counts, and what makes the rows' offers then
Search = Callable[[LayerProblem, Tensor, Limits], tuple[Solution, Callable[[], Offers]]]


def transfer(problem: LayerProblem, start: Tensor, search: Search, limits: Limits) -> Solution:
    """Improve legal masks to a proven 1-swap optimum of the layer, or until a limit is reached."""
    best, offers_of = search(problem, start, limits)
    if not problem.shared_budget:
        return best
    optimal, offers, trace = proven(best), offers_of(), best.trace
    history = [trace.history[:, 0].to(best.objective), best.objective.clone()]
    transferred = torch.zeros_like(trace.swaps)
    done = False
    while bool(optimal.all()) and not limits.expired:
        changed = transfers(offers, problem, best.objective, best.mask)
        if changed is None:
            done = True
            break
        transferred += changed.sum(1).cpu()
        rows = changed.any(1).nonzero()[:, 0]
        part, offers_of = search(problem.take(rows), (best.mask ^ changed)[rows], limits.quiet())
        optimal[rows] = proven(part)
        for old, new in zip(offers, offers_of(), strict=True):
            old[rows] = new
        for name in ("swaps", "scans", "rounds", "pairs"):
            getattr(trace, name)[rows.cpu()] += getattr(part.trace, name)
        swapped = best.with_rows(rows.tolist(), part)
        if problem.shares @ swapped.objective < problem.shares @ best.objective:
            best = swapped
        else:  # rounding promised too much
            optimal[:] = False
        history.append(best.objective.clone())
    limits.report(problem.rows, problem.rows)
    trace = replace(trace, history=torch.stack(history, 1).cpu(), transfers=transferred)
    return replace(best, status=statuses(torch.full_like(optimal, done)), trace=trace)


def searched(
    mask: Tensor, objective: Tensor, optimal: Tensor, trace: Trace, weight: Tensor | None = None
) -> Solution:
    """Return the solution of a 1-swap search, which gives no bound; `optimal`: bool [rows], 1-swap optima."""
    bound = torch.zeros_like(objective)
    return Solution(mask, objective, bound, statuses(optimal), trace=trace, weight=weight)


def statuses(optimal: Bool[Tensor, " rows"]) -> tuple[Status, ...]:
    """Return SWAP_OPTIMAL where a 1-swap optimum is proven, else FEASIBLE."""
    return tuple(Status.SWAP_OPTIMAL if row else Status.FEASIBLE for row in optimal.tolist())


def proven(solution: Solution) -> Bool[Tensor, " rows"]:
    """Invert `statuses`."""
    flags = [status is Status.SWAP_OPTIMAL for status in solution.status]
    return torch.tensor(flags, device=solution.mask.device)


def by_count(kept: Bool[Tensor, "rows n"]) -> list[Int[Tensor, " same_count"]]:
    """Group the indices of rows that keep equally many inputs; without a shared budget all are in one."""
    counts = kept.sum(1)
    return [(counts == count).nonzero()[:, 0] for count in counts.unique()]


def transfers(
    offers: Offers,
    problem: LayerProblem,
    objective: Float[Tensor, " rows"],
    mask: Bool[Tensor, "rows n"],
) -> Bool[Tensor, "rows n"] | None:
    """Choose the entries to change, as many removals as returns; None: nothing pays.

    They pay by more than the tolerances of both rows, and leave every row within its limits.
    """
    offers = _allowed(offers, problem.row_limits, (~mask).sum(1))
    share = problem.shares[:, None]
    mass = problem.diagonal_mass()
    slack = _PART * swap_threshold(objective, mass, update=problem.update)[:, None]
    single_cost, single_gain = share * (offers.costs + slack), share * (offers.gains - slack)
    # from the front of a row's offers only: one that is cheaper than those before it waits for them
    cost, gain = single_cost.cummax(1).values, single_gain.cummin(1).values
    count, price = _crossing(cost, gain)
    if not count:
        return None
    gives, takes = price - cost[:, 0], gain[:, 0] - price
    both = (gives > 0) & (takes > 0)
    cost = cost.masked_fill((both & (takes >= gives))[:, None], torch.inf)
    gain = gain.masked_fill((both & (takes < gives))[:, None], -torch.inf)
    count, _ = _crossing(cost, gain)
    width = cost.shape[1]
    if count:
        removals = cost.flatten().argsort(stable=True)[:count]
        returns = gain.flatten().argsort(descending=True, stable=True)[:count]
    else:
        pair = _best_pair(single_cost[:, 0], single_gain[:, 0])
        if pair is None:  # a row that could only swap with itself stood in the way
            return None
        removals, returns = (torch.tensor([row * width], device=cost.device) for row in pair)
    changed = torch.zeros_like(mask)
    for flat, inputs in ((removals, offers.removals), (returns, offers.returns)):
        changed[flat // width, inputs.flatten()[flat]] = True
    return changed


def _allowed(offers: Offers, limits: tuple[int, int], pruned: Int[Tensor, " rows"]) -> Offers:
    """Drop the offers that a row's limits leave no room for."""
    least, most = limits
    place = torch.arange(offers.costs.shape[1], device=pruned.device)
    full, empty = place >= most - pruned[:, None], place >= pruned[:, None] - least
    return offers._replace(
        costs=offers.costs.masked_fill(full, torch.inf),
        gains=offers.gains.masked_fill(empty, -torch.inf),
    )


def _crossing(cost: Tensor, gain: Tensor) -> tuple[int, float]:
    """Count the pairs that pay if the cheapest removals meet the dearest returns; also their price."""
    cheap, dear = cost.flatten().sort().values, gain.flatten().sort(descending=True).values
    count = int((cheap < dear).sum())
    return count, float(cheap[count - 1] + dear[count - 1]) / 2 if count else 0.0


def _best_pair(cost: Tensor, gain: Tensor) -> tuple[int, int] | None:
    """Return (giver, taker), two rows whose best offers pay most; None: none do."""
    pairs = [
        (float(cost[giver] - gain[taker]), giver, taker)
        for giver in cost.argsort(stable=True)[:2].tolist()
        for taker in gain.argsort(descending=True, stable=True)[:2].tolist()
        if giver != taker
    ]
    delta, giver, taker = min(pairs, key=lambda pair: pair[0], default=(0.0, 0, 0))
    return (giver, taker) if delta < 0 else None
