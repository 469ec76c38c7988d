"""`refit`: the best weights on what any mask keeps, whatever it was chosen for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskopt.core.least_squares import Refit
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem, RowProblem


@dataclass(frozen=True)
class Refitted:
    """A layer's weights after the least squares.

    Attributes:
        weight: float64 [rows, n], zero where the mask prunes.
        error: float64 [rows], mean square of the outputs' distance to their targets.
        residual: float64 [rows], ‖b − Av‖/‖b‖ of the normal equations Av = b; far from 0 where a row kept its
            weights, since least squares could not improve them.
    """

    weight: Float[Tensor, "rows n"]
    error: Float[Tensor, " rows"]
    residual: Float[Tensor, " rows"]


def refit(
    problem: LayerProblem | RowProblem,
    mask: Bool[Tensor, "rows n"],
    *,
    damping: float | None = None,
    power: float | None = None,
    limits: Limits | None = None,
) -> Refitted:
    """The best weights on what a mask keeps; no row's error is above f.

    Args:
        mask: legal, True = kept.
        damping, power: as in `Refit`; None: the problem's own, or the defaults of `Refit`.
        limits: memory and threads.

    Raises:
        OptionError: a damping below 0, a power beyond 0 to 1. ProblemError: a G that is not definite with it.
        WarmStartError: a mask that is not legal.
    """
    layer = problem.as_layer()
    mask = layer.check_mask(mask)
    how = layer.refit or Refit()
    damping = how.damping if damping is None else damping
    layer = layer.refitting(Refit(damping, how.power if power is None else power))
    weight, own = layer.weights(mask, limits), torch.where(mask, layer.weight.double(), 0.0)
    error, own_error = layer.error(weight), layer.error(own)
    # rounding: of rows that least squares cannot better, the weights stay
    worse = ~(error <= own_error)
    weight = torch.where(worse[:, None], own, weight)
    squares = layer.least_squares
    target = squares.target(layer.weight, layer.correlation)
    return Refitted(weight, error.where(~worse, own_error), squares.residual(weight, target, mask))
