"""The options of blockwise training, each declared once."""

from dataclasses import dataclass

from maskopt.core.fields import check_options, option

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
