"""`sdp`: the semidefinite relaxation by low-rank coordinate descent, any n, rows in parallel.

With p = (1 + z)/2, one extra sign z_0 and the penalty ρΣ_g(1_gᵀp − s)² the problem is a max-cut form min ⟨C,
Y⟩, Y_ii = 1, Y ⪰ 0 of size n + 1, with Y = VVᵀ of rank k ≈ √(2n) (Burer and Monteiro). The mixing method
(Wang, Chang and Kolter, arXiv 1706.00476) sets v_i ← −g_i/‖g_i‖, g_i = Σ_j C_ij v_j, again and again; y_i =
‖g_i‖ are the duals, of which `convex.duals` makes a certificate. v_0 is kept fixed.

A small ρ suffices, since the bound is taken over the sums themselves; a large ρ ties all coordinates
together, and takes ten times as many sweeps for the same bound.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from maskopt.certificates.certificate import Certificate
from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.core.rows import join_rows
from maskopt.protocol.bounds import BoundMethod
from maskopt.protocol.trace import Trace
from maskopt.solvers.bounds.cuts import tighten
from maskopt.solvers.compiled import in_threads
from maskopt.solvers.convex.box import BoxPlan, relax_box
from maskopt.solvers.convex.duals import (
    RowDuals,
    ScaledRow,
    certificate_of,
    certify_row,
    penalty_of,
)
from maskopt.solvers.convex.interior_point import interior_point
from maskopt.solvers.convex.linear_bound import linear_bound
from maskopt.solvers.convex.mixing import Mixing, default_rank

#: sweeps of the stages; a row leaves when its bound has settled
_STAGES = (300, 300, 600, 1200, 2400)
#: part of what is left of a time limit that the sweeps of a stage take; what comes of them must be certified
_SWEEP_SHARE = 0.5
#: the plain bound's part of a time limit where cuts follow
_PLAIN_SHARE = 1 / 3
#: sweeps at a time
_CHUNK = 20
#: rows a thread that are swept between two looks at the clock
_ROWS_AT_ONCE = 4
#: a correction of more than so many tolerances costs enough to try the box relaxation
_COSTLY = 20
#: entries of the vectors of a tile of rows: half a gigabyte
_TILE_ENTRIES = 2**27
#: for rows that no time is left for
_HURRIED = BoxPlan(tolerance=0.01, max_iterations=60)


@dataclass(frozen=True)
class SdpBound(BoundMethod):
    """Low-rank semidefinite bound with a λ_min certificate in float64. Rows that get no time have the
    certificate of the box relaxation. With cuts, the plain bound has a third of the time."""

    name: ClassVar[str] = "sdp"
    note: ClassVar[str] = "low-rank semidefinite relaxation, any n"

    sweeps: int | None = option(
        None,
        "passes of coordinate descent; None: up to 4800, in stages, until a stage raises the row's "
        "bound by less than `tolerance` and its correction costs less than that",
        least=1,
    )
    tolerance: float = option(0.003, "of a stage's gain", unit="part of the bound", least=0)
    rank: int | None = option(
        None, "k, entries of a vector; None: √(2n), to a multiple of 16", least=2
    )
    cuts: int = option(
        0,
        "rounds of separation of triangle inequalities after the plain bound, which is kept where "
        "it is higher; 8 rounds take a multiple of its time",
        unit="rounds",
        least=0,
    )

    def certify(self, problem: LayerProblem, limits: Limits) -> tuple[Certificate, Trace]:
        plain = limits.share(_PLAIN_SHARE) if self.cuts else limits
        rank = self.rank or default_rank(problem.n)
        stages = (self.sweeps,) if self.sweeps is not None else _STAGES
        tile = max(1, _TILE_ENTRIES // (problem.n * rank))
        parts: list[tuple[Certificate, Trace]] = []
        for rows, part in problem.tiles(tile):
            if rows.start and plain.expired:
                parts.append(_boxed(problem.take(slice(rows.start, problem.rows)), plain))
                break
            parts.append(_Tile(part, rank, plain).run(stages, self.tolerance))
        certificate = Certificate.stack([part for part, _ in parts])
        trace = join_rows([part for _, part in parts])
        if not self.cuts:
            return certificate, trace
        certificate, count, correction = tighten(problem, certificate, rank, self.cuts, limits)
        return certificate, replace(trace, cuts=count, cut_correction=correction)


def _boxed(problem: LayerProblem, limits: Limits) -> tuple[Certificate, Trace]:
    """The box relaxation, of which at least one step is made."""
    point = relax_box(problem, _HURRIED, limits).point.double()
    trace = Trace(
        iterations=torch.zeros(problem.rows, dtype=torch.int64),
        correction=torch.full((problem.rows,), torch.nan, dtype=torch.float64),
        relaxed=point.cpu(),
    )
    return Certificate.box(problem, point), trace


class _Tile:
    """The vectors of some rows, and the best certificate of each so far (`best`).

    Attributes:
        todo: the rows whose vectors are in `state`; settled ones are dropped.
        penalty: float64 [rows], ρ, or 0 where the box relaxation proves more.
        inner: float64 [rows, n], ⟨v_i, v_0⟩ where the best bound was found.
    """

    def __init__(self, problem: LayerProblem, rank: int, limits: Limits) -> None:
        self.problem, self.limits = problem, limits
        self.state = Mixing(problem, rank, limits.seed)
        self.scale = self.state.scale
        self.gram = problem.gram.double().cpu().numpy()
        self.rho = penalty_of(problem.group_size)
        self.todo = np.arange(problem.rows)
        self.best: list[RowDuals | None] = [None] * problem.rows
        self.penalty = np.zeros(problem.rows)
        self.inner = np.zeros((problem.rows, problem.n))
        self.sweeps = np.zeros(problem.rows, np.int64)

    def run(self, stages: tuple[int, ...], tolerance: float) -> tuple[Certificate, Trace]:
        for sweeps in stages:
            self._descend(sweeps)
            again = self._certify(tolerance)
            if not again or self.limits.expired:
                break
            self.todo = self.todo[again]
            self.state.keep(again)
        self._fall_back(tolerance)
        return self._found()

    def _descend(self, sweeps: int) -> None:
        """At least one chunk for some rows; until the deadline, chunk by chunk for all."""
        limits = self.limits.share(_SWEEP_SHARE)
        count = len(self.todo)
        piecewise = limits.timed and self.problem.device.type == "cpu"  # elsewhere all rows at once
        at_once = _ROWS_AT_ONCE * torch.get_num_threads() if piecewise else count
        for done in range(0, sweeps, _CHUNK):
            chunk = min(sweeps - done, _CHUNK)
            for first in range(0, count, at_once):
                rows = np.arange(first, min(first + at_once, count))
                if (done or first) and limits.expired:
                    return
                self.state.sweep(chunk, self.rho, rows)
                self.sweeps[self.todo[rows]] += chunk

    def _certify(self, tolerance: float) -> list[int]:
        """Keep what is better than before; the positions in `todo` of rows that have not settled."""
        duals, inner = self.state.duals.double().cpu().numpy(), self.state.inner()

        def one(position: int) -> RowDuals | None:
            row = self.todo[position]
            if not self.sweeps[row] or (position and self.limits.expired):
                return None
            y, start = duals[position], inner[position]
            return certify_row(self._scaled(row), y, start, self.rho)

        again = []
        for position, found in enumerate(in_threads(one, range(len(self.todo)))):
            row = self.todo[position]
            if found is None:
                again.append(position)
                continue
            best = self.best[row]
            gain = found.value - (best.value if best is not None else -np.inf)
            if gain > 0:
                self.best[row], self.penalty[row] = found, self.rho
                self.inner[row] = inner[position]
            if max(gain, found.loss) > tolerance * abs(found.value):
                again.append(position)
        return again

    def _scaled(self, row: int) -> ScaledRow:
        return ScaledRow.of(self.problem, self.gram, row, float(self.scale[row]))

    def _relaxed(self, row: int) -> np.ndarray:
        """The point of the box relaxation."""
        of = self._scaled(row)
        return interior_point(of.q, 2 * of.linear, of.group, of.pruned, constant=of.constant)

    def _fall_back(self, tolerance: float) -> None:
        """The box relaxation where there is no time, nothing was certified, or the correction costs much: in
        a few steps for all rows, or to its end for each."""
        late = [row for row, best in enumerate(self.best) if best is None]
        if late and self.limits.timed:
            box = relax_box(self.problem.take(late), _HURRIED, self.limits)
            for position, row in enumerate(late):
                self._replace(row, box.point[position].double().cpu().numpy(), np.nan)
                if not self.sweeps[row]:
                    self.inner[row] = 2 * box.point[position].double().cpu().numpy() - 1
        if self.limits.expired:
            return

        part = _COSTLY * tolerance
        rows = [
            row
            for row, best in enumerate(self.best)
            if best is None or not best.loss <= part * best.value
        ]
        points = in_threads(self._relaxed, rows)
        for row, point in zip(rows, points, strict=True):
            alone = self.problem.take([row])
            value = float(linear_bound(alone, torch.as_tensor(point[None]).to(alone.device))[1])
            best = self.best[row]
            if best is None or not value * self.scale[row] <= best.value:
                self._replace(row, point, 0.0)

    def _replace(self, row: int, point: np.ndarray, loss: float) -> None:
        self.best[row] = RowDuals(np.zeros(len(point)), point, loss, np.nan)
        self.penalty[row] = 0.0

    def _found(self) -> tuple[Certificate, Trace]:
        found = [best for best in self.best if best is not None]
        certificate, loss = certificate_of(self.problem, found, self.penalty, self.scale)
        trace = Trace(
            iterations=torch.from_numpy(self.sweeps),
            correction=loss,
            relaxed=torch.as_tensor((1 + self.inner) / 2),
        )
        return certificate, trace
