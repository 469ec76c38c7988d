"""Solvers that choose masks for updated weights, whether or not the problem updates them.

*ADMM*, as ALPS does it (Meng et al., NeurIPS 2024, arXiv 2406.07831): min (w−v)ᵀA(w−v) over v = d, d with no
more nonzeros than the pattern keeps. With the inputs scaled to A_jj = 1, the multiplier y and a penalty ρ of
every row,

    v = (A + ρI)⁻¹ (b − y + ρd),   d = what v + y/ρ has of largest |·|,   y ← y + ρ(v − d)

in the eigenvectors of A, so that ρ may grow freely: the faster the more of d's support still changes. The
mask is that of d. ALPS gives all rows of a layer one ρ; here each has its own, so that no row depends on
the others, unless they share a budget: then d has the largest entries of the layer, and ρ is common.

*Greedy elimination*, the Optimal Brain Surgeon (Hassibi and Stork, NeurIPS 1992): with S the inputs that are
left, M = A_SS⁻¹ and v = M b_S, pruning u adds v_u²/M_uu to F, and afterwards

    v ← v − M_:u v_u/M_uu,      M ← M − M_:u M_u:/M_uu    without u.

The cheapest goes, again and again, as long as its group has to give. In place of a rank-one update of n²
numbers for every weight, the cheapest few are eliminated on their own small block, and then M follows in one
product (`panel` = 1: the recursion itself).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.core.fields import option
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.core.threads import fast_products, one_thread_each, threads_on
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities, Solver
from maskopt.protocol.trace import Trace
from maskopt.solvers.greedy.scores import keep_highest
from maskopt.solvers.least_squares.compiled_row import one_sided

#: rows of a tile; a constant, since the last bits of a product may depend on it
_TILE = 64
#: iterations between two looks at the support
_PERIOD = 3
#: by what ρ grows then, where more than this part of the kept changed
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
#: weights below this part of the largest target are no measure of a row in float32
_NOTHING = 1e-20
#: candidates on the small block for each that is eliminated there
_CANDIDATES = 4


@dataclass(frozen=True)
class Scaled:
    """A problem of updated weights with its inputs scaled to A_jj = 1: F = min {vᵀAv − 2bᵀv + C}.

    √A_jj before (`size` [n]), A [n, n], b (`target` [rows, n]) and C [rows], float64.
    """

    size: Float[Tensor, " n"]
    a: Float[Tensor, "n n"]
    target: Float[Tensor, "rows n"]
    constant: Float[Tensor, " rows"]

    @classmethod
    def of(cls, problem: LayerProblem) -> Scaled:
        squares, weight, g = problem.least_squares, problem.weight.double(), problem.correlation
        size = squares.damped.diagonal().sqrt()
        target = squares.target(weight, g)
        constant = (weight * target).sum(1) + (weight * g).sum(1) + problem.constant
        return cls(size, squares.damped / size / size[:, None], target / size, constant)


@dataclass(frozen=True)
class Damped(Solver):
    """The options of the update for a problem that keeps its weights."""

    damping: float = option(
        LeastSquaresUpdate.damping,
        "λ, of a problem that keeps its weights",
        unit="of G's mean diagonal",
        least=0,
    )
    power: float = option(
        LeastSquaresUpdate.power,
        "of such a problem, how far λ goes with an input's own part of G's diagonal",
        least=0,
        most=1,
    )

    def refitted(self, problem: LayerProblem) -> LayerProblem:
        """Return the problem that the mask is chosen for."""
        if problem.update is not None:
            return problem
        return problem.with_update(LeastSquaresUpdate(self.damping, self.power))

    def as_start(self, layer: LayerProblem) -> tuple[Solver, LayerProblem]:
        """F of its mask is not asked for."""
        if layer.update is None:
            return self, layer
        options = {"damping": layer.update.damping, "power": layer.update.power}
        return replace(self, **options), layer.with_update(None)


@dataclass(frozen=True)
class Admm(Damped):
    """A mask for updated weights, by ADMM in float32; reports a `Trace`.

    A row (or the layer, with a shared budget) stops when its support no longer changes.
    """

    name: ClassVar[str] = "admm"
    capabilities: ClassVar[Capabilities] = Capabilities(
        update=True,
        shared_budget=True,
        apart=True,
        note="ALPS's splitting, for weights that are updated",
    )

    iterations: int = option(300, "at most, of every row", least=1)
    rho: float = option(0.1, "the first penalty", unit="part of A's diagonal", least=1e-6)

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        refitted = self.refitted(problem)
        scaled = Scaled.of(refitted)
        values, vectors = torch.linalg.eigh(scaled.a)
        shared = scaled.size, values.float(), vectors.float()
        tile = max(_TILE, problem.rows_per_budget)
        parts = [*refitted.tiles(tile)]

        def some(part: int) -> tuple[Tensor, Tensor]:
            rows, own = parts[part]
            return self._masks(own, scaled.target[rows], *shared, limits)

        parallel = partial(one_thread_each, threads=threads_on(problem.device))
        with fast_products():
            found = [some(0)] if problem.shared_budget else parallel(some, len(parts))
        mask, steps = (torch.cat([part[which] for part in found]) for which in (0, 1))
        return Solution.of(problem, mask, trace=Trace(iterations=steps.cpu()))

    def _masks(
        self,
        problem: LayerProblem,
        target: Float[Tensor, "rows n"],
        size: Float[Tensor, " n"],
        values: Float[Tensor, " n"],
        vectors: Float[Tensor, "n n"],
        limits: Limits,
    ) -> tuple[Tensor, Tensor]:
        """Return the masks of some rows, and their iterations; all in the scaled inputs."""
        d = problem.weight.double() * size
        largest = d.abs().amax(1, keepdim=True), target.abs().amax(1, keepdim=True)
        # where the weights are next to nothing, what is wanted would be beyond float32 in their units
        scale = d.where(largest[0] > _NOTHING * largest[1], target)
        unit = scale.abs().amax(1, keepdim=True)
        unit = unit.where(unit > 0, 1.0)  # what is beyond float32 counts in float64
        unit = unit * (scale / unit).square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
        d, target = (d / unit).float(), (target / unit).float()
        unit = unit * problem.shares.sqrt()[:, None]  # what a row counts in the layer's sum
        mask = keep_highest(problem, d.abs().double() * unit)
        d = torch.where(mask, d, 0.0)
        y = torch.zeros_like(d)
        rho = torch.full((len(d), 1), self.rho, device=d.device)
        alive = torch.arange(len(d), device=d.device)
        kept = mask.sum(1).clamp(min=1)
        seen, steps, rows = mask.clone(), torch.zeros_like(kept), problem
        for step in range(1, self.iterations + 1):
            if not len(alive) or limits.expired:
                break
            v = target[alive] - y + rho * d
            v = _regressed(v, rho, values, vectors)
            best = v + y / rho
            now = keep_highest(rows, best.abs().double() * unit)
            d = torch.where(now, best, 0.0)
            y = y + rho * (v - d)
            mask[alive], steps[alive] = now, step
            if step % _PERIOD:
                continue
            came, of = (
                x.view(-1, rows.rows_per_budget).sum(1, keepdim=True)
                for x in ((now & ~seen[alive]).sum(1), kept[alive])
            )
            changed = (came / of).expand(-1, rows.rows_per_budget).flatten()
            seen[alive] = now
            growth = torch.ones_like(changed)
            for least, factor in reversed(_GROWTH):
                growth = torch.where(changed > least, factor, growth)
            rho = rho * growth[:, None]
            going = changed > 0
            if bool(going.all()):
                continue
            rows = rows.take(going)
            alive, y, d, rho, unit = (x[going] for x in (alive, y, d, rho, unit))
        return mask, steps


def _regressed(
    x: Float[Tensor, "rows n"], rho: Tensor, values: Tensor, vectors: Tensor
) -> Float[Tensor, "rows n"]:
    """Return (A + ρI)⁻¹x of every row."""

    def some(x: Tensor, rho: Tensor) -> Tensor:
        return ((x @ vectors) / (values + rho)) @ vectors.T

    if len(x) <= _TILE:
        return some(x, rho)
    tiles = list(zip(x.split(_TILE), rho.split(_TILE), strict=True))
    return torch.cat(one_thread_each(lambda i: some(*tiles[i]), len(tiles), threads_on(x.device)))


@dataclass(frozen=True)
class Obs(Damped):
    """A mask for updated weights, by the price of each removal after the ones before it.

    Rows that are left when the time is over prune by the first prices.
    """

    name: ClassVar[str] = "obs"
    capabilities: ClassVar[Capabilities] = Capabilities(
        update=True, apart=True, note="greedy removal at exact prices, for weights that are updated"
    )

    panel: int = option(
        64, "eliminated between two updates of the whole inverse; 1: the exact recursion", least=1
    )

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        refitted = self.refitted(problem)
        squares = refitted.least_squares
        target = squares.target(refitted.weight, refitted.correlation)
        inverse = squares.inverse
        group, quota = problem.group_size, problem.pruned_per_group
        done = limits.counter(problem.rows)
        first = keep_highest(problem, (target @ inverse).square() / inverse.diagonal())

        def eliminated(row: int) -> tuple[Tensor, int]:
            if limits.expired:
                return first[row], 0
            found = _eliminated(inverse, target[row], group, quota, self.panel)
            done()
            return found

        found = one_thread_each(eliminated, problem.rows, threads_on(problem.device))
        mask, rounds = torch.stack([row[0] for row in found]), [row[1] for row in found]
        return Solution.of(problem, mask, trace=Trace(rounds=torch.tensor(rounds)))


def _eliminated(
    inverse: Tensor, target: Tensor, group: int, quota: int, panel: int
) -> tuple[Tensor, int]:
    """Return the mask [n] of one row, and how many panels it took."""
    n, rounds = len(target), 0
    left = torch.arange(n, device=target.device)
    room = np.full(n // group, quota)
    m, v = inverse, inverse @ target
    while room.any():
        rounds += 1
        cost = v.square() / m.diagonal()
        full = torch.from_numpy(room == 0).to(left.device)[left // group]
        cost.masked_fill_(full, torch.inf)
        most = min(len(left), _CANDIDATES * panel if panel > 1 else 1, int((~full).sum()))
        slots = cost.topk(most, largest=False, sorted=True).indices
        block = -m[slots[:, None], slots[None, :]].cpu().numpy()
        groups = (left[slots] // group).cpu().numpy()
        order, _ = one_sided(block, v[slots].cpu().numpy(), groups, room, panel)
        gone = slots[torch.from_numpy(order).to(slots.device)]
        columns = m[:, gone]
        weights = torch.linalg.solve(columns[gone], torch.cat([columns.T, v[gone, None]], 1))
        stays = torch.ones_like(left, dtype=torch.bool)
        stays[gone] = False
        kept = stays.nonzero()[:, 0]
        columns = columns[kept]
        v = v[kept] - columns @ weights[:, -1]
        m = m[kept[:, None], kept[None, :]].addmm_(columns, weights[:, kept], alpha=-1)
        left = left[kept]
    mask = torch.zeros(n, dtype=torch.bool, device=left.device)
    return mask.index_fill_(0, left, True), rounds
