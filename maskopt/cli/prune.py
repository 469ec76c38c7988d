"""`maskopt prune`: a model folder in, a pruned model folder out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from maskopt.cli.console import errors, output
from maskopt.cli.dry_run import dry_run
from maskopt.cli.parameters import (
    ALL,
    CALIBRATION,
    OUTPUT,
    TEXT_SOURCES,
    Model,
    Overwrite,
    Resume,
    StoredGrams,
    output_to,
    takes,
    tokens_file,
)
from maskopt.cli.prune_view import PruneView
from maskopt.cli.ranks import again, ranks, speaks
from maskopt.cli.view import View, clock, view
from maskopt.errors import OptionError

if TYPE_CHECKING:
    from maskopt.models.checkpoints.report import PartReport, PruneReport


@takes(ALL, config=True)
def prune(
    model: Model,
    options: dict[str, Any],
    out: Annotated[Path | None, output_to("Folder for the pruned model.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help=TEXT_SOURCES, rich_help_panel=CALIBRATION, metavar="…")
    ] = None,
    grams: StoredGrams = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    dry: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Estimate memory, disk and time; write nothing. --output and --calibration are optional.",
            rich_help_panel=OUTPUT,
            metavar="",
        ),
    ] = False,
) -> None:
    """Prune every linear layer in the decoder blocks of a causal language model.

    The model is read block by block and not changed. `maskopt verify OUT --original MODEL` checks the result.
    """
    from maskopt.models.checkpoints.workspace import check_output
    from maskopt.models.pruning.prune import prune_model

    here = ranks()
    inputs: dict[str, Any] = {"model": model, "calibration": calibration, "grams": grams}
    if out is None and not dry:
        raise OptionError("`output` is missing: name a folder for the pruned model")
    if out is not None:
        here.agreed(lambda: check_output(out, overwrite=overwrite, resume=resume, **inputs))
    if dry:
        dry_run(model, calibration, grams, out, options)
        return
    assert out is not None
    with told_of_resume(out), view() as shown:
        # a part of it is done already, or several processes share it
        known = resume or grams is not None or here.size > 1
        expected = None if known else _told_beforehand(shown, model, calibration, options)
        report = prune_model(
            model,
            calibration=calibration,
            grams=grams,
            output=out,
            overwrite=overwrite,
            resume=resume,
            on_progress=PruneView(shown, expected),
            ranks=here,
            **options,
        )
    show_report(report)
    output.print(f"pruned model, masks and manifest: {out}", soft_wrap=True)


def _told_beforehand(
    shown: View, model: str, calibration: str | None, options: dict[str, Any]
) -> float | None:
    """Say how long the prune will take and how much memory, where that is worth the seconds of finding out;
    the time, in seconds."""
    from maskopt.models.pruning.plan import is_small, plan_prune

    missing = calibration is not None and not (
        calibration.startswith("hf:") or Path(calibration).exists()
    )
    if is_small(model) or missing:  # of which the prune says more
        return None
    plan = plan_prune(model, tokens_file(calibration), **options)
    time = "unknown" if plan.seconds is None else f"about {clock(plan.seconds)}"
    shown.say(
        f"time, estimated: {time}; memory at the peak: {plan.memory.gib:.2f} GiB",
        expected_seconds=plan.seconds,
        expected_gib=round(plan.memory.gib, 3),
    )
    return plan.seconds


@contextmanager
def told_of_resume(
    out: Path, kept: str = "finished blocks are", none: str = "no block was finished"
) -> Iterator[None]:
    """Of an interrupted run, what is `kept` or that there is `none`, and the command that goes on."""
    from maskopt.models.blockwise.distributed import LostRankError
    from maskopt.models.checkpoints.workspace import unfinished

    try:
        yield
    except (KeyboardInterrupt, LostRankError):
        if speaks():
            lines = (
                [f"{out}: {kept} kept; go on with", again("--resume")]
                if unfinished(out)
                else [f"{out}: {none}; nothing of this run is kept"]
            )
            errors.print(*lines, sep="\n", soft_wrap=True, markup=False, emoji=False)
        raise


def show_report(report: PruneReport) -> None:
    """One line per kind of layer; errors relative to the energy of the layers' outputs."""
    from maskopt.models.checkpoints.bos import Beginning

    held = any(layer.relative_held is not None for layer in report.layers)
    table = Table(caption="errors are parts of the energy of the layers' outputs")
    refit = any(layer.error_kept is not None for layer in report.layers)
    traded = any(layer.error_uniform is not None for layer in report.layers)
    started = any(layer.error_start is not None for layer in report.layers)
    apart = len({layer.pattern for layer in report.layers}) > 1
    headings = [
        "layer kind",
        "layers",
        *(["pruned"] if apart else []),
        *(["start, uniform"] if traded else []),
        *(["start error"] if started else []),
    ]
    headings += ["before refit"] if refit else []
    headings += ["error", *(["error/start"] if started else [])]
    headings += [*(["held-out error"] if held else []), "seconds"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "layer kind" else "right")
    for kind, all_layers in report.by_kind().items():
        layers = [layer for layer in all_layers if not layer.fallback]  # theirs are other errors
        energy = sum(layer.energy for layer in layers)
        end = sum(layer.error for layer in layers)
        starts = [layer.error_start for layer in layers if layer.error_start is not None]
        begin = sum(starts) if starts and len(starts) == len(layers) else None
        aside = sum(layer.energy_held or 0.0 for layer in layers)
        cells = [sum(layer.error_held or 0.0 for layer in layers) / aside if aside else None]
        table.add_row(
            kind,
            str(len(all_layers)),
            *([_range([layer.sparsity for layer in all_layers])] if apart else []),
            *(
                [_part(sum(layer.error_uniform or 0.0 for layer in layers), energy)]
                if traded
                else []
            ),
            *([_part(begin, energy)] if started else []),
            *([_part(sum(layer.error_kept or 0.0 for layer in layers), energy)] if refit else []),
            _part(end, energy),
            *(["–" if not begin else f"{end / begin:.3f}"] if started else []),
            *(["–" if cells[0] is None else f"{cells[0]:.4f}"] if held else []),
            f"{sum(layer.seconds for layer in all_layers):.1f}",
        )
    output.print(table)
    calibration = report.fingerprint["calibration"]
    begun = Beginning.from_record(calibration["beginning"])
    output.print(
        f"calibrated on {calibration['samples']} windows of {calibration['length']} tokens, {begun}"
    )
    output.print(f"sparsity of these layers: {report.sparsity:.4f}; {report.seconds:.1f} s")
    if report.parts:
        output.print(trained_words(report.parts))
    if report.fallbacks:
        names = ", ".join(report.fallbacks[:5]) + (" …" if len(report.fallbacks) > 5 else "")
        output.print(
            f"by magnitude, for want of tokens: {len(report.fallbacks)} layers ({names}); "
            "the errors above leave them out"
        )
    if report.bad_samples:
        output.print(f"left out for NaN or infinity: {len(report.bad_samples)} samples")


def trained_words(parts: Sequence[PartReport]) -> str:
    """What training made of the parts of blocks, in a line."""

    def mean(name: str) -> float:
        return sum(getattr(part, name) for part in parts) / len(parts)

    stayed = sum(part.epoch == 0 for part in parts)
    return (
        f"trained: loss {mean('fitted_before'):.4f} → {mean('fitted_after'):.4f} on its windows, "
        f"{mean('held_before'):.4f} → {mean('held_after'):.4f} on held-out windows, mean of "
        f"{len(parts)} parts" + (f"; {stayed} unchanged" if stayed else "")
    )


def _range(parts: Sequence[float]) -> str:
    """`54–89%`, or one of them where they are alike."""
    ends = [f"{100 * end:.0f}" for end in (min(parts), max(parts))]
    return "–".join(dict.fromkeys(ends)) + "%"


def _part(error: float | None, energy: float) -> str:
    return "–" if error is None or not energy else f"{error / energy:.4f}"
