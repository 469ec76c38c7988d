"""`maskopt compare`: the same rows solved by several solvers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from maskopt.cli.command import (
    CARDINALITY,
    OVERWRITE,
    RECORDS,
    TEXT_OF_A_MODEL,
    command,
    option_list,
    read_pairs,
)
from maskopt.cli.console import bound_cells, errors, make_table, screen, written
from maskopt.cli.instances import OF_A_MODEL, load_layers
from maskopt.cli.view import view
from maskopt.core.fields import REQUIRED, option
from maskopt.errors import OptionError
from maskopt.experiments.compare import Record, sample_rows
from maskopt.experiments.compare import compare as compare_rows
from maskopt.experiments.store import check_format


@command(*OF_A_MODEL, example="maskopt compare row.npz --solvers wanda,swap,scip --columns 48")
def compare(
    source: list[Path] = option(
        REQUIRED, "A model folder, or instances (.npz, .dat, …).", argument=True
    ),
    solvers: str = option("wanda,swap,scip", "Names, separated by commas."),
    solver_options: list[str] | None = option(
        None, "Option of one of the solvers, SOLVER.NAME=VALUE; may be repeated."
    ),
    rows: int = option(4, "Rows sampled from every layer.", least=1),
    columns: int | None = option(None, "Number of inputs sampled per row. Default: all.", least=1),
    row_time_limit: float | None = option(None, "Seconds per row.", least=0),
    jobs: int = option(1, "Number of rows at a time; −1: one per core."),
    seed: int = option(0, "Random seed of the sample and of the solvers.", least=0),
    cardinality: int | None = CARDINALITY,
    calibration: str | None = TEXT_OF_A_MODEL,
    output: Path | None = RECORDS,
    overwrite: bool = OVERWRITE,
    **options: Any,
) -> None:
    """Solve the same rows with several solvers: objective, bound, gap, status, time."""
    if output is not None:
        check_format(output, overwrite=overwrite)
    chosen = with_options(option_list(solvers), solver_options)
    layers = load_layers(
        source, options, calibration=calibration, seed=seed, cardinality=cardinality
    )
    sampled = sample_rows(layers.problems, rows, columns=columns, pattern=layers.pattern, seed=seed)
    with view() as shown:
        records = compare_rows(
            sampled,
            chosen,
            time_limit=row_time_limit,
            seed=seed,
            jobs=jobs,
            output=output,
            on_progress=lambda done, total: shown.show("solving", done, total),
        )
    screen.print(comparison_table(records))
    if any(problem.shared_budget for problem in layers.problems):
        said = "each row is solved alone, at the sparsity of its layer: no budget is shared"
        screen.print(said, soft_wrap=True)
    for record in records:
        if record.error:
            said = f"{record.instance}, {record.solver}: {record.error}"
            errors.print(said, soft_wrap=True, markup=False, emoji=False)
    if output is not None:
        written(output)
    if all(record.status == "failed" for record in records):
        raise typer.Exit(1)


def with_options(
    names: list[str], items: list[str] | None
) -> list[str] | dict[str, dict[str, Any]]:
    """The solvers, each with the options that are given for it.

    Raises:
        OptionError: an option of a solver that is not among them.
    """
    if not items:
        return names
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for item in items:
        name, dot, setting = item.partition(".")
        if not dot:
            raise OptionError(f"`solver_options` takes SOLVER.NAME=VALUE, not {item!r}")
        if name not in options:
            raise OptionError(
                f"`solver_options` {item}: there is no solver {name!r} among {', '.join(names)}"
            )
        options[name] |= read_pairs([setting])
    return options


def comparison_table(records: list[Record]) -> Table:
    """One line per row and solver, in the original units of the rows."""
    headings = (
        "instance, n",
        "solver",
        "objective",
        "bound",
        "gap",
        "> optimum",
        "status",
        "seconds",
    )
    table = make_table(*headings, left=2, no_wrap=True)
    table.columns[6].justify = "left"
    last = None
    for r in records:
        here = (r.instance, r.n, r.pattern)
        shown = "" if here == last else f"{r.instance}, {r.n}, {r.pattern}"
        last = here
        table.add_row(
            shown,
            r.solver,
            f"{r.value:.6g}",
            *bound_cells(r),
            "–" if r.excess != r.excess else f"{r.excess:.2%}",
            r.status,
            f"{r.seconds:.2f}",
        )
    return table
