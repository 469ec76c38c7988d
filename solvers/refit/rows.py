"""All rows of a problem through the 1-swap search on refitted weights, one thread a row."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from maskopt.limits import Limits, one_thread_each
from maskopt.problem import LayerProblem
from maskopt.solution import Solution, Status
from maskopt.solvers.pooled.offers import Offers
from maskopt.solvers.pooled.trade import trade
from maskopt.solvers.refit.offers import offers
from maskopt.solvers.refit.scratch import Scratch
from maskopt.solvers.refit.search import Found, refine
from maskopt.solvers.refit.state import Metric, Row
from maskopt.trace import SwapTrace


def swap_refitted(
    problem: LayerProblem, start: Tensor, max_swaps: int | None, limits: Limits
) -> Solution:
    """1-swap search on F from a legal mask: proven optima, or what was reached when a limit came. Where rows
    trade, of the layer as a whole."""
    if not problem.pooled:
        return _solution(problem, _searched(problem, start, max_swaps, limits))

    def search(rows: Tensor, mask: Tensor, limits: Limits) -> tuple[Solution, Offers]:
        some = problem.take(rows)
        found = _searched(some, mask, max_swaps, limits)
        nothing = Offers.none(1, problem.device)
        return _solution(some, found), Offers.joined([row.offers or nothing for row in found])

    return trade(problem, start, search, limits)


def _searched(
    problem: LayerProblem, start: Tensor, max_swaps: int | None, limits: Limits
) -> list[Found]:
    """Every row at the count of its own mask."""
    squares = problem.least_squares
    metric = Metric(squares.damped, squares.inverse.diagonal().clone(), problem.group_size)
    target = squares.target(problem.weight, problem.correlation)
    if squares.ridge == 0:
        target.zero_()  # G is 0: every mask costs the same, whatever A says
    threads = torch.get_num_threads() if problem.device.type == "cpu" else 1
    most = torch.iinfo(torch.int64).max if max_swaps is None else max_swaps
    own, done = threading.local(), limits.counter(problem.rows)
    mass = problem.diagonal_mass().tolist()

    def search(index: int) -> Found | None:
        """None: the time was over before the row's turn."""
        if limits.expired:
            return None
        if not hasattr(own, "scratch"):
            own.scratch = Scratch(problem.device)
        row = Row.of(metric, own.scratch, target[index], start[index])
        objective = float(problem.take([index]).damped_error(row.weights()[None]))
        found = refine(row, objective, mass[index], most, limits)
        if problem.pooled and squares.ridge and found.proven:
            found.offers = offers(row)
        done()
        return found

    found = one_thread_each(search, problem.rows, threads)
    late = [index for index, row in enumerate(found) if row is None]
    begun = iter(_as_begun(problem, start, late, limits) if late else [])
    return [next(begun) if row is None else row for row in found]


def _as_begun(problem: LayerProblem, start: Tensor, rows: list[int], limits: Limits) -> list[Found]:
    """Some rows with the masks of the start."""
    some, mask = problem.take(rows), start[rows]
    weight = some.weights(mask, limits)
    costs = some.damped_error(weight).tolist()
    return [Found(m, w, objectives=[c]) for m, w, c in zip(mask, weight, costs, strict=True)]


def _solution(problem: LayerProblem, rows: list[Found]) -> Solution:
    length = max(len(row.objectives) for row in rows)
    history = [
        row.objectives + row.objectives[-1:] * (length - len(row.objectives)) for row in rows
    ]
    trace = SwapTrace(
        kernel="least squares",
        swaps=torch.tensor([row.swaps for row in rows]),
        scans=torch.tensor([row.scans for row in rows]),
        rounds=torch.tensor([row.rounds for row in rows]),
        pairs=torch.tensor([row.pairs for row in rows]),
        history=torch.tensor(history, dtype=torch.float64),
    )
    status = [Status.SWAP_OPTIMAL if row.proven else Status.FEASIBLE for row in rows]
    weight = torch.stack([row.weight for row in rows])
    objective = problem.damped_error(weight)
    return Solution(
        mask=torch.stack([row.mask for row in rows]),
        objective=objective,
        lower_bound=torch.zeros_like(objective),
        status=tuple(status),
        trace=trace,
        weight=weight,
    )
