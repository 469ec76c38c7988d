"""`maskopt report`: a page of what prunes did."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskopt.cli.console import output
from maskopt.cli.parameters import Overwrite, output_to
from maskopt.errors import OptionError


def report(
    folders: Annotated[
        list[Path], typer.Argument(help="What `maskopt prune` wrote; several stand side by side.")
    ],
    out: Annotated[Path, output_to("The page, .html.")] = Path("report.html"),
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="What `maskopt eval … --json FILE` wrote.")
    ] = None,
    gaps: Annotated[
        Path | None,
        typer.Option(help="What `maskopt bound … --output FILE.jsonl` wrote of the first folder."),
    ] = None,
    picture: Annotated[
        str | None, typer.Option(help="The tensor whose mask is shown; default: the first one.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="A folder for the figures as .png and .svg, too.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """One self-contained HTML page: what was done, errors, improvements, a mask, and how to repeat it.

    It needs no network and holds no script.
    """
    from maskopt.report.prune_page import write_report

    if figures is not None and figures.exists() and not figures.is_dir():
        raise OptionError(f"{figures}: is no folder")
    found = write_report(
        out,
        folders,
        evaluation=evaluation,
        gaps=gaps,
        picture=picture,
        figures=figures,
        overwrite=overwrite,
    )
    for path in found:
        output.print(f"written: {path}", soft_wrap=True)
