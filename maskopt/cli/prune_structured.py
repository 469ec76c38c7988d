"""`maskopt prune-structured`: a model folder in, a smaller model folder out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from maskopt.cli.console import output
from maskopt.cli.parameters import (
    CALIBRATION,
    WHAT,
    Model,
    Overwrite,
    Resume,
    Text,
    output_to,
    takes,
)
from maskopt.cli.prune import told_of_resume
from maskopt.cli.prune_view import PruneView
from maskopt.cli.view import view
from maskopt.errors import OptionError
from maskopt.models.options.structured import NOT_HERE, ShrinkOptions
from maskopt.models.options.walk import WalkOptions

if TYPE_CHECKING:
    from maskopt.models.checkpoints.report import LayerReport, PruneReport

_NAMES = tuple(f.name for f in dataclasses.fields(ShrinkOptions) if f.name not in NOT_HERE)
_WALK = tuple(f.name for f in dataclasses.fields(WalkOptions))


@takes(_NAMES, of=ShrinkOptions, config=True)
def prune_structured(
    model: Model,
    calibration: Text,
    out: Annotated[Path, output_to("Folder for the smaller model.")],
    options: dict[str, Any],
    blocks: Annotated[
        int,
        typer.Option(
            help="Number of decoder blocks to remove, scored by the change of the model output without "
            "each block and each pair.",
            rich_help_panel=WHAT,
            min=0,
            metavar="N",
        ),
    ] = 0,
    windows: Annotated[
        int | None,
        typer.Option(
            help="Number of calibration windows that score --blocks. [default: 4]",
            rich_help_panel=CALIBRATION,
            min=1,
            metavar="N",
        ),
    ] = None,
    experts: Annotated[
        float,
        typer.Option(
            help="Share of experts to remove in each mixture-of-experts layer.",
            rich_help_panel=WHAT,
            min=0,
            max=1,
            metavar="X",
        ),
    ] = 0.0,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Remove whole MLP channels, attention heads, experts or blocks.

    The result is a smaller dense model, faster in every engine; `maskopt prune` accepts it as input. The
    set of heads removed from a layer is proven to have the least error of its output. MODEL is not changed;
    `maskopt verify OUT --original MODEL` checks the result.
    """
    from maskopt.models.checkpoints.workspace import check_output
    from maskopt.models.structured.channels import shrink_model

    if windows is not None and not blocks:
        raise OptionError("`windows` need `blocks`")
    if blocks or experts:
        _check_alone(
            "blocks" if blocks else "experts", resume, options, both=bool(blocks and experts)
        )
        given = {"calibration": calibration, "output": out, "overwrite": overwrite}
        given["options"] = _walk(options)
        if blocks:
            _remove_blocks(model, blocks, windows, given)
        else:
            _remove_experts(model, experts, given)
        return
    check_output(out, overwrite=overwrite, resume=resume, model=model, calibration=calibration)
    with told_of_resume(out), view() as shown:
        report = shrink_model(
            model,
            calibration=calibration,
            output=out,
            overwrite=overwrite,
            resume=resume,
            on_progress=PruneView(shown),
            **options,
        )
    show_report(report)
    output.print(f"smaller model and manifest: {out}", soft_wrap=True)


def _check_alone(what: str, resume: bool, options: dict[str, Any], *, both: bool) -> None:
    """Raise OptionError for what does not go together with whole blocks, or experts."""
    if resume:
        raise OptionError(f"`{what}` are measured in one go; leave out `resume`")
    if both or options["channels"] or options["heads"]:
        raise OptionError(
            f"`{what}` are removed by themselves; cut other structures by a second `maskopt prune-structured`"
        )
    alone = (f for f in dataclasses.fields(ShrinkOptions) if f.name not in _WALK)
    for field in alone:
        if options.get(field.name) not in (None, field.default, {}):
            raise OptionError(f"`{field.name}` says nothing of `{what}`; leave it out")


def _walk(options: dict[str, Any]) -> WalkOptions:
    return WalkOptions(**{name: options[name] for name in _WALK if name in options})


def _remove_experts(model: str, share: float, given: dict[str, Any]) -> None:
    from maskopt.models.structured.experts import remove_experts

    with view() as shown:
        report = remove_experts(model, share=share, on_progress=PruneView(shown), **given)
    show_report(report, before="not routed anew")
    output.print(f"smaller model and manifest: {given['output']}", soft_wrap=True)


def _remove_blocks(model: str, count: int, windows: int | None, given: dict[str, Any]) -> None:
    from maskopt.models.structured.blocks import WINDOWS, remove_blocks

    with view() as shown:
        report = remove_blocks(
            model, count=count, windows=windows or WINDOWS, on_progress=PruneView(shown), **given
        )
    effects = report.effects
    table = Table(caption="KL to the dense model, nats a token")
    for heading in ("choice", "blocks", "by pairs", "as a whole", ""):
        right = heading in ("by pairs", "as a whole")
        table.add_column(heading, justify="right" if right else "left")
    best = (~report.solution.mask[0]).nonzero()[:, 0].tolist()
    for label, chosen, note in (
        ("removed", report.removed, ""),
        ("of least cost by pairs", best, f"{report.solution.status[0]}"),
        ("changing their input least", effects.most_alike(count), ""),
        ("the last ones", effects.last(count), ""),
    ):
        row = [f"{cost:.4f}" for cost in (effects.cost(chosen), report.measured[frozenset(chosen)])]
        table.add_row(label, ", ".join(map(str, chosen)), *row, note)
    output.print(table)
    output.print(
        f"{report.seconds:.1f} s; smaller model and manifest: {given['output']}", soft_wrap=True
    )


def show_report(report: PruneReport, before: str = "before refit") -> None:
    """A line for each kind of layer; errors relative to the energy of the layers' outputs."""
    table = Table(caption="errors are parts of the energy of the layers' outputs, in the mean")
    refit = any(layer.error_kept is not None for layer in report.layers)
    held = any(layer.relative_held is not None for layer in report.layers)
    headings = ["what stays", "inputs of", "layers", "proven best", "gap at most"]
    headings += [
        *([before] if refit else []),
        "error",
        *(["held out"] if held else []),
        "s",
    ]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:2] else "right")
    for kind, layers in report.by_kind().items():
        kept = [x.error if x.error_kept is None else x.error_kept for x in layers]
        first = [e / x.energy for e, x in zip(kept, layers, strict=True) if x.energy]
        best = sum("optimal" in layer.statuses for layer in layers)
        table.add_row(
            layers[0].pattern,
            kind,
            str(len(layers)),
            f"{best}",
            _gap(kept, layers),
            *([f"{_mean(first):.4f}"] if refit else []),
            f"{_mean([layer.relative for layer in layers]):.4f}",
            *([f"{_mean([layer.relative_held or 0.0 for layer in layers]):.4f}"] if held else []),
            f"{sum(layer.seconds for layer in layers):.1f}",
        )
    output.print(table)
    output.print(report.sentence(), soft_wrap=True)
    output.print(f"{report.sparsity:.1%} of the weights of these layers, in {report.seconds:.1f} s")


def _gap(errors: list[float], layers: list[LayerReport]) -> str:
    """The largest gap of a choice to its bound; nothing where a layer has none."""
    gaps = [1 - x.lower_bound / e if e else 0.0 for e, x in zip(errors, layers, strict=True)]
    return "–" if any(layer.lower_bound <= 0 for layer in layers) else f"{max(0.0, *gaps):.1%}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
