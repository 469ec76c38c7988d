"""What one or several prunes did, as a page: `maskopt report`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskopt.core.files import check_writable, from_json
from maskopt.errors import OptionError
from maskopt.models.architecture.blocks import short
from maskopt.models.checkpoints.mask_file import MaskFile
from maskopt.models.checkpoints.report import (
    LayerReport,
    PartReport,
    read_layers,
    read_manifest,
    read_parts,
    result_digest,
    what_was_done,
)
from maskopt.models.checkpoints.workspace import MANIFEST, MASKS, plain_errors
from maskopt.models.pruning.rerun import command_again
from maskopt.report.figure import COLOURS, MARKERS, Figure, legend, plain
from maskopt.report.mask_picture import MaskPicture
from maskopt.report.page import Command, Heading, Section, write_page
from maskopt.report.table import Table, number


@dataclass(frozen=True)
class Pruned:
    """A folder that `maskopt prune` or `maskopt prune-structured` wrote, as its manifest tells."""

    folder: Path
    name: str
    fingerprint: Mapping[str, Any]
    layers: Sequence[LayerReport]
    parts: Sequence[PartReport]
    sparsity: float
    memory: Mapping[str, int | None]
    digest: str

    @classmethod
    def open_all(cls, folders: Sequence[Path]) -> list[Pruned]:
        """Several, each called by the end of its path, or by all of it where two ends are alike.

        Raises:
            ModelError: one is none, or its manifest was changed.
        """
        names = _told_apart(folders)
        return [cls.open(folder, name) for folder, name in zip(folders, names, strict=True)]

    @classmethod
    def open(cls, folder: Path, name: str) -> Pruned:
        """Raises ModelError: it is none, or its manifest was changed."""
        path = folder / MANIFEST
        manifest = read_manifest(path, smaller=True)
        layers = read_layers(manifest["layers"], path)
        parts = read_parts(manifest["parts"], path)
        sparsity = float(manifest["sparsity"])
        memory = manifest.get("memory", {})  # of folders of earlier versions nothing is known
        digest = result_digest(manifest)
        return cls(folder, name, manifest["fingerprint"], layers, parts, sparsity, memory, digest)

    @property
    def solved(self) -> list[LayerReport]:
        """Those with errors that can be compared: not those pruned by magnitude for want of tokens."""
        return [layer for layer in self.layers if not layer.fallback]

    @property
    def has_masks(self) -> bool:
        """What was made smaller has none."""
        return "sparsity" in self.fingerprint["options"]

    def kinds(self) -> dict[str, list[LayerReport]]:
        found: dict[str, list[LayerReport]] = {}
        for layer in self.solved:
            found.setdefault(layer.kind, []).append(layer)
        return found


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
    """Write the page, and the figures by themselves where a folder is named; all that was written.

    Args:
        outs: folders that `maskopt prune` wrote; several stand side by side.
        evaluation: what `maskopt eval … --json` wrote.
        gaps: what `maskopt bound … --output FILE.jsonl` wrote of the first of them.
        picture: name of the tensor whose mask is shown; default: the first one of the first folder.

    Raises:
        MaskoptError: a file that is none of these, or that must not be replaced; matplotlib is not there.
    """
    check_writable(path, overwrite=overwrite, evaluation=evaluation, gaps=gaps)
    pruned = Pruned.open_all(outs)
    tables = [] if evaluation is None else [_perplexities(_records(evaluation, whole=True))]
    last = [] if gaps is None else [_gaps(gaps, pruned[0])]
    parts = report_parts(pruned, tables=tables, after=last, picture=picture)
    files = []
    if figures is not None:
        with plain_errors(figures):
            figures.mkdir(parents=True, exist_ok=True)
        drawn = [part for part in parts if isinstance(part, Figure)]
        for file in (file for part in drawn for file in part.files(figures)):
            check_writable(file, overwrite=overwrite)
        with plain_errors(figures):
            files = [file for part in drawn for file in part.save(figures)]
    write_page(path, "What maskopt pruned: " + ", ".join(one.name for one in pruned), parts)
    return [path, *files]


def report_parts(
    pruned: Sequence[Pruned],
    *,
    tables: Sequence[Table] = (),
    after: Sequence[Table] = (),
    picture: str | None = None,
) -> list[str | Section]:
    """The page from top to bottom.

    Args:
        tables: to stand below the summary.
        after: below what is known of the layers.
    """
    boxes = [improvements(one, i) for i, one in enumerate(pruned, 1) if _improved(one)]
    return [
        *(sentence(one) for one in pruned),
        summary(pruned),
        *tables,
        *([errors_by_block(pruned)] if any(one.solved for one in pruned) else []),
        *(kinds_table(one) for one in pruned if one.solved),
        *boxes,
        *(trained_table(one) for one in pruned if one.parts),
        *after,
        *([mask_picture(pruned[0], picture)] if pruned[0].has_masks or picture else []),
        Heading("The same once more"),
        *(Command("\n".join(command_again(one.fingerprint, one.folder))) for one in pruned),
    ]


def sentence(one: Pruned) -> str:
    """What was done."""
    return f"{one.folder}: {what_was_done(one.fingerprint, one.layers, one.sparsity)}"


def summary(pruned: Sequence[Pruned]) -> Table:
    """A line a folder. Errors are means over the layers of parts of their outputs' energy."""
    table = Table(
        "In short",
        (
            "folder",
            "solver",
            "sparsity",
            "error",
            "of the start's",
            "held out",
            "rows",
            "proven",
            "solving",
            "memory",
        ),
        text_columns=2,
        note="Errors are parts of the energy of a layer's output, in the mean over the layers; proven: rows "
        "whose mask is proven to be optimal, or 1-swap optimal; memory: of the process, at the peak.",
    )
    for one in pruned:
        layers = one.solved
        rows = sum(layer.rows for layer in layers)
        proven = sum(c for x in layers for name, c in x.statuses.items() if name != "feasible")
        held = [x.relative_held for x in layers if x.relative_held is not None]
        start = _start(layers)
        table.add(
            one.name,
            str(one.fingerprint["options"].get("solver", "–")),
            f"{one.sparsity:.1%}",
            number(_mean([x.relative for x in layers]) if layers else None),
            number(None if not start else _mean([x.relative for x in layers]) / start),
            number(_mean(held) if held else None),
            f"{rows:,}",
            f"{proven / rows:.0%}" if rows else "–",
            _time(sum(layer.seconds for layer in one.layers)),
            "–" if (peak := one.memory.get("process")) is None else f"{peak / 2**30:.2f} GiB",
        )
    return table


def kinds_table(one: Pruned) -> Table:
    """A line for every kind of layer."""
    table = Table(
        f"Kinds of layers, {one.name}",
        ("layers", "start", "error", "held out", "pruned", "swaps a row", "scans a row", "solving"),
        note="Means over the layers of a kind; errors as parts of their outputs' energy.",
    )
    for kind, layers in one.kinds().items():
        rows = sum(layer.rows for layer in layers)
        held = [x.relative_held for x in layers if x.relative_held is not None]
        counts = [
            number(sum(told) / rows) if len(told) == len(layers) else "–"
            for told in (_told(layers, "swaps"), _told(layers, "scans"))
        ]
        table.add(
            short(kind),
            number(_start(layers)),
            number(_mean([layer.relative for layer in layers])),
            number(_mean(held) if held else None),
            f"{sum(x.pruned for x in layers) / sum(x.rows * x.n for x in layers):.1%}",
            *counts,
            _time(sum(layer.seconds for layer in layers)),
        )
    return table


def errors_by_block(pruned: Sequence[Pruned]) -> Figure:
    """Mean error of a block's layers, along the model: start, result, and on windows kept aside."""
    series: dict[str, dict[int, float]] = {}
    for one in pruned:
        name = f"{one.name}: " if len(pruned) > 1 else ""
        blocks: dict[int, list[LayerReport]] = {}
        for layer in one.solved:
            blocks.setdefault(layer.block, []).append(layer)
        starts = {block: _start(layers) for block, layers in blocks.items()}
        if len(pruned) == 1 and all(value is not None for value in starts.values()):
            series[f"{name}start"] = {b: v for b, v in starts.items() if v is not None}
        series[f"{name}result"] = {b: _mean([x.relative for x in ls]) for b, ls in blocks.items()}
        if all(layer.relative_held is not None for layer in one.solved):
            series[f"{name}held out"] = {
                b: _mean([x.relative_held or 0.0 for x in ls]) for b, ls in blocks.items()
            }
    numbers = Table("", ("block", *series))
    for block in sorted({b for values in series.values() for b in values}):
        numbers.add(str(block), *(number(values.get(block)) for values in series.values()))

    def draw(axes: Any) -> None:
        for index, (name, values) in enumerate(series.items()):
            axes.plot(
                list(values), list(values.values()), label=legend(name), markersize=4,
                color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)],
            )  # fmt: skip
        positive = all(value > 0 for values in series.values() for value in values.values())
        axes.set(xlabel="block", ylabel="error", yscale="log" if positive else "linear")
        axes.xaxis.get_major_locator().set_params(integer=True)
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(lambda value, _: f"{value:g}")
        axes.figure.legend(loc="outside lower center", ncols=2)

    words = (
        "Error of the layers of a block as a part of their outputs' energy, in the mean, on the inputs that "
        "the blocks pruned before leave"
    )
    return Figure("errors", "Errors along the model", words + ".", draw, numbers)


def improvements(one: Pruned, index: int) -> Figure:
    """How far below the start's the rows' errors are, by kind of layer; `index` tells the drawings apart."""
    names, boxes = [], []
    for kind, layers in one.kinds().items():
        told = [
            layer.improvement_quantiles
            for layer in layers
            if layer.improvement_quantiles is not None
        ]
        if told:
            names.append(short(kind))
            boxes.append([_mean([quantiles[i] for quantiles in told]) for i in range(5)])
    numbers = Table("", ("layers", "least", "a tenth", "median", "nine tenths", "most"))
    for name, box in zip(names, boxes, strict=True):
        numbers.add(name, *(f"{value:.1%}" for value in box))

    def draw(axes: Any) -> None:
        axes.bxp(
            [{"whislo": a, "q1": b, "med": c, "q3": d, "whishi": e, "label": plain(name)}
             for name, (a, b, c, d, e) in zip(names, boxes, strict=True)],
            showfliers=False, orientation="horizontal",
            boxprops={"color": COLOURS[0]}, medianprops={"color": COLOURS[1]},
            whiskerprops={"color": COLOURS[0]}, capprops={"color": COLOURS[0]},
        )  # fmt: skip
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set(xlabel="objective below the start's")

    words = (
        "Of the rows of each kind of layer: how far the solver came below its start. The line is the median, "
        "the box holds eight rows of ten, the whiskers all; means over the layers"
    )
    return Figure(f"improvements-{index}", f"Rows, {one.name}", words + ".", draw, numbers)


def trained_table(one: Pruned) -> Table:
    """Losses of trained parts, before and after."""
    table = Table(
        f"Trained weights, {one.name}",
        (
            "part",
            "parts",
            "fitted before",
            "after",
            "held out before",
            "after",
            "unchanged",
            "time",
        ),
        note="Mean losses towards the dense model, on training and on held-out windows.",
    )
    parts: dict[str, list[PartReport]] = {}
    for part in one.parts:
        parts.setdefault(part.part or "block", []).append(part)
    for name, some in parts.items():
        table.add(
            name,
            str(len(some)),
            number(_mean([part.fitted_before for part in some])),
            number(_mean([part.fitted_after for part in some])),
            number(_mean([part.held_before for part in some])),
            number(_mean([part.held_after for part in some])),
            str(sum(part.epoch == 0 for part in some)),
            _time(sum(part.seconds for part in some)),
        )
    return table


def mask_picture(one: Pruned, tensor: str | None) -> MaskPicture:
    """Raises OptionError: no mask is called so."""
    if not one.has_masks:
        raise OptionError(f"`picture`: {one.folder} was made smaller, and has no masks")
    masks = MaskFile(one.folder / MASKS)
    name = tensor or masks.names[0]
    if name not in masks:
        raise OptionError(f"`picture` {name!r}: {one.folder} has no mask of such a tensor")
    return MaskPicture(name, masks.read(name).rows())


def _told_apart(paths: Sequence[Path]) -> list[str]:
    """The end of each path, or all of it where two ends are alike."""
    ends = [path.resolve().name for path in paths]
    return [
        end if ends.count(end) == 1 else str(path) for path, end in zip(paths, ends, strict=True)
    ]


def _perplexities(records: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        "The models on text",
        ("model", "perplexity", "compared with the first", "KL, nats", "same top token"),
    )
    try:
        names = _told_apart([Path(record["model"]) for record in records])
        for name, record in zip(names, records, strict=True):
            p, c = record["perplexity"], record.get("change")
            table.add(
                name,
                f"{p['value']:.2f} ({p['low']:.2f} to {p['high']:.2f})",
                "–"
                if c is None
                else f"{c['ratio']:.3f} ({c['ratio_low']:.3f} to {c['ratio_high']:.3f})",
                "–" if c is None else f"{c['kl']:.4f}",
                "–" if c is None else f"{c['agreement']:.1%}",
            )
            table.note = (
                f"{p['windows']} windows of {p['length']} tokens of {p['source']}, {p['beginning']}; "
                "intervals of 95%, paired by window."
            )
    except (KeyError, TypeError, AttributeError):
        raise OptionError(
            "`evaluation`: is not what `maskopt eval --text … --json` writes"
        ) from None
    return table


def _gaps(path: Path, one: Pruned) -> Table:
    """Raises OptionError: no records of gaps, or those of another model."""
    table = Table(
        "How far from the best possible",
        ("layers", "rows", "median gap", "worst gap"),
        note=f"As {path.name} states of sampled rows: no mask can lower a row's error by more than its gap.",
    )
    kinds: dict[str, list[float]] = {}
    records, models = _records(path, whole=False), set()
    try:
        for record in records:
            models.add(record["model"])
            gap = math.inf if record["gap"] is None else float(record["gap"])
            kinds.setdefault(str(record["kind"]), []).append(gap)
    except (KeyError, TypeError, ValueError):
        raise OptionError(
            "`gaps`: is not what `maskopt bound --output FILE.jsonl` writes"
        ) from None
    if models - {one.digest}:
        raise OptionError(
            f"`gaps`: {path} is of another model than {one.folder}; run `maskopt bound` on that folder"
        )
    for kind, found in kinds.items():
        median, worst = statistics.median(found), max(found)
        table.add(short(kind), str(len(found)), f"{median:.1%}", f"{worst:.1%}")
    return table


def _records(path: Path, *, whole: bool) -> list[Mapping[str, Any]]:
    """A JSON list, or one JSON value a line.

    Raises:
        OptionError: neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = from_json(text) if whole else [from_json(line) for line in text.splitlines()]
    except OSError as error:
        raise OptionError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise OptionError(f"{path}: holds no records")
    return found


def _improved(one: Pruned) -> bool:
    return any(layer.improvement_quantiles is not None for layer in one.solved)


def _told(layers: Sequence[LayerReport], name: str) -> list[int]:
    return [value for layer in layers if (value := getattr(layer, name)) is not None]


def _start(layers: Sequence[LayerReport]) -> float | None:
    """Mean relative error of the starts, where all had one."""
    starts = [x.error_start / x.energy for x in layers if x.error_start is not None and x.energy]
    return _mean(starts) if layers and len(starts) == len(layers) else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
