"""`maskopt demo`: the main job on a small real language model, with nothing to prepare."""

from __future__ import annotations

from pathlib import Path

from maskopt.cli.command import OVERWRITE, command
from maskopt.cli.console import screen
from maskopt.cli.view import view
from maskopt.core.fields import OUTPUT, option


@command(example="maskopt demo --model smollm2")
def demo(
    model: str = option("gemma3", "Language model.", choices=("gemma3", "smollm2")),
    sparsity: float = option(0.5, "Share of weights to prune in each row."),
    samples: int = option(12, "Number of calibration windows.", least=1),
    windows: int = option(8, "Number of evaluation windows.", least=1),
    seed: int = option(0, "Random seed of the calibration windows and the small rows.", least=0),
    output: Path = option(
        Path("maskopt-demo"), "Folder for the report and the pruned model.", OUTPUT
    ),
    overwrite: bool = OVERWRITE,
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
