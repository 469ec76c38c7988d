"""Solvers that choose for updated weights, whether or not the problem updates them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from maskopt.core.fields import option
from maskopt.core.least_squares import Refit
from maskopt.core.problem import LayerProblem
from maskopt.protocol.solver import Solver


@dataclass(frozen=True)
class Damped(Solver):
    """The options of the update for a problem that keeps its weights."""

    damping: float = option(
        Refit.damping,
        "λ, of a problem that keeps its weights",
        unit="of G's mean diagonal",
        least=0,
    )
    power: float = option(
        Refit.power,
        "of such a problem, how far λ goes with an input's own part of G's diagonal",
        least=0,
        most=1,
    )

    def refitted(self, problem: LayerProblem) -> LayerProblem:
        """The problem that the mask is chosen for."""
        if problem.refit is not None:
            return problem
        return problem.refitting(Refit(self.damping, self.power))

    def as_start(self, layer: LayerProblem) -> tuple[Solver, LayerProblem]:
        """F of its mask is not asked for."""
        if layer.refit is None:
            return self, layer
        how = {"damping": layer.refit.damping, "power": layer.refit.power}
        return replace(self, **how), layer.refitting(None)
