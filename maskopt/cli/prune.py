"""`maskopt prune`: a model folder in, a pruned model folder out; `maskopt sweep`: many from one."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from maskopt.cli.command import (
    DRY_RUN,
    MODEL,
    OVERWRITE,
    RESUME,
    SOURCES,
    command,
    option_list,
    text_of,
)
from maskopt.cli.console import (
    again,
    errors,
    make_table,
    print_table,
    ranks,
    screen,
    speaks,
    written,
)
from maskopt.cli.view import PruneView, View, duration, view
from maskopt.core.fields import OUTPUT, REQUIRED, SELECTION, TEXT, UPDATE, option, options_of
from maskopt.errors import OptionError
from maskopt.models.blockwise.distributed import LostRankError
from maskopt.models.calibration.tokens import SELF
from maskopt.models.checkpoints.report import (
    PruneReport,
    mean_error,
    mean_held_error,
    proven_share,
)
from maskopt.models.checkpoints.workspace import check_output, unfinished
from maskopt.models.options.prune import DAMPING, RECIPE, PruneOptions, with_recipe
from maskopt.models.options.walk import (
    LayerOptions,
    PassOptions,
    RuntimeOptions,
    TextOptions,
    WindowOptions,
)

if TYPE_CHECKING:
    from maskopt.models.blockwise.memory import Memory
    from maskopt.models.evaluation.evaluate import Evaluation
    from maskopt.models.evaluation.sweep import Swept
    from maskopt.models.pruning.plan import Plan


@command(
    RECIPE,
    *options_of(PruneOptions),
    example="maskopt prune MODEL --sparsity 0.5 --output OUT",
    config=True,
    shared=True,
    completed=with_recipe,
)
def prune(
    model: str = MODEL,
    calibration: list[str] | None = option(
        None,
        f"self: the model writes it (default); {SOURCES}. Several are mixed by share (self=0.5) or evenly.",
        TEXT,
    ),
    grams: Path | None = option(None, "Gram matrices of `maskopt sweep`, in place of text.", TEXT),
    output: Path | None = option(None, "Folder for the pruned model.", OUTPUT),
    overwrite: bool = OVERWRITE,
    resume: bool = RESUME,
    dry_run: bool = DRY_RUN,
    **options: Any,
) -> None:
    """Prune every linear layer in the decoder blocks of a causal language model.

    MODEL is not changed. `maskopt verify OUT --original MODEL` checks the result.
    """
    from maskopt.models.pruning.prune import prune_model

    here, text = ranks(), text_of(calibration)
    inputs: dict[str, Any] = {"model": model, "calibration": text, "grams": grams}
    if output is not None:
        here.agreed(lambda: check_output(output, overwrite=overwrite, resume=resume, **inputs))
    if dry_run:
        _show_plan(model, text, grams, output, options)
        return
    if output is None:
        raise OptionError("`output` is missing: name a folder for the pruned model")
    with naming_resume(output), view() as shown:
        # a part of it is done already, or several processes share it
        known = resume or grams is not None or here.size > 1
        expected = None if known else _say_beforehand(shown, model, text, options)
        report = prune_model(
            **inputs,
            output=output,
            overwrite=overwrite,
            resume=resume,
            on_progress=PruneView(shown, expected),
            ranks=here,
            **options,
        )
    show_report(report)
    written(output, "pruned model, masks and manifest")
    screen.print("next, with a TEXT other than the calibration text:")
    for words in (
        ("verify", str(output), "--original", model),
        ("eval", model, str(output), "--text", "TEXT", "--json", "eval.json"),
        ("report", str(output), "--evaluation", "eval.json"),
    ):
        screen.print("  " + shlex.join(("maskopt", *words)), soft_wrap=True)


def tokens_file(calibration: Any) -> str | None:
    """Return the source of text if reading it costs nothing, as for tokens; else None."""
    return calibration if isinstance(calibration, str) and calibration.endswith(".npy") else None


def _show_plan(model: str, calibration: Any, grams: Any, out: Any, options: dict[str, Any]) -> None:
    """Print layers, shapes, pruned counts, memory, disk and time of a prune.

    No weights are read except for a measurement of a few seconds. MaskoptError: what the prune would refuse.
    """
    from maskopt.models.pruning.plan import START, plan_prune

    tokens = tokens_file(calibration) if grams is None else calibration
    result = plan_prune(model, tokens, grams=grams, output=out, **options)
    screen.print(_layer_table(result))
    show_needs(result.memory, result.disk)
    if (last := result.distillation) is not None:
        takes = f"{last.memory.gib:.2f} GiB, disk {last.disk / 2**30:.2f} GiB"
        screen.print(f"the distillation in this: memory {takes}, about {last.seconds:.0f} s")
    parts_of_time = (result.solve_seconds, result.seconds)
    solving, total = ("unknown" if x is None else f"about {x:.0f} s" for x in parts_of_time)
    screen.print(
        f"time, estimated: {total} (forward passes and Gram matrices about "
        f"{result.forward_seconds:.0f} s, solving {solving}, files about "
        f"{result.file_seconds:.0f} s, libraries about {START:.0f} s)",
        soft_wrap=True,
    )
    if result.refusal is not None:
        raise result.refusal


def show_needs(memory: Memory, disk: int) -> None:
    """Print the estimates of memory, by part, and of disk."""
    screen.print(f"memory at the peak, estimated: {memory.gib:.2f} GiB ({memory})", soft_wrap=True)
    screen.print(f"disk: {disk / 2**30:.2f} GiB")


def _layer_table(plan: Plan) -> Table:
    """Return a table of layers by kind and shape."""
    table = make_table("layer", "count", "rows", "inputs", "pruned", "of")
    kinds: dict[tuple[str, int, int], list[str]] = {}
    for layer in plan.layers:
        kinds.setdefault((layer.kind, layer.rows, layer.n), []).append(layer.name)
    for (kind, rows, n), names in kinds.items():
        count = sum(plan.pruned[name] for name in names)
        table.add_row(
            kind, str(len(names)), str(rows), str(n), f"{count:,}", f"{len(names) * rows * n:,}"
        )
    return table


def _say_beforehand(
    shown: View, model: str, calibration: Any, options: dict[str, Any]
) -> float | None:
    """Report the estimated time and memory of a prune, and return the time in seconds.

    Small models are left out: their estimate would take as long as the prune.
    """
    from maskopt.models.pruning.plan import is_small, plan_prune

    named = isinstance(calibration, str) and calibration != SELF
    missing = named and not (calibration.startswith("hf:") or Path(calibration).exists())
    if is_small(model) or missing:  # of which the prune says more
        return None
    plan = plan_prune(model, tokens_file(calibration), **options)
    time = "unknown" if plan.seconds is None else f"about {duration(plan.seconds)}"
    shown.say(
        f"time, estimated: {time}; memory at the peak: {plan.memory.gib:.2f} GiB",
        expected_seconds=plan.seconds,
        expected_gib=round(plan.memory.gib, 3),
    )
    return plan.seconds


@contextmanager
def naming_resume(
    out: Path, kept: str = "finished blocks are", none: str = "no block was finished"
) -> Iterator[None]:
    """Report after an interrupt which work is `kept`, or `none`, and the command that resumes the run."""
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
    """Print a line per kind of layer, with errors relative to the energy of the layers' outputs."""
    print_table(report.table())
    screen.print(report.sentence(), soft_wrap=True)
    screen.print(f"sparsity of these layers: {report.sparsity:.4f}; {report.seconds:.1f} s")
    for trained in report.training():
        screen.print(trained, soft_wrap=True)
    if report.fallbacks:
        names = ", ".join(report.fallbacks[:5]) + (" …" if len(report.fallbacks) > 5 else "")
        screen.print(
            f"by magnitude, for want of tokens: {len(report.fallbacks)} layers ({names}); "
            "the errors above leave them out"
        )
    if report.bad_samples:
        screen.print(f"left out for NaN or infinity: {len(report.bad_samples)} samples")


#: options of a prune from Gram matrices of the dense model that are not swept
_OF_A_PRUNE = ("start", "solver_options", "min_tokens", "gram_shrinkage")


@command(
    *options_of(LayerOptions),
    *options_of(PassOptions, "skip_bad_samples", "dtype"),
    *options_of(WindowOptions),
    *options_of(TextOptions),
    *options_of(RuntimeOptions),
    *options_of(PruneOptions, *_OF_A_PRUNE),
    *DAMPING,
    example="maskopt sweep MODEL --calibration text.txt --grams GRAMS --sparsity 0.5,0.6 --output OUT",
    config=True,
    shared=True,
)
def sweep(
    model: str = MODEL,
    grams: Path = option(
        REQUIRED,
        "Folder of the Gram matrices of the dense model. If it does not exist, they are collected from "
        "--calibration and stored there.",
        TEXT,
    ),
    calibration: str | None = option(
        None, f"Calibration text, required to collect: {SOURCES}.", TEXT
    ),
    sparsity: str | None = option(
        None,
        "Several, e.g. 0.5,60%,2:4. Without it, Gram matrices are collected and nothing is pruned.",
        SELECTION,
    ),
    solver: str = option("swap", "Several, e.g. swap,wanda.", SELECTION),
    update: str = option("none", "none, least-squares, or both separated by a comma.", UPDATE),
    text: str | None = option(None, f"Text to evaluate all models on: {SOURCES}.", OUTPUT),
    windows: int | None = option(
        None, "Number of 512-token windows of --text to evaluate. Default: all.", OUTPUT, least=1
    ),
    output: Path | None = option(
        None, "Folder with one subfolder per prune; finished prunes are reused.", OUTPUT
    ),
    overwrite: bool = OVERWRITE,
    **options: Any,
) -> None:
    """Prune a model with every combination of sparsity, solver and update, and print one table.

    All prunes use the same Gram matrices, which `maskopt prune --grams` reads, too. Each gives the same bytes
    as a prune with --calibrate-on dense.
    """
    from maskopt.models.evaluation.sweep import sweep as library
    from maskopt.models.pruning.gram_store import open_store

    if sparsity is None and calibration is not None:
        with view() as shown:
            how: dict[str, Any] = {"on_progress": PruneView(shown), "ranks": ranks()}
            open_store(model, grams, calibration, options, **how)
        written(grams, "Gram matrices")
        return
    if output is None:
        raise OptionError("`output` is missing: name a folder for the pruned models")
    how = {"calibration": calibration, "text": text, "windows": windows, "overwrite": overwrite}
    with view() as shown:
        found, dense = library(
            model,
            grams,
            output,
            sparsity=option_list(sparsity),
            solver=option_list(solver),
            update=option_list(update),
            on_progress=lambda label: PruneView(shown),
            ranks=ranks(),
            **how,
            **options,
        )
    screen.print(swept_table(found, dense))
    written(output, "pruned models, masks and manifests")


def swept_table(found: list[Swept], dense: Evaluation | None) -> Table:
    """Return a table with a line per prune; errors are means of the relative errors of its layers."""
    table = make_table(
        *("prune", "pruned", "error", "held out", "rows proven", "solving, s"),
        *([] if dense is None else ["perplexity", "× dense"]),
        caption="errors: mean over the layers of their outputs' relative errors",
    )
    if dense is not None:
        table.add_row("dense", *["–"] * 5, f"{dense.perplexity.value:.2f}", "1")
    for one in found:
        layers = one.report.solved
        means, proven = (mean_error(layers), mean_held_error(layers)), proven_share(layers)
        cells = []
        if one.evaluation is not None and one.evaluation.change is not None:
            perplexity, ratio = one.evaluation.perplexity, one.evaluation.change.ratio
            cells = [f"{perplexity.value:.2f}", f"{ratio:.3f}"]
        table.add_row(
            one.label,
            f"{one.report.sparsity:.1%}",
            *("–" if error is None else f"{error:.4f}" for error in means),
            "–" if proven is None else f"{proven:.0%}",
            f"{sum(x.seconds for x in one.report.layers):.1f}",
            *cells,
        )
    return table
