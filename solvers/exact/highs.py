"""A second exact opinion: HiGHS on a linear integer program, with one variable z_ij for each product.

Since 1_gᵀp = s holds in every group g, multiplying it by p_i gives Σ_{j∈g} z_ij = s·p_i (z_ii = p_i): the
reformulation-linearisation equations, far tighter than z_ij ≥ p_i + p_j − 1 alone. Optional
(`pip install highspy`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.protocol.registry import missing_package
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities
from maskopt.solvers.exact.incumbent import with_incumbent
from maskopt.solvers.exact.rows import RowAnswer, RowSolver, RowTask

#: HiGHS' tolerance on whole numbers and constraints (mip_feasibility_tolerance), absolute
_FEASIBILITY = 1e-6
#: relative gap up to which HiGHS' `optimal` is one, and not the gap limit that was reached
_CLOSED = 1e-9


@dataclass(frozen=True)
class Highs(RowSolver):
    """The linearised program; OPTIMAL only where HiGHS says so. Reports a `Trace`."""

    name: ClassVar[str] = "highs"
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=("cpu",),
        start="needed",
        default_start="wanda",
        proves="optimality",
        trusted=("HiGHS",),
        # the n²/2 products are too many for a simplex beyond
        largest_n=128,
        note="optional highspy, linearised; proves up to about 48 inputs",
    )

    @classmethod
    def unavailable(cls) -> str | None:
        """See `Solver.unavailable`."""
        return missing_package("highspy", "'maskopt[highs]'")

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        """See `Solver.run`."""
        import highspy

        assert start is not None
        version = (
            highspy.HIGHS_VERSION_MAJOR,
            highspy.HIGHS_VERSION_MINOR,
            highspy.HIGHS_VERSION_PATCH,
        )
        word = f"{self.capabilities.trusted[0]} {'.'.join(map(str, version))}"
        return self.solve_rows(problem, start, limits, search_row, word)


def search_row(task: RowTask) -> RowAnswer:
    """One row, one thread. From a good start: tolerances are absolute, and the start's cost the unit."""
    import highspy

    task = with_incumbent(task)
    words = {
        highspy.HighsModelStatus.kOptimal: "optimal",
        highspy.HighsModelStatus.kTimeLimit: "timelimit",
        highspy.HighsModelStatus.kSolutionLimit: "nodelimit",
        highspy.HighsModelStatus.kInterrupt: "userinterrupt",
    }
    scale = task.unit_scale
    model, pairs = _model(task, task.q * scale)
    _configure(model, task)
    guess = highspy.HighsSolution()
    start = task.start.astype(float)
    guess.col_value = [*start, *(start[i] * start[j] for i, j in pairs)]
    model.setSolution(guess)
    model.run()
    info, status = model.getInfo(), model.getModelStatus()
    ended = words.get(status, model.modelStatusToString(status))
    if ended == "optimal" and info.mip_gap > _CLOSED:
        ended = "gaplimit"
    pruned = np.asarray(model.getSolution().col_value[: len(task.q)]) > 0.5
    bound = float(info.mip_dual_bound) / scale
    # p_i and z_ij off by the tolerance move f by that part of their coefficients
    slack = _FEASIBILITY * float(np.abs(task.q).sum())
    return RowAnswer(
        pruned=pruned if task.is_legal(pruned) else task.start,
        ended=ended,
        bound=task.raised(bound, slack) if np.isfinite(bound) else 0.0,
        slack=slack,
        nodes=int(info.mip_node_count),
    )


def _configure(model, task: RowTask) -> None:  # type: ignore[no-untyped-def]  # highspy is optional
    model.setOptionValue("random_seed", task.limits.seed % 2**31)
    model.setOptionValue("mip_rel_gap", task.gap_limit)
    model.setOptionValue("mip_abs_gap", 0.0)
    model.setOptionValue("threads", 1)
    if task.limits.timed:
        model.setOptionValue("time_limit", task.limits.left)
    if task.node_limit is not None:
        model.setOptionValue("mip_max_nodes", task.node_limit)


def _model(task: RowTask, q: np.ndarray):  # type: ignore[no-untyped-def]  # highspy is optional
    """min Σ q_ii p_i + Σ_{i<j} 2 q_ij z_ij, and the pairs (i, j) of the z after the n binaries."""
    import highspy

    n, group, infinity = len(q), task.group, highspy.kHighsInf
    with _banner_on_stderr():
        model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    for i in range(n):
        model.addCol(float(q[i, i]), 0.0, 1.0, 0, [], [])
        model.changeColIntegrality(i, highspy.HighsVarType.kInteger)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    z = {pair: n + k for k, pair in enumerate(pairs)}
    for i, j in pairs:
        model.addCol(2 * float(q[i, j]), 0.0, 1.0, 0, [], [])
    for first in range(0, n, group):
        members = list(range(first, first + group))
        model.addRow(task.pruned, task.pruned, group, members, [1.0] * group)
        for i in range(n):
            others = [z[min(i, j), max(i, j)] for j in members if j != i]
            share = task.pruned - (1.0 if i in members else 0.0)
            model.addRow(0.0, 0.0, len(others) + 1, [*others, i], [1.0] * len(others) + [-share])
    for (i, j), column in z.items():
        if q[i, j] > 0:
            model.addRow(-infinity, 1.0, 3, [i, j, column], [1.0, 1.0, -1.0])
        elif q[i, j] < 0:
            model.addRow(-infinity, 0.0, 2, [column, i], [1.0, -1.0])
            model.addRow(-infinity, 0.0, 2, [column, j], [1.0, -1.0])
    return model, pairs


@contextmanager
def _banner_on_stderr() -> Iterator[None]:
    """A new model tells its name on the process's stdout, where results may be read from."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(own, 1)
        os.close(own)
