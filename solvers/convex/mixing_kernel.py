# mypy: disallow-untyped-defs=False
"""The compiled sweep of the mixing method on the CPU, at the speed of a matrix product.

Coordinates go in order, eight at a time: their g_i = Σ_j C_ij v_j over everything outside the eight is
a small matrix product with the accumulators in registers, what is inside follows one after the other.
This is the Gauss–Seidel order exactly, only summed differently.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from maskopt.solvers.kernels import njit

#: lanes of one vector of accumulators; ranks are padded to a multiple of it
LANES = 16
#: coordinates at a time
HEIGHT = 8


def _sums(builder, count, first, product):
    """Emit first[h] + Σ_{t < count} product(t)[h], the vectors of sums held in registers.

    Numba's own loops keep the accumulators in memory, which costs a factor of five.
    """
    entry = builder.block
    loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
    zero = ir.Constant(count.type, 0)
    builder.cbranch(builder.icmp_signed(">", count, zero), loop, done)

    builder.position_at_end(loop)
    t = builder.phi(count.type)
    sums = [builder.phi(word.type) for word in first]
    following = [
        builder.fadd(total, term, flags=("contract",))
        for total, term in zip(sums, product(t), strict=True)
    ]
    after = builder.add(t, ir.Constant(count.type, 1))
    builder.cbranch(builder.icmp_signed("<", after, count), loop, done)
    for phi, start, later in ((t, zero, after), *zip(sums, first, following, strict=True)):
        phi.add_incoming(start, entry)
        phi.add_incoming(later, loop)

    builder.position_at_end(done)
    totals = [builder.phi(word.type) for word in first]
    for total, start, later in zip(totals, first, following, strict=True):
        total.add_incoming(start, entry)
        total.add_incoming(later, loop)
    return totals


class _Memory:
    """Loads and stores at addresses that are whole numbers, of entries of float32 or float64."""

    def __init__(self, builder, kind, whole):
        self.builder, self.kind, self.whole = builder, kind, whole
        self.size = 4 if isinstance(kind, ir.FloatType) else 8
        self.vector = ir.VectorType(kind, LANES)

    def at(self, base, count, size=None):
        """Return the address `count` (a number or a value) entries beyond `base`."""
        if isinstance(count, int):
            count = ir.Constant(self.whole, count)
        size = ir.Constant(self.whole, size or self.size)
        return self.builder.add(base, self.builder.mul(size, count))

    def load(self, address):
        """Load a vector of LANES entries."""
        word = self.builder.load(self.builder.inttoptr(address, self.vector.as_pointer()))
        word.align = self.size
        return word

    def store(self, word, address):
        place = self.builder.inttoptr(address, self.vector.as_pointer())
        self.builder.store(word, place).align = self.size

    def times(self, address, word):
        """Multiply a vector by the entry at an address."""
        entry = self.builder.load(self.builder.inttoptr(address, self.kind.as_pointer()))
        short, nothing = ir.IntType(32), ir.Constant(self.vector, ir.Undefined)
        spread = self.builder.insert_element(nothing, entry, ir.Constant(short, 0))
        lanes = ir.Constant(ir.VectorType(short, LANES), [0] * LANES)
        spread = self.builder.shuffle_vector(spread, nothing, lanes)
        return self.builder.fmul(spread, word, flags=("contract",))

    def number(self, address):
        """Load an int32 as a whole number."""
        short = ir.IntType(32)
        entry = self.builder.load(self.builder.inttoptr(address, short.as_pointer()))
        return self.builder.sext(entry, self.whole)


def _adding(terms):
    """Return an intrinsic that adds Σ_{t < count} product(t) to vectors in memory.

    `terms`: a function of the memory and the arguments between `like` and `count`, to the addresses of the
    vectors and `product`.
    """

    @intrinsic
    def add(typing_context, like, first, second, third, stride, out, count):
        if like not in (types.float32, types.float64):
            return None

        def generate(context, builder, signature, arguments):
            count = arguments[-1]
            memory = _Memory(builder, arguments[0].type, count.type)
            outs, product = terms(memory, *arguments[1:-1])
            totals = _sums(builder, count, [memory.load(place) for place in outs], product)
            for total, place in zip(totals, outs, strict=True):
                memory.store(total, place)
            return context.get_dummy_value()

        return types.void(like, *[types.intp] * 6), generate

    return add


def _panel(height):
    """Return the intrinsic of out[h, :16] += Σ_j g[h, j]·u[j, :16] for h < height, j < count."""

    def terms(memory, g, g_stride, u, stride, out):
        outs, rows = (
            [
                memory.at(base, memory.builder.mul(step, ir.Constant(step.type, h)))
                for h in range(height)
            ]
            for base, step in ((out, stride), (g, g_stride))
        )

        def product(j):
            word = memory.load(memory.at(u, memory.builder.mul(j, stride)))
            return [memory.times(memory.at(row, j), word) for row in rows]

        return outs, product

    return _adding(terms)


_tall, _single = _panel(HEIGHT), _panel(1)


def _scattered(width):
    """Return the intrinsic of out[:16·width] += Σ_t c[t]·v[index[t], :16·width], t < count, index int32."""

    def terms(memory, c, index, v, stride, out):
        def product(t):
            j = memory.number(memory.at(index, t, size=4))
            row = memory.at(v, memory.builder.mul(j, stride))
            words = [memory.load(memory.at(row, lane * LANES)) for lane in range(width)]
            return [memory.times(memory.at(c, t), word) for word in words]

        return [memory.at(out, lane * LANES) for lane in range(width)], product

    return _adding(terms)


#: vectors of accumulators that are summed side by side
WIDTH = 4
_wide, _narrow = _scattered(WIDTH), _scattered(1)


@njit
def _add_entries(value, index, v, g, first, last):
    """Add Σ_t value[t]·v[index[t]] to g for first ≤ t < last; index of int32."""
    k = v.shape[1]
    like, size = v[0, 0], v.itemsize
    values, places = value.ctypes.data + first * size, index.ctypes.data + first * index.itemsize
    vectors, sums = v.ctypes.data, g.ctypes.data
    lane = 0
    while lane + WIDTH * LANES <= k:
        _wide(like, values, places, vectors + lane * size, k, sums + lane * size, last - first)
        lane += WIDTH * LANES
    while lane < k:
        _narrow(like, values, places, vectors + lane * size, k, sums + lane * size, last - first)
        lane += LANES


def _aligned(rows, columns, dtype):
    """Return zeros [rows, columns] at a multiple of 64 bytes: vectors that straddle cache lines are slow."""
    raw = np.zeros(rows * columns + 64, dtype)
    shift = ((-raw.ctypes.data) % 64) // raw.itemsize
    return raw[shift : shift + rows * columns].reshape(rows, columns)


@njit
def _outside(gram, u, out, low, high):
    """Set out[h, :] to Σ over j outside low … high of G[low + h, j]·u[j, :]."""
    n, k = u.shape
    like = u[0, 0]
    size = u.itemsize
    out[:] = 0
    for lane in range(0, k, LANES):
        row, vectors, target = gram.ctypes.data + low * n * size, u.ctypes.data, out.ctypes.data
        vectors, target = vectors + lane * size, target + lane * size
        row_after, vectors_after = row + high * size, vectors + high * k * size
        if high - low == HEIGHT:
            _tall(like, row, n, vectors, k, target, low)
            _tall(like, row_after, n, vectors_after, k, target, n - high)
        else:
            for h in range(high - low):
                below, sums = h * n * size, target + h * k * size
                _single(like, row + below, n, vectors, k, sums, low)
                _single(like, row_after + below, n, vectors_after, k, sums, n - high)


@njit
def couplings(gram, w, out, pieces):
    """Set out to w_i(Gw)_i, for the rows of `pieces`; a BLAS would sum as it suits all rows together."""
    n = w.shape[1]
    for row in pieces:
        for i in range(n):
            total = 0.0
            for j in range(n):
                total += gram[i, j] * w[row, j]
            out[row, i] = w[row, i] * total


def sweep(gram, w, linear, v, *others):
    """Make `sweeps` passes over the rows of `pieces`; v [rows, n, k] and y [rows, n] change in place.

    Args:
        gram, w, linear: [n, n], [rows, n], [rows, n]: C_ij = w_i G_ij w_j/4, C_i0 = linear_i.
        starts, index, value: the sparse addition to C, see `Extra`, v_0 the last of an input's; starts may
            have no rows.
        pieces: int64, which rows.
    """
    n, k = v.shape[1:]
    work = _aligned(n, k, v.dtype), _aligned(HEIGHT, k, v.dtype), np.empty((n, k), v.dtype)
    _sweep(gram, w, linear, v, *others[:-1], *work, others[-1])


@njit(fastmath={"nnan", "ninf", "nsz", "contract", "reassoc"})
def _sweep(
    gram, w, linear, v, y, rho, group, pruned, sweeps, starts, index, value, u, out, total, pieces
):  # fmt: skip
    n, k = v.shape[1], v.shape[2]
    for row in pieces:
        total[:] = 0
        quarter = v.dtype.type(0.25)
        penalty = quarter * rho
        offset = rho * (group - 2 * pruned) * quarter
        for i in range(n):
            for a in range(k):
                u[i, a] = quarter * w[row, i] * v[row, i, a]
                total[i // group, a] += v[row, i, a]
        for _ in range(sweeps):
            for low in range(0, n, HEIGHT):
                high = min(low + HEIGHT, n)
                _outside(gram, u, out, low, high)
                for i in range(low, high):
                    g, label, wi = out[i - low], i // group, w[row, i]
                    for j in range(low, high):
                        if j != i:
                            c = gram[i, j]
                            for a in range(k):
                                g[a] += c * u[j, a]
                    for a in range(k):
                        g[a] = wi * g[a] + penalty * (total[label, a] - v[row, i, a])
                    g[0] += linear[row, i] + offset
                    if len(starts) > 0:
                        last = starts[row, i + 1]
                        if last > starts[row, i] and index[last - 1] == n:
                            last -= 1
                            g[0] += value[last]
                        _add_entries(value, index, v[row], g, starts[row, i], last)
                    square = v.dtype.type(0)
                    for a in range(k):
                        square += g[a] * g[a]
                    norm = np.sqrt(square)
                    y[row, i] = norm
                    if norm > 0:
                        scale = -1 / norm
                        for a in range(k):
                            new = scale * g[a]
                            total[label, a] += new - v[row, i, a]
                            v[row, i, a] = new
                            u[i, a] = quarter * wi * new
