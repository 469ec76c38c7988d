"""The formulations of a row as a mixed-integer program of a linear objective, for SCIP and HiGHS.

With A = Q + diag(λ) + μΣ_g 1_g1_gᵀ ⪰ 0 (λ = μ = 0: A = Q), every legal p ∈ {0,1}ⁿ has

    f(p) = pᵀAp − λᵀp − μΣ_g (2s·1_gᵀp − s²)       (s pruned in each group)

since p_i² = p_i and 1_gᵀp = s; where inputs are fixed, A is that of the others (`FreePart`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from maskopt.solvers.exact.tasks import RowTask
from maskopt.solvers.exact.tree.node import FreePart

#: feasibility tolerance of SCIP (numerics/feastol) and HiGHS, absolute in the units of the model
FEASIBILITY = 1e-6
#: part of the greatest eigenvalue of A below which one is rounding, and no variable is made for it
_EIGENVALUE = 1e-12
#: part by which a bound that is handed in stays below its value: a tolerance must not refuse the optimum
_HANDED_IN = 1e-6
#: part by which t is above what it bounds: the rounding of a solver's own sum
_ABOVE = 1e-12


class Program:
    """A program min costᵀx + constant over a binary p of each input, the first variables, and further ones.

    One of the three formulations completes it: `factor`, `linearise` or `reformulate`.

    Attributes:
        names, low, high, cost: of the variables.
        rows: (variables, coefficients, low, high).
        cone: (inside, t) for Σ x_i² ≤ x_t, or None.
        scale: units of the model in one of the objective; `q` is Q in these.
        terms: Σ of the sizes of the terms that tolerances apply to, in units of the model.
        complete: the variables, float64, of a mask (p, bool [n]).
    """

    complete: Callable[[np.ndarray], np.ndarray]

    def __init__(self, task: RowTask, scale: float) -> None:
        self.task, self.scale, self.q = task, scale, task.q * scale
        self.names: list[str] = []
        self.low: list[float] = []
        self.high: list[float] = []
        self.cost: list[float] = []
        self.rows: list[tuple[list[int], list[float], float, float]] = []
        self.cone: tuple[list[int], int] | None = None
        self.constant, self.terms = 0.0, float(np.abs(self.q).sum())
        self.binaries = self.variables([f"p{i}" for i in range(len(task.q))], high=1.0)
        self.groups = [self.binaries[i : i + task.group] for i in self.binaries[:: task.group]]
        for members in self.groups:
            self.row(members, np.ones(task.group), task.pruned, task.pruned)

    def order_twins(self) -> None:
        """Prune the first ones of twins, identical and dead inputs among them."""
        for inputs in self.task.twins:
            for i, j in itertools.pairwise(inputs.tolist()):
                self.row([i, j], [1.0, -1.0], 0.0, np.inf)

    def variables(
        self, names: Sequence[str], low: ArrayLike = 0.0, high: ArrayLike = np.inf
    ) -> list[int]:
        """Add variables of no cost, and return their numbers."""
        first, count = len(self.names), len(names)
        self.names += names
        self.low += np.broadcast_to(low, count).tolist()
        self.high += np.broadcast_to(high, count).tolist()
        self.cost += [0.0] * count
        return list(range(first, first + count))

    def row(
        self, variables: Iterable[int], coefficients: Iterable[float], low: float, high: float
    ) -> None:
        """Add low ≤ Σ coefficients · variables ≤ high, both equal, or one of them infinite."""
        self.rows.append((list(variables), [float(c) for c in coefficients], low, high))

    def allows(self, pruned: np.ndarray) -> bool:
        """Return whether a mask (p, bool [n]) is within the bounds of its variables."""
        low, high = np.array(self.low[: len(pruned)]), np.array(self.high[: len(pruned)])
        return bool(((low <= pruned) & (pruned <= high)).all())

    def pruned(self, values: Sequence[float]) -> np.ndarray:
        """Return the mask of a solution, p, bool [n]."""
        return np.asarray(values[: len(self.binaries)]) > 0.5

    def factor(self, part: FreePart, lam: np.ndarray, certified: float) -> None:
        """Minimise ‖r‖² ≤ t and the linear part, with A = LLᵀ and r = Lᵀp.

        λ, float64 [n], and `part` are those of the scaled objective; `certified` is a known bound, or 0.
        """
        n, free = len(part.state), part.free.tolist()
        self.low[:n] = (part.state == 1).astype(float).tolist()
        self.high[:n] = (part.state != 0).astype(float).tolist()
        value, vector = np.linalg.eigh(part.b + np.diag(lam[part.free]))
        # the lack to A ⪰ 0 goes into λ: dropping it would push the bound above the truth
        missing = max(0.0, -float(value[0]))
        linear = part.linear - lam[part.free] - missing
        value = value + missing
        keep = value > _EIGENVALUE * max(float(value[-1]), 0.0)
        root = np.zeros((n, int(keep.sum())))
        root[part.free] = vector[:, keep] * np.sqrt(value[keep])
        columns = np.ascontiguousarray(root[part.free].T)
        (t,) = self.variables(["t"])
        low = [np.minimum(column, 0).sum() - FEASIBILITY for column in columns]
        high = [np.maximum(column, 0).sum() + FEASIBILITY for column in columns]
        r = self.variables([f"r{k}" for k in range(len(columns))], low, high)
        for variable, column in zip(r, columns, strict=True):
            self.row([*free, variable], [*column, -1.0], 0.0, 0.0)
        self.cone, self.constant = (r, t), part.constant
        self.terms += float(np.abs(linear).sum()) + abs(part.constant)
        variables, coefficients = [t, *free], [1.0, *linear.tolist()]
        self._set_costs(variables, coefficients)
        if certified > 0:  # the solver need not find its cuts again
            least = certified * self.scale * (1 - _HANDED_IN)
            self.row(variables, coefficients, least - part.constant, np.inf)

        def complete(pruned: np.ndarray) -> np.ndarray:
            image = root.T @ pruned.astype(float)
            return np.concatenate([pruned, [float(image @ image) * (1 + _ABOVE)], image])

        self.complete = complete

    def linearise(self) -> None:
        """Minimise a variable of the cost, with a variable for each product that counts (McCormick)."""
        (t,) = self.variables(["t"])
        pairs = [(j, i) for i in self.binaries for j in range(i) if self.q[i, j]]
        products = self._products(pairs)
        coefficients = [-2 * self.q[i, j] for j, i in pairs]
        diagonal = (-self.q.diagonal()).tolist()
        self.row([t, *self.binaries, *products], [1.0, *diagonal, *coefficients], 0.0, np.inf)
        self._set_costs([t], [1.0])

        def complete(pruned: np.ndarray) -> np.ndarray:
            p = pruned.astype(float)
            cost = float(p @ self.task.q @ p) * self.scale * (1 + _ABOVE)
            return np.concatenate([p, [cost], [p[i] * p[j] for i, j in pairs]])

        self.complete = complete

    def reformulate(self) -> None:
        """Minimise over a variable for each product, with the reformulation-linearisation equations.

        Since 1_gᵀp = s in every group g, multiplying it by p_i gives Σ_{j∈g} x_ij = s·p_i (x_ii = p_i). They
        are far tighter than x_ij ≥ p_i + p_j − 1 alone.
        """
        pairs = list(itertools.combinations(self.binaries, 2))
        products = self._products(pairs)
        x = dict(zip(pairs, products, strict=True))
        for members, i in itertools.product(self.groups, self.binaries):
            others = [x[min(i, j), max(i, j)] for j in members if j != i]
            share = self.task.pruned - (1.0 if i in members else 0.0)
            self.row([*others, i], [*np.ones(len(others)), -share], 0.0, 0.0)
        self._set_costs(self.binaries, self.q.diagonal())
        self._set_costs(products, [2 * self.q[pair] for pair in pairs])
        self.complete = lambda p: np.array([*p, *(p[i] & p[j] for i, j in pairs)], dtype=float)

    def _set_costs(self, variables: Iterable[int], costs: Iterable[float]) -> None:
        for variable, cost in zip(variables, costs, strict=True):
            self.cost[variable] = float(cost)

    def _products(self, pairs: list[tuple[int, int]]) -> list[int]:
        """Add a variable for p_i p_j of every pair, and the rows that its sign in the objective calls for."""
        numbers = self.variables([f"x{j}_{i}" for j, i in pairs], high=1.0)
        for (j, i), x in zip(pairs, numbers, strict=True):
            if self.q[i, j] > 0:
                self.row([x, i, j], [1.0, -1.0, -1.0], -1.0, np.inf)
            elif self.q[i, j] < 0:
                self.row([x, i], [1.0, -1.0], -np.inf, 0.0)
                self.row([x, j], [1.0, -1.0], -np.inf, 0.0)
        return numbers
