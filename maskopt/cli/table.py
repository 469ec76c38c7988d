"""`maskopt table`: the paper's tables on any models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from maskopt.cli.console import errors, output
from maskopt.cli.parameters import ALL, TEXT_SOURCES, Overwrite, option_list, takes
from maskopt.cli.view import view
from maskopt.files import check_writable
from maskopt.model.options import OF_A_CELL


@takes([name for name in ALL if name not in OF_A_CELL])
def table(
    models: Annotated[list[str], typer.Argument(help="Model folders, or names on the hub.")],
    calibration: Annotated[str, typer.Option(help=f"For the masks. {TEXT_SOURCES}")],
    text: Annotated[str, typer.Option(help=f"For the perplexity. {TEXT_SOURCES}")],
    out: Annotated[Path, typer.Option("--output", help=".jsonl, one line a finished cell.")],
    options: dict[str, Any],
    patterns: Annotated[
        str | None, typer.Option(help="By commas; default: 50%,60%,2:4, as in the paper.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="By commas: SOLVER, swap:25 (at most 25 swaps a row), frank_wolfe+alpha=0.25, "
            "swap:25@ria (from RIA's mask; default: Wanda's). Default: all of the paper's."
        ),
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Take only the first so many.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write the tables there, as Markdown.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """The tables of the paper: perplexity, and errors below the start's, by kind of layer and block.

    Each cell is pruned into a hidden folder beside the output, which is removed after its evaluation.
    After an interrupt the same command goes on. Published tables of LLaMA models cut windows without a
    beginning token: --bos never.
    """
    from maskopt.model.table import METHODS, PATTERNS, make_table
    from maskopt.report.paper import perplexity_tables, write_paper_page

    if page is not None:
        check_writable(page, overwrite=overwrite, calibration=calibration, text=text)
    try:
        with view() as shown:

            def show(done: int, cells: int, stage: str, step: int, steps: int) -> None:
                note = f"{done} of {cells} cells are done"
                shown.show(stage, step, steps or None, part=done / cells, note=note)

            cells = make_table(
                models,
                calibration,
                text,
                out,
                patterns=PATTERNS if patterns is None else option_list(patterns),
                methods=METHODS if methods is None else option_list(methods),
                windows=windows,
                on_progress=show,
                **options,
            )
    except KeyboardInterrupt:
        errors.print(f"{out}: finished cells are kept; the same command goes on", soft_wrap=True)
        raise
    for one in perplexity_tables(cells):
        output.print(one.rich())
    if page is not None:
        write_paper_page(page, cells)
        output.print(f"written: {page}", soft_wrap=True)
    output.print(f"cells: {out}", soft_wrap=True)
