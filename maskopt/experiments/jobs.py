"""Rows as jobs under the configured backend of joblib.

Finished rows are kept on disk, so that an interrupted run continues with the others.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from multiprocessing import current_process
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from filelock import FileLock
from joblib import Parallel, effective_n_jobs
from joblib.parallel import get_active_backend
from torch import Tensor

from maskopt.checks.verification import Require, verify
from maskopt.core.fields import holds_its_kinds
from maskopt.core.files import atomic_write, check_writable, from_json
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.core.threads import end_with
from maskopt.core.units import OriginalValues
from maskopt.errors import DataError, MaskoptError, OptionError, SolverError, printable
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Solver

_log = logging.getLogger("maskopt.experiments.jobs")

#: jobs at a time of a backend that gives no result before all are there
BATCH = 64
#: of a table of records
FORMATS = (".jsonl", ".csv")
#: what a .csv of records begins with
_BEGIN = b"instance,"
#: seconds between two looks at a lock that another run has for some milliseconds
_POLL = 0.005


def workers(jobs: int | None) -> int:
    """Return the jobs at a time of joblib's n_jobs (None: of its `parallel_config`); OptionError for 0."""
    if jobs == 0:
        raise OptionError("`jobs` is at least 1, or −1 for one a core")
    return int(effective_n_jobs(jobs))


def as_they_finish(calls: Sequence[Any], jobs: int | None) -> Iterator[Any]:
    """Yield the results of `joblib.delayed` calls as they end; SolverError if a worker process was killed."""
    workers(jobs)
    asker = os.getpid()
    calls = [(_call, (asker, function, *values), named) for function, values, named in calls]
    backend, _ = get_active_backend()
    try:
        if backend.supports_return_generator:
            yield from Parallel(n_jobs=jobs, return_as="generator_unordered")(calls)
            return
        for first in range(0, len(calls), BATCH):  # Ray returns none before all are finished.
            yield from Parallel(n_jobs=jobs)(calls[first : first + BATCH])
    except BrokenProcessPool:
        raise SolverError(
            "a worker process was killed, in most cases for want of memory; run fewer of them at a time, "
            "such as `jobs` 1"
        ) from None


def _call(asker: int, function: Callable[..., Any], *values: Any, **named: Any) -> Any:
    """Call a function, in a process that ends with the one that asked for it."""
    if current_process().name.startswith("LokyProcess"):
        end_with(asker)
    return function(*values, **named)


def job_key(row: RowProblem, solver: Solver, start: Any, limits: Limits) -> str:
    """Return the digest of a job: row, solver, start (a name, a value or a mask) and limits."""
    if not isinstance(start, Tensor | np.ndarray):
        start = str(start)
    limit_values = [limits.seconds, limits.memory, limits.seed]
    return digest_of(row.as_layer(), 0, solver.name, repr(solver), limit_values, start)


def digest_of(problem: LayerProblem, row: int, *more: Any) -> str:
    """Return the digest of a row's problem, and of `more` values that decide its result."""
    parts = [problem.weight[row].double(), problem.gram.double(), problem.moments]
    parts += [problem.correlation[row], problem.constant[row], *more]
    arrays = [part.cpu().numpy() if isinstance(part, Tensor) else part for part in parts]
    text = str([problem.pattern, problem.name, problem.update, problem.units])
    return str(joblib.hash([text, *arrays]))


class Store:
    """Finished jobs: records in the file `output`, solutions in the folder `<output>.rows`.

    A `.jsonl` gets a line for each finished job and may be shared by several runs; its jobs are resumed from
    their solutions. A `.csv` is written at the end. A job whose solution `verify` refuses runs again.
    Without an output nothing is kept.

    Args:
        kind: dataclass of the records, with `key`, `value`, `value_bound` and `gap`; None: the caller writes
            the output.

    Raises:
        OptionError: as of `check_format`.
    """

    def __init__(self, output: str | os.PathLike[str] | None, kind: type[Any] | None) -> None:
        self.path = None if output is None else Path(output)
        self.kind, self.grows = kind, self.path is not None and self.path.suffix == ".jsonl"
        self.folder: Path | None = None
        if self.path is None:
            return
        if kind is None:
            check_writable(self.path, overwrite=True)
        else:
            check_format(self.path, overwrite=True)
        if self.grows or kind is None:
            self.folder = self.path.with_name(self.path.name + ".rows")

    def records(self) -> dict[str, Any]:
        """Return the records of a `.jsonl` as `read_records`, and remove a last line that was cut off."""
        if self.path is None or self.kind is None or not self.grows or not self.path.exists():
            return {}
        with _alone(self.path):
            records = read_records(self.path, self.kind)
            write_records(self.path, list(records.values()))
        return records

    def solution(
        self, key: str, problem: LayerProblem | RowProblem, require: Require = "checked"
    ) -> Solution | None:
        """Return the solution of a job if it is stored and verified against its problem, else None."""
        path = self.folder and self.folder / f"{key}.npz"
        if path is None or not path.exists():
            return None
        try:
            solution = Solution.load(path)
            verify(problem, solution, require=require)
        except MaskoptError as error:
            _log.warning("%s", printable(f"{path}: dropped and solved again: {error}"))
            return None
        return solution

    def add(self, key: str, solution: Solution | None, *records: Any) -> None:
        """Keep a finished job: its solution, and a line for each record, flushed to disk."""
        if self.folder is not None and solution is not None:
            self.folder.mkdir(exist_ok=True)
            solution.save(self.folder / f"{key}.npz")
        if self.path is None or not self.grows or not records:
            return
        with _alone(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(_json_lines(records))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, records: Sequence[Any]) -> None:
        """Write all records of a run: a table, or what follows the lines of other runs."""
        if self.path is None or self.kind is None:
            return
        if not self.grows:
            write_records(self.path, records)
            return
        keys = {record.key for record in records}
        with _alone(self.path):
            held = read_records(self.path, self.kind)
            others = [record for key, record in held.items() if key not in keys]
            write_records(self.path, [*others, *records])


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lock the records, so that no other run reads or writes them meanwhile."""
    lock = path.with_name(f".{path.name}.lock")
    with FileLock(lock, poll_interval=_POLL):
        try:
            yield
        finally:
            # Elsewhere filelock removes it; who waits for a lock that is gone makes another one.
            if os.name == "posix":
                lock.unlink(missing_ok=True)


def check_format(path: Path | None, *, overwrite: bool) -> None:
    """Raise OptionError for an ending that is no table format, or a file in the way."""
    if path is None:
        return
    if path.suffix not in FORMATS:
        raise OptionError(f"{path.name}: write one of: {', '.join(FORMATS)}")
    if path.suffix == ".jsonl":
        return check_writable(path, overwrite=None)
    if path.is_file() and path.stat().st_size:
        with open(path, "rb") as file:
            if file.read(len(_BEGIN)) != _BEGIN:
                raise OptionError(
                    f"{path}: is there, and no table of this command; name another file"
                )
    return check_writable(path, overwrite=overwrite)


def read_records(path: Path, kind: type[Any]) -> dict[str, Any]:
    """Read records of a JSONL file by key, without a last line that was cut off; DataError: another line."""
    if not path.exists():
        return {}
    names = {field.name for field in fields(kind)}
    records, begin = {}, f'{{"{fields(kind)[0].name}": '
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path}: holds no text; remove the file") from None
    for number, line in enumerate(lines):
        try:
            data = from_json(line)
        except ValueError as error:
            cut = number == len(lines) - 1 and isinstance(error, json.JSONDecodeError)
            if cut and (line.startswith(begin) or begin.startswith(line)):
                continue  # The run ended while it wrote this line.
            raise DataError(
                f"{path}: line {number + 1} is not JSON ({error}); remove the file"
            ) from None
        data = data if isinstance(data, dict) else {}
        values = {k: math.nan if v is None else v for k, v in data.items() if k in names}
        trace = {k: v for k, v in data.items() if k not in names}
        sound = set(values) == names - {"trace"} and isinstance(values["key"], str)
        if not sound or (trace and "trace" not in names):
            raise DataError(
                f"{path}: line {number + 1} is no record of this command; choose another file"
            )
        if trace:
            values["trace"] = trace
        record = kind(**values)
        if not holds_its_kinds(record):
            raise DataError(f"{path}: line {number + 1} has a value of another kind; remove it")
        if math.isnan(record.gap):  # An infinite gap is written as null, too.
            record = replace(record, gap=OriginalValues.of(record.value, record.value_bound).gap)
        records[record.key] = record
    return records


def write_records(path: Path, records: Sequence[Any]) -> None:
    """Write the table as a whole, in the format of the name's ending."""
    text = io.StringIO()
    if path.suffix == ".jsonl":
        text.write(_json_lines(records))
    else:
        rows = [_flat(record) for record in records]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def _json_lines(records: Sequence[Any]) -> str:
    return "".join(json.dumps(_flat(record)) + "\n" for record in records)


def _flat(record: Any) -> dict[str, Any]:
    """Return a record as one flat line: fields of the trace are columns; NaN and infinity are null."""
    data = asdict(record)
    data |= data.pop("trace", {})
    odd = [k for k, v in data.items() if isinstance(v, float) and not math.isfinite(v)]
    return {**data, **dict.fromkeys(odd)}
