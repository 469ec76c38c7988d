"""`maskopt apply` and `maskopt extract-masks`: masks onto a model, and out of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskopt.cli.console import output
from maskopt.cli.parameters import Overwrite


def apply(
    model: Annotated[Path, typer.Argument(help="The dense model's folder.")],
    masks: Annotated[Path, typer.Argument(help="A file of packed masks.")],
    out: Annotated[Path, typer.Option("--output", help="Folder for the masked model.")],
    overwrite: Overwrite = False,
) -> None:
    """Copy a model with the masked weights set to zero; all other bits stay."""
    from maskopt.model.output import apply_masks

    apply_masks(model, masks, out, overwrite=overwrite)
    output.print(f"masked model: {out}", soft_wrap=True)


def extract_masks(
    model: Annotated[Path, typer.Argument(help="A pruned model's folder.")],
    out: Annotated[Path, typer.Option("--output", help="File for the packed masks.")],
    overwrite: Overwrite = False,
) -> None:
    """Write what is not zero in the linear layers as packed masks."""
    from maskopt.model.output import extract_masks as library

    sparsities = library(model, out, overwrite=overwrite)
    mean = sum(sparsities.values()) / len(sparsities)
    output.print(
        f"masks of {len(sparsities)} tensors, mean sparsity {mean:.4f}: {out}", soft_wrap=True
    )
