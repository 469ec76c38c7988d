"""The semidefinite relaxation of a node with triangle and pentagonal inequalities.

With p = (1 + z)/2, z_0 = 1 and the penalty μΣ_g(1_gᵀp − s)² in C, the relaxation is min ⟨C, Z⟩ over Z ⪰ 0
with Z_ii = 1 and ⟨T_t, Z⟩ ≥ −c_t, c_t being 1 of a triangle and 2 of a pentagonal inequality. For every α >
0, y and τ ≥ 0 it is at least

    −Σ y_i − Σ τ_t c_t − ‖L₋‖²/(2α) − αN²/2,     L = C + Diag(y) − Σ τ_t T_t,   N = 1 + free inputs,

L₋ being the negative part of L, because ‖Z‖ ≤ N (Krislock, Malick and Roupin, Math. Programming 143, 2014). A
quasi-Newton method climbs this concave, smooth function, with −L₋/α in the place of Z in its gradient, warm
from the node above; α falls from round to round, and the triangles that Z violates most join. Nothing depends
on how far it comes: λ = 4y − diag and a last shift make the form convex, and `node` computes its bound.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq

from maskopt.certificates.cuts import NO_INPUT, OF_Z0
from maskopt.core.clock import clock
from maskopt.solvers.convex.triangles import Pool, dense, gather, pentagons, scatter, separate
from maskopt.solvers.exact.tree.node import LEAST_SHIFT, LEAST_WEIGHT, Form, FreePart, definite
from maskopt.solvers.kernels import RowThreads

#: steps that the quasi-Newton method remembers
_MEMORY = 25
#: how exact the multiplier of z_0 is at the start, in units of the eigenvalues that α lets pass
_CLOSE = 1e-3
#: multipliers below this part of the largest are dropped
_TINY = 1e-4
#: part of what the slope promises that a step must bring
_ENOUGH = 1e-4
#: a step is shortened so often, to a tenth at least each time
_SHORTENED, _SHORTEST = 20, 0.1
#: a step that brings less, as part of the value, is the last
_SETTLED = 1e-9
#: least curvature along a step, in units of the square of the slope's change
_CURVED = 1e-12


class Schedule(NamedTuple):
    """The rounds in which a relaxation is solved.

    Attributes:
        shares: αN²/2 in every round, in units of what the node lacks to the cutoff.
        iterations: of the rounds; the last number also for later rounds.
        new, pentagons: triangles and pentagonal inequalities that may join per round and free input.
    """

    shares: tuple[float, ...]
    iterations: tuple[int, ...] = (30,)
    new: int = 8
    pentagons: int = 4


class Relaxed(NamedTuple):
    """A convex form, from which the relaxations below it start.

    Attributes:
        lam: λ, float64 [n].
        vectors: of the sweeps without triangles (`node`), [n, k].
        pool: triangles of inputs, τ in units of the objective.
    """

    lam: np.ndarray
    vectors: np.ndarray
    pool: Pool


def relax_node(
    part: FreePart,
    start: Relaxed,
    point: np.ndarray,
    schedule: Schedule,
    lacking: float,
    cutoff: float,
    deadline: float = math.inf,
) -> Relaxed:
    """Return λ and τ with Q + μΣ_g 1_g1_gᵀ + diag(λ) less the triangles ⪰ 0 on the free inputs.

    The search begins with those of the node above (`start`), and ends at the cutoff or the deadline, of
    `clock()`; the node lacks so much to the cutoff. `point` is its relaxed point, float64 [n], for
    `definite`.
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
        dual.climb(schedule, lacking, cutoff - offset, deadline)
    except (np.linalg.LinAlgError, torch.linalg.LinAlgError):
        return start  # no eigenvalues of such numbers; the form from above still holds
    lam, pool, weights = 4 * dual.y[:n] - np.diag(b), dual.pool, np.abs(dual.y[:n])
    a = b + np.diag(lam) + 4 * dense(pool, n)[0]
    weights += LEAST_WEIGHT * (weights.mean() + 1e-300)
    least = LEAST_SHIFT * float(np.abs(np.diag(a)).mean())
    whole = np.zeros(len(part.state))
    whole[part.free] = lam + definite(a, weights / weights.mean(), point[part.free], least)
    index = np.where(pool.index >= 0, part.free[pool.index], pool.index)
    return Relaxed(whole, start.vectors, Pool(index, pool.sign, pool.tau))


def _below(pool: Pool, state: np.ndarray) -> Pool:
    """Return the inequalities by places among the free inputs and z_0, where a fixed input is z_0 or −z_0.

    An inequality then has z_0 once, or not at all where two cancel; where they add up it is left out.
    """
    free = np.flatnonzero(state < 0)
    fixed, nothing = len(free), len(free) + 1
    place = np.append(np.full(len(state), fixed), [nothing, fixed])  # NO_INPUT, OF_Z0
    place[free] = np.arange(len(free))
    z = np.append(np.where(state == 0, -1, 1), [0, 1])
    index = place[pool.index]
    sign = z[pool.index] * np.column_stack([np.ones(len(index), np.int64), pool.sign])
    of_z0 = np.where(index == fixed, sign, 0).sum(1)
    index = np.where(index == fixed, nothing, index)
    index = np.column_stack([index, np.where(of_z0 == 0, nothing, fixed)])
    sign = np.column_stack([sign, of_z0])
    order = np.argsort(index, axis=1, kind="stable")[:, :-1]
    index, sign = np.take_along_axis(index, order, 1), np.take_along_axis(sign, order, 1)
    good = (np.abs(of_z0) <= 1) & ((index < nothing).sum(1) >= 3)
    index, sign = index[good], sign[good]
    sign = np.where(index < nothing, sign * sign[:, :1], 0)[:, 1:].astype(np.int8)
    index = np.select([index == fixed, index == nothing], [OF_Z0, NO_INPUT], index)
    return Pool(index, sign, pool.tau[good]).merged(len(free))


class _Dual:
    """The concave function of one node, and the place on it.

    Attributes:
        c: C, float64 [n + 1, n + 1] with z_0 last.
        y: float64 [n + 1].
        pool: triangles with their τ; `pairs` and `least` are theirs.
        newton: the known curvature.
        x: Z at the last value.
    """

    def __init__(self, c: np.ndarray, y: np.ndarray, pool: Pool) -> None:
        self.c, self.pool = c, pool
        self.pairs, self.least = pool.pairs(), pool.least
        self.newton = QuasiNewton(len(c), _MEMORY)
        self.x = np.zeros_like(c)
        self.y = np.append(y, 0.0)
        if not np.isfinite(self._form(self.y, pool.tau)).all():
            raise np.linalg.LinAlgError("a form beyond float64")

    def climb(self, schedule: Schedule, lacking: float, cutoff: float, deadline: float) -> None:
        """Climb in the rounds of the schedule, as far as the cutoff of ⟨C, Z⟩."""
        size = len(self.c) ** 2 / 2
        for step, share in enumerate(schedule.shares):
            if step:
                self._join(schedule)
            alpha = share * lacking / size
            if not step:
                self._homogenize(alpha * schedule.shares[-1] / share)
            iterations = schedule.iterations[min(step, len(schedule.iterations) - 1)]
            value = self._ascend(alpha, iterations) - alpha * size
            if value >= cutoff or clock() >= deadline:
                break
        self.pool = self.pool.keep(self.pool.tau > _TINY * self.pool.tau.max(initial=0.0))

    def _join(self, schedule: Schedule) -> None:
        """Add the inequalities that Z violates most."""
        n = len(self.c) - 1
        index, sign, _ = separate(self.x, schedule.new * n, RowThreads(1))
        pool = self.pool.join(index, sign, n)
        self.pool = pool.join(*pentagons(self.x, self.pool, schedule.pentagons * n), n)

    def _homogenize(self, alpha: float) -> None:
        """Find the best y of z_0, which the form from above lacks: that where Z's entry of z_0 is 1."""

        def slope(y: float) -> float:
            self.y[-1] = y
            self._value(self.y, self.pool.tau, alpha)
            if not math.isfinite(self.x[-1, -1]):
                raise np.linalg.LinAlgError("a multiplier beyond float64")
            return float(self.x[-1, -1]) - 1

        form, flat = self._form(self.y, self.pool.tau), alpha * len(self.c)
        if not flat > 0:
            raise np.linalg.LinAlgError("an α below float64")
        values, vectors = np.linalg.eigh(form[:-1, :-1])
        # this closes the form if no eigenvalue of its other part is below `flat`; a bracket's end is near
        low = float(((vectors.T @ form[:-1, -1]) ** 2 / np.maximum(values, flat)).sum())
        step = flat
        while slope(low) < 0:
            low, step = low - step, 4 * step
        high, step = low + step, 4 * step
        while slope(high) > 0:
            low, high, step = high, high + step, 4 * step
        self.y[-1] = brentq(slope, low, high, xtol=_CLOSE * flat)

    def _ascend(self, alpha: float, iterations: int) -> float:
        """Move (y, τ) up, drop triangles without a multiplier, and return the value without −αN²/2."""
        size = len(self.c)
        self.pairs, self.least = self.pool.pairs(), self.pool.least

        # times α, so that what is known of the curvature holds for any α
        def downhill(x: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = self._value(x[:size], x[size:], alpha)
            return -alpha * value, -alpha * slope

        x, value = self.newton.descend(downhill, np.append(self.y, self.pool.tau), iterations)
        self.y, tau = x[:size], x[size:]
        self.pool = Pool(self.pool.index, self.pool.sign, tau).keep(tau > 0)
        self.newton.keep(np.append(np.ones(size, bool), tau > 0))
        return -value / alpha

    def _form(self, y: np.ndarray, tau: np.ndarray) -> np.ndarray:
        form = self.c.copy()
        form.flat[:: len(form) + 1] += y
        scatter(form, *self.pairs, tau)
        return form

    def _value(self, y: np.ndarray, tau: np.ndarray, alpha: float) -> tuple[float, np.ndarray]:
        """Return −Σ y − Σ τc − ‖L₋‖²/(2α) and its gradient; Z = −L₋/α is left in `x`."""
        # of LAPACKs at hand torch's is the fastest on small matrices, with one thread
        w, v = (t.numpy() for t in torch.linalg.eigh(torch.from_numpy(self._form(y, tau))))
        negative = int(np.searchsorted(w, 0.0))
        w, v = w[:negative], v[:, :negative]
        self.x = (v * (-w / alpha)) @ v.T
        inner = np.zeros(len(tau))
        gather(self.x, *self.pairs, inner)
        value = -float(y.sum()) - float(tau @ self.least) - float(w @ w) / (2 * alpha)
        return value, np.append(self.x.diagonal() - 1, -self.least - inner)


def subtract_cuts(form: Form, pool: Pool) -> Form:
    """Subtract Σ τ_t((Σ b_iz_i)² − 1)/2 from a form."""
    e, column = dense(pool, len(form.linear))
    # z_0z_j = 2p_j − 1 and z_iz_j = 4p_ip_j − 2p_i − 2p_j + 1, −2E_ij times
    constant = float(e.sum()) - 2 * float(column.sum()) - float(pool.tau @ pool.least)
    linear = form.linear + 4 * (column - e.sum(1))
    return Form(form.matrix + 4 * e, linear, form.constant + constant)


#: value and slope at a point
Function = Callable[[np.ndarray], tuple[float, np.ndarray]]


class _Place(NamedTuple):
    x: np.ndarray
    value: float
    slope: np.ndarray


class QuasiNewton:
    """A quasi-Newton method on a smooth convex function, whose variables from `free` on stay at 0 or above.

    A step is the two-loop recursion of BFGS among the variables that may move, which are all but those at 0
    that would go below; it is taken along its projection (Bertsekas, SIAM J. Control and Optimization 20,
    1982). The curvature that is known outlives a call, for a function that changes a little or gets further
    variables: `moves` are the last (step, change of the slope), float64 [n], the newest last.
    """

    def __init__(self, free: int, memory: int) -> None:
        self.free = free
        self.moves: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=memory)

    def keep(self, chosen: np.ndarray) -> None:
        """Drop all variables but those of `chosen`, bool [n]."""
        for k, (step, change) in enumerate(self.moves):
            self.moves[k] = step[chosen], change[chosen]

    def descend(
        self, function: Function, x: np.ndarray, iterations: int
    ) -> tuple[np.ndarray, float]:
        """Make at most so many steps from a legal x, float64 [n], and return the end and its value.

        Variables beyond those known are new. Where nothing is known of the function's curvature yet, a step
        is −slope.
        """
        for k, (step, change) in enumerate(self.moves):
            new = (0, len(x) - len(step))
            self.moves[k] = np.pad(step, new), np.pad(change, new)
        place = _Place(x, *function(x))
        for _ in range(iterations):
            after = self._search(function, place, self._direction(place))
            if after is None:
                if not self.moves:
                    break
                self.moves.clear()
                continue
            before, place = place, after
            step, change = place.x - before.x, place.slope - before.slope
            if step @ change > _CURVED * (change @ change):
                self.moves.append((step, change))
            size = max(abs(before.value), abs(place.value))
            if before.value - place.value <= _SETTLED * size:
                break
        return place.x, place.value

    def _direction(self, place: _Place) -> np.ndarray:
        """Return the two-loop recursion among the variables that may move.

        It is algorithm 7.4 of Nocedal and Wright, *Numerical Optimization*.
        """
        free = (np.arange(len(place.x)) < self.free) | (place.x > 0) | (place.slope < 0)
        direction = -place.slope * free
        used = []
        for step, change in reversed(self.moves):
            step, change = step * free, change * free
            curvature = step @ change
            if curvature > _CURVED * (change @ change):
                weight = step @ direction / curvature
                direction -= weight * change
                used.append((step, change, curvature, weight))
        if used:
            _, change, curvature, _ = used[0]
            direction *= curvature / (change @ change)
        for step, change, curvature, weight in reversed(used):
            direction += (weight - change @ direction / curvature) * step
        return direction

    def _search(self, function: Function, place: _Place, direction: np.ndarray) -> _Place | None:
        """Return a place along the projected direction that is enough below; None: there is none."""
        step = 1.0
        for _ in range(_SHORTENED):
            x = place.x + step * direction
            np.maximum(x[self.free :], 0.0, out=x[self.free :])
            value, slope = function(x)
            along = float(place.slope @ (x - place.x))
            if value <= place.value + _ENOUGH * along:
                return _Place(x, value, slope)
            above = value - place.value - along
            # the least of the parabola through what is known
            best = -along / (2 * above) if above > 0 else 0.5
            step *= min(max(best, _SHORTEST), 0.5)
        return None
