# mypy: disallow-untyped-defs=False
"""What the compiled loops of 1-swap search on the CPU share. Importing them needs Numba.

Notation as in `batch.py`. Every loop works on a list of rows, one after the other, releases the
interpreter lock, and touches nothing but its rows; `numba_kernel.py` runs several in threads. The
order of all arithmetic in a row depends on the row alone, so that a mask never depends on the number
of threads or on the rows beside it.

`x`, `c` and everything that decides is float64. `low` is x in the dtype that proposes: float32, or
float64 where the range of the data asks for it. Inner loops run over contiguous memory, and are
written so that LLVM turns them into SIMD: reductions without a branch first, the position after.

What Numba spends on a first run goes by the number of operations, so that
- workspaces are made by NumPy outside: an allocation inside costs more to compile than a loop;
- no literal is passed to a loop, nor a variable that was one at first: each value would be compiled anew.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from maskopt.solvers.compiled import loop, part

#: +inf that survives fast-math and a few additions, in every dtype
BIG = 1e37
#: N:M groups up to this size are priced whole in every round; it costs less than one update of c
SMALL_GROUP = 64


def _reduction(name):
    """min or max of two floats of one dtype, as the LLVM intrinsic.

    A loop around it becomes SIMD; around Python's min, or a comparison, it does not, since Numba's
    selects do not carry the fast-math flags that LLVM asks for. Measured: 15 times.
    """

    @intrinsic
    def function(typing_context, a, b):
        if a != b or a not in (types.float32, types.float64):
            return None

        def generate(context, builder, signature, arguments):
            kind = arguments[0].type
            call = builder.module.declare_intrinsic(name, [kind], ir.FunctionType(kind, [kind] * 2))
            return builder.call(call, arguments, fastmath=("fast",))

        return a(a, b), generate

    return function


minimum, maximum = _reduction("llvm.minnum"), _reduction("llvm.maxnum")
# no reference is counted: arrays belong to the callers, and nothing is allocated
_OPTIONS = {"fastmath": {"nnan", "ninf", "nsz", "contract", "reassoc"}, "_nrt": False}
fast, fast_loop = part(**_OPTIONS), loop(nogil=True, **_OPTIONS)


@fast
def sort(values, first, last):
    """Ascending, in place, values[first:last]: few, and for the most part in order."""
    for i in range(first + 1, last):
        value = values[i]
        at = i
        while at > first and values[at - 1] > value:
            values[at] = values[at - 1]
            at -= 1
        values[at] = value


@fast
def scores(x, diagonal, c, kept, out):
    """a_u for kept u, b_p for pruned p, float64."""
    for j in range(len(out)):
        square = x[j] * x[j] * diagonal[j]
        linear = 2.0 * x[j] * c[j]
        out[j] = square + linear if kept[j] else square - linear


@fast
def price_groups(gram, x, kept, score, group, threshold, partner, cross):
    """Best partner of every kept column inside its group, where it improves; float64. → whether"""
    n = len(x)
    found = False
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
            found = found or partner[u] >= 0
    return found
