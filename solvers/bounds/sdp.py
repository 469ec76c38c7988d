"""`sdp`: the semidefinite relaxation by low-rank coordinate descent, any n, rows in parallel.

The vectors, their duals and the certificate that these make are those of `convex.mixing`. A small ρ suffices,
since the bound is taken over the sums themselves; a large ρ ties all coordinates together, and takes ten
times as many sweeps for the same bound.

With `cuts` the relaxation is tightened by violated triangle inequalities (`convex.triangles`): in rounds, the
most violated ones join the pool. Their multipliers are those of an augmented Lagrangian: the sweeps of the
mixing method run on C less Σ_t τ'_t(triangle t) with τ' = max(0, τ − step·(triangle + 1)), and τ follows τ'
slowly, since plain steps on τ swing for ever between vectors of equal value. Remaining swings are averaged:
the bound is concave in τ. For the mean of τ the plain mixing method then finds y.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from maskopt.certificates.certificate import Certificate
from maskopt.certificates.cuts import Cuts
from maskopt.core.fields import option
from maskopt.core.files import join_rows
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.core.threads import one_thread_each, threads_on
from maskopt.protocol.bounds import BoundMethod
from maskopt.protocol.trace import Trace
from maskopt.solvers.convex.box import BoxPlan, linear_bound, relax_box
from maskopt.solvers.convex.interior_point import interior_point
from maskopt.solvers.convex.mixing import (
    Extra,
    Mixing,
    RowDuals,
    ScaledRow,
    certificate_of,
    certify_row,
    default_rank,
    penalty_of,
)
from maskopt.solvers.convex.triangles import Incidence, Pool, damp, dense, separate, steps_of
from maskopt.solvers.kernels import one_blas_thread

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
#: in place of the certificate of a row that has none yet
_UNPROVEN = RowDuals(np.zeros(0), np.zeros(0), loss=np.inf, value=-np.inf, penalty=0.0)
#: sweeps before the first cuts
_START = 400
#: triangles that may join in a round, per input and in all
_NEW, _MOST_NEW = 128, 2**17
#: multipliers below this part of the largest are left out of the certificate
_TINY = 1e-7
#: the k-th of the iterates weighs about (k/iterates)^_LATE in their mean
_LATE = 3
#: sweeps at the end, with the mean of the multipliers
_SETTLE = 800
#: parts of the time left for the rounds, then for the last schedule, then for the sweeps at the end
_ROUNDS_SHARE, _END_SHARE, _SETTLE_SHARE = 0.7, 0.7, 0.3


@dataclass(frozen=True)
class SdpBound(BoundMethod):
    """The low-rank semidefinite bound, with a λ_min certificate in float64.

    Rows that get no time have the certificate of the box relaxation. With cuts, the plain bound has a third
    of the time.
    """

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
        with one_blas_thread():
            rank = self.rank or default_rank(problem.n)
            stages = (self.sweeps,) if self.sweeps is not None else _STAGES
            size = max(1, _TILE_ENTRIES // (problem.n * rank))
            before_cuts = limits.share(_PLAIN_SHARE) if self.cuts else limits
            parts = [
                _Tile(part, rank, before_cuts).run(stages, self.tolerance)
                for _, part in problem.tiles(size)
            ]
            certificate = Certificate.stack([part for part, _ in parts])
            trace = join_rows([part for _, part in parts])
            if not self.cuts:
                return certificate, trace
            certificate, count = tighten(problem, certificate, rank, self.cuts, limits)
            return certificate, replace(trace, cuts=count)


class _Tile:
    """The vectors of a tile of rows, and the best certificate of each so far (`best`).

    Attributes:
        todo: the rows whose vectors are in `state`; settled ones are dropped.
        inner: float64 [rows, n], ⟨v_i, v_0⟩ where the best bound was found.
    """

    def __init__(self, problem: LayerProblem, rank: int, limits: Limits) -> None:
        self.problem, self.limits = problem, limits
        self.state = Mixing(problem, rank, limits.seed)
        self.scale = self.state.scale
        self.gram = problem.gram.double().cpu().numpy()
        self.rho = penalty_of(problem.group_size)
        self.todo = np.arange(problem.rows)
        self.best = [_UNPROVEN] * problem.rows
        self.inner = np.zeros((problem.rows, problem.n))
        self.sweeps = np.zeros(problem.rows, np.int64)

    def run(self, stages: tuple[int, ...], tolerance: float) -> tuple[Certificate, Trace]:
        for sweeps in stages:
            limits = self.limits.share(_SWEEP_SHARE)
            self.sweeps[self.todo] += _descend(self.state, sweeps, self.rho, limits)
            unsettled = self._certify(tolerance)
            if not unsettled or self.limits.expired:
                break
            self.todo = self.todo[unsettled]
            self.state.keep(unsettled)
        self._fall_back(tolerance)
        certificate, loss = certificate_of(self.problem, self.best, self.scale)
        iterations, relaxed = torch.from_numpy(self.sweeps), torch.as_tensor((1 + self.inner) / 2)
        return certificate, Trace(iterations=iterations, correction=loss, relaxed=relaxed)

    def _certify(self, tolerance: float) -> list[int]:
        """Keep the certificates that prove more; return the positions in `todo` that have not settled."""
        duals, inner = self.state.duals.double().cpu().numpy(), self.state.inner()

        def certified(position: int) -> RowDuals | None:
            row = self.todo[position]
            if not self.sweeps[row] or (position and self.limits.expired):
                return None
            return certify_row(self._scaled(row), duals[position], inner[position], self.rho)

        unsettled = []
        parts = one_thread_each(certified, len(self.todo), torch.get_num_threads())
        for position, (row, part) in enumerate(zip(self.todo, parts, strict=True)):
            gain = 0.0 if part is None else part.value - self.best[row].value
            if part is not None and gain > 0:
                self.best[row], self.inner[row] = part, inner[position]
            if part is None or max(gain, part.loss) > tolerance * abs(part.value):
                unsettled.append(position)
        return unsettled

    def _scaled(self, row: int) -> ScaledRow:
        return ScaledRow.of(self.problem, self.gram, row, float(self.scale[row]))

    def _fall_back(self, tolerance: float) -> None:
        """Take the box relaxation for rows without a certificate, or with a correction that costs much.

        Under a time limit those without one get a few steps, all at once; then each is relaxed to its end.
        """
        late = [row for row, best in enumerate(self.best) if best is _UNPROVEN]
        if late and self.limits.timed:
            points = relax_box(self.problem.take(late), _HURRIED, self.limits).point.double()
            for row, point in zip(late, points.cpu().numpy(), strict=True):
                self.best[row] = _box_duals(point, np.nan)
                if not self.sweeps[row]:
                    self.inner[row] = 2 * point - 1
        if self.limits.expired:
            return
        part = _COSTLY * tolerance
        rows = [row for row, best in enumerate(self.best) if not best.loss <= part * best.value]

        def relaxed(position: int) -> np.ndarray:
            row = self._scaled(rows[position])
            return interior_point(
                row.q, 2 * row.linear, row.group, row.pruned, constant=row.constant
            )

        boxes = one_thread_each(relaxed, len(rows), torch.get_num_threads())
        for row, point in zip(rows, boxes, strict=True):
            alone = self.problem.take([row])
            value = float(linear_bound(alone, torch.as_tensor(point[None]).to(alone.device))[1])
            if not value * self.scale[row] <= self.best[row].value:
                self.best[row] = _box_duals(point, 0.0)


def _box_duals(point: np.ndarray, loss: float) -> RowDuals:
    return RowDuals(np.zeros(len(point)), point, loss, np.nan, 0.0)


def tighten(
    problem: LayerProblem, plain: Certificate, rank: int, rounds: int, limits: Limits
) -> tuple[Certificate, Tensor]:
    """Return for every row the better of `plain` and a certificate with triangle cuts, and how many it has.

    The vectors have so high a `rank`, and so many `rounds` of separation are made. Rows share the time
    equally, and those without time keep `plain`, a certificate without ν and cuts.
    """
    threads = threads_on(problem.device)

    def better(row: int) -> Certificate:
        part, before = problem.take([row]), plain.take([row])
        if not limits.expired:
            waves = math.ceil((problem.rows - row) / threads)
            after = cut_certificate(part, rank, rounds, limits.share(1 / waves))
            if bool(after.check(part) > before.check(part)):
                return after
        return before

    # triangles of a single row are looked for in several threads
    alone = problem.rows == 1
    parts = [better(0)] if alone else one_thread_each(better, problem.rows, threads)
    whole = Certificate.stack(parts)
    count = [len(cuts.multiplier) if cuts else 0 for cuts in whole.cuts or [None] * problem.rows]
    return whole, torch.tensor(count)


def cut_certificate(problem: LayerProblem, rank: int, rounds: int, limits: Limits) -> Certificate:
    """Return (λ, μ, τ, p̂) of a single row after `rounds` rounds."""
    n, state = problem.n, Mixing(problem, rank, limits.seed)
    _descend(state, _START, penalty_of(problem.group_size), limits)
    multipliers = _Multipliers(problem, state, Pool.empty())
    early, new = limits.share(_ROUNDS_SHARE), min(_NEW * n, _MOST_NEW)
    # chosen on rows of block 8 q_proj, on 256 inputs and on all, and on row 544 of block 10 down_proj: many
    # rounds of few updates find more triangles that count than few rounds, each to its end
    for _ in range(rounds):
        binding = multipliers.pool.keep(multipliers.used > 0)
        index, sign, _ = separate(_gram(state), new, threads=state.threads)
        multipliers = _Multipliers(problem, state, binding.join(index, sign, n))
        multipliers.run(early, updates=20, sweeps=2, follow=0.4, haste=2.0)
        if early.expired:
            break
    multipliers.run(limits.share(_END_SHARE), updates=500, sweeps=8, follow=0.2, haste=1.0)
    multipliers.settle(limits.share(_SETTLE_SHARE))
    return multipliers.certificate()


def _descend(state: Mixing, sweeps: int, rho: float, limits: Limits) -> np.ndarray:
    """Sweep until the deadline, at least a chunk for the first rows; return the sweeps of each row."""
    done = np.zeros(len(state.v), np.int64)
    # on other devices all rows are swept at once
    piecewise = limits.timed and state.v.device.type == "cpu"
    at_once = _ROWS_AT_ONCE * torch.get_num_threads() if piecewise else len(done)
    for begun in range(0, sweeps, _CHUNK):
        chunk = min(sweeps - begun, _CHUNK)
        for first in range(0, len(done), at_once):
            if (begun or first) and limits.expired:
                return done
            rows = np.arange(first, min(first + at_once, len(done)))
            state.sweep(chunk, rho, rows)
            done[rows] += chunk
    return done


def _gram(state: Mixing) -> np.ndarray:
    """Return ⟨v_i, v_j⟩, [n + 1, n + 1] with v_0 last."""
    v = state.v[0].cpu().numpy()
    v = np.concatenate([v, np.eye(1, v.shape[1], dtype=v.dtype)])
    return np.asarray(v @ v.T)


class _Multipliers:
    """The triangles of a row, and E, the addition to C that they make.

    Attributes:
        used: τ' of every triangle.
        mean: the mean of the iterates of τ'.
    """

    def __init__(self, problem: LayerProblem, state: Mixing, pool: Pool) -> None:
        self.problem, self.state, self.pool = problem, state, pool
        self.rho = penalty_of(problem.group_size)
        self.used = self.mean = pool.tau.copy()
        dtype = state.v[:0].cpu().numpy().dtype
        a, b = pool.sign.astype(dtype).T
        self.signs = np.stack([a, b, a * b], axis=1)
        self.incidence = Incidence.of(pool.index, state.v.shape[1])
        self.step = steps_of(pool.index, state.duals[0].double().cpu().numpy())
        partners = self.incidence.partners
        self.value = np.zeros(len(partners), dtype)
        state.extra = Extra(self.incidence.starts[None], partners, self.value)

    def run(self, limits: Limits, updates: int, sweeps: int, follow: float, haste: float) -> None:
        """Move vectors and multipliers in turn, until the deadline, so many sweeps after every update.

        τ follows τ' by the part `follow`, and `haste` is a factor of the steps. Their mean is `mean`.
        """
        self.mean = self.used
        for update in range(updates):
            self._damp(haste * self.step, follow)
            self.state.sweep(sweeps, self.rho)
            self.mean = self.mean + (_LATE + 1) / (_LATE + 1 + update) * (self.used - self.mean)
            if limits.expired:
                break

    def settle(self, limits: Limits) -> None:
        """Find the vectors that go with the mean of the multipliers."""
        self.pool.tau[:] = self.mean
        self._damp(np.zeros_like(self.step), 0.0)
        _descend(self.state, _SETTLE, self.rho, limits)

    def _damp(self, step: np.ndarray, follow: float) -> None:
        pairs, v = self.incidence, self.state.v[0].cpu().numpy()
        cuts = pairs.member, self.signs, step, follow, self.pool.tau, self.used
        damp(v, pairs.pairs, pairs.entries, *cuts, self.value)

    def certificate(self) -> Certificate:
        """Return the certificate of the multipliers once they have settled."""
        problem, scale, n = self.problem, self.state.scale, self.problem.n
        y = self.state.duals[0].double().cpu().numpy()
        if np.isfinite(y).all():
            pool = Pool(self.pool.index, self.pool.sign, self.mean)
            pool = pool.keep(pool.tau > _TINY * pool.tau.max(initial=0.0))
            scaled = ScaledRow.of(problem, problem.gram.double().cpu().numpy(), 0, float(scale[0]))
            duals = certify_row(scaled, y, self.state.inner()[0], self.rho, dense(pool, n))
            duals = duals._replace(value=duals.value - float(pool.tau.sum()))
        else:  # the row is beyond float64
            pool, duals = Pool.empty(), RowDuals(np.zeros(n), np.zeros(n), 0.0, 0.0, self.rho)
        cuts = Cuts(*map(torch.as_tensor, (pool.index, pool.sign, pool.tau / scale[0])))
        return certificate_of(problem, [duals], scale, [cuts])[0]
