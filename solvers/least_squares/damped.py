"""Solvers that choose for updated weights, whether or not the problem updates them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from maskopt.core.fields import option
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.problem import LayerProblem
from maskopt.protocol.solver import Solver


@dataclass(frozen=True)
class Scaled:
    """A problem of updated weights with its inputs scaled to A_jj = 1: F = min {vᵀAv − 2bᵀv + C}. √A_jj
    before (`size` [n]), A [n, n], b (`target` [rows, n]) and C [rows], float64."""

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
        """The problem that the mask is chosen for."""
        if problem.update is not None:
            return problem
        return problem.with_update(LeastSquaresUpdate(self.damping, self.power))

    def as_start(self, layer: LayerProblem) -> tuple[Solver, LayerProblem]:
        """F of its mask is not asked for."""
        if layer.update is None:
            return self, layer
        how = {"damping": layer.update.damping, "power": layer.update.power}
        return replace(self, **how), layer.with_update(None)
