"""`maskopt compare`: the same rows through several solvers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from maskopt.cli.cells import bound_cells
from maskopt.cli.console import errors, output
from maskopt.cli.instances import load_layers, takes_source
from maskopt.cli.parameters import (
    Calibration,
    Out,
    Overwrite,
    Select,
    option_list,
    read_solver_options,
)
from maskopt.cli.view import view
from maskopt.errors import OptionError
from maskopt.experiments.compare import Record, sample_rows
from maskopt.experiments.compare import compare as compare_rows
from maskopt.experiments.store import check_format


@takes_source
def compare(
    source: Annotated[
        list[Path], typer.Argument(help="A model folder, or instances (.npz, .dat, …).")
    ],
    options: dict[str, Any],
    solvers: Annotated[str, typer.Option(help="Names, separated by commas.")] = "wanda,swap,scip",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", help="Option of one of the solvers, SOLVER.NAME=VALUE; may be repeated."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows sampled from every layer.")] = 4,
    columns: Annotated[
        int | None, typer.Option(min=1, help="Inputs sampled per row; all by default.")
    ] = None,
    calibration: Calibration = None,
    time_limit: Annotated[float | None, typer.Option(min=0, help="Seconds a row.")] = None,
    jobs: Annotated[int, typer.Option(help="Number of rows at a time; −1: one per core.")] = 1,
    seed: Annotated[
        int, typer.Option(min=0, help="Random seed of the sample and of the solvers.")
    ] = 0,
    cardinality: Select = None,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Solve the same rows with several solvers: objective, bound, gap, status, time."""
    if out is not None:
        check_format(out, overwrite=overwrite)
    chosen = with_options(option_list(solvers), option)
    layers = load_layers(
        source, options, calibration=calibration, seed=seed, cardinality=cardinality
    )
    sampled = sample_rows(layers.problems, rows, columns=columns, pattern=layers.pattern, seed=seed)
    with view() as shown:
        records = compare_rows(
            sampled,
            chosen,
            time_limit=time_limit,
            seed=seed,
            jobs=jobs,
            output=out,
            on_progress=lambda done, total: shown.show("solving", done, total),
        )
    output.print(comparison_table(records))
    if any(problem.pooled for problem in layers.problems):
        said = "each row is solved alone, at the sparsity of its layer: no budget is shared"
        output.print(said, soft_wrap=True)
    for record in records:
        if record.error:
            said = f"{record.instance}, {record.solver}: {record.error}"
            errors.print(said, soft_wrap=True, markup=False, emoji=False)
    if out is not None:
        output.print(f"written: {out}", soft_wrap=True)
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
            raise OptionError(f"--option takes SOLVER.NAME=VALUE, not {item!r}")
        if name not in options:
            raise OptionError(
                f"--option {item}: there is no solver {name!r} among {', '.join(names)}"
            )
        options[name] |= read_solver_options([setting])
    return options


def comparison_table(records: list[Record]) -> Table:
    """One line a row and solver, in the units of whoever posed the rows."""
    table = Table()
    table.add_column("instance, n", overflow="fold")
    table.add_column("solver", no_wrap=True)
    for heading in ("objective", "bound", "gap", "> optimum"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
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
