"""The options of blockwise training, each declared once."""

from dataclasses import dataclass

from maskopt.core.fields import check_options, option

BLOCK, PART = GRANULARITIES = ("block", "part")
#: of `train`
WEIGHTS, ALL = TRAINED = ("weights", "all")
CHANNELS, RELATIVE, SQUARE, COSINE = LOSSES = ("channels", "relative", "square", "cosine")


@dataclass(frozen=True)
class Reconstruction:
    """How kept weights are trained; OptionError for a value that cannot be."""

    granularity: str = option(
        BLOCK,
        "what is trained at once; block: all of it; part: a block's attention, then its MLP",
        choices=GRANULARITIES,
    )
    train: str = option(
        WEIGHTS,
        "what is trained; weights: kept weights; all: the part's norms and biases, too",
        choices=TRAINED,
    )
    loss: str = option(
        CHANNELS,
        "of a token; relative: the squared error as a part of the dense output's square; channels: the same, "
        "each channel measured in its own root mean square; square: the squared error; cosine: one less the "
        "cosine",
        choices=LOSSES,
    )
    inputs: str = option(
        "pruned", "what a part is given while it is trained", choices=("pruned", "dense")
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
