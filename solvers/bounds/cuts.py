"""The semidefinite relaxation tightened by violated triangle inequalities (`convex.triangles`): in rounds,
the most violated ones join the pool.

The multipliers are those of an augmented Lagrangian: the sweeps of the mixing method run on C less Σ_t
τ'_t(triangle t) with τ' = max(0, τ − step·(triangle + 1)), and τ follows τ' slowly, since plain steps on τ
swing for ever between vectors of equal value. Remaining swings are averaged: the bound is concave in τ. For
the mean of τ the plain mixing method then finds y.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maskopt.certificates.certificate import Certificate
from maskopt.certificates.cuts import Cuts
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.solvers.compiled import in_threads
from maskopt.solvers.convex.duals import (
    RowDuals,
    ScaledRow,
    certificate_of,
    certify_row,
    penalty_of,
)
from maskopt.solvers.convex.mixing import Extra, Mixing
from maskopt.solvers.convex.triangles import Incidence, Pool, dense, separate, steps_of
from maskopt.solvers.convex.triangles_kernel import damp

#: entries of the inner products of a tile of rows
_TILE_ENTRIES = 2**24
#: sweeps before the first cuts
_START = 400
#: sweeps between two looks at the clock
_CHUNK = 20
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
class Schedule:
    """How the multipliers move between two separations: so many updates, each followed by `sweeps`; τ follows
    τ' by the part `follow`, and `haste` is a factor of the triangles' steps."""

    updates: int
    sweeps: int
    follow: float
    haste: float = 1.0


#: chosen on rows of block 8 q_proj, on 256 inputs and on all, and on row 544 of block 10 down_proj: many
#: rounds of few updates find more triangles that count than few rounds, each to its end
_ROUND = Schedule(updates=20, sweeps=2, follow=0.4, haste=2.0)
_END = Schedule(updates=500, sweeps=8, follow=0.2)


def tighten(
    problem: LayerProblem, plain: Certificate, rank: int, rounds: int, limits: Limits
) -> tuple[Certificate, Tensor, Tensor]:
    """The better of `plain` and a certificate with triangle cuts, for every row; and for every row the number
    of triangles in it, and the loss to the correction as part of the bound (NaN where `plain` is kept).

    Args:
        plain: a certificate without ν and cuts.
        rank: of the vectors.
        rounds: of separation.
        limits: rows share the time equally; rows without time keep `plain`.
    """
    threads = torch.get_num_threads()
    tile = max(1, _TILE_ENTRIES // (problem.n + 1) ** 2 // threads) * threads
    parts: list[Certificate] = []
    correction: list[Tensor] = []
    for rows, part in problem.tiles(tile):
        before = plain.take(range(rows.start, rows.stop))
        loss = torch.full((part.rows,), torch.nan, dtype=torch.float64)
        if not limits.expired:
            own = limits.share(part.rows / (problem.rows - rows.start))
            after, found = cut_certificate(part, rank, rounds, own)
            better = (after.check(part) > before.check(part)).cpu()
            before = Certificate.choose(better, before, after)
            loss = torch.where(better, found, loss)
        parts.append(before)
        correction.append(loss)
    whole = Certificate.stack(parts)
    count = [len(one.multiplier) if one else 0 for one in whole.cuts or [None] * problem.rows]
    return whole, torch.tensor(count), torch.cat(correction)


def cut_certificate(
    problem: LayerProblem, rank: int, rounds: int, limits: Limits
) -> tuple[Certificate, Tensor]:
    """(λ, μ, τ, p̂) of all rows after `rounds` rounds, and the loss to the correction as part of the bound."""
    n = problem.n
    state = Mixing(problem, rank, limits.seed)
    rho = penalty_of(problem.group_size)
    _descend(state, _START, rho, limits)
    multipliers = _Multipliers(state, [Pool.empty()] * problem.rows)
    early, new = limits.share(_ROUNDS_SHARE), min(_NEW * n, _MOST_NEW)
    for _ in range(rounds):
        pools = [
            pool.join(*separate(_gram(state, row), new, threads=state.threads)[:2], n)
            for row, pool in enumerate(multipliers.pools())
        ]
        multipliers = _Multipliers(state, pools)
        multipliers.run(_ROUND, rho, early)
        if early.expired:
            break
    multipliers.run(_END, rho, limits.share(_END_SHARE))
    multipliers.settle(rho, limits.share(_SETTLE_SHARE))
    return multipliers.certify(problem, rho)


def _descend(state: Mixing, sweeps: int, rho: float, limits: Limits) -> None:
    """With unchanged multipliers; under a time limit chunk by chunk, one at least."""
    chunk = _CHUNK if limits.timed else sweeps
    for _ in range(0, sweeps, chunk):
        state.sweep(chunk, rho)
        if limits.expired:
            break


class _Multipliers:
    """The triangles of all rows in one list, and E, the addition to C that they make."""

    def __init__(self, state: Mixing, pools: list[Pool]) -> None:
        self.state = state
        n = state.v.shape[1]
        self.index = np.concatenate([pool.index for pool in pools])
        self.sign = np.concatenate([pool.sign for pool in pools])
        self.tau = np.concatenate([pool.tau for pool in pools])
        self.used = self.tau.copy()
        self.cut_rows = np.cumsum([0, *(len(pool.tau) for pool in pools)])
        dtype = state.v[:0].cpu().numpy().dtype
        a, b = self.sign.astype(dtype).T
        self.signs = np.stack([a, b, a * b], axis=1)
        y = state.duals.double().cpu().numpy()
        parts = [Incidence.of(pool.index, n) for pool in pools]
        self.pair_rows = np.cumsum([0, *(len(part.pairs) for part in parts)])
        self.entry_rows = np.cumsum([0, *(len(part.partners) for part in parts)])
        self.member = np.concatenate([part.member for part in parts])
        self.pairs = np.concatenate([part.pairs for part in parts])
        self.entries = np.concatenate([part.entries for part in parts])
        self.step = np.concatenate([steps_of(pool.index, y[row]) for row, pool in enumerate(pools)])
        state.extra = Extra(
            np.stack([part.starts for part in parts]) + self.entry_rows[:-1, None],
            np.concatenate([part.partners for part in parts]),
            np.zeros(self.entry_rows[-1], dtype),
        )
        self.mean = self.used

    def pools(self) -> list[Pool]:
        """Of every row, without the triangles that neither bind nor have a multiplier."""
        pools = []
        for low, high in zip(self.cut_rows[:-1], self.cut_rows[1:], strict=True):
            pool = Pool(self.index[low:high], self.sign[low:high], self.tau[low:high])
            pools.append(pool.keep(self.used[low:high] > 0))
        return pools

    def run(self, schedule: Schedule, rho: float, limits: Limits) -> None:
        """Move vectors and multipliers in turn, until the deadline; their mean is `mean`."""
        self.mean = self.used
        for update in range(schedule.updates):
            self._damp(schedule.haste * self.step, schedule.follow)
            self.state.sweep(schedule.sweeps, rho)
            self.mean = self.mean + (_LATE + 1) / (_LATE + 1 + update) * (self.used - self.mean)
            if limits.expired:
                break

    def settle(self, rho: float, limits: Limits) -> None:
        """The vectors that go with the mean of the multipliers."""
        self.tau = self.mean.copy()
        self._damp(np.zeros_like(self.step), 0.0)
        _descend(self.state, _SETTLE, rho, limits)

    def _damp(self, step: np.ndarray, follow: float) -> None:
        extra = self.state.extra
        assert extra is not None
        rows, v = np.arange(len(self.state.duals)), self.state.v.cpu().numpy()
        pairs = self.pairs, self.entries, self.cut_rows, self.pair_rows, self.entry_rows
        cuts = self.member, self.signs, step, follow, self.tau, self.used
        self.state.threads.run(damp, rows, v, *pairs, *cuts, extra.value)

    def certify(self, problem: LayerProblem, rho: float) -> tuple[Certificate, Tensor]:
        """Of the multipliers once they have settled; as of `certificate_of`."""
        scale = self.state.scale
        gram, inner = problem.gram.double().cpu().numpy(), self.state.inner()
        y = self.state.duals.double().cpu().numpy()

        def one(row: int) -> tuple[RowDuals, Cuts]:
            pool, n = self._binding(row, y[row]), problem.n
            cuts = Cuts(
                torch.as_tensor(np.where(pool.index == n, -1, pool.index)),
                torch.as_tensor(pool.sign),
                torch.as_tensor(pool.tau / scale[row]),
            )
            if not np.isfinite(y[row]).all():
                return RowDuals(np.zeros(n), np.zeros(n), 0.0, 0.0), cuts
            scaled = ScaledRow.of(problem, gram, row, float(scale[row]))
            duals = certify_row(scaled, y[row], inner[row], rho, dense(pool, n))
            return duals._replace(value=duals.value - float(pool.tau.sum())), cuts

        duals, cuts = zip(*in_threads(one, range(problem.rows)), strict=True)
        return certificate_of(problem, duals, np.full(len(duals), rho), scale, cuts)

    def _binding(self, row: int, y: np.ndarray) -> Pool:
        """The triangles whose multiplier counts; none where the row is beyond float64."""
        if not np.isfinite(y).all():
            return Pool.empty()
        part = slice(self.cut_rows[row], self.cut_rows[row + 1])
        pool = Pool(self.index[part], self.sign[part], self.mean[part])
        return pool.keep(pool.tau > _TINY * pool.tau.max(initial=0.0))


def _gram(state: Mixing, row: int) -> np.ndarray:
    """⟨v_i, v_j⟩ of a row, [n + 1, n + 1] with v_0 last."""
    v = state.v[row].cpu().numpy()
    fixed = np.zeros((1, v.shape[1]), v.dtype)
    fixed[0, 0] = 1
    v = np.concatenate([v, fixed])
    return np.asarray(v @ v.T)
