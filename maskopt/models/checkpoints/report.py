"""Reports of a prune, layer by layer, and the manifest that records them."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from maskopt._version import __version__
from maskopt.core.table import Table, cell
from maskopt.errors import OptionError
from maskopt.models.checkpoints.bos import Beginning
from maskopt.models.checkpoints.checkpoint import write_json
from maskopt.models.checkpoints.result import Edits
from maskopt.models.checkpoints.schema import (
    BLOCKS,
    EXPERTS,
    MANIFEST_FORMAT,
    PRUNE,
    manifest_digest,
)

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class LayerReport:
    """Report of one pruned layer. Errors and energies are sums over rows.

    Attributes:
        block: index of its decoder block.
        kind: the name inside the block, numbers as stars: `self_attn.q_proj`.
        error_wanda: of Wanda's mask with unchanged weights, at the layer's sparsity in every row; None where
            no mask was chosen.
        error: of the result: the mean squared change of the output, with G shrunk by `gram_shrinkage`.
        error_kept: of the mask before kept weights were updated; None without an update.
        objective: of the statuses: `kept` weights, `least-squares` updated ones, or `updated` by the solver.
        damping: of the update; None without one.
        lower_bound: proven bound of `error`, or of `error_kept` where weights were updated after masks were
            chosen for kept ones; 0 where none is known.
        statuses: number of rows by status.
        tokens: calibration tokens that the layer saw.
        fallback: too few tokens, so pruned by magnitude; errors are then sums of squared pruned weights.
        energy: mean square of the rows' targets with the same G: wᵀGw, or the dense model's output.
        error_held, energy_held: on the held-out windows, G not shrunk; None where there are none.
        gram_shrinkage: α that the masks were chosen with.
        swaps, scans: of a 1-swap search; None where the solver makes none.
        improvement_quantiles: of the rows' 1 − objective / start: least, a tenth, median, nine tenths, most;
            None without a start, or with a shared budget.
    """

    name: str
    block: int
    kind: str
    rows: int
    n: int
    pattern: str
    pruned: int
    error: float
    lower_bound: float
    statuses: dict[str, int]
    tokens: int
    fallback: bool
    seconds: float
    energy: float = 0.0
    error_held: float | None = None
    energy_held: float | None = None
    gram_shrinkage: float = 0.0
    error_kept: float | None = None
    objective: str = "kept"
    damping: float | None = None
    swaps: int | None = None
    scans: int | None = None
    error_wanda: float | None = None
    improvement_quantiles: Sequence[float] | None = None

    @property
    def sparsity(self) -> float:
        return self.pruned / (self.rows * self.n)

    @property
    def relative(self) -> float:
        """Error / energy; 0 where there is none."""
        return self.error / self.energy if self.energy > 0 else 0.0

    @property
    def relative_held(self) -> float | None:
        """Error / energy on the held-out windows; None where there are none."""
        if self.error_held is None or not self.energy_held:
            return None
        return self.error_held / self.energy_held


def ratio_to_wanda(layers: Sequence[LayerReport]) -> float | None:
    """Return the errors' sum relative to that of Wanda's masks; None where a layer has none, or it is 0."""
    errors = [layer.error_wanda for layer in layers]
    total = sum(error or 0.0 for error in errors)
    return None if None in errors or not total else sum(x.error for x in layers) / total


def proven_share(layers: Sequence[LayerReport]) -> float | None:
    """Return the share of rows whose mask is proven optimal or 1-swap optimal; None without rows."""
    rows = sum(layer.rows for layer in layers)
    open_ = sum(layer.statuses.get("feasible", 0) for layer in layers)
    return 1 - open_ / rows if rows else None


def _errors(layers: Sequence[LayerReport]) -> dict[str, str]:
    """Return the errors of layers by heading, relative to the energy of their outputs."""

    def part(name: str, energy: str = "energy") -> str:
        error, whole = (sum(getattr(x, of) or 0.0 for x in layers) for of in (name, energy))
        return cell(error / whole if whole else None, ".4f")

    first = [layer.error if layer.error_kept is None else layer.error_kept for layer in layers]
    gaps = [1 - x.lower_bound / e if e else 0.0 for x, e in zip(layers, first, strict=True)]
    gap = max(0.0, *gaps) if all(layer.lower_bound > 0 for layer in layers) else None
    return {
        "Wanda": part("error_wanda"),
        "before update": part("error_kept"),
        "routing unchanged": part("error_kept"),
        "gap at most": cell(gap, ".1%"),
        "error": part("error"),
        "error/Wanda": cell(ratio_to_wanda(layers), ".3f"),
        "held-out error": part("error_held", "energy_held"),
        "proven": cell(proven_share(layers), ".1%"),
    }


@dataclass(frozen=True)
class TrainedBlock:
    """Training of a block. Losses are means over windows.

    Attributes:
        held_before, held_after: on the held-out windows, which choose the epoch.
        epoch: the best one; 0: the weights are those at the start.
        diverged: it ended early, at NaN or at a loss far above that of the start.
    """

    block: int
    fitted_before: float
    fitted_after: float
    held_before: float
    held_after: float
    epoch: int
    diverged: bool
    seconds: float


@dataclass(frozen=True)
class FinishedBlock:
    """Reports of a block; `edits` has its masks and updated weights where an earlier run finished it."""

    layers: list[LayerReport]
    trained: list[TrainedBlock]
    bad: list[dict[str, Any]]
    edits: Edits = field(default_factory=Edits)


@dataclass(frozen=True)
class PruneReport:
    """Result of a prune, in memory or read from a folder.

    Attributes:
        kind: one of `KINDS`.
        layers: in the order of the model.
        bad_samples: calibration samples left out for NaN or infinite activations.
        masks: bool [rows, n] by layer name, of a model in memory; a folder has them in a file.
        output: where the pruned model is, if it was written.
        fingerprint: what decides the result: options, digests, versions.
        seconds: wall time of this call.
        memory: bytes at the peak, see `peaks`; empty where this call pruned nothing.
        distillation: mean KL(dense ‖ pruned) of the next token, nats, `before` and `after`, on `fitted` and
            `held` windows; the best `epoch` (0: the start), `diverged`. None: there was none.
    """

    layers: Sequence[LayerReport]
    fingerprint: Mapping[str, Any]
    bad_samples: Sequence[dict[str, Any]] = ()
    masks: Mapping[str, Any] = field(default_factory=dict)
    output: Path | None = None
    seconds: float = 0.0
    trained: Sequence[TrainedBlock] = ()
    memory: Mapping[str, int | None] = field(default_factory=dict)
    distillation: Mapping[str, Any] | None = None
    kind: str = PRUNE

    @classmethod
    def of(cls, manifest: Mapping[str, Any], folder: Path, **changes: Any) -> PruneReport:
        """Read the report in a folder's manifest."""
        names = ("fingerprint", "bad_samples", "memory", "distillation", "kind")
        fields = {"output": folder, **{name: manifest[name] for name in names}, **changes}
        trained = read_reports(TrainedBlock, manifest["trained"])
        return cls(read_reports(LayerReport, manifest["layers"]), trained=trained, **fields)

    @property
    def sparsity(self) -> float:
        """Pruned share of all weights in the pruned layers; 0 where whole blocks went."""
        total = sum(layer.rows * layer.n for layer in self.layers)
        return sum(layer.pruned for layer in self.layers) / total if total else 0.0

    @property
    def fallbacks(self) -> list[str]:
        return [layer.name for layer in self.layers if layer.fallback]

    @property
    def solved(self) -> list[LayerReport]:
        """Layers with comparable errors: without those pruned by magnitude."""
        return [layer for layer in self.layers if not layer.fallback]

    def by_kind(self) -> dict[str, list[LayerReport]]:
        return grouped(self.layers, "kind")

    def sentence(self) -> str:
        """Describe what was removed, how kept weights changed, and the calibration."""
        options, text = self.fingerprint["options"], self.fingerprint["calibration"]
        calibrated = (
            f"Calibrated on {text['samples']} windows of {text['length']} tokens of {text['source']}, "
            f"{Beginning(**text['beginning'])}."
        )
        if self.kind == BLOCKS:
            gone = ", ".join(map(str, options["removed"]))
            trained = "" if self.distillation is None else "; the others were trained afterwards"
            count = len(options["removed"])
            return f"removed {count} whole blocks, those of index {gone}{trained}. {calibrated}"
        blocks = len({layer.block for layer in self.layers})
        after = {
            "none": "kept weights are unchanged",
            "least-squares": "kept weights were updated by least squares",
            "blockwise": "kept weights were trained towards the dense model's outputs",
        }[options["update"]]
        if self.distillation is not None:
            after += "; then all of them were trained together towards its predictions"
        if self.kind != PRUNE:  # `kept 3 of 4 heads and 1536 of 2048 channels`
            parts = "kept " + " and ".join(dict.fromkeys(layer.pattern for layer in self.layers))
            if gone := options.get("removed"):
                parts = f"removed whole blocks {', '.join(map(str, gone))}; {parts}"
            return f"{parts} of {blocks} blocks; {after}. {calibrated}"
        start = f" from {options['start']}" if options.get("start") else ""
        total = sum(layer.rows * layer.n for layer in self.layers)
        where = {
            "uniform": "",
            "rows": ", rows of a layer may differ",
            "layers": ", layers may differ",
            "both": ", layers and their rows may differ",
        }[options["allocation"]]
        return (
            f"{options['solver']}{start} pruned {self.sparsity:.1%} of {total:,} weights in "
            f"{len(self.layers)} layers of {blocks} blocks (pattern "
            f"{options['sparsity']}{where}); {after}. {calibrated}"
        )

    def training(self) -> list[str]:
        """Describe the training of the blocks, and of the whole model: a line each, if there was any."""

        def mean(name: str) -> str:
            return f"{sum(getattr(x, name) for x in self.trained) / len(self.trained):.4f}"

        lines = []
        if self.trained:
            stayed = sum(block.epoch == 0 for block in self.trained)
            lines.append(
                f"trained: loss {mean('fitted_before')} → {mean('fitted_after')} on its windows, "
                f"{mean('held_before')} → {mean('held_after')} on held-out windows, mean of "
                f"{len(self.trained)} blocks" + (f"; {stayed} unchanged" if stayed else "")
            )
        return lines + ([] if self.distillation is None else [distilled_words(self.distillation)])

    def records(self) -> list[dict[str, Any]]:
        """Return the fields of every layer."""
        return [{**asdict(layer), "sparsity": layer.sparsity} for layer in self.layers]

    def to_frame(self) -> Any:
        """Return a pandas.DataFrame with a row per layer; OptionError where pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise OptionError("to_frame needs the package pandas: pip install pandas") from None
        return pandas.DataFrame(self.records())

    def table(self, title: str = "") -> Table:
        """Return a table with a line for every kind of layer and for all."""
        whole, updated = self.kind == PRUNE, any(x.error_kept is not None for x in self.layers)
        shown = {
            "kept": not whole,
            "pruned": whole and len({layer.pattern for layer in self.layers}) > 1,
            "Wanda": whole,
            "before update": updated and self.kind != EXPERTS,
            "routing unchanged": self.kind == EXPERTS,
            "error": True,
            "error/Wanda": whole,
            "held-out error": any(layer.relative_held is not None for layer in self.layers),
            "proven": True,
            "gap at most": not whole,
        }
        names = [name for name, has in shown.items() if has]
        note = "errors relative to the energy of the layers' outputs; "
        if whole:
            note += "Wanda: its masks at the same sparsity, with unchanged weights; "
        note += "proven: rows proven optimal or 1-swap optimal"
        table = Table(title, ("layer kind", "layers", *names, "seconds"), note=note, has_total=True)
        for kind, layers in {**self.by_kind(), "all": self.layers}.items():
            # Errors of layers pruned by magnitude are not comparable.
            cells = _errors([layer for layer in layers if not layer.fallback])
            ends = [f"{100 * end(x.sparsity for x in layers):.0f}" for end in (min, max)]
            cells["kept"] = ", ".join(dict.fromkeys(layer.pattern for layer in layers))
            cells["pruned"] = "–".join(dict.fromkeys(ends)) + "%"
            seconds = sum(layer.seconds for layer in layers)
            table.add(kind, str(len(layers)), *(cells[x] for x in names), f"{seconds:.1f}")
        return table

    def summary(self) -> str:
        """Describe the prune, and errors by kind of layer, as text for one screen."""
        parts = [self.sentence()]
        if self.layers:
            table = self.table()
            parts += [*table.lines(), table.note]
        if self.output is not None:
            parts.append(f"written: {self.output}")
        return "\n".join(parts)

    def __repr__(self) -> str:
        return self.summary()


def distilled_words(losses: Mapping[str, Any]) -> str:
    """Describe in a line the training of all kept weights together, given `PruneReport.distillation`."""
    before, after = losses["before"], losses["after"]
    words = (
        f"distilled: KL to the dense model, nats: {before['fitted']:.4f} → {after['fitted']:.4f}; on "
        f"held-out windows {before['held']:.4f} → {after['held']:.4f} (epoch {losses['epoch']})"
    )
    if losses["diverged"]:
        words += "; it diverged and was ended: take a smaller learning_rate"
    return words


def grouped(layers: Sequence[Kind], name: str) -> dict[Any, list[Kind]]:
    """Group layers, or their reports, by the value of a field."""
    groups: dict[Any, list[Kind]] = {}
    for layer in layers:
        groups.setdefault(getattr(layer, name), []).append(layer)
    return groups


def mean_error(layers: Sequence[LayerReport]) -> float | None:
    """Return the mean relative error; None without layers."""
    return fmean(layer.relative for layer in layers) if layers else None


def mean_held_error(layers: Sequence[LayerReport]) -> float | None:
    """Return the mean relative error on held-out windows, of the layers that have one; None without any."""
    held = [x.relative_held for x in layers if x.relative_held is not None]
    return fmean(held) if held else None


def read_reports(kind: type[Kind], records: Any) -> list[Kind]:
    """Read reports of layers or trained blocks in a journal or a manifest."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return [kind(**{key: x for key, x in record.items() if key in names}) for record in records]


def versions() -> dict[str, str]:
    """Return the versions that can change a result."""
    packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"maskopt": __version__, **packages, "python": platform.python_version()}


def write_manifest(path: Path, report: PruneReport, files: Mapping[str, str], **more: Any) -> None:
    """Write the manifest; only `seconds` and `memory` differ between two runs of the same fingerprint.

    `more`: `shrunk`, of a model that was made smaller.
    """
    manifest = {
        "format": MANIFEST_FORMAT,
        "kind": report.kind,
        "fingerprint": dict(report.fingerprint),
        "sparsity": report.sparsity,
        "layers": report.records(),
        "trained": [asdict(block) for block in report.trained],
        "distillation": report.distillation,
        "bad_samples": list(report.bad_samples),
        "files": dict(sorted(files.items())),
        "seconds": sum(layer.seconds for layer in report.layers),
        "memory": dict(report.memory),
        **more,
    }
    manifest["sha256"] = manifest_digest(manifest)
    write_json(path, manifest)


def result_digest(manifest: Mapping[str, Any]) -> str:
    """Return the digest of fingerprint and files, the same for every run that made them."""
    return manifest_digest({name: manifest[name] for name in ("fingerprint", "files")})
