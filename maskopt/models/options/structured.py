"""The options of structured pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maskopt.core.fields import CALIBRATION, SELECTION, UPDATE, check_needs, option
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.errors import OptionError
from maskopt.models.options.prune import LEAST_SQUARES, NONE
from maskopt.models.options.walk import (
    PassOptions,
    RunOptions,
    check_solver,
    described,
)


@dataclass(frozen=True)
class ShrinkOptions(RunOptions, PassOptions):
    """All options of `shrink_model` but model, text and output.

    Raises:
        MaskoptError: a value that is not allowed, nothing to remove, an unknown solver or solver option.
    """

    channels: float = option(
        0.0,
        "Share of the channels to remove from every MLP.",
        SELECTION,
        least=0,
        below=1,
        shown=True,
    )
    heads: float = option(
        0.0,
        "Share of the heads to remove from every attention.",
        SELECTION,
        least=0,
        below=1,
        shown=True,
    )
    blocks: int = option(
        0,
        "Number of decoder blocks to remove, scored by the change of the model output without each block and "
        "each pair.",
        SELECTION,
        least=0,
        shown=True,
    )
    windows: int = option(
        4,
        "Number of calibration windows that score the blocks.",
        CALIBRATION,
        least=1,
        needs=("blocks",),
    )
    round_to: int = option(
        1,
        "Keep a multiple of this number of channels; 64 suits most inference engines.",
        SELECTION,
        least=1,
        needs=("channels",),
    )
    solver: str = option(
        "swap",
        "Solver that chooses channels; see `maskopt solvers`.",
        SELECTION,
        needs=("channels",),
        shown=True,
    )
    solver_options: Mapping[str, Any] = option(
        dict, "Solver option; may be repeated.", SELECTION, needs=("channels",)
    )
    update: str = option(
        LEAST_SQUARES,
        "How kept columns are updated. none: unchanged; least-squares: solved together.",
        UPDATE,
        choices=(NONE, LEAST_SQUARES),
        shown=True,
    )
    damping: float = option(
        LeastSquaresUpdate.damping,
        "Strength of the penalty on changes of kept weights, relative to the mean of diag(G).",
        UPDATE,
        least=0,
        needs=("update", LEAST_SQUARES),
    )
    certify: bool = option(
        False,
        "Compute a lower bound for each choice of channels; up to a minute each.",
        SELECTION,
        needs=("channels",),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_passes()
        object.__setattr__(self, "solver_options", dict(self.solver_options))
        if not self.channels and not self.heads:
            raise OptionError("nothing is to be removed; give `channels` or `heads`, such as 0.25")
        check_needs(self)
        check_solver(self.solver, self.solver_options, None)

    @property
    def how(self) -> LeastSquaresUpdate | None:
        """Update of kept columns, in one system for all rows; None: unchanged columns."""
        return LeastSquaresUpdate(self.damping) if self.update == LEAST_SQUARES else None


ShrinkOptions.__doc__ = described(ShrinkOptions)
