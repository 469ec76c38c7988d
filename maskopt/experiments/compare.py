"""Comparison of several solvers on the same rows; a job is one row through one solver (`jobs`)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from joblib import delayed

from maskopt.checks.verification import Require
from maskopt.core.limits import Limits
from maskopt.core.pattern import Pattern
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.core.table import Table, cell, value_text
from maskopt.errors import MaskoptError, OptionError
from maskopt.experiments.jobs import Store, as_they_finish, job_key
from maskopt.protocol.solution import Solution, Status, is_bounded
from maskopt.protocol.solver import Solver, limits_of, make_solver, solve


@dataclass(frozen=True)
class Record:
    """The result of one solver for one row, or the error of a solver that failed.

    Attributes:
        value, value_bound: objective and lower bound in original units (`RowProblem.to_original_units`).
        gap: from the value to the solver's own bound, relative to the value.
        excess: over the optimum, relative (absolute where that is 0), where a solver proved it; else NaN.
        trusted: the exact solver whose bound nothing proves.
        trace: the columns of `maskopt.protocol.trace`; a file has them as columns of its own.
    """

    instance: str
    n: int
    pattern: str
    solver: str
    objective: float = math.nan
    lower_bound: float = math.nan
    value: float = math.nan
    value_bound: float = math.nan
    gap: float = math.nan
    excess: float = math.nan
    status: str = "failed"
    trusted: str = ""
    seconds: float = math.nan
    seed: int = 0
    key: str = ""
    error: str = ""
    trace: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bounded(self) -> bool:
        """True where the bound is informative."""
        return is_bounded(self.objective, self.lower_bound, self.status)


def sample_rows(
    layers: Iterable[LayerProblem],
    rows: int,
    *,
    columns: int | None = None,
    pattern: Pattern | None = None,
    seed: int = 0,
) -> list[RowProblem]:
    """Draw `rows` rows of every layer, each restricted to `columns` random inputs of its own.

    Patterns N:M need `columns` divisible by M. The draw depends on the seed and on the layer's position
    alone.
    """
    check_row_count(rows)
    sampled = []
    for position, layer in enumerate(layers):
        for index, inputs in draw_rows(layer, rows, columns, seed=[seed, position]):
            row = layer.row(index)
            if inputs is not None or pattern is not None:
                row = row.restrict(np.arange(layer.n) if inputs is None else inputs, pattern)
            sampled.append(row)
    return sampled


def check_row_count(rows: int | None) -> None:
    """Raise OptionError for a number of rows to draw (None: all) that is below 1."""
    if rows is not None and rows < 1:
        raise OptionError(f"rows must be at least 1, not {rows}")


def draw_rows(
    layer: LayerProblem, rows: int | None, columns: int | None, *, seed: Sequence[int]
) -> list[tuple[int, np.ndarray | None]]:
    """Draw rows of a layer (None: all) with `columns` random inputs each (None: all), both ascending."""
    rng = np.random.default_rng(seed)

    def drawn(size: int, of: int) -> np.ndarray:
        return np.sort(rng.choice(of, size=size, replace=False))

    chosen = drawn(layer.rows if rows is None else min(rows, layer.rows), layer.rows).tolist()
    if columns is None or columns >= layer.n:
        return [(row, None) for row in chosen]
    return [(row, drawn(columns, layer.n)) for row in chosen]


def compare(
    rows: Sequence[RowProblem],
    solvers: Sequence[str | Solver] | Mapping[str, Mapping[str, Any]],
    *,
    time_limit: float | None = None,
    seed: int = 0,
    jobs: int | None = None,
    output: str | os.PathLike[str] | None = None,
    on_progress: Callable[[int, int], None] = lambda finished, jobs: None,
) -> list[Record]:
    """Solve every row with every solver.

    Args:
        rows: instances, for example of `sample_rows`.
        solvers: names or values such as `Swap()`, none of them twice, or name → options (`start`,
            `time_limit`, `seed`, … among them, which override those for all).
        time_limit: seconds per row, its start included.
        jobs: joblib's n_jobs: rows at a time. None: as a `joblib.parallel_config` around the call says, which
            may name a cluster's backend (Dask, Ray); else one.
        output: a `.jsonl` makes the run resumable; a `.csv` is written at the end.
        on_progress: called with (finished jobs, jobs).

    Returns:
        Records in the order rows × solvers. A job that failed has status `failed` and its error.

    Raises:
        OptionError, SolverError: solvers, options or an `output` that will not do, before anything runs.
            DataError: an `output` that holds something else.
    """
    chosen = _jobs_of(solvers, {"time_limit": time_limit, "seed": seed})
    if not chosen:
        raise OptionError("name at least one solver")
    store = Store(output, Record)
    wanted = [
        (job_key(row, job.solver, job.start, job.limits), row, job)
        for row in rows
        for job in chosen
    ]
    finished: dict[str, Record] = {}
    missing, held = {}, store.records()
    for key, row, job in wanted:
        # Only exact solvers have bounds that nothing proves.
        required: Require = "claims" if job.solver.capabilities.trusted else "checked"
        stored = store.solution(key, row, required) if key in held else None
        if stored is not None:
            finished[key] = _record(row, job, key, stored)
        else:
            missing[key] = delayed(_solve_job)(row, job, key)
    count = len(finished) + len(missing)
    for record, solution in as_they_finish(list(missing.values()), jobs):
        finished[record.key] = record
        store.add(record.key, solution, record)
        on_progress(len(finished), count)
    records = _with_excess([finished[key] for key, *_ in wanted], len(chosen))
    store.finish(records)
    return records


def comparison_table(records: Sequence[Record], labels: Mapping[str, str] | None = None) -> Table:
    """Return a table with a line per row and solver, in the original units of the rows.

    `labels` are names of the rows by instance, in place of instance, n and pattern.
    """
    headings = ("instance, n", "solver", "status", "objective", "bound", "gap", "excess", "seconds")
    table = Table("", headings, text_columns=3)
    last = ""
    for r in records:
        label = f"{r.instance}, {r.n}, {r.pattern}" if labels is None else labels[r.instance]
        cells = (*bound_cells(r), cell(r.excess, ".2%"), cell(r.seconds, ".2f"))
        first = "" if label == last else label
        table.add(first, r.solver, r.status, value_text(r.value, 6), *cells)
        last = label
    return table


def bound_cells(record: Any) -> tuple[str, str]:
    """Return bound and gap of a record of rows, in the original units of the row."""
    if not record.bounded or math.isnan(record.gap):
        return "–", "–"
    return value_text(record.value_bound, 6), f"{record.gap:.2%}"


@dataclass(frozen=True)
class _Job:
    """A solver with its start and its limits."""

    solver: Solver
    start: Any
    limits: Limits


def _jobs_of(
    solvers: Sequence[str | Solver] | Mapping[str, Mapping[str, Any]], shared: dict[str, Any]
) -> list[_Job]:
    """Make every solver, and check its options before anything runs."""
    named = solvers.items() if isinstance(solvers, Mapping) else ((x, {}) for x in solvers)
    chosen: dict[str, _Job] = {}
    for solver_or_name, options in named:
        limits, solver_options = limits_of(None, {**shared, **options})
        start = solver_options.pop("start", None)
        solver = make_solver(solver_or_name, **solver_options)
        if solver.name in chosen:  # Records know their solver by its name alone.
            raise OptionError(
                f"solver {solver.name!r} is given twice; run compare once for each of its settings"
            )
        chosen[solver.name] = _Job(solver, start, limits)
    return list(chosen.values())


def _solve_job(row: RowProblem, job: _Job, key: str) -> tuple[Record, Solution | None]:
    try:
        solution = solve(row, job.solver, start=job.start, limits=job.limits).raise_if_interrupted()
    except MaskoptError as error:
        return _record(row, job, key, error), None
    return _record(row, job, key, solution), solution


def _record(row: RowProblem, job: _Job, key: str, answer: Solution | MaskoptError) -> Record:
    """Make the record of a solution, or of the error in place of one."""
    failed = Record(
        row.name, row.n, str(row.pattern), job.solver.name, seed=job.limits.seed, key=key
    )
    if isinstance(answer, MaskoptError):
        return replace(failed, error=str(answer))
    columns = {name: values[0] for name, values in answer.columns().items()}
    known = {field.name for field in fields(Record)}
    return replace(
        failed,
        **{name: value for name, value in columns.items() if name in known},
        value=answer.value,
        value_bound=answer.bound,
        seconds=answer.seconds,
        trace={name: value for name, value in columns.items() if name not in known},
    )


def _with_excess(records: list[Record], solvers: int) -> list[Record]:
    """Set the excess in the records of every row that a solver proved."""
    complete = []
    for first in range(0, len(records), solvers):
        of_row = records[first : first + solvers]
        proven = [record for record in of_row if record.status == Status.OPTIMAL]
        if proven:
            best = min(proven, key=lambda record: record.objective).value
            scale = abs(best) or 1.0
            of_row = [replace(r, excess=abs(r.value - best) / scale) for r in of_row]
        complete += of_row
    return complete
