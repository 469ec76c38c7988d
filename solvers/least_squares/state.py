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

from maskopt.solvers.compiled import loop

#: size below which LAPACK inverts a matrix
_LEAF = 96
#: kept inputs whose pairs are screened at a time; numbers of a product over pairs at a time
CHUNK, AT_ONCE = 64, 2**20
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
        """An uninitialised tensor of this shape."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = torch.empty(size, dtype=torch.float64, device=self.device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)


@cache
def _signs(size: int, device: torch.device) -> Float[Tensor, " size"]:
    """Random signs, the same for every row of this size."""
    drawn = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0))
    return (drawn * 2 - 1).to(device, torch.float64)


def part_of(matrix: Tensor, lines: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """matrix[lines, columns], written to `out` [lines, columns]."""
    if matrix.device.type != "cpu":
        return out.copy_(matrix[lines[:, None], columns[None, :]])
    _gather(matrix.numpy(), lines.numpy(), columns.numpy(), out.numpy())
    return out


@loop(nogil=True)
def _gather(matrix: np.ndarray, lines: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(lines)):
        line = matrix[lines[i]]
        for j in range(len(columns)):
            out[i, j] = line[columns[j]]


def inverse(matrix: Tensor, out: Tensor, work: Tensor) -> Tensor:
    """Of definite matrices [rows, k, k], by halves: 4k³/3 operations a row, nearly all of them products. NaN
    where rounding left something that is not definite.

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
    one, two, corner = out[:, :half, :half], out[:, half:, half:], out[:, :half, half:]
    cross = matrix[:, :half, half:]
    needed = count * half * (size - half)
    moved, rest = work[:needed].view(count, half, -1), work[needed:]
    inverse(matrix[:, :half, :half], one, rest)
    torch.bmm(one, cross, out=moved)
    _add_upper(matrix[:, half:, half:], cross.mT, moved, -1)
    inverse(matrix[:, half:, half:], two, rest)
    torch.bmm(moved, two, out=corner)
    corner.neg_()
    out[:, half:, :half] = corner.mT
    _add_upper(one, corner, moved.mT, -1)
    quarter = half // 2
    one[:, quarter:, :quarter] = one[:, :quarter, quarter:].mT
    return out


def _add_upper(matrix: Tensor, left: Tensor, right: Tensor, alpha: int) -> None:
    """alpha · left · right, which is symmetric, onto all of a matrix but the lower left quarter."""
    quarter = matrix.shape[1] // 2
    matrix[:, :quarter].baddbmm_(left[:, :quarter], right, alpha=alpha)
    matrix[:, quarter:, quarter:].baddbmm_(left[:, quarter:], right[:, :, quarter:], alpha=alpha)


@dataclass(frozen=True)
class Metric:
    """What the rows of a layer share: A, the diagonal of H = A⁻¹ (`spread`), and the size of the groups that
    exchanges stay inside; the diagonal of A (`alone`) and the largest A_jj H_jj (`stiffness`)."""

    damped: Float[Tensor, "n n"]
    spread: Float[Tensor, " n"]
    group_size: int

    @cached_property
    def alone(self) -> Float[Tensor, " n"]:
        return self.damped.diagonal().clone()

    @cached_property
    def stiffness(self) -> float:
        return float((self.alone * self.spread).max())


@dataclass
class Block:
    """The tableau T = [[−M, B], [Bᵀ, C]] of candidates: T_SZ, the symmetric T_ZZ, and v and r."""

    columns: Float[Tensor, "k size"]
    z: Float[Tensor, "size size"]
    y: Float[Tensor, " size"]

    def of(self, some: Int[Tensor, " some"]) -> Block:
        """Of some of the candidates."""
        return Block(self.columns[:, some], self.z[some[:, None], some[None, :]], self.y[some])


class Row:
    """A row, changed in place by exchanges. Slots 0 … k−1 hold the kept inputs, 0 … s−1 the pruned ones.

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
        self.v, self.r, self.left = (target.new_empty(len(x)) for x in (kept, pruned, kept))
        self.inverted()

    @classmethod
    def several(
        cls, metric: Metric, scratch: Scratch, targets: Tensor, masks: Tensor
    ) -> list[Self]:
        """Of masks [rows, n], True = kept, that all keep the same number; 4k³/3 operations a row."""
        count = len(masks)
        kept = masks.nonzero()[:, 1].view(count, int(masks[0].sum()))
        pruned = (~masks).nonzero()[:, 1].view(count, masks.shape[1] - kept.shape[1])
        k = kept.shape[1]
        system = scratch("system", count, k, k)
        for one, inputs in zip(system, kept, strict=True):
            part_of(metric.damped, inputs, inputs, one)
        m = inverse(system, scratch("m", count, k, k), scratch("work", count * (k * k // 2 + 1)))
        each = zip(targets, kept, pruned, m, strict=True)
        return [cls(metric, scratch, *parts) for parts in each]

    def renew(self, kept: Int[Tensor, " k"], pruned: Int[Tensor, " s"]) -> None:
        """M, v and r from scratch, of a mask with as many kept."""
        self.kept.copy_(kept)
        self.pruned.copy_(pruned)
        k, new = len(self.kept), self.scratch
        system = part_of(self.metric.damped, self.kept, self.kept, new("system", k, k))
        inverse(system[None], self.m[None], new("work", k * k // 2 + 1))
        self.inverted()

    def inverted(self) -> None:
        """v and r of a new M; by Cholesky of the whole where the inverse by halves is too inexact."""
        if not self.drift() <= DRIFT:
            system = part_of(self.metric.damped, self.kept, self.kept, torch.empty_like(self.m))
            torch.cholesky_inverse(torch.linalg.cholesky(system), out=self.m)
        torch.mv(self.m, self.target[self.kept], out=self.v)
        self.fresh = True
        self.look()

    def mask(self) -> Tensor:
        return torch.zeros_like(self.target, dtype=torch.bool).index_fill_(0, self.kept, True)

    def weights(self) -> Float[Tensor, " n"]:
        """v, zero on what is pruned."""
        return torch.zeros_like(self.target).index_copy_(0, self.kept, self.v)

    def look(self) -> None:
        """r, and what is left, of v."""
        rest = self.target - self.weights() @ self.metric.damped
        self.r, self.left = rest[self.pruned], rest[self.kept]
        self.explained = float((self.target[self.kept] + self.left) @ self.v)

    def settle(self, noise: float, objective: float) -> None:
        """A step of refinement for v; and r again where that could change a gain by more than `noise`.

        With δ = M(b_S − A_SS v), F falls by e = δᵀA_SS δ. r_p moves by (Aδ)_p, its square no more than A_pp e
        (Cauchy); so a gain g = r_p²/C_pp ≤ F by 2√(g·A_pp H_pp e) at most.
        """
        step = self.m @ self.left
        fall = float(step @ self.left)
        self.v += step
        self.left.zero_()
        if 4 * objective * self.metric.stiffness * fall > noise * noise:
            self.look()

    def likely(self, count: int) -> Slots:
        """Candidates by r_p²√(H_pp/A_pp) for r_p²/C_pp, at most `count` a side, or in whole groups."""
        gain = self.r.square() * (self.metric.spread / self.metric.alone).sqrt()[self.pruned]
        cost, size = self.v.square() / self.m.diagonal(), self.metric.group_size
        if size == len(self.target):
            return _least(cost, count), _least(-gain, count)
        cheapest = cost.new_full((len(self.target) // size,), torch.inf)
        cheapest.scatter_reduce_(0, self.kept // size, cost, "amin")
        dearest = torch.zeros_like(cheapest).scatter_reduce_(0, self.pruned // size, gain, "amax")
        return _members(self, _least(cheapest - dearest, max(1, count // size)))

    def improving(self, count: int, threshold: float) -> Slots | None:
        """The exact scan: candidates out of all pairs of Δ < −threshold; None: there is none."""
        suspects = self._suspects()
        if not len(suspects):
            return None
        b, c = self.columns(suspects)
        self.formed += b.numel()
        r = self.r[suspects]
        delta = (self.v[:, None] - b * (r / c)).square_()
        delta /= (b.square_() / c).add_(self.m.diagonal()[:, None])
        delta -= r.square() / c
        size, of_p = self.metric.group_size, self.pruned[suspects] // self.metric.group_size
        delta.masked_fill_((self.kept // size)[:, None] != of_p, torch.inf)
        by_kept, by_pruned = delta.amin(1), delta.amin(0)
        if not bool((by_pruned < -threshold).any()):
            return None
        if size < len(self.target):
            return _members(self, of_p[_least(by_pruned, max(1, count // size))])
        u, p = _least(by_kept, count), _least(by_pruned, count)
        return u[by_kept[u] < 0], suspects[p[by_pruned[p] < 0]]

    def _suspects(self) -> Int[Tensor, " some"]:
        """Slots of the pruned inputs that (2), and (1) with the least C_pp, leave an improving pair."""
        spread = self.metric.spread
        ratio = (spread[self.kept] / self.m.diagonal()).clamp(min=1.0)
        cost = self.v.square() / self.m.diagonal()
        need = cost / (ratio.sqrt() + (ratio - 1.0).sqrt()).square()
        gain = self.r.square() * spread[self.pruned] * (1.0 + SAFETY)
        price = self.v / self.m.diagonal()
        if self.metric.group_size < len(self.target):
            return _suspects_of_groups(self, need, gain, cost, price)
        p = gain.argsort(descending=True)[: int((gain > need.min()).sum())]
        u = need.argsort()[: int((need < gain.max()).sum())]
        if not len(u):
            return p[:0]
        flagged = torch.zeros_like(p, dtype=torch.bool)
        outer = self.lines(p).T
        square, twice = self.r[p].square(), 2 * self.r[p]
        least = (1.0 - SAFETY) / spread[self.pruned[p]]
        for part in u.split(CHUNK):
            width = int((gain[p] > need[part[0]]).sum())
            b = torch.mm(self.m[part], outer[:, :width], out=self.scratch("b", len(part), width))
            self.formed += b.numel()
            reach = b.mul_(price[part, None]).mul_(twice[:width]).add_(square[:width])
            flagged[:width] |= (reach > cost[part, None] * least[:width]).any(0)
        return p[flagged].sort().values

    def lines(self, p: Tensor) -> Float[Tensor, "some k"]:
        """A_p,S of slots p."""
        out = self.scratch("outer", len(p), len(self.kept))
        return part_of(self.metric.damped, self.pruned[p], self.kept, out)

    def columns(self, p: Tensor) -> tuple[Float[Tensor, "k some"], Float[Tensor, " some"]]:
        """B_S,p and C_pp of slots p."""
        outer = self.lines(p).T
        b = torch.mm(self.m, outer, out=self.scratch("columns", len(outer), len(p)))
        return b, self.metric.alone[self.pruned[p]] - (outer * b).sum(0)

    def block(self, u: Tensor, p: Tensor) -> Block:
        """T of the candidates."""
        outer, inputs = self.lines(p), self.pruned[p]
        columns = self.scratch("block", len(self.kept), len(u) + len(p))
        torch.neg(self.m[u].T, out=columns[:, : len(u)])
        b = torch.mm(self.m, outer.T, out=columns[:, len(u) :])
        c = self.metric.damped[inputs[:, None], inputs[None, :]] - outer @ b
        z = torch.cat([columns[u], torch.cat([b[u].T, c], 1)])
        return Block(columns, (z + z.T) / 2, torch.cat([self.v[u], self.r[p]]))

    def exchange(self, u: Tensor, p: Tensor, block: Block) -> None:
        """The inputs of slots u and p change places, pair by pair; `block` is that of u and p, in this order.

        A principal pivot on Z = (u, p): with W = T_ZZ⁻¹ and E = diag(−1 on u, +1 on p), T_oo ← T_oo − T_oZ W
        T_Zo, T_oZ ← T_oZ W E, T_ZZ ← −E W E, and what was in p is in u then.
        """
        q = len(u)
        w = torch.linalg.inv(block.z)
        sign = torch.ones(2 * q, dtype=w.dtype, device=w.device)
        sign[:q] = -1.0
        scaled = torch.mm(block.columns, w, out=self.scratch("scaled", len(self.kept), 2 * q))
        self.v -= scaled @ block.y
        self.m.addmm_(scaled, block.columns.T)
        scaled *= sign
        self.m[:, u] = -scaled[:, q:]
        self.m[u] = -scaled[:, q:].T
        self.m[u[:, None], u[None, :]] = (sign[:, None] * w * sign)[q:, q:]
        self.v[u] = (sign * (w @ block.y))[q:]
        self.kept[u], self.pruned[p] = self.pruned[p], self.kept[u]
        self.fresh = False
        self.look()

    def drift(self) -> float:
        """How far M is from an inverse, relative: A_SS(M z) against random signs z (Freivalds). ‖b_S − A_SS
        v‖ would not show it, since b is large where A is, and M drifts where A is small."""
        z = _signs(len(self.v), self.v.device)
        full = torch.zeros_like(self.target).index_copy_(0, self.kept, self.m @ z)
        rest = (full @ self.metric.damped)[self.kept] - z
        return float(rest.norm()) / max(1.0, len(z) ** 0.5)


def _least(values: Tensor, count: int) -> Tensor:
    return values.topk(min(count, len(values)), largest=False).indices


def _members(row: Row, groups: Tensor) -> Slots:
    """All inputs of some groups."""
    of_u, of_p = (x // row.metric.group_size for x in (row.kept, row.pruned))
    return torch.isin(of_u, groups).nonzero()[:, 0], torch.isin(of_p, groups).nonzero()[:, 0]


def _suspects_of_groups(
    row: Row, need: Tensor, gain: Tensor, cost: Tensor, price: Tensor
) -> Int[Tensor, " some"]:
    """As `Row._suspects`, where only pairs inside a group count."""
    of_u, of_p = (x // row.metric.group_size for x in (row.kept, row.pruned))
    u, p = ((of_u[:, None] == of_p) & (need[:, None] < gain[None, :])).nonzero().unbind(1)
    least = (1.0 - SAFETY) / row.metric.spread[row.pruned[p]]
    row.formed += len(p)
    flagged = []
    step = max(1, AT_ONCE // max(1, len(row.kept)))
    for one, two, low in zip(u.split(step), p.split(step), least.split(step), strict=True):
        b = (row.m[one] * row.lines(two)).sum(1)
        reach = row.r[two].square() + 2 * row.r[two] * price[one] * b
        flagged.append(two[reach > cost[one] * low])
    return torch.cat(flagged).unique() if flagged else p
