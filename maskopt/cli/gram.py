"""`maskopt gram`: the Gram matrices of a model, to be solved elsewhere and repeatedly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from maskopt.cli.console import output
from maskopt.cli.parameters import (
    WALK,
    Model,
    Overwrite,
    Text,
    output_to,
    takes,
)
from maskopt.cli.prune_view import PruneView
from maskopt.cli.ranks import ranks
from maskopt.cli.view import view
from maskopt.models.options.walk import WalkOptions


@takes(
    tuple(name for name in (*WALK, "seed", "holdout") if name != "gram_shrinkage"),
    of=WalkOptions,
    config=True,
)
def gram(
    model: Model,
    calibration: Text,
    out: Annotated[Path, output_to("Folder for the Gram matrices.")],
    options: dict[str, Any],
    overwrite: Overwrite = False,
) -> None:
    """Collect the Gram matrices of a dense model's layers once, for `maskopt prune --grams` and `sweep`.

    A prune from them gives the same bytes as one with --calibrate-on dense; it needs neither the text nor a
    pass through the model.
    """
    from maskopt.models.pruning.gram_store import collect_grams

    with view() as shown:
        collect_grams(
            model,
            calibration=calibration,
            output=out,
            overwrite=overwrite,
            on_progress=PruneView(shown),
            ranks=ranks(),
            **options,
        )
    size = sum(file.stat().st_size for file in out.iterdir())
    output.print(f"Gram matrices: {out}, {size / 2**30:.2f} GiB", soft_wrap=True)
