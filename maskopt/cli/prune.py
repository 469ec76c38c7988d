"""`maskopt prune`: a model folder in, a pruned model folder out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from maskopt.cli import options as opt
from maskopt.cli.console import errors, output, progress_bars

if TYPE_CHECKING:
    from maskopt.model.report import PruneReport


def prune(
    model: Annotated[str, typer.Argument(help="A model folder, or a name on the hub.")],
    calibration: Annotated[
        str,
        typer.Option(
            help="FILE.txt, FILE.jsonl, a folder, tokens .npy, hf:c4, hf:wikitext2, hf:DATASET[:SPLIT]."
        ),
    ],
    out: Annotated[Path, typer.Option("--output", help="Folder for the pruned model.")],
    sparsity: opt.Sparsity = None,
    pattern: opt.PatternText = None,
    solver: Annotated[str, typer.Option(help="See `maskopt solvers`.")] = "swap",
    warm_start: opt.WarmStart = None,
    option: opt.SolverOption = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: opt.SeqLen = 2048,
    text_field: opt.Field = "text",
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    one_pass: opt.OnePass = False,
    true_sequential: opt.TrueSequential = False,
    all_experts: Annotated[
        bool,
        typer.Option(
            "--all-experts",
            help="Each expert's Gram matrix from all tokens, not only from those routed to it.",
        ),
    ] = False,
    min_tokens: Annotated[
        int, typer.Option(help="Layers that saw fewer tokens are pruned by magnitude.")
    ] = 32,
    shrink: Annotated[float, typer.Option(help="α of G ← (1−α)G + α·diag(G).")] = 0.0,
    skip_bad_samples: Annotated[
        bool, typer.Option("--skip-bad-samples", help="Leave out windows with NaN or infinity.")
    ] = False,
    threads: opt.Threads = None,
    activation_memory: opt.ActivationMemory = "4GiB",
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Refuse to start where the estimate of `maskopt plan` is higher, e.g. 16GiB."
        ),
    ] = None,
    overwrite: opt.Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same options.")
    ] = False,
    trust_remote_code: opt.Trust = False,
) -> None:
    """Prune every linear layer in the decoder blocks of a causal language model.

    The model is read block by block and stays as it is. `maskopt plan` says beforehand what that takes;
    `maskopt verify OUT --against MODEL` checks the result.
    """
    chosen = opt.read_pattern(sparsity, pattern)
    from maskopt.model.options import Progress
    from maskopt.model.plan import parse_bytes
    from maskopt.model.prune import prune_model

    with _told_of_resume(out), progress_bars() as bars:
        whole = bars.add_task("blocks", total=None)
        stage = bars.add_task("", total=None)

        def show(event: Progress) -> None:
            bars.update(whole, total=event.blocks, completed=event.block)
            bars.update(
                stage,
                description=f"block {event.block}: {event.stage}",
                total=event.total,
                completed=event.done,
            )

        report = prune_model(
            model,
            None,
            pattern=chosen,
            solver=solver,
            warm_start=warm_start,
            solver_options=opt.read_solver_options(option),
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            text_field=text_field,
            seed=seed,
            output=out,
            overwrite=overwrite,
            resume=resume,
            device=device,
            dtype=dtype,
            include=include or (),
            exclude=exclude or (),
            one_pass=one_pass,
            true_sequential=true_sequential,
            all_experts=all_experts,
            min_tokens=min_tokens,
            shrink=shrink,
            skip_bad_samples=skip_bad_samples,
            threads=threads,
            activation_memory=parse_bytes(activation_memory),
            max_memory=None if max_memory is None else parse_bytes(max_memory),
            trust_remote_code=trust_remote_code,
            on_progress=show,
        )
        bars.update(whole, completed=bars.tasks[0].total or 0)
    show_report(report)
    output.print(f"pruned model, masks and manifest: {out}", soft_wrap=True)


@contextmanager
def _told_of_resume(out: Path) -> Iterator[None]:
    from maskopt.model.workspace import unfinished

    try:
        yield
    except KeyboardInterrupt:
        if unfinished(out):
            errors.print(f"{out}: finished blocks are kept; go on with --resume", soft_wrap=True)
        raise


def show_report(report: PruneReport) -> None:
    """One line per kind of layer."""
    table = Table()
    for heading in ("layer kind", "layers", "start error", "error", "error/start", "seconds"):
        table.add_column(heading, justify="left" if heading == "layer kind" else "right")
    for kind, all_layers in report.by_kind().items():
        layers = [layer for layer in all_layers if not layer.fallback]  # theirs are other errors
        end = sum(layer.error for layer in layers)
        starts = [layer.error_start for layer in layers if layer.error_start is not None]
        begin = sum(starts) if starts and len(starts) == len(layers) else None
        table.add_row(
            kind,
            str(len(all_layers)),
            "–" if begin is None else f"{begin:.5g}",
            f"{end:.5g}" if layers else "–",
            "–" if not begin else f"{end / begin:.3f}",
            f"{sum(layer.seconds for layer in all_layers):.1f}",
        )
    output.print(table)
    output.print(f"sparsity {report.sparsity:.4f} in {report.seconds:.1f} s")
    if report.fallbacks:
        names = ", ".join(report.fallbacks[:5]) + (" …" if len(report.fallbacks) > 5 else "")
        output.print(
            f"by magnitude, for want of tokens: {len(report.fallbacks)} layers ({names}); "
            "the errors above leave them out"
        )
    if report.bad_samples:
        output.print(f"left out for NaN or infinity: {len(report.bad_samples)} samples")
