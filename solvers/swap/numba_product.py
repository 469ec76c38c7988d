# mypy: disallow-untyped-defs=False
"""The compiled products with G of 1-swap search on the CPU: c from scratch, and the bounds on G's entries."""

from __future__ import annotations

import numpy as np

from maskopt.solvers.swap.numba_common import fast_loop, maximum

#: G is brought in tiles of so many rows and columns when c is computed: half a MiB, in L2
TILE_J, TILE_I = 256, 512


@fast_loop
def reach_rows(gram, inverse, out, rows):
    """out_i = max over j ≠ i of |G_ij|·inverse_i·inverse_j, for some rows of G."""
    n = gram.shape[1]
    for i in rows:
        line = gram[i]
        most = inverse.dtype.type(0)
        for j in range(i):
            most = maximum(most, abs(line[j]) * inverse[j])
        for j in range(i + 1, n):
            most = maximum(most, abs(line[j]) * inverse[j])
        out[i] = most * inverse[i]


def product_rows(gram, x, kept, c, objective, rows):
    """c = G(x ⊙ pruned) and f = (x ⊙ pruned)ᵀc of some rows, float64."""
    columns = np.empty((len(rows), TILE_J), np.int64)
    weights = np.empty((len(rows), TILE_J), np.float64)
    many = np.empty(len(rows), np.int64)
    _product_rows(gram, x, kept, c, objective, columns, weights, many, rows)


@fast_loop
def _product_rows(gram, x, kept, c, objective, columns, weights, many, rows):
    """The same, G tile by tile; a tile's pruned columns and their weights are listed first."""
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
            many[k] = m
        for i0 in range(0, n, TILE_I):
            i1 = min(n, i0 + TILE_I)
            for k in range(count):
                out = c[rows[k], i0:i1]
                for m in range(0, many[k], 4):
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
