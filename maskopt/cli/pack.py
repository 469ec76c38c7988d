"""`maskopt pack` and `maskopt unpack`: a pruned folder without its zeros, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskopt.cli.console import output
from maskopt.cli.parameters import Overwrite
from maskopt.cli.view import View, view


def pack(
    folder: Annotated[Path, typer.Argument(help="What `maskopt prune` wrote; left as it is.")],
    out: Annotated[Path, typer.Option("--output", help="Folder for the packed one.")],
    overwrite: Overwrite = False,
) -> None:
    """Store a pruned model without its zeros: kept values, and a bit a weight for their places."""
    from maskopt.model.pack import pack as library

    with view() as shown:
        library(folder, out, overwrite=overwrite, tick=Bytes(shown, folder))
    before, after = _size(folder), _size(out)
    output.print(
        f"packed: {out}, {after / 1e6:.1f} MB of {before / 1e6:.1f} MB ({after / before:.1%})",
        soft_wrap=True,
    )


def unpack(
    folder: Annotated[Path, typer.Argument(help="What `maskopt pack` wrote.")],
    out: Annotated[Path, typer.Option("--output", help="Folder for the model.")],
    overwrite: Overwrite = False,
) -> None:
    """The folder that was packed, every file bit for bit."""
    from maskopt.model.pack import unpack_folder

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
