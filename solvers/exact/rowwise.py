"""What the optional exact backends share: a function that solves one row, run over all rows."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from torch import Tensor

from maskopt.problem import LayerProblem
from maskopt.solution import Solution
from maskopt.solvers.exact.scip import assemble, check_limits, check_size, first_mask, run_rows
from maskopt.solvers.exact.scip_model import RowAnswer, RowTask

#: the start's objective in the units of a model, far above a backend's absolute tolerances
_SCALE = 1000.0


class RowwiseExact:
    """A subclass names itself, its capabilities, `largest_n`, and `solve_row`."""

    name: str
    largest_n: int
    solve_row: Callable[[RowTask], RowAnswer]
    default_warm_start: str | None = "wanda"

    def solve(
        self,
        problem: LayerProblem,
        *,
        warm_start: Tensor | None = None,
        time_limit: float | None = None,
        gap_limit: float = 0.0,
        node_limit: int | None = None,
        workers: int | None = None,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Solution:
        """Solve every row; limits are per row, as for `scip`."""
        check_limits(self.name, time_limit, gap_limit)
        check_size(self.name, problem, self.largest_n)
        tasks = _row_tasks(problem, warm_start, time_limit, gap_limit, node_limit, seed)
        if workers is None:
            workers = 0 if problem.rows == 1 else (os.cpu_count() or 1)
        return assemble(
            problem, run_rows(type(self).solve_row, tasks, workers, on_progress), self.name
        )


def _row_tasks(
    problem: LayerProblem,
    warm_start: Tensor | None,
    time_limit: float | None,
    gap_limit: float,
    node_limit: int | None,
    seed: int,
) -> list[RowTask]:
    """What a process needs to solve each row."""
    start = warm_start if warm_start is not None else first_mask(problem)
    return [
        RowTask(
            q=problem.row(i).q().numpy(),
            group=problem.group_size,
            pruned=problem.pruned_per_group,
            start=(~start[i]).numpy(),
            time_limit=time_limit,
            node_limit=node_limit,
            gap_limit=gap_limit,
            seed=seed,
        )
        for i in range(problem.rows)
    ]


def unit_scale(task: RowTask) -> float:
    """The factor that brings the start's objective to _SCALE."""
    cost = float(task.start.astype(float) @ task.q @ task.start.astype(float))
    return _SCALE / (max(cost, 1e-10 * float(np.trace(task.q))) or 1.0)
