"""`maskopt demo`: the main job on a real language model, with nothing to prepare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskopt.cli.console import output as screen
from maskopt.cli.view import view


def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for the report and the pruned model.")
    ] = Path("maskopt-demo"),
    model: Annotated[str, typer.Option(help="gemma3 or smollm2.")] = "gemma3",
    sparsity: Annotated[float, typer.Option(help="Share of every row that is pruned.")] = 0.5,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 12,
    windows: Annotated[int, typer.Option(min=1, help="Evaluation windows.")] = 8,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the calibration crops and the toy rows.")
    ] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Compare solvers with proven optima on small rows, then prune all of a small real model."""
    from maskopt.demo.run import run_demo

    with view() as shown:
        result = run_demo(
            output,
            model=model,
            sparsity=sparsity,
            samples=samples,
            windows=windows,
            seed=seed,
            overwrite=overwrite,
            on_stage=shown.show,
        )
    for table in result.tables:
        screen.print(table.rich())
        screen.print()
    screen.print(f"report: {result.report}", highlight=False)
    screen.print(f"pruned model: {result.model}", highlight=False)
    screen.print(f"{result.seconds:.0f} s in all", highlight=False)
