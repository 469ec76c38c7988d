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

    Attributes:
        names, low, high, cost: of the variables.
        rows: (variables, coefficients, low, high).
        cone: (inside, t) for Σ x_i² ≤ x_t, or None.
        scale: units of the model in one of the objective.
        terms: Σ of the sizes of the terms that tolerances apply to, in units of the model.
        complete: the variables, float64, of a mask (p, bool [n]).
    """

    def __init__(self, task: RowTask, scale: float, twins: Iterable[np.ndarray]) -> None:
        self.task, self.scale = task, scale
        self.names: list[str] = []
        self.low: list[float] = []
        self.high: list[float] = []
        self.cost: list[float] = []
        self.rows: list[tuple[list[int], list[float], float, float]] = []
        self.cone: tuple[list[int], int] | None = None
        self.constant, self.terms = 0.0, float(np.abs(task.q * scale).sum())
        self.complete: Callable[[np.ndarray], np.ndarray] = lambda pruned: pruned.astype(float)
        self.binaries = self.variables([f"p{i}" for i in range(len(task.q))], 0.0, 1.0)
        for members in self.groups():
            self.row(members, np.ones(len(members)), task.pruned, task.pruned)
        # of twins (identical and dead inputs among them) the first ones are pruned
        for inputs in twins:
            for i, j in itertools.pairwise(inputs.tolist()):
                self.row([i, j], [1.0, -1.0], 0.0, np.inf)

    def groups(self) -> list[list[int]]:
        """Return the binaries of each group."""
        size = self.task.group
        return [self.binaries[first : first + size] for first in self.binaries[::size]]

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

    def minimise(
        self, terms: Iterable[tuple[int, float]], constant: float = 0.0, certified: float = 0.0
    ) -> None:
        """Set the linear part of the objective, and a lower bound of it that is known (0: none)."""
        variables, coefficients = zip(*terms, strict=True)
        for variable, coefficient in zip(variables, coefficients, strict=True):
            self.cost[variable] = float(coefficient)
        self.constant = constant
        if certified > 0:  # the solver need not find its cuts again
            least = certified * self.scale * (1 - _HANDED_IN)
            self.row(variables, coefficients, least - constant, np.inf)

    def pruned(self, values: Sequence[float]) -> np.ndarray:
        """Return the mask of a solution, p, bool [n]."""
        return np.asarray(values[: len(self.binaries)]) > 0.5


def factored(
    task: RowTask,
    scale: float,
    twins: list[np.ndarray],
    part: FreePart,
    lam: np.ndarray,
    certified: float,
) -> Program:
    """Return the program with A = LLᵀ, r = Lᵀp and ‖r‖² ≤ t.

    λ, float64 [n], and `part` are those of the scaled objective; `certified` is a known bound, or 0.
    """
    program, n = Program(task, scale, twins), len(task.q)
    program.low[:n] = (part.state == 1).astype(float).tolist()
    program.high[:n] = (part.state != 0).astype(float).tolist()
    value, vector = np.linalg.eigh(part.b + np.diag(lam[part.free]))
    # the lack to A ⪰ 0 goes into λ: dropping it would push the bound above the truth
    missing = max(0.0, -float(value[0]))
    linear = part.linear - lam[part.free] - missing
    value = value + missing
    keep = value > _EIGENVALUE * max(float(value[-1]), 0.0)
    root = np.zeros((n, int(keep.sum())))
    root[part.free] = vector[:, keep] * np.sqrt(value[keep])
    columns = [root[part.free, k] for k in range(root.shape[1])]
    (t,) = program.variables(["t"])
    r = program.variables(
        [f"r{k}" for k in range(len(columns))],
        [np.minimum(column, 0).sum() - FEASIBILITY for column in columns],
        [np.maximum(column, 0).sum() + FEASIBILITY for column in columns],
    )
    free = part.free.tolist()
    for variable, column in zip(r, columns, strict=True):
        program.row([*free, variable], [*column, -1.0], 0.0, 0.0)
    program.cone = r, t
    program.minimise([(t, 1.0), *zip(free, linear, strict=True)], part.constant, certified)
    program.terms += float(np.abs(linear).sum()) + abs(part.constant)

    def complete(pruned: np.ndarray) -> np.ndarray:
        image = root.T @ pruned.astype(float)
        return np.concatenate([pruned, [float(image @ image) * (1 + _ABOVE)], image])

    program.complete = complete
    return program


def linearised(task: RowTask, scale: float, twins: list[np.ndarray]) -> Program:
    """Return the program with a variable for each product that counts (McCormick), and one of the cost."""
    program, q = Program(task, scale, twins), task.q * scale
    (t,) = program.variables(["t"])
    pairs = [(j, i) for i in range(len(q)) for j in range(i) if q[i, j]]
    products = _products(program, q, pairs)
    terms = [(t, 1.0), *((i, -q[i, i]) for i in program.binaries)]
    terms += [(x, -2 * q[i, j]) for (j, i), x in products.items()]
    variables, coefficients = zip(*terms, strict=True)
    program.row(variables, coefficients, 0.0, np.inf)
    program.minimise([(t, 1.0)])

    def complete(pruned: np.ndarray) -> np.ndarray:
        p = pruned.astype(float)
        cost = float(p @ task.q @ p) * scale * (1 + _ABOVE)
        return np.concatenate([p, [cost], [p[i] * p[j] for i, j in pairs]])

    program.complete = complete
    return program


def reformulated(task: RowTask, scale: float) -> Program:
    """Return the program with a variable for each product, and the reformulation-linearisation equations.

    Since 1_gᵀp = s in every group g, multiplying it by p_i gives Σ_{j∈g} x_ij = s·p_i (x_ii = p_i). They are
    far tighter than x_ij ≥ p_i + p_j − 1 alone.
    """
    program, q = Program(task, scale, []), task.q * scale
    pairs = list(itertools.combinations(program.binaries, 2))
    x = _products(program, q, pairs)
    for members, i in itertools.product(program.groups(), program.binaries):
        others = [x[min(i, j), max(i, j)] for j in members if j != i]
        share = task.pruned - (1.0 if i in members else 0.0)
        program.row([*others, i], [*np.ones(len(others)), -share], 0.0, 0.0)
    terms = [(i, q[i, i]) for i in program.binaries]
    program.minimise(terms + [(product, 2 * q[pair]) for pair, product in x.items()])
    program.complete = lambda p: np.array([*p, *(p[i] & p[j] for i, j in pairs)], dtype=float)
    return program


def _products(
    program: Program, q: np.ndarray, pairs: list[tuple[int, int]]
) -> dict[tuple[int, int], int]:
    """Add a variable for p_i p_j of every pair, and the rows that its sign in the objective calls for."""
    numbers = program.variables([f"x{j}_{i}" for j, i in pairs], 0.0, 1.0)
    for (j, i), x in zip(pairs, numbers, strict=True):
        if q[i, j] > 0:
            program.row([x, i, j], [1.0, -1.0, -1.0], -1.0, np.inf)
        elif q[i, j] < 0:
            program.row([x, i], [1.0, -1.0], -np.inf, 0.0)
            program.row([x, j], [1.0, -1.0], -np.inf, 0.0)
    return dict(zip(pairs, numbers, strict=True))
