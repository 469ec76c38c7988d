"""`maskopt verify`: re-read a pruned model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskopt.cli.console import output, progress_bars


def verify(
    folder: Annotated[Path, typer.Argument(help="What `maskopt prune` wrote.")],
    against: Annotated[
        Path | None, typer.Option(help="The original model: kept weights must be its bits.")
    ] = None,
    semi_structured: Annotated[
        bool | None,
        typer.Option(
            "--semi-structured/--no-semi-structured",
            help="Convert every 2:4 layer by PyTorch; default: where there is a CUDA device.",
        ),
    ] = None,
) -> None:
    """Check digests, exact counts of every row, zeros, and bit-identity to the original."""
    from maskopt.model import verify as library
    from maskopt.model.opening import choose_device

    with progress_bars() as bars:
        task = bars.add_task("tensors", total=None)
        result = library.verify_output(
            folder, against, lambda done, total: bars.update(task, completed=done, total=total)
        )
    same = f"; every kept weight is that of {against}" if against is not None else ""
    output.print(
        f"{folder}: holds. {result.layers} layers, {result.rows} rows, {result.files} files, "
        f"sparsity {result.sparsity:.4f}{same}",
        soft_wrap=True,
    )
    if semi_structured is None and result.two_four:
        semi_structured = choose_device("auto").type == "cuda"
        if not semi_structured:
            output.print("conversion by PyTorch (2:4): skipped, there is no CUDA device here")
    if semi_structured:
        converted = library.semi_structured(folder)
        output.print(f"PyTorch accepts all {len(converted)} layers as semi-structured 2:4")
