"""The options of blockwise training and of distillation."""

from dataclasses import dataclass
from typing import ClassVar

from maskopt.core.fields import (
    CALIBRATION,
    RUNTIME,
    TEXT,
    TRAINING,
    check_options,
    option,
    options_of,
)
from maskopt.models.options.walk import WalkOptions, described

#: of `train`
WEIGHTS, ALL = TRAINED = ("weights", "all")


@dataclass(frozen=True)
class Reconstruction:
    """How kept weights are trained; OptionError for a value that cannot be."""

    train: str = option(
        WEIGHTS,
        "what is trained; weights: kept weights; all: the block's norms and biases, too",
        choices=TRAINED,
    )
    begin: str = option(
        "none",
        "update of the kept weights that training starts from",
        choices=("none", "least-squares"),
    )
    epochs: int = option(4, "over the windows", least=1)
    batch: int = option(2, "windows of a step", least=1)
    learning_rate: float = option(
        0.01,
        "of AdamW at its highest, in parts of the root mean square of what is trained of a matrix; a tenth "
        "for norms and biases",
        least=0,
    )
    weight_decay: float = option(0.0, "of AdamW, on matrices", least=0)

    def __post_init__(self) -> None:
        check_options(self, "training")


@dataclass(frozen=True, kw_only=True)
class DistillOptions(WalkOptions):
    """All options of `distill_model` but models, text and output.

    Raises:
        MaskoptError: a value that is not allowed.
    """

    absent: ClassVar[tuple[str, ...]] = (
        *("include", "exclude", "calibrate_on", "true_sequential", "all_experts"),
        *("skip_bad_samples", "token_weights", "dtype"),
    )
    absent_because: ClassVar[str] = "all kept weights are trained, in float32"

    # windows on which a prune trained its blocks have a low loss already, and teach less
    seed: int = option(
        1,
        "Random seed of the windows and their order; use another one than the prune, for other windows.",
        CALIBRATION,
    )
    epochs: int = option(2, "Passes over the windows.", TRAINING, least=1, shown=True)
    batch: int = option(2, "Windows per step.", TRAINING, least=1, shown=True)
    learning_rate: float = option(
        0.0003,
        "Peak learning rate of AdamW, relative to the root mean square of a matrix's kept weights.",
        TRAINING,
        least=0,
        shown=True,
    )
    weight_decay: float = option(0.0, "Weight decay of AdamW.", TRAINING, least=0, shown=True)
    holdout: float = option(
        0.1,
        "Share of the windows that are held out to evaluate every epoch.",
        CALIBRATION,
        least=0,
        below=1,
        shown=True,
    )
    samples: int = option(64, "Number of windows of text.", TEXT, least=1, shown=True)
    seq_len: int = option(512, "Maximum number of tokens in a window.", TEXT, least=2, shown=True)
    # trained weights are float32, whatever their stored precision
    dtype: str = option(
        "float32", "Precision of the passes.", RUNTIME, choices=("float32",), shown=True
    )
    recompute: bool = option(
        False,
        "Keep only the input of each block for the gradients and compute the rest again: less memory, more "
        "time.",
        RUNTIME,
    )
    save_every: float = option(
        10.0, "Minutes between saves, for `resume`; 0: none.", RUNTIME, least=0
    )


#: of these, what `distillation` of a prune sets; windows and machine are those of the prune
DISTILLATION = (*(one.name for one in options_of(DistillOptions) if one.group == TRAINING), "seed")
DistillOptions.__doc__ = described(DistillOptions)
