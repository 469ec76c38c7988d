"""`sdp-conic`: the same semidefinite relaxation by SCS, up to 200 inputs: a cross-check of `sdp`.

min Σy over C + diag(y) ⪰ 0, with C the max-cut form of size n + 1 (see `convex.mixing`) at a fixed penalty ρ.
What SCS prints is no bound; its y goes through the same correction and the same certificate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from maskopt.certificates.certificate import Certificate
from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.protocol.bounds import BoundMethod
from maskopt.protocol.solver import missing_package
from maskopt.protocol.trace import Trace
from maskopt.solvers.convex.mixing import (
    ScaledRow,
    certificate_of,
    certify_row,
    penalty_of,
    scales_of,
)


@dataclass(frozen=True)
class ConicBound(BoundMethod):
    """SCS (O'Donoghue et al. 2016) on one row after the other; whatever it has at the end is certified."""

    name: ClassVar[str] = "sdp-conic"
    largest_n: ClassVar[int | None] = 200
    note: ClassVar[str] = "the same relaxation by SCS; a cross-check"

    tolerance: float = option(1e-6, "of SCS, absolute and relative", least=1e-15, below=1)
    penalty: float | None = option(
        None, "ρ of a row in the scale of `sdp`; None: that of `sdp`", least=1e-12
    )
    max_iterations: int = option(20_000, "of SCS", unit="iterations a row", least=1)

    @classmethod
    def unavailable(cls) -> str | None:
        return missing_package("scs")

    def certify(self, problem: LayerProblem, limits: Limits) -> tuple[Certificate, Trace]:
        penalty = penalty_of(problem.group_size) if self.penalty is None else self.penalty
        gram, scales = problem.gram.double().cpu().numpy(), scales_of(problem).cpu().numpy()
        found, printed = [], []
        for row, scale in enumerate(scales.tolist()):
            scaled = ScaledRow.of(problem, gram, row, scale)
            share = max(limits.left / (problem.rows - row), 1e-3) if limits.timed else None
            y, inner, value = _scs(scaled, penalty, self.tolerance, self.max_iterations, share)
            found.append(certify_row(scaled, y, inner, penalty))
            printed.append(value / scale)
        certificate, _ = certificate_of(problem, found, scales)
        return certificate, Trace(printed=torch.tensor(printed, dtype=torch.float64))


def _scs(
    of: ScaledRow, rho: float, tolerance: float, iterations: int, seconds: float | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """y of the inputs, ⟨v_i, v_0⟩, and the value that SCS prints (not a bound)."""
    import scipy.sparse as sp
    import scs

    q, group, pruned = of.q, of.group, of.pruned
    n = len(q)
    size = n + 1
    label = np.arange(n) // group
    c = np.zeros((size, size))
    c[1:, 1:] = (q + rho * (label[:, None] == label[None, :])) / 4
    constant = float(q.sum() + np.trace(q)) / 4 + float(of.linear.sum()) + of.constant
    constant += (n // group) * rho * (group / 4 + (group / 2 - pruned) ** 2)
    np.fill_diagonal(c, 0)
    c[0, 1:] = c[1:, 0] = q.sum(1) / 4 + of.linear / 2 + rho * (group / 2 - pruned) / 2
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
