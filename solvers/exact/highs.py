"""The linearised program in HiGHS, with one variable for each product: a second exact opinion.

Optional (`pip install highspy`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from maskopt.core.problem import LayerProblem
from maskopt.protocol.solver import Capabilities
from maskopt.solvers.exact.program import FEASIBILITY, Program
from maskopt.solvers.exact.rows import RowSolver, exact
from maskopt.solvers.exact.tasks import CLOSED, RowAnswer, RowTask


@dataclass(frozen=True)
class Highs(RowSolver):
    """HiGHS on the linearised program; OPTIMAL only where HiGHS says so."""

    name: ClassVar[str] = "highs"
    package: ClassVar[str] = "highspy"
    capabilities: ClassVar[Capabilities] = exact(
        trusted=("HiGHS",),
        # the n²/2 products are too many for a simplex beyond
        largest_n=128,
        note="optional highspy, linearised; proves up to about 48 inputs",
    )

    def trusted_name(self, problem: LayerProblem) -> str:
        import highspy

        parts = (getattr(highspy, f"HIGHS_VERSION_{part}") for part in ("MAJOR", "MINOR", "PATCH"))
        return f"{self.capabilities.trusted[0]} {'.'.join(map(str, parts))}"

    def search_row(self, task: RowTask) -> RowAnswer:
        """Search one row in one thread."""
        import highspy

        # tolerances are absolute, and the start's cost is the unit
        task = task.with_incumbent()
        words = {
            highspy.HighsModelStatus.kOptimal: "optimal",
            highspy.HighsModelStatus.kTimeLimit: "timelimit",
            highspy.HighsModelStatus.kSolutionLimit: "nodelimit",
            highspy.HighsModelStatus.kInterrupt: "userinterrupt",
        }
        program = Program(task, task.unit_scale)
        program.reformulate()
        with _banner_on_stderr():
            model = highspy.Highs()
        model.setOptionValue("output_flag", False)
        for cost, low, high in zip(program.cost, program.low, program.high, strict=True):
            model.addCol(cost, low, high, 0, [], [])
        for i in program.binaries:
            model.changeColIntegrality(i, highspy.HighsVarType.kInteger)
        for variables, coefficients, low, high in program.rows:
            model.addRow(low, high, len(variables), variables, coefficients)
        options: dict[str, float] = {"random_seed": task.limits.seed % 2**31, "threads": 1}
        options |= {"mip_rel_gap": task.gap_limit, "mip_abs_gap": 0.0}
        options |= {"time_limit": task.limits.left} if task.limits.timed else {}
        options |= {} if task.node_limit is None else {"mip_max_nodes": task.node_limit}
        for name, value in options.items():
            model.setOptionValue(name, value)
        guess = highspy.HighsSolution()
        guess.col_value = program.complete(task.start).tolist()
        model.setSolution(guess)
        model.run()
        info, status = model.getInfo(), model.getModelStatus()
        ended = words.get(status, model.modelStatusToString(status))
        if ended == "optimal" and info.mip_gap > CLOSED:
            ended = "gaplimit"
        pruned = program.pruned(model.getSolution().col_value)
        # p_i and x_ij off by the tolerance move f by that part of their coefficients
        slack = FEASIBILITY * float(np.abs(task.q).sum())
        bound, nodes = float(info.mip_dual_bound) / program.scale, int(info.mip_node_count)
        return task.answer(pruned, ended, bound, slack, nodes)


@contextmanager
def _banner_on_stderr() -> Iterator[None]:
    """Redirect the name that a new model prints to stdout, where results may be read from."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
