"""A node of the tree, compiled: the Frank–Wolfe bound of a convex program over what its fixings leave.

    min pᵀAp + cᵀp + constant,   A = base + diag(λ),   over {0 ≤ p ≤ 1, Σ over each group = s, fixings}

The point is found by an interior-point method (Mehrotra's predictor and corrector) on the free inputs
alone, and the bound holds at every point, so that nothing depends on how far the method came. It stops as
soon as its point decides what becomes of the node, which is why it is not the general one of the bounds.
Factorisation, sort and products are written out: calls into LAPACK and NumPy's sort take most of a first
compilation, and are no faster at these sizes.
"""

from __future__ import annotations

import numba
import numpy as np

#: Newton steps at most
_STEPS = 25
#: stop where the gap to the bound is this part of the cutoff
_SETTLED = 1e-5
#: … or this part of what the relaxed value lies below the cutoff: the node cannot be cut off, and what is
#: left to gain does not matter
_HOPELESS = 0.02
#: part of the way to the boundary that a step goes
_INSIDE = 0.995
#: how near 0 and 1 a p_i may come, and how near 0 a multiplier
_EDGE, _LEAST = 1e-14, 1e-300

# NaN and ∞ must be told from numbers, so not `fastmath=True`
_FAST = {"contract", "reassoc", "nsz", "arcp"}


@numba.njit(cache=True, nogil=True)
def bound_node(base, lam, c, constant, group, pruned, state, cutoff):  # type: ignore[no-untyped-def]
    """(bound, point) of a node; fixes inputs of `state` that no mask below `cutoff` has otherwise.

    Args:
        base: float64 [n, n], without λ.
        lam, c: float64 [n].
        state: int8 [n], 1 pruned, 0 kept, −1 free; changed.

    The bound is ∞ where no legal mask is left.
    """
    point = np.zeros(len(c))
    if not _settle(state, group, pruned):
        return np.inf, point
    index, offset, q, linear = _gather(base, lam, c, constant, state, point)
    if len(index) == 0:
        return offset, point
    label, left, size = _choices(index, state, group, pruned)
    best, value, best_p, gradient = _interior_point(q, linear, offset, label, left, size, cutoff)
    for x in range(len(index)):
        point[index[x]] = best_p[x]
    if best < cutoff and value > -np.inf:
        _fix(state, index, gradient, left, size, best, cutoff)
    return best, point


@numba.njit(cache=True, nogil=True)
def _settle(state, group, pruned):  # type: ignore[no-untyped-def]
    """A group whose count is reached leaves nothing free; False where a count cannot be reached."""
    for first in range(0, len(state), group):
        ones, free = 0, 0
        for i in range(first, first + group):
            ones += state[i] == 1
            free += state[i] < 0
        if ones > pruned or ones + free < pruned:
            return False
        if ones == pruned or ones + free == pruned:
            for i in range(first, first + group):
                if state[i] < 0:
                    state[i] = 0 if ones == pruned else 1
    return True


@numba.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _gather(base, lam, c, constant, state, point):  # type: ignore[no-untyped-def]
    """The free inputs, and the program in them alone: offset, quadratic and linear part.

    `point` becomes that of the fixed inputs, 0 elsewhere.
    """
    n, m = len(c), 0
    index = np.empty(n, np.int64)
    for i in range(n):
        if state[i] < 0:
            index[m] = i
            m += 1
        else:
            point[i] = state[i]
    index = index[:m]
    product = np.zeros(n)
    for i in range(n):
        if state[i] == 1:
            line = base[i]
            for j in range(n):
                product[j] += line[j]
            product[i] += lam[i]
    offset = constant
    for i in range(n):
        offset += point[i] * (product[i] + c[i])
    q, linear = np.empty((m, m)), np.empty(m)
    for x in range(m):
        line = base[index[x]]
        for y in range(m):
            q[x, y] = line[index[y]]
        q[x, x] += lam[index[x]]
        linear[x] = 2 * product[index[x]] + c[index[x]]
    return index, offset, q, linear


@numba.njit(cache=True, nogil=True)
def _choices(index, state, group, pruned):  # type: ignore[no-untyped-def]
    """Of the groups that still have a choice: each free input's group, how many of its free inputs
    are to be pruned, and how many there are."""
    m, count, last = len(index), 0, -1
    label, left, size = np.empty(m, np.int64), np.empty(m, np.int64), np.empty(m, np.int64)
    for x in range(m):
        g = index[x] // group
        if g != last:
            last = g
            left[count], size[count] = pruned, 0
            for i in range(g * group, (g + 1) * group):
                left[count] -= state[i] == 1
            count += 1
        label[x] = count - 1
        size[count - 1] += 1
    return label, left[:count], size[:count]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _interior_point(q, linear, offset, label, left, size, cutoff):  # type: ignore[no-untyped-def]
    """The best bound, the objective at its point, the point, and the gradient there."""
    m, count = len(linear), len(left)
    p, gradient = np.empty(m), np.empty(m)
    for x in range(m):
        p[x] = left[label[x]] / size[label[x]]
    _gradient(q, linear, p, gradient)
    mean = 0.0
    for x in range(m):
        mean += abs(gradient[x])
    low = np.full(m, mean / m + _LEAST)
    high, nu = low.copy(), np.zeros(count)
    best, best_value = -np.inf, -np.inf
    best_p, best_gradient, ordered = p.copy(), gradient.copy(), np.empty(m)
    factor, inner, schur = np.empty((m, m)), np.empty((count, m)), np.empty((count, count))
    dp, dlow, dhigh, dnu = np.zeros(m), np.zeros(m), np.zeros(m), np.zeros(count)
    cross_low, cross_high = np.empty(m), np.empty(m)
    for _ in range(_STEPS):
        value, lower = _values(linear, offset, p, gradient, left, size, ordered)
        if lower > best:
            best, best_value = lower, value
            best_p[:] = p
            best_gradient[:] = gradient
        if best >= cutoff or value - best <= _SETTLED * abs(cutoff):
            break
        if value < cutoff and value - best <= _HOPELESS * (cutoff - value):
            break
        if not _factorise(q, p, low, high, label, factor, inner, schur):
            break
        mu = _complementarity(p, low, high, dp, dlow, dhigh, 0.0, 0.0)
        target = 0.0
        cross_low[:] = 0
        cross_high[:] = 0
        for corrector in range(2):
            primal, dual = _direction(
                p, low, high, nu, gradient, target, cross_low, cross_high, label, left,
                factor, inner, schur, dp, dlow, dhigh, dnu,
            )  # fmt: skip
            if not corrector:
                after = _complementarity(p, low, high, dp, dlow, dhigh, primal, dual)
                target = (after / mu) ** 3 * mu
                for x in range(m):
                    cross_low[x], cross_high[x] = dp[x] * dlow[x], -dp[x] * dhigh[x]
        finite = True
        for x in range(m):
            finite = finite and np.isfinite(dp[x])
        if not finite:
            break
        for x in range(m):
            p[x] = min(max(p[x] + primal * dp[x], _EDGE), 1 - _EDGE)
            low[x] = max(low[x] + dual * dlow[x], _LEAST)
            high[x] = max(high[x] + dual * dhigh[x], _LEAST)
        for g in range(count):
            nu[g] += dual * dnu[g]
        _gradient(q, linear, p, gradient)
    return best, best_value, best_p, best_gradient


@numba.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _gradient(q, linear, p, out):  # type: ignore[no-untyped-def]
    """out ← 2qp + linear."""
    for x in range(len(p)):
        line, total = q[x], 0.0
        for y in range(len(p)):
            total += line[y] * p[y]
        out[x] = 2 * total + linear[x]


@numba.njit(cache=True, nogil=True)
def _values(linear, offset, p, gradient, left, size, ordered):  # type: ignore[no-untyped-def]
    """The objective at p, and its Frank–Wolfe bound: the least of the linear form over the polytope."""
    value, slope = offset, 0.0
    for x in range(len(p)):
        value += p[x] * (gradient[x] + linear[x]) / 2
        slope += gradient[x] * p[x]
    lower, first = value - slope, 0
    for g in range(len(left)):
        part = ordered[: size[g]]
        part[:] = gradient[first : first + size[g]]
        _sort(part)
        for x in range(left[g]):
            lower += part[x]
        first += size[g]
    return value, lower


@numba.njit(cache=True, nogil=True)
def _sort(values):  # type: ignore[no-untyped-def]
    """In place, ascending (Shell's sort, Ciura's gaps): a few hundred numbers at most."""
    for gap in (132, 57, 23, 10, 4, 1):
        for i in range(gap, len(values)):
            value, j = values[i], i
            while j >= gap and values[j - gap] > value:
                values[j] = values[j - gap]
                j -= gap
            values[j] = value


@numba.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _factorise(q, p, low, high, label, factor, inner, schur):  # type: ignore[no-untyped-def]
    """H = 2q + diag(low/p + high/(1 − p)) as UᵀU, the rows H⁻¹1_g, and the complement 1_gᵀH⁻¹1_h.

    False where rounding breaks a factorisation.
    """
    m, count = len(p), len(inner)
    for x in range(m):
        line, out = q[x, x:], factor[x, x:]
        for y in range(len(line)):
            out[y] = 2 * line[y]
        out[0] += low[x] / p[x] + high[x] / (1 - p[x])
    if not _cholesky(factor):
        return False
    schur[:] = 0
    for g in range(count):
        line = inner[g]
        for x in range(m):
            line[x] = 1.0 if label[x] == g else 0.0
        _solve(factor, line)
        for x in range(m):
            schur[g, label[x]] += line[x]
    return _cholesky(schur)


@numba.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _cholesky(a):  # type: ignore[no-untyped-def]
    """The upper triangle of a ← U with UᵀU = a; False where a is not positive definite.

    Four rows at a time, so that what is left passes through memory a quarter as often.
    """
    m = len(a)
    for k in range(0, m, 4):
        end = min(k + 4, m)
        for i in range(k, end):
            for above in range(k, i):
                weight, line, out = a[above, i], a[above, i:], a[i, i:]
                for j in range(len(out)):
                    out[j] -= weight * line[j]
            if not a[i, i] > 0:
                return False
            out = a[i, i:]
            scale = 1 / np.sqrt(out[0])
            for j in range(len(out)):
                out[j] *= scale
        for i in range(end, m):
            w0, w1, w2, w3 = a[k, i], a[k + 1, i], a[k + 2, i], a[k + 3, i]
            l0, l1, l2, l3 = a[k, i:], a[k + 1, i:], a[k + 2, i:], a[k + 3, i:]
            out = a[i, i:]
            for j in range(len(out)):
                out[j] -= (w0 * l0[j] + w1 * l1[j]) + (w2 * l2[j] + w3 * l3[j])
    return True


@numba.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _solve(u, x):  # type: ignore[no-untyped-def]
    """x ← (UᵀU)⁻¹x in place; both passes run along the rows of U."""
    m = len(x)
    for i in range(m):
        line, out = u[i, i:], x[i:]
        value = out[0] / line[0]
        for j in range(1, len(out)):
            out[j] -= value * line[j]
        out[0] = value
    for i in range(m - 1, -1, -1):
        line, out = u[i, i:], x[i:]
        total = 0.0
        for j in range(1, len(out)):
            total += line[j] * out[j]
        out[0] = (out[0] - total) / line[0]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _direction(  # type: ignore[no-untyped-def]
    p, low, high, nu, gradient, target, cross_low, cross_high, label, left,
    factor, inner, schur, dp, dlow, dhigh, dnu,
):  # fmt: skip
    """One Newton step towards complementarity `target`, into dp, dlow, dhigh, dnu.

    Returns the parts of it that keep p inside (0, 1) and the multipliers positive.
    """
    m = len(p)
    for x in range(m):
        dp[x] = (
            nu[label[x]]
            - gradient[x]
            + (target - cross_low[x]) / p[x]
            - (target - cross_high[x]) / (1 - p[x])
        )
    _solve(factor, dp)
    for g in range(len(left)):
        dnu[g] = left[g]
    for x in range(m):
        dnu[label[x]] -= p[x] + dp[x]
    _solve(schur, dnu)
    for g in range(len(left)):
        line, weight = inner[g], dnu[g]
        for x in range(m):
            dp[x] += line[x] * weight
    primal = dual = 1.0
    for x in range(m):
        dlow[x] = (target - cross_low[x] - low[x] * dp[x]) / p[x] - low[x]
        dhigh[x] = (target - cross_high[x] + high[x] * dp[x]) / (1 - p[x]) - high[x]
        if dp[x] < 0:
            primal = min(primal, -_INSIDE * p[x] / dp[x])
        elif dp[x] > 0:
            primal = min(primal, _INSIDE * (1 - p[x]) / dp[x])
        if dlow[x] < 0:
            dual = min(dual, -_INSIDE * low[x] / dlow[x])
        if dhigh[x] < 0:
            dual = min(dual, -_INSIDE * high[x] / dhigh[x])
    return primal, dual


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _complementarity(p, low, high, dp, dlow, dhigh, primal, dual):  # type: ignore[no-untyped-def]
    """The mean product of a slack and its multiplier after a step of these lengths."""
    total, m = 0.0, len(p)
    for x in range(m):
        at = p[x] + primal * dp[x]
        total += (low[x] + dual * dlow[x]) * at + (high[x] + dual * dhigh[x]) * (1 - at)
    return total / (2 * m)


@numba.njit(cache=True, nogil=True)
def _fix(state, index, gradient, left, size, bound, cutoff):  # type: ignore[no-untyped-def]
    """Reduced costs: the same linear form with one input on its other side reaches the cutoff."""
    first = 0
    for g in range(len(left)):
        part = gradient[first : first + size[g]].copy()
        _sort(part)
        inside, outside = part[left[g] - 1], part[left[g]]
        for x in range(first, first + size[g]):
            slope = gradient[x]
            if slope <= inside and slope < outside:
                if bound + outside - slope >= cutoff:
                    state[index[x]] = 1
            elif slope >= outside and bound + slope - inside >= cutoff:
                state[index[x]] = 0
        first += size[g]
