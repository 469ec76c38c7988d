"""`maskopt verify`, `report` and `masks`: folders and files that other commands wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskopt.checks.verification import CHECKED, CLAIMS, EXACT, Require
from maskopt.cli.command import CARDINALITY, MAXIMIZE, OVERWRITE, SOURCES, command, text_of
from maskopt.cli.console import screen, written
from maskopt.cli.solve import check
from maskopt.cli.view import view
from maskopt.core.fields import OUTPUT, REQUIRED, argument, option, options_of
from maskopt.errors import OptionError, VerificationError
from maskopt.models.checkpoints.schema import PRUNE
from maskopt.models.options.walk import WalkOptions

if TYPE_CHECKING:
    from maskopt.models.verification.verify import Verified

_OPTIONS = ("include", "text_field", "threads", "trust_remote_code")


@command(
    *options_of(WalkOptions, *_OPTIONS),
    example="maskopt verify OUT --original MODEL",
)
def verify(
    model_or_instance: Path = argument("Pruned model folder, instance or matrix."),
    solution: Path | None = argument(
        "Solution or proof of the instance, as `maskopt solve` wrote it.", None
    ),
    original: str | None = option(
        None,
        "Dense model, a folder or a name on the hub: weights without an update must equal it bit for bit.",
    ),
    calibration: list[str] | None = option(
        None,
        "Calibration text of the prune (self: the text that the model wrote): errors and statuses of the "
        "layers of --include are computed again. "
        f"{SOURCES}.",
    ),
    masks: Path | None = option(
        None, "Folder of the prune: check that a fine-tuned model kept its zeros."
    ),
    strict: bool = option(False, "Fail if a lower bound is trusted, not checked."),
    exact: bool = option(
        False,
        "Repeat the checks of lower bounds and optima in rational arithmetic. Needs "
        "certificates or trees, unchanged weights and at most 200 inputs per row.",
    ),
    cardinality: int | None = CARDINALITY,
    maximize: bool = MAXIMIZE,
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
    path = model_or_instance
    known = {**options, "original": original, "calibration": calibration, "solution": solution}
    known |= {"semi_structured": semi_structured, "cardinality": cardinality}
    known |= {"strict": strict or None, "exact": exact or None, "maximize": maximize or None}
    given = {name for name, value in known.items() if value is not None}
    if masks is not None:
        _refuse("a model with --masks", given, "trust_remote_code")
        _print(path, _fine_tuned(masks, _verify(path, None, options, masks=masks)))
    elif solution is not None:
        _refuse("a solution", given, "solution", "strict", "exact", "cardinality", "maximize")
        require: Require = EXACT if exact else CHECKED if strict else CLAIMS
        check(path, solution, require, cardinality, maximize)
    elif path.suffix in (".npz", ".npy", ".csv", ".mtx"):
        raise OptionError(f"{path} is an instance: name its solution, too")
    else:
        _verify_folder(path, original, text_of(calibration), semi_structured, options, given)


def _verify_folder(
    path: Path,
    original: str | None,
    calibration: Any,
    semi_structured: bool | None,
    options: dict[str, Any],
    given: set[str],
) -> None:
    """Check a folder that `maskopt prune` or `prune-structured` wrote."""
    from maskopt.models.verification.manifest import read_record

    _refuse("a pruned model", given, "original", "calibration", "semi_structured", *_OPTIONS)
    if read_record(path)["kind"] != PRUNE:
        _refuse("a smaller model", given, "original")
        _print(path, _smaller(original, _verify(path, original, options)))
        return
    if "include" in options and calibration is None:
        raise VerificationError("`include` chooses what `calibration` computes again; give both")
    result = _verify(path, original, options, calibration=calibration)
    _print(path, _pruned(original, result))
    _convert(path, result, semi_structured)


def _verify(folder: Path, original: str | None, options: dict[str, Any], **more: Any) -> Verified:
    from maskopt.models.checkpoints.checkpoint import resolve_model
    from maskopt.models.verification.verify import verify_model

    trusted = options.get("trust_remote_code", False)
    home = None if original is None else resolve_model(original, trust_remote_code=trusted)
    given = {"layers" if name == "include" else name: value for name, value in options.items()}
    with view() as shown:
        return verify_model(
            folder, home, lambda done, total: shown.show("tensors", done, total), **given, **more
        )


def _print(folder: Path, what: str) -> None:
    screen.print(f"{folder}: holds. {what}", soft_wrap=True)


def _smaller(original: str | None, result: Verified) -> str:
    """Describe a checked folder of `maskopt prune-structured`."""
    same = cut = ""
    if original is not None:
        same, cut = f", every other weight is that of {original}", f" {result.cut} are smaller and"
    return (
        f"{result.tensors} tensors, of which{cut} {result.updated} updated, "
        f"{result.files} files, {result.weights:,} weights{same} "
        f"(checked: {', '.join(result.checked)}); {', '.join(result.claimed)}: claimed"
    )


def _pruned(original: str | None, result: Verified) -> str:
    """Describe a checked folder of `maskopt prune`."""
    changed = "trained" if "trained weights" in result.claimed else "updated"
    every = "kept weight"
    if "kept weights" not in result.checked:
        every = f"weight that is neither pruned nor {changed}"
    same = f", every {every} is that of {original}" if original is not None else ""
    return (
        f"{result.layers} layers, {result.rows} rows, {result.files} files, "
        f"sparsity {result.sparsity:.4f}{same} (checked); {_claims(result)}: claimed"
    )


def _claims(result: Verified) -> str:
    """List the layers whose errors were computed again, and all claims."""
    count, claimed = len(result.checked_layers), list(result.claimed)
    if not count:
        return ", ".join(claimed)
    if count < result.layers:
        rest = f"errors and statuses of the other {result.layers - count}"
        claimed = [rest, *(c for c in claimed if c not in ("errors", "statuses"))]
    updated = ", updated weights" if "updated weights" in result.checked else ""
    return (
        f"errors (to {result.tolerance:.0e}) and statuses of {count} layers{updated} (checked); "
        + ", ".join(claimed)
    )


def _convert(folder: Path, result: Verified, semi_structured: bool | None) -> None:
    """Convert 2:4 layers by PyTorch, if this is requested or there is a CUDA device."""
    from maskopt.models.architecture.source import choose_device
    from maskopt.models.verification import verify

    if semi_structured is None and result.two_four:
        semi_structured = choose_device("auto").type == "cuda"
        if not semi_structured:
            screen.print("conversion by PyTorch (2:4): skipped, there is no CUDA device here")
    if semi_structured:
        converted = verify.semi_structured(folder)
        screen.print(f"PyTorch accepts all {len(converted)} layers as semi-structured 2:4")


def _fine_tuned(pruned: Path, result: Verified) -> str:
    """Describe a checked model that was trained further after a prune."""
    others = f". Of {result.others} tensors without a mask, {result.changed} changed"
    return (
        f"All {result.pruned} weights that {pruned} prunes are zero, in {result.tensors} tensors; sparsity "
        f"{result.sparsity:.4f}{others if result.others else ''}"
    )


def _refuse(what: str, given: set[str], *takes: str) -> None:
    """Raise OptionError for an option of another check."""
    for name in sorted(given - {*takes}):
        raise OptionError(f"`{name}` does not apply to {what}")


@command(example="maskopt report OUT --output report.html")
def report(
    folders: list[Path] = argument("Folders that `maskopt prune` wrote; several are compared."),
    evaluation: Path | None = option(None, "File that `maskopt eval --json FILE` wrote."),
    gaps: Path | None = option(
        None, "File that `maskopt bound --output FILE.jsonl` wrote about the first folder."
    ),
    picture: str | None = option(None, "Tensor whose mask is shown. Default: the first one."),
    figures: Path | None = option(None, "Folder for the figures as .png and .svg.", OUTPUT),
    output: Path = option(Path("report.html"), "The page, .html.", OUTPUT),
    overwrite: bool = OVERWRITE,
) -> None:
    """Write an HTML page with options, errors, improvements, a mask, and the command to repeat the run.

    The page is self-contained: it needs no network and holds no script.
    """
    from maskopt.report.prune_page import write_report

    if figures is not None and figures.exists() and not figures.is_dir():
        raise OptionError(f"{figures}: is no folder")
    found = write_report(
        output,
        folders,
        evaluation=evaluation,
        gaps=gaps,
        picture=picture,
        figures=figures,
        overwrite=overwrite,
    )
    for path in found:
        written(path)


@command(
    example="maskopt masks apply MODEL OUT/maskopt-masks.bits --output MASKED", name="masks apply"
)
def apply(
    model: Path = argument("Folder of the dense model."),
    masks: Path = argument("A file of packed masks."),
    output: Path = option(REQUIRED, "Folder for the masked model.", OUTPUT),
    overwrite: bool = OVERWRITE,
) -> None:
    """Copy a model with the masked weights set to zero."""
    from maskopt.models.pruning.output import apply_masks

    apply_masks(model, masks, output, overwrite=overwrite)
    written(output, "masked model")


@command(example="maskopt masks export OUT --output masks.bits", name="masks export")
def export(
    model: Path = argument("Folder of a pruned model."),
    output: Path = option(REQUIRED, "File for the packed masks.", OUTPUT),
    overwrite: bool = OVERWRITE,
) -> None:
    """Write the nonzero pattern of the linear layers as packed masks."""
    from maskopt.models.pruning.output import extract_masks

    sparsities = extract_masks(model, output, overwrite=overwrite)
    mean = sum(sparsities.values()) / len(sparsities)
    written(output, f"masks of {len(sparsities)} tensors, mean sparsity {mean:.4f}")
