"""`maskopt eval`: perplexity of a model folder."""

from __future__ import annotations

from typing import Annotated

import typer

from maskopt.cli import options as opt
from maskopt.cli.console import output, progress_bars


def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, or a name on the hub.")],
    text: Annotated[
        str, typer.Option(help="FILE.txt, FILE.jsonl, a folder, tokens .npy, hf:DATASET[:SPLIT].")
    ],
    seq_len: opt.SeqLen = 2048,
    windows: Annotated[int | None, typer.Option(help="Take only the first so many.")] = None,
    text_field: opt.Field = "text",
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    threads: opt.Threads = None,
    activation_memory: opt.ActivationMemory = "4GiB",
    trust_remote_code: opt.Trust = False,
) -> None:
    """Perplexity: non-overlapping windows, tail dropped, mean over the shifted targets.

    One block of the model is in memory at a time.
    """
    from maskopt.model.perplexity import perplexity
    from maskopt.model.plan import parse_bytes

    with progress_bars() as bars:
        task = bars.add_task("windows", total=None)
        result = perplexity(
            model,
            text=text,
            seq_len=seq_len,
            windows=windows,
            text_field=text_field,
            device=device,
            dtype=dtype,
            threads=threads,
            activation_memory=parse_bytes(activation_memory),
            trust_remote_code=trust_remote_code,
            on_progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    output.print(
        f"perplexity {result.value:.4f}  ({result.windows} windows of {result.length} tokens "
        f"from {result.source})",
        soft_wrap=True,
    )
