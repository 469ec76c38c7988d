"""The weights that a mask keeps, updated by least squares (`maskopt.core.least_squares`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem, RowProblem


@dataclass(frozen=True)
class UpdatedWeights:
    """A layer's weights after least squares.

    Attributes:
        weight: float64 [rows, n], zero where the mask prunes.
        error: float64 [rows], mean squared distance of the outputs to their targets.
        residual: float64 [rows], ‖b − Av‖/‖b‖ of the normal equations Av = b; far from 0 in rows that keep
            their weights because least squares did not improve them.
    """

    weight: Float[Tensor, "rows n"]
    error: Float[Tensor, " rows"]
    residual: Float[Tensor, " rows"]


def update_weights(
    problem: LayerProblem | RowProblem,
    mask: Bool[Tensor, "rows n"],
    *,
    damping: float | None = None,
    power: float | None = None,
    limits: Limits | None = None,
) -> UpdatedWeights:
    """The best weights on what a mask keeps; the error of no row is above f.

    Args:
        mask: legal, True = kept.
        damping: as in `LeastSquaresUpdate`; None: that of the problem, or the default.
        power: likewise.
        limits: memory and threads.

    Raises:
        OptionError: a damping below 0, a power beyond 0 to 1. ProblemError: a G that is not definite with it.
        WarmStartError: a mask that is not legal.
    """
    layer = problem.as_layer()
    mask = layer.check_mask(mask)
    how = layer.update or LeastSquaresUpdate()
    damping = how.damping if damping is None else damping
    layer = layer.with_update(LeastSquaresUpdate(damping, how.power if power is None else power))
    weight, own = layer.weights(mask, limits), torch.where(mask, layer.weight.double(), 0.0)
    error, own_error = layer.error(weight), layer.error(own)
    # rounding: of rows that least squares cannot better, the weights stay
    worse = ~(error <= own_error)
    weight = torch.where(worse[:, None], own, weight)
    squares = layer.least_squares
    target = squares.target(layer.weight, layer.correlation)
    return UpdatedWeights(
        weight, error.where(~worse, own_error), squares.residual(weight, target, mask)
    )
