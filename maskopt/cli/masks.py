"""`maskopt masks`: masks applied to a model and read from one; a pruned folder packed without its zeros."""

from __future__ import annotations

from pathlib import Path

from maskopt.cli.command import OVERWRITE, command
from maskopt.cli.console import screen, written
from maskopt.cli.view import View, view
from maskopt.core.fields import OUTPUT, REQUIRED, option


@command(
    example="maskopt masks apply MODEL OUT/maskopt-masks.bits --output MASKED", name="masks apply"
)
def apply(
    model: Path = option(REQUIRED, "Folder of the dense model.", argument=True),
    masks: Path = option(REQUIRED, "A file of packed masks.", argument=True),
    output: Path = option(REQUIRED, "Folder for the masked model.", OUTPUT),
    overwrite: bool = OVERWRITE,
) -> None:
    """Copy a model with the masked weights set to zero."""
    from maskopt.models.pruning.output import apply_masks

    apply_masks(model, masks, output, overwrite=overwrite)
    written(output, "masked model")


@command(example="maskopt masks export OUT --output masks.bits", name="masks export")
def export(
    model: Path = option(REQUIRED, "Folder of a pruned model.", argument=True),
    output: Path = option(REQUIRED, "File for the packed masks.", OUTPUT),
    overwrite: bool = OVERWRITE,
) -> None:
    """Write the nonzero pattern of the linear layers as packed masks."""
    from maskopt.models.pruning.output import extract_masks as library

    sparsities = library(model, output, overwrite=overwrite)
    mean = sum(sparsities.values()) / len(sparsities)
    written(output, f"masks of {len(sparsities)} tensors, mean sparsity {mean:.4f}")


@command(example="maskopt masks pack OUT --output PACKED", name="masks pack")
def pack(
    folder: Path = option(REQUIRED, "A pruned model; not changed.", argument=True),
    output: Path = option(REQUIRED, "Folder for the packed model.", OUTPUT),
    overwrite: bool = OVERWRITE,
) -> None:
    """Store a pruned folder without its zeros: kept values and one bit per weight."""
    from maskopt.models.checkpoints.pack import pack as library

    with view() as shown:
        library(folder, output, overwrite=overwrite, tick=Bytes(shown, folder))
    before, after = _size(folder), _size(output)
    screen.print(
        f"packed: {output}, {after / 1e6:.1f} MB of {before / 1e6:.1f} MB ({after / before:.1%})",
        soft_wrap=True,
    )


@command(example="maskopt masks unpack PACKED --output OUT", name="masks unpack")
def unpack(
    folder: Path = option(REQUIRED, "Folder that `maskopt masks pack` wrote.", argument=True),
    output: Path = option(REQUIRED, "Folder for the model.", OUTPUT),
    overwrite: bool = OVERWRITE,
) -> None:
    """Restore a packed folder bit for bit."""
    from maskopt.models.checkpoints.pack import unpack_folder

    with view() as shown:
        unpack_folder(folder, output, overwrite=overwrite, tick=Bytes(shown, folder))
    screen.print(f"unpacked: {output}, {_size(output) / 1e6:.1f} MB", soft_wrap=True)


class Bytes:
    """Counts bytes of the files in a folder, and shows how many are done."""

    def __init__(self, shown: View, folder: Path) -> None:
        self._shown, self._done, self._total = shown, 0, _size(folder)

    def __call__(self, count: int) -> None:
        self._done += count
        self._shown.show("files", min(self._done, self._total), self._total)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*") if file.is_file())
