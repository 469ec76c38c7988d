"""The tree of pᵀQp: the QCR form of the SDP duals (Billionnet, Elloumi, Plateau 2009), a convex QP at every
node, whose bound is that of `node`. Inputs that cannot change sides without passing the incumbent are fixed
by the linear form of the bound.

Every few levels a node's own semidefinite relaxation is solved again (`multipliers`), and its subtree uses
that λ: one to two orders of magnitude fewer nodes. Where triangle inequalities nearly close the root, as on
graphs, or a tree without them would be too large, every node has them, and pentagonal ones (`relaxation`):
tens or hundreds of nodes, some tenths of a second each, in place of many thousands.

Before other searches, `probe` fixes inputs at the root that no mask below the incumbent has otherwise: an
input is set to its less likely side, and where the bound of the rest reaches the cutoff, it belongs to the
other. On rows of 64 inputs that often leaves nothing to search.
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
    bound_node,
    free_part,
    multipliers,
    same_group,
    settle,
    start_vectors,
    twins_of,
)
from maskopt.solvers.exact.tree.relaxation import Goal, Plan, Relaxed, relax_node, subtract_cuts
from maskopt.solvers.exact.tree.search import MARGIN, WORTH, BestFirst, Node, Step, row_proof

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


class Plans(NamedTuple):
    """How a tree with triangles is grown: the relaxations of root and nodes; inputs whose children are
    bounded before one is branched on; `anyway`: also where triangles do not nearly close the root."""

    root: Plan
    node: Plan
    candidates: int = 1
    anyway: bool = False


#: of trees that triangles nearly close: chosen on the k-cluster instances of seed 1; docs/exact.md measures
#: them on those of seed 2
CLOSE = Plans(
    Plan((20.0, 10.0, 5.0, 2.5, 1.2, 0.6, 0.3, 0.15), (15, 15, 20, 30)),
    Plan((1.2, 0.6, 0.3, 0.15, 0.08)),
)
#: of others: chosen on a row of block 10 gate_proj, restricted to 320 inputs; docs/exact.md measures them
#: on another one (n = 320)
FAR = Plans(
    Plan(
        (20, 10, 5, 2.5, 2, 1.6, 1.3, 1.1, 0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.22, 0.15),
        (15, 15, 20, 30),
        new=16,
        pentagons=8,
    ),
    Plan((0.2,), new=16, pentagons=8),
    candidates=6,
    anyway=True,
)


class QuadraticTree(BestFirst):
    """The tree of one row, from the duals at its root. `plans`: of relaxations with triangles; None: nodes
    have none. `proof`: keep the tree."""

    def __init__(self, task: RowTask, duals: Duals, *, proof: bool = False) -> None:
        super().__init__(task)
        self.duals, self.mu, self.proof = duals, duals.penalty, proof
        n = len(task.q)
        self.same, self.twins = same_group(task), twins_of(task.q, task.group)
        self.base = np.ascontiguousarray(task.q + self.mu * self.same)
        self.constant = self.mu * (n // task.group) * task.pruned**2
        self.reach = float(np.sqrt(np.abs(task.q.diagonal())).sum()) ** 2
        # the sweeps at the root are cheap, and every node below starts from their vectors
        state, point = np.full(n, -1, dtype=np.int8), np.full(n, task.pruned / task.group)
        above = Relaxed(np.zeros(n), start_vectors(n, task.limits.seed), Pool.empty(PLACES))
        own = self.convexify(state, point, above, _ROOT_SWEEPS)
        form = own._replace(lam=duals.with_margin(task))
        value, point, first = self.bound(state, form)
        self.proven = max(value, duals.certified * (1 - MARGIN))
        again = state.copy()
        other, relaxed, second = self.bound(again, own)
        self.root = step = first
        if other > value:
            value, point, state, form, step = other, relaxed, again, own, second
            _follow(first, second)
        self.root_bound = max(value, self.proven)
        self.start = Node(self.root_bound, 0, state, point, form, n, _INTERVAL, step)
        self.lacks = self.cutoff - self.root_bound
        self.plans: Plans | None = None
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
        expensive = self.plans is not None or len(self.task.q) >= _EXPENSIVE
        return _SIDE_BY_SIDE if expensive else 1

    def claims(self) -> dict[str, Any]:
        return {
            "slack": self._margin(self.start.form),
            "relaxations": self.solved,
            "convexified": self.convexified,
            "certificate": self.duals.certificate,
            "certified": self.duals.certified,
            "proof": None if self.root is None else row_proof(self.root, len(self.base), self.mu),
        }

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
        if self.proof:
            sound, step = settle(settled, task.group, task.pruned, self.twins), Step()
            free = settled < 0
            if sound and free.any():
                fixed = np.flatnonzero(free & (state >= 0))
                step = Step(form, point[free], fixed, state[fixed])
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
        return MARGIN * self.task.size(self.cost) + 4 * (n + 8) * 2.0**-53 * terms

    def convexify(
        self,
        state: np.ndarray,
        point: np.ndarray,
        above: Relaxed,
        how: int | Plan = _SWEEPS,
        bound: float = 0.0,
    ) -> Relaxed:
        """The form of a node's own relaxation: in sweeps without triangles, or by a plan with them, from a
        known bound."""
        self.convexified += 1
        task, deadline = self.task, self.task.limits.deadline
        part = free_part(task.q, self.mu, task.pruned, self.same, state)
        if isinstance(how, Plan):
            goal = Goal(bound, self.cutoff, _UNIT * self.lacks, deadline)
            return relax_node(part, above, point, how, goal)
        lam, vectors = multipliers(part, above.vectors, point, how, deadline)
        return Relaxed(lam, vectors, Pool.empty(PLACES))

    def _round(self, point: np.ndarray, state: np.ndarray) -> None:
        """The legal mask nearest the relaxed point, kept where it beats the incumbent."""
        group, pruned = self.task.group, self.task.pruned
        score = np.where(state == 1, 2.0, np.where(state == 0, -1.0, point)).reshape(-1, group)
        mask = np.zeros_like(score, dtype=bool)
        np.put_along_axis(mask, np.argsort(-score, axis=1)[:, :pruned], True, axis=1)
        p = mask.reshape(-1)
        if float(p @ self.task.q @ p) < self.cost * _PROMISING:
            p = tabu_row(self.task.q, p, group, moves=_POLISH)
            self.take(p, float(p @ self.task.q @ p))

    def branch(self, node: Node) -> list[Node]:
        """Both children of an input; where there are several candidates, of the one that gains most."""
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
        best, most = -np.inf, self.plans.candidates if self.plans else 1
        for i in index[np.argsort(-weight, kind="stable")[:most]]:
            pair = []
            for side in (1, 0):
                state = node.state.copy()
                state[i] = side
                bound, point, step = self.bound(state, node.form)
                bound = max(bound, node.bound)
                pair.append(node._replace(bound=bound, state=state, point=point, step=step))
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
        """The node with the form of its own relaxation, where that proves more."""
        above, how = node.form, self.plans.node if self.plans else _SWEEPS
        own = self.convexify(node.state, node.point, above, how, node.bound)
        state = node.state.copy()
        value, point, step = self.bound(state, own)
        if value > node.bound:
            _follow(node.step, step)
            interval = 1 if self.plans else _INTERVAL
            return Node(value, node.order, state, point, own, free, interval, step)
        # not converged: try again further down, from better vectors
        wait = 1 if self.plans else min(2 * node.interval, _LONGEST_INTERVAL)
        return node._replace(form=above._replace(vectors=own.vectors), free=free, interval=wait)

    def restarted(self, open_nodes: list[Node], nodes: int) -> list[Node] | None:
        """The root again, with triangles, in the place of all that is open, where that is due and pays."""
        least_open = open_nodes[0].bound
        plans = None if self.plans else self._due(nodes, least_open)
        if plans is None:
            return None
        state, start = np.full(len(self.task.q), -1, dtype=np.int8), self.start
        own = self.convexify(state, start.point, start.form, plans.root, start.bound)
        value, point, step = self.bound(state, own)
        lacking = self.cutoff - value
        near = lacking <= _NEAR * self.cost
        near |= self.task.values is not None and lacking <= self.lacks / 2
        if not value > least_open or not (near or plans.anyway):
            return open_nodes
        self.plans, self.root = plans, step
        self.proven = value
        free = int((state < 0).sum())
        return [Node(value, next(self.order), state, point, own, free, 1, step)]

    def _due(self, nodes: int, least_open: float) -> Plans | None:
        """What relaxations with triangles are to be tried now, if any: early, for rows whose root they nearly
        close; and once more where the tree without them has turned out to be too large."""
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


def _follow(step: Step | None, after: Step | None) -> None:
    """Where a proof is kept, `after` follows at the same node."""
    if step is not None and after is not None:
        step.then(AGAIN, after)


class Probed(NamedTuple):
    """What every legal mask below the cutoff has, the first ones of its twins being pruned.

    Attributes:
        state: 1 pruned, 0 kept, −1 free, int8 [n].
        lam: λ that makes Q + μΣ_g 1_g1_gᵀ + diag(λ) ⪰ 0 on the free inputs, float64 [n].
        bound: a lower bound of their objectives; at least the cutoff (see `BestFirst`) where there are none.
    """

    state: np.ndarray
    lam: np.ndarray
    bound: float
    cutoff: float

    @property
    def closed(self) -> bool:
        """Whether no mask is left below the cutoff."""
        return self.bound >= self.cutoff

    def allows(self, pruned: np.ndarray) -> bool:
        """Whether a mask (p, bool [n]) has the sides that were found."""
        return bool(((self.state < 0) | (self.state == pruned)).all())


def probe(tree: QuadraticTree) -> Probed:
    """Fix what can be fixed at the root of a tree, whose incumbent may become a better one."""
    root = tree.start
    state, point, form, bound = root.state.copy(), root.point, root.form, root.bound
    while bound < tree.cutoff and not tree.task.limits.expired:
        before = int((state < 0).sum())
        _fix(tree, state, point, form)
        free = int((state < 0).sum())
        if not free:  # a single mask, which this looks at
            tree.bound(state, form)
            bound = tree.cutoff
        if free in (0, before):
            break
        own = tree.convexify(state, point, form)
        again = state.copy()
        value, relaxed, _ = tree.bound(again, own)
        if value > bound:
            state, point, form, bound = again, relaxed, own, value
    return Probed(state, form.lam, bound, tree.cutoff)


def _fix(tree: QuadraticTree, state: np.ndarray, point: np.ndarray, form: Relaxed) -> None:
    """One pass over the free inputs of `state`, in place: those first that the relaxation is surest of."""
    failures = 0
    for i in np.argsort(-np.abs(point - 0.5), kind="stable"):
        if failures > _PATIENCE * len(state) or tree.task.limits.expired:
            break
        if state[i] >= 0:
            continue
        side = int(point[i] < 0.5)
        other = state.copy()
        other[i] = side
        if tree.bound(other, form)[0] >= tree.cutoff:
            state[i] = 1 - side
            failures = 0
        else:
            failures += 1
