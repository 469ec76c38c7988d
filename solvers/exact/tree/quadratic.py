"""The tree of pᵀQp: the QCR form of the SDP duals, and a convex QP at every node, bounded in `node`.

The form is that of Billionnet, Elloumi and Plateau (2009). Inputs that cannot change sides without passing
the incumbent are fixed by the linear form of the bound.

Every few levels a node's own semidefinite relaxation is solved again (`multipliers`), and its subtree uses
that λ: one to two orders of magnitude fewer nodes. Where triangle inequalities nearly close the root, as on
graphs, or a tree without them would be too large, every node has them, and pentagonal ones (`relaxation`):
tens or hundreds of nodes, some tenths of a second each, in place of many thousands.

Before other searches, `probe` fixes inputs at the root that no mask below the incumbent has otherwise: an
input is set to its less likely side, and where the bound then reaches the cutoff, it belongs to the other
side. On rows of 64 inputs that often leaves nothing to search.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from maskopt.certificates.proof import AGAIN
from maskopt.solvers.convex.triangles import PLACES, Pool
from maskopt.solvers.exact.tasks import RowTask, tabu_row
from maskopt.solvers.exact.tree.node import (
    Duals,
    FreePart,
    bound_node,
    multipliers,
    settle,
    start_vectors,
    with_penalty,
)
from maskopt.solvers.exact.tree.relaxation import Relaxed, Schedule, relax_node, subtract_cuts
from maskopt.solvers.exact.tree.search import MARGIN, WORTH, BestFirst, Node, Step, row_proof

#: part of the step from a value to the next that a bound must pass the value below by
_ROOM = 1e-6
#: triangles nearly close the root where what it then lacks is at most this part of the cost; or, where f is
#: whole, half of what it lacked without
_NEAR = 0.02
#: a relaxation with triangles takes its node to lack at least this part of what the root lacks without any
_UNIT = 0.6
#: inputs from which on nodes are expensive, and how many of those are branched on side by side
_EXPENSIVE, _SIDE_BY_SIDE = 128, 4
#: rounded points up to this part above the incumbent are searched, by so many moves of tabu search
_PROMISING, _POLISH = 1.02, 30
#: nodes after which triangles are tried at the root; at once where f is known to be whole
_TRY = 300
#: nodes after which they are tried again, for a tree of which more than so many are to be expected
_TRY_AGAIN, _TOO_MANY = 1200, 50_000
#: a pass of `probe` ends after so many failures one after the other, as part of the inputs
_PATIENCE = 0.25


class TreePlan(NamedTuple):
    """The semidefinite relaxations of a tree's root and nodes: so many sweeps, or a schedule with triangles.

    Attributes:
        interval: fixings after which a node's relaxation is solved again; doubled up to `longest` where that
            failed.
        candidates: inputs whose children are bounded before one is branched on.
        anyway: also where triangles do not nearly close the root.
    """

    root: int | Schedule
    node: int | Schedule
    interval: int = 1
    longest: int = 1
    candidates: int = 1
    anyway: bool = False


#: without triangles
PLAIN = TreePlan(root=2000, node=150, interval=5, longest=10)
#: of trees that triangles nearly close: chosen on the k-cluster instances of seed 1; docs/exact.md measures
#: them on those of seed 2
CLOSE = TreePlan(
    Schedule((20.0, 10.0, 5.0, 2.5, 1.2, 0.6, 0.3, 0.15), (15, 15, 20, 30)),
    Schedule((1.2, 0.6, 0.3, 0.15, 0.08)),
)
#: of others: chosen on a row of block 10 gate_proj, restricted to 320 inputs; docs/exact.md measures them
#: on another one (n = 320)
FAR = TreePlan(
    Schedule(
        (20, 10, 5, 2.5, 2, 1.6, 1.3, 1.1, 0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.22, 0.15),
        (15, 15, 20, 30),
        new=16,
        pentagons=8,
    ),
    Schedule((0.2,), new=16, pentagons=8),
    candidates=6,
    anyway=True,
)


class QuadraticTree(BestFirst):
    """The tree of one row, from the duals at its root.

    Attributes:
        proof: whether the tree is kept.
        plan: the relaxations of its nodes.
    """

    def __init__(self, task: RowTask, duals: Duals, *, proof: bool = False) -> None:
        super().__init__(task)
        self.duals, self.mu, self.proof = duals, duals.penalty, proof
        n = len(task.q)
        self.objective = with_penalty(task.q, self.mu, task)
        self.reach = float(np.sqrt(np.abs(task.q.diagonal())).sum()) ** 2
        # the sweeps at the root are cheap, and every node below starts from their vectors
        above = Relaxed(np.zeros(n), start_vectors(n, task.limits.seed), Pool.empty(PLACES))
        state, point = np.full(n, -1, dtype=np.int8), np.full(n, task.pruned / task.group)
        self.plan = PLAIN
        form = self.convexify(Node(0.0, 0, state, point, above), PLAIN.root)
        of_duals = form._replace(lam=duals.with_margin(self.objective))
        node = self.bounded(Node(0.0, 0, state, point, of_duals, n, PLAIN.interval))
        self.root = node.step
        self.proven = max(node.bound, duals.certified * (1 - MARGIN))
        again = self.bounded(node._replace(form=form))
        if again.bound > node.bound:
            _follow(node.step, again.step)
            node = again
        self.root_bound = max(node.bound, self.proven)
        self.start = node._replace(bound=self.root_bound)
        self.lacks = self.cutoff - self.root_bound
        self._trials, self._halfway = 0, self.root_bound

    @property
    def cutoff(self) -> float:
        values, worth = self.task.values, WORTH * self.task.size(self.cost)
        if values is None or not values.step:
            return self.cost - worth
        # above the value below by what a node's bound may be off, and well below the cost
        return self.cost - values.step * (1 - _ROOM) + min(worth, values.step / 4)

    @property
    def abreast(self) -> int:  # type: ignore[override]
        expensive = self.plan is not PLAIN or len(self.task.q) >= _EXPENSIVE
        return _SIDE_BY_SIDE if expensive else 1

    def claims(self) -> dict[str, Any]:
        return {
            "slack": self._margin(self.start.form),
            "relaxations": self.solved,
            "convexified": self.convexified,
            "certificate": self.duals.certificate,
            "certified": self.duals.certified,
            "proof": row_proof(self.root, len(self.task.q), self.mu) if self.root else None,
        }

    def bounded(self, node: Node) -> Node:
        """Bound a node by its form, and fix what no mask below the cutoff has otherwise.

        The node returned also has the relaxed point and its step of the proof.
        """
        task, pool = self.task, node.form.pool
        objective = subtract_cuts(self.objective, pool) if len(pool.tau) else self.objective
        margin, state, settled = self._margin(node.form), node.state.copy(), node.state.copy()
        cutoff = self.cutoff + margin
        value, point = bound_node(objective, node.form.lam, task, state, cutoff)
        self.solved += 1
        self._round(point, state)
        step = None
        if self.proof:
            sound, step = settle(settled, task), Step()
            free = settled < 0
            if sound and free.any():
                fixed = np.flatnonzero(free & (state >= 0))
                step = Step(node.form, point[free], fixed, state[fixed])
        return node._replace(bound=value - margin, state=state, point=point, step=step)

    def _margin(self, form: Relaxed) -> float:
        """Bound the rounding of a node's sums, whose terms can be far larger than the objective."""
        linear, n = self.objective.linear - form.lam, len(form.lam)
        terms = self.reach + 4 * float(np.abs(linear).sum()) + 4 * abs(self.objective.constant)
        least = form.pool.least  # of so many pairs of inputs, 3 of a triangle
        terms += 16 / 3 * n * float(form.pool.tau @ (least * (2 * least + 1)))
        return MARGIN * self.task.size(self.cost) + 4 * (n + 8) * 2.0**-53 * terms

    def convexify(self, node: Node, method: int | Schedule) -> Relaxed:
        """Return the form of a node's own relaxation, which starts from the form that it has from above."""
        self.convexified += 1
        deadline = self.task.limits.deadline
        part = FreePart.of(self.objective, node.state)
        if isinstance(method, Schedule):
            lacking = max(self.cutoff - node.bound, _UNIT * self.lacks)
            place = node.form, node.point
            return relax_node(part, *place, method, lacking, self.cutoff, deadline)
        lam, vectors = multipliers(part, node.form.vectors, node.point, method, deadline)
        return Relaxed(lam, vectors, Pool.empty(PLACES))

    def _round(self, point: np.ndarray, state: np.ndarray) -> None:
        """Keep the legal mask nearest the relaxed point where it beats the incumbent."""
        score = np.where(state == 1, 2.0, np.where(state == 0, -1.0, point))
        p = self.task.first(-score, self.task.pruned)
        if self.task.cost(p) < self.cost * _PROMISING:
            self.take(tabu_row(self.task.q, p, self.task.group, moves=_POLISH))

    def branch(self, node: Node) -> list[Node]:
        """Return both children of an input; of several candidates, of the one that gains most."""
        free = int((node.state < 0).sum())
        if free and node.free - free >= node.interval:
            node = self._strengthen(node, free)
            free = int((node.state < 0).sum())
        if not free:  # a single mask, which was looked at
            _follow(node.step, Step())
        if not free or node.bound >= self.cutoff:
            return []
        index = np.flatnonzero(node.state < 0)
        size = np.linalg.norm(self.task.q[np.ix_(index, index)], axis=1)
        weight = size * (node.point * (1 - node.point))[index]
        chosen: list[Node] = []
        best = -np.inf
        for i in index[np.argsort(-weight, kind="stable")[: self.plan.candidates]]:
            pair = []
            for side in (1, 0):
                state = node.state.copy()
                state[i] = side
                child = self.bounded(node._replace(state=state))
                pair.append(child._replace(bound=max(child.bound, node.bound)))
            least = MARGIN * abs(self.cost)
            gain = [min(c.bound, self.cutoff) - node.bound + least for c in pair]
            score = gain[0] * gain[1]
            if score > best:
                best, chosen = score, pair
                if node.step and pair[0].step and pair[1].step:
                    node.step.then(int(i), pair[0].step, pair[1].step)
            if min(c.bound for c in pair) >= self.cutoff:
                break
        return chosen

    def _strengthen(self, node: Node, free: int) -> Node:
        """Return the node with the form of its own relaxation, where that proves more."""
        form = self.convexify(node, self.plan.node)
        again = node._replace(form=form, free=free, interval=self.plan.interval)
        again = self.bounded(again)
        if again.bound > node.bound:
            _follow(node.step, again.step)
            return again
        # not converged: try again further down, from better vectors
        form = node.form._replace(vectors=form.vectors)
        interval = min(2 * node.interval, self.plan.longest)
        return node._replace(form=form, free=free, interval=interval)

    def restarted(self, open_nodes: list[Node], nodes: int) -> list[Node] | None:
        """Return the root with triangles in the place of all open nodes, where that is due and pays."""
        least_open = open_nodes[0].bound
        plan = self._due(nodes, least_open) if self.plan is PLAIN else None
        if plan is None:
            return None
        state = np.full(len(self.task.q), -1, dtype=np.int8)
        root = self.start._replace(state=state, interval=plan.interval)
        root = self.bounded(root._replace(form=self.convexify(root, plan.root)))
        lacking = self.cutoff - root.bound
        near = lacking <= _NEAR * self.cost
        near |= self.task.values is not None and lacking <= self.lacks / 2
        if not root.bound > least_open or not (near or plan.anyway):
            return open_nodes
        self.plan, self.root, self.proven = plan, root.step, root.bound
        return [root._replace(order=next(self.order), free=int((root.state < 0).sum()))]

    def _due(self, nodes: int, least_open: float) -> TreePlan | None:
        """Return the relaxations with triangles to be tried now, if any.

        They are tried early, for rows whose root they nearly close, and once more where the tree without them
        has turned out to be too large.
        """
        if self._trials == 0 and (nodes >= _TRY or self.task.values is not None):
            self._trials = 1
            return CLOSE
        if nodes <= _TRY_AGAIN // 2:
            self._halfway = least_open
        if self._trials == 1 and nodes >= _TRY_AGAIN:
            self._trials = 2
            # every doubling of the tree brings about as much as the last one
            doublings = max(0.0, math.log2(_TOO_MANY / nodes))
            if least_open + (least_open - self._halfway) * doublings < self.cutoff:
                return FAR
        return None

    def probe(self) -> None:
        """Fix inputs of `start` that no mask below the cutoff has otherwise whose first twins are pruned.

        The bound of `start` is then one of these masks, at least the cutoff where there are none. The
        incumbent may become a better one.
        """
        node = self.start._replace(state=self.start.state.copy())
        while node.bound < self.cutoff and not self.task.limits.expired:
            before = int((node.state < 0).sum())
            self._probe_inputs(node)
            free = int((node.state < 0).sum())
            if not free:  # a single mask, which this looks at
                self.bounded(node)
                node = node._replace(bound=self.cutoff)
            if free in (0, before):
                break
            again = self.bounded(node._replace(form=self.convexify(node, PLAIN.node)))
            if again.bound > node.bound:
                node = again
        self.start = node

    def _probe_inputs(self, node: Node) -> None:
        """Fix free inputs of a node in place, in one pass, those first that the relaxation is surest of."""
        failures, state = 0, node.state
        for i in np.argsort(-np.abs(node.point - 0.5), kind="stable"):
            if failures > _PATIENCE * len(state) or self.task.limits.expired:
                break
            if state[i] >= 0:
                continue
            side = int(node.point[i] < 0.5)
            other = state.copy()
            other[i] = side
            if self.bounded(node._replace(state=other)).bound >= self.cutoff:
                state[i] = 1 - side
                failures = 0
            else:
                failures += 1


def _follow(step: Step | None, after: Step | None) -> None:
    """Let the step `after` follow at the same node, where a proof is kept."""
    if step is not None and after is not None:
        step.then(AGAIN, after)
