"""`maskopt bound`: certified lower bounds and gaps of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from maskopt.cli.cells import bound_cells
from maskopt.cli.console import output
from maskopt.cli.instances import load_layers, takes_source
from maskopt.cli.parameters import FIELDS, Calibration, Out, Overwrite, Select
from maskopt.cli.view import view
from maskopt.errors import OptionError
from maskopt.experiments.store import check_format

if TYPE_CHECKING:
    from maskopt.models.evaluation.bound import GapRecord

#: for sdp on one layer of a pruned model: wide layers converge in minutes, and bounds are valid at any time
SDP_SECONDS = 60.0
#: of a pruned model: rows of a layer that are bounded
ROWS = 4
#: so many rows have a line each
FEW = 24


@takes_source
def bound(
    source: Annotated[
        list[Path],
        typer.Argument(help="A pruned folder (with --original), a model, or instances (.npz, …)."),
    ],
    options: dict[str, Any],
    original: Annotated[
        Path | None,
        typer.Option(help="Dense model that SOURCE was pruned from: bound the rows of its masks."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="sdp, box, shift, or another registered bound.")
    ] = "sdp",
    solver: Annotated[
        str | None, typer.Option(help="Solver of the masks that are compared; default: swap.")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help=f"Rows a layer; default: all, with --original {ROWS} at random."),
    ] = None,
    columns: Annotated[
        int | None, typer.Option(min=1, help="Number of inputs sampled per row; default: all.")
    ] = None,
    calibration: Calibration = None,
    cuts: Annotated[
        int | None,
        typer.Option(min=0, help="Rounds of triangle cuts for the sdp bound; 8 is a good value."),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            min=0,
            help=f"Seconds for the rows of one layer; of sdp with --original {SDP_SECONDS:.0f} by default.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Random seed of the sampled rows and inputs.")
    ] = 0,
    jobs: Annotated[
        int,
        typer.Option(
            help="Number of rows bounded in parallel; −1: one per core; 1: all rows of a "
            "layer in one batch."
        ),
    ] = 1,
    cardinality: Select = None,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Certified lower bounds of rows, and how far masks are from them.

    With --original, SOURCE is a pruned folder, and its masks are bounded on full rows: give the
    --samples and --seq-len of the prune. Otherwise --solver computes the masks.
    """
    from maskopt.models.evaluation.bound import bound_layers, certify_model

    if out is not None:
        check_format(out, overwrite=overwrite)
    if original is None:
        layers = load_layers(
            source, options, calibration=calibration, seed=seed, cardinality=cardinality
        )
    else:
        pruned, text = _pruned(
            source, calibration, options, solver=solver, columns=columns, cardinality=cardinality
        )
        if time_limit is None and method == "sdp":
            time_limit = SDP_SECONDS
    with view() as shown:
        shared: dict[str, Any] = {
            "method": method,
            "method_options": _given(cuts=cuts, time_limit=time_limit),
            "seed": seed,
            "jobs": jobs,
            "output": out,
            "on_rows": lambda done, name: shown.show(f"{name}, rows bounded: {done}", done, None),
        }
        if original is None:
            records = bound_layers(
                layers.problems,
                kinds=layers.kinds,
                rows=rows,
                columns=columns,
                solver=solver or "swap",
                **shared,
            )
        else:
            records = certify_model(
                original,
                pruned,
                calibration=text,
                rows_per_layer=rows or ROWS,
                **shared,
                **options,
            )
    output.print(
        _rows_table(records) if original is None and len(records) <= FEW else _kinds_table(records)
    )
    if original is None and any(problem.pooled for problem in layers.problems):
        output.print("rows of a shared budget: the bound is of their sum, weighted by ω")
    if out is not None:
        output.print(f"written: {out}", soft_wrap=True)


def _pruned(
    source: list[Path], calibration: str | None, options: dict[str, Any], **given: Any
) -> tuple[Path, str]:
    """The pruned folder and the text; `options` are left without what says how to prune.

    Raises:
        OptionError: several sources, no text, or an option that a pruned folder answers by itself.
    """
    if len(source) > 1:
        raise OptionError("`original` is of one pruned folder")
    if calibration is None:
        raise OptionError("`calibration` is missing: name text for the Gram matrices")
    for name in ("sparsity", "update", "damping", "damping_exponent"):
        given[name] = options.pop(name)
    for name, value in given.items():
        if value is not None and value != (FIELDS[name].default if name in FIELDS else None):
            raise OptionError(f"`{name}` is of masks that are searched, not of a pruned folder")
    return source[0], calibration


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
    from maskopt.models.evaluation.bound import by_kind

    table = Table(caption="gap: from objective to bound; no mask is better by more")
    table.add_column("layer kind")
    for heading in ("rows", "median gap", "worst gap", "seconds a row"):
        table.add_column(heading, justify="right")
    for kind, (rows, median, worst, seconds) in by_kind(records).items():
        table.add_row(kind, str(rows), f"{median:.2%}", f"{worst:.2%}", f"{seconds:.3f}")
    return table
