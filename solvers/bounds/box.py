"""`box`: the continuous relaxation; `shift`: the same after the best common diagonal shift."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.certificates.certificate import Certificate
from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.protocol.bounds import BoundMethod
from maskopt.protocol.trace import Trace
from maskopt.solvers.convex.box import BoxPlan, relax_box

#: the barrier's part κ falls by this from round to round, of so many rounds and Newton steps in each
_FALL, _ROUNDS, _NEWTON = 0.3, 12, 4
#: a round ends where a Newton step gains less than this part of κ, all where κn is this part of the shift
_SETTLED, _DONE = 0.1, 1e-4
#: part of the way to the boundary that a step goes at most, and what a step too long is shortened by
_REACH, _SHORTER = 0.9, 0.7
_SHORTEST = 1e-6
#: what G gets on its diagonal at least, in units of its mean, so that it can be inverted
_RIDGE = 1e-9


@dataclass(frozen=True)
class BoxBound(BoundMethod):
    """The continuous relaxation, λ = μ = ν = 0 and A = Q, of all rows of a layer at once, on any device."""

    name: ClassVar[str] = "box"
    shared_budget: ClassVar[bool] = True
    note: ClassVar[str] = "continuous relaxation; a whole layer in seconds"

    steps: int = option(200, "steps of a relaxation at most; more tighten towards it", least=1)
    tolerance: float = option(
        0.001,
        "stop when the gap to the relaxation, averaged over the rows, is at most this",
        unit="part of the bound",
        least=0,
    )

    def certify(self, problem: LayerProblem, limits: Limits) -> tuple[Certificate, Trace]:
        box = relax_box(problem, BoxPlan(self.tolerance, self.steps), limits)
        point = box.point.double()
        trace = Trace(iterations=box.iterations, relaxed=point.cpu())
        return Certificate.box(problem, point), trace


@dataclass(frozen=True)
class ShiftBound(BoxBound):
    """The continuous relaxation after a diagonal shift, λ = −d⊙w² with G − diag(d) ⪰ 0.

    Of `kind="uniform"` d = λ_min(G)·1; else a barrier method makes Σ c_i d_i large, c_i being the mean over
    the rows of w_i²x_i(1 − x_i) at the box relaxation. One shift serves all rows. Rows that it does not serve
    keep the plain bound, as all rows do after the time limit.
    """

    name: ClassVar[str] = "shift"
    note: ClassVar[str] = "box after the best diagonal shift of G, one for all rows"

    kind: str = option("diagonal", "of the shift", choices=("diagonal", "uniform"))

    def certify(self, problem: LayerProblem, limits: Limits) -> tuple[Certificate, Trace]:
        plan = BoxPlan(self.tolerance, self.steps)
        plain = shifted = relax_box(problem, plan, limits)
        gram, w, iterations = problem.gram.double(), problem.weight.double(), plain.iterations
        d = torch.zeros_like(gram.diagonal())
        if not limits.expired:
            if self.kind == "uniform":
                d += float(torch.linalg.eigvalsh(gram)[0])
            else:
                x = plain.point.double()
                mass = (w.square() @ gram.diagonal()).clamp(min=1e-300)
                worth = ((x * (1 - x)) * w.square() / mass[:, None]).mean(0)
                d = diagonal_shift(gram, worth, limits)
            shifted = relax_box(problem, plan, limits, d)
            iterations = iterations + shifted.iterations
        # row by row the form that proves more
        used = shifted.bound > plain.bound
        diagonal = torch.where(used[:, None], -d * w.square(), 0.0)
        point = torch.where(used[:, None], shifted.point, plain.point).double()
        words = tuple("yes" if row else "no" for row in used.tolist())
        trace = Trace(iterations=iterations, shifted=words, relaxed=point.cpu())
        return replace(Certificate.box(problem, point), diagonal=diagonal), trace


def diagonal_shift(gram: Tensor, worth: Tensor, limits: Limits) -> Tensor:
    """Return d with G − diag(d) ⪰ 0, up to rounding, and Σ worth·d large; entries may be negative.

    The log-barrier Σ worth·d + κ·log det(G − diag d) has the stationary condition
    κ·diag((G − diag d)⁻¹) = worth. Newton steps on it, κ falling; each costs one inverse.
    """
    n = len(gram)
    scale = float(gram.diagonal().mean()) or 1.0
    g = gram / scale
    ridge = _ridge(g)
    g.diagonal().add_(ridge)
    c = (worth / (float(worth.sum()) or 1.0)).clamp(min=1e-6 / n)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(g)).diagonal()
    d = 0.5 / (n * inverse)
    kappa = float((c / inverse).mean())
    for _ in range(_ROUNDS):
        for _ in range(_NEWTON):
            step, gain = _newton_step(g, d, c, kappa)
            if step is None or limits.expired:
                return (d - ridge) * scale
            d = d + step
            if gain < _SETTLED * kappa:
                break
        kappa *= _FALL
        if kappa * n < _DONE * float((c * d).sum()):
            break
    return (d - ridge) * scale


def _ridge(g: Tensor) -> float:
    """Return what to add to the diagonal of G, in units of its mean, so that it is safely definite."""
    shifted = g.clone()
    shifted.diagonal().add_(_RIDGE)
    if int(torch.linalg.cholesky_ex(shifted).info) == 0:
        return _RIDGE
    # a G in float32 may lack something to semidefiniteness
    return 2 * (_RIDGE - float(torch.linalg.eigvalsh(g)[0]))


def _newton_step(g: Tensor, d: Tensor, c: Tensor, kappa: float) -> tuple[Tensor | None, float]:
    """Return a step that stays inside, None where none does, and the gain of a whole step."""
    m = g - torch.diag(d)
    factor, broken = torch.linalg.cholesky_ex(m)
    if int(broken):  # so near the boundary that rounding passes it
        return None, 0.0
    inverse = torch.cholesky_inverse(factor)
    gradient = c - kappa * inverse.diagonal()
    step = torch.linalg.solve(kappa * inverse.square(), gradient)
    length = 1.0
    while int(torch.linalg.cholesky_ex(m - torch.diag(length / _REACH * step)).info):
        length *= _SHORTER
        if length < _SHORTEST:
            return None, 0.0
    return length * step, float((gradient * step).sum())
