"""Enumeration of all masks of a row: the ground truth on tiny rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from maskopt._version import __version__
from maskopt.core.knapsack import least_sum
from maskopt.core.limits import Limits
from maskopt.core.pattern import Pattern, Unstructured
from maskopt.core.problem import LayerProblem
from maskopt.errors import SolverError
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities, Solver
from maskopt.protocol.trace import Stopwatch
from maskopt.solvers.exact.rows import assemble
from maskopt.solvers.exact.tasks import RowAnswer

#: masks of a row up to which enumeration is accepted
COMBINATION_LIMIT = 3_000_000
#: masks between two looks at the clock
_CHUNK = 2**16
#: numbers in the systems of updated weights that are solved at a time
_SYSTEMS = 2**22


@dataclass(frozen=True)
class Exhaustive(Solver):
    """Enumeration in float64, for rows of at most COMBINATION_LIMIT masks. Ties: the first mask.

    After the time limit it returns the best mask so far, FEASIBLE; with a shared budget any legal mask.
    """

    name: ClassVar[str] = "exhaustive"
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=("cpu",),
        start="ignored",
        proves="optimality",
        trusted=("enumeration of maskopt",),
        update=True,
        shared_budget=True,
        note=f"enumerates, up to {COMBINATION_LIMIT:,} masks a row",
    )

    def check_size(self, n: int, pattern: Pattern, *, update: bool) -> None:
        """See `Solver.check_size`: too many masks."""
        if isinstance(pattern, Unstructured) and pattern.shared_budget:
            masks, kind, instead = 2**n, "of a shared budget", "take solver 'swap'"
        else:
            masks, kind = _masks(n, pattern), f"at {pattern}"
            instead = "restrict the row, or use 'scip'"
        if masks > COMBINATION_LIMIT:
            about = f"{Decimal(masks):.3g}"  # it may be beyond a float
            raise SolverError(
                f"exhaustive: a row of {n} inputs {kind} has {about} masks, more than "
                f"{COMBINATION_LIMIT:,}; {instead}"
            )

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        watch = Stopwatch(problem.rows)
        if problem.shared_budget:
            return _shared_budget(problem, limits, watch)
        combinations = _masks(problem.n, problem.pattern)
        mask, seen = _enumerate(problem, combinations, limits)
        return _solution(problem, mask, seen, seen == combinations, watch)


def _masks(n: int, pattern: Pattern) -> int:
    """Count the masks of a row whose pattern says how many it prunes."""
    group = pattern.group_size(n)
    return math.comb(group, pattern.pruned_per_group(n)) ** (n // group)


def _solution(
    problem: LayerProblem, mask: Tensor, seen: Tensor, complete: Tensor, watch: Stopwatch
) -> Solution:
    """Return the solution, in which rows are optimal of which all masks were seen."""
    cost, seconds = problem.objective(mask), watch.lap()
    answers = [
        RowAnswer(
            ~mask[row].numpy(),
            ended="optimal" if complete[row] else "timelimit",
            bound=float(cost[row]) if complete[row] else 0.0,
            nodes=int(seen[row]),
            seconds=float(seconds[row]),
        )
        for row in range(problem.rows)
    ]
    return assemble(problem, answers, f"{Exhaustive.capabilities.trusted[0]} {__version__}")


def _shared_budget(problem: LayerProblem, limits: Limits, watch: Stopwatch) -> Solution:
    """Find the best mask of every row at every count, then the counts; after the limit any legal mask."""
    n, masks, costs = problem.n, [], []
    least, most = problem.row_limits
    for count in range(n + 1):
        uniform = problem.under(Unstructured(keep=n - count))
        mask, seen = _enumerate(uniform, math.comb(n, count), limits)
        if bool((seen < math.comb(n, count)).any()):
            order = torch.arange(problem.rows * n).view(n, problem.rows).T
            return _solution(problem, order >= problem.pruned, seen, seen < 0, watch)
        masks.append(mask)
        costs.append(uniform.objective(mask) * problem.shares)
        if not least <= count <= most:
            costs[-1][:] = torch.inf
    sizes = [np.arange(n + 1)] * problem.rows
    counts = least_sum(sizes, list(torch.stack(costs, 1).numpy()), problem.pruned)
    assert counts is not None
    chosen = torch.stack([masks[count][row] for row, count in enumerate(counts)])
    seen = torch.full((problem.rows,), 2**n)
    return _solution(problem, chosen, seen, seen > 0, watch)


def _enumerate(problem: LayerProblem, combinations: int, limits: Limits) -> tuple[Tensor, Tensor]:
    """Return the best mask of every row so far, and the number of masks tried, at least one."""
    rows = problem.rows
    cost = _updated_cost(problem) if problem.update is not None else _quadratic_cost(problem)
    best = torch.full((rows,), torch.inf, dtype=torch.float64)
    first = torch.arange(problem.n) % problem.group_size >= problem.pruned_per_group
    mask = first.repeat(rows, 1)
    seen = torch.zeros(rows, dtype=torch.int64)
    sets = _pruned_sets(problem)
    while chunk := list(itertools.islice(sets, _CHUNK)):
        p = torch.zeros(len(chunk), problem.n, dtype=torch.float64)
        p.scatter_(1, torch.tensor(chunk, dtype=torch.int64), 1.0)
        for row in range(rows):
            value, position = cost(row, p).min(0)
            if value < best[row]:
                best[row] = value
                mask[row] = p[position] == 0
            seen[row] += len(chunk)
            if limits.expired:
                return mask, seen
        limits.report(0, rows, "masks", int(seen[0]), combinations)
    limits.report(rows, rows)
    return mask, seen


def _quadratic_cost(problem: LayerProblem) -> Callable[[int, Tensor], Tensor]:
    """Return a function of a row and sets p [masks, n] that computes f."""
    q = torch.stack([problem.row(i).q() for i in range(problem.rows)])
    return lambda row, p: ((p @ q[row]) * p).sum(1)


def _updated_cost(problem: LayerProblem) -> Callable[[int, Tensor], Tensor]:
    """Return a function of a row and sets p [masks, n] that computes F but for a constant.

    That is −b_SᵀA_SS⁻¹b_S, by Cholesky.
    """
    squares = problem.least_squares
    target = squares.target(problem.weight, problem.correlation)

    def cost(row: int, p: Tensor) -> Tensor:
        kept = (p == 0).nonzero()[:, 1].view(len(p), -1)
        values = []
        for part in kept.split(max(1, _SYSTEMS // max(1, kept.shape[1] ** 2))):
            factor = torch.linalg.cholesky(squares.damped[part[:, :, None], part[:, None, :]])
            b = target[row][part][..., None]
            half = torch.linalg.solve_triangular(factor, b, upper=False)
            values.append(-half[..., 0].square().sum(1))
        return torch.cat(values)

    return cost


def _pruned_sets(problem: LayerProblem) -> Iterator[tuple[int, ...]]:
    """Yield all legal sets of pruned inputs of one row, in lexicographic order."""
    group, pruned = problem.group_size, problem.pruned_per_group
    starts = range(0, problem.n, group)
    parts = [list(itertools.combinations(range(s, s + group), pruned)) for s in starts]
    for choice in itertools.product(*parts):
        yield tuple(itertools.chain.from_iterable(choice))
