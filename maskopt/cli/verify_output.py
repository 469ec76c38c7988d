"""`maskopt verify`: re-read a pruned model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskopt.cli.console import output
from maskopt.cli.parameters import FIELDS, TEXT_SOURCES, Select, takes
from maskopt.cli.view import view
from maskopt.errors import OptionError
from maskopt.verification import CHECKED, CLAIMS, EXACT

if TYPE_CHECKING:
    from maskopt.model.verify import Verified


@takes(("include", "text_field", "threads", "trust_remote_code"))
def verify(
    folder: Annotated[
        Path, typer.Argument(help="What `maskopt prune` wrote, or an instance (.npz, .dat, …).")
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
            help="What the prune was given: errors and statuses are computed again, of the layers of "
            f"--include. {TEXT_SOURCES}"
        ),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            help="Of a pruned model that was trained on: the folder of the prune, whose zeros it must have "
            "kept."
        ),
    ] = None,
    require_checked: Annotated[
        bool,
        typer.Option(
            "--require-checked",
            help="Of an instance: fail if a lower bound is only trusted to a solver.",
        ),
    ] = False,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Of an instance: repeat the checks of lower bounds and optima in rational arithmetic. Needs "
            "certificates or trees, unchanged weights and at most 200 inputs a row.",
        ),
    ] = False,
    select: Select = None,
    semi_structured: Annotated[
        bool | None,
        typer.Option(
            "--semi-structured/--no-semi-structured",
            help="Convert every 2:4 layer by PyTorch; default: where there is a CUDA device.",
        ),
    ] = None,
) -> None:
    """Check a pruned model, a solution of an instance, or a pruned model that was trained further.

    A pruned model: files, the counts of every row, zeros, and with --against
    that kept weights equal the original's; of a smaller model what was cut.
    What needs a calibration text and has none is reported as claimed.

    An instance and its solution: objectives, statuses and lower bounds.
    Bounds that a solver is only trusted with are named.

    With --masks: the zeros of a model that was trained further.

    The exit status is 1 where something does not hold.
    """
    if masks is not None:
        trusted = options.pop("trust_remote_code")
        _refuse(
            f"a folder that `maskopt prune` wrote; of {folder}, the zeros are checked",
            solution=solution,
            against=against,
            calibration=calibration,
            require_checked=require_checked or None,
            exact=exact or None,
            select=select,
            semi_structured=semi_structured,
            **options,
        )
        _verify_masks(folder, masks, trusted)
        return
    if solution is not None:
        from maskopt.cli.solve import check

        of_a_model = {"against": against, "calibration": calibration, **options}
        _refuse(
            f"a pruned model; {solution} is checked as a solution",
            semi_structured=semi_structured,
            **of_a_model,
        )
        check(folder, solution, EXACT if exact else CHECKED if require_checked else CLAIMS, select)
        return
    if folder.suffix == ".npz":
        raise OptionError(f"{folder} is an instance: name its solution, too")
    _refuse("an instance and its solution", select=select)
    if require_checked or exact:
        option = "exact" if exact else "require_checked"
        raise OptionError(
            f"`{option}` is for an instance and its solution; of {folder}, what is checked and what is "
            "claimed is printed"
        )
    from maskopt.model.verify_smaller import is_smaller

    if is_smaller(folder):
        _refuse(
            f"a pruned model; {folder} was made smaller",
            calibration=calibration,
            semi_structured=semi_structured,
            **options,
        )
        _verify_smaller(folder, against)
    else:
        _verify_model(folder, against, calibration, semi_structured, options)


def _verify_smaller(folder: Path, against: str | None) -> None:
    """What `maskopt shrink` wrote."""
    from maskopt.model.checkpoint import resolve_model
    from maskopt.model.verify_smaller import verify_smaller

    home = None if against is None else resolve_model(against)
    with view() as shown:
        found = verify_smaller(folder, home, lambda done, total: shown.show("tensors", done, total))
    same = f", every other weight is that of {against}" if against is not None else ""
    output.print(
        f"{folder}: holds. {found.tensors} tensors, of which {found.cut} are smaller and {found.set_anew} "
        f"set anew, {found.files} files, {found.weights:,} weights{same} "
        f"(checked: {', '.join(found.checked)}); {', '.join(found.claimed)}: claimed",
        soft_wrap=True,
    )


def _verify_model(
    folder: Path,
    against: str | None,
    calibration: str | None,
    semi_structured: bool | None,
    options: dict[str, Any],
) -> None:
    """What `maskopt prune` wrote, and what was found of it in words."""
    from maskopt.model import verify as library
    from maskopt.model.checkpoint import resolve_model
    from maskopt.model.opening import choose_device

    trusted = options["trust_remote_code"]
    with view() as shown:
        result = library.verify_output(
            folder,
            None if against is None else resolve_model(against, trust_remote_code=trusted),
            lambda done, total: shown.show("tensors", done, total),
            calibration=calibration,
            layers=options.pop("include"),
            **options,
        )
    anew = "trained" if "trained weights" in result.claimed else "refitted"
    kept = (
        "kept weight"
        if "kept weights" in result.checked
        else f"weight that is neither pruned nor {anew}"
    )
    same = f", every {kept} is that of {against}" if against is not None else ""
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


def _verify_masks(folder: Path, pruned: Path, trusted: bool) -> None:
    """A model that was trained on after it was pruned."""
    from maskopt.model.verify_masks import verify_masks

    with view() as shown:
        found = verify_masks(
            folder,
            pruned,
            lambda done, total: shown.show("tensors", done, total),
            trust_remote_code=trusted,
        )
    others = f". Of {found.others} tensors without a mask, {found.changed} changed"
    output.print(
        f"{folder}: holds. All {found.pruned} weights that {pruned} prunes are zero, in {found.tensors} "
        f"tensors; sparsity {found.sparsity:.4f}{others if found.others else ''}",
        soft_wrap=True,
    )


def _refuse(belongs_to: str, **given: Any) -> None:
    """Raise OptionError for an option of another check."""
    for name, value in given.items():
        if value != (FIELDS[name].default if name in FIELDS else None):
            raise OptionError(f"`{name}` is for {belongs_to}")


def _told_apart(result: Verified) -> str:
    """The layers whose errors were computed again, and what is claimed."""
    count, claimed = len(result.checked_layers), ", ".join(result.claimed)
    if not count:
        return claimed
    if count < result.layers:
        rest = f"errors and statuses of the other {result.layers - count}"
        claimed = ", ".join([rest, *(c for c in result.claimed if c not in ("errors", "statuses"))])
    limit = f"{result.tolerance:.0e}"
    anew = ", refitted weights" if "refitted weights" in result.checked else ""
    return f"errors (to {limit}) and statuses of {count} layers{anew} (checked); {claimed}"
