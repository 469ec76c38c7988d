"""Exact solvers that search one row at a time, in this process or in worker processes.

All rows have one deadline; a row without time keeps its start.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from maskopt.certificates.certificate import Certificate
from maskopt.certificates.proof import check_proof
from maskopt.core.clock import clock
from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.protocol.solution import OPTIMAL_TOLERANCE, SWAP_FLOOR, Solution, Status, optimal_slack
from maskopt.protocol.solver import Capabilities, Solver
from maskopt.protocol.trace import Trace
from maskopt.solvers.exact.tasks import RowAnswer, RowTask, tasks_of
from maskopt.solvers.exact.workers import WorkerCrash, run_tasks
from maskopt.solvers.kernels import one_blas_thread

#: relative difference of two float64 sums of the same terms in another order, with room
_SUM_ORDER = 1e-9
#: rows of so few inputs begin in this process, for so many seconds: most are done before a worker has started
_SMALL_N, _IN_PROCESS_SECONDS = 32, 3.0

_log = logging.getLogger("maskopt.exact")
Search = Callable[[RowTask], RowAnswer]
#: the capabilities of an exact solver, but for what is its own
exact = partial(
    Capabilities, devices=("cpu",), start="needed", default_start="wanda", proves="optimality"
)


@dataclass(frozen=True)
class RowSolver(Solver):
    """The options that all exact solvers of one row at a time have."""

    gap_limit: float = option(
        0.0, "stop a row where (objective − bound)/objective falls to this", least=0, below=1
    )
    node_limit: int | None = option(None, "of a row's tree", unit="nodes", least=1)
    row_seconds: float | None = option(
        None, "of each row, within the time limit of all rows together", unit="seconds", least=0
    )
    workers: int | None = option(
        None,
        "rows at a time, each in a process of its own; 0: in this one; None: one a thread, but a single row, "
        f"and three seconds of rows up to n = {_SMALL_N}, in this one",
        unit="processes",
        least=0,
    )

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        assert start is not None
        tasks = tasks_of(
            problem,
            start,
            limits,
            row_seconds=self.row_seconds,
            gap_limit=self.gap_limit,
            node_limit=self.node_limit,
        )
        answers = run_rows(self.search_row, tasks, limits, self.workers)
        return assemble(problem, answers, self.trusted_name(problem))

    def search_row(self, task: RowTask) -> RowAnswer:
        """Search one row, in this process or in a worker process."""
        raise NotImplementedError

    def trusted_name(self, problem: LayerProblem) -> str:
        """Return name and version of the solver that is trusted with its bounds, such as `SCIP 10.0`."""
        raise NotImplementedError


def run_rows(
    search: Search, tasks: list[RowTask], limits: Limits, workers: int | None
) -> list[RowAnswer]:
    """Search rows, and return the answers in order; a row that crashes, or is not begun, keeps its start."""
    answers = [_no_time(task) for task in tasks]
    finished = 0
    try:
        for index, answer in _as_they_finish(search, tasks, limits, workers):
            if isinstance(answer, WorkerCrash):
                answer = RowAnswer(tasks[index].start, "crashed", message=str(answer))
            answers[index] = answer
            finished += 1
            limits.report(finished, len(tasks))
            if answer.ended == "userinterrupt" and answer.pid == os.getpid():
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        if not finished:
            raise
        answers = [
            a if a.pid or a.ended == "crashed" else RowAnswer(a.pruned, "interrupted")
            for a in answers
        ]
    if crashed := [answer.message for answer in answers if answer.ended == "crashed"]:
        _log.warning(
            "%d rows keep their start: %s; where memory was short, run fewer processes at a time (`workers`)",
            len(crashed),
            crashed[0],
        )
    return answers


def _as_they_finish(
    search: Search, tasks: list[RowTask], limits: Limits, workers: int | None
) -> Iterator[tuple[int, RowAnswer | WorkerCrash]]:
    """Yield (index, answer), first of the rows for this process, then of those for worker processes."""
    in_process_until = -math.inf
    if workers is None and len(tasks) > 1:
        workers = limits.threads or os.cpu_count() or 1
        if len(tasks[0].q) <= _SMALL_N:
            in_process_until = clock() + _IN_PROCESS_SECONDS
    done = 0
    while done < len(tasks) and (not workers or clock() < in_process_until):
        yield done, _answer((search, tasks[done]))
        done += 1
    if workers and done < len(tasks):
        alone = [replace(task, limits=replace(task.limits, threads=1)) for task in tasks[done:]]
        jobs = [(search, task) for task in alone]
        answers = run_tasks(_answer, jobs, workers=workers, deadline=limits.deadline)
        yield from ((done + index, answer) for index, answer in answers)


def _no_time(task: RowTask) -> RowAnswer:
    return RowAnswer(task.start, "timelimit", message="no time was left for this row")


def _answer(job: tuple[Search, RowTask]) -> RowAnswer:
    """Search one row, in the process that it has; never return a mask that costs more than the start."""
    search, task = job
    began = clock()
    if task.row_seconds is not None:
        task = replace(task, limits=replace(task.limits, seconds=task.row_seconds).begin())
    try:
        with one_blas_thread():
            answer = _no_time(task) if task.limits.expired else search(task)
    except KeyboardInterrupt:
        answer = RowAnswer(task.start, "userinterrupt")
    if not task.cost(answer.pruned) <= task.cost(task.start) * (1 + _SUM_ORDER) + task.noise:
        answer = replace(answer, pruned=task.start)
    return replace(answer, seconds=clock() - began, pid=os.getpid())


def assemble(problem: LayerProblem, answers: list[RowAnswer], trusted_name: str) -> Solution:
    """Make answers a Solution: no status better than the backend's own, no bound that contradicts a mask."""
    mask = torch.from_numpy(~np.stack([answer.pruned for answer in answers]))
    objective = problem.objective(mask)
    floor, slack = SWAP_FLOOR * problem.diagonal_mass(), optimal_slack(problem, mask, objective)
    answers = [
        _consistent(answer, row, float(objective[row]), float(floor[row]), trusted_name)
        for row, answer in enumerate(answers)
    ]
    certificate, proven = _certified(problem, answers)
    proof = [answer.proof for answer in answers]
    if any(proof):
        proven = proven.maximum(check_proof(problem, proof))
    claims = [max(answer.bound, 0.0) if answer.proof is None else math.inf for answer in answers]
    bound = torch.tensor(claims, dtype=torch.float64).minimum(objective)
    checked = [
        x is not None or _rests_on_certificate(a) for x, a in zip(proof, answers, strict=True)
    ]
    bound = torch.where(torch.tensor(checked), bound.minimum(proven), bound)
    if problem.one_mask:
        bound = objective
    closed = (objective - bound <= slack).tolist()
    status, trusted = [], []
    for row, answer in enumerate(answers):
        optimal = closed[row] and answer.ended in ("optimal", "presolved")
        status.append(Status.OPTIMAL if optimal else Status.FEASIBLE)
        trusted.append("" if checked[row] or bound[row] <= 0 else trusted_name)
    return Solution.of(
        problem,
        mask,
        status=status,
        lower_bound=bound,
        trace=_trace(answers),
        certificate=certificate,
        proof=proof if any(proof) else None,
        trusted=trusted,
    )


def _consistent(answer: RowAnswer, row: int, cost: float, floor: float, name: str) -> RowAnswer:
    """Return the answer, without a bound above its own mask by more than its tolerances explain."""
    if answer.bound <= cost * (1 + OPTIMAL_TOLERANCE) + answer.slack + floor:
        return answer
    message = (
        f"row {row}: {name} contradicts itself: its bound {answer.bound:.9g} is above the cost "
        f"{cost:.9g} of its own mask (process {answer.pid}); nothing is claimed"
    )
    _log.warning(message)
    return replace(answer, bound=0.0, root_bound=math.nan, ended="contradiction", message=message)


def _rests_on_certificate(answer: RowAnswer) -> bool:
    """Return whether the search raised the bound no further than the row's certificate."""
    return answer.certificate is not None and answer.bound <= answer.certified * (1 + _SUM_ORDER)


def _certified(
    problem: LayerProblem, answers: list[RowAnswer]
) -> tuple[Certificate | None, Tensor]:
    """Return the certificates of the rows that rest on them, and their bounds; other rows have f ≥ 0."""
    parts = [answer.certificate if _rests_on_certificate(answer) else None for answer in answers]
    certificate = Certificate.of_rows(problem, parts)
    if certificate is None:
        return None, torch.zeros(problem.rows, dtype=torch.float64)
    certificate = certificate.of_linear(problem)
    return certificate, certificate.check(problem)


def _trace(answers: list[RowAnswer]) -> Trace:
    return Trace(
        ended=tuple(a.ended for a in answers),
        nodes=torch.tensor([a.nodes for a in answers]),
        root_bound=torch.tensor([a.root_bound for a in answers], dtype=torch.float64),
        relaxations=torch.tensor([a.relaxations for a in answers]),
        convexified=torch.tensor([a.convexified for a in answers]),
        search_seconds=torch.tensor([a.seconds for a in answers], dtype=torch.float64),
        message=tuple(a.message for a in answers),
    )
