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
        _verify_masks(model_or_instance, masks, options.get("trust_remote_code", False))
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
        _verify_smaller(model_or_instance, original)
    else:
        _refuse("a pruned model", given, "original", "calibration", "semi_structured", *_OPTIONS)
        if "include" in given and calibration is None:
            raise VerificationError(
                "`include` chooses what `calibration` computes again; give both"
            )
        _verify_model(model_or_instance, original, calibration, semi_structured, options)


def _verify_smaller(folder: Path, original: str | None) -> None:
    """What `maskopt prune-structured` wrote."""
    from maskopt.models.checkpoints.checkpoint import resolve_model
    from maskopt.models.verification.structured import verify_smaller

    home = None if original is None else resolve_model(original)
    with view() as shown:
        found = verify_smaller(folder, home, lambda done, total: shown.show("tensors", done, total))
    same = f", every other weight is that of {original}" if original is not None else ""
    screen.print(
        f"{folder}: holds. {found.tensors} tensors, of which {found.cut} are smaller and {found.set_anew} "
        f"updated, {found.files} files, {found.weights:,} weights{same} "
        f"(checked: {', '.join(found.checked)}); {', '.join(found.claimed)}: claimed",
        soft_wrap=True,
    )


def _verify_model(
    folder: Path,
    original: str | None,
    calibration: str | None,
    semi_structured: bool | None,
    options: dict[str, Any],
) -> None:
    """What `maskopt prune` wrote, and what was found of it in words."""
    from maskopt.models.architecture.opening import choose_device
    from maskopt.models.checkpoints.checkpoint import resolve_model
    from maskopt.models.verification import verify as library

    trusted = options.get("trust_remote_code", False)
    with view() as shown:
        result = library.verify_output(
            folder,
            None if original is None else resolve_model(original, trust_remote_code=trusted),
            lambda done, total: shown.show("tensors", done, total),
            calibration=calibration,
            layers=options.pop("include", ()),
            **options,
        )
    anew = "trained" if "trained weights" in result.claimed else "refitted"
    kept = (
        "kept weight"
        if "kept weights" in result.checked
        else f"weight that is neither pruned nor {anew}"
    )
    same = f", every {kept} is that of {original}" if original is not None else ""
    screen.print(
        f"{folder}: holds. {result.layers} layers, {result.rows} rows, {result.files} files, "
        f"sparsity {result.sparsity:.4f}{same} (checked); {_claimed(result)}: claimed",
        soft_wrap=True,
    )
    if semi_structured is None and result.two_four:
        semi_structured = choose_device("auto").type == "cuda"
        if not semi_structured:
            screen.print("conversion by PyTorch (2:4): skipped, there is no CUDA device here")
    if semi_structured:
        converted = library.semi_structured(folder)
        screen.print(f"PyTorch accepts all {len(converted)} layers as semi-structured 2:4")


def _verify_masks(folder: Path, pruned: Path, trusted: bool) -> None:
    """A model that was trained on after it was pruned."""
    from maskopt.models.verification.masks import verify_masks

    with view() as shown:
        found = verify_masks(
            folder,
            pruned,
            lambda done, total: shown.show("tensors", done, total),
            trust_remote_code=trusted,
        )
    others = f". Of {found.others} tensors without a mask, {found.changed} changed"
    screen.print(
        f"{folder}: holds. All {found.pruned} weights that {pruned} prunes are zero, in {found.tensors} "
        f"tensors; sparsity {found.sparsity:.4f}{others if found.others else ''}",
        soft_wrap=True,
    )


def _refuse(what: str, given: set[str], *takes: str) -> None:
    """Raise OptionError for an option of another check."""
    for name in sorted(given - {*takes}):
        raise OptionError(f"`{name}` does not apply to {what}")


def _claimed(result: Verified) -> str:
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
