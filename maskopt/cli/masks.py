"""`maskopt masks`: masks onto a model and out of one; a pruned folder without its zeros, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskopt.cli.console import output
from maskopt.cli.parameters import Overwrite, output_to
from maskopt.cli.view import View, view


def apply(
    model: Annotated[Path, typer.Argument(help="Folder of the dense model.")],
    masks: Annotated[Path, typer.Argument(help="A file of packed masks.")],
    out: Annotated[Path, output_to("Folder for the masked model.")],
    overwrite: Overwrite = False,
) -> None:
    """Copy a model with the masked weights set to zero."""
    from maskopt.models.pruning.output import apply_masks

    apply_masks(model, masks, out, overwrite=overwrite)
    output.print(f"masked model: {out}", soft_wrap=True)


def export(
    model: Annotated[Path, typer.Argument(help="Folder of a pruned model.")],
    out: Annotated[Path, output_to("File for the packed masks.")],
    overwrite: Overwrite = False,
) -> None:
    """Write the nonzero pattern of the linear layers as packed masks."""
    from maskopt.models.pruning.output import extract_masks as library

    sparsities = library(model, out, overwrite=overwrite)
    mean = sum(sparsities.values()) / len(sparsities)
    output.print(
        f"masks of {len(sparsities)} tensors, mean sparsity {mean:.4f}: {out}", soft_wrap=True
    )


def pack(
    folder: Annotated[Path, typer.Argument(help="A pruned model; not changed.")],
    out: Annotated[Path, output_to("Folder for the packed one.")],
    overwrite: Overwrite = False,
) -> None:
    """Store a pruned folder without its zeros: kept values and one bit per weight."""
    from maskopt.models.checkpoints.pack import pack as library

    with view() as shown:
        library(folder, out, overwrite=overwrite, tick=Bytes(shown, folder))
    before, after = _size(folder), _size(out)
    output.print(
        f"packed: {out}, {after / 1e6:.1f} MB of {before / 1e6:.1f} MB ({after / before:.1%})",
        soft_wrap=True,
    )


def unpack(
    folder: Annotated[Path, typer.Argument(help="What `maskopt masks pack` wrote.")],
    out: Annotated[Path, output_to("Folder for the model.")],
    overwrite: Overwrite = False,
) -> None:
    """Restore a packed folder bit for bit."""
    from maskopt.models.checkpoints.pack import unpack_folder

    with view() as shown:
        unpack_folder(folder, out, overwrite=overwrite, tick=Bytes(shown, folder))
    output.print(f"unpacked: {out}, {_size(out) / 1e6:.1f} MB", soft_wrap=True)


class Bytes:
    """Counts bytes of the files in a folder, and shows how many are done."""

    def __init__(self, shown: View, folder: Path) -> None:
        self._shown, self._done, self._total = shown, 0, _size(folder)

    def __call__(self, count: int) -> None:
        self._done += count
        self._shown.show("files", min(self._done, self._total), self._total)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*") if file.is_file())
