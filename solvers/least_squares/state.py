"""One row of updated weights: what removals, returns and exchanges cost, and the exact scan of all pairs.

With S the kept inputs, P the pruned, M = A_SS⁻¹, v = M b_S the updated weights, r = b_P − A_PS v what they
leave over, B = M A_SP and C = A_PP − A_PS B, F of the row grows by v_u²/M_uu if u is pruned, falls by
r_p²/C_pp if p is kept again, and changes by

    Δ(u, p) = (v_u − B_up r_p/C_pp)² / (M_uu + B_up²/C_pp) − r_p²/C_pp            (p returns, u goes)

**Screening.** B is a product of k²·s terms, and most of it is never needed. Multiplied out,

    Δ(u, p) < 0   ⟺   C_pp·v_u²/M_uu  <  r_p² + 2 r_p B_up v_u/M_uu                                   (1)

and with H = A⁻¹, of which all rows share the diagonal: C_pp ≥ 1/H_pp, and since M_uu grows to no more than
H_uu when inputs are kept again, B_up²/(M_uu C_pp) ≤ H_uu/M_uu − 1 =: κ_u² − 1. So no u with

    |v_u|/√M_uu  ≥  (κ_u + √(κ_u² − 1))·√H_pp·|r_p|                                                   (2)

makes an improving pair with p. What (2) leaves is tested by (1) with 1/H_pp for C_pp; the columns that remain
are formed whole, and priced exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskopt.solvers.kernels import njit
from maskopt.solvers.least_squares.compiled_row import (
    best_pairs,
    flag,
    likely,
    look,
    move_weights,
    screen,
    suspects_of_groups,
)

#: size below which LAPACK inverts a matrix
_LEAF = 96
#: kept inputs whose pairs are screened at a time
CHUNK = 64
#: relative error of M at which it is made anew
DRIFT = 1e-9
#: what rounding may add to a gain that is held against a cost
SAFETY = 1e-6
#: candidates for exchanges: slots of kept inputs, and of pruned ones
Slots = tuple[Int[Tensor, " some"], Int[Tensor, " others"]]


class Scratch:
    """Buffers by name, float64; each is handed out again, and holds one thing at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return an uninitialised tensor of this shape."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = torch.empty(size, dtype=torch.float64, device=self.device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)


@cache
def _signs(size: int) -> Float[Tensor, " size"]:
    """Return random signs, the same for every row of this size."""
    drawn = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0))
    return (drawn * 2 - 1).double()


def part_of(matrix: Tensor, lines: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """Write matrix[lines, columns] to `out` [lines, columns], and return it."""
    if matrix.device.type != "cpu":
        return out.copy_(matrix[lines[:, None], columns[None, :]])
    _gather(matrix.numpy(), lines.numpy(), columns.numpy(), out.numpy())
    return out


@njit
def _gather(matrix: np.ndarray, lines: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(lines)):
        line = matrix[lines[i]]
        for j in range(len(columns)):
            out[i, j] = line[columns[j]]


def inverse(matrix: Tensor, out: Tensor, work: Tensor) -> Tensor:
    """Invert definite matrices [rows, k, k] by halves: 4k³/3 operations a row, nearly all of them products.

    A matrix that is not definite after rounding becomes NaN.

    Args:
        matrix: is used up.
        out: [rows, k, k], not the same memory.
        work: [rows · k²/2] at least.
    """
    count, size = matrix.shape[:2]
    if size <= _LEAF:
        # the lower left quarter is not up to date
        upper, broken = torch.linalg.cholesky_ex(matrix, upper=True)
        lost = (broken != 0)[:, None, None]
        upper = torch.where(lost, torch.eye(size, dtype=upper.dtype, device=upper.device), upper)
        return out.copy_(torch.cholesky_inverse(upper, upper=True)).masked_fill_(lost, torch.nan)
    half = size // 2
    upper_left, lower_right = out[:, :half, :half], out[:, half:, half:]
    corner = out[:, :half, half:]
    cross = matrix[:, :half, half:]
    needed = count * half * (size - half)
    moved, rest_of_work = work[:needed].view(count, half, -1), work[needed:]
    inverse(matrix[:, :half, :half], upper_left, rest_of_work)
    torch.bmm(upper_left, cross, out=moved)
    _add_upper(matrix[:, half:, half:], cross.mT, moved, -1)
    inverse(matrix[:, half:, half:], lower_right, rest_of_work)
    torch.bmm(moved, lower_right, out=corner)
    corner.neg_()
    out[:, half:, :half] = corner.mT
    _add_upper(upper_left, corner, moved.mT, -1)
    quarter = half // 2
    upper_left[:, quarter:, :quarter] = upper_left[:, :quarter, quarter:].mT
    return out


def _add_upper(matrix: Tensor, left: Tensor, right: Tensor, alpha: int) -> None:
    """Add alpha · left · right, which is symmetric, to all of a matrix but the lower left quarter."""
    quarter = matrix.shape[1] // 2
    matrix[:, :quarter].baddbmm_(left[:, :quarter], right, alpha=alpha)
    matrix[:, quarter:, quarter:].baddbmm_(left[:, quarter:], right[:, :, quarter:], alpha=alpha)


@dataclass(frozen=True)
class Metric:
    """The data that all rows of a layer share.

    Attributes:
        damped: A, float64 [n, n], on the device of the products.
        spread: the diagonal of H = A⁻¹, float64 [n], on the CPU.
        group_size: inputs of a group, inside which exchanges stay.
    """

    damped: Float[Tensor, "n n"]
    spread: Float[Tensor, " n"]
    group_size: int

    @cached_property
    def alone(self) -> Float[Tensor, " n"]:
        """The diagonal of A, on the CPU."""
        return self.damped.diagonal().cpu().clone()

    @cached_property
    def damped_on_cpu(self) -> Float[Tensor, "n n"]:
        """A on the CPU; without a copy where it is there already."""
        return self.damped.cpu()

    @cached_property
    def stiffness(self) -> float:
        """The largest A_jj H_jj."""
        return float((self.alone * self.spread).max())


@dataclass
class Block:
    """The tableau T = [[−M, B], [Bᵀ, C]] of candidates Z = (u, p).

    Attributes:
        columns: T_SZ, on the device of M.
        z: T_ZZ, symmetric, on the CPU.
        y: v of u and r of p, on the CPU.
    """

    columns: Float[Tensor, "k size"]
    z: Float[Tensor, "size size"]
    y: Float[Tensor, " size"]

    def of(self, chosen: Int[Tensor, " chosen"]) -> Block:
        """Return the tableau of some of the candidates."""
        square = self.z[chosen[:, None], chosen[None, :]]
        return Block(self.columns[:, chosen], square, self.y[chosen])


class Row:
    """A row, changed in place by exchanges. Slots 0 … k−1 hold the kept inputs, 0 … s−1 the pruned ones.

    Matrices and their products are on the device of the problem, vectors on the CPU, where compiled loops
    price pairs.

    Attributes:
        target: b, float64 [n].
        left: b_S − A_SS v, rounding that `settle` takes into v.
        explained: the decrease of F by v from its value with nothing kept: 2b_Sᵀv − vᵀA_SS v.
        fresh: whether M was inverted from scratch, and not updated.
        formed: pairs of which the scans had to form B.
    """

    explained, fresh, formed = 0.0, True, 0

    def __init__(
        self,
        metric: Metric,
        scratch: Scratch,
        target: Float[Tensor, " n"],
        kept: Int[Tensor, " k"],
        pruned: Int[Tensor, " s"],
        m: Float[Tensor, "k k"],
    ) -> None:
        self.metric, self.scratch, self.target = metric, scratch, target
        self.kept, self.pruned, self.m = kept, pruned, m
        self.r, self.left = target.new_empty(len(pruned)), target.new_empty(len(kept))
        self.inverted()

    @classmethod
    def several(
        cls, metric: Metric, scratch: Scratch, targets: Tensor, masks: Tensor
    ) -> list[Self]:
        """Return the rows of masks [rows, n], True = kept, that all keep the same number.

        Takes 4k³/3 operations a row.
        """
        count = len(masks)
        kept = masks.nonzero()[:, 1].view(count, int(masks[0].sum()))
        pruned = (~masks).nonzero()[:, 1].view(count, masks.shape[1] - kept.shape[1])
        k = kept.shape[1]
        system = scratch("system", count, k, k)
        for matrix, inputs in zip(system, kept, strict=True):
            part_of(metric.damped, inputs, inputs, matrix)
        m = inverse(system, scratch("m", count, k, k), scratch("work", count * (k * k // 2 + 1)))
        each = zip(targets, kept, pruned, m, strict=True)
        return [cls(metric, scratch, *parts) for parts in each]

    def renew(self, kept: Int[Tensor, " k"], pruned: Int[Tensor, " s"]) -> None:
        """Compute M, v and r from scratch, of a mask with as many kept."""
        self.kept.copy_(kept)
        self.pruned.copy_(pruned)
        k, new = len(self.kept), self.scratch
        system = part_of(self.metric.damped, self.kept, self.kept, new("system", k, k))
        inverse(system[None], self.m[None], new("work", k * k // 2 + 1))
        self.inverted()

    def inverted(self) -> None:
        """Compute v and r of a new M.

        Where the inverse by halves is too inexact, M is inverted again by Cholesky of the whole.
        """
        if not self.drift() <= DRIFT:
            system = part_of(self.metric.damped, self.kept, self.kept, torch.empty_like(self.m))
            torch.cholesky_inverse(torch.linalg.cholesky(system), out=self.m)
        self.v = self._times_m(self.target[self.kept])
        self.fresh = True
        self.look()

    def mask(self) -> Tensor:
        return torch.zeros_like(self.target, dtype=torch.bool).index_fill_(0, self.kept, True)

    def weights(self) -> Float[Tensor, " n"]:
        """Return v in its inputs, zero where the row prunes."""
        return self._spread_out(self.v)

    def look(self) -> None:
        """Compute r, and what v leaves of the kept inputs' target."""
        if self.m.is_cpu:
            buffer = self.scratch("rest", len(self.target))
            slots = self.kept, self.pruned, self.v, buffer, self.r, self.left
            self.explained = look(*_arrays(self.metric.damped, self.target, *slots))
            return
        residual = self.target - self._times_a(self.weights())
        self.r, self.left = residual[self.pruned], residual[self.kept]
        self.explained = float((self.target[self.kept] + self.left) @ self.v)

    def settle(self, noise: float, objective: float) -> None:
        """Refine v by one step, and compute r again where that could change a gain by more than `noise`.

        With δ = M(b_S − A_SS v), F falls by e = δᵀA_SS δ. r_p moves by (Aδ)_p, its square no more than A_pp e
        (Cauchy); so a gain g = r_p²/C_pp ≤ F by 2√(g·A_pp H_pp e) at most.
        """
        step = self._times_m(self.left)
        fall = float(step @ self.left)
        self.v += step
        self.left.zero_()
        if 4 * objective * self.metric.stiffness * fall > noise * noise:
            self.look()

    def likely(self, count: int) -> Slots:
        """Return candidates by r_p²√(H_pp/A_pp) for r_p²/C_pp, at most `count` a side, or in whole groups."""
        diagonals = _arrays(self.metric.alone, self.metric.spread)
        u, p = likely(*self._state(), *diagonals, self.metric.group_size, count)
        return torch.from_numpy(u), torch.from_numpy(p)

    def improving(self, count: int, threshold: float) -> Slots | None:
        """Scan all pairs exactly: candidates out of those of Δ < −threshold; None: there is no such pair."""
        p = self._suspects()
        if not len(p):
            return None
        outer = self.lines(p)
        b = torch.mm(outer, self.m, out=self.scratch("columns", *outer.shape))
        self.formed += b.numel()
        state = *_arrays(b, outer), *self._state(), *_arrays(p, self.metric.alone)
        u, best = best_pairs(*state, self.metric.group_size, threshold, count)
        return (torch.from_numpy(u), torch.from_numpy(best)) if len(best) else None

    def _suspects(self) -> Int[Tensor, " suspects"]:
        """Return the pruned slots to which (2), and (1) with the least C_pp, leave an improving pair."""
        metric, state = self.metric, self._state()
        if metric.group_size < len(self.target):
            matrices = _arrays(self.m, metric.damped_on_cpu, metric.spread)
            flagged, formed = suspects_of_groups(*state, *matrices, metric.group_size, SAFETY)
            self.formed += formed
            return torch.from_numpy(flagged)
        screened = screen(*state, metric.spread.numpy(), SAFETY)
        u, p, widths, cost, price, square, twice, least, flagged = screened
        outer, slots = self.lines(torch.from_numpy(p)), torch.from_numpy(u).to(self.m.device)
        for first in range(0, len(u), CHUNK):
            part, width = slots[first : first + CHUNK], int(widths[first])
            lines = self.scratch("lines", len(part), len(self.kept))
            torch.index_select(self.m, 0, part, out=lines)
            b = torch.mm(lines, outer[:width].T, out=self.scratch("b", len(part), width))
            self.formed += b.numel()
            flag(*_arrays(b), cost[first:], price[first:], square, twice, least, flagged)
        return torch.from_numpy(np.sort(p[flagged]))

    def lines(self, p: Tensor) -> Float[Tensor, "slots k"]:
        """Return A_p,S of slots p."""
        out = self.scratch("outer", len(p), len(self.kept))
        return part_of(self.metric.damped, self.pruned[p], self.kept, out)

    def gains(self, p: Tensor) -> Float[Tensor, " slots"]:
        """Return r_p²/C_pp, what keeping the inputs of slots p again saves."""
        outer = self.lines(p).T
        b = torch.mm(self.m, outer, out=self.scratch("columns", len(outer), len(p)))
        return self.r[p].square() / (self.metric.alone[self.pruned[p]] - (outer * b).sum(0).cpu())

    def block(self, u: Tensor, p: Tensor) -> Block:
        """Return T of the candidates."""
        outer, inputs, count = self.lines(p), self.pruned[p], len(u)
        columns = self.scratch("block", len(self.kept), count + len(p))
        torch.neg(self.m[:, u], out=columns[:, :count])
        b = torch.mm(self.m, outer.T, out=columns[:, count:])
        inner = torch.mm(outer, b, out=self.scratch("inner", len(p), len(p)))
        corner = part_of(self.metric.damped, inputs, inputs, self.scratch("corner", *inner.shape))
        top, inner, corner = (x.cpu() for x in (columns[u], inner, corner))
        z = top.new_empty(len(u) + len(p), len(u) + len(p))
        z[:count, :count] = (top[:, :count] + top[:, :count].T) / 2
        z[:count, count:] = top[:, count:]
        z[count:, :count] = top[:, count:].T
        z[count:, count:] = corner - (inner + inner.T) / 2
        return Block(columns, z, torch.cat([self.v[u], self.r[p]]))

    def exchange(self, u: Tensor, p: Tensor, block: Block) -> None:
        """Exchange the inputs of slots u and p, pair by pair; `block` is that of u and p, in this order.

        A principal pivot on Z = (u, p): with W = T_ZZ⁻¹ and E = diag(−1 on u, +1 on p), T_oo ← T_oo − T_oZ W
        T_Zo, T_oZ ← T_oZ W E, T_ZZ ← −E W E, and what was in p is in u then.
        """
        count = len(u)
        w = torch.linalg.inv(block.z)
        scaled = self.scratch("scaled", *block.columns.shape)
        torch.mm(block.columns, w.to(scaled.device), out=scaled)
        self.m.addmm_(scaled, block.columns.T)
        came = -scaled[:, count:]
        self.m[:, u], self.m[u] = came, came.T
        self.m[u[:, None], u[None, :]] = w[count:, count:].to(came.device)
        move_weights(*_arrays(self.v, u, scaled, w, block.y))
        self.kept[u], self.pruned[p] = self.pruned[p], self.kept[u]
        self.fresh = False
        self.look()

    def drift(self) -> float:
        """Return the relative error of M as an inverse: A_SS(M z) against random signs z (Freivalds).

        ‖b_S − A_SS v‖ would not show it, since b is large where A is, and M drifts where A is small.
        """
        z = _signs(len(self.kept))
        residual = self._times_a(self._spread_out(self._times_m(z)))[self.kept] - z
        return float(residual.norm()) / max(1.0, len(z) ** 0.5)

    def _times_m(self, x: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        return (self.m @ x.to(self.m.device)).cpu()

    def _times_a(self, x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return (x.to(self.m.device) @ self.metric.damped).cpu()

    def _spread_out(self, x: Float[Tensor, " k"]) -> Float[Tensor, " n"]:
        return torch.zeros_like(self.target).index_copy_(0, self.kept, x)

    def _state(self) -> list[np.ndarray]:
        """Return the diagonal of M, v, r, and the inputs in the slots."""
        diagonal = self.m.diagonal().contiguous()
        return _arrays(diagonal, self.v, self.r, self.kept, self.pruned)


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.cpu().numpy() for tensor in tensors]
