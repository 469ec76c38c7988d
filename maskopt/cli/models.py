"""`maskopt distill`, `eval`, `prune-structured` and `demo`: commands that train, shrink and evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from maskopt.cli.command import DRY_RUN, MODEL, OVERWRITE, RESUME, SOURCES, command
from maskopt.cli.console import make_table, print_table, screen, written
from maskopt.cli.prune import naming_resume, show_needs, show_report, tokens_file
from maskopt.cli.view import PruneView, view
from maskopt.core.fields import OUTPUT, REQUIRED, SELECTION, TEXT, argument, option, options_of
from maskopt.core.files import atomic_write, check_writable
from maskopt.errors import OptionError
from maskopt.models.options.structured import ShrinkOptions
from maskopt.models.options.walk import EVALUATION, DistillOptions, WalkOptions

if TYPE_CHECKING:
    from maskopt.models.evaluation.evaluate import Evaluation, PanelRatio

CALIBRATION = option(REQUIRED, f"Calibration text: {SOURCES}.", TEXT)


@command(
    *options_of(DistillOptions),
    example="maskopt distill OUT --teacher MODEL --calibration text.txt --output TRAINED",
)
def distill(
    pruned: Path = argument(
        "Folder that `maskopt prune` or `prune-structured` wrote; not changed."
    ),
    teacher: str = option(
        REQUIRED, "The dense model that was pruned: a folder, or a name on the hub."
    ),
    calibration: str = CALIBRATION,
    output: Path | None = option(None, "Folder for the trained model.", OUTPUT),
    overwrite: bool = OVERWRITE,
    resume: bool = RESUME,
    dry_run: bool = DRY_RUN,
    **options: Any,
) -> None:
    """Train a pruned or smaller model as a whole until it predicts what the dense model predicts.

    Masks stay fixed; of a smaller model all weights of the blocks are trained. The trained model is in memory
    as a whole, the dense model one block at a time. Held-out windows evaluate every epoch. `maskopt verify
    OUT --masks PRUNED` checks that every zero was kept, and `--original MODEL` the sizes of a smaller model.
    """
    from maskopt.models.checkpoints.report import distilled_words
    from maskopt.models.distillation import distill_model
    from maskopt.models.pruning.plan import plan_distill

    if dry_run:
        plan = plan_distill(pruned, tokens_file(calibration), **options)
        show_needs(plan.memory, plan.disk)
        screen.print(f"time, estimated: about {plan.seconds:.0f} s")
        return
    if output is None:
        raise OptionError("`output` is missing: name a folder for the trained model")
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
    screen.print(f"{distilled_words(found.record())}; {found.seconds:.0f} s", soft_wrap=True)
    written(output, "trained model")


@command(
    *options_of(WalkOptions, *EVALUATION),
    example="maskopt eval MODEL OUT --text test.txt --windows 64",
    name="eval",
)
def evaluate(
    models: list[str] = argument(
        "Model folders, or names on the hub. The others are compared with the first."
    ),
    text: list[str] = option(
        REQUIRED, f"Text to evaluate on: {SOURCES}. Repeat the option for a panel of texts."
    ),
    windows: int | None = option(None, "Number of windows of each text. Default: all."),
    card: bool = option(
        False,
        "Also write the figures to README.md in the folders of the models but the first.",
        OUTPUT,
    ),
    json: Path | None = option(None, "Also write the results to this JSON file.", OUTPUT),
    overwrite: bool = OVERWRITE,
    **options: Any,
) -> None:
    """Evaluate the perplexity of one or several models on the same consecutive windows.

    Several texts give a table of ratios to the first model, and their geometric mean. One block of one model
    is in memory at a time; at the end the output heads of all models, equal ones once.
    """
    from maskopt.models.evaluation.card import add_evaluation, check_card
    from maskopt.models.evaluation.evaluate import evaluate as library, panel_ratios

    if json is not None:
        for each in text:
            check_writable(json, overwrite=overwrite, text=each)
    pruned = [Path(model) for model in models[1:]] if card else []
    for folder in pruned:
        check_card(folder)
    walk, evaluations = WalkOptions(**options), []
    with view() as shown:
        for each in text:
            evaluations.append(
                library(
                    models,
                    each,
                    walk,
                    windows=windows,
                    on_progress=lambda model, done, total: shown.show(
                        Path(model).name, done, total
                    ),
                )
            )
    means = panel_ratios([[x.losses for x in each] for each in zip(*evaluations, strict=True)])
    for on_text in evaluations:
        p = on_text[0].perplexity
        windows_said = f"{p.windows} windows of {p.length} tokens from {p.source}, {p.beginning}"
        if len(on_text) == 1:
            value = f"{p.value:.4f} ({p.low:.2f} to {p.high:.2f})"
            screen.print(f"{models[0]}: perplexity {value}, {windows_said}", soft_wrap=True)
        else:
            screen.print(_comparison(on_text))
            screen.print(windows_said, soft_wrap=True)
    if len(text) > 1 and means:
        screen.print(_panel(models[1:], means, len(text)))
    for number, folder in enumerate(pruned, 1):
        add_evaluation(folder, [on_text[number] for on_text in evaluations], means[number - 1])
    # last: the results are on the screen even if the disk is full
    if json is not None:
        with atomic_write(json) as target:
            records = [asdict(evaluation) for on_text in evaluations for evaluation in on_text]
            target.write(dumps(records, indent=1).encode())
    written(json)


def _comparison(evaluations: Sequence[Evaluation]) -> Table:
    table = make_table(
        *("model", "perplexity", "ratio", "KL, nats", "same top token"),
        no_wrap=True,
        caption="ratio, KL and agreement compared with the first model; intervals of 95%",
    )
    for evaluation in evaluations:
        c = evaluation.change
        compared = ("", "", "")
        if c is not None:
            ratio = f"{c.ratio:.3f} ({c.ratio_low:.3f} to {c.ratio_high:.3f})"
            kl = f"{c.kl:.4f} ({c.kl_low:.4f} to {c.kl_high:.4f})"
            compared = (ratio, kl, f"{c.agreement:.1%}")
        table.add_row(evaluation.model, f"{evaluation.perplexity.value:.2f}", *compared)
    return table


def _panel(models: Sequence[str], means: Sequence[PanelRatio], texts: int) -> Table:
    table = make_table(
        *("model", "geometric mean of the ratios"),
        no_wrap=True,
        caption=f"over {texts} texts, compared with the first model; intervals of 95%",
    )
    for model, mean in zip(models, means, strict=True):
        table.add_row(model, str(mean))
    return table


@command(
    *options_of(ShrinkOptions),
    example="maskopt prune-structured MODEL --channels 0.25 --calibration t.txt --output SMALLER",
    config=True,
)
def prune_structured(
    model: str = MODEL,
    calibration: str = CALIBRATION,
    experts: float = option(
        0.0,
        "Share of experts to remove in each mixture-of-experts layer.",
        SELECTION,
        least=0,
        most=1,
    ),
    output: Path = option(REQUIRED, "Folder for the smaller model.", OUTPUT),
    overwrite: bool = OVERWRITE,
    resume: bool = RESUME,
    **options: Any,
) -> None:
    """Remove whole MLP channels, attention heads, experts or blocks.

    The result is a smaller dense model, which `maskopt prune` accepts. Heads are proven to
    be the best to remove for the layer output. `maskopt verify OUT --original MODEL` checks the result.
    """
    from maskopt.models.structured.channels import shrink_model
    from maskopt.models.structured.experts import remove_experts

    inputs: dict[str, Any] = {"calibration": calibration, "output": output, "overwrite": overwrite}
    blocks_alone = options.get("blocks") and not (options.get("channels") or options.get("heads"))
    if experts:
        _check_alone("experts", resume, options)
        with view() as shown:
            inputs |= {"options": WalkOptions(**options), "on_progress": PruneView(shown)}
            report = remove_experts(model, share=experts, **inputs)
        show_report(report)
    elif blocks_alone:
        count, windows = options.pop("blocks"), options.pop("windows", None)
        _check_alone("blocks", resume, options)
        inputs["options"] = WalkOptions(**options)
        _remove_blocks(model, count, windows, inputs)
    else:
        with naming_resume(output), view() as shown:
            more = {"resume": resume, "on_progress": PruneView(shown), **options}
            report = shrink_model(model, **inputs, **more)
        show_report(report)
    written(output, "smaller model and manifest")


def _check_alone(what: str, resume: bool, options: dict[str, Any]) -> None:
    """Raise OptionError for an option that does not apply to blocks, or experts, removed by themselves."""
    if resume:
        raise OptionError(f"`{what}` are measured in one go; leave out `resume`")
    if any(options.get(name) for name in ("channels", "heads", "blocks")):
        raise OptionError(
            f"`{what}` are removed by themselves; cut other structures by a second `maskopt prune-structured`"
        )
    for name in options:
        if name not in WalkOptions.__dataclass_fields__:
            raise OptionError(f"`{name}` says nothing of `{what}`; leave it out")


def _remove_blocks(model: str, count: int, windows: int | None, given: dict[str, Any]) -> None:
    from maskopt.models.structured.blocks import WINDOWS, remove_blocks

    with view() as shown:
        report = remove_blocks(
            model, count=count, windows=windows or WINDOWS, on_progress=PruneView(shown), **given
        )
    effects = report.effects
    headings = ("choice", "blocks", "by pairs", "as a whole", "")
    table = make_table(*headings, left=2, caption="KL to the dense model, nats a token")
    table.columns[-1].justify = "left"
    best = (~report.solution.mask[0]).nonzero()[:, 0].tolist()
    for label, chosen, note in (
        ("removed", report.removed, ""),
        ("of least cost by pairs", best, f"{report.solution.status[0]}"),
        ("changing their input least", effects.most_alike(count), ""),
        ("the last ones", effects.last(count), ""),
    ):
        row = [f"{cost:.4f}" for cost in (effects.cost(chosen), report.measured[frozenset(chosen)])]
        table.add_row(label, ", ".join(map(str, chosen)), *row, note)
    screen.print(table)
    screen.print(f"{report.seconds:.1f} s")


@command(example="maskopt demo --model smollm2")
def demo(
    model: str = option("gemma3", "Language model.", choices=("gemma3", "smollm2")),
    sparsity: float | str = option(0.5, "As for `maskopt prune`: 0.5, 50% or 2:4."),
    samples: int = option(5, "Number of calibration windows.", least=1),
    windows: int = option(2, "Number of evaluation windows.", least=1),
    output: Path = option(
        Path("maskopt-demo"), "Folder for the report and the pruned model.", OUTPUT
    ),
    overwrite: bool = OVERWRITE,
) -> None:
    """Compare solvers with proven optima on small rows, then prune all of a small real model."""
    with view() as shown:
        shown.show("loading the libraries", 0, None)
        from maskopt.demo import run_demo

        result = run_demo(
            output,
            model=model,
            sparsity=sparsity,
            samples=samples,
            windows=windows,
            overwrite=overwrite,
            on_stage=shown.show,
        )
    for table in result.tables:
        print_table(table, no_wrap=True)
        screen.print()
    screen.print(f"report: {result.report}", highlight=False)
    for what, folder in (("pruned model", result.model), ("dense model", result.dense)):
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e9
        screen.print(f"{what}: {folder}, {size:.2f} GB kept on the disk", highlight=False)
    screen.print(f"{result.seconds:.0f} s in all", highlight=False)
