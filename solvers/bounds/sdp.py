"""`sdp`: the semidefinite relaxation by low-rank coordinate descent, any n, rows in parallel.

With p = (1 + z)/2, one extra sign z_0 and the penalty ρΣ_g(1_gᵀp − s)² the problem is a max-cut form
min ⟨C, Y⟩, Y_ii = 1, Y ⪰ 0 of size n + 1, with Y = VVᵀ of rank k ≈ √(2n) (Burer and Monteiro). The
mixing method (Wang, Chang and Kolter, arXiv 1706.00476) sets v_i ← −g_i/‖g_i‖, g_i = Σ_j C_ij v_j,
again and again; y_i = ‖g_i‖ are the duals. ρ rises in steps, warm. v_0 is kept fixed: only inner
products count.

In the terms of the certificate λ_i = 4y_i − Q_ii − ρ, μ = ρ, and what is missing to A ⪰ 0 is made
good by θD with D = 1 or D = y, whichever costs less at the relaxed point. Last, p̂ minimises the
convex form over the box and the sums (interior point), which only raises the bound.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import scipy.linalg as la
import torch
from torch import Tensor

from maskopt.bounds import Certificate
from maskopt.errors import OptionError
from maskopt.problem import LayerProblem
from maskopt.solvers.bounds.box import deadline, plain_certificate
from maskopt.solvers.bounds.qp import interior_point
from maskopt.solvers.bounds.relaxation import relax

#: ρ in units of the mean diagonal of Q, and the part of the sweeps that each gets
_PENALTIES = ((0.05, 0.1), (0.2, 0.15), (1.0, 0.75))

#: up to this n the sweeps run in float64
_DOUBLE_N = 256


class SdpBound:
    """Low-rank semidefinite bound with a λ_min certificate in float64."""

    name = "sdp"
    largest_n: int | None = None
    note = "low-rank semidefinite relaxation, any n"

    def unavailable(self) -> str | None:
        return None

    def certify(
        self,
        problem: LayerProblem,
        *,
        sweeps: int | None = None,
        tolerance: float = 0.005,
        rank: int | None = None,
        time_limit: float | None = None,
        seed: int = 0,
    ) -> tuple[Certificate, dict[str, Any]]:
        """Args:
        sweeps: passes of coordinate descent; None: 400, and for rows whose correction is above
            `tolerance` 800 more, and 2400 more.
        tolerance: of the loss to the λ_min correction, relative to the bound.
        rank: k; None: √(2n) + 1.
        time_limit: seconds for all rows; what is reached by then is certified. Rows that were not
            reached get the certificate of the box relaxation.
        seed: of the starting vectors.
        """
        if sweeps is not None and sweeps < 1:
            raise OptionError(f"sdp: sweeps must be at least 1, not {sweeps}")
        if rank is not None and rank < 2:
            raise OptionError(f"sdp: rank must be at least 2, not {rank}")
        end = deadline(time_limit)
        k = rank or max(2, int((2 * problem.n) ** 0.5) + 1)
        stages = [sweeps] if sweeps is not None else [400, 800, 2400]
        # tiles of rows keep the vectors within half a gigabyte
        tile = max(1, 2**27 // (problem.n * k))
        certificates: list[Certificate] = []
        loss: list[float] = []
        done: list[int] = []
        relaxed: list[Tensor] = []
        for first in range(0, problem.rows, tile):
            part = problem.take(slice(first, first + tile))
            if end is not None and first and time.perf_counter() > end:
                x = relax(part, steps=50)
                certificates.append(plain_certificate(part, torch.zeros_like(x), x))
                found: dict[str, Any] = {
                    "loss": [float("nan")] * part.rows,
                    "done": [0] * part.rows,
                    "x": x.cpu(),
                }
            else:
                certificate, found = self._tile(part, stages, tolerance, k, seed, end)
                certificates.append(certificate)
            loss += found["loss"]
            done += found["done"]
            relaxed.append(found["x"])
        trace = {"rank": k, "correction": loss, "sweeps": done, "relaxed": torch.cat(relaxed)}
        return Certificate.stack(certificates), trace

    def _tile(
        self,
        problem: LayerProblem,
        stages: list[int],
        tolerance: float,
        rank: int,
        seed: int,
        end: float | None,
    ) -> tuple[Certificate, dict[str, Any]]:
        rows, n, group = problem.rows, problem.n, problem.group_size
        scale = _scales(problem).cpu().numpy()
        weight = problem.weight.double().cpu().numpy() * np.sqrt(scale)[:, None]
        gram = problem.gram.double().cpu().numpy()
        lam, point = np.zeros((rows, n)), np.zeros((rows, n))
        inner, penalty = np.zeros((rows, n)), np.zeros(rows)
        value, loss, done = np.full(rows, -np.inf), np.full(rows, np.inf), [0] * rows
        state = _State(problem, rank, seed)
        todo = np.arange(rows)

        def finish(position: int) -> tuple[np.ndarray, np.ndarray, float, float]:
            w = weight[todo[position]]
            return certify_row(
                w[:, None] * gram * w[None, :],
                group,
                problem.pruned_per_group,
                state.y[position].astype(np.float64),
                state.inner()[position],
                state.rho,
            )

        for stage, sweeps in enumerate(stages):
            state.descend(sweeps, end, first=stage == 0)
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                results = list(pool.map(finish, range(len(todo))))
            again = []
            for position, (row_lam, row_p, row_loss, row_value) in enumerate(results):
                row = todo[position]
                done[row] += state.done
                if row_value > value[row]:
                    value[row], lam[row], point[row] = row_value, row_lam, row_p
                    loss[row], penalty[row] = row_loss, state.rho
                    inner[row] = state.inner()[position]
                if row_loss > tolerance * abs(row_value):
                    again.append(position)
            if not again or (end is not None and time.perf_counter() > end):
                break
            todo = todo[again]
            state.keep(again)
        like: dict[str, Any] = {"dtype": torch.float64, "device": problem.device}
        per_group = torch.as_tensor(penalty / scale, **like)[:, None]
        certificate = Certificate(
            torch.as_tensor(lam / scale[:, None], **like),
            per_group.expand(-1, n // group).contiguous(),
            torch.as_tensor(point, **like),
        )
        self._fall_back(problem, weight, gram, tolerance, value, loss, lam, point, penalty)
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


class _State:
    """The vectors of a tile of rows, and how they move."""

    def __init__(self, problem: LayerProblem, rank: int, seed: int) -> None:
        scaled = problem.weight.double() * _scales(problem).sqrt()[:, None]
        # small rows are cheap: float64 there also carries extreme scales
        dtype = torch.float64 if problem.n <= _DOUBLE_N else torch.float32
        self.linear = (scaled * (scaled @ problem.gram.double()) / 4).to(dtype)
        self.w = scaled.to(dtype)
        self.gram = problem.gram.to(dtype)
        self.group, self.pruned = problem.group_size, problem.pruned_per_group
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(problem.n, rank, generator=generator)
        start = start / start.norm(dim=1, keepdim=True)
        self.v = start.to(self.w).expand(problem.rows, -1, -1).clone()
        self.duals = torch.zeros_like(self.w)
        self.rho, self.done = _PENALTIES[0][0], 0

    @property
    def y(self) -> np.ndarray:
        return self.duals.cpu().numpy()

    def inner(self) -> np.ndarray:
        return self.v[:, :, 0].double().cpu().numpy()

    def keep(self, positions: list[int]) -> None:
        self.w, self.linear = self.w[positions], self.linear[positions]
        self.v, self.duals = self.v[positions], self.duals[positions]

    def descend(self, sweeps: int, end: float | None, *, first: bool) -> None:
        """ρ rises through its steps at first, and stays at the last one later."""
        self.done = 0
        plan = _PENALTIES if first else ((_PENALTIES[-1][0], 1.0),)
        for rho, part in plan:
            left = max(1, round(part * sweeps))
            if self.done and end is not None and time.perf_counter() > end:
                return  # the duals at hand belong to the ρ before
            self.rho = rho
            while left > 0:
                chunk = min(left, 20)
                self._sweep(chunk)
                left -= chunk
                self.done += chunk
                if end is not None and time.perf_counter() > end:
                    break

    def _sweep(self, sweeps: int) -> None:
        if self.v.device.type == "cpu":
            _sweep_numba(
                self.gram.numpy(),
                self.w.numpy(),
                self.linear.numpy(),
                self.v.numpy(),
                self.duals.numpy(),
                self.w.numpy().dtype.type(self.rho),
                self.group,
                self.pruned,
                sweeps,
            )
        else:
            for _ in range(sweeps):
                self.sweep_torch()

    def sweep_torch(self) -> None:
        """The same on any device, all rows at once, coordinates in blocks.

        Inside a block the updates are simultaneous and damped by half, so that a step becomes one
        matrix product for all rows.
        """
        rows, n, rank = self.v.shape
        block = max(1, min(32, n // 8))
        for low in range(0, n, block):
            inside = slice(low, min(low + block, n))
            own = self.gram.diagonal()[inside, None]
            u = self.w[..., None] * self.v / 4
            g = torch.einsum("ij,rjk->rik", self.gram[inside], u)
            g = self.w[:, inside, None] * (g - own * u[:, inside])
            total = self.v.view(rows, n // self.group, self.group, rank).sum(2)
            mine = torch.arange(inside.start, inside.stop, device=self.w.device) // self.group
            g += self.rho / 4 * (total[:, mine] - self.v[:, inside])
            g[..., 0] += self.linear[:, inside] + self.rho * (self.group / 2 - self.pruned) / 2
            norm = g.norm(dim=-1)
            self.duals[:, inside] = norm
            new = torch.where(norm[..., None] > 0, -g / norm[..., None], self.v[:, inside])
            if block > 1:
                new = new + self.v[:, inside]
                new = new / new.norm(dim=-1, keepdim=True).clamp(min=1e-20)
            self.v[:, inside] = new


def certify_row(
    q: np.ndarray, group: int, pruned: int, y: np.ndarray, inner: np.ndarray, rho: float
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """λ with A ⪰ 0 and p̂ from approximate duals y and inner products ⟨v_i, v_0⟩.

    Also the estimated loss θΣD_i p̂_i(1 − p̂_i) to the correction, and g(p̂).
    """
    n = len(q)
    lam = 4 * y - np.diag(q) - rho
    same = np.arange(n) // group
    a = q + rho * (same[:, None] == same[None, :])
    a[np.diag_indices(n)] += lam
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
    groups = n // group
    p = interior_point(
        a,
        -lam - 2 * rho * pruned,
        group,
        pruned,
        constant=rho * groups * pruned**2,
    )
    value = p @ a @ p - (lam + 2 * rho * pruned) @ p + rho * groups * pruned**2
    return lam, p, loss, float(value)


def _scales(problem: LayerProblem) -> Tensor:
    """What makes the mean diagonal of every Q one; 1 where Q = 0."""
    mass = problem.diagonal_mass()
    return torch.where(mass > 0, problem.n / mass.clamp(min=1e-280), 1.0).clamp(max=1e250)


@numba.njit(parallel=True, cache=True, fastmath=True)
def _sweep_numba(gram, w, linear, v, y, rho, group, pruned, sweeps):  # type: ignore[no-untyped-def]
    rows, n, k = v.shape
    for row in numba.prange(rows):
        u = np.empty((n, k), v.dtype)
        total = np.zeros((n // group, k), v.dtype)
        g = np.zeros(k, v.dtype)
        zero = rho - rho
        offset = rho * (group - 2 * pruned) / 4
        quarter = rho / (4 * rho)
        for i in range(n):
            for a in range(k):
                u[i, a] = quarter * w[row, i] * v[row, i, a]
                total[i // group, a] += v[row, i, a]
        for _ in range(sweeps):
            for i in range(n):
                for a in range(k):
                    g[a] = zero
                for j in range(n):
                    c = gram[i, j]
                    for a in range(k):
                        g[a] += c * u[j, a]
                wi = w[row, i]
                own = gram[i, i]
                norm = zero
                for a in range(k):
                    g[a] = wi * (g[a] - own * u[i, a])
                    g[a] += quarter * rho * (total[i // group, a] - v[row, i, a])
                g[0] += linear[row, i] + offset
                for a in range(k):
                    norm += g[a] * g[a]
                norm = np.sqrt(norm)
                y[row, i] = norm
                if norm > 0:
                    for a in range(k):
                        new = -g[a] / norm
                        total[i // group, a] += new - v[row, i, a]
                        v[row, i, a] = new
                        u[i, a] = quarter * wi * new
