"""What a solver answers: a mask, what it costs, and what is proven about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskopt.problem import LayerProblem, RowProblem


class Status(StrEnum):
    """What is proven about one row's mask."""

    OPTIMAL = "optimal"
    """No legal mask is better by more than OPTIMAL_TOLERANCE of the objective."""
    SWAP_OPTIMAL = "swap-optimal"
    """No legal 1-swap lowers the objective by more than `swap_threshold`."""
    FEASIBLE = "feasible"
    """The mask is legal; nothing else is claimed."""


#: SWAP_OPTIMAL holds up to this part of the row's objective
SWAP_TOLERANCE = 1e-6
#: … or up to this part of Σⱼ wⱼ²Gⱼⱼ, the float64 rounding of the terms of a swap
SWAP_FLOOR = 1e-13
#: OPTIMAL holds up to this part of the row's objective (feasibility tolerances of exact solvers)
OPTIMAL_TOLERANCE = 1e-6


def swap_threshold(
    objective: Float[Tensor, " rows"],
    diagonal_mass: Float[Tensor, " rows"],
    tolerance: float = SWAP_TOLERANCE,
) -> Float[Tensor, " rows"]:
    """The least decrease that counts as an improving swap, float64 [rows].

    Relative to the objective, with a floor where the objective is nothing but rounding: then a swap
    cannot be told from noise. Both terms scale with w² and with G, so the definition has no units.
    """
    return tolerance * objective + SWAP_FLOOR * diagonal_mass


@dataclass(frozen=True)
class Solution:
    """One mask a row, with its objective and with what is known about it.

    Attributes:
        mask: bool [rows, n], True = kept.
        objective: float64 [rows], f of the mask on the given G.
        lower_bound: float64 [rows], no legal mask has a smaller objective; 0 where none is known.
        status: per row OPTIMAL, SWAP_OPTIMAL or FEASIBLE.
        solver: name of the solver that answered.
        seconds: wall-clock time of the solve, warm start included.
        trace: what the solver has to tell: kernel, swaps, full scans, nodes, … (see each solver).
        certificate: what proves the lower bound to `verify`, if it can be re-checked.
    """

    mask: Bool[Tensor, "rows n"]
    objective: Float[Tensor, " rows"]
    lower_bound: Float[Tensor, " rows"]
    status: tuple[Status, ...]
    solver: str = ""
    seconds: float = math.nan
    trace: dict[str, Any] = field(default_factory=dict)
    certificate: Any = None

    @property
    def gap(self) -> Float[Tensor, " rows"]:
        """(objective − lower_bound) / objective per row, float64; 0 where the objective is 0."""
        positive = self.objective > 0
        safe = torch.where(positive, self.objective, 1.0)
        return torch.where(positive, (self.objective - self.lower_bound) / safe, 0.0)

    @classmethod
    def of(
        cls,
        problem: LayerProblem | RowProblem,
        mask: Bool[Tensor, "rows n"],
        *,
        solver: str = "",
        status: Status | Sequence[Status] = Status.FEASIBLE,
        lower_bound: Float[Tensor, " rows"] | None = None,
        seconds: float = math.nan,
        trace: dict[str, Any] | None = None,
        certificate: Any = None,
    ) -> Solution:
        """A Solution with the float64 objective computed from the mask.

        A lower bound above the objective by rounding alone is cut back to it.
        """
        layer = problem.as_layer() if isinstance(problem, RowProblem) else problem
        mask = mask.reshape(layer.weight.shape)
        objective = layer.objective(mask)
        if lower_bound is None:
            lower_bound = torch.zeros_like(objective)
        else:
            bound = lower_bound.to(objective)
            rounding = OPTIMAL_TOLERANCE * objective + SWAP_FLOOR * layer.diagonal_mass()
            bound = torch.where(bound <= objective + rounding, bound.minimum(objective), bound)
            lower_bound = bound.clamp(min=0.0)
        return cls(
            mask=mask,
            objective=objective,
            lower_bound=lower_bound,
            status=(status,) * layer.rows if isinstance(status, Status) else tuple(status),
            solver=solver,
            seconds=seconds,
            trace=trace or {},
            certificate=certificate,
        )

    def __repr__(self) -> str:
        counts = {s: self.status.count(s) for s in Status if s in self.status}
        shown = ", ".join(f"{count} {name}" for name, count in counts.items())
        return (
            f"Solution({self.solver}, rows={len(self.status)}, "
            f"objective={float(self.objective.sum()):.6g}, "
            f"lower_bound={float(self.lower_bound.sum()):.6g}, {shown}, {self.seconds:.3g} s)"
        )
