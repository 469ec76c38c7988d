"""The semidefinite relaxation of a node with triangle inequalities.

With p = (1 + z)/2, z_0 = 1 and the penalty μΣ_g(1_gᵀp − s)² in C, the relaxation is min ⟨C, Z⟩ over Z ⪰ 0
with Z_ii = 1 and triangles ⟨T_t, Z⟩ ≥ −1. For every α > 0, y and τ ≥ 0 it is at least

    −Σ y_i − Σ τ_t − ‖L₋‖²/(2α) − αN²/2,     L = C + Diag(y) − Σ τ_t T_t,   N = 1 + free inputs,

L₋ being the negative part of L, because ‖Z‖ ≤ N (Krislock, Malick and Roupin, *Improved semidefinite
bounding procedure for solving Max-Cut problems to optimality*, Math. Programming 143, 2014). This is concave
and smooth in (y, τ), with −L₋/α in the place of Z in its gradient. A quasi-Newton method climbs it, warm
from the node above; α falls from round to round, and between two rounds the triangles that Z violates most
join.

Nothing depends on how far it comes: λ = 4y − diag and a last shift make the form convex, and what it proves
is computed anew (`node`).
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import Bounds, brentq, minimize

from maskopt.solvers.compiled import loop
from maskopt.solvers.convex.triangles import Pool, dense, separate
from maskopt.solvers.exact.free_part import FreePart, definite
from maskopt.solvers.parallel import RowThreads

#: steps that the quasi-Newton method remembers
_MEMORY = 25
#: how exact the multiplier of z_0 is at the start, in units of the eigenvalues that α lets pass
_CLOSE = 1e-3
#: multipliers below this part of the largest are dropped
_TINY = 1e-4
#: least correction of λ, in units of the mean diagonal entry; and the least weight of an input in one
_LEAST_SHIFT, _LEAST_WEIGHT = 1e-9, 1e-6


class Plan(NamedTuple):
    """How a relaxation is solved.

    Attributes:
        shares: αN²/2 in every round, in units of what the node lacks to the cutoff, or of `unit` where that
            is more: what is gained from a start is a matter of the first, what can be certified of the last.
        iterations: of the rounds; of the last ones the last.
        new: triangles that may join before another round, per free input.
    """

    shares: tuple[float, ...]
    iterations: tuple[int, ...] = (30,)
    new: int = 8


class Relaxed(NamedTuple):
    """A convex form, and where the relaxations below it start.

    Attributes:
        lam: λ, float64 [n].
        vectors: of the relaxation without triangles (`reconvex`), float32 [n, k].
        pool: triangles of inputs (n: z_0), τ in units of the objective.
    """

    lam: np.ndarray
    vectors: np.ndarray
    pool: Pool


class Goal(NamedTuple):
    """What a node is to reach.

    Attributes:
        bound, cutoff: what is known of it, and what is enough.
        unit: see `Plan`.
        deadline: of `time.monotonic()`; no further round past it.
    """

    bound: float
    cutoff: float
    unit: float
    deadline: float = math.inf


def relax_node(
    part: FreePart, start: Relaxed, point: np.ndarray, plan: Plan, goal: Goal
) -> Relaxed:
    """λ and τ with Q + μΣ_g 1_g1_gᵀ + diag(λ) less the triangles ⪰ 0 on the free inputs.

    Args:
        start: of the node above.
        point: the relaxed point of the node, float64 [n]; which correction costs least is judged there.
    """
    b, n = part.b, len(part.free)
    c = np.zeros((n + 1, n + 1))
    c[:n, :n] = b / 4
    np.fill_diagonal(c, 0)
    c[:n, n] = c[n, :n] = (b.sum(1) + part.linear) / 4
    # xᵀbx + linearᵀx = ¼zᵀbz + ½(b1 + linear)ᵀz + ¼1ᵀb1 + ½linearᵀ1, and zᵢ² = 1
    offset = part.constant + float(b.sum() + np.trace(b)) / 4 + float(part.linear.sum()) / 2
    try:
        y = (start.lam[part.free] + np.diag(b)) / 4
        dual = _Dual(c, y, _below(start.pool, part.state))
        dual.climb(plan, goal, offset)
    except (np.linalg.LinAlgError, torch.linalg.LinAlgError):
        return start  # numbers that no eigenvalues can be told of; the form from above still holds
    lam, pool, weights = 4 * dual.y[:n] - np.diag(b), dual.pool, np.abs(dual.y[:n])
    a = b + np.diag(lam)
    if len(pool.tau):
        a += 4 * dense(pool, n)[0]
    weights += _LEAST_WEIGHT * (weights.mean() + 1e-300)
    least = _LEAST_SHIFT * float(np.abs(np.diag(a)).mean())
    whole = np.zeros(len(part.state))
    whole[part.free] = lam + definite(a, weights / weights.mean(), point[part.free], least)
    names = np.append(part.free, len(part.state))
    return Relaxed(whole, start.vectors, Pool(names[pool.index], pool.sign, pool.tau))


def _below(pool: Pool, state: np.ndarray) -> Pool:
    """The triangles by places among the free inputs and z_0. An input that is fixed is z_0 or −z_0: a
    triangle of two others is one of theirs and z_0."""
    n = len(state)
    free = np.flatnonzero(state < 0)
    place = np.append(np.full(n, len(free)), len(free))
    place[free] = np.arange(len(free))
    flip = np.append(np.where(state == 0, -1, 1), 1)
    index = place[pool.index]
    a, b = pool.sign.T.astype(np.int64)
    i, j, k = flip[pool.index].T
    pairs = np.stack([a * i * j, b * i * k, a * b * j * k], axis=1)
    order = np.argsort(index, axis=1, kind="stable")
    inside = (np.diff(np.take_along_axis(index, order, 1), axis=1) > 0).all(1)
    index, order, pairs = index[inside], order[inside], pairs[inside]
    # the pair of two places of a triangle is the one that lacks the third
    lacks = np.array([2, 1, 0])
    first = pairs[np.arange(len(order)), lacks[order[:, 2]]]
    second = pairs[np.arange(len(order)), lacks[order[:, 1]]]
    sign = np.stack([first, second], axis=1).astype(np.int8)
    return Pool(np.take_along_axis(index, order, 1), sign, pool.tau[inside]).merged(len(free))


class _Dual:
    """The concave function of one node, and where on it we are.

    Attributes:
        c: C, float64 [n + 1, n + 1] with z_0 last.
        y: float64 [n + 1].
        pool: triangles by places, with their τ.
    """

    def __init__(self, c: np.ndarray, y: np.ndarray, pool: Pool) -> None:
        self.c, self.pool = c, pool
        self.x = np.zeros_like(c)
        self.y = np.append(y, 0.0)
        if not np.isfinite(self._form(self.y, pool.tau)).all():
            raise np.linalg.LinAlgError("a form beyond float64")

    def climb(self, plan: Plan, goal: Goal, offset: float) -> None:
        """`offset`: what the objective is more than ⟨C, Z⟩."""
        n, size = len(self.c) - 1, len(self.c) ** 2 / 2
        for step, share in enumerate(plan.shares):
            if step:
                index, sign, _ = separate(self.x, plan.new * n, RowThreads(1))
                self.pool = self.pool.join(index, sign, n)
            alpha = share * max(goal.cutoff - goal.bound, goal.unit) / size
            if not step:
                self._homogenize(alpha * plan.shares[-1] / share)
            iterations = plan.iterations[min(step, len(plan.iterations) - 1)]
            value = self._ascend(alpha, iterations) - alpha * size
            if value + offset >= goal.cutoff or time.monotonic() >= goal.deadline:
                break
        self.pool = self.pool.keep(self.pool.tau > _TINY * self.pool.tau.max(initial=0.0))

    def _homogenize(self, alpha: float) -> None:
        """The best y of z_0 beside the others, which the form from above says nothing of: where Z's entry of
        z_0 is 1. Far from it the quasi-Newton method may not arrive."""

        def slope(y: float) -> float:
            self.y[-1] = y
            self._value(self.y, self.pool.tau, alpha)
            if not math.isfinite(self.x[-1, -1]):
                raise np.linalg.LinAlgError("a multiplier beyond float64")
            return float(self.x[-1, -1]) - 1

        form, least = self._form(self.y, self.pool.tau), alpha * len(self.c)
        values, vectors = np.linalg.eigh(form[:-1, :-1])
        # what closes the form, were no eigenvalue of the rest below `least`; an end of a bracket is near
        low = float(((vectors.T @ form[:-1, -1]) ** 2 / np.maximum(values, least)).sum())
        step = least
        while slope(low) < 0:
            low, step = low - step, 4 * step
        high, step = low + step, 4 * step
        while slope(high) > 0:
            low, high, step = high, high + step, 4 * step
        self.y[-1] = brentq(slope, low, high, xtol=_CLOSE * least)

    def _ascend(self, alpha: float, iterations: int) -> float:
        """Move (y, τ) up; the function's value without −αN²/2. Drops triangles without a multiplier."""
        size = len(self.c)
        lowest = np.append(np.full(size, -np.inf), np.zeros(len(self.pool.tau)))

        def downhill(x: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = self._value(x[:size], x[size:], alpha)
            return -value, -slope

        found = minimize(
            downhill,
            np.append(self.y, self.pool.tau),
            jac=True,
            method="L-BFGS-B",
            bounds=Bounds(lowest, np.full(len(lowest), np.inf)),
            options={"maxiter": iterations, "maxcor": _MEMORY, "ftol": 1e-9, "gtol": 0.0},
        )
        self.y = found.x[:size]
        pool = Pool(self.pool.index, self.pool.sign, found.x[size:])
        self.pool = pool.keep(pool.tau > 0)
        return -float(found.fun)

    def _form(self, y: np.ndarray, tau: np.ndarray) -> np.ndarray:
        form = self.c.copy()
        form.flat[:: len(form) + 1] += y
        _subtract(form, self.pool.index, self.pool.sign, tau)
        return form

    def _value(self, y: np.ndarray, tau: np.ndarray, alpha: float) -> tuple[float, np.ndarray]:
        """−Σ y − Σ τ − ‖L₋‖²/(2α) and its gradient; Z = −L₋/α is left in `x`."""
        # of LAPACKs at hand torch's is the fastest on small matrices, with one thread
        w, v = (t.numpy() for t in torch.linalg.eigh(torch.from_numpy(self._form(y, tau))))
        negative = int(np.searchsorted(w, 0.0))
        w, v = w[:negative], v[:, :negative]
        self.x = (v * (-w / alpha)) @ v.T
        inner = np.empty(len(tau))
        _inner(self.x, self.pool.index, self.pool.sign, inner)
        value = -float(y.sum()) - float(tau.sum()) - float(w @ w) / (2 * alpha)
        return value, np.append(self.x.diagonal() - 1, -1 - inner)


@loop(nogil=True)
def _subtract(form, index, sign, tau):  # type: ignore[no-untyped-def]
    """form −= Σ τ_t T_t in place."""
    for t in range(len(tau)):
        a, b = sign[t, 0], sign[t, 1]
        for x in range(3):
            i = index[t, 0] if x < 2 else index[t, 1]
            j = index[t, 1] if x == 0 else index[t, 2]
            w = tau[t] / 2 * (a if x == 0 else (b if x == 1 else a * b))
            form[i, j] -= w
            form[j, i] -= w


@loop(nogil=True)
def _inner(matrix, index, sign, inner):  # type: ignore[no-untyped-def]
    """⟨T_t, Z⟩ of every triangle."""
    for t in range(len(inner)):
        i, j, k = index[t, 0], index[t, 1], index[t, 2]
        a, b = sign[t, 0], sign[t, 1]
        inner[t] = a * matrix[i, j] + b * matrix[i, k] + a * b * matrix[j, k]


@loop(nogil=True)
def add_triangles(base, c, index, sign, tau):  # type: ignore[no-untyped-def]
    """Subtract Σ τ c_t(p) from pᵀ·base·p + cᵀp, in place; returns its constant part, Σ τ κ_t."""
    n = len(c)
    constant = 0.0
    for t in range(len(tau)):
        a, b = sign[t, 0], sign[t, 1]
        constant += tau[t]
        for x in range(3):
            i = index[t, 0] if x < 2 else index[t, 1]
            j = index[t, 1] if x == 0 else index[t, 2]
            w = tau[t] * (a if x == 0 else (b if x == 1 else a * b))
            if j == n or i == n:  # z_0z_j = 2p_j − 1
                c[min(i, j)] -= 2 * w
                constant -= w
            else:  # z_iz_j = 4p_ip_j − 2p_i − 2p_j + 1
                base[i, j] -= 2 * w
                base[j, i] -= 2 * w
                c[i] += 2 * w
                c[j] += 2 * w
                constant += w
    return constant
