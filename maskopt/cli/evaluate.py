"""`maskopt eval`: perplexity and tasks of model folders, and what pruning changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from maskopt.cli.console import output
from maskopt.cli.parameters import TEXT_SOURCES, Overwrite, option_list, takes
from maskopt.cli.view import view
from maskopt.errors import OptionError
from maskopt.files import atomic_write, check_writable
from maskopt.model.walk_options import EVALUATION, WalkOptions

if TYPE_CHECKING:
    from maskopt.model.evaluate import Evaluation
    from maskopt.model.tasks import TaskScore

OF_TASKS = "Tasks, through lm-eval"


@takes(EVALUATION)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help="Model folders, or names on the hub; the first is compared with."),
    ],
    options: dict[str, Any],
    text: Annotated[str | None, typer.Option(help=f"For the perplexity. {TEXT_SOURCES}")] = None,
    windows: Annotated[int | None, typer.Option(help="Take only the first so many.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Of lm-eval, separated by commas: arc_easy,hellaswag.", rich_help_panel=OF_TASKS
        ),
    ] = None,
    tasks_path: Annotated[
        Path | None,
        typer.Option(
            help="Folder of task files of your own; Python that they name is run.",
            rich_help_panel=OF_TASKS,
        ),
    ] = None,
    task_limit: Annotated[
        int | None,
        typer.Option(help="Only the first so many questions a task.", rich_help_panel=OF_TASKS),
    ] = None,
    task_batch: Annotated[
        int, typer.Option(help="Answers at a time.", rich_help_panel=OF_TASKS)
    ] = 8,
    file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures there, too.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Perplexity on consecutive windows, and tasks; of several models, on the same ones, and side by side.

    One block of one model is in memory at a time; at the end the output heads of all, those that are
    equal once. For tasks, all blocks of a model are.
    """
    from maskopt.model.tasks import open_tasks

    if text is None and tasks is None:
        raise OptionError("name a `text` for the perplexity, or `tasks`, or both")
    if file is not None:
        check_writable(file, overwrite=overwrite, text=text)
    walk = WalkOptions(**options)
    how: dict[str, Any] = {"limit": task_limit, "batch": task_batch}
    asked = None if tasks is None else open_tasks(option_list(tasks), tasks_path, **how)
    found = [] if text is None else _perplexities(models, text, walk, windows)
    scores = [] if asked is None else asked.evaluate(models, walk)
    for one in found:
        output.print(_line(one), soft_wrap=True)
    if len(found) > 1:
        output.print(_table(found))
    if scores:
        output.print(_task_table(models, scores))
    # last: what was found is on the screen even where the disk is full
    if file is not None:
        with atomic_write(file) as target:
            target.write(json.dumps(_records(models, found, scores), indent=1).encode())
        output.print(f"written: {file}", soft_wrap=True)


def _perplexities(
    models: list[str], text: str, options: WalkOptions, windows: int | None
) -> list[Evaluation]:
    from maskopt.model.evaluate import evaluate as library

    with view() as shown:
        return library(
            models,
            text,
            options,
            windows=windows,
            on_progress=lambda model, done, total: shown.show(Path(model).name, done, total),
        )


def _records(
    models: list[str], found: Sequence[Evaluation], scores: Sequence[Sequence[TaskScore]]
) -> list[dict[str, Any]]:
    """One a model: its figures on the text, and its `tasks`, whichever were asked for."""
    records = [one.record() for one in found] or [{"model": model} for model in models]
    for record, of_model in zip(records, scores, strict=False):
        record["tasks"] = [score.record() for score in of_model]
    return records


def _task_table(models: Sequence[str], scores: Sequence[Sequence[TaskScore]]) -> Table:
    """One line a metric and model."""
    table = Table(caption="difference to the first model on the same questions; intervals of 95%")
    for heading in ("task", "metric", "model"):
        table.add_column(heading, overflow="fold")
    for heading in ("questions", "value", "± stderr", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for metric in zip(*scores, strict=True):
        for model, s in zip(models, metric, strict=True):
            d = s.difference
            table.add_row(
                s.task,
                s.metric if s.filter == "none" else f"{s.metric}, {s.filter}",
                model,
                str(s.questions),
                f"{s.value:.4f}",
                "–" if s.stderr is None else f"{s.stderr:.4f}",
                "" if d is None else f"{d.value:+.4f} ({d.low:+.4f} to {d.high:+.4f})",
            )
    return table


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
