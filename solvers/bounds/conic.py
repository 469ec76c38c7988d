"""`sdp-conic`: the same semidefinite relaxation by SCS, up to 200 inputs: a cross-check of `sdp`.

min Σy over C + diag(y) ⪰ 0, with C the max-cut form of size n + 1 (see `sdp`) at a fixed penalty ρ.
What SCS prints is no bound; its y goes through the same correction and the same certificate.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch

from maskopt.bounds import Certificate
from maskopt.errors import OptionError
from maskopt.problem import LayerProblem
from maskopt.solvers.bounds.box import deadline
from maskopt.solvers.convex.mixing import scales_of
from maskopt.solvers.bounds.sdp import certify_row, penalty_of


class ConicBound:
    """SCS (O'Donoghue et al. 2016) on one row after the other."""

    name = "sdp-conic"
    largest_n: int | None = 200
    note = "the same relaxation by SCS; a cross-check"

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("scs") is None:
            return "the package scs is not installed; pip install scs"
        return None

    def certify(
        self,
        problem: LayerProblem,
        *,
        tolerance: float = 1e-6,
        penalty: float | None = None,
        max_iterations: int = 20_000,
        time_limit: float | None = None,
    ) -> tuple[Certificate, dict[str, Any]]:
        """Args:
        tolerance: of SCS, absolute and relative.
        penalty: ρ of a row in the scale of `sdp`; None: that of `sdp`.
        max_iterations: of SCS; whatever it has by then is certified.
        time_limit: seconds for all rows.
        """
        penalty = penalty_of(problem.group_size) if penalty is None else penalty
        if not 0 < tolerance < 1 or not penalty > 0 or max_iterations < 1:
            raise OptionError("sdp-conic: tolerance in (0, 1), penalty > 0, max_iterations ≥ 1")
        deadline(time_limit)  # checks the value
        n, group, pruned = problem.n, problem.group_size, problem.pruned_per_group
        scales = scales_of(problem).tolist()
        lam, mu, point = [], [], []
        printed = []
        for row in range(problem.rows):
            q = problem.row(row).q().cpu().numpy()
            scale = scales[row]
            share = None if time_limit is None else max(time_limit / problem.rows, 1e-3)
            y, inner, value = _scs(
                q * scale, group, pruned, penalty, tolerance, max_iterations, share
            )
            row_lam, row_point, _, _ = certify_row(q * scale, group, pruned, y, inner, penalty)
            lam.append(row_lam / scale)
            mu.append(np.full(n // group, penalty / scale))
            point.append(row_point)
            printed.append(value / scale)
        like: dict[str, Any] = {"dtype": torch.float64, "device": problem.device}
        parts = [torch.as_tensor(np.stack(x), **like) for x in (lam, mu, point)]
        return Certificate(parts[0], parts[1], parts[2]), {"printed": printed}


def _scs(
    q: np.ndarray,
    group: int,
    pruned: int,
    rho: float,
    tolerance: float,
    iterations: int,
    seconds: float | None,
) -> tuple[np.ndarray, np.ndarray, float]:
    """y of the inputs, ⟨v_i, v_0⟩, and the value that SCS prints (not a bound)."""
    import scipy.sparse as sp
    import scs

    n = len(q)
    size = n + 1
    label = np.arange(n) // group
    c = np.zeros((size, size))
    c[1:, 1:] = (q + rho * (label[:, None] == label[None, :])) / 4
    constant = float(q.sum() + np.trace(q)) / 4
    constant += (n // group) * rho * (group / 4 + (group / 2 - pruned) ** 2)
    np.fill_diagonal(c, 0)
    c[0, 1:] = c[1:, 0] = q.sum(1) / 4 + rho * (group / 2 - pruned) / 2
    # the lower triangle by columns, off-diagonal entries times √2
    column, row = np.triu_indices(size)
    vector = c[row, column] * np.where(row == column, 1.0, np.sqrt(2))
    position = np.flatnonzero(row == column)
    a = sp.csc_matrix((-np.ones(size), (position, np.arange(size))), shape=(len(vector), size))
    settings = {"eps_abs": tolerance, "eps_rel": tolerance, "max_iters": iterations}
    if seconds is not None:
        settings["time_limit_secs"] = seconds
    solver = scs.SCS(
        {"A": a, "b": vector, "c": np.ones(size)}, {"s": [size]}, verbose=False, **settings
    )
    answer = solver.solve()
    y = np.nan_to_num(np.asarray(answer["x"]), nan=1.0)
    dual = np.nan_to_num(np.asarray(answer["y"]))
    first = (column == 0) & (row > 0)
    return y[1:], dual[first] / np.sqrt(2), constant - float(y.sum())
