"""`maskopt verify`: re-read a pruned model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskopt.cli.console import output, progress_bars
from maskopt.cli.parameters import TEXT_SOURCES, option_list, takes
from maskopt.errors import OptionError

if TYPE_CHECKING:
    from maskopt.model.verify import Verified


@takes(("text_field", "threads", "trust_remote_code"))
def verify(
    folder: Annotated[
        Path, typer.Argument(help="What `maskopt prune` wrote, or an .npz instance.")
    ],
    options: dict[str, Any],
    solution: Annotated[
        Path | None, typer.Argument(help="Of an instance: what `maskopt solve` wrote.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="The original, a folder or a name on the hub: kept weights are its bits."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help=f"What the prune was given: errors and statuses are computed again. {TEXT_SOURCES}"
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--include",
            "--layers",
            help="Of which layers: name patterns, separated by commas; all by default.",
        ),
    ] = None,
    require_checked: Annotated[
        bool,
        typer.Option(
            "--require-checked", help="Of an instance: refuse what rests on a solver's word."
        ),
    ] = False,
    semi_structured: Annotated[
        bool | None,
        typer.Option(
            "--semi-structured/--no-semi-structured",
            help="Convert every 2:4 layer by PyTorch; default: where there is a CUDA device.",
        ),
    ] = None,
) -> None:
    """Check a pruned model: files, exact counts of every row, zeros, bit-identity to the original. Or an
    instance and its solution: everything that is claimed of the masks.

    What only the calibration text can show is called claimed.
    """
    if solution is not None:
        from maskopt.cli.solve import check

        check(folder, solution, require_checked)
        return
    if folder.suffix == ".npz":
        raise OptionError(f"{folder} is an instance: name its solution, too")
    from maskopt.model import verify as library
    from maskopt.model.checkpoint import resolve_model
    from maskopt.model.opening import choose_device

    with progress_bars() as bars:
        task = bars.add_task("tensors", total=None)
        result = library.verify_output(
            folder,
            None if against is None else resolve_model(against),
            lambda done, total: bars.update(task, completed=done, total=total),
            calibration=calibration,
            layers=option_list(layers),
            **options,
        )
    same = f", every kept weight is that of {against}" if against is not None else ""
    output.print(
        f"{folder}: holds. {result.layers} layers, {result.rows} rows, {result.files} files, "
        f"sparsity {result.sparsity:.4f}{same} (checked); {_told_apart(result)}: claimed",
        soft_wrap=True,
    )
    if semi_structured is None and result.two_four:
        semi_structured = choose_device("auto").type == "cuda"
        if not semi_structured:
            output.print("conversion by PyTorch (2:4): skipped, there is no CUDA device here")
    if semi_structured:
        converted = library.semi_structured(folder)
        output.print(f"PyTorch accepts all {len(converted)} layers as semi-structured 2:4")


def _told_apart(result: Verified) -> str:
    """The layers whose errors were computed again, and what is claimed."""
    count, claimed = len(result.checked_layers), ", ".join(result.claimed)
    if not count:
        return claimed
    if count < result.layers:
        rest = f"errors and statuses of the other {result.layers - count}"
        claimed = ", ".join([rest, *(c for c in result.claimed if c not in ("errors", "statuses"))])
    limit = f"{result.tolerance:.0e}"
    return f"errors (to {limit}) and statuses of {count} layers (checked); {claimed}"
