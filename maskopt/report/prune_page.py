"""The results of one or several prunes on a page: `maskopt report`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from maskopt.core.files import check_writable, from_json
from maskopt.errors import OptionError
from maskopt.models.architecture.blocks import short
from maskopt.models.checkpoints.mask_file import MaskFile
from maskopt.models.checkpoints.report import (
    LayerReport,
    PartReport,
    proven_share,
    ratio_to_wanda,
    read_layers,
    read_manifest,
    read_parts,
    result_digest,
    what_was_done,
)
from maskopt.models.checkpoints.workspace import MANIFEST, MASKS, plain_errors
from maskopt.models.pruning.rerun import command_again
from maskopt.report.page import (
    COLOURS,
    MARKERS,
    Command,
    Figure,
    Heading,
    MaskPicture,
    Section,
    legend,
    plain,
    write_page,
)
from maskopt.report.table import Table, number

#: keys of measured perplexities
DENSE, WANDA = "dense", "wanda"


@dataclass(frozen=True)
class Pruned:
    """The manifest of a folder that `maskopt prune` or `maskopt prune-structured` wrote."""

    folder: Path
    name: str
    fingerprint: Mapping[str, Any]
    layers: Sequence[LayerReport]
    parts: Sequence[PartReport]
    sparsity: float
    memory: Mapping[str, int | None]
    distillation: Mapping[str, Any] | None
    digest: str

    @classmethod
    def open_all(cls, folders: Sequence[Path]) -> list[Pruned]:
        """Several, named as by `_distinct_names`; raises what `open` does."""
        return list(map(cls.open, folders, _distinct_names(folders)))

    @classmethod
    def open(cls, folder: Path, name: str) -> Pruned:
        """Raises ModelError: it is none, or its manifest was changed."""
        path = folder / MANIFEST
        manifest = read_manifest(path, smaller=True)
        return cls(
            folder,
            name,
            manifest["fingerprint"],
            read_layers(manifest["layers"], path),
            read_parts(manifest["parts"], path),
            float(manifest["sparsity"]),
            manifest.get("memory", {}),  # folders of earlier versions have none
            manifest.get("distillation"),
            result_digest(manifest),
        )

    @property
    def solved(self) -> list[LayerReport]:
        """Layers with comparable errors: not those pruned by magnitude for want of tokens."""
        return [layer for layer in self.layers if not layer.fallback]

    @property
    def has_masks(self) -> bool:
        """A model that was made smaller has none."""
        return "sparsity" in self.fingerprint["options"]

    def by(self, name: str) -> dict[Any, list[LayerReport]]:
        """The solved layers by a field: `kind` or `block`."""
        found: dict[Any, list[LayerReport]] = {}
        for layer in self.solved:
            found.setdefault(getattr(layer, name), []).append(layer)
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
    """Write the page, and the figures as files where a folder is named; returns the paths of all files.

    Args:
        outs: folders that `maskopt prune` wrote, to be compared.
        evaluation: output of `maskopt eval … --json`.
        gaps: output of `maskopt bound … --output FILE.jsonl` for the first of them.
        picture: name of the tensor whose mask is shown; default: the first one of the first folder.

    Raises:
        MaskoptError: a file that is none of these, or that must not be replaced; matplotlib is missing.
    """
    check_writable(path, overwrite=overwrite, evaluation=evaluation, gaps=gaps)
    pruned, tables = Pruned.open_all(outs), []
    values: dict[str | Path, float] = {}
    if evaluation is not None:
        table, values = _perplexities(_records(evaluation, whole=True), pruned)
        tables = [table]
    last = [] if gaps is None else [_gaps(gaps, pruned[0])]
    parts = report_parts(pruned, perplexity=values, tables=tables, after=last, picture=picture)
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
    perplexity: Mapping[str | Path, float] = MappingProxyType({}),
    tables: Sequence[Table] = (),
    after: Sequence[Table] = (),
    picture: str | None = None,
) -> list[str | Section]:
    """The page from top to bottom.

    Args:
        perplexity: measured values, by folder, and of `DENSE` and `WANDA`.
        tables: for the place above the table of runs.
        after: for the place below the tables of layers.
    """
    solved = [one for one in pruned if one.solved]
    return [
        *(verdict(one, perplexity) for one in pruned),
        comparison(pruned, perplexity),
        *(f"{x.folder}: {what_was_done(x.fingerprint, x.layers, x.sparsity)}" for x in pruned),
        *tables,
        runs(pruned),
        *([errors_by_block(pruned)] if solved else []),
        *(kinds_table(one) for one in solved),
        *(
            improvements(one, i)
            for i, one in enumerate(pruned, 1)
            if any(layer.improvement_quantiles is not None for layer in one.solved)
        ),
        *(trained_table(one) for one in pruned if one.parts or one.distillation),
        *after,
        *([mask_picture(pruned[0], picture)] if pruned[0].has_masks or picture else []),
        Heading("The same once more"),
        *(Command("\n".join(command_again(one.fingerprint, one.folder))) for one in pruned),
    ]


def verdict(one: Pruned, perplexity: Mapping[str | Path, float]) -> str:
    """What was pruned and at what cost, in a sentence."""
    gone = "zero" if one.has_masks else "removed"
    facts = [
        f"{one.name}: {one.sparsity:.1%} of the weights in {len(one.layers)} layers are {gone}"
    ]
    dense, value = perplexity.get(DENSE), perplexity.get(one.folder)
    if dense is not None and value is not None:
        facts.append(f"perplexity is {value:.2f}, that of the dense model {dense:.2f}")
    if (ratio := ratio_to_wanda(one.solved)) is not None:
        facts.append(f"the error is {ratio:.3f} times that of Wanda's masks at the same sparsity")
    if proven := proven_share(one.solved):
        facts.append(f"{proven:.0%} of the rows are proven optimal or 1-swap optimal")
    return "; ".join(facts) + "."


def comparison(pruned: Sequence[Pruned], perplexity: Mapping[str | Path, float]) -> Table:
    """The dense model, Wanda's masks where there is one folder, and a line for every folder."""
    table = Table(
        "In short",
        (
            "model",
            *(["perplexity"] if perplexity else []),
            "pruned",
            "error",
            "ratio to Wanda",
            "proven",
        ),
        note="Errors: relative squared error of a layer's output, on average over the layers; ratio to "
        "Wanda: the sum of errors over that of Wanda's masks at the same sparsity, with unchanged weights; "
        "proven: rows whose mask is proven optimal, or 1-swap optimal.",
    )

    def add(name: str, key: str | Path, *cells: str) -> None:
        values = [f"{perplexity[key]:.2f}" if key in perplexity else "–"] if perplexity else []
        table.add(name, *values, *cells)

    add("dense", DENSE, "0.0%", "0", "0", "–")
    for one in pruned:
        layers, share = one.solved, f"{one.sparsity:.1%}"
        wanda, ratio, proven = _wanda(layers), ratio_to_wanda(layers), proven_share(layers)
        if len(pruned) == 1 and wanda is not None:
            add("Wanda's masks", WANDA, share, number(wanda), "1", "–")
        cells = number(_mean([x.relative for x in layers])), number(ratio)
        add(one.name, one.folder, share, *cells, "–" if proven is None else f"{proven:.0%}")
    return table


def runs(pruned: Sequence[Pruned]) -> Table:
    """A line for every folder."""
    table = Table(
        "The runs",
        ("folder", "solver", "held-out error", "rows", "solving", "memory"),
        text_columns=2,
        note="Held-out error: on average over the layers; memory: of the process, at the peak.",
    )
    for one in pruned:
        layers, peak = one.solved, one.memory.get("process")
        table.add(
            one.name,
            str(one.fingerprint["options"].get("solver", "–")),
            number(_held(layers)),
            f"{sum(layer.rows for layer in layers):,}",
            _time(sum(layer.seconds for layer in one.layers)),
            "–" if peak is None else f"{peak / 2**30:.2f} GiB",
        )
    return table


def kinds_table(one: Pruned) -> Table:
    """A line for every kind of layer."""
    table = Table(
        f"Kinds of layers, {one.name}",
        ("layers", "Wanda", "error", "held out", "pruned", "swaps a row", "scans a row", "solving"),
        note="Means over the layers of a kind; errors: relative squared errors of their outputs.",
    )
    for kind, layers in one.by("kind").items():
        rows = sum(layer.rows for layer in layers)
        counts = [[getattr(layer, name) for layer in layers] for name in ("swaps", "scans")]
        table.add(
            short(kind),
            number(_wanda(layers)),
            number(_mean([layer.relative for layer in layers])),
            number(_held(layers)),
            f"{sum(x.pruned for x in layers) / sum(x.rows * x.n for x in layers):.1%}",
            *("–" if None in found else number(sum(found) / rows) for found in counts),
            _time(sum(layer.seconds for layer in layers)),
        )
    return table


def errors_by_block(pruned: Sequence[Pruned]) -> Figure:
    """Mean error of a block's layers, along the model: Wanda's masks, result, and on held-out windows."""
    series: dict[str, dict[int, float]] = {}
    for one in pruned:
        several = len(pruned) > 1
        name = one.name if several else "this model"
        blocks = one.by("block")
        lines = {
            "Wanda's masks": {} if several else {b: _wanda(x) for b, x in blocks.items()},
            name: {b: _mean([x.relative for x in layers]) for b, layers in blocks.items()},
            f"{name}, held-out text": {b: _held(x, every=True) for b, x in blocks.items()},
        }
        for label, values in lines.items():
            known = {block: value for block, value in values.items() if value is not None}
            if label == name or (values and len(known) == len(values)):
                series[label] = known
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
        axes.set(
            xlabel="decoder block",
            ylabel="relative squared error",
            yscale="log" if positive else "linear",
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(lambda value, _: f"{value:g}")
        axes.figure.legend(loc="outside lower center", ncols=2)

    words = (
        "Relative squared error of the outputs of a block's layers, on average, measured on activations from "
        "the already pruned earlier blocks."
    )
    return Figure("errors", "Errors along the model", words, draw, numbers)


def improvements(one: Pruned, index: int) -> Figure:
    """Reduction of the rows' errors from the start, by kind of layer; `index` is for the figure's name."""
    names, boxes = [], []
    for kind, layers in one.by("kind").items():
        known = [x.improvement_quantiles for x in layers if x.improvement_quantiles is not None]
        if known:
            names.append(short(kind))
            boxes.append([sum(column) / len(known) for column in zip(*known, strict=True)])
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
        axes.set(xlabel="reduction of a row's error from the solver's start")

    words = (
        "Reduction of the objective from the solver's start, by rows of each kind of layer. The line is the "
        "median, the box holds eight rows of ten, the whiskers all; means over the layers."
    )
    return Figure(
        f"improvements-{index}", f"Improvement of the rows, {one.name}", words, draw, numbers
    )


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
        note="Mean losses towards the dense model, on training and on held-out windows; of the whole model "
        "the KL divergence of its predictions, nats.",
    )
    parts: dict[str, list[PartReport]] = {}
    for part in one.parts:
        parts.setdefault(part.part or "block", []).append(part)
    losses = ("fitted_before", "fitted_after", "held_before", "held_after")
    for name, some in parts.items():
        table.add(
            name,
            str(len(some)),
            *(number(_mean([getattr(part, loss) for part in some])) for loss in losses),
            str(sum(part.epoch == 0 for part in some)),
            _time(sum(part.seconds for part in some)),
        )
    if (whole := one.distillation) is not None:
        values = [whole[when][on] for on in ("fitted", "held") for when in ("before", "after")]
        table.add("whole model", "1", *map(number, values), "–" if whole["epoch"] else "1", "–")
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


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or all of it where two last parts are equal."""
    ends = [path.resolve().name for path in paths]
    return [
        end if ends.count(end) == 1 else str(path) for path, end in zip(paths, ends, strict=True)
    ]


def _perplexities(
    records: Sequence[Mapping[str, Any]], pruned: Sequence[Pruned]
) -> tuple[Table, dict[str | Path, float]]:
    """A table of the records, and the values for `report_parts`."""
    found: dict[Any, float] = {}
    table = Table(
        "The models on text",
        ("model", "perplexity", "compared with the first", "KL, nats", "same top token"),
    )
    try:
        names = _distinct_names([Path(record["model"]) for record in records])
        for name, record in zip(names, records, strict=True):
            p, c = record["perplexity"], record.get("change")
            place = Path(record["model"]).resolve()
            same: list[Any] = [one.folder for one in pruned if one.folder.resolve() == place]
            found |= dict.fromkeys(same or [DENSE] * (c is None), float(p["value"]))
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
    except (KeyError, TypeError, ValueError, AttributeError):
        raise OptionError(
            "`evaluation`: is not what `maskopt eval --text … --json` writes"
        ) from None
    return table, found


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


def _wanda(layers: Sequence[LayerReport]) -> float | None:
    """Mean relative error of Wanda's masks, where all are known."""
    known = [x.error_wanda / x.energy for x in layers if x.error_wanda is not None and x.energy]
    return _mean(known) if len(known) == len(layers) else None


def _held(layers: Sequence[LayerReport], *, every: bool = False) -> float | None:
    """Mean relative error on held-out windows, of the layers that have one; `every`: where all have."""
    held = [x.relative_held for x in layers if x.relative_held is not None]
    return None if every and len(held) < len(layers) else _mean(held)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
