"""Optima with their proofs, each row a job of its own: on this machine, or on as many as joblib reaches.

Every row that is done is kept beside the output until all are, so an interrupted proof goes on where it was,
and a worker that is lost costs its rows alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from joblib import delayed

from maskopt.certificate import Certificate
from maskopt.errors import OptionError, ProblemError
from maskopt.files import check_writable
from maskopt.jobs import as_they_finish, job_key, workers
from maskopt.limits import Limits
from maskopt.problem import LayerProblem, RowProblem
from maskopt.solution import Solution, Status
from maskopt.solver import Solver, make_solver, solve

#: the solver that keeps its trees
BRANCH = "branch"


def prove(
    problem: LayerProblem | RowProblem,
    output: str | os.PathLike[str] | None = None,
    *,
    start: Any = None,
    limits: Limits | None = None,
    jobs: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Solution:
    """Prove the optimum of every row by branch and bound, with the tree that proves it.

        with joblib.parallel_config(backend="dask", n_jobs=-1):
            prove(LayerProblem.load("layer.npz"), "proof.npz")

    Args:
        output: file for masks and trees, .npz, as `maskopt check` takes it; finished rows lie in the folder
            of that name with `.rows` at its end until all are there.
        start: as for `solve`: a solver, a mask [rows, n], or None.
        limits: the seconds are of all rows, each of which has its share of them. Its listener hears of a row
            alone.
        jobs: as for `maskopt.compare.compare`.
        on_progress: called with (rows that are done, rows).
        options: of the solver `branch`.

    Returns:
        The solution of all rows; of one that was not closed in time, with the bound that its tree proves.

    Raises:
        MaskoptError: options or a start that will not do, before anything runs.
    """
    backend = make_solver(BRANCH, **{**options, "proof": True})
    layer = problem.as_layer() if isinstance(problem, RowProblem) else problem
    if layer.pooled or layer.refit is not None:
        raise OptionError("only rows that prune alike and keep their weights have proofs")
    if isinstance(start, str | Solver):
        make_solver(start)
    elif start is not None:
        start = layer.check_mask(start, "start")
    limits, jobs = limits or Limits(), 1 if layer.rows == 1 else jobs
    rows = [layer.row(index) for index in range(layer.rows)]
    starts = [_start_of(start, index) for index in range(layer.rows)]
    kept = None if output is None else _Kept(Path(output))
    # what is proven stays so, however long it may take and however many workers share the time
    untimed = replace(limits, seconds=None)
    keys = [job_key(r, BRANCH, backend, s, untimed) for r, s in zip(rows, starts, strict=True)]
    limits = _of_a_row(limits, layer.rows, jobs)
    found = {} if kept is None else kept.read(keys)
    wanted = {k: (r, s) for k, r, s in zip(keys, rows, starts, strict=True) if k not in found}
    calls = [
        delayed(_proven)(key, row, backend, begin, limits) for key, (row, begin) in wanted.items()
    ]
    for key, solution in as_they_finish(calls, jobs):
        found[key] = solution
        if kept is not None and solution.status[0] is Status.OPTIMAL:
            kept.write(key, solution)
        if on_progress is not None:
            on_progress(len(found), len(set(keys)))
    certificate = _certificate(layer, [found[key] for key in keys])
    joined = Solution.joined([found[key] for key in keys], certificate)
    if kept is not None:
        kept.finish(joined)
    return joined


def _of_a_row(limits: Limits, rows: int, jobs: int | None) -> Limits:
    """Its share of the time of all rows; and no listener, which cannot be sent to another process, but of a
    single row."""
    limits = limits.quiet() if rows > 1 else limits
    if limits.seconds is None:
        return limits
    return replace(limits, seconds=limits.seconds * min(1.0, workers(jobs) / rows))


def _certificate(layer: LayerProblem, rows: Sequence[Solution]) -> Certificate | None:
    """Of all rows: of one that has none, that f ≥ 0."""
    if all(row.certificate is None for row in rows):
        return None
    nothing = Certificate.box(layer, torch.zeros_like(layer.weight, dtype=torch.float64))
    own = [row.certificate for row in rows]
    return Certificate.stack(
        one if isinstance(one, Certificate) else nothing.take([at]) for at, one in enumerate(own)
    )


def _start_of(start: Any, row: int) -> Any:
    """Of a mask, its row; of all else, itself."""
    return start if start is None or isinstance(start, str | Solver) else start[row : row + 1]


def _proven(
    key: str, row: RowProblem, backend: Solver, start: Any, limits: Limits
) -> tuple[str, Solution]:
    return key, solve(row, backend, start=start, limits=limits).uninterrupted()


class _Kept:
    """Rows that are done, each a file of its own, beside the file that all of them are for."""

    def __init__(self, output: Path) -> None:
        check_writable(output, overwrite=True)
        self.output = output
        self.folder = output.with_name(output.name + ".rows")

    def read(self, keys: list[str]) -> dict[str, Solution]:
        """Those of the keys that are there; a file that was cut off is left out."""
        found = {}
        for key in keys:
            try:
                found[key] = Solution.load(self.folder / f"{key}.npz")
            except ProblemError:
                continue
        return found

    def write(self, key: str, solution: Solution) -> None:
        self.folder.mkdir(exist_ok=True)
        solution.save(self.folder / f"{key}.npz")

    def finish(self, solution: Solution) -> None:
        solution.save(self.output)
        shutil.rmtree(self.folder, ignore_errors=True)
