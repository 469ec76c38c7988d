"""Several backends under one time budget: per row the best mask with the best bound."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from maskopt.errors import OptionError
from maskopt.problem import LayerProblem
from maskopt.solution import Solution, Status
from maskopt.solver import Capabilities, check_options, get_solver, solve

#: in this order: a good mask early, then better ones with what time is left
DEFAULT = ("swap", "relax", "tabu")


class PortfolioSolver:
    """Runs its members one after the other, each from the best masks so far.

    Not side by side: every member uses all cores by itself, and a later one gains from a better
    start. A member that needs no start (`relax`) is run for a fresh point of view, and its mask is
    improved by `swap`.
    """

    name = "portfolio"
    capabilities = Capabilities(
        devices=("cpu", "cuda"), proves="1-swap", note="the best of several backends per row"
    )
    default_warm_start: str | None = "wanda"

    def unavailable(self) -> str | None:
        return None

    def solve(
        self,
        problem: LayerProblem,
        *,
        warm_start: Tensor | None = None,
        members: Sequence[str] = DEFAULT,
        time_limit: float | None = None,
        memory_limit: int | None = None,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Solution:
        """Never above the start, nor above any member.

        Args:
            members: names of solvers, in the order in which they run.
            time_limit: seconds for all of them together, shared out evenly among those still to
                come; a member that has no such option runs to its end.
            memory_limit, seed: handed to the members that have such an option.
            on_progress: called with (members done, members).

        `trace`: `winner` per row, and per member its `objective` (float64 [rows]) and `seconds`.
        """
        for member in members:
            if member == self.name:
                raise OptionError("portfolio: it cannot be a member of itself")
            get_solver(member)  # an unknown or unavailable one is refused before anything runs
        if not members:
            raise OptionError("portfolio: name at least one member")
        deadline = math.inf if time_limit is None else time.monotonic() + time_limit
        best = Solution.of(
            problem, solve(problem, "wanda").mask if warm_start is None else warm_start
        )
        winner = ["start"] * problem.rows
        trace: dict[str, Any] = {"objective": {}, "seconds": {}}
        for position, member in enumerate(members):
            share = (deadline - time.monotonic()) / (len(members) - position)
            if share <= 0:
                break
            options = {"time_limit": share, "memory_limit": memory_limit, "seed": seed}
            chosen = {
                k: v for k, v in options.items() if _takes(member, k) and v not in (None, math.inf)
            }
            takes_start = get_solver(member).default_warm_start is not None
            found = solve(problem, member, warm_start=best.mask if takes_start else None, **chosen)
            trace["objective"][member] = found.objective
            trace["seconds"][member] = found.seconds
            best, improved = merge(best, found)
            winner = [member if i else w for i, w in zip(improved.tolist(), winner, strict=True)]
            if on_progress is not None:
                on_progress(position + 1, len(members))
        proof = best.trace.get("proof")
        return Solution(
            mask=best.mask,
            objective=best.objective,
            lower_bound=best.lower_bound,
            status=best.status,
            solver=self.name,
            trace={**trace, "winner": winner, **({"proof": proof} if proof else {})},
            certificate=best.certificate,
        )


def _takes(member: str, option: str) -> bool:
    try:
        check_options(member, {option: None})
    except OptionError:
        return False
    return True


_RANK = (Status.FEASIBLE, Status.SWAP_OPTIMAL, Status.OPTIMAL)


def merge(one: Solution, other: Solution) -> tuple[Solution, Tensor]:
    """Per row the better mask (of equals the better status), with the higher bound.

    Returns the merged solution and, bool [rows], where the mask is the other's. All bounds come from
    the solution whose bounds are higher in sum, since a certificate proves the bounds of one method.
    """
    rank = [
        torch.tensor([_RANK.index(Status(s)) for s in solution.status], device=one.mask.device)
        for solution in (one, other)
    ]
    better = other.objective < one.objective
    better |= (other.objective == one.objective) & (rank[1] > rank[0])
    status = [
        b if i else a for i, a, b in zip(better.tolist(), one.status, other.status, strict=True)
    ]
    bounds = other if float(other.lower_bound.sum()) > float(one.lower_bound.sum()) else one
    objective = torch.where(better, other.objective, one.objective)
    # OPTIMAL rests on a closed gap: where the bound that closed it is not the one kept, it goes
    closed = bounds.lower_bound >= objective * (1 - 1e-9)
    status = [
        Status.SWAP_OPTIMAL if s is Status.OPTIMAL and not bool(c) else s
        for s, c in zip(status, closed, strict=True)
    ]
    merged = Solution(
        mask=torch.where(better[:, None], other.mask, one.mask),
        objective=objective,
        lower_bound=bounds.lower_bound,
        status=tuple(status),
        trace={"proof": bounds.trace["proof"]} if "proof" in bounds.trace else {},
        certificate=bounds.certificate,
    )
    return merged, better
