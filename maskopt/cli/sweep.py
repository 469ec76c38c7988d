"""`maskopt sweep`: many prunes from the same Gram matrices, and a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from maskopt.cli.console import output
from maskopt.cli.parameters import (
    CALIBRATION,
    OUTPUT,
    WHAT,
    Model,
    Overwrite,
    option_list,
    output_to,
    takes,
)
from maskopt.cli.prune_view import PruneView
from maskopt.cli.view import view

if TYPE_CHECKING:
    from maskopt.models.evaluation.evaluate import Evaluation
    from maskopt.models.evaluation.sweep import Swept

_OPTIONS = (
    "include",
    "exclude",
    "damping",
    "damping_exponent",
    "gram_shrinkage",
    "min_tokens",
    "start",
    "solver_options",
    "threads",
    "device",
    "max_memory",
    "trust_remote_code",
)


@takes(_OPTIONS)
def sweep(
    model: Model,
    grams: Annotated[
        Path,
        typer.Option(
            help="What `maskopt gram` wrote of the model.", rich_help_panel=CALIBRATION, metavar="…"
        ),
    ],
    out: Annotated[
        Path, output_to("Output folder with one subfolder per prune; finished prunes are reused.")
    ],
    options: dict[str, Any],
    sparsity: Annotated[
        str | None,
        typer.Option(help="Several, e.g. 0.5,60%,2:4.", rich_help_panel=WHAT, metavar="…"),
    ] = None,
    solver: Annotated[
        str, typer.Option(help="Several, e.g. swap,wanda.", rich_help_panel=WHAT, metavar="…")
    ] = "swap",
    update: Annotated[
        str,
        typer.Option(help="none, least-squares, or both.", rich_help_panel=WHAT, metavar="…"),
    ] = "none",
    text: Annotated[
        str | None,
        typer.Option(help="Text to evaluate all models on.", rich_help_panel=OUTPUT, metavar="…"),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            help="Number of 512-token windows of --text to evaluate; default: all.",
            rich_help_panel=OUTPUT,
            metavar="N",
            min=1,
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Prune a model with every combination of sparsity, solver and update, and print one table.

    All prunes use the same Gram matrices; forward passes are run only to evaluate --text.
    """
    from maskopt.models.evaluation.sweep import sweep as library

    with view() as shown:
        found, dense = library(
            model,
            grams,
            out,
            sparsity=option_list(sparsity),
            solvers=option_list(solver),
            update=option_list(update),
            text=text,
            windows=windows,
            overwrite=overwrite,
            on_progress=lambda label: PruneView(shown),
            **options,
        )
    output.print(swept_table(found, dense))
    output.print(f"pruned models, masks and manifests: {out}", soft_wrap=True)


def swept_table(found: list[Swept], dense: Evaluation | None) -> Table:
    """A line a prune; errors are means over its layers, as parts of their outputs' energy."""
    table = Table(caption="errors: mean over the layers of their outputs' relative errors")
    headings = ["prune", "pruned", "error", "held out", "rows proven", "solving, s"]
    judged = [] if dense is None else ["perplexity", "× dense"]
    for heading in [*headings, *judged]:
        table.add_column(heading, justify="left" if heading == "prune" else "right")
    if dense is not None:
        table.add_row("dense", *["–"] * 5, f"{dense.perplexity.value:.2f}", "1")
    for one in found:
        layers = [layer for layer in one.report.layers if not layer.fallback]
        held = [x.relative_held for x in layers if x.relative_held is not None]
        rows = sum(layer.rows for layer in layers)
        proven = sum(n for x in layers for s, n in x.statuses.items() if s != "feasible")
        change = None if one.evaluation is None else one.evaluation.change
        cells = (
            []
            if one.evaluation is None or change is None
            else [f"{one.evaluation.perplexity.value:.2f}", f"{change.ratio:.3f}"]
        )
        table.add_row(
            one.label,
            f"{one.report.sparsity:.1%}",
            f"{sum(x.relative for x in layers) / len(layers):.4f}" if layers else "–",
            f"{sum(held) / len(held):.4f}" if held else "–",
            f"{proven / rows:.0%}" if rows else "–",
            f"{sum(x.seconds for x in one.report.layers):.1f}",
            *cells,
        )
    return table
