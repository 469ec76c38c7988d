"""`maskopt eval`: perplexity of model folders, and what pruning changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from maskopt.cli.console import output
from maskopt.cli.parameters import TEXT_SOURCES, Overwrite, takes
from maskopt.cli.view import view
from maskopt.core.files import atomic_write, check_writable
from maskopt.models.options.walk import EVALUATION, WalkOptions

if TYPE_CHECKING:
    from maskopt.models.evaluation.evaluate import Evaluation


@takes(EVALUATION)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help="Model folders, or names on the hub; the first is compared with."),
    ],
    options: dict[str, Any],
    text: Annotated[str, typer.Option(help=f"For the perplexity. {TEXT_SOURCES}")],
    windows: Annotated[int | None, typer.Option(help="Number of windows; default: all.")] = None,
    file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this JSON file.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Perplexity of one or several models on the same consecutive windows.

    One block of one model is in memory at a time; at the end the output heads of all, those that are
    equal once.
    """
    if file is not None:
        check_writable(file, overwrite=overwrite, text=text)
    found = _perplexities(models, text, WalkOptions(**options), windows)
    for one in found:
        output.print(_line(one), soft_wrap=True)
    if len(found) > 1:
        output.print(_table(found))
    # last: what was found is on the screen even where the disk is full
    if file is not None:
        with atomic_write(file) as target:
            target.write(json.dumps([asdict(one) for one in found], indent=1).encode())
        output.print(f"written: {file}", soft_wrap=True)


def _perplexities(
    models: list[str], text: str, options: WalkOptions, windows: int | None
) -> list[Evaluation]:
    from maskopt.models.evaluation.evaluate import evaluate as library

    with view() as shown:
        return library(
            models,
            text,
            options,
            windows=windows,
            on_progress=lambda model, done, total: shown.show(Path(model).name, done, total),
        )


def _line(one: Evaluation) -> str:
    p = one.perplexity
    return (
        f"{one.model}: perplexity {p.value:.4f} ({p.low:.2f} to {p.high:.2f}), {p.windows} windows of "
        f"{p.length} tokens from {p.source}, {p.beginning}"
    )


def _table(found: Sequence[Evaluation]) -> Table:
    table = Table(caption="ratio, KL and agreement compared with the first model; intervals of 95%")
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
