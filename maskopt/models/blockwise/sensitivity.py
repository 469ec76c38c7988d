"""What the error of a row or of a layer counts beside the others', where they trade.

By the squared gradients of the loss, half of Σᵣ squaresᵣ fᵣ is what errors fᵣ cost each token of text, to
second order and with the diagonal of the empirical Fisher matrix for the loss's curvature.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.core.problem import LayerProblem
from maskopt.models.options.prune import FISHER, RELATIVE

if TYPE_CHECKING:
    from maskopt.models.blockwise.gradients import Gradients

#: of the mean of a layer's rows: what each counts at least, so that none is pruned away
_LEAST = 1e-3


def row_sensitivity(
    problem: LayerProblem, sensitivity: str, gradients: Gradients | None, *, of_layer: bool
) -> Float[Tensor, " rows"]:
    """What each row's error counts, float64, in units that all layers have in common.

    Args:
        gradients: of the loss, for `fisher`; a layer that it does not depend on counts nothing.
        of_layer: `relative` is to the layer's energy; else to each row's own.
    """
    energy = problem.output_energy()
    alike = torch.ones_like(energy)
    if sensitivity == RELATIVE:
        whole = energy.sum().expand_as(energy) if of_layer else energy
        return alike / whole.clamp(min=_LEAST * float(whole.mean()) or 1.0)
    if sensitivity == FISHER:
        assert gradients is not None
        squares = gradients.squares.get(problem.name)
        return 0 * alike if squares is None else squares.to(energy) / 2
    return alike


def counting(problem: LayerProblem, sensitivity: str, gradients: Gradients | None) -> LayerProblem:
    """The same problem, and where its rows trade, what each counts: 1 in the mean."""
    if not problem.pooled:
        return problem
    omega = row_sensitivity(problem, sensitivity, gradients, of_layer=False)
    mean = float(omega.mean())
    return problem.counting((omega / mean).clamp(min=_LEAST) if mean > 0 else None)
