"""Branch and bound of our own: the QCR form of the SDP duals, a convex QP at every node.

At the root the semidefinite bound gives λ, μ with A = Q + diag(λ) + μΣ_g 1_g1_gᵀ ⪰ 0, and
f(p) = pᵀAp + cᵀp + const on every legal p (Billionnet, Elloumi, Plateau 2009). A node fixes some
p_i; its bound is the Frank–Wolfe bound of that convex QP over what is left of the polytope, at a
point found by an interior-point method: valid at any point, so nothing depends on its convergence.
Inputs that cannot change sides without passing the incumbent are fixed by the same linear form.

As inputs are fixed, the λ of the root is less and less the best one. Every few levels a node's own
semidefinite relaxation is solved again (`reconvex`), and its subtree uses that λ: one to two orders
of magnitude fewer nodes. The tree is searched best first, which makes the least open bound the
proven bound at any time.
"""

from __future__ import annotations

import heapq
import itertools
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
from torch import Tensor

from maskopt.errors import OptionError
from maskopt.problem import LayerProblem
from maskopt.solution import Solution
from maskopt.solver import Capabilities
from maskopt.solvers.exact.incumbent import tabu_row
from maskopt.solvers.exact.qcr import qcr_duals
from maskopt.solvers.exact.reconvex import multipliers, start_vectors
from maskopt.solvers.exact.scip import assemble, check_limits, check_size, first_mask, run_rows
from maskopt.solvers.exact.scip_model import RowAnswer, RowTask

LARGEST_N = 256
#: part of the objective that a node's bound is lowered by: far above the rounding of float64 sums
_MARGIN = 1e-9
#: fixings after which a node's semidefinite relaxation is solved again; doubled where that failed
_INTERVAL, _LONGEST_INTERVAL = 5, 10
#: sweeps of coordinate descent at such a node, and at the root
_SWEEPS, _ROOT_SWEEPS = 150, 2000


class BranchSolver:
    """Exact for up to about 192 inputs; beyond, a gap within the time limit."""

    name = "branch"
    capabilities = Capabilities(
        devices=("cpu",),
        proves="optimality",
        largest_n=192,
        note="branch and bound on the QCR form of the SDP bound",
    )
    default_warm_start: str | None = "wanda"

    def unavailable(self) -> str | None:
        return None

    def solve(
        self,
        problem: LayerProblem,
        *,
        warm_start: Tensor | None = None,
        time_limit: float | None = None,
        gap_limit: float = 0.0,
        node_limit: int | None = None,
        candidates: int = 1,
        workers: int | None = None,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Solution:
        """Args:
        time_limit: seconds a row.
        gap_limit: stop where (incumbent − bound)/incumbent falls to this.
        node_limit: nodes a row.
        candidates: inputs whose two children are both bounded before one is branched on.
        workers: processes; None: none for one row, else one a core; 0: this process.
        seed: of the tabu search and of the semidefinite bound.
        on_progress: called with (finished rows, rows).
        """
        check_limits(self.name, time_limit, gap_limit)
        check_size(self.name, problem, LARGEST_N)
        if candidates < 1:
            raise OptionError(f"branch: candidates must be at least 1, not {candidates}")
        start = warm_start if warm_start is not None else first_mask(problem)
        tasks = [
            RowTask(
                q=problem.row(i).q().numpy(),
                group=problem.group_size,
                pruned=problem.pruned_per_group,
                start=(~start[i]).numpy(),
                formulation=str(candidates),
                time_limit=time_limit,
                node_limit=node_limit,
                gap_limit=gap_limit,
                seed=seed,
            )
            for i in range(problem.rows)
        ]
        if workers is None:
            workers = 0 if problem.rows == 1 else (os.cpu_count() or 1)
        answers = run_rows(branch_row, tasks, workers, on_progress)
        return assemble(problem, answers, self.name)


def branch_row(task: RowTask) -> RowAnswer:
    """Branch and bound on one row."""
    began = time.perf_counter()
    best = task.start
    try:
        moves = 50 * len(task.q) + 500
        best = tabu_row(task.q, task.start, task.group, moves=moves, seed=task.seed)
        cost = float(best @ task.q @ best)
        if task.time_limit is not None and task.time_limit <= 0:
            return RowAnswer(best, task.bound, "timelimit", message="no time given")
        if task.pruned in (0, task.group):
            return RowAnswer(best, max(cost, 0.0), "optimal")
        if cost <= 1e-13 * float(np.trace(task.q)):
            return RowAnswer(best, 0.0, "optimal")
        lam, mu, root = qcr_duals(task)
        tree = _Tree(task, lam, mu, best, cost, root)
    except KeyboardInterrupt:
        seconds = time.perf_counter() - began
        return RowAnswer(best, task.bound, "userinterrupt", seconds=seconds)
    return tree.search(began, int(task.formulation) if task.formulation.isdigit() else 1)


class _Form(NamedTuple):
    """The convex form that a subtree is bounded with."""

    lam: np.ndarray
    """λ, float64 [n]."""
    vectors: np.ndarray
    """Of the semidefinite relaxation, float32 [n, k]: the next one starts there."""
    free: int
    """Free inputs where it was solved."""
    interval: int
    """Fixings until it is solved again."""


class _Node(NamedTuple):
    bound: float
    order: int
    """Of creation: ties go to the older node."""
    state: np.ndarray
    """1 pruned, 0 kept, −1 free, int8 [n]."""
    point: np.ndarray
    """The relaxed point."""
    form: _Form


class _Tree:
    def __init__(
        self,
        task: RowTask,
        lam: np.ndarray,
        mu: float,
        best: np.ndarray,
        cost: float,
        root: float,
    ) -> None:
        self.task, self.mu = task, mu
        self.best, self.cost, self.root = best, cost, root
        self.solved = self.convexified = 0
        n = len(lam)
        member = np.arange(n) // task.group
        self.same = (member[:, None] == member[None, :]).astype(float)
        self.base = np.ascontiguousarray(task.q + mu * self.same)
        self.constant = mu * (n // task.group) * task.pruned**2
        self.reach = float(np.sqrt(np.abs(task.q.diagonal())).sum()) ** 2
        self.order = itertools.count()
        # the sweeps at the root are cheap, and every node below starts from their vectors
        state, point = np.full(n, -1, dtype=np.int8), np.full(n, task.pruned / task.group)
        vectors = start_vectors(n, task.seed)
        own, vectors = self._convexify(state, point, vectors, _ROOT_SWEEPS)
        self.form = _Form(lam, vectors, n, _INTERVAL)
        value, point = self.bound(state, lam)
        again = state.copy()
        other, relaxed = self.bound(again, own)
        if other > value:
            value, point, state = other, relaxed, again
            self.form = self.form._replace(lam=own)
        self.start = _Node(
            max(value, root * (1 - _MARGIN), task.bound),
            next(self.order),
            state,
            point,
            self.form,
        )

    @property
    def cutoff(self) -> float:
        """A node of at least this bound holds nothing better than the incumbent."""
        return self.cost * (1 - 5e-7)

    def bound(self, state: np.ndarray, lam: np.ndarray) -> tuple[float, np.ndarray]:
        """The node's bound and relaxed point; fixes inputs of `state` in place."""
        c = -lam - 2 * self.mu * self.task.pruned
        # rounding of the node's sums, whose terms can be far larger than the objective
        terms = self.reach + 4 * float(np.abs(c).sum()) + 4 * abs(self.constant)
        margin = _MARGIN * abs(self.cost) + 4 * (len(c) + 8) * 2.0**-53 * terms
        self.solved += 1
        try:
            value, point = _node(
                self.base,
                lam,
                c,
                self.constant,
                self.task.group,
                self.task.pruned,
                state,
                self.cutoff + margin,
            )
        except np.linalg.LinAlgError:  # a Cholesky factorisation that rounding broke
            return -np.inf, np.where(state < 0, self.task.pruned / self.task.group, state)
        self._round(point, state)
        return value - margin, point

    def _convexify(
        self, state: np.ndarray, point: np.ndarray, vectors: np.ndarray, sweeps: int
    ) -> tuple[np.ndarray, np.ndarray]:
        self.convexified += 1
        return multipliers(
            self.task.q,
            self.mu,
            self.task.pruned,
            self.same,
            state,
            vectors,
            point,
            sweeps,
        )

    def _round(self, point: np.ndarray, state: np.ndarray) -> None:
        """The legal mask nearest the relaxed point, kept where it beats the incumbent."""
        group, pruned = self.task.group, self.task.pruned
        score = np.where(state == 1, 2.0, np.where(state == 0, -1.0, point)).reshape(-1, group)
        mask = np.zeros_like(score, dtype=bool)
        np.put_along_axis(mask, np.argsort(-score, axis=1)[:, :pruned], True, axis=1)
        p = mask.reshape(-1)
        cost = float(p @ self.task.q @ p)
        if cost < self.cost * 1.02:
            p = tabu_row(self.task.q, p, group, moves=30, seed=0)
            cost = float(p @ self.task.q @ p)
            if cost < self.cost:
                self.best, self.cost = p, cost

    def search(self, began: float, candidates: int) -> RowAnswer:
        task = self.task
        open_nodes = [self.start]
        nodes, status = 1, "optimal"
        try:
            while open_nodes and open_nodes[0].bound < self.cutoff:
                if task.gap_limit and open_nodes[0].bound >= self.cost * (1 - task.gap_limit):
                    status = "gaplimit"
                    break
                if task.time_limit is not None and time.perf_counter() - began > task.time_limit:
                    status = "timelimit"
                    break
                if task.node_limit is not None and nodes >= task.node_limit:
                    status = "nodelimit"
                    break
                node = heapq.heappop(open_nodes)
                try:
                    children = self._branch(node, candidates)
                except KeyboardInterrupt:
                    heapq.heappush(open_nodes, node)
                    raise
                for child in children:
                    nodes += 1
                    if child.bound < self.cutoff:
                        heapq.heappush(open_nodes, child)
        except KeyboardInterrupt:
            status = "userinterrupt"
        # what the closed tree proves, or the least open bound
        bound = self.cutoff if status == "optimal" else min(open_nodes[0].bound, self.cost)
        return RowAnswer(
            pruned=self.best,
            bound=bound,
            status=status,
            nodes=nodes,
            root_bound=self.start.bound,
            seconds=time.perf_counter() - began,
            extra={"relaxations": self.solved, "convexified": self.convexified},
        )

    def _branch(self, node: _Node, candidates: int) -> list[_Node]:
        free = int((node.state < 0).sum())
        if free and node.form.free - free >= node.form.interval:
            node = self._strengthen(node, free)
            free = int((node.state < 0).sum())
        if not free or node.bound >= self.cutoff:
            return []
        lam = node.form.lam
        index = np.flatnonzero(node.state < 0)
        size = np.linalg.norm(self.task.q[np.ix_(index, index)], axis=1)
        weight = size * (node.point * (1 - node.point))[index]
        chosen: list[_Node] = []
        best = -np.inf
        for i in index[np.argsort(-weight, kind="stable")[:candidates]]:
            pair = []
            for side in (1, 0):
                state = node.state.copy()
                state[i] = side
                bound, point = self.bound(state, lam)
                bound = max(bound, node.bound)
                pair.append(_Node(bound, next(self.order), state, point, node.form))
            gain = [min(c.bound, self.cutoff) - node.bound + 1e-9 * abs(self.cost) for c in pair]
            score = gain[0] * gain[1]
            if score > best:
                best, chosen = score, pair
            if min(c.bound for c in pair) >= self.cutoff:
                break
        return chosen

    def _strengthen(self, node: _Node, free: int) -> _Node:
        """The node with the λ of its own semidefinite relaxation, where that proves more."""
        lam, vectors = self._convexify(node.state, node.point, node.form.vectors, _SWEEPS)
        state = node.state.copy()
        value, point = self.bound(state, lam)
        if value <= node.bound:
            # not converged: try again further down, from better vectors
            wait = min(2 * node.form.interval, _LONGEST_INTERVAL)
            return node._replace(form=_Form(node.form.lam, vectors, free, wait))
        return _Node(value, node.order, state, point, _Form(lam, vectors, free, _INTERVAL))


@numba.njit(cache=True, nogil=True, fastmath=True)
def _solve_lower(factor, x):  # type: ignore[no-untyped-def]
    """x ← (LLᵀ)⁻¹x in place; both passes run along the rows of L."""
    m = len(x)
    for i in range(m):
        total = x[i]
        for j in range(i):
            total -= factor[i, j] * x[j]
        x[i] = total / factor[i, i]
    for i in range(m - 1, -1, -1):
        value = x[i] / factor[i, i]
        x[i] = value
        for j in range(i):
            x[j] -= factor[i, j] * value


@numba.njit(cache=True, nogil=True)
def _node(base_q, lam, c, constant, group, pruned, state, cutoff):  # type: ignore[no-untyped-def]
    """Best Frank–Wolfe bound of the node and its point; fixes inputs by it. ∞ where infeasible."""
    n = len(c)
    groups = n // group
    point = np.zeros(n)
    best = -np.inf
    # a group whose count is reached leaves nothing free
    for g in range(groups):
        ones, free = 0, 0
        for i in range(g * group, (g + 1) * group):
            ones += state[i] == 1
            free += state[i] < 0
        if ones > pruned or ones + free < pruned:
            return np.inf, point
        if ones == pruned or ones + free == pruned:
            for i in range(g * group, (g + 1) * group):
                if state[i] < 0:
                    state[i] = 0 if ones == pruned else 1
    m = 0
    index = np.empty(n, np.int64)
    for i in range(n):
        if state[i] < 0:
            index[m] = i
            m += 1
        else:
            point[i] = state[i]
    fixed = point.copy()
    product = base_q @ fixed + lam * fixed
    base = 2 * product + c
    offset = fixed @ product + c @ fixed + constant
    if m == 0:
        return offset, point
    index = index[:m]
    q = np.empty((m, m))
    lin = np.empty(m)
    for x in range(m):
        lin[x] = base[index[x]]
        for y in range(m):
            q[x, y] = base_q[index[x], index[y]]
        q[x, x] += lam[index[x]]
    # the groups that still have a choice
    label = np.empty(m, np.int64)
    left = np.empty(groups, np.int64)
    size = np.empty(groups, np.int64)
    count = 0
    last = -1
    for x in range(m):
        g = index[x] // group
        if g != last:
            last = g
            ones = 0
            for i in range(g * group, (g + 1) * group):
                ones += state[i] == 1
            left[count] = pruned - ones
            size[count] = 0
            count += 1
        label[x] = count - 1
        size[count - 1] += 1
    p = np.empty(m)
    for x in range(m):
        p[x] = left[label[x]] / size[label[x]]
    grad = 2 * (q @ p) + lin
    scale = np.abs(grad).mean() + 1e-300
    low = np.full(m, scale)
    high = np.full(m, scale)
    nu = np.zeros(count)
    best_grad = grad.copy()
    best_p = p.copy()
    best_value = -np.inf
    for _ in range(25):
        grad = 2 * (q @ p) + lin
        value = p @ q @ p + lin @ p + offset
        lower = value - grad @ p
        first = 0
        for g in range(count):
            part = np.sort(grad[first : first + size[g]])
            lower += part[: left[g]].sum()
            first += size[g]
        if lower > best:
            best = lower
            best_grad = grad
            best_p = p.copy()
            best_value = value
        if best >= cutoff or value - best <= 1e-5 * abs(cutoff):
            break
        if value < cutoff and value - best <= 0.02 * (cutoff - value):
            break  # cannot be cut off, and what is left to gain does not matter
        mu = 0.0
        for x in range(m):
            mu += low[x] * p[x] + high[x] * (1 - p[x])
        mu /= 2 * m
        h = 2 * q
        for x in range(m):
            h[x, x] += low[x] / p[x] + high[x] / (1 - p[x])
        factor = np.ascontiguousarray(np.linalg.cholesky(h))
        inner = np.zeros((m, count))
        column = np.empty(m)
        for g in range(count):
            for x in range(m):
                column[x] = 1.0 if label[x] == g else 0.0
            _solve_lower(factor, column)
            for x in range(m):
                inner[x, g] = column[x]
        schur = np.zeros((count, count))
        miss = left[:count].astype(np.float64)
        for x in range(m):
            miss[label[x]] -= p[x]
            for g in range(count):
                schur[label[x], g] += inner[x, g]
        target = 0.0
        cross_low = np.zeros(m)
        cross_high = np.zeros(m)
        dp = np.zeros(m)
        dlow = np.zeros(m)
        dhigh = np.zeros(m)
        dnu = np.zeros(count)
        primal = 1.0
        dual = 1.0
        for phase in range(2):
            right = np.empty(m)
            for x in range(m):
                right[x] = (
                    -(grad[x] - nu[label[x]])
                    + (target - cross_low[x]) / p[x]
                    - (target - cross_high[x]) / (1 - p[x])
                )
            free_step = right.copy()
            _solve_lower(factor, free_step)
            miss_now = miss.copy()
            for x in range(m):
                miss_now[label[x]] -= free_step[x]
            dnu[:] = np.linalg.solve(schur, miss_now)
            dp = free_step + inner @ dnu
            primal = 1.0
            dual = 1.0
            for x in range(m):
                dlow[x] = (target - cross_low[x] - low[x] * dp[x]) / p[x] - low[x]
                dhigh[x] = (target - cross_high[x] + high[x] * dp[x]) / (1 - p[x]) - high[x]
                if dp[x] < 0:
                    primal = min(primal, -0.995 * p[x] / dp[x])
                elif dp[x] > 0:
                    primal = min(primal, 0.995 * (1 - p[x]) / dp[x])
                if dlow[x] < 0:
                    dual = min(dual, -0.995 * low[x] / dlow[x])
                if dhigh[x] < 0:
                    dual = min(dual, -0.995 * high[x] / dhigh[x])
            if phase == 0:
                after = 0.0
                for x in range(m):
                    after += (low[x] + dual * dlow[x]) * (p[x] + primal * dp[x])
                    after += (high[x] + dual * dhigh[x]) * (1 - p[x] - primal * dp[x])
                after /= 2 * m
                target = (after / mu) ** 3 * mu
                cross_low = dp * dlow
                cross_high = -dp * dhigh
        good = True
        for x in range(m):
            good = good and np.isfinite(dp[x])
        if not good:
            break
        for x in range(m):
            p[x] = min(max(p[x] + primal * dp[x], 1e-14), 1 - 1e-14)
            low[x] = max(low[x] + dual * dlow[x], 1e-300)
            high[x] = max(high[x] + dual * dhigh[x], 1e-300)
        nu += dual * dnu
    for x in range(m):
        point[index[x]] = best_p[x]
    # reduced costs: the same linear form with one input on its other side
    if best < cutoff and best_value > -np.inf:
        first = 0
        for g in range(count):
            part = np.sort(best_grad[first : first + size[g]])
            inside = part[left[g] - 1]
            outside = part[left[g]]
            for x in range(first, first + size[g]):
                if best_grad[x] <= inside and best_grad[x] < outside:
                    if best + outside - best_grad[x] >= cutoff:
                        state[index[x]] = 1
                elif best_grad[x] >= outside and best + best_grad[x] - inside >= cutoff:
                    state[index[x]] = 0
            first += size[g]
    return best, point
