"""`maskopt sweep`: many prunes from the same Gram matrices, and a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from maskopt.cli.command import MODEL, OVERWRITE, SOURCES, command, option_list
from maskopt.cli.console import make_table, ranks, screen, written
from maskopt.cli.view import PruneView, view
from maskopt.core.fields import OUTPUT, REQUIRED, SELECTION, TEXT, UPDATE, option, options_of
from maskopt.errors import OptionError
from maskopt.models.options.prune import PruneOptions

if TYPE_CHECKING:
    from maskopt.models.evaluation.evaluate import Evaluation
    from maskopt.models.evaluation.sweep import Swept

#: options that are swept, or that need more than Gram matrices of the dense model
_NOT_HERE = (
    *("sparsity", "solver", "update", "training", "distillation", "calibrate_on"),
    *("true_sequential", "allocation", "sensitivity", "max_deviation", "counts"),
)


@command(
    *(one for one in options_of(PruneOptions) if one.name not in _NOT_HERE),
    example="maskopt sweep MODEL --calibration text.txt --grams GRAMS --sparsity 0.5,0.6 --output OUT",
    config=True,
    shared=True,
)
def sweep(
    model: str = MODEL,
    grams: Path = option(
        REQUIRED,
        "Folder of the Gram matrices of the dense model. If it does not exist, they are collected from "
        "--calibration and stored there.",
        TEXT,
    ),
    calibration: str | None = option(
        None, f"Calibration text, required to collect: {SOURCES}.", TEXT
    ),
    sparsity: str | None = option(
        None,
        "Several, e.g. 0.5,60%,2:4. Without it, Gram matrices are collected and nothing is pruned.",
        SELECTION,
    ),
    solver: str = option("swap", "Several, e.g. swap,wanda.", SELECTION),
    update: str = option("none", "none, least-squares, or both separated by a comma.", UPDATE),
    text: str | None = option(None, f"Text to evaluate all models on: {SOURCES}.", OUTPUT),
    windows: int | None = option(
        None, "Number of 512-token windows of --text to evaluate. Default: all.", OUTPUT, least=1
    ),
    output: Path | None = option(
        None, "Folder with one subfolder per prune; finished prunes are reused.", OUTPUT
    ),
    overwrite: bool = OVERWRITE,
    **options: Any,
) -> None:
    """Prune a model with every combination of sparsity, solver and update, and print one table.

    All prunes use the same Gram matrices, which `maskopt prune --grams` reads, too. Each gives the same bytes
    as a prune with --calibrate-on dense.
    """
    from maskopt.models.evaluation.sweep import sweep as library
    from maskopt.models.pruning.gram_store import open_store

    if sparsity is None and calibration is not None:
        with view() as shown:
            shown_as = PruneView(shown)
            open_store(model, grams, calibration, options, on_progress=shown_as, ranks=ranks())
        written(grams, "Gram matrices")
        return
    if output is None:
        raise OptionError("`output` is missing: name a folder for the pruned models")
    with view() as shown:
        found, dense = library(
            model,
            grams,
            output,
            calibration=calibration,
            sparsity=option_list(sparsity),
            solvers=option_list(solver),
            update=option_list(update),
            text=text,
            windows=windows,
            overwrite=overwrite,
            on_progress=lambda label: PruneView(shown),
            ranks=ranks(),
            **options,
        )
    screen.print(swept_table(found, dense))
    written(output, "pruned models, masks and manifests")


def swept_table(found: list[Swept], dense: Evaluation | None) -> Table:
    """One line per prune; errors are means over its layers, relative to the energy of their outputs."""
    from maskopt.models.checkpoints.report import mean_error, mean_held_error, proven_share

    table = make_table(
        *("prune", "pruned", "error", "held out", "rows proven", "solving, s"),
        *([] if dense is None else ["perplexity", "× dense"]),
        caption="errors: mean over the layers of their outputs' relative errors",
    )
    if dense is not None:
        table.add_row("dense", *["–"] * 5, f"{dense.perplexity.value:.2f}", "1")
    for one in found:
        layers = one.report.solved
        error, held, proven = mean_error(layers), mean_held_error(layers), proven_share(layers)
        change = None if one.evaluation is None else one.evaluation.change
        cells = (
            []
            if one.evaluation is None or change is None
            else [f"{one.evaluation.perplexity.value:.2f}", f"{change.ratio:.3f}"]
        )
        table.add_row(
            one.label,
            f"{one.report.sparsity:.1%}",
            "–" if error is None else f"{error:.4f}",
            "–" if held is None else f"{held:.4f}",
            "–" if proven is None else f"{proven:.0%}",
            f"{sum(x.seconds for x in one.report.layers):.1f}",
            *cells,
        )
    return table
