"""Tasks and answers of the exact search of a row, and the tabu search that its start comes from.

Where kept weights are updated by least squares, A = G + λD is scaled to a diagonal of 1, b is the target and
C the constant; the split d of A's diagonal is that of the bound `perspective` (see `convex.perspective`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskopt.certificates.certificate import Certificate, missing
from maskopt.certificates.proof import RowProof
from maskopt.core.clock import clock
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.core.units import Values
from maskopt.protocol.bounds import lower_bound
from maskopt.solvers.kernels import njit
from maskopt.solvers.least_squares.masks import Scaled
from maskopt.solvers.least_squares.search import swap_refitted

#: the start's objective in the units of a backend's model: far above its absolute tolerances
_MODEL_UNITS = 1000.0
#: part of Σ Q_ii below which an objective is rounding: no model is scaled by less
_NOISE = 1e-10
#: relative gap up to which the `optimal` of Gurobi and HiGHS is one, and not the gap limit that was reached
CLOSED = 1e-9
#: the same with updated weights: half of what OPTIMAL allows. Below, Gurobi would branch on the tolerances of
#: its cones
UPDATED_CLOSED = 5e-7
#: parts of the time that is left that the incumbent and the split of updated weights may take
_SEARCH_SHARE, _SPLIT_SHARE = 0.2, 0.3
#: moves of the tabu search between two looks at the clock
_CHUNK = 256
#: part of the best objective by which another one must be lower: below it is rounding
_BETTER = 1e-12


@dataclass(frozen=True)
class RowTask:
    """A row, of which `pruned` of every `group` inputs are pruned, at the least pᵀQp.

    Attributes:
        q: Q, float64 [n, n].
        start: p of the start, bool [n], True = pruned.
        limits: of all rows together, without a listener; `row_seconds` of this row alone.
        gap_limit, node_limit: see `RowSolver`.
        certified: a lower bound that is proven before the search.
        values: the values that f can take, where they are known.
        zero: the objective at which the original value is 0; None: the units are those of f.
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
    certified: float = 0.0

    @cached_property
    def twins(self) -> list[np.ndarray]:
        """Sets of inputs any two of which may be exchanged; see `twins_of`."""
        return twins_of(self.q, self.group)

    def started(self, pruned: np.ndarray) -> RowTask:
        """Return the task from a start of the same cost, which prunes the first ones of twins."""
        return replace(self, start=put_in_order(pruned, self.twins))

    def with_incumbent(self) -> RowTask:
        """Return the task from a far better start, which trees hardly ever improve on."""
        moves = 50 * len(self.q) + 500
        best = tabu_row(
            self.q, self.start, self.group, moves, self.limits.seed, self.limits.deadline
        )
        return replace(self, start=best)

    def cost(self, pruned: np.ndarray) -> float:
        """Return the objective of a mask."""
        p = np.asarray(pruned, dtype=float)
        return max(float(p @ self.q @ p), 0.0)

    def size(self, cost: float) -> float:
        """Return the unit of tolerances: the cost, or the size of its original value if that is less."""
        return cost if self.zero is None else min(cost, abs(cost - self.zero))

    def is_legal(self, pruned: np.ndarray) -> bool:
        """Return whether p prunes the right number of inputs of every group."""
        if len(pruned) != len(self.q):
            return False
        return bool((pruned.reshape(-1, self.group).sum(1) == self.pruned).all())

    def first(self, score: np.ndarray, count: int) -> np.ndarray:
        """Mark the `count` inputs of least score of every group, bool [n]; ties: the first."""
        ranks = np.argsort(score.reshape(-1, self.group), axis=1, kind="stable").argsort(axis=1)
        return np.asarray(ranks < count).ravel()

    def raised(self, bound: float, slack: float = 0.0) -> float:
        """Return a bound, or the next value of f above it, less its slack, where the values are known."""
        return bound if self.values is None else self.values.at_least(bound - slack)

    def rounding(self, pruned: np.ndarray) -> float:
        """Bound the rounding of f of a mask in float64."""
        terms = float(np.abs(self.q[np.ix_(pruned, pruned)]).sum())
        return 4 * (len(self.q) + 8) * 2.0**-53 * terms

    @property
    def noise(self) -> float:
        """The objective below which there is nothing but rounding."""
        return _NOISE * float(np.trace(self.q))

    @property
    def unit_scale(self) -> float:
        """The factor of Q in a backend's model: the start then costs _MODEL_UNITS."""
        return _MODEL_UNITS / (max(self.cost(self.start), self.noise) or 1.0)

    def answer(
        self, pruned: np.ndarray, ended: str, bound: float, slack: float, nodes: int
    ) -> RowAnswer:
        """Return the answer of another project's solver, with the start where its mask is not legal.

        Its lower bound may be −∞; `slack` is how far tolerances can raise it.
        """
        mask = pruned if self.is_legal(pruned) else self.start
        raised = self.raised(bound, slack) if math.isfinite(bound) else 0.0
        return RowAnswer(mask, ended, max(self.certified, raised), slack, nodes)


@dataclass(frozen=True, kw_only=True)
class UpdatedTask(RowTask):
    """A row with updated weights: `q` is A, its inputs scaled to A_jj = 1.

    Attributes:
        target, constant, split: b [n], C and d [n].
    """

    target: np.ndarray
    constant: float
    split: np.ndarray

    @property
    def twins(self) -> list[np.ndarray]:
        return []

    def cost(self, pruned: np.ndarray) -> float:
        """Return F of a mask: min {vᵀAv − 2bᵀv + C : v is 0 outside S} = C − b_SᵀA_SS⁻¹b_S for kept S."""
        kept = np.flatnonzero(~np.asarray(pruned, dtype=bool))
        target = self.target[kept]
        weights = np.linalg.solve(self.q[np.ix_(kept, kept)], target)
        return max(self.constant - float(target @ weights), 0.0)

    @property
    def noise(self) -> float:
        return _NOISE * self.constant

    @property
    def decided(self) -> RowAnswer | None:
        """The answer where the start costs nothing, is proven already, or is the only mask."""
        cost = self.cost(self.start)
        bound = cost if self.pruned in (0, self.group) else min(self.certified, cost)
        if bound < cost * (1 - UPDATED_CLOSED):
            return None
        return RowAnswer(self.start, "optimal", bound, root_bound=bound if cost else math.nan)


@dataclass(frozen=True)
class RowAnswer:
    """The answer of a backend for one row. Fields not listed here are those of `Trace`.

    Attributes:
        pruned: p of its mask, bool [n].
        ended: the backend's status, or `presolved`, `crashed`, `interrupted`.
        bound: its lower bound.
        slack: how far its tolerances can raise that bound above the truth.
        certificate: of one row, or None; `certified`: the bound that it proves.
        pid: of the process that ran it.
        proof: the tree, closed or not; then the bound is the one that its check finds.
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


def tasks_of(problem: LayerProblem, start: Tensor, limits: Limits, **options: Any) -> list[RowTask]:
    """Return a task for every row, with the same options; `start` is bool [rows, n], True = kept."""
    units, pruned = problem.units, problem.pruned // problem.rows
    options |= {
        "zero": None if units is None else units.zero(pruned),
        "group": problem.group_size,
        "pruned": problem.pruned_per_group,
        "limits": limits.quiet(),
    }
    if problem.update is not None:
        return _updated_tasks(problem, start, limits, options)
    rows = (problem.row(i) for i in range(problem.rows))
    return [
        RowTask(row.q().numpy(), start=p, values=row.values(), **options)
        for row, p in zip(rows, (~start).numpy(), strict=True)
    ]


def _updated_tasks(
    problem: LayerProblem, start: Tensor, limits: Limits, options: dict[str, Any]
) -> list[RowTask]:
    """Start from the 1-swap optimum of the start, with the split of the bound `perspective`."""
    start = swap_refitted(problem, start, None, limits.share(_SEARCH_SHARE).quiet()).mask
    bound = lower_bound(problem, "perspective", limits=limits.share(_SPLIT_SHARE).quiet())
    squares, scaled = problem.least_squares, Scaled.of(problem)
    a = scaled.a.numpy()
    split = (bound.certificate.diagonal / squares.damped.diagonal()).numpy()
    return [
        UpdatedTask(
            a,
            start=(~start[i]).numpy(),
            target=scaled.target[i].numpy(),
            constant=0.0 if squares.flat else float(scaled.constant[i]),
            # A − diag(d) ⪰ 0 for certain
            split=np.maximum(d - missing(torch.from_numpy(a - np.diag(d))), 1e-300),
            certified=float(bound.value[i]),
            **options,
        )
        for i, d in enumerate(split)
    ]


def twins_of(q: np.ndarray, group: int) -> list[np.ndarray]:
    """Return the sets of two or more inputs of a group, int64, ascending, any two of which may be exchanged.

    Q [n, n] stays what it is, to the last bit.
    """
    candidates: dict[bytes, list[list[int]]] = {}  # by the entries of their rows, in any order
    for i, line in enumerate(q + 0.0):
        sets = candidates.setdefault(np.sort(line).tobytes(), [])
        for known in sets:
            j, exchanged = known[0], line.copy()
            exchanged[i], exchanged[j] = line[j], line[i]
            if j // group == i // group and (exchanged == q[j]).all():
                known.append(i)
                break
        else:
            sets.append([i])
    return [np.array(known) for sets in candidates.values() for known in sets if len(known) > 1]


def put_in_order(pruned: np.ndarray, twins: list[np.ndarray]) -> np.ndarray:
    """Return the mask (p, bool [n]) of equal objective that prunes the first ones of all twins."""
    ordered = np.array(pruned, dtype=bool)
    for known in twins:
        ordered[known] = np.arange(len(known)) < ordered[known].sum()
    return ordered


def in_order(state: np.ndarray, twins: list[np.ndarray]) -> bool:
    """Fix what follows where of all twins the first ones are pruned, in place; False: they are not."""
    for known in twins:
        ones, zeros = np.flatnonzero(state[known] == 1), np.flatnonzero(state[known] == 0)
        last, first = ones.max(initial=-1), zeros.min(initial=len(known))
        if first < last:
            return False
        state[known[: last + 1]] = 1
        state[known[first:]] = 0
    return True


def tabu_row(
    q: np.ndarray,
    start: np.ndarray,
    group: int,
    moves: int,
    seed: int = 0,
    deadline: float = math.inf,
) -> np.ndarray:
    """Return the best p of a best-swap tabu search inside groups, bool [n], never worse than `start`."""
    q = np.ascontiguousarray(q)
    p = np.ascontiguousarray(start, dtype=np.bool_).copy()
    best, c = p.copy(), q @ p.astype(np.float64)
    costs = np.full(2, c[p].sum())
    until = np.zeros(len(p), np.int64)
    least, drawn = max(4, len(p) // 8), np.random.RandomState(seed % 2**31)
    for first in range(1, moves + 1, _CHUNK):
        tenures = least + drawn.randint(0, least, (min(_CHUNK, moves - first + 1), 2))
        more = _moves(q, p, c, best, costs, until, tenures, group, first)
        if not more or clock() >= deadline:
            break
    return best


@njit
def _moves(q, p, c, best, costs, until, tenures, group, first):  # type: ignore[no-untyped-def]
    """Make a move for each of `tenures`, from number `first` on; return False where every move is tabu.

    The arrays before `tenures` are changed: c = Qp, costs = f of p and of `best`.
    """
    n = len(p)
    current, best_cost = costs[0], costs[1]
    for move in range(first, first + len(tenures)):
        least, kept, pruned = np.inf, -1, -1
        for low in range(0, n, group):
            for i in range(low, low + group):
                if p[i]:
                    continue
                gain_i = 2 * c[i] + q[i, i]
                for j in range(low, low + group):
                    if not p[j]:
                        continue
                    delta = gain_i - 2 * c[j] + q[j, j] - 2 * q[i, j]
                    allowed = until[i] < move and until[j] < move
                    if delta < least and (allowed or current + delta < best_cost * (1 - _BETTER)):
                        least, kept, pruned = delta, i, j
        if kept < 0:
            return False
        p[kept], p[pruned] = True, False
        for i in range(n):
            c[i] += q[i, kept] - q[i, pruned]
        current += least
        until[kept] = move + tenures[move - first, 0]
        until[pruned] = move + tenures[move - first, 1]
        if current < best_cost * (1 - _BETTER):
            for i in range(n):  # compiles in a tenth of the time of best[:] = p
                best[i] = p[i]
            best_cost = current
    costs[0], costs[1] = current, best_cost
    return True
