"""Rows one by one: what the exact search of a row is given and what it answers, and how a layer's rows run.

A backend is one function, `RowTask` → `RowAnswer`, that this process or a worker process calls. All rows
share one deadline; a row that it leaves no time for keeps its start.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskopt.certificates.certificate import Certificate
from maskopt.certificates.proof import Proof, RowProof
from maskopt.certificates.proof_check import check_proof
from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.core.values import Values
from maskopt.protocol.solution import OPTIMAL_TOLERANCE, SWAP_FLOOR, Solution, Status, optimal_slack
from maskopt.protocol.solver import Solver
from maskopt.protocol.trace import Trace
from maskopt.solvers.exact.workers import WorkerCrash, run_tasks
from maskopt.solvers.parallel import one_blas_thread

#: the start's objective in the units of a backend's model: far above its absolute tolerances
_MODEL_UNITS = 1000.0
#: part of Σ Q_ii below which an objective is rounding: no model is scaled by less
NOISE = 1e-10
#: relative difference of two float64 sums of the same terms in another order, with room
_SUM_ORDER = 1e-9

#: rows of so few inputs begin in this process, for so many seconds: most are done before a worker has started
_FEW, _HERE = 32, 3.0

_log = logging.getLogger("maskopt.exact")


@dataclass(frozen=True)
class RowTask:
    """What a process needs to search one row.

    Attributes:
        q: Q, float64 [n, n].
        group: inputs of a group.
        pruned: how many of them are pruned.
        start: p of the start, bool [n], True = pruned.
        limits: of all rows together, without a listener.
        row_seconds: of this row alone, besides.
        gap_limit, node_limit: see `RowSolver`.
        values: that f can take, where they are known.
        zero: the objective whose value is 0 in the units in which the problem was posed; None: in none.
    """

    q: np.ndarray
    group: int
    pruned: int
    start: np.ndarray
    limits: Limits = field(default_factory=Limits)
    row_seconds: float | None = None
    gap_limit: float = 0.0
    node_limit: int | None = None
    values: Values | None = None
    zero: float | None = None

    def begin(self) -> RowTask:
        """The same with the clock of the row running."""
        if self.row_seconds is None:
            return self
        return replace(self, limits=replace(self.limits, seconds=self.row_seconds).begin())

    def cost(self, pruned: np.ndarray) -> float:
        """f of a mask."""
        p = np.asarray(pruned, dtype=float)
        return max(float(p @ self.q @ p), 0.0)

    def size(self, cost: float) -> float:
        """What tolerances are a part of: the cost, or the value that it has, if that is less."""
        return cost if self.zero is None else min(cost, abs(cost - self.zero))

    def is_legal(self, pruned: np.ndarray) -> bool:
        """Whether p prunes the right number of inputs of every group."""
        if len(pruned) != len(self.q):
            return False
        return bool((pruned.reshape(-1, self.group).sum(1) == self.pruned).all())

    def raised(self, bound: float, slack: float = 0.0) -> float:
        """A bound: less its slack and raised to the next value that f can take, where these are known."""
        return bound if self.values is None else self.values.at_least(bound - slack)

    def rounding(self, pruned: np.ndarray) -> float:
        """The most that float64 can lose of f of a mask."""
        return (
            4 * (len(self.q) + 8) * 2.0**-53 * float(np.abs(self.q[np.ix_(pruned, pruned)]).sum())
        )

    @property
    def noise(self) -> float:
        """An objective below this is nothing but rounding."""
        return NOISE * float(np.trace(self.q))

    @property
    def unit_scale(self) -> float:
        """What Q is multiplied by in a backend's model, so that the start costs _MODEL_UNITS."""
        return _MODEL_UNITS / (max(self.cost(self.start), self.noise) or 1.0)


@dataclass(frozen=True)
class RowAnswer:
    """What a backend says about one row.

    Attributes:
        pruned: p of its mask, bool [n].
        ended: its own word, or `presolved`, `crashed`, `interrupted`.
        bound: the lower bound that it claims.
        slack: how far its declared tolerances can push that bound above the truth.
        certificate: of one row, and `certified`, what it proves; None: there is none.
        pid: of the process that ran it.
        proof: the tree that it searched, closed or not; its bound then counts for what the check finds.

    The others are those of `Trace`.
    """

    pruned: np.ndarray
    ended: str
    bound: float = 0.0
    slack: float = 0.0
    nodes: int = 0
    root_bound: float = math.nan
    relaxations: int = -1
    convexified: int = -1
    seconds: float = 0.0
    message: str = ""
    certificate: Certificate | None = None
    certified: float = 0.0
    pid: int = 0
    proof: RowProof | None = None


Search = Callable[[Any], RowAnswer]


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
        f"and three seconds of rows up to n = {_FEW}, here",
        unit="processes",
        least=0,
    )

    def solve_rows(
        self,
        problem: LayerProblem,
        start: Tensor,
        limits: Limits,
        search: Search,
        word: str,
        kind: type[RowTask] = RowTask,
        **own: Any,
    ) -> Solution:
        """Search every row.

        Args:
            search: of one row; importable by its qualified name, for worker processes.
            word: name and version of the solver that is trusted with its bounds, such as `SCIP 10.0`.
            kind: of the tasks, with fields of its own.
        """
        tasks = [
            kind(
                q=problem.row(i).q().numpy(),
                values=problem.row(i).values(),
                **self.asked(problem, start[i], limits),
                **own,
            )
            for i in range(problem.rows)
        ]
        return assemble(problem, run_rows(search, tasks, limits, self.workers), word)

    def asked(self, problem: LayerProblem, start: Tensor, limits: Limits) -> dict[str, Any]:
        """What the task of a row has whatever its objective is; `start` is the row's mask, bool [n]."""
        units, pruned = problem.units, problem.pruned // problem.rows
        return {
            "zero": None if units is None else units.zero(pruned),
            "group": problem.group_size,
            "pruned": problem.pruned_per_group,
            "start": (~start).numpy(),
            "limits": limits.quiet(),
            "row_seconds": self.row_seconds,
            "gap_limit": self.gap_limit,
            "node_limit": self.node_limit,
        }


def run_rows(
    search: Search, tasks: list[Any], limits: Limits, workers: int | None
) -> list[RowAnswer]:
    """Answers in the order of the tasks; a row that crashes, or is not begun, keeps its start."""
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
        begun = [bool(answer.pid) or answer.ended == "crashed" for answer in answers]
        answers = [
            answer if known else RowAnswer(answer.pruned, "interrupted")
            for answer, known in zip(answers, begun, strict=True)
        ]
    if crashed := [answer.message for answer in answers if answer.ended == "crashed"]:
        _log.warning(
            "%d rows keep their start: %s; where memory was short, run fewer processes at a time (`workers`)",
            len(crashed),
            crashed[0],
        )
    return answers


def _as_they_finish(
    search: Search, tasks: list[Any], limits: Limits, workers: int | None
) -> Iterator[tuple[int, RowAnswer | WorkerCrash]]:
    """First those that are for this process, then those for worker processes."""
    here = -math.inf
    if workers is None and len(tasks) > 1:
        workers = limits.threads or os.cpu_count() or 1
        if len(tasks[0].q) <= _FEW:
            here = time.monotonic() + _HERE
    done = 0
    while done < len(tasks) and (not workers or time.monotonic() < here):
        yield done, _answer((search, tasks[done]))
        done += 1
    if workers and done < len(tasks):
        # of one thread each
        rest = [replace(task, limits=replace(task.limits, threads=1)) for task in tasks[done:]]
        jobs = [(search, task) for task in rest]
        found = run_tasks(_answer, jobs, workers=workers, deadline=limits.deadline)
        yield from ((done + index, answer) for index, answer in found)


def _no_time(task: RowTask) -> RowAnswer:
    return RowAnswer(task.start, "timelimit", message="no time was left for this row")


def _answer(job: tuple[Search, RowTask]) -> RowAnswer:
    """One row, in the process that searches it. Never a mask that costs more than the start."""
    search, task = job
    began = time.monotonic()
    task = task.begin()
    try:
        with one_blas_thread():
            answer = _no_time(task) if task.limits.expired else search(task)
    except KeyboardInterrupt:
        answer = RowAnswer(task.start, "userinterrupt")
    if not task.cost(answer.pruned) <= task.cost(task.start) * (1 + _SUM_ORDER) + task.noise:
        answer = replace(answer, pruned=task.start)
    return replace(answer, seconds=time.monotonic() - began, pid=os.getpid())


def assemble(problem: LayerProblem, answers: list[RowAnswer], word: str) -> Solution:
    """The Solution: no status better than the backend's own, no bound that contradicts a mask."""
    mask = torch.from_numpy(~np.stack([answer.pruned for answer in answers]))
    objective = problem.objective(mask)
    floor, slack = SWAP_FLOOR * problem.diagonal_mass(), optimal_slack(problem, mask, objective)
    answers = [
        _consistent(answer, row, float(objective[row]), float(floor[row]), word)
        for row, answer in enumerate(answers)
    ]
    certificate, proven = _certified(problem, answers)
    proof, by_tree = _proofs(problem, answers)
    proven = proven.maximum(by_tree)
    bound, status, trusted = [], [], []
    for row, answer in enumerate(answers):
        cost = float(objective[row])
        checked = answer.proof is not None or _rests_on_certificate(answer)
        value = min(max(answer.bound, 0.0), cost)
        if problem.pruned_per_group in (0, problem.group_size):  # there is but one mask
            value = cost
        elif answer.proof is not None:
            value = min(cost, float(proven[row]))
        elif checked:
            value = min(value, float(proven[row]))
        closed = cost - value <= float(slack[row])
        optimal = closed and answer.ended in ("optimal", "presolved")
        bound.append(value)
        status.append(Status.OPTIMAL if optimal else Status.FEASIBLE)
        trusted.append("" if checked or value <= 0 else word)
    return Solution.of(
        problem,
        mask,
        status=status,
        lower_bound=torch.tensor(bound, dtype=torch.float64),
        trace=_trace(answers),
        certificate=certificate,
        proof=proof,
        trusted=trusted,
    )


def _consistent(answer: RowAnswer, row: int, cost: float, floor: float, word: str) -> RowAnswer:
    """The answer, or what is left of it where its bound is above its own mask by more than its
    tolerances explain: then neither the bound nor the proof is worth anything."""
    if answer.bound <= cost * (1 + OPTIMAL_TOLERANCE) + answer.slack + floor:
        return answer
    message = (
        f"row {row}: {word} contradicts itself: its bound {answer.bound:.9g} is above the cost "
        f"{cost:.9g} of its own mask (process {answer.pid}); nothing is claimed"
    )
    _log.warning(message)
    return replace(answer, bound=0.0, root_bound=math.nan, ended="contradiction", message=message)


def _rests_on_certificate(answer: RowAnswer) -> bool:
    """Whether the search raised the bound no further than the row's certificate."""
    return answer.certificate is not None and answer.bound <= answer.certified * (1 + _SUM_ORDER)


def _certified(
    problem: LayerProblem, answers: list[RowAnswer]
) -> tuple[Certificate | None, Tensor]:
    """The certificates of the rows that rest on them, and what they prove; of others, that f ≥ 0.
    (They were made for the rows' own Q.)"""
    if not any(_rests_on_certificate(answer) for answer in answers):
        return None, torch.zeros(problem.rows, dtype=torch.float64)
    nothing = Certificate.box(problem, torch.zeros_like(problem.weight, dtype=torch.float64))
    parts = [
        answer.certificate
        if answer.certificate is not None and _rests_on_certificate(answer)
        else nothing.take([row])
        for row, answer in enumerate(answers)
    ]
    certificate = Certificate.stack(parts).of_linear(problem)
    return certificate, problem.next_value(certificate.check(problem))


def _proofs(problem: LayerProblem, answers: list[RowAnswer]) -> tuple[Proof | None, Tensor]:
    """The trees that were kept, and what they prove."""
    proof = Proof([answer.proof for answer in answers])
    if not any(proof.rows):
        return None, torch.zeros(problem.rows, dtype=torch.float64)
    return proof, check_proof(problem, proof)


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
