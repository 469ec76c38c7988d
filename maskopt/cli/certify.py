"""`maskopt bound` and `maskopt certify`: certified gaps of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from maskopt.cli.cells import bound_cells
from maskopt.cli.console import output
from maskopt.cli.instances import load_layers, takes_source
from maskopt.cli.parameters import TEXT_SOURCES, WALK, Calibration, Out, Overwrite, Select, takes
from maskopt.cli.view import view
from maskopt.record_file import check_format

if TYPE_CHECKING:
    from maskopt.certify import GapRecord

Method = Annotated[str, typer.Option(help="sdp, box, shift, or another registered bound.")]
TimeLimit = Annotated[
    float | None, typer.Option(min=0, help="Seconds for the rows of one layer together.")
]
Cuts = Annotated[
    int | None, typer.Option(min=0, help="Of sdp: rounds of triangle cuts; 8 tighten it well.")
]
Jobs = Annotated[
    int, typer.Option(help="Rows at a time, each by itself; −1: one a core; 1: a layer's together.")
]
#: of a layer in `certify`: wide layers take minutes to converge, and the bound is valid at any time
SDP_SECONDS = 60.0
#: so many rows have a line each
FEW = 24


@takes_source
def bound(
    source: Annotated[
        list[Path], typer.Argument(help="A model folder, or instances (.npz, .dat, …).")
    ],
    options: dict[str, Any],
    method: Method = "sdp",
    solver: Annotated[str, typer.Option(help="Whose masks stand beside the bounds.")] = "swap",
    rows: Annotated[int | None, typer.Option(min=1, help="Rows a layer; all by default.")] = None,
    columns: Annotated[
        int | None, typer.Option(min=1, help="Inputs sampled per row; all by default.")
    ] = None,
    calibration: Calibration = None,
    cuts: Cuts = None,
    time_limit: TimeLimit = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampled rows and inputs.")] = 0,
    jobs: Jobs = 1,
    select: Select = None,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Certified lower bounds of rows, beside the masks of a solver."""
    from maskopt.certify import bound_layers

    if out is not None:
        check_format(out, overwrite=overwrite)
    layers = load_layers(source, options, calibration=calibration, seed=seed, select=select)
    with view() as shown:
        records = bound_layers(
            layers.problems,
            kinds=layers.kinds,
            rows=rows,
            columns=columns,
            solver=solver,
            method=method,
            method_options=_given(cuts=cuts, time_limit=time_limit),
            seed=seed,
            jobs=jobs,
            output=out,
            on_rows=lambda done, name: shown.show(f"{name}, rows bounded: {done}", done, None),
        )
    if len(records) <= FEW:
        output.print(_rows_table(records))
    else:
        output.print(_kinds_table(records))
    if any(problem.pooled for problem in layers.problems):
        output.print("the bound of rows that trade is of their sum, ω each, and told in parts")
    _say_written(out)


@takes(WALK, samples=32, seq_len=512)
def certify(
    model: Annotated[Path, typer.Argument(help="The original model folder.")],
    pruned: Annotated[Path, typer.Argument(help="What `maskopt prune` made of it.")],
    calibration: Annotated[str, typer.Option(help=TEXT_SOURCES)],
    options: dict[str, Any],
    rows_per_layer: Annotated[int, typer.Option(min=1, help="Rows sampled from a layer.")] = 4,
    method: Method = "sdp",
    cuts: Cuts = None,
    time_limit: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds for the rows of one layer; of sdp, 60 by default."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampled rows and the windows.")] = 0,
    jobs: Jobs = 1,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """How far the masks of a pruned model are from the best possible: certified, full width."""
    from maskopt.certify import certify_model

    if out is not None:
        check_format(out, overwrite=overwrite)
    if time_limit is None and method == "sdp":
        time_limit = SDP_SECONDS
    with view() as shown:
        records = certify_model(
            model,
            pruned,
            calibration=calibration,
            rows_per_layer=rows_per_layer,
            method=method,
            method_options=_given(cuts=cuts, time_limit=time_limit),
            seed=seed,
            jobs=jobs,
            output=out,
            on_rows=lambda done, name: shown.show(f"{name}, rows bounded: {done}", done, None),
            **options,
        )
    output.print(_kinds_table(records))
    _say_written(out)


def _given(**options: Any) -> dict[str, Any]:
    """What was asked for; the rest is the method's own affair."""
    return {name: value for name, value in options.items() if value is not None}


def _rows_table(records: Sequence[GapRecord]) -> Table:
    """A line each, in the units of whoever posed them."""
    table = Table(caption="gap: from objective to bound; no mask is better by more")
    table.add_column("instance, n", overflow="fold")
    for heading in ("row", "objective", "bound", "gap", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in records:
        table.add_row(
            f"{r.instance}, {r.n}, {r.pattern}",
            str(r.row),
            f"{r.value:.6g}",
            *bound_cells(r),
            f"{r.seconds:.3f}",
        )
    return table


def _kinds_table(records: Sequence[GapRecord]) -> Table:
    from maskopt.certify import by_kind

    table = Table(caption="gap: from objective to bound; no mask is better by more")
    table.add_column("layer kind")
    for heading in ("rows", "median gap", "worst gap", "seconds a row"):
        table.add_column(heading, justify="right")
    for kind, (rows, median, worst, seconds) in by_kind(records).items():
        table.add_row(kind, str(rows), f"{median:.2%}", f"{worst:.2%}", f"{seconds:.3f}")
    return table


def _say_written(out: Path | None) -> None:
    if out is not None:
        output.print(f"written: {out}", soft_wrap=True)
