"""`maskopt eval`: perplexity of model folders, and what pruning changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from maskopt.cli.console import output, progress_bars
from maskopt.cli.parameters import TEXT_SOURCES, takes
from maskopt.errors import OptionError
from maskopt.files import atomic_write
from maskopt.model.options import EVALUATION

if TYPE_CHECKING:
    from maskopt.model.evaluate import Evaluation


@takes(EVALUATION)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help="Model folders, or names on the hub; the first is compared with."),
    ],
    text: Annotated[str, typer.Option(help=TEXT_SOURCES)],
    options: dict[str, Any],
    windows: Annotated[int | None, typer.Option(help="Take only the first so many.")] = None,
    file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures there, too.")
    ] = None,
) -> None:
    """Perplexity on consecutive windows; of several models, on the same ones, and side by side.

    One block of one model is in memory at a time; at the end of each, its output head, and the first model's.
    """
    from maskopt.model.evaluate import evaluate as library
    from maskopt.model.options import WalkOptions

    if file is not None and not file.absolute().parent.is_dir():
        raise OptionError(f"{file.parent}: no such folder")
    with progress_bars() as bars:
        task = bars.add_task("windows", total=None)
        found = library(
            models,
            text,
            WalkOptions(**options),
            windows=windows,
            on_progress=lambda model, done, total: bars.update(
                task, description=Path(model).name, completed=done, total=total
            ),
        )
    if file is not None:
        with atomic_write(file) as target:
            target.write(json.dumps([one.record() for one in found], indent=1).encode())
    for one in found:
        output.print(_line(one), soft_wrap=True)
    if len(found) > 1:
        output.print(_table(found))
    if file is not None:
        output.print(f"written: {file}", soft_wrap=True)


def _line(one: Evaluation) -> str:
    p = one.perplexity
    return (
        f"{one.model}: perplexity {p.value:.4f} ({p.low:.2f} to {p.high:.2f}), {p.windows} windows of "
        f"{p.length} tokens from {p.source}, {p.beginning}"
    )


def _table(found: Sequence[Evaluation]) -> Table:
    table = Table(caption="ratio, KL and agreement beside the first model; intervals of 95%")
    table.add_column("model", overflow="fold")
    for heading in ("perplexity", "ratio", "KL, nats", "same top token"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found:
        c = one.change
        table.add_row(
            one.model,
            f"{one.perplexity.value:.2f}",
            "" if c is None else f"{c.ratio:.3f} ({c.ratio_low:.3f} to {c.ratio_high:.3f})",
            "" if c is None else f"{c.kl:.4f} ({c.kl_low:.4f} to {c.kl_high:.4f})",
            "" if c is None else f"{c.agreement:.1%}",
        )
    return table
