"""A row as a mixed-integer program, which SCIP, Gurobi and HiGHS translate: its formulations.

With A = Q + diag(λ) + μΣ_g 1_g1_gᵀ ⪰ 0 (λ = μ = 0: A = Q), every legal p ∈ {0,1}ⁿ has

    f(p) = pᵀAp − λᵀp − μΣ_g (2s·1_gᵀp − s²)       (s pruned in each group)

since p_i² = p_i and 1_gᵀp = s; where inputs are fixed, A is that of the others (`free_part`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from maskopt.solvers.exact.tasks import RowAnswer, RowTask, UpdatedTask
from maskopt.solvers.exact.tree.node import FreePart

#: feasibility tolerance of SCIP (numerics/feastol) and HiGHS, absolute in the units of the model
FEASIBILITY = 1e-6
#: relative gap up to which the `optimal` of Gurobi and HiGHS is one, and not the gap limit that was reached
CLOSED = 1e-9
#: part of the greatest eigenvalue of A below which one is rounding, and no variable is made for it
_EIGENVALUE = 1e-12
#: part by which a bound that is handed in stays below its value: a tolerance must not refuse the optimum
_HANDED_IN = 1e-6
#: part by which the left sides of cones lie below their right sides: the rounding of a solver's own sum
ABOVE = 1e-12
#: part by which v may pass its bounds: what they are computed with rounds, too
_WIDER = 1e-6


class Program:
    """min costᵀx + x_SᵀQx_S + constant over n binaries, one of each input, and further variables.

    Attributes:
        names, low, high, cost: of the variables; the binaries are the first.
        of_kept: the binaries are 1 for kept inputs, not for pruned ones; `count` of them in every group.
        rows: (variables, coefficients, low, high).
        cones: (inside, u, z) for Σ x_i² ≤ x_u x_z; z None: Σ x_i² ≤ x_u.
        square: (S, Q), S a slice of the variables; None: the objective is linear.
        scale: units of the model in one of the objective.
        terms: Σ of the sizes of the terms that tolerances apply to, in units of the model.
        complete: the variables, float64, of a mask (p, bool [n]).
    """

    def __init__(
        self, task: RowTask, scale: float, twins: Iterable[np.ndarray], *, of_kept: bool = False
    ) -> None:
        self.task, self.scale, self.of_kept = task, scale, of_kept
        self.names: list[str] = []
        self.low: list[float] = []
        self.high: list[float] = []
        self.cost: list[float] = []
        self.rows: list[tuple[list[int], list[float], float, float]] = []
        self.cones: list[tuple[list[int], int, int | None]] = []
        self.square: tuple[slice, np.ndarray] | None = None
        self.constant, self.terms = 0.0, float(np.abs(task.q * scale).sum())
        self.complete: Callable[[np.ndarray], np.ndarray] = lambda pruned: pruned.astype(float)
        n, letter = len(task.q), "z" if of_kept else "p"
        self.binaries = self.variables([f"{letter}{i}" for i in range(n)], 0.0, 1.0)
        self.count = task.group - task.pruned if of_kept else task.pruned
        for members in self.groups():
            self.row(members, np.ones(len(members)), self.count, self.count)
        # of twins (identical and dead inputs among them) the first ones are pruned
        for known in twins:
            for i, j in itertools.pairwise(known.tolist()):
                self.row([i, j], [1.0, -1.0], 0.0, np.inf)

    def groups(self) -> list[list[int]]:
        """The binaries of each group."""
        size = self.task.group
        return [self.binaries[first : first + size] for first in self.binaries[::size]]

    def variables(
        self, names: Sequence[str], low: ArrayLike = 0.0, high: ArrayLike = np.inf
    ) -> list[int]:
        """New ones of no cost; their numbers."""
        first, count = len(self.names), len(names)
        self.names += names
        self.low += np.broadcast_to(low, count).tolist()
        self.high += np.broadcast_to(high, count).tolist()
        self.cost += [0.0] * count
        return list(range(first, first + count))

    def row(
        self, variables: Iterable[int], coefficients: Iterable[float], low: float, high: float
    ) -> None:
        """low ≤ Σ coefficients · variables ≤ high; equal, or one of them infinite."""
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
        """The mask of a solution, p, bool [n]."""
        return (np.asarray(values[: len(self.binaries)]) > 0.5) != self.of_kept

    def answer(
        self, pruned: np.ndarray, ended: str, bound: float, slack: float, nodes: int
    ) -> RowAnswer:
        """The answer of a solver: its mask, or the start where that is not legal. `bound`: the solver's lower
        bound in units of the model, or −∞; `slack`: how far tolerances can raise it, in units of the
        objective."""
        task = self.task
        known = task.raised(bound / self.scale, slack) if np.isfinite(bound) else 0.0
        return RowAnswer(
            pruned if task.is_legal(pruned) else task.start,
            ended,
            bound=max(task.certified, known),
            slack=slack,
            nodes=nodes,
        )


def factored(
    task: RowTask,
    scale: float,
    twins: list[np.ndarray],
    part: FreePart,
    lam: np.ndarray,
    certified: float,
) -> Program:
    """A = LLᵀ, r = Lᵀp, ‖r‖² ≤ t; λ float64 [n] and `part` of the scaled objective, `certified` a known bound
    or 0."""
    program, n = Program(task, scale, twins), len(task.q)
    program.low[:n] = (part.state == 1).astype(float).tolist()
    program.high[:n] = (part.state != 0).astype(float).tolist()
    value, vector = np.linalg.eigh(part.b + np.diag(lam[part.free]))
    # what is missing to A ⪰ 0 goes into λ: dropping it would push the bound above the truth
    missing = max(0.0, -float(value[0]))
    linear = part.linear - lam[part.free] - missing
    half = _root(value + missing, vector)
    root = np.zeros((n, half.shape[1]))
    root[part.free] = half
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
    program.cones.append((r, t, None))
    program.minimise([(t, 1.0), *zip(free, linear, strict=True)], part.constant, certified)
    program.terms += float(np.abs(linear).sum()) + abs(part.constant)

    def complete(pruned: np.ndarray) -> np.ndarray:
        image = root.T @ pruned.astype(float)
        return np.concatenate([pruned, [float(image @ image) * (1 + ABOVE)], image])

    program.complete = complete
    return program


def quadratic(task: RowTask, scale: float, twins: list[np.ndarray]) -> Program:
    """The objective pᵀQp itself."""
    program = Program(task, scale, twins)
    program.square = slice(0, len(task.q)), task.q * scale
    return program


def linearised(task: RowTask, scale: float, twins: list[np.ndarray]) -> Program:
    """One variable for each product that counts (McCormick), and one for the objective."""
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
        cost = float(p @ task.q @ p) * scale * (1 + ABOVE)
        return np.concatenate([p, [cost], [p[i] * p[j] for i, j in pairs]])

    program.complete = complete
    return program


def reformulated(task: RowTask, scale: float) -> Program:
    """One variable for each product, and the reformulation-linearisation equations: since 1_gᵀp = s in every
    group g, multiplying it by p_i gives Σ_{j∈g} x_ij = s·p_i (x_ii = p_i). They are far tighter than
    x_ij ≥ p_i + p_j − 1 alone."""
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
    """A variable for p_i p_j of every pair, and what its sign in the objective makes necessary."""
    numbers = program.variables([f"x{j}_{i}" for j, i in pairs], 0.0, 1.0)
    for (j, i), x in zip(pairs, numbers, strict=True):
        if q[i, j] > 0:
            program.row([x, i, j], [1.0, -1.0, -1.0], -1.0, np.inf)
        elif q[i, j] < 0:
            program.row([x, i], [1.0, -1.0], -np.inf, 0.0)
            program.row([x, j], [1.0, -1.0], -np.inf, 0.0)
    return dict(zip(pairs, numbers, strict=True))


def perspective(task: UpdatedTask, *, convex: bool) -> Program:
    """Of updated weights, in units in which the start costs a thousand: v is √scale of what it was.

    With A = B + diag(d), B = LLᵀ, z the kept inputs, v* = A⁻¹b the dense optimum, F* its cost and r = Lᵀ(v −
    v*),

        min  F* + t + Σ dⱼ(uⱼ − 2v*ⱼvⱼ + v*ⱼ²),     ‖r‖² ≤ t,   vⱼ² ≤ uⱼzⱼ,   Σ z = as many as are kept:

    tolerances are parts of the numbers in a model, and these are of the order of F, not of C. `convex`: the
    objective itself, vᵀBv + dᵀu − 2bᵀv + C, for a solver that takes convex ones.
    """
    n, scale = len(task.target), task.unit_scale
    program, root = Program(task, scale, [], of_kept=True), np.sqrt(scale)
    dense = np.linalg.solve(task.q, task.target)
    least = task.constant - float(task.target @ dense)
    dense *= root
    low, high = (root * side for side in _between(task))
    program.terms = _reached(task, low, high)
    z, v = program.binaries, program.variables([f"v{j}" for j in range(n)], low, high)
    u = program.variables([f"u{j}" for j in range(n)])
    for j in range(n):
        program.row([v[j], z[j]], [1.0, -high[j]], -np.inf, 0.0)
        program.row([v[j], z[j]], [1.0, -low[j]], 0.0, np.inf)
        program.cones.append(([v[j]], u[j], z[j]))
    rest = task.q - np.diag(task.split)
    if convex:
        program.square = slice(n, 2 * n), rest
        slope = -2 * root * task.target
        program.minimise(
            [*zip(u, task.split, strict=True), *zip(v, slope, strict=True)], scale * task.constant
        )
        program.complete = lambda pruned: (~pruned).astype(float)
        return program
    factor = _root(*np.linalg.eigh(rest))
    reach = np.maximum(np.abs(low - dense), np.abs(high - dense))
    columns = [factor[:, k] for k in range(factor.shape[1])]
    most = np.array([float(np.abs(column) @ reach) + FEASIBILITY for column in columns])
    r = program.variables([f"r{k}" for k in range(len(columns))], -most, most)
    for variable, column in zip(r, columns, strict=True):
        shift = float(column @ dense)
        program.row([*v, variable], [*column, -1.0], shift, shift)
    (t,) = program.variables(["t"])
    program.cones.append((r, t, None))
    terms = [(t, 1.0)]
    for j in range(n):
        terms += [(u[j], task.split[j]), (v[j], -2 * dense[j] * task.split[j])]
    constant = float(task.split @ dense**2) + scale * least
    program.minimise(terms, constant, task.certified)

    def complete(pruned: np.ndarray) -> np.ndarray:
        weights = task.weights(pruned) * root
        image = factor.T @ (weights - dense)
        norm = float(image @ image) * (1 + ABOVE)
        return np.concatenate([~pruned, weights, weights**2 * (1 + ABOVE), image, [norm]])

    program.complete = complete
    return program


def _root(value: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """L with LLᵀ = the matrix of these eigenvalues (ascending), but for what is rounding."""
    keep = value > _EIGENVALUE * max(float(value[-1]), 0.0)
    return np.asarray(vector[:, keep] * np.sqrt(value[keep]))


def _between(task: UpdatedTask) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of v, and 0, where F is at most that of the start: |v − v*|ⱼ ≤ √((F − F*)(A⁻¹)ⱼⱼ)."""
    inverse = np.linalg.inv(task.q)
    dense = inverse @ task.target
    above = task.cost(task.start) - (task.constant - float(task.target @ dense))
    half = np.sqrt(np.maximum(above, 0.0) * np.diagonal(inverse))
    wider = _WIDER * (np.abs(dense) + half).max()
    return np.minimum(dense - half - wider, 0.0), np.maximum(dense + half + wider, 0.0)


def _reached(task: UpdatedTask, low: np.ndarray, high: np.ndarray) -> float:
    """The sum of the sizes that tolerances are parts of, with v between `low` and `high`. A z that is off by
    one pays for a vⱼ with ∂ⱼ²/dⱼ, ∂ being the slope of what d leaves."""
    target = np.abs(task.target) * np.sqrt(task.unit_scale)
    reach = np.maximum(-low, high)
    slope = target + np.abs(task.q - np.diag(task.split)) @ reach
    return float(reach @ reach + target @ reach + (slope**2 / task.split).sum())
