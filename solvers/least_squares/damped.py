"""Solvers that choose for updated weights, whether or not the problem updates them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from maskopt.core.fields import option
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.problem import LayerProblem
from maskopt.protocol.solver import Solver


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
