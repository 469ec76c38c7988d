"""Relax, harden, round, swap.

With x ∈ [0,1]ⁿ, Σ x = s per group (x = 1: pruned), f(x) = (w⊙x)ᵀG(w⊙x) is convex; its minimum is a
lower bound, and the relaxed solution knows more about which inputs go together than any score.

**The relaxation** is solved by ADMM (Douglas–Rachford with over-relaxation), split as y = w⊙x: the
quadratic in y has the *same* matrix G for all rows, so one Cholesky factorisation of the layer

    A = ρ(2H + ρI)⁻¹,   H = G/√(hhᵀ),   h = √diag(G),

serves every step of every row, and a step is one matrix product over all rows and a projection of
each group onto {0 ≤ x ≤ 1, Σ x = s} in the metric w²h. Accelerated projected gradient (FISTA with
restarts, the best of four diagonal preconditioners) costs the same per step and needs over 300 of
them where this needs 40 to 60: what is hard is the conditioning of G, and here G is inverted once.

**Hardening.** On binary points x = x², so f(x) + Σ μⱼ(xⱼ − xⱼ²) is the same problem for every μ,
and a growing μ bends the relaxed solution towards a mask. In the ADMM step the concave term costs
nothing: with μ = θ·ρw²h/2 the projection of v becomes that of (v − θ/2)/(1 − θ). θ rises from 0 to
`hardness`; near 1 the steps no longer settle. What is rounded then is far closer to a mask. Where it
ends does not depend on where it starts: hardening from the first step on (`max_iterations=0`, which
is what `relax` does as the start of another solver) gives masks as good as after a full relaxation,
but no bound. Its products may be bfloat16, with sums in float32, where that is much faster.

**The bound** is that of Frank–Wolfe, f(x) + min_v ∇f(x)ᵀ(v − x), in float64 with a margin for rounding
and for what a float32 G lacks to be semidefinite: valid at any x, so an unfinished relaxation costs
tightness only. The solution's certificate is x; `verify` computes the bound from it anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.certificate import Certificate
from maskopt.errors import OptionError
from maskopt.fields import option
from maskopt.limits import Limits
from maskopt.problem import LayerProblem
from maskopt.solution import Solution, Status
from maskopt.solver import Capabilities, Solver
from maskopt.solvers.convex.relax_step import make_step
from maskopt.solvers.greedy.select import keep_highest
from maskopt.solvers.rounding.frank_wolfe import linear_bound
from maskopt.solvers.swap import Swap
from maskopt.trace import RelaxTrace, shared_out

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
#: how often θΣw² the bound is lowered by for θ = what G lacks to semidefiniteness: 9/4 suffice
_SLACK = 3.0
#: bytes of a tile's arrays where one tile has the whole device
_TILE_BYTES = 2**31
#: rows that one thread of the CPU works on; fixed, so that no bit depends on threads or memory
_TILE_ROWS = 128
#: n from which bfloat16 products are faster where a CPU has them in hardware
_HALF_FROM = 256


@dataclass(frozen=True)
class Relax(Solver):
    """Relax all rows at once, harden, round, and swap to 1-swap optimality.

    A start is a mask that the answer is never worse than. When the time is over the relaxation stops
    where it is, is rounded, and the swaps have what is left of it. Tells a `RelaxTrace`.
    """

    name: ClassVar[str] = "relax"
    capabilities: ClassVar[Capabilities] = Capabilities(
        start="optional",
        proves="1-swap",
        note="relaxation by ADMM, hardened, rounded, then swap; gives a lower bound",
    )

    tolerance: float = option(
        0.01,
        "stop when the Frank–Wolfe gap, averaged over the rows, is at most this; measured every 20 steps",
        unit="part of the relaxed objective",
        least=0,
    )
    max_iterations: int | None = option(
        None,
        "steps at most; 0: harden at once, and give no bound; None: 200, or 0 as another solver's start",
        unit="steps",
        least=0,
    )
    harden: int = option(
        20,
        "further steps under the growing concave term; 0 rounds the relaxed point",
        unit="steps",
        least=0,
    )
    hardness: float = option(0.85, "θ at the end", least=0, below=1)
    refine: bool | None = option(
        None,
        "end with 1-swap search (else the rounded mask, FEASIBLE); None: yes, but not as another "
        "solver's start",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._steps + self.harden < 1:
            raise OptionError("relax: max_iterations and harden must not both be 0")

    def as_start(self) -> Relax:
        """Whoever starts from the rounded mask swaps by itself and has no use for the bound."""
        steps = 0 if self.max_iterations is None else self.max_iterations
        return replace(self, max_iterations=steps, refine=bool(self.refine))

    @property
    def _steps(self) -> int:
        return 200 if self.max_iterations is None else self.max_iterations

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        """See `Solver.run`."""
        began = time.monotonic()
        plan = _Plan(self.tolerance, self._steps, self.harden, self.hardness)
        memory = None if limits.memory is None else limits.bytes(0)
        relaxed, bound, hard, point, iterations = _relax_all(problem, plan, limits.deadline, memory)
        if plan.max_iterations > 0:
            lack = _SLACK * _lack(problem) * problem.weight.double().square().sum(1)
            bound = (bound - lack).clamp(min=0.0)
        mask = keep_highest(problem, -hard)
        rounded = problem.objective(mask)
        relax_seconds = time.monotonic() - began
        status: tuple[Status, ...] = (Status.FEASIBLE,) * problem.rows
        swaps = torch.zeros(problem.rows, dtype=torch.int64)
        if self.refine is None or self.refine:
            mask, status, swaps = swapped(problem, mask, start, limits)
        elif start is not None:
            mask = better(problem, mask, start)
        positive = (relaxed > 0) & relaxed.isfinite()
        gap = torch.where(positive, 1 - bound / relaxed.where(positive, 1.0), 0.0)
        trace = RelaxTrace(
            iterations=torch.full((problem.rows,), iterations),
            relaxed_objective=relaxed,
            relaxed_gap=gap,
            rounded_objective=rounded,
            swaps=swaps,
            relax_seconds=shared_out(relax_seconds, problem.rows),
            swap_seconds=shared_out(time.monotonic() - began - relax_seconds, problem.rows),
        )
        return Solution.of(
            problem,
            mask,
            status=status,
            lower_bound=bound,
            trace=trace,
            certificate=Certificate.box(problem, point) if plan.max_iterations > 0 else None,
        )


def swapped(
    problem: LayerProblem, mask: Tensor, start: Tensor | None, limits: Limits
) -> tuple[Tensor, tuple[Status, ...], Tensor]:
    """1-swap optima of the rounded masks, and of the start where that alone costs less already."""
    refined = Swap().run(problem, mask, limits)
    mask, status = refined.mask, list(refined.status)
    swaps = refined.trace.swaps  # type: ignore[attr-defined]
    if start is not None:
        worse = problem.objective(start) < refined.objective
        if bool(worse.any()):
            other = Swap().run(problem, start, limits.quiet())
            mask = torch.where(worse[:, None], other.mask, mask)
            status = [other.status[i] if worse[i] else status[i] for i in range(problem.rows)]
    return mask, tuple(status), swaps


def relax(
    problem: LayerProblem, *, tolerance: float = 0.01, max_iterations: int = 200
) -> tuple[Float[Tensor, "rows n"], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """The box relaxation alone: x, f(x) and the Frank–Wolfe bound, the latter two float64."""
    plan = _Plan(tolerance, max_iterations, 0, 0.0)
    relaxed, bound, _, x, _ = _relax_all(problem, plan, math.inf, None)
    return x, relaxed, bound


def _lack(problem: LayerProblem) -> float:
    """θ with G + θI ⪰ 0, with room for the rounding of whoever checks that."""
    gram = problem.gram.double()
    rounding = 16 * problem.n * 2.0**-53 * float(gram.diagonal().abs().sum())
    shifted = gram.clone()
    shifted.diagonal().add_(rounding)
    if rounding == 0 or int(torch.linalg.cholesky_ex(shifted).info) == 0:
        return 2 * rounding
    return 2 * (rounding + max(0.0, -float(torch.linalg.eigvalsh(gram)[0])))


def _factor(
    problem: LayerProblem, dtype: torch.dtype
) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """A, factorised in `dtype`, and h, both in G's. G is scaled to a mean diagonal of 1 throughout."""
    gram = problem.gram.to(dtype)
    diagonal = gram.diagonal().clamp(min=0.0)
    mean = float(diagonal.mean()) or 1.0
    h = (diagonal / mean + _FLOOR).sqrt()
    root = h.sqrt()
    matrix = gram / (mean * root[:, None] * root[None, :])
    rho = _PENALTY * (float(matrix.diagonal().mean()) or 1.0)
    matrix.mul_(2.0).diagonal().add_(rho)
    # one name, so that never more than two matrices of this size live beside G
    matrix = torch.linalg.cholesky(matrix)
    matrix = torch.cholesky_inverse(matrix).mul_(rho)
    return matrix.to(problem.gram.dtype), h.to(problem.gram.dtype)


@dataclass(frozen=True)
class _Plan:
    tolerance: float
    max_iterations: int
    harden: int
    hardness: float


def _relax_all(
    problem: LayerProblem, plan: _Plan, deadline: float, memory_limit: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Of all rows: f(x) and bound, the hardened point, the x that proves the bound, the most steps."""
    # an inexact A moves the point at which the steps settle, and nothing that hardening would notice
    exact = plan.max_iterations > 0 and problem.n <= _DOUBLE_UP_TO
    dtype = torch.float64 if exact else problem.gram.dtype
    factor, metric = _each(lambda _: _factor(problem, dtype), 1, 1)[0]
    row_bytes = 12 * factor.element_size() * problem.n
    on_cpu = problem.device.type == "cpu"
    tile = _TILE_ROWS if on_cpu else max(1, (memory_limit or _TILE_BYTES) // row_bytes)
    half = factor.bfloat16() if on_cpu and _half_is_fast(problem) else None
    starts = range(0, problem.rows, tile)
    threads = 1
    if on_cpu:
        affordable = len(starts) if memory_limit is None else memory_limit // (tile * row_bytes)
        threads = max(1, min(torch.get_num_threads(), len(starts), affordable))

    def work(number: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        part = problem.take(slice(starts[number], starts[number] + tile))
        now = time.monotonic()
        waves = math.ceil((len(starts) - number) / threads)
        with torch.no_grad():
            return _relax(part, factor, half, metric, plan, now + (deadline - now) / waves)

    parts = _each(work, len(starts), threads) if on_cpu else list(map(work, range(len(starts))))
    relaxed, bound, hard, point = (
        torch.cat(column) for column in list(zip(*parts, strict=True))[:4]
    )
    return relaxed, bound, hard, point, max(part[4] for part in parts)


def _each(work: Callable[[int], Any], count: int, threads: int) -> list[Any]:
    """work(0 … count − 1), each with one thread inside torch: products that two threads share may
    differ in their last bits from those of one."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, range(count)))
    finally:
        torch.set_num_threads(before)  # new threads inherit the last value set


def _half_is_fast(problem: LayerProblem) -> bool:
    """Whether bfloat16 products have hardware of their own; then they are 4 to 8 times faster."""
    if problem.n < _HALF_FROM or problem.gram.dtype != torch.float32:
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(kind) for kind in ("amx_bf16", "avx512_bf16"))


def _relax(
    problem: LayerProblem,
    factor: Float[Tensor, "n n"],
    half: Float[Tensor, "n n"] | None,
    metric: Float[Tensor, " n"],
    plan: _Plan,
    deadline: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """f(x) and bound, the hardened point, the x that proves the bound, and the steps made.

    The relaxation's products are of the working dtype, since bfloat16 leaves a gap of its own in the
    bound; hardening's are made with `half` where there is one.
    """
    weight = problem.weight.to(factor.dtype)
    size = weight.abs().amax(1, keepdim=True)
    weight = weight / size.where(size > 0, 1.0)
    q = weight * metric.sqrt()
    mean = q.square().mean(1, keepdim=True).sqrt()
    q = q / mean.where(mean > 0, 1.0)
    share = problem.pruned_per_group / problem.group_size
    inverse = 1.0 / (q.square() + _FLOOR)
    step = make_step(q, inverse, problem.group_size, problem.pruned_per_group)
    product = q * share @ factor
    bound = torch.zeros(problem.rows, dtype=torch.float64, device=weight.device)
    relaxed = torch.full_like(bound, torch.inf)
    point = step.x.clone()
    done = 0
    while done < plan.max_iterations:
        step.advance(product, _OVER_RELAXATION, 0.0)
        product = step.target @ factor
        done += 1
        late = time.monotonic() >= deadline
        due = done >= _MEASURE_FROM and (done - _MEASURE_FROM) % _MEASURE_EVERY == 0
        if due or late or done == plan.max_iterations:
            value, here = linear_bound(problem, step.x)
            point = torch.where((here >= bound)[:, None], step.x, point)
            relaxed, bound = relaxed.minimum(value), bound.maximum(here)
            if late or float((relaxed - bound).sum()) <= plan.tolerance * float(relaxed.sum()):
                break
    for k in range(plan.harden):
        if time.monotonic() >= deadline and done + k > 0:
            break
        step.advance(product, 1.0, plan.hardness * (k + 1) / plan.harden)
        product = step.target @ factor if half is None else (step.target.bfloat16() @ half).float()
    return relaxed, bound, step.x, point, done


def better(problem: LayerProblem, mask: Tensor, other: Tensor) -> Tensor:
    first = problem.objective(mask) <= problem.objective(other)
    return torch.where(first[:, None], mask, other)
