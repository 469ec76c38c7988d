"""A node of the quadratic tree: multipliers that make f convex there, and the bound of the convex program.

At the root the duals of the semidefinite bound `sdp` are multipliers λ and μ with A = Q + diag(λ) +
μΣ_g 1_g1_gᵀ ⪰ 0 (QCR). A node has fixed some p_i, and its own semidefinite relaxation is stronger than that
of the root with the same inputs fixed, because λ was optimal for the root alone. Only λ changes: λ_i(p_i² −
p_i) vanishes on fixed inputs, and the penalty μ stays, so a node carries one vector. The relaxation is solved
by the mixing method (`convex.mixing`), warm from the vectors of the node above.

The bound of a node is the Frank–Wolfe bound of

    min pᵀAp + cᵀp + constant,   over {0 ≤ p ≤ 1, Σ over each group = s, fixings},

at a point that the interior-point method finds on the free inputs alone. It holds at every point, so that
nothing depends on how far the method came, which stops as soon as its point decides what becomes of the node.
Of twins, inputs that may be exchanged without any change, the first ones are pruned.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from maskopt.certificates.certificate import Certificate
from maskopt.core.clock import clock
from maskopt.core.pattern import NM, Unstructured
from maskopt.core.problem import LayerProblem
from maskopt.protocol.bounds import lower_bound
from maskopt.solvers.convex.interior_point import minimise
from maskopt.solvers.convex.mixing import DOUBLE_N, correction, sweep_matrix
from maskopt.solvers.convex.mixing_kernel import LANES
from maskopt.solvers.exact.tasks import RowAnswer, RowTask, in_order

#: part of the bound that a stage of the semidefinite relaxation must gain for another one to follow
_TOLERANCE, _ROUGH = 1e-3, 0.05
#: share of the time of a row that the relaxation may use; the tree has the rest
_SHARE = 0.5
#: part of Σ|A_ii| that is added to a least eigenvalue of A: the rounding of a factorisation cannot eat it
_MARGIN = 1e-12
#: sweeps between two looks at the clock
_CHUNK = 200
#: least correction of λ, in units of the mean diagonal entry; and the least weight of an input in one
LEAST_SHIFT, LEAST_WEIGHT = 1e-9, 1e-6
#: unit roundoff of float64
_U = 2.0**-53
#: stop where the gap to the bound is this part of the cutoff; or this part of what the relaxed value lies
#: below it: the node cannot be cut off, and what is left to gain does not matter
_SETTLED, _HOPELESS = 1e-5, 0.02


class Duals(NamedTuple):
    """λ, float64 [n], and μ of the root, the lower bound that they prove, and the certificate of that."""

    diagonal: np.ndarray
    penalty: float
    certified: float
    certificate: Certificate | None

    @classmethod
    def none(cls, n: int) -> Duals:
        return cls(np.zeros(n), 0.0, 0.0, None)

    def answer(self, pruned: np.ndarray, ended: str, bound: float | None = None) -> RowAnswer:
        """Return an answer with this certificate, and with a bound of the row; None: what the duals prove."""
        bound = self.certified if bound is None else bound
        return RowAnswer(
            pruned,
            ended,
            bound=bound,
            root_bound=bound,
            certificate=self.certificate,
            certified=self.certified,
        )

    def with_margin(self, form: Form) -> np.ndarray:
        """Return λ, raised so far that A ⪰ 0 also in the rounding of a factorisation."""
        a = form.matrix + np.diag(self.diagonal)
        least = float(np.linalg.eigvalsh(a)[0])
        return self.diagonal + max(0.0, -least) + _MARGIN * float(np.abs(np.diag(a)).sum())


class Form(NamedTuple):
    """The function pᵀ·matrix·p + linearᵀp + constant of all inputs, matrix float64 [n, n]."""

    matrix: np.ndarray
    linear: np.ndarray
    constant: float


class FreePart(NamedTuple):
    """A form as xᵀbx + linearᵀx + constant of the free inputs of a node.

    Attributes:
        state: 1 pruned, 0 kept, −1 free, int8 [n].
        free: the free inputs, int64 [m].
    """

    state: np.ndarray
    free: np.ndarray
    b: np.ndarray
    linear: np.ndarray
    constant: float

    @classmethod
    def of(cls, form: Form, state: np.ndarray) -> FreePart:
        free = np.flatnonzero(state < 0)
        ones = (state == 1).astype(float)
        image = form.matrix @ ones
        linear = (2 * image + form.linear)[free]
        constant = form.constant + float(ones @ (image + form.linear))
        return cls(state, free, form.matrix[np.ix_(free, free)], linear, constant)


def with_penalty(q: np.ndarray, mu: float, task: RowTask) -> Form:
    """Return pᵀQp + μΣ_g (1_gᵀp − s)² for the groups and the count s of a row."""
    group = np.arange(len(q)) // task.group
    linear = np.full(len(q), -2 * mu * task.pruned)
    constant = mu * (len(q) // task.group) * task.pruned**2
    return Form(q + mu * (group[:, None] == group), linear, constant)


def qcr_duals(task: RowTask) -> Duals:
    """Return the duals of the bound `sdp`, within half of the time that the row has left."""
    n, kept = len(task.q), task.group - task.pruned
    pattern = Unstructured(keep=kept) if task.group == n else NM(keep=kept, of=task.group)
    gram = torch.from_numpy((task.q + task.q.T) / 2)
    problem = LayerProblem(torch.ones(1, n, dtype=torch.float64), gram, pattern, assume_psd=True)
    tolerance = _TOLERANCE if task.values is None else _ROUGH
    bound = lower_bound(problem, "sdp", tolerance=tolerance, limits=task.limits.share(_SHARE))
    proof = bound.certificate
    assert isinstance(proof, Certificate)
    diagonal, penalty = proof.diagonal[0].numpy().copy(), float(proof.penalty[0, 0])
    return Duals(diagonal, penalty, float(bound.value[0]), proof)


def definite(
    matrix: np.ndarray, weights: np.ndarray, point: np.ndarray, least: float
) -> np.ndarray:
    """Return the θd of `correction`, θ larger by `least` than eigenvalues require."""

    def enough(low: float, m: np.ndarray) -> float:
        # the residual of a computed eigenvalue is a small multiple of n·u·‖M‖
        return max(0.0, -low) + 16 * len(m) * _U * float(np.linalg.norm(m)) + least

    return correction(matrix, weights, point, enough)[0]


def start_vectors(n: int, seed: int) -> np.ndarray:
    """Return unit vectors [n, k], k ≥ √(2n) + 1 in whole registers, of the type of the sweeps at the root."""
    k = -(-(int((2 * n) ** 0.5) + 2) // LANES) * LANES
    v = np.random.default_rng(seed).standard_normal((n, k))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    return v.astype(np.float64 if n <= DOUBLE_N else np.float32)


def multipliers(
    part: FreePart, vectors: np.ndarray, point: np.ndarray, sweeps: int, deadline: float = math.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Return λ with Q + μΣ_g 1_g1_gᵀ + diag(λ) ⪰ 0 on the free inputs, and the vectors that gave it.

    Args:
        part: is used up.
        vectors: [n, k], where the sweeps start.
        point: the relaxed point of the node, float64 [n], for `definite`.
        deadline: of `clock()`, after which no further sweeps are made.
    """
    free, b = part.free, part.b
    scale = len(free) / max(float(np.trace(b)), 1e-300)
    dtype = vectors.dtype
    with np.errstate(over="ignore", invalid="ignore"):
        c = (b * (scale / 4)).astype(dtype)
        first = ((b.sum(1) + part.linear) * (scale / 4)).astype(dtype)
    v, y = vectors[free], np.empty(len(free), dtype)
    for done in range(0, sweeps, _CHUNK):
        sweep_matrix(c, first, v, y, min(_CHUNK, sweeps - done))
        if clock() >= deadline:
            break
    whole = np.zeros(len(part.state))
    if not np.isfinite(y).all():
        # what is fixed outweighs what is free beyond the type. Q alone is semidefinite
        return whole, vectors
    lam = 4 * y.astype(float) / scale - np.diag(b)
    b[np.diag_indices_from(b)] += lam
    weights = 4 * y.astype(float) + LEAST_WEIGHT
    whole[free] = lam + definite(b, weights, point[free], LEAST_SHIFT / scale)
    moved = vectors.copy()
    moved[free] = v
    return whole, moved


def bound_node(
    form: Form,
    lam: np.ndarray,
    task: RowTask,
    state: np.ndarray,
    cutoff: float,
) -> tuple[float, np.ndarray]:
    """Return the bound of a node with λ, ∞ where no legal mask is left, and its relaxed point.

    Inputs of `state` (1 pruned, 0 kept, −1 free, int8 [n]) that no mask below `cutoff` has otherwise are
    fixed in place.
    """
    if not settle(state, task):
        return np.inf, np.zeros(len(lam))
    part, point = FreePart.of(form, state), (state == 1).astype(float)
    if len(part.free) == 0:
        return part.constant, point
    # λ vanishes on fixed inputs
    part.b[np.diag_indices_from(part.b)] += lam[part.free]
    linear = part.linear - lam[part.free]
    groups = state.reshape(-1, task.group)
    size, left = (groups < 0).sum(1), task.pruned - (groups == 1).sum(1)
    counts = left[size > 0], size[size > 0]
    bound, value, point[part.free], gradient = minimise(
        part.b, linear, part.constant, *counts, cutoff, _SETTLED, _HOPELESS
    )
    if bound < cutoff and np.isfinite(value):
        slope = np.full(len(state), np.inf)
        slope[part.free] = gradient
        fix_by_slope(groups, slope.reshape(groups.shape), left, cutoff - bound, side=1)
    return bound, point


def fix_by_slope(
    groups: np.ndarray, slope: np.ndarray, left: np.ndarray, room: float, side: int
) -> None:
    """Fix inputs in place whose other side raises the least value of a linear form by `room`.

    In every group, a row of `groups` and of `slope`, that takes the `left` free inputs of least slope to
    `side`, and the others to the other side: exchanging one costs its difference from the first or last of
    the others. The slope of fixed inputs is ∞.
    """
    ranked, row = np.sort(slope, axis=1), np.arange(len(left))
    last, following = ranked[row, left - 1, None], ranked[row, left, None]
    free = groups < 0
    with np.errstate(invalid="ignore"):  # of groups without free inputs
        inside = free & (slope < following) & (following - slope >= room)
        outside = free & (slope >= following) & (slope - last >= room)
    groups[inside], groups[outside] = side, 1 - side


def settle(state: np.ndarray, task: RowTask) -> bool:
    """Fix in place what follows from the counts of the groups, and from twins, whose first ones are pruned.

    Returns False where a count cannot be reached, or twins have another order.
    """
    groups, pruned = state.reshape(-1, task.group), task.pruned
    while True:
        before = np.count_nonzero(state < 0)
        if not in_order(state, task.twins):
            return False
        ones, free = (groups == 1).sum(1), (groups < 0).sum(1)
        if (ones > pruned).any() or (ones + free < pruned).any():
            return False
        groups[(ones == pruned)[:, None] & (groups < 0)] = 0
        groups[(ones + free == pruned)[:, None] & (groups < 0)] = 1
        if not task.twins or np.count_nonzero(state < 0) == before:
            return True
