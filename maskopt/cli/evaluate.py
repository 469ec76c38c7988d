"""`maskopt eval`: perplexity of a model folder."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from maskopt.cli.console import output, progress_bars
from maskopt.cli.parameters import TEXT_SOURCES, Model, takes

OPTIONS = (
    "seq_len",
    "text_field",
    "device",
    "dtype",
    "threads",
    "activation_memory",
    "trust_remote_code",
)


@takes(OPTIONS)
def evaluate(
    model: Model,
    text: Annotated[str, typer.Option(help=TEXT_SOURCES)],
    options: dict[str, Any],
    windows: Annotated[int | None, typer.Option(help="Take only the first so many.")] = None,
) -> None:
    """Perplexity: non-overlapping windows, tail dropped, mean over the shifted targets.

    One block of the model is in memory at a time.
    """
    from maskopt.model.perplexity import perplexity

    with progress_bars() as bars:
        task = bars.add_task("windows", total=None)
        result = perplexity(
            model,
            text=text,
            windows=windows,
            on_progress=lambda done, total: bars.update(task, completed=done, total=total),
            **options,
        )
    output.print(
        f"perplexity {result.value:.4f}  ({result.windows} windows of {result.length} tokens "
        f"from {result.source})",
        soft_wrap=True,
    )
