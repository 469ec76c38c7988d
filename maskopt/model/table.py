"""The paper's table: models × patterns × methods, every cell a whole prune and its perplexity.

SparseSwaps (arXiv 2512.10922) reports the perplexity of pruned models, and by how much 1-swap lowers each
layer's error below that of the mask it starts from. Every cell is pruned into a folder beside the table,
evaluated, and the folder removed; finished cells are lines of a file, so that an interrupted table goes on
where it was.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from maskopt.errors import DataError, MaskoptError, ModelError, OptionError
from maskopt.files import check_writable
from maskopt.model.job import open_job
from maskopt.model.journal import append_line, read_journal
from maskopt.model.options import OF_A_CELL, PruneOptions
from maskopt.model.perplexity import Perplexity, check_targets, perplexity
from maskopt.model.progress import BlockProgress
from maskopt.model.prune import prune_model
from maskopt.model.report import LayerReport, read_layers, versions
from maskopt.model.tokens import Windows
from maskopt.model.walk_options import EVALUATION, WalkOptions, check_names
from maskopt.model.workspace import MANIFEST, plain_errors, unfinished
from maskopt.pattern import Pattern, Unstructured, parse_pattern

#: of the paper
PATTERNS = ("50%", "60%", "2:4")
SWAPS = (1, 2, 5, 10, 25, 50, 100)
METHODS = (
    "magnitude", "wanda", "ria", "frank_wolfe", *(f"swap:{t}" for t in SWAPS), "swap", "relax",
)  # fmt: skip
#: the row of the model as it is
DENSE = "dense"
_FORMAT = "maskopt-table-1"
_TITLES = {"wanda": "Wanda", "ria": "RIA", "frank_wolfe": "SparseFW", "swap": "1-swap"}
#: what a line of ours begins with: a last line that a crash cut off is told from a foreign file by it
_LINE = b'{"cell": {'

#: called with (cells done, all of them, which one, what is done of it, of how much)
OnCell = Callable[[int, int, str, int, int], None]


@dataclass(frozen=True)
class Method:
    """A solver, its options, and the solver whose mask it starts from and is compared with.

    Written `SOLVER`, `swap:25` for at most 25 swaps a row, `frank_wolfe+alpha=0.25` with an option, and
    `swap:25@ria` for another start than Wanda's.
    """

    solver: str
    options: Mapping[str, Any] = field(default_factory=dict)
    start: str = "wanda"

    @classmethod
    def parse(cls, text: str) -> Method:
        """Out of its spelling; whether there are such solvers and options, `PruneOptions` knows.

        Raises:
            OptionError: not so spelled.
        """
        rest, at, start = text.partition("@")
        named, *given = rest.split("+")
        solver, colon, swaps = named.partition(":")
        options: dict[str, Any] = {}
        if colon:
            if solver != "swap" or not swaps.isascii() or not swaps.isdigit():
                raise OptionError(
                    f"method {text!r}: a number of swaps a row goes with swap, as in swap:25"
                )
            options["max_swaps"] = int(swaps)
        for item in given:
            name, equals, value = item.partition("=")
            if not equals or not name:
                raise OptionError(f"method {text!r}: an option is +NAME=VALUE, not {item!r}")
            try:
                options[name] = json.loads(value)
            except ValueError:
                options[name] = value
        if not solver or (at and not start):
            raise OptionError(f"method {text!r}: write SOLVER, swap:25, or SOLVER@START")
        return cls(solver, options, start or "wanda")

    @property
    def title(self) -> str:
        """`1-swap, T = 25, from RIA`."""
        parts = [_TITLES.get(self.solver, self.solver)]
        if self.solver == "swap":
            parts.append(f"T = {self.options.get('max_swaps', '∞')}")
        parts += [f"{k} = {v}" for k, v in self.options.items() if k != "max_swaps"]
        if self.start != "wanda":
            parts.append(f"from {_TITLES.get(self.start, self.start)}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Cell:
    """One model, pattern and method.

    Attributes:
        key: of what decides the figures: model, options, calibration and text.
        pattern, method: as `50%`, `swap:25`; the dense model is method `dense` with an empty pattern.
        title: the method in words.
        perplexity: on the text.
        layers: errors layer by layer, of the start and at the end; empty for the dense model.
        versions: of the packages that can change a result.
    """

    key: str
    model: str
    pattern: str
    method: str
    title: str
    perplexity: Perplexity
    layers: Sequence[LayerReport]
    versions: Mapping[str, str]
    seconds: float

    def reductions(self, by: Callable[[LayerReport], Hashable]) -> dict[Any, float]:
        """By how much of the start's error the error is below it, averaged over the layers of each kind,
        block or whatever `by` says; layers without a start or with none of its errors are left out."""
        groups: dict[Any, list[float]] = {}
        for layer in self.layers:
            if layer.error_start and not layer.fallback:
                groups.setdefault(by(layer), []).append(1 - layer.error / layer.error_start)
        return {name: sum(parts) / len(parts) for name, parts in groups.items()}


@dataclass(frozen=True)
class _Wanted:
    """A cell that is to be there; `options` is None for the dense model."""

    key: str
    model: str
    pattern: str
    method: str
    title: str
    options: PruneOptions | None
    calibration: Windows
    text: Windows

    def __str__(self) -> str:
        return " ".join((Path(self.model).name, self.pattern, self.method)).replace("  ", " ")


def make_table(
    models: Sequence[str | Path],
    calibration: Any,
    text: Any,
    output: str | Path,
    *,
    patterns: Sequence[str] = PATTERNS,
    methods: Sequence[str] = METHODS,
    windows: int | None = None,
    on_progress: OnCell | None = None,
    **options: Any,
) -> list[Cell]:
    """Fill in the table; what `output` holds of it already is not computed again.

    Args:
        models: folders, or names on the hub.
        calibration: for the masks, see `read_documents`.
        text: for the perplexity, likewise.
        output: a file of JSON lines, one a finished cell.
        patterns: `50%`, `0.5` or `2:4`.
        methods: see `Method`.
        windows: take only the first so many of the text.
        options: of `PruneOptions`, but those that a cell decides; `bos="never"` is the field's
            convention for tables of LLaMA models.

    Returns:
        A dense cell and patterns × methods, for one model after the other.

    Raises:
        MaskoptError: models, texts, patterns, methods or options that will not do, or a file that holds
            something else, before anything is pruned. What ends a cell ends the table; finished cells,
            and finished blocks of the one that was under way, are kept for the same call to go on with.
    """
    path = Path(output)
    check_writable(path, overwrite=None, calibration=calibration, text=text)
    chosen = list(_choices(patterns, methods, options))
    evaluation = {name: value for name, value in options.items() if name in EVALUATION}
    wanted = [
        cell
        for model in dict.fromkeys(map(str, models))
        for cell in _wanted(model, calibration, text, windows, chosen, evaluation)
    ]
    if not wanted:
        raise OptionError("name at least one model")
    finished = read_cells(path)
    tell = on_progress or (lambda *_: None)
    for number, cell in enumerate(wanted):
        told = _teller(tell, number, len(wanted), str(cell))
        folder = _folder(path, cell.key)
        if cell.key not in finished:
            with _named(cell):
                finished[cell.key] = _measured(cell, folder, evaluation, told)
            with plain_errors(path):
                append_line(path, {"cell": _record(finished[cell.key])})
        for left in folder.parent.glob(glob.escape(folder.name.rpartition("-")[0]) + "-*"):
            shutil.rmtree(left)  # of other versions, too
    tell(len(wanted), len(wanted), "", 0, 0)
    return [replace(finished[cell.key], model=cell.model) for cell in wanted]


def read_cells(path: Path) -> dict[str, Cell]:
    """Finished cells by key.

    Raises:
        DataError: a line that is no cell, or was changed.
    """
    if not path.exists():
        return {}
    try:
        tail = path.read_bytes().rpartition(b"\n")[2]
        if not (tail.startswith(_LINE) or _LINE.startswith(tail)):
            raise ModelError(f"{path}: its last line is no cell of a table")
        lines = read_journal(path, damaged="no cell of a table, or it was changed")
        cells = [_cell(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1)]
    except (OSError, ModelError) as error:
        raise DataError(f"{error}; choose another file, or take the line out") from None
    return {cell.key: cell for cell in cells}


def read_pattern(text: str) -> Pattern:
    """`50%`, `0.5` or `2:4`.

    Raises:
        PatternError: none of them.
    """
    if text.endswith("%"):
        sparsity = parse_pattern(text[:-1] + "e-2")
        assert isinstance(sparsity, Unstructured)
        return sparsity
    return parse_pattern(text)


def _choices(
    patterns: Sequence[str], methods: Sequence[str], options: Mapping[str, Any]
) -> Iterator[tuple[str, str, Method, PruneOptions]]:
    """Every pattern with every method, checked."""
    for name in ("sparsity", *OF_A_CELL):
        if name in options:
            raise OptionError(f"`{name}` is what a cell decides; give `patterns` and `methods`")
    check_names(options, (f.name for f in fields(PruneOptions)))
    if not patterns or not methods:
        raise OptionError("name at least one of `patterns` and one of `methods`")
    for pattern in _distinct(patterns, read_pattern):
        for spelled in _distinct(methods, Method.parse):
            method = Method.parse(spelled)
            whole = PruneOptions(
                pattern=read_pattern(pattern),
                solver=method.solver,
                warm_start=None if method.start == method.solver else method.start,
                solver_options=method.options,
                **options,
            )
            yield pattern, spelled, method, whole


def _distinct(spelled: Sequence[str], meant: Callable[[str], object]) -> Iterable[str]:
    """Of several spellings of one thing the first."""
    found: dict[str, str] = {}
    for one in spelled:
        found.setdefault(repr(meant(one)), one)
    return found.values()


def _wanted(
    model: str,
    calibration: Any,
    text: Any,
    windows: int | None,
    chosen: Sequence[tuple[str, str, Method, PruneOptions]],
    evaluation: Mapping[str, Any],
) -> Iterator[_Wanted]:
    """The cells of one model; model and texts are read, and everything that can be refused is."""
    job = open_job(model, calibration, chosen[0][3])
    job.source.blocks.check_unshared(job.layers)
    for _, _, _, options in chosen:
        options.check_layers(job.layers)
    cut = open_job(model, text, WalkOptions(**evaluation), whole=True, limit=windows).windows
    fitted, checkpoint = job.windows, job.source.checkpoint
    if fitted is None or cut is None:
        raise DataError("a table needs `calibration` and `text`")
    assert checkpoint is not None
    check_targets(cut)
    shared = {
        "model": checkpoint.digest,
        "dtype": str(next(job.source.model.parameters()).dtype),
        "text": [cut.digest, cut.beginning.first_target],
    }
    yield _Wanted(_key(shared), model, "", DENSE, "dense", None, fitted, cut)
    for pattern, spelled, method, options in chosen:
        decides = {**shared, "calibration": fitted.digest, "options": options.record()}
        yield _Wanted(_key(decides), model, pattern, spelled, method.title, options, fitted, cut)


def _measured(
    cell: _Wanted,
    folder: Path,
    evaluation: Mapping[str, Any],
    tell: Callable[[str, int, int], None],
) -> Cell:
    """Prune into the folder (or go on there) and evaluate what comes out."""
    layers: Sequence[LayerReport] = ()
    seconds, model = 0.0, Path(cell.model) if cell.options is None else folder
    if cell.options is not None:

        def told(event: BlockProgress) -> None:
            tell(
                f"block {event.block + 1} of {event.blocks}: {event.stage}", event.done, event.total
            )

        there = unfinished(folder) or (folder / MANIFEST).exists()
        report = prune_model(
            cell.model,
            cell.calibration,
            cell.options,
            output=folder,
            resume=there,
            overwrite=not there,
            on_progress=told,
        )
        layers, seconds = report.layers, sum(layer.seconds for layer in report.layers)
    value = perplexity(
        model, cell.text, on_progress=lambda done, of: tell("perplexity", done, of), **evaluation
    )
    return Cell(
        cell.key,
        cell.model,
        cell.pattern,
        cell.method,
        cell.title,
        value,
        layers,
        versions(),
        seconds,
    )


@contextmanager
def _named(cell: _Wanted) -> Iterator[None]:
    """Errors say which cell ended; where a prune goes on with `resume`, a table just goes on."""
    try:
        yield
    except MaskoptError as error:
        line = str(error).replace("go on with `resume`", "run the same command again")
        error.args = (f"{cell}: {line}", *error.args[1:])
        raise


def _folder(path: Path, key: str) -> Path:
    """Where a cell is pruned. Another version of a package could not go on with what is there."""
    return path.absolute().with_name(f".{path.name}.{key[:16]}-{_key(versions())[:8]}")


def _key(decides: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _record(cell: Cell) -> dict[str, Any]:
    return {"format": _FORMAT, **asdict(cell)}


def _cell(line: dict[str, Any], where: str) -> Cell:
    """Inverse of `_record`, of a line whose digest holds."""
    try:
        record = dict(line["cell"])
        if record.pop("format") != _FORMAT:
            raise KeyError
        figures = Perplexity(**record.pop("perplexity"))
        return Cell(
            perplexity=figures, layers=read_layers(record.pop("layers"), Path(where)), **record
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ModelError(f"{where}: no cell of a table that this version reads") from None


def _teller(tell: OnCell, number: int, cells: int, name: str) -> Callable[[str, int, int], None]:
    tell(number, cells, name, 0, 0)
    return lambda stage, done, total: tell(number, cells, f"{name}, {stage}", done, total)
