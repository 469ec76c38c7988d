"""The mixing method on a tile of rows, and the certificate that the duals of a row make.

With p = (1 + z)/2, one extra sign z_0 and the penalty ρΣ_g(1_gᵀp − s)² the semidefinite relaxation is a
max-cut form min ⟨C, Y⟩, Y_ii = 1, Y ⪰ 0 of size n + 1, with Y = VVᵀ of rank k ≈ √(2n) (Burer and Monteiro).
The mixing method (Wang, Chang and Kolter, arXiv 1706.00476) sets v_i ← −g_i/‖g_i‖, g_i = Σ_j C_ij v_j, one
after the other, again and again. v_0 is the first unit vector and never moves.

Its duals y_i = ‖g_i‖ are λ_i = 4y_i − Q_ii − ρ, μ = ρ in the terms of the convex form A = Q + diag(λ) +
ρΣ_g 1_g1_gᵀ. A missing A ⪰ 0 is made good by θD with D = 1 or D = y, whichever costs less at the relaxed
point. Last, p̂ minimises the convex form over the box and the sums, which only raises the bound. All in the
units of a scaled row (`scales_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg as la
import torch
from torch import Tensor

from maskopt.certificates.certificate import Certificate
from maskopt.certificates.cuts import Cuts
from maskopt.core.problem import LayerProblem
from maskopt.solvers.convex.interior_point import interior_point
from maskopt.solvers.convex.mixing_kernel import LANES, couplings, sweep
from maskopt.solvers.kernels import RowThreads

#: up to this n the sweeps run in float64
DOUBLE_N = 256
#: part of λ_min, and of the unit of a scaled row, that the correction is larger than what was computed
_RELATIVE, _ABSOLUTE = 1e-6, 1e-9
#: least entry of D: an input without a dual gets a share of the correction all the same
_LEAST = 1e-6


@dataclass(frozen=True)
class Extra:
    """A sparse symmetric E for every row, added to C: g_i += Σ_j E_ij v_j.

    Entries starts[r, i] … starts[r, i + 1] (int64 [rows, n + 1]; none: E = 0) belong to input i of row r:
    `index` j, int32, ascending, n for v_0, and `value` E_ij of the scaled row; (i, j) and (j, i) are both
    listed.
    """

    starts: np.ndarray
    index: np.ndarray
    value: np.ndarray


NO_EXTRA = Extra(np.zeros((0, 0), np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32))


class Mixing:
    """The vectors of a tile of rows. Every row is scaled by `scales_of`.

    Attributes:
        scale: float64 [rows], what Q is multiplied by.
        v: [rows, n, k], k a multiple of 16, zeros beyond the rank; float64 for n ≤ 256, else float32.
        duals: [rows, n], y_i = ‖g_i‖ of the last sweep.
        extra: an addition to C.
    """

    def __init__(self, problem: LayerProblem, rank: int, seed: int) -> None:
        # a row takes long: one at a time
        self.threads = RowThreads(least=1)
        scales = scales_of(problem)
        self.scale = scales.cpu().numpy()
        scaled = problem.weight.double() * scales.sqrt()[:, None]
        # small rows are cheap: float64 there also carries extreme scales
        dtype = torch.float64 if problem.n <= DOUBLE_N else torch.float32
        linear = self._couplings(problem.gram.double(), scaled) / 4
        linear += scaled * problem.correlation * scales.sqrt()[:, None] / 2
        self.linear = linear.to(dtype)
        self.w = scaled.to(dtype)
        self.gram = problem.gram.to(dtype).contiguous()
        self.group, self.pruned = problem.group_size, problem.pruned_per_group
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(problem.n, rank, generator=generator)
        start = start / start.norm(dim=1, keepdim=True)
        wide = -(-rank // LANES) * LANES
        self.v = torch.zeros(problem.rows, problem.n, wide).to(self.w)
        self.v[:, :, :rank] = start.to(self.w)
        self.duals = torch.zeros_like(self.w)
        self.extra = NO_EXTRA

    def _couplings(self, gram: Tensor, weight: Tensor) -> Tensor:
        """Return w_i(Gw)_i for every row."""
        if weight.device.type != "cpu":
            return weight * (weight @ gram)
        out = torch.empty_like(weight)
        rows = np.arange(len(weight))
        self.threads.run(couplings, rows, gram.numpy(), weight.numpy(), out.numpy())
        return out

    def inner(self) -> np.ndarray:
        """Return ⟨v_i, v_0⟩, float64 [rows, n]."""
        return self.v[:, :, 0].double().cpu().numpy()

    def keep(self, positions: list[int]) -> None:
        """Drop all other rows, which have no addition to C."""
        self.scale = self.scale[positions]
        self.w, self.linear = self.w[positions], self.linear[positions]
        self.v, self.duals = self.v[positions], self.duals[positions]

    def sweep(self, count: int, rho: float, rows: np.ndarray | None = None) -> None:
        """Make `count` passes over all coordinates with the penalty ρ; on the CPU of `rows` only, int64."""
        if self.v.device.type != "cpu":
            for _ in range(count):
                self.sweep_torch(rho)
            return
        dtype = self.w.numpy().dtype
        arrays = [x.numpy() for x in (self.gram, self.w, self.linear, self.v, self.duals)]
        plan = dtype.type(rho), self.group, self.pruned, count
        added = self.extra.starts, self.extra.index, self.extra.value.astype(dtype, copy=False)
        rows = np.arange(len(self.w)) if rows is None else rows
        self.threads.run(sweep, rows, *arrays, *plan, *added)

    def sweep_torch(self, rho: float) -> None:
        """Make one pass on any device, all rows at once.

        A block moves together, damped by half, as one matrix product.
        """
        rows, n, rank = self.v.shape
        block = max(1, min(32, n // 8))
        for low in range(0, n, block):
            inside = slice(low, min(low + block, n))
            diagonal = self.gram.diagonal()[inside, None]
            u = self.w[..., None] * self.v / 4
            g = torch.einsum("ij,rjk->rik", self.gram[inside], u)
            g = self.w[:, inside, None] * (g - diagonal * u[:, inside])
            total = self.v.view(rows, n // self.group, self.group, rank).sum(2)
            group = torch.arange(inside.start, inside.stop, device=self.w.device) // self.group
            g += rho / 4 * (total[:, group] - self.v[:, inside])
            g[..., 0] += self.linear[:, inside] + rho * (self.group / 2 - self.pruned) / 2
            if len(self.extra.starts):
                self._add_extra(g, inside)
            norm = g.norm(dim=-1)
            self.duals[:, inside] = norm
            new = torch.where(norm[..., None] > 0, -g / norm[..., None], self.v[:, inside])
            if block > 1:
                new = new + self.v[:, inside]
                new = new / new.norm(dim=-1, keepdim=True).clamp(min=1e-20)
            self.v[:, inside] = new

    def _add_extra(self, g: Tensor, inside: slice) -> None:
        n = self.v.shape[1]
        for row in range(len(g)):
            starts = self.extra.starts[row, inside.start : inside.stop + 1]
            chosen = slice(int(starts[0]), int(starts[-1]))
            at = torch.as_tensor(np.repeat(np.arange(len(starts) - 1), np.diff(starts))).to(
                g.device
            )
            index = torch.as_tensor(self.extra.index[chosen]).long().to(g.device)
            value = torch.as_tensor(self.extra.value[chosen]).to(g)
            fixed = index == n
            g[row, :, 0].index_add_(0, at[fixed], value[fixed])
            others = self.v[row, index[~fixed]] * value[~fixed, None]
            g[row].index_add_(0, at[~fixed], others)


def sweep_matrix(
    c: np.ndarray, linear: np.ndarray, v: np.ndarray, y: np.ndarray, count: int
) -> None:
    """Make `count` passes with any symmetric C [n, n], whose diagonal is left out, and C_i0 = `linear` [n].

    v [n, k] and y [n], all of one type, are changed in place.
    """
    n, kind = len(c), c.dtype.type
    value = NO_EXTRA.value.astype(kind)
    weight, none = np.ones((1, n), kind), (NO_EXTRA.starts, NO_EXTRA.index, value)
    plan = kind(0), n, 0, count
    sweep(4 * c, weight, linear[None], v[None], y[None], *plan, *none, np.zeros(1, np.int64))


def scales_of(problem: LayerProblem) -> Tensor:
    """Return the factors that scale rows, float64 [rows]; 1 where Q = 0.

    They make one of the cost that the cheapest input to be kept has by itself (its w²G, the mean over the
    groups). Outlier inputs, which are kept anyway, do not count.
    """
    # not `diagonal_mass`: a matrix product sums in an order that depends on the rows beside
    cost = problem.weight.double().square() * problem.gram.diagonal().double().clamp(min=0.0)
    cheapest = cost.view(problem.rows, -1, problem.group_size).sort(-1).values
    unit = cheapest[..., min(problem.pruned_per_group, problem.group_size - 1)].mean(1)
    mean = cost.mean(1)
    unit = torch.where(unit > 1e-10 * mean, unit, mean)
    return torch.where(unit > 0, 1 / unit.clamp(min=1e-280), 1.0).clamp(max=1e250)


def default_rank(n: int) -> int:
    """Return about √(2n), the rank that always has a solution, in whole vectors of the CPU."""
    return max(LANES, LANES * round((2 * n) ** 0.5 / LANES))


class ScaledRow(NamedTuple):
    """The objective f(p) = pᵀQp + 2lᵀp + c of a scaled row, float64; `pruned` inputs of each group."""

    q: np.ndarray
    linear: np.ndarray
    constant: float
    group: int
    pruned: int

    @classmethod
    def of(cls, problem: LayerProblem, gram: np.ndarray, row: int, scale: float) -> ScaledRow:
        """Return one row of a layer, whose G is given in float64."""
        w = problem.weight[row].double().cpu().numpy() * np.sqrt(scale)
        linear = w * problem.correlation[row].cpu().numpy() * np.sqrt(scale)
        constant = float(problem.constant[row]) * scale
        q = w[:, None] * gram * w[None, :]
        return cls(q, linear, constant, problem.group_size, problem.pruned_per_group)


class RowDuals(NamedTuple):
    """The parts of a scaled row's certificate.

    Attributes:
        lam: λ [n] with A ⪰ 0.
        point: p̂ [n].
        loss: θΣD_i p̂_i(1 − p̂_i), to the correction.
        value: g(p̂).
        penalty: ρ.
    """

    lam: np.ndarray
    point: np.ndarray
    loss: float
    value: float
    penalty: float


def certificate_of(
    problem: LayerProblem,
    rows: Sequence[RowDuals],
    scale: np.ndarray,
    cuts: Sequence[Cuts] | None = None,
) -> tuple[Certificate, Tensor]:
    """Return the certificate of all rows, and the loss to the correction as part of the bound, [rows].

    `scale`: the factor of each Q, float64 [rows]; `cuts`: in the units of the objective.
    """
    like: dict[str, Any] = {"dtype": torch.float64, "device": problem.device}
    groups = problem.n // problem.group_size
    penalty = np.array([row.penalty for row in rows])
    certificate = Certificate(
        torch.as_tensor(np.stack([row.lam for row in rows]) / scale[:, None], **like),
        torch.as_tensor(penalty / scale, **like)[:, None].repeat(1, groups),
        torch.as_tensor(np.stack([row.point for row in rows]), **like),
        cuts=cuts,
    )
    loss, value = np.array([row.loss for row in rows]), np.array([row.value for row in rows])
    part = np.divide(loss, value, out=np.zeros(len(rows)), where=value > 0)
    return certificate, torch.from_numpy(np.where(np.isnan(loss), np.nan, part))


def penalty_of(group: int) -> float:
    """Return ρ for a scaled row: chosen at n = 64 … 2048 so that 400 sweeps come within 0.5% of ρ → ∞."""
    return min(7.0, 450.0 / group**1.2)


def certify_row(
    row: ScaledRow,
    y: np.ndarray,
    inner: np.ndarray,
    rho: float,
    extra: tuple[np.ndarray, np.ndarray] | None = None,
) -> RowDuals:
    """Return λ with A ⪰ 0 and p̂ from approximate duals y and inner products ⟨v_i, v_0⟩.

    `extra`: E [n, n] without a diagonal, and its column of v_0, in the sweeps' C; then g has zᵀEz + 2e_0ᵀz,
    too.
    """
    q, group, pruned = row.q, row.group, row.pruned
    n = len(q)
    lam = 4 * y - np.diag(q) - rho
    same = np.arange(n) // group
    a = q + rho * (same[:, None] == same[None, :])
    a[np.diag_indices(n)] += lam
    linear, constant = 2 * row.linear, row.constant + rho * (n // group) * pruned**2
    if extra is not None:
        # z = 2p − 1
        matrix, column = extra
        sums = matrix.sum(1)
        a += 4 * matrix
        linear = linear + 4 * (column - sums)
        constant += float(sums.sum()) - 2 * float(column.sum())
    relaxed = np.clip((1 + inner) / 2, 0, 1)

    def enough(least: float, _: np.ndarray) -> float:
        return max(0.0, -least * (1 + _RELATIVE)) + _ABSOLUTE

    added, loss = correction(a, np.maximum(4 * y, _LEAST), relaxed, enough)
    lam = lam + added
    a[np.diag_indices(n)] += added
    linear = linear - (lam + 2 * rho * pruned)
    p = interior_point(a, linear, group, pruned, constant=constant)
    value = p @ a @ p + linear @ p + constant
    return RowDuals(lam, p, loss, float(value), rho)


def correction(
    a: np.ndarray,
    weights: np.ndarray,
    point: np.ndarray,
    enough: Callable[[float, np.ndarray], float],
) -> tuple[np.ndarray, float]:
    """Return θd with A + diag(θd) ⪰ 0, and its cost θΣ dᵢxᵢ(1 − xᵢ) at a point.

    Of d = 1 and d = `weights` it takes the cheaper one. `enough`: θ by the least eigenvalue of A, scaled by
    d, and that matrix.
    """
    loss, cheapest = np.inf, np.zeros(len(a))
    for d in (np.ones(len(a)), weights):
        root = 1 / np.sqrt(d)
        scaled = root[:, None] * a * root
        least = la.eigh(scaled, eigvals_only=True, subset_by_index=[0, 0], check_finite=False)[0]
        theta = enough(least, scaled)
        cost = theta * float(d @ (point * (1 - point)))
        if cost < loss:
            loss, cheapest = cost, theta * d
    return cheapest, loss
