"""`sdp`: the semidefinite relaxation by low-rank coordinate descent, any n, rows in parallel.

With p = (1 + z)/2, one extra sign z_0 and the penalty ρΣ_g(1_gᵀp − s)² the problem is a max-cut form
min ⟨C, Y⟩, Y_ii = 1, Y ⪰ 0 of size n + 1, with Y = VVᵀ of rank k ≈ √(2n) (Burer and Monteiro). The
mixing method (Wang, Chang and Kolter, arXiv 1706.00476) sets v_i ← −g_i/‖g_i‖, g_i = Σ_j C_ij v_j,
again and again; y_i = ‖g_i‖ are the duals. v_0 is kept fixed: only inner products count.

A small ρ suffices. The bound is taken over the sums themselves, so that ρ need not enforce them, and a
large ρ ties all coordinates together: the sweeps then crawl, ten times as many for the same bound.

In the terms of the certificate λ_i = 4y_i − Q_ii − ρ, μ = ρ, and what is missing to A ⪰ 0 is made
good by θD with D = 1 or D = y, whichever costs less at the relaxed point. Last, p̂ minimises the
convex form over the box and the sums (interior point), which only raises the bound.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import scipy.linalg as la
import torch
from torch import Tensor

from maskopt.bounds import BoundMethod
from maskopt.certificate import Certificate
from maskopt.fields import option
from maskopt.limits import Limits
from maskopt.problem import LayerProblem
from maskopt.solvers.bounds.relaxation import relax
from maskopt.solvers.convex.interior_point import interior_point
from maskopt.solvers.convex.mixing import Mixing, default_rank
from maskopt.trace import BoundTrace

#: sweeps of the stages; a row leaves when its bound has settled
_STAGES = (300, 300, 600, 1200, 2400)


#: entries of the vectors of a tile of rows: half a gigabyte
_TILE_ENTRIES = 2**27


@dataclass(frozen=True)
class SdpBound(BoundMethod):
    """Low-rank semidefinite bound with a λ_min certificate in float64.

    Rows that the time limit leaves no time for get the certificate of the box relaxation. With cuts,
    the plain bound has a third of the time.
    """

    name: ClassVar[str] = "sdp"
    largest_n: ClassVar[int | None] = None
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

    def certify(self, problem: LayerProblem, limits: Limits) -> tuple[Certificate, BoundTrace]:
        """See `BoundMethod.certify`."""
        plain = limits.share(1 / 3) if self.cuts else limits
        k = self.rank or default_rank(problem.n)
        stages = [self.sweeps] if self.sweeps is not None else list(_STAGES)
        tile = max(1, _TILE_ENTRIES // (problem.n * k))
        certificates: list[Certificate] = []
        loss: list[float] = []
        done: list[int] = []
        relaxed: list[Tensor] = []
        for first in range(0, problem.rows, tile):
            part = problem.take(slice(first, first + tile))
            if first and plain.expired:
                x = relax(part, steps=50, limits=plain)
                certificates.append(Certificate.box(part, x))
                found: dict[str, Any] = {
                    "loss": [float("nan")] * part.rows,
                    "done": [0] * part.rows,
                    "x": x.cpu(),
                }
            else:
                certificate, found = self._tile(part, stages, self.tolerance, k, plain)
                certificates.append(certificate)
            loss += found["loss"]
            done += found["done"]
            relaxed.append(found["x"])
        trace = BoundTrace(
            iterations=torch.tensor(done),
            correction=torch.tensor(loss, dtype=torch.float64),
            relaxed=torch.cat(relaxed),
        )
        certificate = Certificate.stack(certificates)
        if not self.cuts:
            return certificate, trace
        # `cuts` builds on this module
        from maskopt.solvers.bounds.cuts import tighten

        certificate, count, correction = tighten(problem, certificate, k, self.cuts, limits)
        return certificate, replace(trace, cuts=count, cut_correction=correction)

    def _tile(
        self,
        problem: LayerProblem,
        stages: list[int],
        tolerance: float,
        rank: int,
        limits: Limits,
    ) -> tuple[Certificate, dict[str, Any]]:
        rows, n, group = problem.rows, problem.n, problem.group_size
        state = Mixing(problem, rank, limits.seed)
        scale = state.scale
        weight = problem.weight.double().cpu().numpy() * np.sqrt(scale)[:, None]
        gram = problem.gram.double().cpu().numpy()
        lam, point = np.zeros((rows, n)), np.zeros((rows, n))
        inner, penalty = np.zeros((rows, n)), np.zeros(rows)
        value, loss, done = np.full(rows, -np.inf), np.full(rows, np.inf), [0] * rows
        rho, todo = penalty_of(group), np.arange(rows)

        def finish(position: int) -> tuple[np.ndarray, np.ndarray, float, float]:
            w = weight[todo[position]]
            return certify_row(
                w[:, None] * gram * w[None, :],
                group,
                problem.pruned_per_group,
                state.duals[position].double().cpu().numpy(),
                state.inner()[position],
                rho,
            )

        for sweeps in stages:
            passes = _descend(state, sweeps, rho, limits)
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                results = list(pool.map(finish, range(len(todo))))
            again = []
            for position, (row_lam, row_p, row_loss, row_value) in enumerate(results):
                row = todo[position]
                done[row] += passes
                gain = row_value - value[row]
                if gain > 0:
                    value[row], lam[row], point[row] = row_value, row_lam, row_p
                    loss[row], penalty[row] = row_loss, rho
                    inner[row] = state.inner()[position]
                if max(gain, row_loss) > tolerance * abs(row_value):
                    again.append(position)
            if not again or limits.expired:
                break
            todo = todo[again]
            state.keep(again)
        self._fall_back(problem, weight, gram, tolerance, value, loss, lam, point, penalty)
        like: dict[str, Any] = {"dtype": torch.float64, "device": problem.device}
        per_group = torch.as_tensor(penalty / scale, **like)[:, None]
        certificate = Certificate(
            torch.as_tensor(lam / scale[:, None], **like),
            per_group.expand(-1, n // group).contiguous(),
            torch.as_tensor(point, **like),
        )
        relative = np.divide(loss, value, out=np.zeros(rows), where=value > 0)
        return certificate, {
            "loss": relative.tolist(),
            "done": done,
            "x": torch.as_tensor((1 + inner) / 2),
        }

    @staticmethod
    def _fall_back(
        problem: LayerProblem,
        weight: np.ndarray,
        gram: np.ndarray,
        tolerance: float,
        value: np.ndarray,
        loss: np.ndarray,
        lam: np.ndarray,
        point: np.ndarray,
        penalty: np.ndarray,
    ) -> None:
        """Where the correction costs much, the continuous relaxation may prove more."""
        for row in np.flatnonzero(~(loss <= 20 * tolerance * value)):
            q = weight[row][:, None] * gram * weight[row][None, :]
            p = interior_point(q, np.zeros(len(q)), problem.group_size, problem.pruned_per_group)
            gradient = (2 * q @ p).reshape(-1, problem.group_size)
            least = np.sort(gradient, axis=1)[:, : problem.pruned_per_group].sum()
            bound = least - p @ q @ p
            if bound > value[row] or not np.isfinite(value[row]):
                value[row], lam[row], point[row], penalty[row], loss[row] = bound, 0.0, p, 0.0, 0.0


def penalty_of(group: int) -> float:
    """ρ for a row scaled by `scales_of`: what its sums stand up to, and no more.

    Chosen on rows of 64 … 2048 inputs, so that 400 sweeps come within 0.5% of the limit ρ → ∞.
    """
    return min(7.0, 450.0 / group**1.2)


def _descend(state: Mixing, sweeps: int, rho: float, limits: Limits) -> int:
    """The passes made before the deadline, at least one chunk."""
    done = 0
    while done < sweeps:
        chunk = min(sweeps - done, 20)
        state.sweep(chunk, rho)
        done += chunk
        if limits.expired:
            break
    return done


def certify_row(
    q: np.ndarray,
    group: int,
    pruned: int,
    y: np.ndarray,
    inner: np.ndarray,
    rho: float,
    extra: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """λ with A ⪰ 0 and p̂ from approximate duals y and inner products ⟨v_i, v_0⟩.

    Also the estimated loss θΣD_i p̂_i(1 − p̂_i) to the correction, and g(p̂).

    Args:
        extra: what was added to C in the sweeps: E [n, n] without a diagonal, and its column of v_0.
            zᵀEz + 2e_0ᵀz is then part of g.
    """
    n = len(q)
    lam = 4 * y - np.diag(q) - rho
    same = np.arange(n) // group
    a = q + rho * (same[:, None] == same[None, :])
    a[np.diag_indices(n)] += lam
    linear, constant = np.zeros(n), rho * (n // group) * pruned**2
    if extra is not None:
        # z = 2p − 1
        matrix, column = extra
        sums = matrix.sum(1)
        a += 4 * matrix
        linear = 4 * (column - sums)
        constant += float(sums.sum()) - 2 * float(column.sum())
    relaxed = np.clip((1 + inner) / 2, 0, 1)
    loss, chosen = np.inf, np.ones(n)
    for d in (np.ones(n), np.maximum(4 * y, 1e-6)):
        root = 1 / np.sqrt(d)
        least = la.eigh(
            root[:, None] * a * root[None, :],
            eigvals_only=True,
            subset_by_index=[0, 0],
            check_finite=False,
            overwrite_a=True,
        )[0]
        theta = max(0.0, -least * (1 + 1e-6)) + 1e-9
        cost = theta * float(d @ (relaxed * (1 - relaxed)))
        if cost < loss:
            loss, chosen = cost, theta * d
    lam = lam + chosen
    a[np.diag_indices(n)] += chosen
    linear -= lam + 2 * rho * pruned
    p = interior_point(a, linear, group, pruned, constant=constant)
    value = p @ a @ p + linear @ p + constant
    return lam, p, loss, float(value)
