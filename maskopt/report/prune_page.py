"""The page of `maskopt report`: the results of one or several prunes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskopt.core.files import check_writable, from_json
from maskopt.core.table import Table, cell, number
from maskopt.errors import OptionError
from maskopt.experiments.jobs import read_records
from maskopt.models.architecture.blocks import short
from maskopt.models.checkpoints.report import (
    LayerReport,
    PruneReport,
    grouped,
    mean_error,
    mean_held_error,
    proven_share,
    ratio_to_wanda,
    result_digest,
)
from maskopt.models.checkpoints.result import MaskFile
from maskopt.models.checkpoints.schema import MANIFEST, MASKS, PRUNE, read_manifest
from maskopt.models.checkpoints.workspace import plain_errors
from maskopt.models.evaluation.bound import GapRecord, by_kind
from maskopt.models.evaluation.evaluate import panel_ratios
from maskopt.models.pruning.card import command_again
from maskopt.report.page import (
    COLOURS,
    MARKERS,
    Commands,
    Figure,
    MaskPicture,
    Section,
    plain,
    write_page,
)

#: a report and its name on the page
Named = tuple[str, PruneReport]
#: keys of measured perplexities
DENSE, WANDA = "dense", "wanda"


def open_reports(folders: Sequence[Path]) -> list[Named]:
    """Read the reports of folders that `maskopt prune` or `maskopt prune-structured` wrote.

    Raises:
        ModelError: another folder, or a changed manifest.
    """
    reports = [PruneReport.of(read_manifest(x / MANIFEST, smaller=True), x) for x in folders]
    return list(zip(_distinct_names(folders), reports, strict=True))


def write_report(
    path: Path,
    outs: Sequence[Path],
    *,
    evaluation: Path | None = None,
    gaps: Path | None = None,
    picture: str | None = None,
    figures: Path | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write the page, and its figures into the folder `figures`; return the paths of all files.

    Args:
        outs: folders that `maskopt prune` wrote, to be compared.
        evaluation: output of `maskopt eval … --json`.
        gaps: output of `maskopt bound … --output FILE.jsonl` for the first folder.
        picture: name of the tensor whose mask is shown; default: the first one of the first folder.
    """
    check_writable(path, overwrite=overwrite, evaluation=evaluation, gaps=gaps)
    pruned = open_reports(outs)
    tables: list[Table] = []
    values: dict[str | Path, float] = {}
    if evaluation is not None:
        tables, values = _perplexities(evaluation, outs)
    last = [] if gaps is None else [_gaps(gaps, outs[0])]
    parts = report_parts(pruned, perplexity=values, tables=tables, after=last, picture=picture)
    files = []
    if figures is not None:
        drawn = [part for part in parts if isinstance(part, Figure)]
        with plain_errors(figures):
            figures.mkdir(parents=True, exist_ok=True)
            for file in (file for part in drawn for file in part.files(figures)):
                check_writable(file, overwrite=overwrite)
            files = [file for part in drawn for file in part.save(figures)]
    write_page(path, "What maskopt pruned: " + ", ".join(name for name, _ in pruned), parts)
    return [path, *files]


def report_parts(
    pruned: Sequence[Named],
    *,
    perplexity: Mapping[str | Path, float],
    tables: Sequence[Table],
    after: Sequence[Table] = (),
    picture: str | None = None,
) -> list[str | Section]:
    """Return the parts of the page from top to bottom.

    Args:
        perplexity: measured values, by folder, and of `DENSE` and `WANDA`.
        tables: for the place above the table of runs.
        after: for the place below the tables of layers.
    """
    reports = [report for _, report in pruned]
    solved = [(name, report) for name, report in pruned if report.solved]
    parts: list[str | Section] = [verdict(name, report, perplexity) for name, report in pruned]
    parts.append(comparison(pruned, perplexity))
    for report in reports:
        parts += [f"{report.output}: {line}" for line in (report.sentence(), *report.training())]
    parts += [*tables, runs(pruned)]
    if solved:
        parts.append(errors_by_block(pruned))
    parts += [report.table(f"Kinds of layers, {name}") for name, report in solved]
    for index, (name, report) in enumerate(pruned, 1):
        if any(layer.improvement_quantiles is not None for layer in report.solved):
            parts.append(improvements(name, report, index))
    parts += after
    if reports[0].kind == PRUNE or picture:
        parts.append(mask_picture(reports[0], picture))
    again = [command_again(report.kind, report.output or "OUT") for report in reports]
    return [*parts, Commands("The same once more", again)]


def verdict(name: str, report: PruneReport, perplexity: Mapping[str | Path, float]) -> str:
    """Describe the pruned share and its cost in a sentence."""
    gone, layers = "zero" if report.kind == PRUNE else "removed", report.solved
    facts = [
        f"{name}: {report.sparsity:.1%} of the weights in {len(report.layers)} layers are {gone}"
    ]
    dense, value = perplexity.get(DENSE), perplexity.get(report.output or "")
    if dense is not None and value is not None:
        facts.append(f"perplexity is {value:.2f}, that of the dense model {dense:.2f}")
    if (ratio := ratio_to_wanda(layers)) is not None:
        facts.append(f"the error is {ratio:.3f} times that of Wanda's masks at the same sparsity")
    if proven := proven_share(layers):
        facts.append(f"{proven:.0%} of the rows are proven optimal or 1-swap optimal")
    return "; ".join(facts) + "."


def comparison(pruned: Sequence[Named], perplexity: Mapping[str | Path, float]) -> Table:
    """Compare the dense model, Wanda's masks where there is one folder, and all folders."""
    measured = ["perplexity"] if perplexity else []
    table = Table(
        "In short",
        ("model", *measured, "pruned", "error", "ratio to Wanda", "proven"),
        note="Errors: relative squared error of a layer's output, on average over the layers; ratio to "
        "Wanda: the sum of errors over that of Wanda's masks at the same sparsity, with unchanged weights; "
        "proven: rows whose mask is proven optimal, or 1-swap optimal.",
    )

    def add(name: str, key: str | Path, *cells: str) -> None:
        table.add(name, *(cell(perplexity.get(key), ".2f") for _ in measured), *cells)

    add("dense", DENSE, "0.0%", "0", "0", "–")
    for name, report in pruned:
        layers, share = report.solved, f"{report.sparsity:.1%}"
        wanda, proven = _wanda_error(layers), cell(proven_share(layers), ".0%")
        if len(pruned) == 1 and wanda is not None:
            add("Wanda's masks", WANDA, share, number(wanda), "1", "–")
        errors = number(mean_error(layers)), number(ratio_to_wanda(layers))
        add(name, report.output or "", share, *errors, proven)
    return table


def runs(pruned: Sequence[Named]) -> Table:
    """Return a table with a line for every folder."""
    table = Table(
        "The runs",
        ("folder", "solver", "held-out error", "rows", "solving", "memory"),
        text_columns=2,
        note="Held-out error: on average over the layers; memory: of the process, at the peak.",
    )
    for name, report in pruned:
        layers, peak = report.solved, report.memory.get("process")
        seconds = sum(layer.seconds for layer in report.layers)
        table.add(
            name,
            str(report.fingerprint["options"].get("solver", "–")),
            number(mean_held_error(layers)),
            f"{sum(layer.rows for layer in layers):,}",
            f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min",
            "–" if peak is None else f"{peak / 2**30:.2f} GiB",
        )
    return table


def errors_by_block(pruned: Sequence[Named]) -> Figure:
    """Draw the mean error of each block's layers: of Wanda's masks, the result, and on held-out windows."""
    series: dict[str, dict[int, Any]] = {}
    several = len(pruned) > 1
    for title, report in pruned:
        name = title if several else "this model"
        lines = {name: mean_error, f"{name}, held-out text": mean_held_error}
        lines = lines if several else {"Wanda's masks": _wanda_error, **lines}
        blocks = grouped(report.solved, "block")
        for label, mean in lines.items():
            values = {block: mean(layers) for block, layers in blocks.items()}
            if label == name or (values and None not in values.values()):
                series[label] = values
    numbers = Table("", ("block", *series))
    for block in sorted({b for values in series.values() for b in values}):
        numbers.add(str(block), *(number(values.get(block)) for values in series.values()))

    def draw(axes: Any) -> None:
        for index, (name, values) in enumerate(series.items()):
            axes.plot(
                list(values), list(values.values()), label=plain(name), markersize=4,
                color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)],
            )  # fmt: skip
        positive = all(value > 0 for values in series.values() for value in values.values())
        axes.set(
            xlabel="decoder block",
            ylabel="relative squared error",
            yscale="log" if positive else "linear",
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(lambda value, _: f"{value:g}")
        axes.figure.legend(loc="outside lower center", ncols=2)

    words = (
        "Relative squared error of the outputs of a block's layers, on average, measured on activations from "
        "the already pruned earlier blocks."
    )
    return Figure("errors", "Errors along the model", words, draw, numbers)


def improvements(title: str, report: PruneReport, index: int) -> Figure:
    """Draw the reduction of the rows' errors by kind of layer; `index` is for the figure's name."""
    boxes = []
    for kind, layers in grouped(report.solved, "kind").items():
        known = [x.improvement_quantiles for x in layers if x.improvement_quantiles is not None]
        if known:
            means = [sum(column) / len(known) for column in zip(*known, strict=True)]
            boxes.append((short(kind), means))
    numbers = Table("", ("layers", "least", "a tenth", "median", "nine tenths", "most"))
    for name, box in boxes:
        numbers.add(name, *(f"{value:.1%}" for value in box))

    def draw(axes: Any) -> None:
        axes.bxp(
            [{"whislo": a, "q1": b, "med": c, "q3": d, "whishi": e, "label": plain(name)}
             for name, (a, b, c, d, e) in boxes],
            showfliers=False, orientation="horizontal",
            boxprops={"color": COLOURS[0]}, medianprops={"color": COLOURS[1]},
            whiskerprops={"color": COLOURS[0]}, capprops={"color": COLOURS[0]},
        )  # fmt: skip
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set(xlabel="reduction of a row's error from the solver's start")

    words = (
        "Reduction of the objective from the solver's start, by rows of each kind of layer. The line is the "
        "median, the box holds eight rows of ten, the whiskers all; means over the layers."
    )
    name = f"Improvement of the rows, {title}"
    return Figure(f"improvements-{index}", name, words, draw, numbers)


def mask_picture(report: PruneReport, tensor: str | None) -> MaskPicture:
    """Return the picture of a tensor's mask (None: the first); OptionError for an unknown name."""
    assert report.output is not None
    if report.kind != PRUNE:
        raise OptionError(f"`picture`: {report.output} was made smaller, and has no masks")
    masks = MaskFile(report.output / MASKS)
    name = tensor or masks.names[0]
    if name not in masks:
        raise OptionError(f"`picture` {name!r}: {report.output} has no mask of such a tensor")
    return MaskPicture(name, masks.read(name).rows())


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the last part of each path, or all of it where two last parts are equal."""
    ends = [path.resolve().name for path in paths]
    return [
        end if ends.count(end) == 1 else str(path) for path, end in zip(paths, ends, strict=True)
    ]


def _perplexities(
    path: Path, folders: Sequence[Path]
) -> tuple[list[Table], dict[str | Path, float]]:
    """Return tables of what `maskopt eval` wrote, one for each text, and the values for `report_parts`.

    Of several texts, the values are those of the first.
    """
    values: dict[Any, float] = {}
    tables: dict[str, Table] = {}
    losses: dict[str, list[Sequence[float]]] = {}
    try:
        records = from_json(path.read_text(encoding="utf-8"))
        places = list(dict.fromkeys(record["model"] for record in records))
        names = dict(zip(places, _distinct_names([Path(x) for x in places]), strict=True))
        for record in records:
            p, c = record["perplexity"], record.get("change")
            text = str(p["sha256"])
            if text not in tables:
                tables[text] = Table(
                    "The models on text",
                    (
                        "model",
                        "perplexity",
                        "compared with the first",
                        "KL, nats",
                        "same top token",
                    ),
                    note=f"{p['windows']} windows of {p['length']} tokens of {p['source']}, "
                    f"{p['beginning']}; intervals of 95%, paired by window.",
                )
            place = Path(record["model"]).resolve()
            same: list[Any] = [folder for folder in folders if folder.resolve() == place]
            if len(tables) == 1:
                values |= dict.fromkeys(same or [DENSE] * (c is None), float(p["value"]))
            cells = ["–"] * 3
            if c is not None:
                ratio = f"{c['ratio']:.3f} ({c['ratio_low']:.3f} to {c['ratio_high']:.3f})"
                cells = [ratio, f"{c['kl']:.4f}", f"{c['agreement']:.1%}"]
            perplexity = f"{p['value']:.2f} ({p['low']:.2f} to {p['high']:.2f})"
            tables[text].add(names[record["model"]], perplexity, *cells)
            losses.setdefault(record["model"], []).append(record["losses"])
    except OSError as error:
        raise OptionError(f"{path}: cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise OptionError(
            f"`evaluation` {path}: is not what `maskopt eval --text … --json` writes"
        ) from None
    if len(tables) > 1:
        models, means = list(losses), panel_ratios(list(losses.values()))
        table = Table(
            "The models on all texts",
            ("model", "geometric mean compared with the first"),
            note=f"{len(tables)} texts; intervals of 95%, paired by window.",
        )
        for model, mean in zip(models[1:], means, strict=True):
            table.add(names[model], str(mean))
        tables["all"] = table
    return list(tables.values()), values


def _gaps(path: Path, folder: Path) -> Table:
    """Return a table of certified gaps; MaskoptError: no records of gaps, or those of another model."""
    table = Table(
        "How far from the best possible",
        ("layers", "rows", "median gap", "worst gap"),
        note=f"As {path.name} states of sampled rows: no mask can lower a row's error by more than its gap.",
    )
    records = list(read_records(path, GapRecord).values())
    if not records:
        raise OptionError(f"`gaps` {path}: holds no records of `maskopt bound --output FILE.jsonl`")
    model = result_digest(read_manifest(folder / MANIFEST, smaller=True))
    if any(record.model != model for record in records):
        raise OptionError(
            f"`gaps`: {path} is of another model than {folder}; run `maskopt bound` on that folder"
        )
    for kind, gaps in by_kind(records).items():
        table.add(short(kind), str(gaps.rows), f"{gaps.median:.1%}", f"{gaps.worst:.1%}")
    return table


def _wanda_error(layers: Sequence[LayerReport]) -> float | None:
    """Return the mean relative error of Wanda's masks, where all are known."""
    known = [x.error_wanda / x.energy for x in layers if x.error_wanda is not None and x.energy]
    return statistics.fmean(known) if known and len(known) == len(layers) else None
