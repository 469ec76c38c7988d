"""The mixing method on a tile of rows: low-rank vectors, their duals, and how they move.

min Σ_ij C_ij⟨v_i, v_j⟩ over unit vectors v_0 … v_n of k entries, v_i ← −g_i/‖g_i‖ one after the other
(Wang, Chang and Kolter, arXiv 1706.00476). v_0 is the first unit vector and never moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maskopt.core.problem import LayerProblem
from maskopt.solvers.compiled import RowThreads
from maskopt.solvers.convex.mixing_kernel import LANES, couplings, sweep

#: up to this n the sweeps run in float64
_DOUBLE_N = 256


@dataclass(frozen=True)
class Extra:
    """A sparse symmetric E for every row, added to C: g_i += Σ_j E_ij v_j. Entries starts[r, i] … starts[r, i
    + 1] (int64 [rows, n + 1]) belong to input i of row r: `index` j, int32, ascending, n for v_0, and `value`
    E_ij of the scaled row; (i, j) and (j, i) are both listed."""

    starts: np.ndarray
    index: np.ndarray
    value: np.ndarray

    def take(self, rows: list[int]) -> Extra:
        """Some rows only."""
        parts = [np.arange(self.starts[r, 0], self.starts[r, -1]) for r in rows]
        first = np.cumsum([0, *(len(part) for part in parts)])[:-1]
        starts = self.starts[rows] - self.starts[rows, :1] + first[:, None]
        chosen = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return Extra(starts, self.index[chosen], self.value[chosen])


class Mixing:
    """The vectors of a tile of rows. Every row is scaled by `scales_of`.

    Attributes:
        scale: float64 [rows], what Q is multiplied by.
        v: [rows, n, k], k a multiple of 16, zeros beyond the rank; float64 for n ≤ 256, else float32.
        duals: [rows, n], y_i = ‖g_i‖ of the last sweep.
        extra: an addition to C, or None.
    """

    def __init__(self, problem: LayerProblem, rank: int, seed: int) -> None:
        # a row takes long: one at a time
        self.threads = RowThreads(least=1)
        scales = scales_of(problem)
        self.scale = scales.cpu().numpy()
        scaled = problem.weight.double() * scales.sqrt()[:, None]
        # small rows are cheap: float64 there also carries extreme scales
        dtype = torch.float64 if problem.n <= _DOUBLE_N else torch.float32
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
        self.extra: Extra | None = None

    def _couplings(self, gram: Tensor, weight: Tensor) -> Tensor:
        """w_i(Gw)_i for every row."""
        if weight.device.type != "cpu":
            return weight * (weight @ gram)
        out = torch.empty_like(weight)
        rows = np.arange(len(weight))
        self.threads.run(couplings, rows, gram.numpy(), weight.numpy(), out.numpy())
        return out

    def inner(self) -> np.ndarray:
        """⟨v_i, v_0⟩, float64 [rows, n]."""
        return self.v[:, :, 0].double().cpu().numpy()

    def keep(self, positions: list[int]) -> None:
        """Drop all other rows."""
        self.scale = self.scale[positions]
        self.w, self.linear = self.w[positions], self.linear[positions]
        self.v, self.duals = self.v[positions], self.duals[positions]
        if self.extra is not None:
            self.extra = self.extra.take(positions)

    def sweep(self, count: int, rho: float, rows: np.ndarray | None = None) -> None:
        """`count` passes over all coordinates with the penalty ρ, on the CPU of some rows (int64), or all."""
        if self.v.device.type != "cpu":
            for _ in range(count):
                self.sweep_torch(rho)
            return
        dtype = self.w.numpy().dtype
        none = np.zeros(0, np.int32)
        extra = self.extra or Extra(np.zeros((0, 0), np.int64), none, none)
        arrays = [x.numpy() for x in (self.gram, self.w, self.linear, self.v, self.duals)]
        plan = dtype.type(rho), self.group, self.pruned, count
        added = extra.starts, extra.index, extra.value.astype(dtype, copy=False)
        rows = np.arange(len(self.w)) if rows is None else rows
        self.threads.run(sweep, rows, *arrays, *plan, *added)

    def sweep_torch(self, rho: float) -> None:
        """One pass on any device, all rows at once; a block moves together, damped by half, as one matrix
        product."""
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
            g += rho / 4 * (total[:, mine] - self.v[:, inside])
            g[..., 0] += self.linear[:, inside] + rho * (self.group / 2 - self.pruned) / 2
            if self.extra is not None:
                self._add_extra(g, inside)
            norm = g.norm(dim=-1)
            self.duals[:, inside] = norm
            new = torch.where(norm[..., None] > 0, -g / norm[..., None], self.v[:, inside])
            if block > 1:
                new = new + self.v[:, inside]
                new = new / new.norm(dim=-1, keepdim=True).clamp(min=1e-20)
            self.v[:, inside] = new

    def _add_extra(self, g: Tensor, inside: slice) -> None:
        assert self.extra is not None
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


def scales_of(problem: LayerProblem) -> Tensor:
    """What makes one of the cost that the cheapest input to be kept has by itself (its w²G, the mean over
    the groups): outlier inputs, which are kept anyway, do not count. 1 where Q = 0. Float64 [rows]."""
    # not `diagonal_mass`: a matrix product sums in an order that depends on the rows beside
    cost = problem.weight.double().square() * problem.gram.diagonal().double().clamp(min=0.0)
    cheapest = cost.view(problem.rows, -1, problem.group_size).sort(-1).values
    unit = cheapest[..., min(problem.pruned_per_group, problem.group_size - 1)].mean(1)
    mean = cost.mean(1)
    unit = torch.where(unit > 1e-10 * mean, unit, mean)
    return torch.where(unit > 0, 1 / unit.clamp(min=1e-280), 1.0).clamp(max=1e250)


def default_rank(n: int) -> int:
    """About √(2n), the rank that always has a solution, to whole vectors of the CPU."""
    return max(LANES, LANES * round((2 * n) ** 0.5 / LANES))
