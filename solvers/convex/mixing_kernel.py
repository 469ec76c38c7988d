# mypy: disallow-untyped-defs=False
"""The compiled sweep of the mixing method on the CPU, at the speed of a matrix product.

Coordinates go in order, eight at a time: their g_i = Σ_j C_ij v_j over everything outside the eight is
a small matrix product with the accumulators in registers, what is inside follows one after the other.
This is the Gauss–Seidel order exactly, only summed differently. Rows share
nothing but G, so no result depends on the number of threads or on the rows beside it.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from maskopt.solvers.compiled import loop, part

#: lanes of one vector of accumulators; ranks are padded to a multiple of it
LANES = 16
#: coordinates at a time
HEIGHT = 8


def _panel(height):
    """out[h, :16] += Σ_j g[h, j]·u[j, :16] for h < height, j < count; all sums stay in registers.

    Numba's own loops keep the accumulators in memory, which costs a factor of five.
    """

    @intrinsic
    def panel(typing_context, like, g, g_stride, u, stride, out, count):
        if like not in (types.float32, types.float64):
            return None

        def generate(context, builder, signature, arguments):
            _, g, g_stride, u, stride, out, count = arguments
            kind, index = arguments[0].type, count.type
            size = 4 if like == types.float32 else 8
            vector = ir.VectorType(kind, LANES)
            bytes_per = ir.Constant(index, size)
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)

            def load(address):
                word = builder.load(builder.inttoptr(address, vector.as_pointer()))
                word.align = size
                return word

            outs = [
                builder.add(out, builder.mul(bytes_per, builder.mul(stride, ir.Constant(index, h))))
                for h in range(height)
            ]
            rows = [
                builder.add(g, builder.mul(bytes_per, builder.mul(g_stride, ir.Constant(index, h))))
                for h in range(height)
            ]
            step = builder.mul(bytes_per, stride)
            first = [load(address) for address in outs]
            entry = builder.block
            loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
            zero = ir.Constant(index, 0)
            builder.cbranch(builder.icmp_signed(">", count, zero), loop, done)

            builder.position_at_end(loop)
            j, at = builder.phi(index), builder.phi(index)
            sums = [builder.phi(vector) for _ in range(height)]
            word, following = load(at), []
            offset = builder.mul(bytes_per, j)
            for h in range(height):
                pointer = builder.inttoptr(builder.add(rows[h], offset), kind.as_pointer())
                entry_h = builder.insert_element(
                    ir.Constant(vector, ir.Undefined),
                    builder.load(pointer),
                    ir.Constant(ir.IntType(32), 0),
                )
                spread = builder.shuffle_vector(entry_h, ir.Constant(vector, ir.Undefined), lanes)
                product = builder.fmul(spread, word, flags=("contract",))
                following.append(builder.fadd(sums[h], product, flags=("contract",)))
            after = builder.add(j, ir.Constant(index, 1))
            beyond = builder.add(at, step)
            builder.cbranch(builder.icmp_signed("<", after, count), loop, done)
            for phi, start, later in (
                (j, zero, after),
                (at, u, beyond),
                *zip(sums, first, following, strict=True),
            ):
                phi.add_incoming(start, entry)
                phi.add_incoming(later, loop)

            builder.position_at_end(done)
            for h in range(height):
                total = builder.phi(vector)
                total.add_incoming(first[h], entry)
                total.add_incoming(following[h], loop)
                first[h] = total
            for h in range(height):
                word = builder.store(first[h], builder.inttoptr(outs[h], vector.as_pointer()))
                word.align = size
            return context.get_dummy_value()

        return types.void(like, *[types.intp] * 6), generate

    return panel


_tall, _single = _panel(HEIGHT), _panel(1)


def _scattered(width):
    """out[:16·width] += Σ_t c[t]·v[index[t], :16·width] for t < count, sums in registers like `_panel`'s."""

    @intrinsic
    def scattered(typing_context, like, c, index, v, stride, out, count):
        if like not in (types.float32, types.float64):
            return None

        def generate(context, builder, signature, arguments):
            _, c, index, v, stride, out, count = arguments
            kind, whole = arguments[0].type, count.type
            size = 4 if like == types.float32 else 8
            vector, short = ir.VectorType(kind, LANES), ir.IntType(32)
            zeros = ir.Constant(ir.VectorType(short, LANES), [0] * LANES)
            nothing = ir.Constant(vector, ir.Undefined)

            def place(base, lane):
                address = builder.add(base, ir.Constant(whole, lane * LANES * size))
                return builder.inttoptr(address, vector.as_pointer())

            def load(base, lane):
                word = builder.load(place(base, lane))
                word.align = size
                return word

            step = builder.mul(ir.Constant(whole, size), stride)
            first = [load(out, lane) for lane in range(width)]
            entry = builder.block
            loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
            zero = ir.Constant(whole, 0)
            builder.cbranch(builder.icmp_signed(">", count, zero), loop, done)

            builder.position_at_end(loop)
            t = builder.phi(whole)
            sums = [builder.phi(vector) for _ in range(width)]
            at = builder.add(index, builder.mul(t, ir.Constant(whole, 4)))
            j = builder.sext(builder.load(builder.inttoptr(at, short.as_pointer())), whole)
            row = builder.add(v, builder.mul(j, step))
            at = builder.add(c, builder.mul(t, ir.Constant(whole, size)))
            factor = builder.load(builder.inttoptr(at, kind.as_pointer()))
            spread = builder.insert_element(nothing, factor, ir.Constant(short, 0))
            spread = builder.shuffle_vector(spread, nothing, zeros)
            following = []
            for lane in range(width):
                product = builder.fmul(spread, load(row, lane), flags=("contract",))
                following.append(builder.fadd(sums[lane], product, flags=("contract",)))
            after = builder.add(t, ir.Constant(whole, 1))
            builder.cbranch(builder.icmp_signed("<", after, count), loop, done)
            for phi, start, later in ((t, zero, after), *zip(sums, first, following, strict=True)):
                phi.add_incoming(start, entry)
                phi.add_incoming(later, loop)

            builder.position_at_end(done)
            for lane in range(width):
                total = builder.phi(vector)
                total.add_incoming(first[lane], entry)
                total.add_incoming(following[lane], loop)
                first[lane] = total
            for lane in range(width):
                word = builder.store(first[lane], place(out, lane))
                word.align = size
            return context.get_dummy_value()

        return types.void(like, *[types.intp] * 6), generate

    return scattered


#: vectors of accumulators that are summed side by side
WIDTH = 4
_wide, _narrow = _scattered(WIDTH), _scattered(1)


@part(nogil=True)
def _add_entries(value, index, v, g, first, last):
    """g += Σ_t value[t]·v[index[t]] for first ≤ t < last; index of int32."""
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


@part(nogil=True)
def _aligned(rows, columns, like):
    """Zeros [rows, columns] at a multiple of 64 bytes: vectors that straddle cache lines are slow."""
    raw = np.zeros(rows * columns + 64, like.dtype)
    shift = ((-raw.ctypes.data) % 64) // like.itemsize
    return raw[shift : shift + rows * columns].reshape(rows, columns)


@part(nogil=True)
def _outside(gram, u, out, low, high):
    """out[h, :] = Σ over j outside low … high of G[low + h, j]·u[j, :]."""
    n, k = u.shape
    like = u[0, 0]
    size = u.itemsize
    out[:] = 0
    for lane in range(0, k, LANES):
        row, vectors, target = gram.ctypes.data + low * n * size, u.ctypes.data, out.ctypes.data
        vectors, target = vectors + lane * size, target + lane * size
        rest, vectors_after = row + high * size, vectors + high * k * size
        if high - low == HEIGHT:
            _tall(like, row, n, vectors, k, target, low)
            _tall(like, rest, n, vectors_after, k, target, n - high)
        else:
            for h in range(high - low):
                below, sums = h * n * size, target + h * k * size
                _single(like, row + below, n, vectors, k, sums, low)
                _single(like, rest + below, n, vectors_after, k, sums, n - high)


@loop(nogil=True)
def couplings(gram, w, out, pieces):
    """out = w_i(Gw)_i, for the rows of `pieces`; a BLAS would sum as it suits all rows together."""
    n = w.shape[1]
    for row in pieces:
        for i in range(n):
            total = 0.0
            for j in range(n):
                total += gram[i, j] * w[row, j]
            out[row, i] = w[row, i] * total


@loop(nogil=True, fastmath={"nnan", "ninf", "nsz", "contract", "reassoc"})
def sweep(gram, w, linear, v, y, rho, group, pruned, sweeps, starts, index, value, pieces):
    """`sweeps` passes over the rows of `pieces`; v [rows, n, k] and y [rows, n] are changed in place.

    Args:
        gram, w, linear: [n, n], [rows, n], [rows, n]: C_ij = w_i G_ij w_j/4, C_i0 = linear_i.
        starts, index, value: the sparse addition to C, see `Extra`, v_0 the last of an input's; starts may
            have no rows.
        pieces: int64, which rows.
    """
    n, k = v.shape[1], v.shape[2]
    for row in pieces:
        u = _aligned(n, k, v)
        out = _aligned(HEIGHT, k, v)
        total = np.zeros((n // group, k), v.dtype)
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
