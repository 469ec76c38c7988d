"""A convex quadratic program over {0 ≤ p ≤ 1, Σ over each group = what is left of it}.

Mehrotra's predictor and corrector on min pᵀAp + cᵀp + offset. The bounds give every group the same size and
count; a node of a branch and bound has groups of which some inputs are fixed. Only used to find good points
and good bounds: a point proves something by convexity alone, at whatever point the iterations end.

With H = 2A + the barrier's diagonal = LLᵀ and E the groups' indicator columns, a Newton step is
dp = H⁻¹(r + E dν), EᵀH⁻¹E dν = miss − EᵀH⁻¹r. W = L⁻¹E, solved for all groups at once, gives both sides.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maskopt.solvers.kernels import njit

#: iterations at most; ten are the rule
_ITERATIONS = 30
#: part of the way to the boundary that a step goes at most
_REACH = 0.995
#: how near a point may come to 0 and 1, and its multipliers to 0
_EDGE, _LEAST_MULTIPLIER = 1e-15, 1e-300
#: of the gap that `interior_point` leaves, as part of the objective
_TOLERANCE = 1e-4


def interior_point(
    a: np.ndarray, c: np.ndarray, group: int, pruned: int, *, constant: float = 0.0
) -> np.ndarray:
    """Return a point whose Frank–Wolfe gap is below _TOLERANCE·|objective + constant|, if all goes well."""
    n = len(a)
    if pruned in (0, group):
        return np.full(n, float(pruned > 0))
    left, size = np.full(n // group, pruned), np.full(n // group, group)
    a = np.ascontiguousarray(a)
    return minimise(a, c, constant, left, size, np.inf, _TOLERANCE, 0.0)[2]


class _Iterate(NamedTuple):
    """The point p, the multipliers low of p ≥ 0 and high of p ≤ 1, all [m], and ν [groups]."""

    p: np.ndarray
    low: np.ndarray
    high: np.ndarray
    nu: np.ndarray


class _Scratch(NamedTuple):
    """Memory of a step: h [m, m] is 2A but for its diagonal."""

    h: np.ndarray
    schur: np.ndarray
    w: np.ndarray
    groups: np.ndarray
    work: np.ndarray


def minimise(
    a: np.ndarray,
    c: np.ndarray,
    offset: float,
    left: np.ndarray,
    size: np.ndarray,
    cutoff: float,
    tolerance: float,
    enough: float,
) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Return the best Frank–Wolfe bound of pᵀAp + cᵀp + offset, and value, point and gradient there.

    Where rounding breaks a factorisation, it is the best before. Ends where the bound is at least `cutoff`
    (∞: none), where the gap is at most `tolerance` of the value (or of the cutoff, where that is less), or
    where the value shows that the cutoff cannot be reached and the gap is at most `enough` of what is
    missing. (Not compiled, which would take as long again as compiling what it calls.)

    Args:
        a, c: float64 [m, m] contiguous and symmetric, [m].
        left, size: int64 [groups]; inputs of a group follow each other, 0 < left < size.
    """
    label = np.repeat(np.arange(len(left)), size)
    p = (left / size)[label]
    gradient, work = np.empty(len(c)), np.empty((2, len(c)))
    value, bound_here, slope = _evaluate(a, c, offset, left, size, p, gradient, work)
    low = np.full(len(c), slope + _LEAST_MULTIPLIER)
    iterate = _Iterate(p, low, low.copy(), np.zeros(len(left)))
    scratch = _Scratch(
        h=2 * a,
        schur=np.empty((len(left), len(left))),
        w=np.zeros((len(left), len(c))),
        groups=np.empty((2, len(left))),
        work=np.empty((5, len(c))),
    )
    bound, value_there = -np.inf, np.inf
    point, gradient_there = p.copy(), gradient.copy()
    for _ in range(_ITERATIONS):
        if bound_here > bound:
            bound, value_there = bound_here, value
            point, gradient_there = p.copy(), gradient.copy()
        gap = value - bound
        if bound >= cutoff or gap <= tolerance * min(abs(value), abs(cutoff)):
            break
        if cutoff < np.inf and value < cutoff and gap <= enough * (cutoff - value):
            break
        if not _step(a, gradient, label, left, size, iterate, scratch):
            break
        value, bound_here, _ = _evaluate(a, c, offset, left, size, p, gradient, work)
    return bound, value_there, point, gradient_there


@njit(error_model="numpy")
def _evaluate(a, c, offset, left, size, p, gradient, work):
    """Return value and Frank–Wolfe bound at p, and the mean size of the gradient, written to `gradient`."""
    product, parts = work[0], work[1]
    _multiply(a, p, product)
    value, slope = offset, 0.0
    for x in range(len(p)):
        value += p[x] * (product[x] + c[x])
        gradient[x] = 2 * product[x] + c[x]
        slope += abs(gradient[x]) / len(p)
        parts[x] = gradient[x]
    return value, value + _least_slope(parts, left, size) - _dot(gradient, p), slope


@njit(error_model="numpy", fastmath=True)
def _dot(x, y):
    total = 0.0
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@njit(error_model="numpy", fastmath=True)
def _multiply(a, x, product):
    """Write A·x, without the threads of a BLAS, which cost a small matrix more than they gain."""
    for i in range(len(x)):
        total = 0.0
        for j in range(len(x)):
            total += a[i, j] * x[j]
        product[i] = total


@njit(error_model="numpy")
def _least_slope(parts, left, size):
    """Return min gradientᵀv over the polytope: of every group the `left` least entries.

    `parts`, a copy of the gradient, is reordered.
    """
    total, first = 0.0, 0
    for g in range(len(left)):
        part = parts[first : first + size[g]]
        least_first(part, left[g])
        for x in range(left[g]):
            total += part[x]
        first += size[g]
    return total


@njit(error_model="numpy")
def least_first(values, count):
    """Reorder so that none of the first `count` is above any other (Hoare's selection)."""
    low, high = 0, len(values) - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if count - 1 <= j:
            high = j
        elif count - 1 >= i:
            low = i
        else:
            break


def _step(a, gradient, label, left, size, iterate, scratch):
    """Improve the iterate in place by predictor and corrector; return False where a factorisation breaks.

    (NumPy's factorisations: Numba's take as long to compile as all else here.)
    """
    p, low, high, h = iterate.p, iterate.low, iterate.high, scratch.h
    miss = scratch.groups[0]
    mu = _barrier(a, label, left, p, low, high, h, miss)
    try:
        lower = np.linalg.cholesky(h)
        _groups_through(lower, size, scratch.w, scratch.schur)
        factor = np.linalg.cholesky(scratch.schur)
    except np.linalg.LinAlgError:
        return False
    return _move(gradient, label, iterate, mu, lower, factor, scratch)


@njit(error_model="numpy")
def _barrier(a, label, left, p, low, high, h, miss):
    """Return the mean complementarity; write the diagonal of H, and what each group misses."""
    m = len(p)
    mu = 0.0
    for g in range(len(left)):
        miss[g] = left[g]
    for x in range(m):
        mu += (low[x] * p[x] + high[x] * (1 - p[x])) / (2 * m)
        h[x, x] = 2 * a[x, x] + (low[x] / p[x] + high[x] / (1 - p[x]))
        miss[label[x]] -= p[x]
    return mu


@njit(error_model="numpy")
def _move(gradient, label, iterate, mu, lower, schur, scratch):
    """Make the two steps, by the factors of H and of the groups' system."""
    p, low, high, nu = iterate.p, iterate.low, iterate.high, iterate.nu
    w, groups, work = scratch.w, scratch.groups, scratch.work
    m, count = len(p), len(nu)
    miss, dnu = groups[0], groups[1]
    cross_low, cross_high, dp, dlow, dhigh = work[0], work[1], work[2], work[3], work[4]
    for x in range(m):
        cross_low[x] = cross_high[x] = 0.0
    primal, dual, target = 1.0, 1.0, 0.0
    for phase in range(2):
        for x in range(m):
            dp[x] = nu[label[x]] - gradient[x]
            dp[x] += (target - cross_low[x]) / p[x] - (target - cross_high[x]) / (1 - p[x])
        _down(lower, dp)
        for g in range(count):
            dnu[g] = miss[g] - _dot(w[g], dp)
        _down(schur, dnu)
        _up(schur, dnu)
        _add_combination(w, dnu, dp)
        _up(lower, dp)
        for x in range(m):
            dlow[x] = (target - cross_low[x] - low[x] * dp[x]) / p[x] - low[x]
            dhigh[x] = (target - cross_high[x] + high[x] * dp[x]) / (1 - p[x]) - high[x]
        primal, dual = _lengths(p, low, high, dp, dlow, dhigh)
        if phase == 0:
            after = 0.0
            for x in range(m):
                after += (low[x] + dual * dlow[x]) * (p[x] + primal * dp[x])
                after += (high[x] + dual * dhigh[x]) * (1 - p[x] - primal * dp[x])
                cross_low[x], cross_high[x] = dp[x] * dlow[x], -dp[x] * dhigh[x]
            target = (after / (2 * m) / mu) ** 3 * mu
    for x in range(m):
        if not np.isfinite(dp[x]):
            return False
    for x in range(m):
        p[x] = min(max(p[x] + primal * dp[x], _EDGE), 1 - _EDGE)
        low[x] = max(low[x] + dual * dlow[x], _LEAST_MULTIPLIER)
        high[x] = max(high[x] + dual * dhigh[x], _LEAST_MULTIPLIER)
    for g in range(count):
        nu[g] += dual * dnu[g]
    return True


@njit(error_model="numpy")
def _lengths(p, low, high, dp, dlow, dhigh):
    """Return the lengths of the steps of p and of the multipliers, at most 1: none reaches the boundary."""
    primal, dual = 1.0, 1.0
    for x in range(len(p)):
        if dp[x] < 0:
            primal = min(primal, -_REACH * p[x] / dp[x])
        elif dp[x] > 0:
            primal = min(primal, _REACH * (1 - p[x]) / dp[x])
        if dlow[x] < 0:
            dual = min(dual, -_REACH * low[x] / dlow[x])
        if dhigh[x] < 0:
            dual = min(dual, -_REACH * high[x] / dhigh[x])
    return primal, dual


@njit(error_model="numpy", fastmath=True)
def _groups_through(lower, size, w, schur):
    """Write W = (L⁻¹E)ᵀ [groups, m], and WWᵀ.

    Row g is zero before its group, so that only what follows is worked on. (Plain loops: matrix products
    would take as long again to compile.)
    """
    m = len(lower)
    for x in range(m):
        first = 0
        for g in range(len(size)):
            if x < first:
                break
            total = 1.0 if x < first + size[g] else 0.0
            for y in range(first, x):
                total -= lower[x, y] * w[g, y]
            w[g, x] = total / lower[x, x]
            first += size[g]
    first = 0
    for g in range(len(size)):
        for k in range(g + 1):
            total = 0.0
            for x in range(first, m):
                total += w[g, x] * w[k, x]
            schur[g, k] = schur[k, g] = total
        first += size[g]


@njit(error_model="numpy", fastmath=True)
def _down(lower, x):
    """Set x ← L⁻¹x in place."""
    for i in range(len(x)):
        total = x[i]
        for j in range(i):
            total -= lower[i, j] * x[j]
        x[i] = total / lower[i, i]


@njit(error_model="numpy", fastmath=True)
def _up(lower, x):
    """Set x ← L⁻ᵀx in place, along the rows of L too."""
    for i in range(len(x) - 1, -1, -1):
        value = x[i] / lower[i, i]
        x[i] = value
        for j in range(i):
            x[j] -= lower[i, j] * value


@njit(error_model="numpy", fastmath=True)
def _add_combination(w, factor, x):
    """Add Wᵀ·factor to x."""
    for g in range(len(factor)):
        for i in range(len(x)):
            x[i] += w[g, i] * factor[g]
