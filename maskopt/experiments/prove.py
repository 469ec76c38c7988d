"""Search without a named solver, and optima with their proofs.

Each row that is proven is a job of its own: on this machine, or on as many as joblib reaches. It is kept in a
file until all rows are done; an interrupted proof verifies these files and continues.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from joblib import delayed
from torch import Tensor

from maskopt.certificates.certificate import Certificate
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.errors import OptionError
from maskopt.experiments.jobs import Store, as_they_finish, job_key, workers
from maskopt.protocol.solution import Solution, Status, optimal_slack
from maskopt.protocol.solver import Solver, limits_of, make_solver, solve

#: the solver that keeps its trees
BRANCH = "branch"
#: rows of up to so many inputs are proven by default; seconds for that, or for the search of a larger row
SMALL, SECONDS = 128, 10.0


def minimize_quadratic(
    quadratic: np.ndarray,
    *,
    cardinality: int,
    maximize: bool = False,
    constant: float = 0.0,
    solver: Solver | str | None = None,
    **options: Any,
) -> Solution:
    """Minimize (or maximize) xᵀQx + constant over x ∈ {0,1}ⁿ with `cardinality` ones.

        best = minimize_quadratic(Q, cardinality=20)
        best.selected, best.value, best.bound, best.gap, best.status[0]

    Args:
        quadratic: Q [n, n], also indefinite; its symmetric part counts.
        solver: as for `search`.
        options: of the solver; `proof=True` keeps the tree of `branch`.

    Raises:
        MaskoptError: as of `RowProblem.from_quadratic` and `solve`.
    """
    problem = RowProblem.from_quadratic(
        quadratic, cardinality=cardinality, maximize=maximize, constant=constant
    )
    return search(problem, solver, **options)


def search(
    problem: LayerProblem | RowProblem,
    solver: Solver | str | None = None,
    *,
    start: Any = None,
    limits: Limits | None = None,
    **options: Any,
) -> Solution:
    """Solve a problem, and choose the solver where none is given.

    Rows of at most `SMALL` inputs get `branch`, one larger row gets `sdp` and `tabu`, both within `SECONDS`
    unless another limit is given. Larger layers and shared budgets get `swap`, without a limit.
    """
    layer = problem.as_layer()
    limits, solver_options = limits_of(limits, options)
    if solver is None and not layer.shared_budget:
        if layer.n <= SMALL:
            solver, start = BRANCH, "swap" if start is None else start
        elif layer.rows == 1 and layer.update is None:
            solver = "tabu"
        if solver is not None and limits.seconds is None:
            limits = replace(limits, seconds=SECONDS)
        if solver == "tabu":
            return _search_with_bound(layer, start, limits, solver_options)
    return solve(problem, solver or "swap", start=start, limits=limits, **solver_options)


def _search_with_bound(
    layer: LayerProblem, start: Any, limits: Limits, options: Mapping[str, Any]
) -> Solution:
    """Run `tabu` from the rounded point of the semidefinite relaxation, and give its mask the bound."""
    limits = limits.begin()
    relaxed = solve(layer, "sdp", start=start, limits=limits.share(0.5))
    searched = solve(layer, "tabu", start=relaxed.mask, limits=limits, **options)
    bound = Solution.of(layer, searched.mask, lower_bound=relaxed.lower_bound).lower_bound
    slack = optimal_slack(layer, searched.mask, searched.objective)
    closed = bool(searched.objective - bound <= slack)
    return replace(
        searched,
        lower_bound=bound,
        certificate=relaxed.certificate,
        status=(Status.OPTIMAL,) if closed else searched.status,
        seconds=relaxed.seconds + searched.seconds,
    )


def prove(
    problem: LayerProblem | RowProblem,
    output: str | os.PathLike[str] | None = None,
    *,
    start: Any = None,
    limits: Limits | None = None,
    jobs: int | None = None,
    on_progress: Callable[[int, int], None] = lambda finished, rows: None,
    **options: Any,
) -> Solution:
    """Prove the optimum of every row by branch and bound, with the tree that proves it.

    A row that is not closed in time has the bound of its tree.

        with joblib.parallel_config(backend="dask", n_jobs=-1):
            prove(load_problem("layer.npz"), "proof.npz")

    Args:
        output: .npz for masks and trees; the folder `<output>.rows` holds finished rows until all are done.
        start: as for `solve`: a solver, a mask [rows, n], or None.
        limits: the seconds are of all rows together.
        jobs: rows at a time, as for `maskopt.experiments.compare.compare`.
        on_progress: called with (finished rows, rows).
        options: of the solver `branch`.

    Raises:
        MaskoptError: bad options or a bad start, before anything runs.
    """
    backend = make_solver(BRANCH, **{**options, "proof": True})
    layer = problem.as_layer()
    if layer.shared_budget or layer.update is not None:
        raise OptionError("proofs are of rows with an equal count and unchanged weights")
    if isinstance(start, str | Solver):
        make_solver(start)
    elif start is not None:
        start = layer.check_mask(start, "start")
    limits, jobs = limits or Limits(), 1 if layer.rows == 1 else jobs
    store = Store(output, None)
    # A proof holds however long it took: the time is no part of a row's key.
    untimed, limits = replace(limits, seconds=None), _limits_of_row(limits, layer.rows, jobs)
    keys: list[str] = []
    finished: dict[str, Solution] = {}
    missing: dict[str, Any] = {}
    for index in range(layer.rows):
        row = layer.row(index)
        row_start = start[index, None] if isinstance(start, Tensor) else start
        key = job_key(row, backend, row_start, untimed)
        keys.append(key)
        solution = store.solution(key, row)
        if solution is not None and solution.status[0] is Status.OPTIMAL:
            finished[key] = solution
        else:
            missing[key] = delayed(_prove_row)(key, row, backend, row_start, limits)
    for key, solution in as_they_finish(list(missing.values()), jobs):
        finished[key] = solution
        if solution.status[0] is Status.OPTIMAL:
            store.add(key, solution)
        on_progress(len(finished), len(set(keys)))
    rows = [finished[key] for key in keys]
    joined = Solution.joined(rows, Certificate.of_rows(layer, [row.certificate for row in rows]))
    if output is not None:
        joined.save(output)
    if store.folder is not None:
        shutil.rmtree(store.folder, ignore_errors=True)
    return joined


def _limits_of_row(limits: Limits, rows: int, jobs: int | None) -> Limits:
    """Return a row's share of the time, without a listener, which no other process can call."""
    limits = limits.quiet() if rows > 1 else limits
    if limits.seconds is None:
        return limits
    return replace(limits, seconds=limits.seconds * min(1.0, workers(jobs) / rows))


def _prove_row(
    key: str, row: RowProblem, backend: Solver, start: Any, limits: Limits
) -> tuple[str, Solution]:
    return key, solve(row, backend, start=start, limits=limits).raise_if_interrupted()
