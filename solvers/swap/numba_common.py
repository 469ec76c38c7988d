# mypy: disallow-untyped-defs=False
"""The kernels that both steps of 1-swap search on the CPU share, and their products with G.

Notation as in `engine.py`. `numba_kernel.py` runs the loops over rows in threads. The order of all arithmetic
in a row depends on the row alone, so that a mask never depends on the rows beside it.

`x`, `c` and everything that decides is float64. `low` is x in the dtype that proposes: float32, or
float64 where the range of the data asks for it. Inner loops run over contiguous memory, and are
written so that LLVM turns them into SIMD: reductions without a branch first, the position after.

What Numba spends on a first run goes by the number of operations, so that
- workspaces are made by NumPy outside: an allocation inside costs more to compile than a loop;
- no literal is passed to a loop, nor a variable that was one at first: each value would be compiled anew.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from maskopt.solvers.kernels import njit

#: +inf that survives fast-math and a few additions, in every dtype
BIG = 1e37
#: G is brought in tiles of so many rows and columns when c is computed: half a MiB, in L2
TILE_J, TILE_I = 256, 512


def _selection(comparison):
    """Return the lesser ("<") or greater (">") of two floats of one dtype, in fast-math.

    A loop around it becomes SIMD; around Python's min, or a comparison, it does not, since Numba's selects
    do not carry the fast-math flags that LLVM asks for. Measured: 15 times.
    """

    @intrinsic
    def function(typing_context, a, b):
        if a != b or a not in (types.float32, types.float64):
            return None

        def generate(context, builder, signature, arguments):
            first = builder.fcmp_ordered(comparison, *arguments, flags=("fast",))
            return builder.select(first, *arguments, flags=("fast",))

        return a(a, b), generate

    return function


minimum, maximum = _selection("<"), _selection(">")


class Rows(NamedTuple):
    """The arrays of a `Batch` that kernels read and write, all rows of it."""

    x: np.ndarray
    low: np.ndarray
    kept: np.ndarray
    c: np.ndarray
    partner: np.ndarray
    cross: np.ndarray
    objective: np.ndarray
    mass: np.ndarray


class Rule(NamedTuple):
    """The size of a group, and the relative and the absolute part of the least gain of a swap."""

    group: int
    relative: float
    floor: float


_FASTMATH = {"nnan", "ninf", "nsz", "contract", "reassoc"}
# a kernel is called from Python and cached with the functions that it calls, which need no more
kernel = njit(fastmath=_FASTMATH)
fast = njit(fastmath=_FASTMATH, cache=False, no_cpython_wrapper=True)


@fast
def sort(values, first, last):
    """Sort values[first:last] in place: few, and for the most part in order."""
    for i in range(first + 1, last):
        value = values[i]
        at = i
        while at > first and values[at - 1] > value:
            values[at] = values[at - 1]
            at -= 1
        values[at] = value


@fast
def scores(x, diagonal, c, kept, out):
    """Write a_u for kept u, b_p for pruned p, float64."""
    for j in range(len(out)):
        square = x[j] * x[j] * diagonal[j]
        linear = 2.0 * x[j] * c[j]
        out[j] = square + linear if kept[j] else square - linear


@fast
def price_groups(gram, x, kept, score, group, threshold, partner, cross):
    """Write each kept column's best partner inside its group, where it improves; return whether one does."""
    n = len(x)
    improving = False
    for first in range(0, n, group):
        for u in range(first, first + group):
            partner[u] = -1
            if not kept[u]:
                continue
            best = -threshold
            for p in range(first, first + group):
                if not kept[p]:
                    value = (score[u] + score[p]) - 2.0 * x[u] * x[p] * gram[u, p]
                    if value < best:
                        best = value
                        partner[u] = p
                        cross[u] = gram[u, p]
            improving = improving or partner[u] >= 0
    return improving


def product_rows(gram, x, kept, c, objective, rows):
    """Write c = G(x ⊙ pruned) and f = (x ⊙ pruned)ᵀc of some rows, float64."""
    columns = np.empty((len(rows), TILE_J), np.int64)
    weights = np.empty((len(rows), TILE_J), np.float64)
    sizes = np.empty(len(rows), np.int64)
    _product_rows(gram, x, kept, c, objective, columns, weights, sizes, rows)


@kernel
def _product_rows(gram, x, kept, c, objective, columns, weights, sizes, rows):
    """Do the same, G tile by tile; a tile's pruned columns and their weights are listed first."""
    n = x.shape[1]
    count = len(rows)
    for r in rows:
        c[r, :] = 0.0
    for j0 in range(0, n, TILE_J):
        for k in range(count):
            r = rows[k]
            m = 0
            for j in range(j0, min(n, j0 + TILE_J)):
                if not kept[r, j] and x[r, j] != 0.0:
                    columns[k, m] = j
                    weights[k, m] = x[r, j]
                    m += 1
            while m % 4:  # a multiple of four, filled up with zero weights
                columns[k, m] = j0
                weights[k, m] = 0.0
                m += 1
            sizes[k] = m
        for i0 in range(0, n, TILE_I):
            i1 = min(n, i0 + TILE_I)
            for k in range(count):
                out = c[rows[k], i0:i1]
                for m in range(0, sizes[k], 4):
                    g0 = gram[columns[k, m], i0:i1]
                    g1 = gram[columns[k, m + 1], i0:i1]
                    g2 = gram[columns[k, m + 2], i0:i1]
                    g3 = gram[columns[k, m + 3], i0:i1]
                    w0, w1 = weights[k, m], weights[k, m + 1]
                    w2, w3 = weights[k, m + 2], weights[k, m + 3]
                    for i in range(i1 - i0):
                        out[i] = w3 * g3[i] + (w2 * g2[i] + (w1 * g1[i] + (w0 * g0[i] + out[i])))
    for r in rows:
        total = 0.0
        for j in range(n):
            if not kept[r, j]:
                total += x[r, j] * c[r, j]
        objective[r] = total
