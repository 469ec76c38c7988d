"""The semidefinite relaxation tightened by violated triangle inequalities (`convex.triangles`): in rounds,
the most violated ones join the pool.

The multipliers are those of an augmented Lagrangian: the sweeps of the mixing method run on C less Σ_t
τ'_t(triangle t) with τ' = max(0, τ − step·(triangle + 1)), and τ follows τ' slowly, since plain steps on τ
swing for ever between vectors of equal value. Remaining swings are averaged: the bound is concave in τ. For
the mean of τ the plain mixing method then finds y.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maskopt.certificates.certificate import Certificate
from maskopt.certificates.cuts import OF_Z0, Cuts
from maskopt.core.limits import Limits, one_thread_each, threads_on
from maskopt.core.problem import LayerProblem
from maskopt.solvers.convex.mixing import (
    Extra,
    Mixing,
    RowDuals,
    ScaledRow,
    certificate_of,
    certify_row,
    penalty_of,
)
from maskopt.solvers.convex.triangles import Incidence, Pool, dense, separate, steps_of
from maskopt.solvers.convex.triangles_kernel import damp
from maskopt.solvers.parallel import one_blas_thread

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
    threads = threads_on(problem.device)

    def better(row: int) -> tuple[Certificate, float]:
        part, before = problem.take([row]), plain.take([row])
        if not limits.expired:
            waves = math.ceil((problem.rows - row) / threads)
            after, loss = cut_certificate(part, rank, rounds, limits.share(1 / waves))
            if bool(after.check(part) > before.check(part)):
                return after, loss
        return before, math.nan

    with one_blas_thread():
        # triangles of a single row are looked for in several threads
        alone = problem.rows == 1
        found = [better(0)] if alone else one_thread_each(better, problem.rows, threads)
    parts, loss = zip(*found, strict=True)
    whole = Certificate.stack(parts)
    count = [len(one.multiplier) if one else 0 for one in whole.cuts or [None] * problem.rows]
    return whole, torch.tensor(count), torch.tensor(loss, dtype=torch.float64)


def cut_certificate(
    problem: LayerProblem, rank: int, rounds: int, limits: Limits
) -> tuple[Certificate, float]:
    """(λ, μ, τ, p̂) of a single row after `rounds` rounds, and the loss to the correction as part of the
    bound."""
    n = problem.n
    state = Mixing(problem, rank, limits.seed)
    rho = penalty_of(problem.group_size)
    _descend(state, _START, rho, limits)
    multipliers = _Multipliers(state, Pool.empty())
    early, new = limits.share(_ROUNDS_SHARE), min(_NEW * n, _MOST_NEW)
    for _ in range(rounds):
        binding = multipliers.pool.keep(multipliers.used > 0)
        index, sign, _ = separate(_gram(state), new, threads=state.threads)
        multipliers = _Multipliers(state, binding.join(index, sign, n))
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


def _gram(state: Mixing) -> np.ndarray:
    """⟨v_i, v_j⟩, [n + 1, n + 1] with v_0 last."""
    v = state.v[0].cpu().numpy()
    fixed = np.zeros((1, v.shape[1]), v.dtype)
    fixed[0, 0] = 1
    v = np.concatenate([v, fixed])
    return np.asarray(v @ v.T)


class _Multipliers:
    """The triangles of a row, and E, the addition to C that they make. `used`: τ' of every triangle, `mean`:
    of the iterates."""

    def __init__(self, state: Mixing, pool: Pool) -> None:
        self.state, self.pool = state, pool
        self.used = self.mean = pool.tau.copy()
        dtype = state.v[:0].cpu().numpy().dtype
        a, b = pool.sign.astype(dtype).T
        self.signs = np.stack([a, b, a * b], axis=1)
        self.incidence = Incidence.of(pool.index, state.v.shape[1])
        self.step = steps_of(pool.index, state.duals[0].double().cpu().numpy())
        partners = self.incidence.partners
        self.value = np.zeros(len(partners), dtype)
        state.extra = Extra(self.incidence.starts[None], partners, self.value)

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
        self.pool.tau[:] = self.mean
        self._damp(np.zeros_like(self.step), 0.0)
        _descend(self.state, _SETTLE, rho, limits)

    def _damp(self, step: np.ndarray, follow: float) -> None:
        of, v = self.incidence, self.state.v[0].cpu().numpy()
        cuts = of.member, self.signs, step, follow, self.pool.tau, self.used
        damp(v, of.pairs, of.entries, *cuts, self.value)

    def certify(self, problem: LayerProblem, rho: float) -> tuple[Certificate, float]:
        """Of the multipliers once they have settled; as of `certificate_of`."""
        n, scale, y = problem.n, self.state.scale, self.state.duals[0].double().cpu().numpy()
        if np.isfinite(y).all():
            pool = Pool(self.pool.index, self.pool.sign, self.mean)
            pool = pool.keep(pool.tau > _TINY * pool.tau.max(initial=0.0))
            scaled = ScaledRow.of(problem, problem.gram.double().cpu().numpy(), 0, float(scale[0]))
            duals = certify_row(scaled, y, self.state.inner()[0], rho, dense(pool, n))
            duals = duals._replace(value=duals.value - float(pool.tau.sum()))
        else:  # the row is beyond float64
            pool, duals = Pool.empty(), RowDuals(np.zeros(n), np.zeros(n), 0.0, 0.0, rho)
        cuts = Cuts(
            torch.as_tensor(np.where(pool.index == n, OF_Z0, pool.index)),
            torch.as_tensor(pool.sign),
            torch.as_tensor(pool.tau / scale[0]),
        )
        certificate, loss = certificate_of(problem, [duals], scale, [cuts])
        return certificate, float(loss)
