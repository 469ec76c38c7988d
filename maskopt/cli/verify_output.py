"""`maskopt verify`: check a pruned model folder, or a solution of an instance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskopt.checks.verification import CHECKED, CLAIMS, EXACT
from maskopt.cli.command import CARDINALITY, SOURCES, command
from maskopt.cli.console import screen
from maskopt.cli.solve import check
from maskopt.cli.view import view
from maskopt.core.fields import REQUIRED, option, options_of
from maskopt.errors import OptionError, VerificationError
from maskopt.models.options.walk import WalkOptions

if TYPE_CHECKING:
    from maskopt.models.verification.verify import Verified

_OPTIONS = ("include", "text_field", "threads", "trust_remote_code")


@command(
    *(one for one in options_of(WalkOptions) if one.name in _OPTIONS),
    example="maskopt verify OUT --original MODEL",
)
def verify(
    model_or_instance: Path = option(
        REQUIRED, "Pruned model folder, or an instance (.npz, .dat, …).", argument=True
    ),
    solution: Path | None = option(
        None,
        "Solution or proof of the instance, as `maskopt solve` wrote it.",
        argument=True,
    ),
    original: str | None = option(
        None,
        "Dense model, a folder or a name on the hub: weights without an update must equal it bit for bit.",
    ),
    calibration: str | None = option(
        None,
        "Calibration text of the prune: errors and statuses of the layers of --include are computed again. "
        f"{SOURCES}.",
    ),
    masks: Path | None = option(
        None, "Folder of the prune: check that a fine-tuned model kept its zeros."
    ),
    strict: bool = option(False, "Of an instance: fail if a lower bound is trusted, not checked."),
    exact: bool = option(
        False,
        "Of an instance: repeat the checks of lower bounds and optima in rational arithmetic. Needs "
        "certificates or trees, unchanged weights and at most 200 inputs per row.",
    ),
    cardinality: int | None = CARDINALITY,
    semi_structured: bool | None = option(
        None,
        "Check that PyTorch can convert each 2:4 layer to its semi-structured format. Default: with CUDA.",
    ),
    **options: Any,
) -> None:
    """Check a pruned model, a solution of an instance, or a pruned model that was trained further.

    A pruned model: file digests, pruned weights per row, zeros, and with --original the weights that were not
    updated; of a smaller model also which parts were removed. Without --calibration, errors and statuses are
    reported as claimed. With --masks: the zeros of a fine-tuned model.

    A solution: objectives, statuses, lower bounds, every leaf of a proof. Bounds that rest on a solver are
    listed as trusted. The exit status is 1 if a check fails.
    """
    from maskopt.models.verification.structured import is_smaller

    known = {**options, "original": original, "calibration": calibration, "solution": solution}
    known |= {"semi_structured": semi_structured, "cardinality": cardinality}
    known |= {"strict": strict or None, "exact": exact or None}
    given = {name for name, value in known.items() if value is not None}
    if masks is not None:
        _refuse("a model with --masks", given, "trust_remote_code")
        _print_fine_tuned(
            model_or_instance, masks, _verify(model_or_instance, None, options, masks=masks)
        )
    elif solution is not None:
        _refuse("a solution", given, "solution", "strict", "exact", "cardinality")
        check(
            model_or_instance,
            solution,
            EXACT if exact else CHECKED if strict else CLAIMS,
            cardinality,
        )
    elif model_or_instance.suffix == ".npz":
        raise OptionError(f"{model_or_instance} is an instance: name its solution, too")
    elif is_smaller(model_or_instance):
        _refuse("a smaller model", given, "original")
        _print_smaller(model_or_instance, original, _verify(model_or_instance, original, options))
    else:
        _refuse("a pruned model", given, "original", "calibration", "semi_structured", *_OPTIONS)
        if "include" in given and calibration is None:
            raise VerificationError(
                "`include` chooses what `calibration` computes again; give both"
            )
        result = _verify(model_or_instance, original, options, calibration=calibration)
        _print_pruned(model_or_instance, original, result)
        _convert(model_or_instance, result, semi_structured)


def _verify(folder: Path, original: str | None, options: dict[str, Any], **more: Any) -> Verified:
    from maskopt.models.checkpoints.checkpoint import resolve_model
    from maskopt.models.verification.verify import verify_model

    trusted = options.get("trust_remote_code", False)
    home = None if original is None else resolve_model(original, trust_remote_code=trusted)
    given = {"layers": options.get("include", ()), **options, **more}
    given.pop("include", None)
    with view() as shown:
        return verify_model(
            folder, home, lambda done, total: shown.show("tensors", done, total), **given
        )


def _print_smaller(folder: Path, original: str | None, result: Verified) -> None:
    """What `maskopt prune-structured` wrote."""
    same = f", every other weight is that of {original}" if original is not None else ""
    screen.print(
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
    screen.print(
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
            screen.print("conversion by PyTorch (2:4): skipped, there is no CUDA device here")
    if semi_structured:
        converted = verify.semi_structured(folder)
        screen.print(f"PyTorch accepts all {len(converted)} layers as semi-structured 2:4")


def _print_fine_tuned(folder: Path, pruned: Path, result: Verified) -> None:
    """A model that was trained further after a prune."""
    others = f". Of {result.others} tensors without a mask, {result.changed} changed"
    screen.print(
        f"{folder}: holds. All {result.pruned} weights that {pruned} prunes are zero, in {result.tensors} "
        f"tensors; sparsity {result.sparsity:.4f}{others if result.others else ''}",
        soft_wrap=True,
    )


def _refuse(what: str, given: set[str], *takes: str) -> None:
    """Raise OptionError for an option of another check."""
    for name in sorted(given - {*takes}):
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
