"""Best-first branch and bound on one row, whatever its objective is.

The least open bound is the proven bound at any time. Where nodes are expensive, a few are branched on side
by side; the tree does not depend on the number of threads.
"""

from __future__ import annotations

import copy
import heapq
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from maskopt.certificates.cuts import NO_INPUT
from maskopt.certificates.proof import KINDS, LEAF, NO_FORM, RowProof
from maskopt.core.threads import one_thread_pool
from maskopt.solvers.convex.triangles import Pool
from maskopt.solvers.exact.tasks import RowAnswer, RowTask
from maskopt.solvers.exact.tree.relaxation import Relaxed

#: part of the objective (or of the value) that a node's bound is lowered by, besides the rounding of its sums
MARGIN = 1e-9
#: part of the objective by which a mask must beat the incumbent to be looked for: half of what OPTIMAL allows
WORTH = 5e-7


@dataclass(eq=False, slots=True)
class Step:
    """One bounding of a node, as a step of the proof.

    Attributes:
        form: λ and triangles; None where counts or fixings leave one mask or none.
        point: the free entries of the relaxed point.
        fixed, side: the inputs that it fixed, and their sides (1 pruned, 0 kept).
        branch, below: the steps that follow, see `then`; none: the node is open, or closed.
    """

    form: Relaxed | None = None
    point: np.ndarray = field(default_factory=lambda: np.zeros(0))
    fixed: np.ndarray = field(default_factory=lambda: np.zeros(0))
    side: np.ndarray = field(default_factory=lambda: np.zeros(0))
    branch: int = LEAF
    below: tuple[Step, ...] = ()

    def then(self, branch: int, *below: Step) -> None:
        """Set what follows: AGAIN with a step at the same node, or an input with two, pruned first."""
        self.branch, self.below = branch, below


def row_proof(root: Step, n: int, penalty: float) -> RowProof:
    """Return the tree below a step, in preorder."""
    steps: list[Step] = []
    stack = [root]
    while stack:
        step = stack.pop()
        steps.append(step)
        stack += reversed(step.below)
    forms = {id(step.form): step.form for step in steps if step.form is not None}
    number = {key: place for place, key in enumerate(forms)}
    pools = [form.pool for form in forms.values()] or [Pool.empty()]
    index, sign = (np.concatenate([getattr(pool, x) for pool in pools]) for x in ("index", "sign"))
    if (index[:, 3:] == NO_INPUT).all():  # triangles alone
        index, sign = index[:, :3], sign[:, :2]
    parts = {
        "forms": np.array([form.lam for form in forms.values()]).reshape(-1, n),
        "cuts": [len(form.pool.tau) for form in forms.values()],
        "cut_index": index,
        "cut_sign": sign,
        "multiplier": np.concatenate([pool.tau for pool in pools]),
        "form": [NO_FORM if step.form is None else number[id(step.form)] for step in steps],
        "branch": [step.branch for step in steps],
        "fixes": [len(step.fixed) for step in steps],
        "fixed": np.concatenate([step.fixed for step in steps]),
        "side": np.concatenate([step.side for step in steps]),
        "points": np.concatenate([step.point for step in steps]),
    }
    return RowProof(penalty=penalty, **{k: np.asarray(parts[k], dtype=KINDS[k]) for k in KINDS})


class Node(NamedTuple):
    """An open node. Of equal bounds the older one, by its order of creation, comes first.

    Attributes:
        state: 1 pruned, 0 kept, −1 free, int8 [n].
        point: the relaxed point, float64 [n].
        form: the convex form of its subtree in the quadratic tree, the `free` inputs where it was solved, and
            the fixings until the next (`interval`).
        step: of the proof; None where none is kept.
    """

    bound: float
    order: int
    state: np.ndarray
    point: np.ndarray
    form: Any = None
    free: int = 0
    interval: int = 0
    step: Step | None = None


class BestFirst:
    """The tree of one row. A subclass makes the root, and the children of a node.

    Attributes:
        best, cost: the incumbent.
        start, root_bound: the root, and what it proves.
        proven: a bound of every legal mask; bounds of nodes hold for masks below the cutoff alone.
        solved, convexified: relaxations that were solved, and forms that were made.
        abreast: nodes that are branched on side by side.
    """

    start: Node
    root_bound: float
    proven = 0.0
    abreast = 1

    def __init__(self, task: RowTask) -> None:
        self.task = task
        self.best, self.cost = task.start, task.cost(task.start)
        self.solved = self.convexified = 0
        self.order = itertools.count(1)

    @property
    def cutoff(self) -> float:
        """The bound from which on a node holds nothing that is worth looking for."""
        return self.cost * (1 - WORTH)

    def branch(self, node: Node) -> list[Node]:
        """Return the children of a node, in any order of creation."""
        raise NotImplementedError

    def restarted(self, open_nodes: list[Node], nodes: int) -> list[Node] | None:
        """Return the nodes that are open instead; None: go on with these."""
        return None

    def claims(self) -> dict[str, Any]:
        """Return the fields of the answer that only this objective has."""
        raise NotImplementedError

    def take(self, pruned: np.ndarray) -> None:
        """Keep a mask that beats the incumbent."""
        cost = self.task.cost(pruned)
        if cost < self.cost:
            self.best, self.cost = pruned, cost

    def search(self, threads: int = 1) -> RowAnswer:
        """Search best first, until nothing is open below the cutoff or a limit is reached.

        Several nodes are branched on in `threads` threads.
        """
        open_nodes = [self.start]
        nodes, ended, least_open = 1, "", self.start.bound
        with one_thread_pool(threads) as pool:
            try:
                while not (ended := self._limit(open_nodes, nodes)):
                    least_open = open_nodes[0].bound
                    if (again := self.restarted(open_nodes, nodes)) is not None:
                        open_nodes = again
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
            self.best,
            ended,
            # what the closed tree proves, or the least open bound
            bound=self.task.raised(max(min(least_open, self.cutoff), self.proven)),
            nodes=nodes,
            root_bound=max(min(self.root_bound, self.cutoff), self.proven),
            **self.claims(),
        )

    def _limit(self, open_nodes: list[Node], nodes: int) -> str:
        """Return the reason why the search ends; empty where it goes on."""
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

    def _branch_best(self, open_nodes: list[Node], pool: ThreadPoolExecutor | None) -> list[Node]:
        """Close the best node, or several, and return their children, found with the incumbent of before."""
        parents = [heapq.heappop(open_nodes)]
        while open_nodes and len(parents) < self.abreast:
            parents.append(heapq.heappop(open_nodes))
        views = [copy.copy(self) for _ in parents]
        for view in views:
            view.solved = view.convexified = 0
        run = map if pool is None or len(parents) == 1 else pool.map
        families = list(run(type(self).branch, views, parents))
        for view in views:
            self.solved += view.solved
            self.convexified += view.convexified
            self.take(view.best)
        # in the order of the nodes, whoever came first
        return [c._replace(order=next(self.order)) for family in families for c in family]
