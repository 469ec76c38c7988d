"""`maskopt distill`: the kept weights of a pruned model, trained towards the dense one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from maskopt.cli.console import output
from maskopt.cli.parameters import Overwrite, Resume, Text, output_to, takes
from maskopt.cli.prune import told_of_resume
from maskopt.cli.view import view
from maskopt.models.options.distill import NOT_HERE, DistillOptions


@takes(
    [f.name for f in dataclasses.fields(DistillOptions) if f.name not in NOT_HERE],
    of=DistillOptions,
)
def distill(
    pruned: Annotated[Path, typer.Argument(help="What `maskopt prune` wrote; left as it is.")],
    teacher: Annotated[
        str,
        typer.Option(help="The dense model that it was made of: a folder, or a name on the hub."),
    ],
    calibration: Text,
    out: Annotated[Path, output_to("Folder for the trained model.")],
    options: dict[str, Any],
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Train all kept weights of a pruned model together until it predicts what the dense model predicts.

    The pruned model is in memory as a whole, the dense one a block at a time. Windows kept aside judge every
    epoch. `maskopt verify OUT --masks PRUNED` checks that every zero was kept.
    """
    from maskopt.models.distillation.distill import distill_model

    with told_of_resume(out, "what was saved last is", "nothing was saved"), view() as shown:
        found = distill_model(
            pruned,
            teacher,
            calibration=calibration,
            output=out,
            overwrite=overwrite,
            resume=resume,
            on_progress=shown.show,
            **options,
        )
    if found.diverged:
        output.print("training diverged and was ended; give a smaller --learning-rate")
    before, after = found.before, found.after
    output.print(
        f"KL to {teacher}, nats: {before.fitted:.4f} → {after.fitted:.4f}; on held-out windows "
        f"{before.held:.4f} → {after.held:.4f} (epoch {found.epoch}), {found.seconds:.0f} s",
        soft_wrap=True,
    )
    output.print(f"trained model: {out}", soft_wrap=True)
