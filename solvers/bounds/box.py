"""`box`: the continuous relaxation; `shift`: the same after the best common diagonal shift."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskopt.bounds import Certificate
from maskopt.errors import OptionError
from maskopt.problem import LayerProblem
from maskopt.solvers.bounds.relaxation import relax


class BoxBound:
    """λ = μ = ν = 0: A = Q. Batched over all rows of a layer, on any device."""

    name = "box"
    largest_n: int | None = None
    note = "continuous relaxation; a whole layer in seconds"

    def unavailable(self) -> str | None:
        return None

    def certify(
        self, problem: LayerProblem, *, steps: int = 200, time_limit: float | None = None
    ) -> tuple[Certificate, dict[str, Any]]:
        """`steps` of accelerated projected gradient; more steps tighten towards the relaxation."""
        x = relax(problem, steps=check_steps(steps), deadline=deadline(time_limit))
        return plain_certificate(problem, torch.zeros_like(x), x), {"steps": steps}


class ShiftBound:
    """λ = −d⊙w² with G − diag(d) ⪰ 0 and Σ c_i d_i as large as a projected ascent makes it.

    `kind="uniform"` takes d = λ_min(G)·1. The weights c_i are the mean over the rows of
    w_i²x_i(1 − x_i) at the box relaxation: what a unit of d_i buys.
    """

    name = "shift"
    largest_n: int | None = None
    note = "box after the best diagonal shift of G, one for all rows"

    def unavailable(self) -> str | None:
        return None

    def certify(
        self,
        problem: LayerProblem,
        *,
        kind: str = "diagonal",
        steps: int = 200,
        time_limit: float | None = None,
    ) -> tuple[Certificate, dict[str, Any]]:
        if kind not in ("diagonal", "uniform"):
            raise OptionError(f"shift: kind must be diagonal or uniform, not {kind!r}")
        end = deadline(time_limit)
        gram = problem.gram.double()
        if kind == "uniform":
            d = torch.full_like(gram.diagonal(), float(torch.linalg.eigvalsh(gram)[0]))
        else:
            x = relax(problem, steps=max(1, check_steps(steps) // 4), deadline=end)
            w = problem.weight.double()
            mass = (w.square() @ gram.diagonal()).clamp(min=1e-300)
            worth = ((x * (1 - x)) * w.square() / mass[:, None]).mean(0)
            d = diagonal_shift(gram, worth)
        d = d.clamp(min=0.0)
        shifted = relax(problem, -d, steps=steps, deadline=end)
        plain = relax(problem, steps=steps, deadline=end)
        square = problem.weight.double().square()
        choices = [
            plain_certificate(problem, -d * square, shifted),
            plain_certificate(problem, torch.zeros_like(plain), plain),
        ]
        # one shift serves all rows on average; a row that it does not serve keeps the plain bound
        first = choices[0].check(problem) >= choices[1].check(problem)
        diagonal = torch.where(first[:, None], choices[0].diagonal, choices[1].diagonal)
        point = torch.where(first[:, None], shifted, plain)
        trace = {"shift": d, "shifted_rows": int(first.sum())}
        return plain_certificate(problem, diagonal, point), trace


def plain_certificate(problem: LayerProblem, diagonal: Tensor, point: Tensor) -> Certificate:
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


def check_steps(steps: int) -> int:
    if steps < 1:
        raise OptionError(f"steps must be at least 1, not {steps}")
    return steps


def deadline(time_limit: float | None) -> float | None:
    if time_limit is None:
        return None
    if not (time_limit >= 0 and np.isfinite(time_limit)):
        raise OptionError(f"time_limit must be at least 0 seconds, not {time_limit}")
    return time.perf_counter() + time_limit
