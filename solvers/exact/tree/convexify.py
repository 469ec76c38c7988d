"""What makes f convex: multipliers λ and μ with Q + diag(λ) + μΣ_g 1_g1_gᵀ ⪰ 0, of the root and of a node.

At the root they are the duals of the semidefinite bound `sdp` (QCR). A node has fixed some p_i, and its own
semidefinite relaxation is stronger than that of the root with the same inputs fixed, because λ was optimal
for the root alone. Only λ changes: λ_i(p_i² − p_i) vanishes on fixed inputs, and the penalty μ stays, so a
node carries one vector. The relaxation is solved by the mixing method (see the bound `sdp`), warm from the
vectors of the node above.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from maskopt.certificates.certificate import Certificate
from maskopt.core.limits import clock
from maskopt.core.pattern import NM, Unstructured
from maskopt.core.problem import LayerProblem
from maskopt.protocol.bounds import lower_bound
from maskopt.solvers.compiled import loop
from maskopt.solvers.convex.duals import correction
from maskopt.solvers.exact.tasks import RowAnswer, RowTask

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


class Duals(NamedTuple):
    """λ, float64 [n], and μ of the root, the lower bound that they prove, and the certificate of that."""

    diagonal: np.ndarray
    penalty: float
    certified: float
    certificate: Certificate

    def answer(self, pruned: np.ndarray, ended: str, bound: float | None = None) -> RowAnswer:
        """With a bound of the row; None: what they prove."""
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
        """λ, raised so far that A ⪰ 0 also in the rounding of a factorisation."""
        a = task.q + np.diag(self.diagonal) + self.penalty * same_group(task)
        least = float(np.linalg.eigvalsh(a)[0])
        return self.diagonal + max(0.0, -least) + _MARGIN * float(np.abs(np.diag(a)).sum())


class FreePart(NamedTuple):
    """f with the penalty as xᵀbx + linearᵀx + constant of the free inputs of a node, int64 [m]; `state` is 1
    pruned, 0 kept, −1 free, int8 [n]."""

    state: np.ndarray
    free: np.ndarray
    b: np.ndarray
    linear: np.ndarray
    constant: float


def same_group(task: RowTask) -> np.ndarray:
    """Whether two inputs share a group, float64 [n, n]."""
    member = np.arange(len(task.q)) // task.group
    return (member[:, None] == member[None, :]).astype(float)


def qcr_duals(task: RowTask) -> Duals:
    """Of the bound `sdp`, within half of the time that the row has left."""
    n = len(task.q)
    pattern = (
        Unstructured(keep=n - task.pruned)
        if task.group == n
        else NM(keep=task.group - task.pruned, of=task.group)
    )
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
    """Of a node with the penalty μΣ_g (1_gᵀp − pruned)²; for `same` see `same_group`."""
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
    """The θd of `correction`, θ larger by `least` than eigenvalues require."""

    def enough(low: float, m: np.ndarray) -> float:
        # the residual of a computed eigenvalue is a small multiple of n·u·‖M‖
        return max(0.0, -low) + 16 * len(m) * _U * float(np.linalg.norm(m)) + least

    return correction(matrix, weights, point, enough)[0]


def start_vectors(n: int, seed: int) -> np.ndarray:
    """Unit vectors float32 [n, k], k ≥ √(2n) + 1 in whole registers."""
    k = -(-(int((2 * n) ** 0.5) + 2) // 8) * 8
    v = np.random.default_rng(seed).standard_normal((n, k))
    return (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)


def multipliers(
    part: FreePart, vectors: np.ndarray, point: np.ndarray, sweeps: int, deadline: float = math.inf
) -> tuple[np.ndarray, np.ndarray]:
    """λ with Q + μΣ_g 1_g1_gᵀ + diag(λ) ⪰ 0 on the free inputs, and the vectors that gave it.

    Args:
        part: is used up.
        vectors: float32 [n, k], where the sweeps start.
        point: the relaxed point of the node, float64 [n], for `definite`.
        deadline: of `clock()`, after which no further sweeps are made.
    """
    free, b = part.free, part.b
    scale = len(free) / max(float(np.trace(b)), 1e-300)
    with np.errstate(over="ignore", invalid="ignore"):
        c = (b * (scale / 4)).astype(np.float32)
        first = ((b.sum(1) + part.linear) * (scale / 4)).astype(np.float32)
    np.fill_diagonal(c, 0)
    v = vectors[free]
    y, g = np.empty(len(free), np.float32), np.empty(v.shape[1], np.float32)
    for done in range(0, sweeps, _CHUNK):
        _mix(c, first, v, y, g, min(_CHUNK, sweeps - done))
        if clock() >= deadline:
            break
    whole = np.zeros(len(part.state))
    if not np.isfinite(y).all():
        # what is fixed outweighs what is free beyond float32. Q alone is semidefinite
        return whole, vectors
    lam = 4 * y.astype(float) / scale - np.diag(b)
    b[np.diag_indices_from(b)] += lam
    weights = 4 * y.astype(float) + LEAST_WEIGHT
    whole[free] = lam + definite(b, weights, point[free], LEAST_SHIFT / scale)
    moved = vectors.copy()
    moved[free] = v
    return whole, moved


@loop(nogil=True, _nrt=False, fastmath=True)
def _mix(c, first, v, y, g, sweeps):  # type: ignore[no-untyped-def]
    """v_i ← −g_i/‖g_i‖, g_i = Σ_j c_ij v_j + first_i e_0; y_i = ‖g_i‖."""
    n, k = v.shape
    whole = n // 8 * 8
    for _ in range(sweeps):
        for i in range(n):
            g[:] = 0
            # eight rows of V at a time: g passes through memory an eighth as often
            for j in range(0, whole, 8):
                w0, w1, w2, w3 = c[i, j], c[i, j + 1], c[i, j + 2], c[i, j + 3]
                w4, w5, w6, w7 = c[i, j + 4], c[i, j + 5], c[i, j + 6], c[i, j + 7]
                for a in range(k):
                    g[a] += (
                        (w0 * v[j, a] + w1 * v[j + 1, a])
                        + (w2 * v[j + 2, a] + w3 * v[j + 3, a])
                        + (w4 * v[j + 4, a] + w5 * v[j + 5, a])
                        + (w6 * v[j + 6, a] + w7 * v[j + 7, a])
                    )
            for j in range(whole, n):
                for a in range(k):
                    g[a] += c[i, j] * v[j, a]
            g[0] += first[i]
            norm = np.float32(0)
            for a in range(k):
                norm += g[a] * g[a]
            norm = np.sqrt(norm)
            y[i] = norm
            if norm > 0:
                for a in range(k):
                    v[i, a] = -g[a] / norm
