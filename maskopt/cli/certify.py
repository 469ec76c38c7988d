"""`maskopt bound` and `maskopt certify`: certified gaps of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from maskopt.cli.console import output, progress_bars
from maskopt.cli.instances import Calibration, Samples, SeqLen, load_layers, option_list
from maskopt.pattern import parse_pattern

Method = Annotated[str, typer.Option(help="sdp, box, shift, or another registered bound.")]
TimeLimit = Annotated[
    float | None, typer.Option(min=0, help="Seconds for the rows of one layer together.")
]
Cuts = Annotated[
    int | None, typer.Option(min=0, help="Of sdp: rounds of triangle cuts; 8 tighten it well.")
]
#: of a layer in `certify`: wide layers take minutes to converge, and the bound is valid at any time
SDP_SECONDS = 60.0
Out = Annotated[Path | None, typer.Option("--output", help=".jsonl (resumable), .csv or .parquet.")]


def bound(
    source: Annotated[list[Path], typer.Argument(help="A model folder, or .npz instances.")],
    method: Method = "sdp",
    solver: Annotated[str, typer.Option(help="Whose masks stand beside the bounds.")] = "swap",
    rows: Annotated[int | None, typer.Option(min=1, help="Rows a layer; all by default.")] = None,
    columns: Annotated[
        int | None, typer.Option(min=1, help="Inputs sampled per row; all by default.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="0.6 or 2:4; by default what the instances say.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Of a model: layer name patterns, separated by commas.")
    ] = None,
    calibration: Calibration = None,
    samples: Samples = 32,
    seq_len: SeqLen = 512,
    cuts: Cuts = None,
    time_limit: TimeLimit = None,
    seed: Annotated[int, typer.Option(help="Of the sampled rows and inputs.")] = 0,
    out: Out = None,
) -> None:
    """Certified lower bounds of rows, beside the masks of a solver."""
    from maskopt.certify import bound_layers

    wanted = parse_pattern(pattern) if pattern else None
    problems = load_layers(
        source,
        pattern=wanted,
        layers=layers,
        seed=seed,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
    )
    with progress_bars() as bars:
        task = bars.add_task("bounding", total=None)
        records = bound_layers(
            problems,
            rows=rows,
            columns=columns,
            solver=solver,
            method=method,
            method_options=_given(cuts=cuts, time_limit=time_limit),
            seed=seed,
            output=out,
            on_rows=lambda done, name: bars.update(task, description=name, completed=done),
        )
    _show(records, out)


def certify(
    model: Annotated[Path, typer.Argument(help="The original model folder.")],
    pruned: Annotated[Path, typer.Argument(help="What `maskopt prune` made of it.")],
    calibration: Annotated[str, typer.Option(help="Text file, folder, or hf:DATASET.")],
    rows_per_layer: Annotated[int, typer.Option(min=1, help="Rows sampled from a layer.")] = 4,
    layers: Annotated[
        str | None, typer.Option(help="Layer name patterns, separated by commas; all by default.")
    ] = None,
    method: Method = "sdp",
    samples: Samples = 32,
    seq_len: SeqLen = 512,
    cuts: Cuts = None,
    time_limit: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds for the rows of one layer; of sdp, 60 by default."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampled rows and the windows.")] = 0,
    out: Out = None,
) -> None:
    """How far the masks of a pruned model are from the best possible: certified, full width."""
    from maskopt.certify import certify_model

    if time_limit is None and method == "sdp":
        time_limit = SDP_SECONDS
    with progress_bars() as bars:
        task = bars.add_task("certifying", total=None)
        records = certify_model(
            model,
            pruned,
            calibration=calibration,
            rows_per_layer=rows_per_layer,
            layers=option_list(layers),
            method=method,
            method_options=_given(cuts=cuts, time_limit=time_limit),
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            output=out,
            on_rows=lambda done, name: bars.update(task, description=name, completed=done),
        )
    _show(records, out)


def _given(**options: Any) -> dict[str, Any]:
    """What was asked for; the rest is the method's own affair."""
    return {name: value for name, value in options.items() if value is not None}


def _show(records: Sequence[Any], out: Path | None) -> None:
    from maskopt.certify import by_kind

    table = Table(caption="gap = 1 − bound/objective; no mask of these rows can be better by more")
    table.add_column("layer kind")
    for heading in ("rows", "median gap", "worst gap", "seconds a row"):
        table.add_column(heading, justify="right")
    for kind, (rows, median, worst, seconds) in by_kind(records).items():
        table.add_row(kind, str(rows), f"{median:.2%}", f"{worst:.2%}", f"{seconds:.3f}")
    output.print(table)
    if out is not None:
        output.print(f"written: {out}", soft_wrap=True)
