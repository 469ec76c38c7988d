"""`maskopt distill`: the kept weights of a pruned model, trained to match the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskopt.cli.command import CALIBRATION_TEXT, OVERWRITE, RESUME, command
from maskopt.cli.console import screen, written
from maskopt.cli.prune import told_of_resume
from maskopt.cli.view import view
from maskopt.core.fields import OUTPUT, REQUIRED, option, options_of
from maskopt.models.options.distill import DistillOptions


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

    with told_of_resume(output, "what was saved last is", "nothing was saved"), view() as shown:
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
