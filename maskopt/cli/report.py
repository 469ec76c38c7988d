"""`maskopt report`: one page about one or several prunes."""

from __future__ import annotations

from pathlib import Path

from maskopt.cli.command import OVERWRITE, command
from maskopt.cli.console import written
from maskopt.core.fields import OUTPUT, REQUIRED, option
from maskopt.errors import OptionError


@command(example="maskopt report OUT --output report.html")
def report(
    folders: list[Path] = option(
        REQUIRED, "Folders that `maskopt prune` wrote; several are compared.", argument=True
    ),
    evaluation: Path | None = option(None, "File that `maskopt eval --json FILE` wrote."),
    gaps: Path | None = option(
        None, "File that `maskopt bound --output FILE.jsonl` wrote about the first folder."
    ),
    picture: str | None = option(None, "Tensor whose mask is shown. Default: the first one."),
    figures: Path | None = option(None, "Folder for the figures as .png and .svg.", OUTPUT),
    output: Path = option(Path("report.html"), "The page, .html.", OUTPUT),
    overwrite: bool = OVERWRITE,
) -> None:
    """One self-contained HTML page: the options, errors, improvements, a mask, and how to repeat it.

    It needs no network and holds no script.
    """
    from maskopt.report.prune_page import write_report

    if figures is not None and figures.exists() and not figures.is_dir():
        raise OptionError(f"{figures}: is no folder")
    found = write_report(
        output,
        folders,
        evaluation=evaluation,
        gaps=gaps,
        picture=picture,
        figures=figures,
        overwrite=overwrite,
    )
    for path in found:
        written(path)
