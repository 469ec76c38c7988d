"""The semidefinite relaxation again inside the tree: new multipliers λ for what is still free.

A node has fixed some p_i. Its own semidefinite relaxation is stronger than the root's with the same
inputs fixed, because λ was optimal for the root alone. Only λ changes: λ_i(p_i² − p_i) vanishes on
fixed inputs, and the penalty μ stays, so a node carries one vector. The relaxation is solved by the
mixing method (see the bound `sdp`), warm from the vectors of the node above.
"""

from __future__ import annotations

import math
import time

import numpy as np

from maskopt.solvers.compiled import loop
from maskopt.solvers.exact.free_part import definite, free_part

#: sweeps between two looks at the clock
_CHUNK = 200
#: least correction of λ, in units of the mean diagonal entry; and the least weight of an input in one
_LEAST_SHIFT, _LEAST_WEIGHT = 1e-9, 1e-6


def start_vectors(n: int, seed: int) -> np.ndarray:
    """Unit vectors float32 [n, k], k ≥ √(2n) + 1 in whole registers."""
    k = -(-(int((2 * n) ** 0.5) + 2) // 8) * 8
    v = np.random.default_rng(seed).standard_normal((n, k))
    return (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)


def multipliers(
    q: np.ndarray,
    mu: float,
    pruned: int,
    same: np.ndarray,
    state: np.ndarray,
    vectors: np.ndarray,
    point: np.ndarray,
    sweeps: int,
    deadline: float = math.inf,
) -> tuple[np.ndarray, np.ndarray]:
    """λ with Q + μΣ_g 1_g1_gᵀ + diag(λ) ⪰ 0 on the free inputs, and the vectors that gave it.

    Args:
        q: float64 [n, n].
        same: whether two inputs share a group, float64 [n, n].
        state: 1 pruned, 0 kept, −1 free, int8 [n].
        vectors: float32 [n, k], where the sweeps start.
        point: the relaxed point of the node, float64 [n]; which correction costs least is judged there.
        sweeps: fewer past the deadline, of `time.monotonic()`.
    """
    part = free_part(q, mu, pruned, same, state)
    free, b, linear = part.free, part.b, part.linear
    scale = len(free) / max(float(np.trace(b)), 1e-300)
    with np.errstate(over="ignore", invalid="ignore"):
        c = (b * (scale / 4)).astype(np.float32)
        first = ((b.sum(1) + linear) * (scale / 4)).astype(np.float32)
    np.fill_diagonal(c, 0)
    v = vectors[free]
    y = np.empty(len(free), np.float32)
    for done in range(0, sweeps, _CHUNK):
        _mix(c, first, v, y, min(_CHUNK, sweeps - done))
        if time.monotonic() >= deadline:
            break
    if not np.isfinite(y).all():
        # what is free weighs nothing beside what is fixed: beyond float32. Q alone is semidefinite
        return np.zeros(len(q)), vectors
    lam = 4 * y.astype(float) / scale - np.diag(b)
    b[np.diag_indices_from(b)] += lam
    weights = 4 * y.astype(float) + _LEAST_WEIGHT
    correction = definite(b, weights, point[free], _LEAST_SHIFT / scale)
    whole = np.zeros(len(q))
    whole[free] = lam + correction
    moved = vectors.copy()
    moved[free] = v
    return whole, moved


@loop(nogil=True, fastmath=True)
def _mix(c, first, v, y, sweeps):  # type: ignore[no-untyped-def]
    """v_i ← −g_i/‖g_i‖, g_i = Σ_j c_ij v_j + first_i e_0; y_i = ‖g_i‖."""
    n, k = v.shape
    g = np.zeros(k, v.dtype)
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
