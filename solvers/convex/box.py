"""The box relaxation of all rows of a layer at once by ADMM: min xᵀQx over {0 ≤ x ≤ 1, Σ over a group = s}.

ADMM (Douglas–Rachford with over-relaxation), split as y = w⊙x: the quadratic in y has the *same* matrix G for
all rows, so one Cholesky factorisation of the layer

    A = ρ(2H + ρI)⁻¹,   H = G/√(hhᵀ),   h = √diag(G),

serves every step: one matrix product over all rows and a projection of each group onto {0 ≤ x ≤ 1, Σ x = s}
in the metric w²h. Accelerated projected gradient costs the same per step and needs over 300 steps instead of
40 to 60, because of the conditioning of G.

**Hardening.** On binary points x = x², so f(x) + Σ μⱼ(xⱼ − xⱼ²) is the same problem for every μ, and a
growing μ bends the relaxed solution towards a mask. With μ = θ·ρw²h/2 the projection of v becomes that of (v
− θ/2)/(1 − θ); θ rises from 0 to `hardness`, near 1 the steps no longer settle. Its products may be bfloat16,
with sums in float32, where that is much faster.

**Rows of a shared budget** have one sum: the projection is that of the layer, within the limits of its rows.

**A shift.** With d where G − diag(d) is still semidefinite, f(x) = (w⊙x)ᵀ(G − diag(d))(w⊙x) + Σ dⱼwⱼ²xⱼ on
masks, which relaxes to more. Linear terms only move what A is applied to.

**The bound** is that of Frank and Wolfe, f(x) + min_v ∇f(x)ᵀ(v − x) over legal v: valid at any point x, as
far as G is positive semidefinite. `provable` takes off what a float32 G lacks to that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskopt.certificates.certificate import Certificate, evenly
from maskopt.core.files import join_rows
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.core.threads import one_thread_each
from maskopt.solvers.convex.box_step import CompiledStep, SharedBudgetStep, TorchStep
from maskopt.solvers.greedy.scores import keep_highest

#: ρ in units of the mean eigenvalue of H, and the over-relaxation: the best of a grid on real layers
_PENALTY = 0.8
_OVER_RELAXATION = 1.6
#: steps between two measurements of the gap, and before the first
_MEASURE_EVERY = 20
_MEASURE_FROM = 40
#: floors relative to the mean: a dead input or a zero weight may be moved at will, but not by 1/0
_FLOOR = 1e-6
#: n above which the factorisation is of G's dtype even where a bound comes of it
_DOUBLE_UP_TO = 4096
#: bytes of a tile's arrays where one tile has the whole device
_TILE_BYTES = 2**31
#: arrays [rows, n] that a tile needs
_TILE_ARRAYS = 12
#: rows that one thread of the CPU works on; fixed, so that no bit depends on threads or memory
_TILE_ROWS = 128
#: n from which bfloat16 products are faster where a CPU has them in hardware
_HALF_FROM = 256
#: how often θΣw² the bound is lowered by for θ = what G lacks to semidefiniteness: 9/4 suffice
_SLACK = 3.0
#: of an operation, what a check leaves for numbers too small to be distinguished
_UNDERFLOW = 1e-300
#: up to this part of G's mean diagonal the check makes good what G lacks for all rows at once
_SHARED = 1e-4
_UNIT = 2.0**-53


@dataclass(frozen=True)
class BoxPlan:
    """The steps to make.

    The first end where the Frank–Wolfe gap, averaged over the rows, is at most `tolerance` of f (measured
    every 20 steps, from the 40th on), or after `max_iterations` (0: no bound). Then follow `harden` steps,
    whose θ ends at `hardness`.
    """

    tolerance: float
    max_iterations: int
    harden: int = 0
    hardness: float = 0.0


@dataclass(frozen=True)
class BoxPoint:
    """The relaxed points and bounds of all rows.

    Attributes:
        value: float64 [rows], the least f(x) that was measured; ∞ where none was.
        bound: float64 [rows], the best Frank–Wolfe bound.
        point: [rows, n], the x that gives the bound; last: the x at the end, hardened.
        iterations: int64 [rows], steps before hardening.
    """

    value: Float[Tensor, " rows"]
    bound: Float[Tensor, " rows"]
    point: Float[Tensor, "rows n"]
    last: Float[Tensor, "rows n"]
    iterations: Int[Tensor, " rows"]


def relax_box(
    problem: LayerProblem, plan: BoxPlan, limits: Limits, shift: Float[Tensor, " n"] | None = None
) -> BoxPoint:
    """Relax all rows, tile by tile, in at least one step.

    Value and bound are those of the form with `shift` d.
    """
    # an inexact A moves the point at which the steps settle, and nothing that hardening would notice
    exact = plan.max_iterations > 0 and problem.n <= _DOUBLE_UP_TO
    dtype = torch.float64 if exact else problem.gram.dtype
    split = one_thread_each(lambda _: _Split.of(problem, dtype, shift), 1, 1)[0]
    row_bytes = _TILE_ARRAYS * split.factor.element_size() * problem.n
    on_cpu = problem.device.type == "cpu"
    tile = _TILE_ROWS if on_cpu else max(1, limits.bytes(_TILE_BYTES) // row_bytes)
    tile = max(tile, problem.rows_per_budget)  # one projection for the rows of a budget
    starts = range(0, problem.rows, tile)
    threads = 1
    if on_cpu:
        affordable = limits.bytes(len(starts) * tile * row_bytes) // (tile * row_bytes)
        threads = max(1, min(torch.get_num_threads(), len(starts), affordable))

    def work(number: int) -> BoxPoint:
        part = problem.take(slice(starts[number], starts[number] + tile))
        waves = math.ceil((len(starts) - number) / threads)
        return _Tile(part, split, plan).run(limits.share(1 / waves))

    return join_rows(one_thread_each(work, len(starts), threads))


@dataclass(frozen=True)
class _Split:
    """The data that all rows of a layer share. G is scaled to a mean diagonal of 1 throughout.

    Attributes:
        factor, half: A [n, n] in G's dtype; in bfloat16 for hardening, None where that is not faster.
        metric: h [n].
        pull: [n], q⊙pull is taken off the target for the linear term of a shift; None: no shift.
        slope: [n], likewise slope⊙g, over the size of a row, for the linear term of the problem.
        shift: d, float64 [n], or None.
    """

    factor: Float[Tensor, "n n"]
    half: Float[Tensor, "n n"] | None
    metric: Float[Tensor, " n"]
    pull: Float[Tensor, " n"] | None
    slope: Float[Tensor, " n"]
    shift: Float[Tensor, " n"] | None

    @classmethod
    def of(cls, problem: LayerProblem, dtype: torch.dtype, shift: Tensor | None) -> _Split:
        """Factorise in `dtype`."""
        gram = problem.gram.to(dtype)
        if shift is not None:
            gram = gram - torch.diag(shift.to(dtype))
        diagonal = gram.diagonal().clamp(min=0.0)
        mean = float(diagonal.mean()) or 1.0
        h = (diagonal / mean + _FLOOR).sqrt()
        root = h.sqrt()
        matrix = gram / (mean * root[:, None] * root[None, :])
        middle = float(matrix.diagonal().mean())
        rho = _PENALTY * (middle if middle > 0 else 1.0)
        matrix.mul_(2.0).diagonal().add_(rho)
        # one name, so that never more than two matrices of this size live beside G
        matrix = torch.cholesky_inverse(_cholesky(matrix, rho)).mul_(rho)
        factor = matrix.to(problem.gram.dtype)
        pull = None if shift is None else (shift / (mean * rho) / h).to(factor.dtype)
        slope = (2.0 / (mean * rho) / root).to(factor.dtype)
        half = factor.bfloat16() if _half_is_fast(problem) else None
        return cls(factor, half, h.to(factor.dtype), pull, slope, shift)


def _cholesky(matrix: Tensor, rho: float) -> Tensor:
    """Factorise; of a G that nobody checked and that is far from semidefinite, a nearer matrix."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        return factor
    matrix.diagonal().add_(rho - float(torch.linalg.eigvalsh(matrix)[0]))
    return torch.linalg.cholesky(matrix)


def _half_is_fast(problem: LayerProblem) -> bool:
    """Return whether bfloat16 products have hardware of their own; then they are 4 to 8 times faster."""
    on_cpu, single = problem.device.type == "cpu", problem.gram.dtype == torch.float32
    if problem.n < _HALF_FROM or not (on_cpu and single):
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(kind) for kind in ("amx_bf16", "avx512_bf16"))


class _Tile:
    """The steps of some rows."""

    def __init__(self, problem: LayerProblem, split: _Split, plan: BoxPlan) -> None:
        self.problem, self.split, self.plan = problem, split, plan
        weight = problem.weight.double()  # which may be beyond the dtype of the steps
        size = weight.abs().amax(1, keepdim=True)
        unit = size.where(size > 0, 1.0)
        q = (weight / unit).to(split.factor.dtype) * split.metric.sqrt()
        mean = q.square().mean(1, keepdim=True).sqrt()
        mean = mean.where(mean > 0, 1.0)
        self.q = q / mean
        inverse = 1.0 / (self.q.square() + _FLOOR)
        self.step: TorchStep | CompiledStep
        if problem.shared_budget:
            # the layer is one group, in the metric of what its rows count in the sum
            counts = (size * mean.double()).square() * problem.shares[:, None]
            counts = (counts / counts.mean().clamp(min=1e-300)).clamp(min=_FLOOR)
            metric = inverse / counts.to(inverse.dtype)
            self.step = SharedBudgetStep(
                self.q, inverse, problem.pruned, metric, problem.row_limits
            )
        else:
            sizes = problem.group_size, problem.pruned_per_group
            self.step = (CompiledStep if self.q.is_cpu else TorchStep)(self.q, inverse, *sizes)
        self.bound = torch.zeros(problem.rows, dtype=torch.float64, device=weight.device)
        self.value = torch.full_like(self.bound, torch.inf)
        self.point = self.step.x.clone()
        self.drift = torch.zeros_like(self.q)
        if problem.linear is not None:
            scaled = problem.linear.correlation / (unit * mean.double())
            self.drift += scaled.to(split.factor.dtype) * split.slope @ split.factor
        self.diagonal: Tensor | None = None
        if split.shift is not None:
            assert split.pull is not None
            self.diagonal = -split.shift * weight.square()
            self.drift += (self.q * split.pull) @ split.factor

    @torch.no_grad()
    def run(self, limits: Limits) -> BoxPoint:
        share = self.problem.pruned / self.q.numel()
        product = self.q * share @ self.split.factor - self.drift
        product, done = self._relax(product, limits)
        self._harden(product, done, limits)
        return BoxPoint(
            self.value, self.bound, self.point, self.step.x, torch.full((self.problem.rows,), done)
        )

    def _relax(self, product: Tensor, limits: Limits) -> tuple[Tensor, int]:
        """Return the next product, in the working dtype for the bound's sake, and the steps made."""
        for done in range(1, self.plan.max_iterations + 1):
            self.step.advance(product, _OVER_RELAXATION, 0.0)
            product = self.step.target @ self.split.factor - self.drift
            late = limits.expired
            due = done >= _MEASURE_FROM and (done - _MEASURE_FROM) % _MEASURE_EVERY == 0
            if due or late or done == self.plan.max_iterations:
                self._measure()
                if late or self._settled():
                    return product, done
        return product, self.plan.max_iterations

    def _measure(self) -> None:
        value, bound = linear_bound(self.problem, self.step.x, self.diagonal)
        self.point = torch.where((bound >= self.bound)[:, None], self.step.x, self.point)
        self.value, self.bound = self.value.minimum(value), self.bound.maximum(bound)

    def _settled(self) -> bool:
        missing = float(self.problem.shares @ (self.value - self.bound))
        return missing <= self.plan.tolerance * float(self.problem.shares @ self.value)

    def _harden(self, product: Tensor, done: int, limits: Limits) -> None:
        plan, split = self.plan, self.split
        for k in range(plan.harden):
            if limits.expired and done + k > 0:
                break
            if k > 0:  # of the last step nobody asks for the product
                target = self.step.target
                if split.half is None:
                    product = target @ split.factor - self.drift
                else:
                    product = (target.bfloat16() @ split.half).float() - self.drift
            self.step.advance(product, 1.0, plan.hardness * (k + 1) / plan.harden)


def linear_bound(
    problem: LayerProblem,
    x: Float[Tensor, "rows n"],
    diagonal: Float[Tensor, "rows n"] | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return f(x) and its Frank–Wolfe bound, float64.

    f(x) is xᵀQx with its linear part, plus Σ λᵢ(xᵢ² − xᵢ), 0 on every mask; `diagonal`: λ, float64. The bound
    is valid at every x where Q + diag(λ) is positive semidefinite. It is lowered by a margin for the rounding
    of float64 sums, n·2⁻⁵² of the terms' sizes.
    """
    x = x.double()
    weight = problem.weight.double()
    product = weight * x
    c = problem.products(product)
    square = (product * c).sum(1)
    pull, constant = weight * problem.correlation, problem.constant
    value = square + 2 * (pull * x).sum(1) + constant
    gradient = 2 * weight * c + 2 * pull
    offset = constant - square
    size = problem.gram.diagonal().double().abs().sqrt()
    mass = (product.abs() * size).sum(1)
    reach = (weight.abs() * size).sum(1)
    margin = 4 * problem.n * 2.0**-52 * mass * (mass + 2 * reach)
    sizes = 2 * (pull.abs() * x.abs().clamp(min=1.0)).sum(1) + constant
    margin = margin + 4 * problem.n * 2.0**-52 * sizes
    if diagonal is not None:
        value = value + (diagonal * (x.square() - x)).sum(1)
        gradient = gradient + diagonal * (2 * x - 1)
        offset = offset - (diagonal * x.square()).sum(1)
        sizes = diagonal.abs() * x.abs().clamp(min=1.0).square()
        margin = margin + 4 * problem.n * 2.0**-52 * sizes.sum(1)
    vertex = ~keep_highest(problem, gradient * problem.shares[:, None])
    least = torch.where(vertex, gradient, 0.0).sum(1)
    bound = least + offset - margin
    if problem.shared_budget:  # of the layer's sum, which no row has a part of by itself
        bound = evenly(problem.shares @ bound, problem)
    return value, bound.clamp(min=0.0)


def provable(
    problem: LayerProblem, bound: Float[Tensor, " rows"], certificate: Certificate
) -> Float[Tensor, " rows"]:
    """Lower bounds of f to what the check of their certificate can find.

    Of several rows it takes off θw² for what G lacks. For a single row, or a G far from semidefinite, one
    large weight can cost more, and the check itself is made.
    """
    if problem.rows > 1 and not problem.shared_budget:
        lack = _lack(problem)
        if lack <= _SHARED * float(problem.gram.diagonal().double().abs().mean()):
            loss = _SLACK * lack * problem.weight.double().square().sum(1)
            return (bound - loss).clamp(min=0.0)
    return bound.minimum(certificate.check(problem)).clamp(min=0.0)


def _lack(problem: LayerProblem) -> float:
    """Return θ with G + θI ⪰ 0, with room for the rounding of its check."""
    gram = problem.gram.double()
    trace = float(gram.diagonal().abs().sum())
    if trace == 0:
        return 0.0
    rounding = problem.n * (16 * _UNIT * trace + _UNDERFLOW)
    shifted = gram.clone()
    shifted.diagonal().add_(rounding)
    if int(torch.linalg.cholesky_ex(shifted).info) == 0:
        return 2 * rounding
    return 2 * (rounding + max(0.0, -float(torch.linalg.eigvalsh(gram)[0])))
