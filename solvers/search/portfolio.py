"""Several backends under one time budget: per row the best mask with the best bound."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskopt.certificates.certificate import Certificate
from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.errors import OptionError
from maskopt.protocol.solution import OPTIMAL_TOLERANCE, SWAP_FLOOR, Solution, Status, optimal_slack
from maskopt.protocol.solver import Capabilities, Solver, check_fit, make_solver, solve
from maskopt.protocol.trace import Stopwatch, Trace

_log = logging.getLogger(__name__)
_RANK = (Status.FEASIBLE, Status.SWAP_OPTIMAL, Status.OPTIMAL)


@dataclass(frozen=True)
class Portfolio(Solver):
    """Runs its members one after the other, each from the best masks so far and with an equal share of the
    time that is left, never above the start or any member. The history of the `Trace` has one column a
    member."""

    name: ClassVar[str] = "portfolio"
    capabilities: ClassVar[Capabilities] = Capabilities(
        start="needed",
        default_start="wanda",
        proves="optimality",
        note="the best of several backends per row, for unchanged weights; proves what its members prove",
    )

    members: tuple[str, ...] = option(
        ("swap", "relax", "tabu"), "names of solvers, in the order in which they run"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.members:
            raise OptionError("portfolio: name at least one member")
        if self.name in self.members:
            raise OptionError("portfolio: it cannot be a member of itself")

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        assert start is not None
        watch = Stopwatch(problem.rows)
        solvers = [make_solver(member) for member in self.members]
        for solver in solvers:  # all, before anything runs
            check_fit(solver, problem)
        best = Solution.of(problem, start)
        start_objective = best.objective
        winner = ["start"] * problem.rows
        history: list[Tensor] = []
        stopped = "no"
        for position, solver in enumerate(solvers):
            if limits.expired:
                stopped = "yes"
                break
            limits.report(0, problem.rows, solver.name, position, len(solvers))
            share = limits.share(1 / (len(solvers) - position)).quiet()
            found = solve(problem, solver, start=best.mask, limits=share)
            best, improved = merge(problem, best, found)
            history.append(best.objective)
            winner = _either(improved, winner, [solver.name] * problem.rows)
            if found.trace.interrupted:
                stopped = "interrupted"
                break
        limits.report(problem.rows, problem.rows)
        trace = Trace(
            rounds=torch.full((problem.rows,), len(history)),
            start_objective=start_objective,
            search_seconds=watch.lap(),
            history=torch.stack(history, 1) if history else start_objective[:, None][:, :0],
            winner=tuple(winner),
            stopped=(stopped,) * problem.rows,
        )
        return replace(best, trace=trace)


def merge(
    problem: LayerProblem, one: Solution, other: Solution
) -> tuple[Solution, Bool[Tensor, " rows"]]:
    """Per row the better mask (ties: of better status), and the higher bound with its proof; and where the
    mask is the other's. OPTIMAL where the two close the gap. A bound that the better mask refutes is dropped,
    with the status that rests on it."""
    least = one.objective.minimum(other.objective)
    rounding = OPTIMAL_TOLERANCE * least + SWAP_FLOOR * problem.diagonal_mass()
    one, other = _unrefuted(one, least + rounding), _unrefuted(other, least + rounding)
    device = one.mask.device
    rank = [
        torch.tensor([_RANK.index(Status(s)) for s in solution.status], device=device)
        for solution in (one, other)
    ]
    better = other.objective < one.objective
    better |= (other.objective == one.objective) & (rank[1] > rank[0])
    objective = torch.where(better, other.objective, one.objective)
    higher = _rather(one, other)
    bound = torch.where(higher, other.lower_bound, one.lower_bound)
    mask = torch.where(better[:, None], other.mask, one.mask)
    closed = objective - bound <= optimal_slack(problem, mask, objective)
    # what a bound is above the better mask by is rounding
    bound = torch.where(closed, bound.minimum(objective), bound)
    status = _either(better, one.status, other.status)
    trusted = _either(higher, _trusted(one), _trusted(other))
    # where only one of the two has a certificate, that one throughout
    certificates = [c for c in (one.certificate, other.certificate) if isinstance(c, Certificate)]
    certificate = certificates[0] if certificates else None
    if len(certificates) == 2:
        certificate = Certificate.choose(higher, *certificates)
    merged = Solution(
        mask=mask,
        objective=objective,
        lower_bound=bound,
        status=tuple(_either(closed, status, [Status.OPTIMAL] * problem.rows)),
        certificate=certificate,
        trusted=tuple(trusted) if any(trusted) else (),
    )
    return merged, better


def _either(other: Tensor, ones: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Row by row the second where `other` (bool [rows]) holds, else the first."""
    rows = zip(other.tolist(), ones, others, strict=True)
    return [second if flag else first for flag, first, second in rows]


def _unrefuted(solution: Solution, most: Float[Tensor, " rows"]) -> Solution:
    """Without the bounds above `most`, which a mask has been found to cost, and what rests on them."""
    refuted = (solution.lower_bound > most).tolist()
    if not any(refuted):
        return solution
    names = _trusted(solution)
    for row, wrong in enumerate(refuted):
        if wrong:
            _log.warning(
                "row %d: a lower bound of %.9g (%s) is above the cost %.9g of a mask; it is dropped",
                row, float(solution.lower_bound[row]), names[row] or "certified", float(most[row]),
            )  # fmt: skip
    return replace(
        solution,
        lower_bound=solution.lower_bound.masked_fill(solution.lower_bound > most, 0.0),
        status=tuple(
            Status.FEASIBLE if wrong and status is Status.OPTIMAL else status
            for wrong, status in zip(refuted, solution.status, strict=True)
        ),
        trusted=tuple("" if wrong else name for wrong, name in zip(refuted, names, strict=True)),
    )


def _trusted(solution: Solution) -> tuple[str, ...]:
    return solution.trusted or ("",) * len(solution.status)


def _rather(one: Solution, other: Solution) -> Bool[Tensor, " rows"]:
    """Where the other's bound is the higher one, or as high and proven while this one's is trusted."""
    names = zip(_trusted(one), _trusted(other), strict=True)
    sounder = torch.tensor([bool(a) and not b for a, b in names], device=one.mask.device)
    equal = other.lower_bound == one.lower_bound
    return (other.lower_bound > one.lower_bound) | (equal & sounder)
