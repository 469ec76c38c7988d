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
    """Per row, in order: inputs to prune (`removals`) and their cost, and inputs to keep again (`returns`)
    and their gain, in the row's objective. Each is priced as if those before it on its side were done. Where
    there is no further input it is −1, its cost ∞ and its gain −∞, float64."""

    removals: Int[Tensor, "rows some"]
    costs: Float[Tensor, "rows some"]
    returns: Int[Tensor, "rows some"]
    gains: Float[Tensor, "rows some"]

    @classmethod
    def none(cls, rows: int, device: torch.device) -> Offers:
        nothing = torch.full((rows, OFFERED), -1, device=device)
        endless = torch.full((rows, OFFERED), torch.inf, dtype=torch.float64, device=device)
        return cls(nothing, endless, nothing.clone(), -endless)

    @classmethod
    def joined(cls, parts: list[Offers]) -> Offers:
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


#: (some rows, their masks) → 1-swap optima at the masks' own counts, and what makes the rows' offers then
Search = Callable[[LayerProblem, Tensor, Limits], tuple[Solution, Callable[[], Offers]]]


def transfer(problem: LayerProblem, start: Tensor, search: Search, limits: Limits) -> Solution:
    """From a legal mask to a proven 1-swap optimum of the layer, or to a limit."""
    found, offers_of = search(problem, start, limits)
    if not problem.shared_budget:
        return found
    # mask, objective and, where they are updated, weights of every row
    now = _answers(found)
    optimal, offers, trace = proven(found), offers_of(), found.trace
    history = [trace.history[:, 0].to(found.objective), found.objective.clone()]
    given = torch.zeros_like(trace.swaps)
    done = False
    while bool(optimal.all()) and not limits.expired:
        mask, objective = now[:2]
        changed = transfers(offers, problem, objective, mask)
        done = changed is None
        if changed is None:
            break
        given += changed.sum(1).cpu()
        rows = changed.any(1).nonzero()[:, 0]
        found, offers_of = search(problem.take(rows), (mask ^ changed)[rows], limits.quiet())
        optimal[rows] = proven(found)
        for mine, new in zip(offers, offers_of(), strict=True):
            mine[rows] = new
        for name in ("swaps", "scans", "rounds", "pairs"):
            getattr(trace, name)[rows.cpu()] += getattr(found.trace, name)
        after = [x.index_copy(0, rows, new) for x, new in zip(now, _answers(found), strict=True)]
        if problem.shares @ after[1] < problem.shares @ objective:
            now = after
        else:  # rounding promised too much
            optimal[:] = False
        history.append(now[1].clone())
    limits.report(problem.rows, problem.rows)
    trace = replace(trace, history=torch.stack(history, 1).cpu(), transfers=given)
    optimal[:] = done
    return searched(now[0], now[1], optimal, trace, *now[2:])


def _answers(found: Solution) -> list[Tensor]:
    return [x for x in (found.mask, found.objective, found.weight) if x is not None]


def searched(
    mask: Tensor, objective: Tensor, optimal: Tensor, trace: Trace, weight: Tensor | None = None
) -> Solution:
    """The solution of a 1-swap search, which gives no bound; `optimal`: bool [rows], 1-swap optima."""
    bound = torch.zeros_like(objective)
    return Solution(mask, objective, bound, statuses(optimal), trace=trace, weight=weight)


def statuses(optimal: Bool[Tensor, " rows"]) -> tuple[Status, ...]:
    """SWAP_OPTIMAL where a 1-swap optimum is proven, else FEASIBLE."""
    return tuple(Status.SWAP_OPTIMAL if row else Status.FEASIBLE for row in optimal.tolist())


def proven(found: Solution) -> Bool[Tensor, " rows"]:
    """Inverse of `statuses`."""
    flags = [status is Status.SWAP_OPTIMAL for status in found.status]
    return torch.tensor(flags, device=found.mask.device)


def by_count(kept: Bool[Tensor, "rows n"]) -> list[Int[Tensor, " some"]]:
    """Places of the rows that keep as many each; without a shared budget all in one."""
    counts = kept.sum(1)
    return [(counts == count).nonzero()[:, 0] for count in counts.unique()]


def transfers(
    offers: Offers,
    problem: LayerProblem,
    objective: Float[Tensor, " rows"],
    mask: Bool[Tensor, "rows n"],
) -> Bool[Tensor, "rows n"] | None:
    """The entries to change: as many removals as returns, which pay by more than the tolerances of both rows
    and leave every row within its limits; None: nothing pays."""
    offers = _allowed(offers, problem.row_limits, (~mask).sum(1))
    share = problem.shares[:, None]
    mass = problem.diagonal_mass()
    slack = _PART * swap_threshold(objective, mass, update=problem.update)[:, None]
    # from the front of a row's offers only: one that is cheaper than those before it waits for them
    cost = (share * (offers.costs + slack)).cummax(1).values
    gain = (share * (offers.gains - slack)).cummin(1).values
    count, price = _crossing(cost, gain)
    if not count:
        return None
    gives, takes = price - cost[:, 0], gain[:, 0] - price
    both = (gives > 0) & (takes > 0)
    cost = cost.masked_fill((both & (takes >= gives))[:, None], torch.inf)
    gain = gain.masked_fill((both & (takes < gives))[:, None], -torch.inf)
    count, _ = _crossing(cost, gain)
    if count:
        removals = cost.flatten().argsort(stable=True)[:count]
        returns = gain.flatten().argsort(descending=True, stable=True)[:count]
    elif best := _single(share[:, 0], slack[:, 0], offers):
        removals, returns = best
    else:  # a row that could only swap with itself stood in the way
        return None
    changed, some = torch.zeros_like(mask), cost.shape[1]
    for flat, inputs in ((removals, offers.removals), (returns, offers.returns)):
        changed[flat // some, inputs.flatten()[flat]] = True
    return changed


def _allowed(offers: Offers, limits: tuple[int, int], pruned: Int[Tensor, " rows"]) -> Offers:
    """No more of a row's offers than its limits leave room for; each row only gives or only takes."""
    least, most = limits
    place = torch.arange(offers.costs.shape[1], device=pruned.device)
    full, empty = place >= most - pruned[:, None], place >= pruned[:, None] - least
    return offers._replace(
        costs=offers.costs.masked_fill(full, torch.inf),
        gains=offers.gains.masked_fill(empty, -torch.inf),
    )


def _crossing(cost: Tensor, gain: Tensor) -> tuple[int, float]:
    """How many pairs pay if the cheapest removals meet the dearest returns, and a price between the last."""
    cheap, dear = cost.flatten().sort().values, gain.flatten().sort(descending=True).values
    count = int((cheap < dear).sum())
    return count, float(cheap[count - 1] + dear[count - 1]) / 2 if count else 0.0


def _single(share: Tensor, slack: Tensor, offers: Offers) -> tuple[Tensor, Tensor] | None:
    """The best transfer of two rows, each by its best offer, as flat indices into the offers."""
    some = offers.costs.shape[1]
    cost, gain = share * (offers.costs[:, 0] + slack), share * (offers.gains[:, 0] - slack)
    best: tuple[float, int, int] | None = None
    for giver in cost.argsort(stable=True)[:2].tolist():
        for taker in gain.argsort(descending=True, stable=True)[:2].tolist():
            delta = float(cost[giver] - gain[taker])
            if giver != taker and delta < 0 and (best is None or delta < best[0]):
                best = delta, giver, taker
    if best is None:
        return None
    giver, taker = (torch.tensor([row * some], device=cost.device) for row in best[1:])
    return giver, taker
