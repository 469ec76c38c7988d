"""The Frank–Wolfe bound of every row at once: f(x) + min_v ∇f(x)ᵀ(v − x) over legal v, at any point x, as far
as G is positive semidefinite; `provable` takes off what a float32 G lacks to that."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.certificates.certificate import Certificate, evenly
from maskopt.core.problem import LayerProblem
from maskopt.solvers.greedy.scores import keep_highest

#: how often θΣw² the bound is lowered by for θ = what G lacks to semidefiniteness: 9/4 suffice
_SLACK = 3.0
#: of an operation, what a check leaves for numbers too small to be distinguished
_UNDERFLOW = 1e-300
#: up to this part of G's mean diagonal the check makes good what G lacks for all rows at once
_SHARED = 1e-4
_UNIT = 2.0**-53


def linear_bound(
    problem: LayerProblem,
    x: Float[Tensor, "rows n"],
    diagonal: Float[Tensor, "rows n"] | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """f(x) and the bound, float64, of f(x) = xᵀQx with its linear part, plus Σ λᵢ(xᵢ² − xᵢ), 0 on every mask;
    `diagonal`: λ, float64.

    Valid at every x where Q + diag(λ) is positive semidefinite. The bound is lowered by a margin for the
    rounding of float64 sums, n·2⁻⁵² of the terms' sizes.
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
    """Bounds of f lowered to what the check of their certificate can find: of several rows by θw² for what G
    lacks; for a single row, or a G far from semidefinite, where one large weight can cost more, by that check
    itself."""
    if problem.rows > 1 and not problem.shared_budget:
        lack = _lack(problem)
        if lack <= _SHARED * float(problem.gram.diagonal().double().abs().mean()):
            loss = _SLACK * lack * problem.weight.double().square().sum(1)
            return (bound - loss).clamp(min=0.0)
    return bound.minimum(certificate.check(problem)).clamp(min=0.0)


def _lack(problem: LayerProblem) -> float:
    """θ with G + θI ⪰ 0, with room for the rounding of whoever checks that."""
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
