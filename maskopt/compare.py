"""The same rows through several solvers: objective, lower bound, gap, status, seconds.

A job is one row through one solver. Jobs run under joblib, so `joblib.parallel_config` sends them to
threads, processes, Dask or Ray unchanged. With an `output` file (JSON lines) every finished job is
written at once, and a run that was interrupted skips what the file already holds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed

from maskopt.errors import DataError, MaskoptError, OptionError, ProblemError
from maskopt.files import atomic_write
from maskopt.pattern import Pattern
from maskopt.problem import LayerProblem, RowProblem
from maskopt.solution import Status
from maskopt.solver import check_options, get_solver, solve

FORMATS = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Record:
    """What one solver said about one row.

    `gap` is (objective − lower_bound)/objective by the solver's own bound; `excess` is
    objective/optimum − 1 where some solver of the comparison proved the optimum, else NaN.
    """

    instance: str
    n: int
    pattern: str
    solver: str
    objective: float
    lower_bound: float
    gap: float
    excess: float
    status: str
    nodes: int
    seconds: float
    seed: int
    key: str
    error: str = ""


def sample_rows(
    layers: Iterable[LayerProblem],
    rows: int,
    *,
    columns: int | None = None,
    pattern: Pattern | None = None,
    seed: int = 0,
) -> list[RowProblem]:
    """`rows` rows of every layer, each restricted to `columns` random inputs of its own.

    The draw depends on the seed and on the layer's position alone. Restricted rows keep the layer's
    pattern (of N:M only whole groups make sense: `columns` must be divisible by M).
    """
    if rows < 1:
        raise OptionError(f"rows must be at least 1, not {rows}")
    sampled = []
    for position, layer in enumerate(layers):
        rng = np.random.default_rng([seed, position])
        chosen = np.sort(rng.choice(layer.rows, size=min(rows, layer.rows), replace=False))
        for index in chosen:
            row = layer.row(int(index))
            if columns is not None and columns < layer.n:
                inputs = np.sort(rng.choice(layer.n, size=columns, replace=False))
                row = row.restrict(inputs, pattern)
            elif pattern is not None:
                row = row.restrict(np.arange(layer.n), pattern)
            sampled.append(row)
    return sampled


def compare(
    rows: Sequence[RowProblem],
    solvers: Sequence[str] | Mapping[str, Mapping[str, Any]],
    *,
    time_limit: float | None = None,
    seed: int = 0,
    jobs: int = 1,
    output: str | os.PathLike[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """Every row through every solver.

    Args:
        rows: the instances, `sample_rows` makes them.
        solvers: names, or name → options.
        time_limit, seed: handed to the solvers that have such an option.
        jobs: joblib's n_jobs.
        output: `.jsonl` grows as jobs finish and makes the run resumable (jobs are known by their
            data, solver and options); `.csv` and `.parquet` are written at the end.
        on_progress: called with (finished jobs, jobs).

    Returns:
        Records in the order rows × solvers. A job that failed has status `failed` and its error.
    """
    table = solvers if isinstance(solvers, Mapping) else {name: {} for name in solvers}
    options = {name: _options(name, given, time_limit, seed) for name, given in table.items()}
    path = Path(output) if output is not None else None
    if path is not None:
        check_format(path)
    jobs_wanted = [(_key(row, name, options[name]), row, name) for row in rows for name in options]
    finished = read_records(path) if path is not None and path.suffix == ".jsonl" else {}
    finished = {key: r for key, r in finished.items() if r.status != "failed"}
    missing = {key: (row, name) for key, row, name in jobs_wanted if key not in finished}
    results = Parallel(n_jobs=jobs, return_as="generator_unordered")(
        delayed(_job)(row, name, options[name], seed, key) for key, (row, name) in missing.items()
    )
    total = len({key for key, _, _ in jobs_wanted})
    for record in results:
        finished[record.key] = record
        if path is not None and path.suffix == ".jsonl":
            append_record(path, record)
        if on_progress is not None:
            on_progress(len(finished), total)
    records = _with_excess([(key, finished[key]) for key, _, _ in jobs_wanted], len(options))
    if path is not None:
        write_records(path, records)
    return records


def _options(
    name: str, given: Mapping[str, Any], time_limit: float | None, seed: int
) -> dict[str, Any]:
    options = dict(given)
    check_options(name, {k: v for k, v in options.items() if k != "warm_start"})
    if time_limit is not None:
        options.setdefault("time_limit", time_limit)
    options.setdefault("seed", seed)
    for shared in ("time_limit", "seed"):
        if shared not in given and not _has_option(name, shared):
            options.pop(shared, None)
    return options


def _has_option(name: str, option: str) -> bool:
    try:
        check_options(name, {option: None})
    except OptionError:
        return False
    return get_solver(name).unavailable() is None


def _key(row: RowProblem, solver: str, options: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    digest.update(row.weight.double().cpu().numpy().tobytes())
    digest.update(row.gram.double().cpu().numpy().tobytes())
    text = json.dumps([str(row.pattern), row.name, solver, sorted(options.items())], default=str)
    digest.update(text.encode())
    return digest.hexdigest()[:20]


def _job(row: RowProblem, name: str, options: dict[str, Any], seed: int, key: str) -> Record:
    base: dict[str, Any] = {
        "instance": row.name,
        "n": row.n,
        "pattern": str(row.pattern),
        "solver": name,
        "excess": math.nan,
        "seed": seed,
        "key": key,
    }
    try:
        solution = solve(row, name, **options)
    except MaskoptError as error:
        nothing: dict[str, Any] = dict.fromkeys(
            ("objective", "lower_bound", "gap", "seconds"), math.nan
        )
        return Record(**base, **nothing, status="failed", nodes=0, error=str(error))
    nodes = solution.trace.get("nodes", 0)
    return Record(
        **base,
        objective=float(solution.objective[0]),
        lower_bound=float(solution.lower_bound[0]),
        gap=float(solution.gap[0]),
        status=str(solution.status[0]),
        nodes=int(nodes[0]) if isinstance(nodes, list) else 0,
        seconds=solution.seconds,
    )


def _with_excess(found: list[tuple[str, Record]], solvers: int) -> list[Record]:
    records = []
    for first in range(0, len(found), solvers):
        group = [record for _, record in found[first : first + solvers]]
        proven = [r.objective for r in group if r.status == Status.OPTIMAL]
        for record in group:
            excess = math.nan
            if proven:
                best = min(proven)
                excess = record.objective / best - 1 if best > 0 else record.objective - best
            records.append(Record(**{**asdict(record), "excess": excess}))
    return records


def check_format(path: Path) -> None:
    """Raise OptionError where the ending is no table format, or its package is missing."""
    if path.suffix not in FORMATS:
        raise OptionError(f"{path.name}: write one of {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"{path.parent}: no such folder")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise OptionError(
                "Parquet needs the package pyarrow: pip install 'maskopt[parquet]', or name a .csv or .jsonl"
            ) from None


def append_record(path: Path, record: Any) -> None:
    """One line at the end of a JSONL file, flushed to disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(_jsonable(asdict(record))) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path, kind: type[Any] = Record) -> dict[str, Any]:
    """Finished jobs of a JSONL file by key; a last line that was cut off is left out."""
    if not path.exists():
        return {}
    names = {field.name for field in fields(kind)}
    found = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            data = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines) - 1:
                continue
            raise DataError(f"{path}: line {number + 1} is not JSON; remove the file") from None
        if not isinstance(data, dict) or set(data) != names:
            raise DataError(
                f"{path}: line {number + 1} is no record of this command; choose another file"
            )
        found[data["key"]] = kind(**{k: math.nan if v is None else v for k, v in data.items()})
    return found


def write_records(path: Path, records: Sequence[Any]) -> None:
    """The table as a whole, in the format that the ending of the name says."""
    rows = [_jsonable(asdict(record)) for record in records]
    with atomic_write(path) as file:
        if path.suffix == ".jsonl":
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        elif path.suffix == ".csv":
            import csv
            import io

            text = io.StringIO()
            writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)
            file.write(text.getvalue().encode())
        else:
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def load_instances(paths: Iterable[str | os.PathLike[str]]) -> list[LayerProblem]:
    """`.npz` files, layers or rows, as layers."""
    layers = []
    for path in paths:
        try:
            layers.append(LayerProblem.load(path))
        except ProblemError as error:
            if "holds a row problem" not in str(error):
                raise
            layers.append(RowProblem.load(path).as_layer())
    return layers


def _jsonable(data: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in data.items()}
