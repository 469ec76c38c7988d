"""Branch and bound of our own: the QCR form of the SDP duals, a convex QP at every node.

At the root the semidefinite bound gives λ, μ with A = Q + diag(λ) + μΣ_g 1_g1_gᵀ ⪰ 0, and
f(p) = pᵀAp + cᵀp + const on every legal p (Billionnet, Elloumi, Plateau 2009). A node fixes some
p_i; its bound is the Frank–Wolfe bound of that convex QP over what is left of the polytope, at a
point found by an interior-point method: valid at any point, so nothing depends on its convergence.
Inputs that cannot change sides without passing the incumbent are fixed by the same linear form.

As inputs are fixed, the λ of the root is less and less the best one. Every few levels a node's own
semidefinite relaxation is solved again (`reconvex`), and its subtree uses that λ: one to two orders
of magnitude fewer nodes. The tree is searched best first, which makes the least open bound the
proven bound at any time. With `proof` it is kept, as a proof that needs no trust in any of this.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor

import maskopt
from maskopt.errors import OptionError
from maskopt.fields import option
from maskopt.limits import Limits
from maskopt.problem import LayerProblem
from maskopt.solution import Solution
from maskopt.solver import Capabilities
from maskopt.solvers.exact.duals import Duals, qcr_duals, same_group
from maskopt.solvers.exact.incumbent import tabu_row, with_incumbent
from maskopt.solvers.exact.node import bound_node, settle
from maskopt.solvers.exact.proof_tree import Step, nothing_known, row_proof
from maskopt.solvers.exact.reconvex import multipliers, start_vectors
from maskopt.solvers.exact.refit_rows import solve_refitted
from maskopt.solvers.exact.refit_tree import search_refitted
from maskopt.solvers.exact.rows import RowAnswer, RowSolver, RowTask

#: part of the objective that a node's bound is lowered by: far above the rounding of float64 sums
_MARGIN = 1e-9
#: part of the objective by which a mask must beat the incumbent to be looked for: half of what OPTIMAL allows
_WORTH = 5e-7
#: part of the step from a value to the next that a bound must pass the value below by
_ROOM = 1e-6
#: part of Σ Q_ii below which an incumbent costs nothing, and is optimal
_NOTHING = 1e-13
#: fixings after which a node's semidefinite relaxation is solved again; doubled where that failed
_INTERVAL, _LONGEST_INTERVAL = 5, 10
#: sweeps of coordinate descent at such a node, and at the root
_SWEEPS, _ROOT_SWEEPS = 150, 2000
#: rounded points up to this part above the incumbent are searched, by so many moves of tabu search
_PROMISING, _POLISH = 1.02, 30


@dataclass(frozen=True)
class BranchTask(RowTask):
    """A row for `Branch`; see its options `candidates` and `proof`."""

    candidates: int = 1
    proof: bool = False


@dataclass(frozen=True)
class Branch(RowSolver):
    """Exact for up to about 192 inputs; beyond, a gap within the time limit. Tells a `TreeTrace`.

    Of refitted weights by the perspective relaxation (`solvers/exact/refit_tree.py`), up to about 64.
    """

    name: ClassVar[str] = "branch"
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=("cpu",),
        start="needed",
        default_start="wanda",
        proves="optimality",
        largest_n=256,
        refit=True,
        note="branch and bound on the QCR form of the SDP bound; proves up to about 192 inputs, of "
        "refitted weights 64",
    )

    candidates: int = option(
        1, "inputs whose two children are both bounded before one is branched on", least=1
    )
    proof: bool = option(
        False, "keep the tree of every row in the solution, as a proof that `verify` checks"
    )

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        """See `Solver.run`."""
        assert start is not None
        word = f"branch of maskopt {maskopt.__version__}"
        if problem.refit is not None:
            if self.proof:
                raise OptionError(
                    "branch: the tree of refitted weights is not kept; leave `proof` out"
                )
            return solve_refitted(self, problem, start, limits, search_refitted, word)
        own = {"candidates": self.candidates, "proof": self.proof}
        return self.solve_rows(problem, start, limits, search_row, word, BranchTask, **own)


def search_row(task: BranchTask) -> RowAnswer:
    """Incumbent, duals, tree; what the time leaves undone is left out."""
    task = with_incumbent(task)
    best, cost = task.start, task.cost(task.start)
    proof = nothing_known(len(task.q)) if task.proof else None
    if task.pruned in (0, task.group):
        return RowAnswer(best, "optimal", bound=cost, root_bound=cost, proof=proof)
    if cost <= _NOTHING * float(np.trace(task.q)):
        return RowAnswer(best, "optimal", proof=proof)
    if task.limits.expired:
        return RowAnswer(best, "timelimit")
    duals = qcr_duals(task)
    certified = RowAnswer(
        best,
        "timelimit",
        bound=duals.certified,
        root_bound=duals.certified,
        certificate=duals.certificate,
        certified=duals.certified,
    )
    if task.limits.expired:
        return certified
    try:
        tree = Tree(task, duals)
    except KeyboardInterrupt:
        return replace(certified, ended="userinterrupt")
    return tree.search()


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
    step: Step | None
    """Of the proof; None where none is kept."""


class Tree:
    """The tree of one row, from the duals at its root.

    Attributes:
        best, cost: the incumbent.
        proven: the bound of the root, which holds for every legal mask. (Bounds below it, and that of a
            root whose inputs are fixed by reduced costs, hold for masks below the cutoff alone.)
    """

    def __init__(self, task: BranchTask, duals: Duals) -> None:
        self.task, self.duals, self.mu = task, duals, duals.penalty
        self.best, self.cost = task.start, task.cost(task.start)
        self.solved = self.convexified = 0
        n = len(task.q)
        self.same = same_group(task)
        self.base = np.ascontiguousarray(task.q + self.mu * self.same)
        self.constant = self.mu * (n // task.group) * task.pruned**2
        self.reach = float(np.sqrt(np.abs(task.q.diagonal())).sum()) ** 2
        self.order = itertools.count()
        # the sweeps at the root are cheap, and every node below starts from their vectors
        state, point = np.full(n, -1, dtype=np.int8), np.full(n, task.pruned / task.group)
        vectors = start_vectors(n, task.limits.seed)
        own, vectors = self._convexify(state, point, vectors, _ROOT_SWEEPS)
        lam = duals.with_margin(task)
        value, point, first = self.bound(state, lam)
        self.proven = max(value, duals.certified * (1 - _MARGIN))
        again = state.copy()
        other, relaxed, second = self.bound(again, own)
        step = first
        if other > value:
            value, point, state, lam, step = other, relaxed, again, own, second
            _follow(first, second)
        self.root = first
        self.start = _Node(
            max(value, self.proven),
            next(self.order),
            state,
            point,
            _Form(lam, vectors, n, _INTERVAL),
            step,
        )

    @property
    def cutoff(self) -> float:
        """A node of at least this bound holds nothing better than the incumbent."""
        values, worth = self.task.values, _WORTH * self.cost
        if values is None:
            return self.cost - worth
        return min(self.cost - worth, self.cost - values.step * (1 - _ROOM) + worth)

    def _raised(self, value: float) -> float:
        """A bound of f, raised to the next value that f can take."""
        return value if self.task.values is None else self.task.values.at_least(value)

    def bound(self, state: np.ndarray, lam: np.ndarray) -> tuple[float, np.ndarray, Step | None]:
        """The node's bound and relaxed point, and its step of the proof; fixes inputs of `state` in place."""
        task = self.task
        c = self._linear(lam)
        margin = self._margin(c)
        self.solved += 1
        cutoff = self.cutoff + margin
        settled = state.copy()
        value, point = bound_node(
            self.base, lam, c, self.constant, task.group, task.pruned, state, cutoff
        )
        self._round(point, state)
        step = None
        if task.proof:
            sound = settle(settled, task.group, task.pruned)
            step = Step.of(lam, point, settled, state) if sound else Step.single()
        return value - margin, point, step

    def _linear(self, lam: np.ndarray) -> np.ndarray:
        """c of pᵀAp + cᵀp + constant."""
        return -lam - 2 * self.mu * self.task.pruned

    def _margin(self, c: np.ndarray) -> float:
        """The rounding of a node's sums, whose terms can be far larger than the objective."""
        terms = self.reach + 4 * float(np.abs(c).sum()) + 4 * abs(self.constant)
        return _MARGIN * abs(self.cost) + 4 * (len(c) + 8) * 2.0**-53 * terms

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
            self.task.limits.deadline,
        )

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

    def search(self) -> RowAnswer:
        """Best first, until nothing is open below the cutoff or a limit is reached."""
        open_nodes = [self.start]
        nodes, ended = 1, ""
        try:
            while not (ended := self._limit(open_nodes, nodes)):
                node = heapq.heappop(open_nodes)
                try:
                    children = self._branch(node)
                except KeyboardInterrupt:
                    heapq.heappush(open_nodes, node)
                    raise
                for child in children:
                    nodes += 1
                    if child.bound < self.cutoff:
                        heapq.heappush(open_nodes, child)
        except KeyboardInterrupt:
            ended = "userinterrupt"
        least_open = open_nodes[0].bound if open_nodes else np.inf
        return RowAnswer(
            pruned=self.best,
            ended=ended,
            # what the closed tree proves, or the least open bound
            bound=self._raised(max(min(least_open, self.cutoff), self.proven)),
            slack=self._margin(self._linear(self.start.form.lam)),
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

    def _branch(self, node: _Node) -> list[_Node]:
        free = int((node.state < 0).sum())
        if free and node.form.free - free >= node.form.interval:
            node = self._strengthen(node, free)
            free = int((node.state < 0).sum())
        if not free:  # a single mask, which was looked at
            _follow(node.step, Step.single())
        if not free or node.bound >= self.cutoff:
            return []
        lam = node.form.lam
        index = np.flatnonzero(node.state < 0)
        size = np.linalg.norm(self.task.q[np.ix_(index, index)], axis=1)
        weight = size * (node.point * (1 - node.point))[index]
        chosen: list[_Node] = []
        best = -np.inf
        for i in index[np.argsort(-weight, kind="stable")[: self.task.candidates]]:
            pair = []
            for side in (1, 0):
                state = node.state.copy()
                state[i] = side
                bound, point, step = self.bound(state, lam)
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

    def _strengthen(self, node: _Node, free: int) -> _Node:
        """The node with the λ of its own semidefinite relaxation, where that proves more."""
        lam, vectors = self._convexify(node.state, node.point, node.form.vectors, _SWEEPS)
        state = node.state.copy()
        value, point, step = self.bound(state, lam)
        if value <= node.bound:
            # not converged: try again further down, from better vectors
            wait = min(2 * node.form.interval, _LONGEST_INTERVAL)
            return node._replace(form=_Form(node.form.lam, vectors, free, wait))
        _follow(node.step, step)
        return _Node(value, node.order, state, point, _Form(lam, vectors, free, _INTERVAL), step)


def _follow(step: Step | None, after: Step | None) -> None:
    """Where a proof is kept, `after` follows at the same node."""
    if step is not None and after is not None:
        step.again(after)
