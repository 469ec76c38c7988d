"""`maskopt eval`: perplexity of model folders, and what pruning changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from maskopt.cli.command import OVERWRITE, SOURCES, command
from maskopt.cli.console import make_table, screen, written
from maskopt.cli.view import view
from maskopt.core.fields import OUTPUT, REQUIRED, option, options_of
from maskopt.core.files import atomic_write, check_writable
from maskopt.models.options.walk import EVALUATION, WalkOptions

if TYPE_CHECKING:
    from maskopt.models.evaluation.evaluate import Evaluation


@command(
    *(one for one in options_of(WalkOptions) if one.name in EVALUATION),
    example="maskopt eval MODEL OUT --text test.txt --windows 64",
    name="eval",
)
def evaluate(
    models: list[str] = option(
        REQUIRED,
        "Model folders, or names on the hub. The others are compared with the first.",
        argument=True,
    ),
    text: str = option(REQUIRED, f"Text to evaluate on: {SOURCES}."),
    windows: int | None = option(None, "Number of windows. Default: all."),
    json: Path | None = option(None, "Also write the results to this JSON file.", OUTPUT),
    overwrite: bool = OVERWRITE,
    **options: Any,
) -> None:
    """Perplexity of one or several models on the same consecutive windows.

    One block of one model is in memory at a time; at the end the output heads of all models, equal ones once.
    """
    if json is not None:
        check_writable(json, overwrite=overwrite, text=text)
    found = _perplexities(models, text, WalkOptions(**options), windows)
    for one in found:
        screen.print(_line(one), soft_wrap=True)
    if len(found) > 1:
        screen.print(_table(found))
    # last: the results are on the screen even if the disk is full
    if json is not None:
        with atomic_write(json) as target:
            target.write(dumps([asdict(one) for one in found], indent=1).encode())
        written(json)


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
    table = make_table(
        *("model", "perplexity", "ratio", "KL, nats", "same top token"),
        no_wrap=True,
        caption="ratio, KL and agreement compared with the first model; intervals of 95%",
    )
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
