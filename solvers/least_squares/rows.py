"""All rows of a problem through the 1-swap search on updated weights, one thread a row."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.core.files import join_rows
from maskopt.core.limits import Limits, one_thread_each, threads_on
from maskopt.core.problem import LayerProblem
from maskopt.protocol.solution import Solution
from maskopt.protocol.trace import Trace
from maskopt.solvers.least_squares.block import one_sided
from maskopt.solvers.least_squares.compiled_row import CompiledRow
from maskopt.solvers.least_squares.scratch import Scratch
from maskopt.solvers.least_squares.search import Found, refine
from maskopt.solvers.least_squares.state import Metric, Pairs, Row
from maskopt.solvers.shared_budget.transfer import OFFERED, Offers, searched, transfer

#: rows whose M are made together, at most, and bytes of these
_TOGETHER, _TOGETHER_BYTES = 16, 2**25


def swap_refitted(
    problem: LayerProblem, start: Tensor, max_swaps: int | None, limits: Limits
) -> Solution:
    """1-swap search on F from a legal mask, to proven optima or a limit; a shared budget as a whole."""
    nothing = Offers.none(1, problem.device)

    def search(
        some: LayerProblem, mask: Tensor, limits: Limits
    ) -> tuple[Solution, Callable[[], Offers]]:
        found = _searched(some, mask, max_swaps, limits)
        return _solution(some, found), lambda: Offers.joined([r.offers or nothing for r in found])

    return transfer(problem, start, search, limits)


def _searched(
    problem: LayerProblem, start: Tensor, max_swaps: int | None, limits: Limits
) -> list[Found]:
    """Every row at the count of its own mask."""
    squares = problem.least_squares
    metric = Metric(squares.damped, squares.inverse.diagonal().clone(), problem.group_size)
    target = squares.target(problem.weight, problem.correlation)
    if squares.flat:
        target.zero_()  # G is 0: every mask costs the same, whatever A says
    kind, threads = CompiledRow if target.is_cpu else Row, threads_on(problem.device)
    most = torch.iinfo(torch.int64).max if max_swaps is None else max_swaps
    own, done = threading.local(), limits.counter(problem.rows)
    mass = problem.diagonal_mass().tolist()
    batches = _alike(start, threads)

    def search(number: int) -> list[Found] | None:
        """None: the time was over before the turn of these rows."""
        if limits.expired:
            return None
        if not hasattr(own, "scratch"):
            own.scratch = Scratch(problem.device)
        batch, found = batches[number], []
        rows = kind.several(metric, own.scratch, target[batch], start[batch])
        weights = torch.stack([row.weights() for row in rows])
        objective = problem.take(batch).cost(weights).tolist()
        for index, row, cost in zip(batch.tolist(), rows, objective, strict=True):
            found.append(refine(row, cost, mass[index], most, limits))
            if problem.shared_budget and not squares.flat and found[-1].proven:
                found[-1].offers = _offers(row)
            done()
        return found

    rows: dict[int, Found] = {}
    late: list[int] = []
    for batch, found in zip(batches, one_thread_each(search, len(batches), threads), strict=True):
        if found is None:
            late += batch.tolist()
        else:
            rows.update(zip(batch.tolist(), found, strict=True))
    if late:
        rows.update(zip(late, _as_begun(problem, start, late, limits), strict=True))
    return [rows[index] for index in range(problem.rows)]


def _alike(start: Tensor, threads: int) -> list[Tensor]:
    """Rows that keep as many, some at a time: their inverses are made together."""
    counts = start.sum(1)
    batches: list[Tensor] = []
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero()[:, 0]
        fit = max(1, _TOGETHER_BYTES // (8 * max(1, count) ** 2))
        batches += rows.split(max(1, min(fit, _TOGETHER, -(-len(rows) // threads))))
    return batches


def _as_begun(problem: LayerProblem, start: Tensor, rows: list[int], limits: Limits) -> list[Found]:
    """Some rows with the masks of the start."""
    some, mask = problem.take(rows), start[rows]
    weight = some.weights(mask, limits)
    costs = some.cost(weight).tolist()
    return [Found(m, w, objectives=[c]) for m, w, c in zip(mask, weight, costs, strict=True)]


def _solution(problem: LayerProblem, rows: list[Found]) -> Solution:
    names = ("swaps", "scans", "rounds", "pairs")
    counts = {name: torch.tensor([getattr(row, name) for row in rows]) for name in names}
    history = join_rows([torch.tensor([row.objectives], dtype=torch.float64) for row in rows])
    trace = Trace(kernel="least squares", history=history, **counts)
    optimal = torch.tensor([row.proven for row in rows])
    mask, weight = (torch.stack(one) for one in ([r.mask for r in rows], [r.weight for r in rows]))
    squares = problem.least_squares
    if not squares.flat:
        target = squares.target(problem.weight, problem.correlation)
        # a search that stopped may have left weights that are not quite those of its mask
        weight = squares.settled(weight, target, mask)
    return searched(mask, problem.cost(weight), optimal, trace, weight)


def _offers(row: Row) -> Offers:
    """What a row whose M is good enough for a claim offers to others, in F, float64: on T = [[−M, B], [Bᵀ,
    C]] of some candidates, pruning u costs y_u²/M_uu, keeping p again saves y_p²/C_pp, and either is a pivot
    on one diagonal entry, after which the next is priced."""
    found = Offers.none(1, row.v.device)
    cheapest = row.costs().topk(min(OFFERED, len(row.kept)), largest=False).indices
    pairs = Pairs(cheapest, _most_saving(row))
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


def _most_saving(row: Row) -> Tensor:
    """Slots of pruned inputs of largest r_p²/C_pp, the largest of all for certain: r_p²H_pp is no less, so
    that only what is above the best of the likely ones is priced."""
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
