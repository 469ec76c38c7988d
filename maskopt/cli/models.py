"""`maskopt distill`: kept weights trained to match the dense model; `maskopt eval`: perplexity of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from maskopt.cli.command import CALIBRATION_TEXT, OVERWRITE, RESUME, SOURCES, command
from maskopt.cli.console import make_table, screen, written
from maskopt.cli.prune import naming_resume
from maskopt.cli.view import view
from maskopt.core.fields import OUTPUT, REQUIRED, option, options_of
from maskopt.core.files import atomic_write, check_writable
from maskopt.models.options.distill import DistillOptions
from maskopt.models.options.walk import EVALUATION, WalkOptions

if TYPE_CHECKING:
    from maskopt.models.evaluation.evaluate import Evaluation


@command(
    *(one for one in options_of(DistillOptions) if one.name not in DistillOptions.absent),
    example="maskopt distill OUT --teacher MODEL --calibration text.txt --output TRAINED",
)
def distill(
    pruned: Path = option(
        REQUIRED, "Folder that `maskopt prune` wrote; not changed.", argument=True
    ),
    teacher: str = option(
        REQUIRED, "The dense model that was pruned: a folder, or a name on the hub."
    ),
    calibration: str = CALIBRATION_TEXT,
    output: Path = option(REQUIRED, "Folder for the trained model.", OUTPUT),
    overwrite: bool = OVERWRITE,
    resume: bool = RESUME,
    **options: Any,
) -> None:
    """Train all kept weights of a pruned model together until it predicts what the dense model predicts.

    The pruned model is in memory as a whole, the dense model one block at a time. Held-out windows evaluate
    every epoch. `maskopt verify OUT --masks PRUNED` checks that every zero was kept.
    """
    from maskopt.models.distillation.distill import distill_model

    with naming_resume(output, "what was saved last is", "nothing was saved"), view() as shown:
        found = distill_model(
            pruned,
            teacher,
            calibration=calibration,
            output=output,
            overwrite=overwrite,
            resume=resume,
            on_progress=shown.show,
            **options,
        )
    if found.diverged:
        screen.print("training diverged and was ended; give a smaller --learning-rate")
    before, after = found.before, found.after
    screen.print(
        f"KL to {teacher}, nats: {before.fitted:.4f} → {after.fitted:.4f}; on held-out windows "
        f"{before.held:.4f} → {after.held:.4f} (epoch {found.epoch}), {found.seconds:.0f} s",
        soft_wrap=True,
    )
    written(output, "trained model")


@command(
    *(one for one in options_of(WalkOptions) if one.name in EVALUATION),
    example="maskopt eval MODEL OUT --text test.txt --windows 64",
    name="eval",
)
def evaluate(
    models: list[str] = option(
        REQUIRED,
        "Model folders, or names on the hub. The others are compared with the first.",
        argument=True,
    ),
    text: str = option(REQUIRED, f"Text to evaluate on: {SOURCES}."),
    windows: int | None = option(None, "Number of windows. Default: all."),
    json: Path | None = option(None, "Also write the results to this JSON file.", OUTPUT),
    overwrite: bool = OVERWRITE,
    **options: Any,
) -> None:
    """Perplexity of one or several models on the same consecutive windows.

    One block of one model is in memory at a time; at the end the output heads of all models, equal ones once.
    """
    from maskopt.models.evaluation.evaluate import evaluate as library

    if json is not None:
        check_writable(json, overwrite=overwrite, text=text)
    with view() as shown:
        found = library(
            models,
            text,
            WalkOptions(**options),
            windows=windows,
            on_progress=lambda model, done, total: shown.show(Path(model).name, done, total),
        )
    p = found[0].perplexity
    said = f"{p.windows} windows of {p.length} tokens from {p.source}, {p.beginning}"
    if len(found) == 1:
        value = f"{p.value:.4f} ({p.low:.2f} to {p.high:.2f})"
        screen.print(f"{models[0]}: perplexity {value}, {said}", soft_wrap=True)
    else:
        screen.print(_comparison(found))
        screen.print(said, soft_wrap=True)
    # last: the results are on the screen even if the disk is full
    if json is not None:
        with atomic_write(json) as target:
            target.write(dumps([asdict(one) for one in found], indent=1).encode())
    written(json)


def _comparison(found: Sequence[Evaluation]) -> Table:
    table = make_table(
        *("model", "perplexity", "ratio", "KL, nats", "same top token"),
        no_wrap=True,
        caption="ratio, KL and agreement compared with the first model; intervals of 95%",
    )
    for one in found:
        c = one.change
        compared = ("", "", "")
        if c is not None:
            ratio = f"{c.ratio:.3f} ({c.ratio_low:.3f} to {c.ratio_high:.3f})"
            kl = f"{c.kl:.4f} ({c.kl_low:.4f} to {c.kl_high:.4f})"
            compared = (ratio, kl, f"{c.agreement:.1%}")
        table.add_row(one.model, f"{one.perplexity.value:.2f}", *compared)
    return table
