"""The same rows through several solvers: objective, lower bound, gap, status, seconds.

A job is one row through one solver. Jobs run under joblib, so `joblib.parallel_config` sends them to
threads, processes, Dask or Ray unchanged. With an `output` file (JSON lines) every finished job is
written at once, and a run that was interrupted skips what the file already holds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from joblib import delayed

from maskopt.errors import DataError, MaskoptError, OptionError
from maskopt.fields import holds_its_kinds
from maskopt.files import atomic_write, check_writable
from maskopt.formats import load_problem
from maskopt.jobs import as_they_finish, job_key
from maskopt.limits import KEYWORDS, Limits
from maskopt.pattern import Pattern
from maskopt.problem import LayerProblem, RowProblem
from maskopt.solution import Status, is_bounded
from maskopt.solver import Solver, make_solver, solve
from maskopt.units import Posed, excess_of

FORMATS = (".jsonl", ".csv", ".parquet")
#: what tables of records begin with
_BEGIN = {".csv": b"instance,", ".parquet": b"PAR1"}


@dataclass(frozen=True)
class Record:
    """What one solver said about one row.

    `objective` and `lower_bound` are costs, as the problem has them; `value` and `value_bound` are the same
    in the units of whoever posed it (`RowProblem.posed`), of which `gap` and `excess` are parts. `gap` is by
    the solver's own bound; `excess` is how much worse than the optimum where some solver of the comparison
    proved it, else NaN;
    `vouched` is the backend on whose word the bound is taken, empty where it can be checked;
    `trace` is what else the solver has to tell (`maskopt.trace`), columns of their own in a file.
    """

    instance: str
    n: int
    pattern: str
    solver: str
    objective: float
    lower_bound: float
    value: float
    value_bound: float
    gap: float
    excess: float
    status: str
    vouched: str
    seconds: float
    seed: int
    key: str
    error: str = ""
    trace: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bounded(self) -> bool:
        """Does the bound say anything?"""
        return is_bounded(self.objective, self.lower_bound, self.status)


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
    check_rows(rows)
    sampled = []
    for position, layer in enumerate(layers):
        for index, inputs in draw_rows(layer, rows, columns, seed=[seed, position]):
            row = layer.row(index)
            if inputs is not None or pattern is not None:
                row = row.restrict(np.arange(layer.n) if inputs is None else inputs, pattern)
            sampled.append(row)
    return sampled


def check_rows(rows: int | None) -> None:
    """Raise OptionError for a number of rows to draw (None: all) that is below 1."""
    if rows is not None and rows < 1:
        raise OptionError(f"rows must be at least 1, not {rows}")


def draw_rows(
    layer: LayerProblem, rows: int | None, columns: int | None, *, seed: Sequence[int]
) -> list[tuple[int, np.ndarray | None]]:
    """Which rows of a layer, ascending, and which inputs of each.

    Args:
        rows: how many, as `check_rows` allows them; all where the layer has no more.
        columns: how many inputs, drawn per row; None, or no fewer than the layer has: all.

    Returns:
        (row, inputs), the inputs [columns] ascending, None where they are all.
    """
    rng = np.random.default_rng(seed)
    count = layer.rows if rows is None else min(rows, layer.rows)
    chosen = np.sort(rng.choice(layer.rows, size=count, replace=False))
    if columns is None or columns >= layer.n:
        return [(int(row), None) for row in chosen]
    return [(int(row), np.sort(rng.choice(layer.n, size=columns, replace=False))) for row in chosen]


def compare(
    rows: Sequence[RowProblem],
    solvers: Sequence[str | Solver] | Mapping[str, Mapping[str, Any]],
    *,
    time_limit: float | None = None,
    seed: int = 0,
    jobs: int | None = None,
    output: str | os.PathLike[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """Every row through every solver.

    Args:
        rows: the instances, `sample_rows` makes them.
        solvers: names or values such as `Swap()`, none of them twice, or name → options (`start`,
            `time_limit`, `seed`, … among them, which go before those for all).
        time_limit: seconds a row, its start included.
        seed: of everything random.
        jobs: joblib's n_jobs, as many rows at a time; None: what a `joblib.parallel_config` around the call
            says, which may name a cluster's backend (Dask, Ray), else one.
        output: `.jsonl` grows as jobs finish and makes the run resumable (jobs are known by their
            data, solver and options; what else the file holds stays in it); `.csv` and `.parquet` are
            written at the end.
        on_progress: called with (finished jobs, jobs).

    Returns:
        Records in the order rows × solvers. A job that failed has status `failed` and its error.

    Raises:
        OptionError, SolverError: solvers, options or an `output` that will not do, before anything
            runs. DataError: an `output` that holds something else.
    """
    jobs_by_name = _jobs_by_name(solvers, Limits(seconds=time_limit, seed=seed))
    if not jobs_by_name:
        raise OptionError("name at least one solver")
    path = Path(output) if output is not None else None
    if path is not None:
        check_format(path)
    jobs_wanted = [
        (job_key(row, name, job.solver, job.start, job.limits), row, name)
        for row in rows
        for name, job in jobs_by_name.items()
    ]
    wanted = {key: (row, name) for key, row, name in jobs_wanted}
    resumable = path is not None and path.suffix == ".jsonl"
    held = resume_records(path) if resumable and path is not None else {}
    finished = {key: r for key, r in held.items() if key in wanted and r.status != "failed"}
    missing = {key: job for key, job in wanted.items() if key not in finished}
    calls = [
        delayed(_solved)(row, name, jobs_by_name[name], key) for key, (row, name) in missing.items()
    ]
    for record in as_they_finish(calls, jobs):
        finished[record.key] = record
        if resumable and path is not None:
            append_record(path, record)
        if on_progress is not None:
            on_progress(len(finished), len(wanted))
    records = _with_excess([finished[key] for key, _, _ in jobs_wanted], len(jobs_by_name))
    if path is not None:
        held = read_records(path) if resumable else {}  # others may have written meanwhile
        write_records(path, [*without(held, wanted), *records])
    return records


@dataclass(frozen=True)
class _Job:
    """A solver with its start and its limits."""

    solver: Solver
    start: Any
    limits: Limits


def _jobs_by_name(
    solvers: Sequence[str | Solver] | Mapping[str, Mapping[str, Any]], limits: Limits
) -> dict[str, _Job]:
    """Every solver made, its options checked, before anything runs."""
    if not isinstance(solvers, Mapping):
        made = [make_solver(solver) for solver in solvers]
        names = [solver.name for solver in made]
        for name in names:
            if names.count(name) > 1:
                # records know their solver by its name alone
                raise OptionError(
                    f"solver {name!r} is given twice; run compare once for each of its settings"
                )
        return {solver.name: _Job(solver, None, limits) for solver in made}
    jobs = {}
    for name, options in solvers.items():
        given = dict(options)
        start = given.pop("start", given.pop("warm_start", None))
        shared = {KEYWORDS[k]: v for k, v in given.items() if k in KEYWORDS}
        own = {k: v for k, v in given.items() if k not in KEYWORDS}
        jobs[name] = _Job(make_solver(name, **own), start, replace(limits, **shared))
    return jobs


def _solved(row: RowProblem, name: str, job: _Job, key: str) -> Record:
    base: dict[str, Any] = {
        "instance": row.name,
        "n": row.n,
        "pattern": str(row.pattern),
        "solver": name,
        "excess": math.nan,
        "seed": job.limits.seed,
        "key": key,
    }
    try:
        solution = solve(row, job.solver, start=job.start, limits=job.limits).uninterrupted()
    except MaskoptError as error:
        nothing: dict[str, Any] = dict.fromkeys(
            ("objective", "lower_bound", "value", "value_bound", "gap", "seconds"), math.nan
        )
        return Record(**base, **nothing, status="failed", vouched="", error=str(error))
    columns = {name: values[0] for name, values in solution.columns().items()}
    posed = row.posed(columns["objective"], columns["lower_bound"])
    columns |= {"value": posed.value, "value_bound": posed.bound, "gap": posed.gap}
    known = {f.name for f in fields(Record)}
    return Record(
        **base,
        **{name: value for name, value in columns.items() if name in known},
        seconds=solution.seconds,
        trace={name: value for name, value in columns.items() if name not in known},
    )


def _with_excess(found: list[Record], solvers: int) -> list[Record]:
    records = []
    for first in range(0, len(found), solvers):
        group = found[first : first + solvers]
        proven = [r for r in group if r.status == Status.OPTIMAL]
        best = min(proven, key=lambda r: r.objective) if proven else None
        for record in group:
            known = best is not None and record.value == record.value
            excess = excess_of(record.value, best.value) if known and best else math.nan
            records.append(replace(record, excess=excess))
    return records


def check_format(path: Path) -> None:
    """Raise OptionError where the ending is no table format, or its package is missing, or somebody else's
    file would be replaced. (A JSONL file grows, and is read first.)"""
    if path.suffix not in FORMATS:
        raise OptionError(f"{path.name}: write one of {', '.join(FORMATS)}")
    check_writable(path)
    begin = _BEGIN.get(path.suffix, b"")
    if path.is_file() and path.stat().st_size:
        with open(path, "rb") as file:
            if file.read(len(begin)) != begin:
                raise OptionError(
                    f"{path}: is there, and no table of this command; name another file"
                )
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
        file.write(json.dumps(_flat(record)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path, kind: type[Any] = Record) -> dict[str, Any]:
    """Finished jobs of a JSONL file by key; a last line that was cut off is left out.

    Raises:
        DataError: another line that is no JSON, or no record of this kind.
    """
    if not path.exists():
        return {}
    names = {field.name for field in fields(kind)}
    found, begin = {}, f'{{"{fields(kind)[0].name}": '
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path}: holds no text; remove the file") from None
    for number, line in enumerate(lines):
        try:
            data = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines) - 1 and (line.startswith(begin) or begin.startswith(line)):
                continue  # cut off while it was written
            raise DataError(f"{path}: line {number + 1} is not JSON; remove the file") from None
        own = {k: v for k, v in data.items() if k in names} if isinstance(data, dict) else {}
        extra = set(data) - names if isinstance(data, dict) else set()
        sound = set(own) == names - {"trace"} and isinstance(own["key"], str)
        if not sound or (extra and "trace" not in names):
            raise DataError(
                f"{path}: line {number + 1} is no record of this command; choose another file"
            )
        if extra:
            own["trace"] = {name: data[name] for name in data if name in extra}
        record = kind(**{k: math.nan if v is None else v for k, v in own.items()})
        if not holds_its_kinds(record):
            raise DataError(f"{path}: line {number + 1} has a value of another kind; remove it")
        if math.isnan(record.gap):  # infinite ones were written so, too
            record = replace(record, gap=Posed.of(record.value, record.value_bound).gap)
        found[record.key] = record
    return found


def resume_records(path: Path, kind: type[Any] = Record) -> dict[str, Any]:
    """What `read_records` finds, or raises, of a file that is to grow.

    The file then ends with a whole line: `append_record` would write onto one that was cut off.
    """
    found = read_records(path, kind)
    if path.exists():
        write_records(path, list(found.values()))
    return found


def without(held: Mapping[str, Any], keys: Container[str]) -> list[Any]:
    """The records of other runs that a file held beside those of `keys`."""
    return [record for key, record in held.items() if key not in keys]


def write_records(path: Path, records: Sequence[Any]) -> None:
    """The table as a whole, in the format that the ending of the name says."""
    rows = [_flat(record) for record in records]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(path) as file:
        if path.suffix == ".jsonl":
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        elif path.suffix == ".csv":
            import csv
            import io

            text = io.StringIO()
            writer = csv.DictWriter(text, fieldnames=columns)
            writer.writeheader()
            writer.writerows(rows)
            file.write(text.getvalue().encode())
        else:
            import pyarrow
            import pyarrow.parquet

            whole = [{name: row.get(name) for name in columns} for row in rows]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(whole), file)


def load_instances(
    paths: Iterable[str | os.PathLike[str]], select: int | None = None
) -> list[LayerProblem]:
    """Files of `maskopt.formats`, layers or rows, as layers."""
    found = [load_problem(path, select) for path in paths]
    return [p.as_layer() if isinstance(p, RowProblem) else p for p in found]


def _flat(record: Any) -> dict[str, Any]:
    """A record as one flat line: what its trace holds are columns; NaN and infinity are null."""
    data = asdict(record)
    data |= data.pop("trace", {})
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()
    }
