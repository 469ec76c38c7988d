"""`box`: the continuous relaxation; `shift`: the same after the best common diagonal shift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.bounds import BoundMethod
from maskopt.certificate import Certificate
from maskopt.fields import option
from maskopt.limits import Limits
from maskopt.problem import LayerProblem
from maskopt.solvers.bounds.relaxation import relax
from maskopt.trace import BoundTrace


@dataclass(frozen=True)
class BoxBound(BoundMethod):
    """λ = μ = ν = 0: A = Q. Batched over all rows of a layer, on any device."""

    name: ClassVar[str] = "box"
    largest_n: ClassVar[int | None] = None
    note: ClassVar[str] = "continuous relaxation; a whole layer in seconds"

    steps: int = option(200, "steps at most; more tighten towards the relaxation", least=1)

    def certify(self, problem: LayerProblem, limits: Limits) -> tuple[Certificate, BoundTrace]:
        """See `BoundMethod.certify`."""
        x = relax(problem, steps=self.steps, limits=limits)
        return Certificate.box(problem, x), BoundTrace(relaxed=x)


@dataclass(frozen=True)
class ShiftBound(BoundMethod):
    """λ = −d⊙w² with G − diag(d) ⪰ 0 and Σ c_i d_i as large as a projected ascent makes it.

    `kind="uniform"` takes d = λ_min(G)·1. The weights c_i are the mean over the rows of
    w_i²x_i(1 − x_i) at the box relaxation: what a unit of d_i buys.
    """

    name: ClassVar[str] = "shift"
    largest_n: ClassVar[int | None] = None
    note: ClassVar[str] = "box after the best diagonal shift of G, one for all rows"

    kind: str = option("diagonal", "of the shift", choices=("diagonal", "uniform"))
    steps: int = option(200, "steps of each relaxation at most", least=1)

    def certify(self, problem: LayerProblem, limits: Limits) -> tuple[Certificate, BoundTrace]:
        """See `BoundMethod.certify`."""
        gram = problem.gram.double()
        if self.kind == "uniform":
            d = torch.full_like(gram.diagonal(), float(torch.linalg.eigvalsh(gram)[0]))
        else:
            x = relax(problem, steps=max(1, self.steps // 4), limits=limits)
            w = problem.weight.double()
            mass = (w.square() @ gram.diagonal()).clamp(min=1e-300)
            worth = ((x * (1 - x)) * w.square() / mass[:, None]).mean(0)
            d = diagonal_shift(gram, worth)
        d = d.clamp(min=0.0)
        shifted = relax(problem, -d, steps=self.steps, limits=limits)
        plain = relax(problem, steps=self.steps, limits=limits)
        square = problem.weight.double().square()
        choices = [
            shifted_certificate(problem, -d * square, shifted),
            Certificate.box(problem, plain),
        ]
        # one shift serves all rows on average; a row that it does not serve keeps the plain bound
        first = choices[0].check(problem) >= choices[1].check(problem)
        diagonal = torch.where(first[:, None], choices[0].diagonal, choices[1].diagonal)
        point = torch.where(first[:, None], shifted, plain)
        words = tuple("yes" if used else "no" for used in first.tolist())
        return (
            shifted_certificate(problem, diagonal, point),
            BoundTrace(shifted=words, relaxed=point),
        )


def shifted_certificate(problem: LayerProblem, diagonal: Tensor, point: Tensor) -> Certificate:
    groups = problem.n // problem.group_size
    penalty = torch.zeros(problem.rows, groups, dtype=torch.float64, device=problem.device)
    return Certificate(diagonal, penalty, point)


def diagonal_shift(gram: Tensor, worth: Tensor, rounds: int = 12) -> Tensor:
    """d ≥ 0 with G − diag(d) ⪰ 0 (up to rounding) and Σ worth·d large.

    The log-barrier Σ worth·d + κ·log det(G − diag d) has the stationary condition
    κ·diag((G − diag d)⁻¹) = worth. Newton steps on it, κ falling; each costs one inverse.
    """
    n = len(gram)
    scale = float(gram.diagonal().mean()) or 1.0
    g = gram / scale
    ridge = 1e-9
    g = g + ridge * torch.eye(n, dtype=g.dtype, device=g.device)
    c = worth / (float(worth.sum()) or 1.0)
    c = c.clamp(min=1e-6 / n)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(g))
    d = 0.5 / (n * inverse.diagonal())
    kappa = float((c / inverse.diagonal()).mean())
    for _ in range(rounds):
        for _ in range(4):
            m = g - torch.diag(d)
            factor = torch.linalg.cholesky(m)
            inverse = torch.cholesky_inverse(factor)
            hessian = kappa * inverse.square()
            gradient = c - kappa * inverse.diagonal()
            step = torch.linalg.solve(hessian, gradient)
            length = 1.0
            while int(torch.linalg.cholesky_ex(m - torch.diag(length / 0.9 * step)).info):
                length *= 0.7
                if length < 1e-6:
                    return (d * scale).clamp(min=0.0)
            d = d + length * step
            if float((gradient * step).sum()) < 0.1 * kappa:
                break
        kappa *= 0.3
        if kappa * n < 1e-4 * float((c * d).sum()):
            break
    return ((d - ridge) * scale).clamp(min=0.0)
