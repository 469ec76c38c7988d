"""Branch and bound of our own: the QCR form of the SDP duals, a convex QP at every node.

At the root the semidefinite bound gives λ, μ with A = Q + diag(λ) + μΣ_g 1_g1_gᵀ ⪰ 0, and
f(p) = pᵀAp + cᵀp + const on every legal p (Billionnet, Elloumi, Plateau 2009). A node fixes some
p_i; its bound is the Frank–Wolfe bound of that convex QP over what is left of the polytope, at a
point found by an interior-point method: valid at any point, so nothing depends on its convergence.
Inputs that cannot change sides without passing the incumbent are fixed by the same linear form. Of inputs
that may be exchanged the first ones are pruned.

As inputs are fixed, the λ of the root is less and less the best one. Every few levels a node's own
semidefinite relaxation is solved again (`reconvex`), and its subtree uses that λ: one to two orders
of magnitude fewer nodes. Where triangle inequalities nearly close the root, as they do on graphs, or where
a tree without them would be too large, every node has them, and pentagonal ones (`relaxation`): a tree of
tens or hundreds of nodes, some tenths of a second each, in place of one of many thousands. The tree is
searched best first, which makes the least open bound the proven bound at any time; where nodes are dear, a
few are branched on side by side. With `proof` it is kept, as a proof that needs no trust in any of this.
"""

from __future__ import annotations

import copy
import heapq
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from maskopt.core.limits import one_thread_pool
from maskopt.solvers.convex.triangles import Pool
from maskopt.solvers.exact.duals import Duals, same_group
from maskopt.solvers.exact.free_part import free_part
from maskopt.solvers.exact.incumbent import tabu_row
from maskopt.solvers.exact.node import bound_node, settle
from maskopt.solvers.exact.pentagons import PLACES
from maskopt.solvers.exact.proof_tree import Step, row_proof
from maskopt.solvers.exact.reconvex import multipliers, start_vectors
from maskopt.solvers.exact.relaxation import Goal, Plan, Relaxed, relax_node, subtract_cuts
from maskopt.solvers.exact.rows import RowAnswer, RowTask
from maskopt.solvers.exact.trials import Plans, Trials
from maskopt.solvers.exact.twins import twins_of

#: part of the objective (or of the value) that a node's bound is lowered by, beside the rounding of its sums
_MARGIN = 1e-9
#: part of the objective by which a mask must beat the incumbent to be looked for: half of what OPTIMAL allows
_WORTH = 5e-7
#: part of the step from a value to the next that a bound must pass the value below by
_ROOM = 1e-6
#: fixings after which a node's semidefinite relaxation is solved again; doubled where that failed
_INTERVAL, _LONGEST_INTERVAL = 5, 10
#: sweeps of coordinate descent at such a node, and at the root
_SWEEPS, _ROOT_SWEEPS = 150, 2000
#: triangles nearly close the root where what it then lacks is at most this part of the cost; or, where f is
#: whole, half of what it lacked without
_NEAR = 0.02
#: the unit of relaxations with triangles, as part of what the root lacks without any
_UNIT = 0.6
#: inputs from which on nodes are dear, and how many of those are branched on side by side
_DEAR, _SIDE_BY_SIDE = 128, 4
#: rounded points up to this part above the incumbent are searched, by so many moves of tabu search
_PROMISING, _POLISH = 1.02, 30


@dataclass(frozen=True)
class BranchTask(RowTask):
    """A row for `Branch`; see its options `candidates` and `proof`."""

    candidates: int = 1
    proof: bool = False


class _Form(NamedTuple):
    """The convex form that a subtree is bounded with."""

    relaxed: Relaxed
    """Its λ and triangles; the next relaxation starts there."""
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
    step: Step | None
    """Of the proof; None where none is kept."""


class Tree:
    """The tree of one row, from the duals at its root.

    Attributes:
        best, cost: the incumbent.
        proven: the bound of the root, which holds for every legal mask. (Bounds below it, and that of a
            root whose inputs are fixed by reduced costs, hold for masks below the cutoff alone.)
        plans: of relaxations with triangles; None: nodes have none.
    """

    def __init__(self, task: BranchTask, duals: Duals) -> None:
        self.task, self.duals, self.mu = task, duals, duals.penalty
        self.best, self.cost = task.start, task.cost(task.start)
        self.solved = self.convexified = 0
        n = len(task.q)
        self.same, self.twins = same_group(task), twins_of(task.q, task.group)
        self.base = np.ascontiguousarray(task.q + self.mu * self.same)
        self.constant = self.mu * (n // task.group) * task.pruned**2
        self.reach = float(np.sqrt(np.abs(task.q.diagonal())).sum()) ** 2
        self.order = itertools.count()
        # the sweeps at the root are cheap, and every node below starts from their vectors
        state, point = np.full(n, -1, dtype=np.int8), np.full(n, task.pruned / task.group)
        above = Relaxed(np.zeros(n), start_vectors(n, task.limits.seed), Pool.empty(PLACES))
        own = self.convexify(state, point, above, _ROOT_SWEEPS)
        form = own._replace(lam=duals.with_margin(task))
        value, point, first = self.bound(state, form)
        self.proven = max(value, duals.certified * (1 - _MARGIN))
        again = state.copy()
        other, relaxed, second = self.bound(again, own)
        step = first
        if other > value:
            value, point, state, form, step = other, relaxed, again, own, second
            _follow(first, second)
        self.root = first
        self.start = _Node(
            max(value, self.proven),
            next(self.order),
            state,
            point,
            _Form(form, n, _INTERVAL),
            step,
        )
        self.lacks = self.cutoff - self.start.bound
        self.plans: Plans | None = None
        self.trials = Trials(self.start.bound, task.values is not None)

    @property
    def cutoff(self) -> float:
        """A node of at least this bound holds nothing better than the incumbent."""
        values, worth = self.task.values, _WORTH * self.task.size(self.cost)
        if values is None or not values.step:
            return self.cost - worth
        # above the value below by what a node's bound may be off, and well below the cost
        return self.cost - values.step * (1 - _ROOM) + min(worth, values.step / 4)

    def bound(self, state: np.ndarray, form: Relaxed) -> tuple[float, np.ndarray, Step | None]:
        """The node's bound and relaxed point, and its step of the proof; fixes inputs of `state` in place."""
        task, pool = self.task, form.pool
        base, c, constant = self.base, self._linear(form.lam), self.constant
        if len(pool.tau):
            base = base.copy()
            constant -= subtract_cuts(base, c, pool)
        margin = self._margin(form)
        self.solved += 1
        settled = state.copy()
        cutoff = self.cutoff + margin
        value, point = bound_node(
            base, form.lam, c, constant, task.group, task.pruned, state, cutoff, self.twins
        )
        self._round(point, state)
        step = None
        if task.proof:
            sound = settle(settled, task.group, task.pruned, self.twins)
            step = Step.of(form, point, settled, state) if sound else Step.single()
        return value - margin, point, step

    def _linear(self, lam: np.ndarray) -> np.ndarray:
        """c of pᵀAp + cᵀp + constant, without triangles."""
        return -lam - 2 * self.mu * self.task.pruned

    def _margin(self, form: Relaxed) -> float:
        """The rounding of a node's sums, whose terms can be far larger than the objective."""
        c, n = self._linear(form.lam), len(form.lam)
        terms = self.reach + 4 * float(np.abs(c).sum()) + 4 * abs(self.constant)
        least = form.pool.least  # of so many pairs of inputs, 3 of a triangle
        terms += 16 / 3 * n * float(form.pool.tau @ (least * (2 * least + 1)))
        return _MARGIN * self.task.size(self.cost) + 4 * (n + 8) * 2.0**-53 * terms

    def convexify(
        self, state: np.ndarray, point: np.ndarray, above: Relaxed, sweeps: int
    ) -> Relaxed:
        """The form of a node's own relaxation, without triangles."""
        self.convexified += 1
        lam, vectors = multipliers(
            self.task.q,
            self.mu,
            self.task.pruned,
            self.same,
            state,
            above.vectors,
            point,
            sweeps,
            self.task.limits.deadline,
        )
        return Relaxed(lam, vectors, Pool.empty(PLACES))

    def _tighten(
        self, state: np.ndarray, point: np.ndarray, above: Relaxed, plan: Plan, bound: float
    ) -> Relaxed:
        """The form of a node's own relaxation with triangles."""
        self.convexified += 1
        task = self.task
        part = free_part(task.q, self.mu, task.pruned, self.same, state)
        goal = Goal(bound, self.cutoff, _UNIT * self.lacks, task.limits.deadline)
        return relax_node(part, above, point, plan, goal)

    def _round(self, point: np.ndarray, state: np.ndarray) -> None:
        """The legal mask nearest the relaxed point, kept where it beats the incumbent."""
        group, pruned = self.task.group, self.task.pruned
        score = np.where(state == 1, 2.0, np.where(state == 0, -1.0, point)).reshape(-1, group)
        mask = np.zeros_like(score, dtype=bool)
        np.put_along_axis(mask, np.argsort(-score, axis=1)[:, :pruned], True, axis=1)
        p = mask.reshape(-1)
        cost = float(p @ self.task.q @ p)
        if cost < self.cost * _PROMISING:
            p = tabu_row(self.task.q, p, group, moves=_POLISH)
            cost = float(p @ self.task.q @ p)
            if cost < self.cost:
                self.best, self.cost = p, cost

    def search(self, threads: int = 1) -> RowAnswer:
        """Best first, until nothing is open below the cutoff or a limit is reached.

        Args:
            threads: on which dear nodes are branched on side by side; the tree does not depend on it.
        """
        open_nodes = [self.start]
        nodes, ended, least_open = 1, "", self.start.bound
        with one_thread_pool(threads) as pool:
            try:
                while not (ended := self._limit(open_nodes, nodes)):
                    least_open = open_nodes[0].bound
                    if not self.plans and (p := self.trials.due(nodes, least_open, self.cutoff)):
                        open_nodes = self._with_triangles(p, least_open) or open_nodes
                        continue
                    for child in self._branch_best(open_nodes, pool if threads > 1 else None):
                        nodes += 1
                        if child.bound < self.cutoff:
                            heapq.heappush(open_nodes, child)
                least_open = open_nodes[0].bound if open_nodes else np.inf
            except KeyboardInterrupt:
                # wherever a turn was interrupted, nothing open was below `least_open`
                ended = "userinterrupt"
        return RowAnswer(
            pruned=self.best,
            ended=ended,
            # what the closed tree proves, or the least open bound
            bound=self.task.raised(max(min(least_open, self.cutoff), self.proven)),
            slack=self._margin(self.start.form.relaxed),
            nodes=nodes,
            root_bound=max(min(self.start.bound, self.cutoff), self.proven),
            relaxations=self.solved,
            convexified=self.convexified,
            certificate=self.duals.certificate,
            certified=self.duals.certified,
            proof=None if self.root is None else row_proof(self.root, len(self.task.q), self.mu),
        )

    def _limit(self, open_nodes: list[_Node], nodes: int) -> str:
        """Why the search ends here; empty where it goes on."""
        task = self.task
        if not open_nodes or open_nodes[0].bound >= self.cutoff:
            return "optimal"
        if task.gap_limit and open_nodes[0].bound >= self.cost * (1 - task.gap_limit):
            return "gaplimit"
        if task.limits.expired:
            return "timelimit"
        if task.node_limit is not None and nodes >= task.node_limit:
            return "nodelimit"
        return ""

    def _branch_best(self, open_nodes: list[_Node], pool: ThreadPoolExecutor | None) -> list[_Node]:
        """The children of the best node, which is no longer open; where nodes are dear, of the best few, each
        with the incumbent that is known before any of them."""
        some = [heapq.heappop(open_nodes)]
        dear = self.plans is not None or len(self.task.q) >= _DEAR
        while dear and open_nodes and len(some) < _SIDE_BY_SIDE:
            some.append(heapq.heappop(open_nodes))
        views = [copy.copy(self) for _ in some]
        for view in views:
            view.solved = view.convexified = 0
        run = map if pool is None or len(some) == 1 else pool.map
        families = list(run(Tree._branch, views, some))
        for view in views:
            self.solved += view.solved
            self.convexified += view.convexified
            if view.cost < self.cost:
                self.best, self.cost = view.best, view.cost
        # in the order of the nodes, whoever came first
        return [c._replace(order=next(self.order)) for family in families for c in family]

    def _branch(self, node: _Node) -> list[_Node]:
        free = int((node.state < 0).sum())
        if free and node.form.free - free >= node.form.interval:
            node = self._strengthen(node, free)
            free = int((node.state < 0).sum())
        if not free:  # a single mask, which was looked at
            _follow(node.step, Step.single())
        if not free or node.bound >= self.cutoff:
            return []
        index = np.flatnonzero(node.state < 0)
        size = np.linalg.norm(self.task.q[np.ix_(index, index)], axis=1)
        weight = size * (node.point * (1 - node.point))[index]
        chosen: list[_Node] = []
        best, most = -np.inf, self.task.candidates
        if self.plans is not None:
            most = max(most, self.plans.candidates)
        for i in index[np.argsort(-weight, kind="stable")[:most]]:
            pair = []
            for side in (1, 0):
                state = node.state.copy()
                state[i] = side
                bound, point, step = self.bound(state, node.form.relaxed)
                bound = max(bound, node.bound)
                pair.append(_Node(bound, next(self.order), state, point, node.form, step))
            least = _MARGIN * abs(self.cost)
            gain = [min(c.bound, self.cutoff) - node.bound + least for c in pair]
            score = gain[0] * gain[1]
            if score > best:
                best, chosen = score, pair
                if node.step and pair[0].step and pair[1].step:
                    node.step.split(int(i), pair[0].step, pair[1].step)
            if min(c.bound for c in pair) >= self.cutoff:
                break
        return chosen

    def _with_triangles(self, plans: Plans, least_open: float) -> list[_Node]:
        """The root again, with triangles, in the place of all that is open; empty where it does not pay."""
        state, start = np.full(len(self.task.q), -1, dtype=np.int8), self.start
        own = self._tighten(state, start.point, start.form.relaxed, plans.root, start.bound)
        value, point, step = self.bound(state, own)
        lacking = self.cutoff - value
        near = lacking <= _NEAR * self.cost
        near |= self.task.values is not None and lacking <= self.lacks / 2
        if not value > least_open or not (near or plans.anyway):
            return []
        self.plans, self.root = plans, step
        self.proven = value
        free = int((state < 0).sum())
        return [_Node(value, next(self.order), state, point, _Form(own, free, 1), step)]

    def _strengthen(self, node: _Node, free: int) -> _Node:
        """The node with the form of its own relaxation, where that proves more."""
        above = node.form.relaxed
        if self.plans is not None:
            own = self._tighten(node.state, node.point, above, self.plans.node, node.bound)
        else:
            own = self.convexify(node.state, node.point, above, _SWEEPS)
        state = node.state.copy()
        value, point, step = self.bound(state, own)
        if value > node.bound:
            _follow(node.step, step)
            interval = 1 if self.plans is not None else _INTERVAL
            return _Node(value, node.order, state, point, _Form(own, free, interval), step)
        # not converged: try again further down, from better vectors
        longer = min(2 * node.form.interval, _LONGEST_INTERVAL)
        wait = 1 if self.plans is not None else longer
        kept = above._replace(vectors=own.vectors)
        return node._replace(form=_Form(kept, free, wait))


def _follow(step: Step | None, after: Step | None) -> None:
    """Where a proof is kept, `after` follows at the same node."""
    if step is not None and after is not None:
        step.again(after)
