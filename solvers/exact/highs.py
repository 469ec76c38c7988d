"""A second exact opinion: HiGHS on a linear integer program, with one variable z_ij for each product.

Since 1_gᵀp = s holds in every group g, multiplying it by p_i gives Σ_{j∈g} z_ij = s·p_i (z_ii = p_i): the
reformulation-linearisation equations, far tighter than z_ij ≥ p_i + p_j − 1 alone. Optional
(`pip install highspy`).
"""

from __future__ import annotations

import importlib.util
import time

import numpy as np

from maskopt.solver import Capabilities
from maskopt.solvers.exact.rowwise import RowwiseExact, unit_scale
from maskopt.solvers.exact.scip_model import RowAnswer, RowTask

#: n beyond which the n²/2 products are too many for a simplex
LARGEST_N = 128


def solve_row(task: RowTask) -> RowAnswer:
    """One row, one thread."""
    import highspy

    began = time.perf_counter()
    start = np.asarray(task.start, dtype=bool)
    if task.time_limit is not None and task.time_limit <= 0:
        return RowAnswer(start, task.bound, "timelimit", message="no time given")
    scale = unit_scale(task)
    model, pairs = _model(task, task.q * scale)
    model.setOptionValue("random_seed", task.seed % 2**31)
    model.setOptionValue("mip_rel_gap", task.gap_limit)
    model.setOptionValue("mip_abs_gap", 0.0)
    model.setOptionValue("threads", 1)
    if task.time_limit is not None:
        model.setOptionValue("time_limit", task.time_limit)
    if task.node_limit is not None:
        model.setOptionValue("mip_max_nodes", task.node_limit)
    guess = highspy.HighsSolution()
    guess.col_value = [*start.astype(float), *(float(start[i] and start[j]) for i, j in pairs)]
    model.setSolution(guess)
    model.run()
    info, status = model.getInfo(), model.getModelStatus()
    words = {
        highspy.HighsModelStatus.kOptimal: "optimal",
        highspy.HighsModelStatus.kTimeLimit: "timelimit",
        highspy.HighsModelStatus.kSolutionLimit: "nodelimit",
        highspy.HighsModelStatus.kInterrupt: "userinterrupt",
    }
    word = words.get(status, model.modelStatusToString(status))
    if word == "optimal" and info.mip_gap > 1e-9:
        word = "gaplimit"
    values = np.asarray(model.getSolution().col_value[: len(task.q)]) > 0.5
    counts = values.reshape(-1, task.group).sum(1) if len(values) == len(task.q) else None
    bound = float(info.mip_dual_bound) / scale
    return RowAnswer(
        pruned=values if counts is not None and (counts == task.pruned).all() else start,
        bound=max(bound, 0.0) if np.isfinite(bound) else 0.0,
        status=word,
        nodes=int(info.mip_node_count),
        seconds=time.perf_counter() - began,
    )


def _model(task: RowTask, q: np.ndarray):  # type: ignore[no-untyped-def]  # highspy is optional
    """min Σ q_ii p_i + Σ_{i<j} 2 q_ij z_ij, and the pairs (i, j) of the z after the n binaries."""
    import highspy

    n, group, infinity = len(q), task.group, highspy.kHighsInf
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


class HighsSolver(RowwiseExact):
    """The linearised program; OPTIMAL only where HiGHS says so."""

    name = "highs"
    capabilities = Capabilities(
        devices=("cpu",), proves="optimality", largest_n=48, note="exact; linearised, optional"
    )
    largest_n = LARGEST_N
    solve_row = staticmethod(solve_row)

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("highspy") is None:
            return "the package highspy is not installed; pip install 'maskopt[highs]'"
        return None
