"""The options of a distillation; those of the walk are a prune's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from maskopt.errors import OptionError
from maskopt.models.options.walk import MACHINE, MASKS, TEXT, WalkOptions, described, option_field

#: of the walk's options, those that say nothing of a model that is trained as a whole
NOT_HERE = (
    *("include", "exclude", "calibrate_on", "true_sequential", "all_experts"),
    *("skip_bad_samples", "token_weights", "dtype"),
)


@dataclass(frozen=True, kw_only=True)
class DistillOptions(WalkOptions):
    """Everything but models, text and output that `distill_model` can be told.

    Raises:
        MaskoptError: a value that cannot be.
    """

    # the fitted loss of windows that a prune trained its blocks on is low already, and teaches less
    seed: int = option_field(
        1,
        MASKS,
        "Random seed of the windows and their order; better not that of the prune, for other "
        "windows.",
    )
    epochs: int = option_field(2, MASKS, "Epochs over the windows.", least=1)
    batch: int = option_field(2, MASKS, "Windows per step.", least=1)
    learning_rate: float = option_field(
        0.0003,
        MASKS,
        "Of AdamW at its highest, in parts of the root mean square of a matrix's kept weights.",
        least=0,
    )
    weight_decay: float = option_field(0.0, MASKS, "Of AdamW.", least=0)
    holdout: float = option_field(
        0.1,
        MASKS,
        "Share of the windows that are held out to judge every epoch.",
        least=0,
        below=1,
    )
    samples: int = option_field(64, TEXT, "Windows of text.", least=1)
    seq_len: int = option_field(
        512, TEXT, "Tokens in a window; never more than the model has positions.", least=2
    )
    # what is trained is float32, whatever it is stored in
    dtype: str = option_field("float32", MASKS, "Precision of the passes.", choices=("float32",))
    recompute: bool = option_field(
        False,
        MACHINE,
        "Keep for gradients only what enters each block, and compute the rest again: less memory, more time.",
    )

    save_every: float = option_field(
        10.0, MACHINE, "Minutes from one save to the next, for `resume`; 0: none.", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in NOT_HERE:
            if getattr(self, name) != _DEFAULTS[name]:
                raise OptionError(f"all kept weights are trained, in float32; leave out `{name}`")

    def record(self) -> dict[str, Any]:
        """What decides the weights, as JSON values."""
        fields = [f for f in dataclasses.fields(self) if f.name not in NOT_HERE]
        return {f.name: getattr(self, f.name) for f in fields if f.metadata["decides"] == MASKS}


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(DistillOptions)}
DistillOptions.__doc__ = described(DistillOptions)
