"""`maskopt bound`: certified lower bounds and gaps of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from maskopt.cli.command import CARDINALITY, OVERWRITE, RECORDS, TEXT_OF_A_MODEL, command
from maskopt.cli.console import bound_cells, make_table, screen, written
from maskopt.cli.instances import OF_A_MODEL, load_layers
from maskopt.cli.view import view
from maskopt.core.fields import REQUIRED, option
from maskopt.errors import OptionError
from maskopt.experiments.store import check_format

if TYPE_CHECKING:
    from maskopt.models.evaluation.bound import GapRecord

#: sdp on a layer of a pruned model: wide layers converge in minutes, and bounds are valid at any time
SDP_SECONDS = 60.0
#: rows of a layer of a pruned model
ROWS = 4
#: up to so many rows are printed one by one
FEW = 24


@command(*OF_A_MODEL, example="maskopt bound OUT --original MODEL --calibration text.txt")
def bound(
    source: list[Path] = option(
        REQUIRED, "A pruned folder (with --original), a model, or instances.", argument=True
    ),
    original: str | None = option(None, "Dense model of the pruned folder."),
    method: str = option("sdp", "sdp, box, shift, or another bound of `maskopt solvers`."),
    solver: str | None = option(None, "Solver of the masks without --original. Default: swap."),
    rows: int | None = option(
        None, f"Rows sampled per layer. Default: all; {ROWS} with --original.", least=1
    ),
    columns: int | None = option(None, "Number of inputs sampled per row. Default: all.", least=1),
    cuts: int | None = option(None, "Rounds of triangle cuts for sdp; 8 is a good value.", least=0),
    layer_time_limit: float | None = option(
        None,
        f"Seconds for the rows of a layer. Default: none; {SDP_SECONDS:.0f} for sdp with --original.",
        least=0,
    ),
    jobs: int = option(1, "Number of rows at a time; −1: one per core."),
    seed: int = option(0, "Random seed of the sampled rows and inputs.", least=0),
    cardinality: int | None = CARDINALITY,
    calibration: str | None = TEXT_OF_A_MODEL,
    output: Path | None = RECORDS,
    overwrite: bool = OVERWRITE,
    **options: Any,
) -> None:
    """Certified lower bounds of rows, and how far masks are from them.

    With --original, SOURCE is a pruned folder whose masks are bounded: give --samples and --seq-len of the
    prune.
    """
    from maskopt.models.evaluation.bound import bound_layers, certify_model

    if output is not None:
        check_format(output, overwrite=overwrite)
    if original is None:
        layers = load_layers(
            source, options, calibration=calibration, seed=seed, cardinality=cardinality
        )
    else:
        searched = {"solver": solver, "columns": columns, "cardinality": cardinality}
        _check_pruned(source, calibration, {**options, **searched})
        if layer_time_limit is None and method == "sdp":
            layer_time_limit = SDP_SECONDS
    limits = {"cuts": cuts, "time_limit": layer_time_limit}
    with view() as shown:
        shared: dict[str, Any] = {
            "method": method,
            "method_options": {name: x for name, x in limits.items() if x is not None},
            "seed": seed,
            "jobs": jobs,
            "output": output,
            "on_rows": lambda done, name: shown.show(f"{name}, rows bounded: {done}", done, None),
        }
        if original is None:
            shared |= {"rows": rows, "columns": columns, "solver": solver or "swap"}
            records = bound_layers(layers.problems, kinds=layers.kinds, **shared)
        else:
            shared |= {"calibration": calibration, "rows_per_layer": rows or ROWS}
            records = certify_model(original, source[0], **shared, **options)
    few = original is None and len(records) <= FEW
    screen.print(_rows_table(records) if few else _kinds_table(records))
    if original is None and any(problem.shared_budget for problem in layers.problems):
        screen.print("rows of a shared budget: the bound is of their sum, weighted by ω")
    if output is not None:
        written(output)


def _check_pruned(source: list[Path], calibration: str | None, given: dict[str, Any]) -> None:
    """Raise OptionError for several sources, no text, or an option that a pruned folder decides."""
    if len(source) > 1:
        raise OptionError("`original` is of one pruned folder")
    if calibration is None:
        raise OptionError("`calibration` is missing: name text for the Gram matrices")
    searched = (
        "sparsity",
        "update",
        "damping",
        "damping_exponent",
        "solver",
        "columns",
        "cardinality",
    )
    for name in searched:
        if given.get(name) is not None:
            raise OptionError(f"`{name}` is of masks that are searched, not of a pruned folder")


_CAPTION = "gap: from objective to bound; no mask is better by more"


def _rows_table(records: Sequence[GapRecord]) -> Table:
    """One line per row, in the original units of the instance."""
    headings = ("instance, n", "row", "objective", "bound", "gap", "seconds")
    table = make_table(*headings, no_wrap=True, caption=_CAPTION)
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

    headings = ("layer kind", "rows", "median gap", "worst gap", "seconds a row")
    table = make_table(*headings, caption=_CAPTION)
    for kind, (rows, median, worst, seconds) in by_kind(records).items():
        table.add_row(kind, str(rows), f"{median:.2%}", f"{worst:.2%}", f"{seconds:.3f}")
    return table
