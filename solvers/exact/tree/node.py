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
from maskopt.solvers.convex.interior_point import least_first, minimise
from maskopt.solvers.convex.mixing import DOUBLE_N, correction, sweep_matrix
from maskopt.solvers.convex.mixing_kernel import LANES
from maskopt.solvers.exact.tasks import RowAnswer, RowTask
from maskopt.solvers.kernels import njit

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
    certificate: Certificate

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

    def with_margin(self, task: RowTask) -> np.ndarray:
        """Return λ, raised so far that A ⪰ 0 also in the rounding of a factorisation."""
        a = task.q + np.diag(self.diagonal) + self.penalty * same_group(task)
        least = float(np.linalg.eigvalsh(a)[0])
        return self.diagonal + max(0.0, -least) + _MARGIN * float(np.abs(np.diag(a)).sum())


class FreePart(NamedTuple):
    """The objective with the penalty, xᵀbx + linearᵀx + constant of the free inputs of a node.

    Attributes:
        state: 1 pruned, 0 kept, −1 free, int8 [n].
        free: the free inputs, int64 [m].
    """

    state: np.ndarray
    free: np.ndarray
    b: np.ndarray
    linear: np.ndarray
    constant: float


def same_group(task: RowTask) -> np.ndarray:
    """Return 1.0 where two inputs share a group, else 0.0, float64 [n, n]."""
    member = np.arange(len(task.q)) // task.group
    return (member[:, None] == member[None, :]).astype(float)


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


def free_part(
    q: np.ndarray, mu: float, pruned: int, same: np.ndarray, state: np.ndarray
) -> FreePart:
    """Return the free part of a node, with the penalty μΣ_g (1_gᵀp − pruned)²; `same`: see `same_group`."""
    free = np.flatnonzero(state < 0)
    ones = (state == 1).astype(float)
    b = q[np.ix_(free, free)] + mu * same[np.ix_(free, free)]
    linear = 2 * (q @ ones + mu * (same @ ones))[free] - 2 * mu * pruned
    constant = float(ones @ q @ ones) + mu * float(ones @ same @ ones)
    constant += mu * pruned * (pruned * float((1 / same.sum(1)).sum()) - 2 * float(ones.sum()))
    return FreePart(state, free, b, linear, constant)


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
    base: np.ndarray,
    lam: np.ndarray,
    c: np.ndarray,
    constant: float,
    task: RowTask,
    state: np.ndarray,
    cutoff: float,
    twins: list[np.ndarray],
) -> tuple[float, np.ndarray]:
    """Return the bound of a node, ∞ where no legal mask is left, and its relaxed point.

    Inputs of `state` (1 pruned, 0 kept, −1 free, int8 [n]) that no mask below `cutoff` has otherwise are
    fixed in place.
    """
    if not settle(state, task, twins):
        return np.inf, np.zeros(len(c))
    point = (state == 1).astype(float)
    index = np.flatnonzero(state < 0)
    product, linear = np.zeros(len(c)), np.empty(len(index))
    q = np.empty((len(index), len(index)))
    offset = _gather(base, lam, c, constant, state, index, product, q, linear)
    if len(index) == 0:
        return offset, point
    groups = state.reshape(-1, task.group)
    size = (groups < 0).sum(1)
    left, size = (task.pruned - (groups == 1).sum(1))[size > 0], size[size > 0]
    bound, value, free_point, gradient = minimise(
        q, linear, offset, left, size, cutoff, _SETTLED, _HOPELESS
    )
    point[index] = free_point
    if bound < cutoff and np.isfinite(value):
        _fix_by_slope(state, index, gradient, gradient.copy(), left, size, bound, cutoff)
    return bound, point


def settle(state: np.ndarray, task: RowTask, twins: list[np.ndarray]) -> bool:
    """Fix in place what follows from the counts of the groups, and from twins, whose first ones are pruned.

    Returns False where a count cannot be reached, or twins have another order.
    """
    groups, pruned = state.reshape(-1, task.group), task.pruned
    while True:
        before = np.count_nonzero(state < 0)
        if not in_order(state, twins):
            return False
        ones, free = (groups == 1).sum(1), (groups < 0).sum(1)
        if (ones > pruned).any() or (ones + free < pruned).any():
            return False
        groups[(ones == pruned)[:, None] & (groups < 0)] = 0
        groups[(ones + free == pruned)[:, None] & (groups < 0)] = 1
        if not twins or np.count_nonzero(state < 0) == before:
            return True


def twins_of(q: np.ndarray, group: int) -> list[np.ndarray]:
    """Return the sets of two or more inputs of a group, int64, ascending, any two of which may be exchanged.

    Q [n, n] stays what it is, to the last bit.
    """
    candidates: dict[bytes, list[list[int]]] = {}  # by the entries of their rows, in any order
    for i, line in enumerate(q + 0.0):
        sets = candidates.setdefault(np.sort(line).tobytes(), [])
        for known in sets:
            j, exchanged = known[0], line.copy()
            exchanged[i], exchanged[j] = line[j], line[i]
            if j // group == i // group and (exchanged == q[j]).all():
                known.append(i)
                break
        else:
            sets.append([i])
    return [np.array(known) for sets in candidates.values() for known in sets if len(known) > 1]


def put_in_order(pruned: np.ndarray, twins: list[np.ndarray]) -> np.ndarray:
    """Return the mask (p, bool [n]) of equal objective that prunes the first ones of all twins."""
    ordered = np.array(pruned, dtype=bool)
    for known in twins:
        ordered[known] = np.arange(len(known)) < ordered[known].sum()
    return ordered


def in_order(state: np.ndarray, twins: list[np.ndarray]) -> bool:
    """Fix what follows where of all twins the first ones are pruned, in place; False: they are not."""
    for known in twins:
        ones, zeros = np.flatnonzero(state[known] == 1), np.flatnonzero(state[known] == 0)
        last, first = ones.max(initial=-1), zeros.min(initial=len(known))
        if first < last:
            return False
        state[known[: last + 1]] = 1
        state[known[first:]] = 0
    return True


@njit
def _gather(base, lam, c, constant, state, index, product, q, linear):  # type: ignore[no-untyped-def]
    """Write the program in the free inputs to `q` and `linear`, and return its offset; `product` is 0."""
    n, m = len(c), len(index)
    for i in range(n):
        if state[i] == 1:
            line = base[i]
            for j in range(n):
                product[j] += line[j]
            product[i] += lam[i]
    offset = constant
    for i in range(n):
        if state[i] == 1:
            offset += product[i] + c[i]
    for x in range(m):
        line = base[index[x]]
        for y in range(m):
            q[x, y] = line[index[y]]
        q[x, x] += lam[index[x]]
        linear[x] = 2 * product[index[x]] + c[index[x]]
    return offset


@njit
def _fix_by_slope(state, index, gradient, parts, left, size, bound, cutoff):  # type: ignore[no-untyped-def]
    """Fix inputs by reduced costs: the linear form with one input on its other side reaches the cutoff.

    `parts`, a copy of the gradient, is reordered.
    """
    first = 0
    for g in range(len(left)):
        last = first + size[g]
        part = parts[first:last]
        least_first(part, left[g])
        inside, outside = part[0], part[left[g]]
        for x in range(left[g]):
            inside = max(inside, part[x])
        for x in range(left[g], size[g]):
            outside = min(outside, part[x])
        for x in range(first, last):
            slope = gradient[x]
            if slope <= inside and slope < outside:
                if bound + outside - slope >= cutoff:
                    state[index[x]] = 1
            elif slope >= outside and bound + slope - inside >= cutoff:
                state[index[x]] = 0
        first = last
