"""Enumeration of all masks of a row: the ground truth on tiny rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from maskopt.errors import SolverError
from maskopt.problem import LayerProblem
from maskopt.solution import Solution, Status
from maskopt.solver import Capabilities

#: masks of a row up to which enumeration is accepted
COMBINATION_LIMIT = 3_000_000
_CHUNK = 2**16


class ExhaustiveSolver:
    """Exact in float64; refuses rows of more than COMBINATION_LIMIT masks. Ties: the first mask."""

    name = "exhaustive"
    capabilities = Capabilities(
        devices=("cpu",),
        proves="optimality",
        largest_n=23,
        note=f"enumerates, up to {COMBINATION_LIMIT:,} masks a row",
    )
    default_warm_start: str | None = None

    def unavailable(self) -> str | None:
        return None

    def solve(self, problem: LayerProblem, *, warm_start: Tensor | None = None) -> Solution:
        """A warm start is not used."""
        group, pruned = problem.group_size, problem.pruned_per_group
        combinations = math.comb(group, pruned) ** (problem.n // group)
        if combinations > COMBINATION_LIMIT:
            raise SolverError(
                f"exhaustive: a row of {problem.n} inputs at {problem.pattern} has "
                f"{combinations:.3g} masks, more than {COMBINATION_LIMIT:,}; restrict the row, or use 'scip'"
            )
        q = torch.stack([problem.row(i).q() for i in range(problem.rows)])
        best = torch.full((problem.rows,), torch.inf, dtype=torch.float64)
        mask = torch.ones(problem.rows, problem.n, dtype=torch.bool)
        sets = _pruned_sets(problem) if pruned else iter(())
        while chunk := list(itertools.islice(sets, _CHUNK)):
            p = torch.zeros(len(chunk), problem.n, dtype=torch.float64)
            p.scatter_(1, torch.tensor(chunk), 1.0)
            for row in range(problem.rows):
                value, position = ((p @ q[row]) * p).sum(1).min(0)
                if value < best[row]:
                    best[row] = value
                    mask[row] = p[position] == 0
        bound = problem.objective(mask)
        return Solution.of(
            problem,
            mask,
            solver=self.name,
            status=Status.OPTIMAL,
            lower_bound=bound,
            trace={"combinations": combinations, "proof": "enumeration of all masks"},
        )


def _pruned_sets(problem: LayerProblem) -> Iterator[tuple[int, ...]]:
    """All legal sets of pruned inputs of one row, in lexicographic order."""
    group, pruned = problem.group_size, problem.pruned_per_group
    parts = [
        list(itertools.combinations(range(first, first + group), pruned))
        for first in range(0, problem.n, group)
    ]
    for choice in itertools.product(*parts):
        yield tuple(itertools.chain.from_iterable(choice))
