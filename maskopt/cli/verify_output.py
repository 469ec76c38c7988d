"""`maskopt verify`: re-read a pruned model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskopt.checks.verification import CHECKED, CLAIMS, EXACT
from maskopt.cli.console import output
from maskopt.cli.parameters import FIELDS, TEXT_SOURCES, Select, takes
from maskopt.cli.view import view
from maskopt.errors import OptionError

if TYPE_CHECKING:
    from maskopt.models.verification.verify import Verified


@takes(("include", "text_field", "threads", "trust_remote_code"))
def verify(
    folder: Annotated[Path, typer.Argument(help="Pruned folder, or an instance (.npz, .dat, …).")],
    options: dict[str, Any],
    solution: Annotated[
        Path | None,
        typer.Argument(help="Solution or proof of an instance, as `maskopt solve` wrote it."),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(
            help="Dense model, a folder or a name on the hub: weights that the prune did not update must "
            "be bit-identical to it."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help=f"Calibration text of the prune: errors and statuses of the layers of --include are "
            f"computed again. {TEXT_SOURCES}"
        ),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(help="Folder of the prune: check that a fine-tuned model kept its zeros."),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Of an instance: fail if a lower bound is trusted, not checked.",
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
    cardinality: Select = None,
    semi_structured: Annotated[
        bool | None,
        typer.Option(
            "--semi-structured/--no-semi-structured",
            help="Check that PyTorch can convert each 2:4 layer to its semi-structured format. Default: "
            "if a CUDA device is available.",
        ),
    ] = None,
) -> None:
    """Check a pruned model, a solution of an instance, or a pruned model that was trained further.

    A pruned model: file digests, the number of pruned weights per row, zeros,
    and with --original the weights that were not updated; of a smaller model
    also which parts were removed. Without --calibration, errors and statuses
    are reported as claimed.

    An instance and its solution: objectives, statuses and lower bounds; every
    leaf of a proof. Bounds that rest on a solver are listed as trusted.

    With --masks: the zeros of a model that was fine-tuned.

    The exit status is 1 where something does not hold.
    """
    given = {
        **options,
        "original": original,
        "calibration": calibration,
        "semi_structured": semi_structured,
        "strict": strict or None,
        "exact": exact or None,
        "cardinality": cardinality,
    }
    if masks is not None:
        _refuse("a model with --masks", {**given, "solution": solution}, "trust_remote_code")
        _print_fine_tuned(folder, masks, _verify(folder, None, options, masks=masks))
        return
    if solution is not None:
        from maskopt.cli.solve import check

        _refuse("a solution", given, "strict", "exact", "cardinality")
        check(folder, solution, EXACT if exact else CHECKED if strict else CLAIMS, cardinality)
        return
    if folder.suffix == ".npz":
        raise OptionError(f"{folder} is an instance: name its solution, too")
    from maskopt.models.verification.structured import is_smaller

    if is_smaller(folder):
        _refuse("a smaller model", given, "original")
        result = _verify(folder, original, options)
        _print_smaller(folder, original, result)
        return
    _refuse("a pruned model", given, "original", "calibration", "semi_structured", *options)
    result = _verify(folder, original, options, calibration=calibration)
    _print_pruned(folder, original, result)
    _convert(folder, result, semi_structured)


def _verify(folder: Path, original: str | None, options: dict[str, Any], **more: Any) -> Verified:
    from maskopt.models.checkpoints.checkpoint import resolve_model
    from maskopt.models.verification.verify import verify_model

    trusted = options["trust_remote_code"]
    home = None if original is None else resolve_model(original, trust_remote_code=trusted)
    given = {"layers": options["include"], **options, **more}
    given.pop("include")
    with view() as shown:
        return verify_model(
            folder, home, lambda done, total: shown.show("tensors", done, total), **given
        )


def _print_smaller(folder: Path, original: str | None, result: Verified) -> None:
    """What `maskopt prune-structured` wrote."""
    same = f", every other weight is that of {original}" if original is not None else ""
    output.print(
        f"{folder}: holds. {result.tensors} tensors, of which {result.cut} are smaller and "
        f"{result.updated} updated, {result.files} files, {result.weights:,} weights{same} "
        f"(checked: {', '.join(result.checked)}); {', '.join(result.claimed)}: claimed",
        soft_wrap=True,
    )


def _print_pruned(folder: Path, original: str | None, result: Verified) -> None:
    """What `maskopt prune` wrote."""
    updated = "trained" if "trained weights" in result.claimed else "refitted"
    kept = (
        "kept weight"
        if "kept weights" in result.checked
        else f"weight that is neither pruned nor {updated}"
    )
    same = f", every {kept} is that of {original}" if original is not None else ""
    output.print(
        f"{folder}: holds. {result.layers} layers, {result.rows} rows, {result.files} files, "
        f"sparsity {result.sparsity:.4f}{same} (checked); {_claims(result)}: claimed",
        soft_wrap=True,
    )


def _convert(folder: Path, result: Verified, semi_structured: bool | None) -> None:
    """Conversion of 2:4 layers by PyTorch, where it is asked for or there is a CUDA device."""
    from maskopt.models.architecture.source import choose_device
    from maskopt.models.verification import verify

    if semi_structured is None and result.two_four:
        semi_structured = choose_device("auto").type == "cuda"
        if not semi_structured:
            output.print("conversion by PyTorch (2:4): skipped, there is no CUDA device here")
    if semi_structured:
        converted = verify.semi_structured(folder)
        output.print(f"PyTorch accepts all {len(converted)} layers as semi-structured 2:4")


def _print_fine_tuned(folder: Path, pruned: Path, result: Verified) -> None:
    """A model that was trained further after a prune."""
    others = f". Of {result.others} tensors without a mask, {result.changed} changed"
    output.print(
        f"{folder}: holds. All {result.pruned} weights that {pruned} prunes are zero, in {result.tensors} "
        f"tensors; sparsity {result.sparsity:.4f}{others if result.others else ''}",
        soft_wrap=True,
    )


def _refuse(what: str, given: dict[str, Any], *takes: str) -> None:
    """Raise OptionError for an option of another check."""
    for name, value in given.items():
        usual = FIELDS[name].default if name in FIELDS else None
        if name not in takes and value != usual:
            raise OptionError(f"`{name}` does not apply to {what}")


def _claims(result: Verified) -> str:
    """The layers whose errors were computed again, and what is claimed."""
    count, claimed = len(result.checked_layers), ", ".join(result.claimed)
    if not count:
        return claimed
    if count < result.layers:
        rest = f"errors and statuses of the other {result.layers - count}"
        claimed = ", ".join([rest, *(c for c in result.claimed if c not in ("errors", "statuses"))])
    limit = f"{result.tolerance:.0e}"
    updated = ", refitted weights" if "refitted weights" in result.checked else ""
    return f"errors (to {limit}) and statuses of {count} layers{updated} (checked); {claimed}"
