"""The options of a model that is made smaller; those of the walk are a prune's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from maskopt.core.least_squares import Refit
from maskopt.errors import OptionError
from maskopt.models.options.prune import LEAST_SQUARES, NONE
from maskopt.models.options.solver import check_solver
from maskopt.models.options.walk import MASKS, WalkOptions, about, described, option_field

#: of the walk's options, those that do not matter where all blocks are cut alike
NOT_HERE = ("include", "exclude", "token_weights", "all_experts")


@dataclass(frozen=True)
class ShrinkOptions(WalkOptions):
    """Everything but model, text and output that `shrink_model` can be told.

    Raises:
        MaskoptError: a value that cannot be, nothing to remove, an unknown solver or an option that it lacks.
    """

    channels: float = option_field(
        0.0, MASKS, "Share of every MLP's channels to remove.", least=0, below=1
    )
    heads: float = option_field(
        0.0, MASKS, "Share of every attention's heads to remove.", least=0, below=1
    )
    round_to: int = option_field(
        1, MASKS, "Keep a multiple of this number of channels; engines like 64.", least=1
    )
    solver: str = option_field("swap", MASKS, "Chooses channels; see `maskopt solvers`.")
    solver_options: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=about(MASKS, "Solver option, NAME=VALUE; may be repeated."),
    )
    update: str = option_field(
        LEAST_SQUARES,
        MASKS,
        "How kept columns are updated. least-squares: solved again by least squares; none: unchanged.",
        choices=(NONE, LEAST_SQUARES),
    )
    damping: float = option_field(
        Refit.damping,
        MASKS,
        "With `update` least-squares, penalty that keeps weights near their values, relative to the "
        "mean of diag(G).",
        least=0,
    )
    certify: bool = option_field(
        False,
        MASKS,
        "Bound how far each choice of channels is from the best; up to a minute each.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "solver_options", dict(self.solver_options))
        if not self.channels and not self.heads:
            raise OptionError("nothing is to be removed; give `channels` or `heads`, such as 0.25")
        for name in NOT_HERE:
            if getattr(self, name) != getattr(WalkOptions, name):
                raise OptionError(
                    f"all blocks are pruned in the same way, on all tokens; leave out `{name}`"
                )
        if not self.channels:
            for name in ("solver", "solver_options", "round_to", "certify"):
                if getattr(self, name) != _DEFAULTS.get(name, {}):
                    raise OptionError(
                        f"`{name}` is of channels, and heads are proven; give `channels`, or leave it out"
                    )
        if self.update == NONE and self.damping != Refit.damping:
            raise OptionError("`damping` is of refitted weights; leave it out with `update` none")
        check_solver(self.solver, self.solver_options, None)

    @property
    def how(self) -> Refit | None:
        """How kept columns are refitted, in one system for all rows; None: they stay."""
        return Refit(self.damping) if self.update == LEAST_SQUARES else None

    def record(self) -> dict[str, Any]:
        """What decides the choice, as JSON values: for the manifest."""
        fields = [f for f in dataclasses.fields(self) if f.name not in NOT_HERE]
        names = [f.name for f in fields if f.metadata["decides"] == MASKS]
        values = {name: getattr(self, name) for name in names}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


_DEFAULTS = {
    f.name: f.default for f in dataclasses.fields(ShrinkOptions) if f.name != "solver_options"
}
ShrinkOptions.__doc__ = described(ShrinkOptions)
