"""The Triton programs of 1-swap search. Importing this module needs the package `triton`.

Notation as in `maskopt.solvers.swap.engine`, with D_j = x_j²G_jj and e_j = √D_j.

All kernels take x, a and b in one floating dtype (float32, or float64) and read G in whichever of
the two it has. In the scans a is +inf where u is not kept, b is +inf where p is not pruned, so that
no masks are needed: +inf never wins. The functions that launch them, with shapes and checks, are
in `launch.py`. Nothing here computes an index above 2³¹ in 32 bits: n² < 2³¹ up to n = 46,340, and
rows are addressed in 64 bits.
"""

# parameters are what the compiler makes of them: pointers, scalars, constants
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swap_block(
    gram,
    x,
    c,
    kept,
    index,
    columns,
    limit,
    room,
    made,
    kept_after,
    n,
    group,
    N: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """One program per row: best swaps among N candidate columns until none gains over the limit.

    Everything a swap touches (2 x_i x_j G_ij over the candidates, and 2 x_i c_i) is loaded once and
    stays in registers; a swap neither reads memory nor writes it. All reductions run along the first
    axis, p, which Triton lays along registers (the block of G is symmetric), so that they need no
    shuffles and the vectors over u take one register each. Candidates are in ascending order, so the
    lowest position is the lowest column; −1 pads. The program's row of x, c and kept is
    index[program]; it computes in the dtype of limit.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, N)
    column = tl.load(columns + row * N + lane)
    live = column >= 0
    safe = tl.where(live, column, 0)
    at = tl.load(index + row).to(tl.int64) * n + safe
    weight = tl.load(x + at, mask=live, other=0.0).to(limit.dtype.element_ty)
    inside = tl.load(kept + at, mask=live, other=0).to(tl.int32)
    both = live[:, None] & live[None, :]
    cross = tl.load(gram + safe[:, None] * n + safe[None, :], mask=both, other=0.0)
    cross = 2.0 * (weight[:, None] * weight[None, :]) * cross.to(weight.dtype)
    square = 0.5 * tl.sum(tl.where(lane[:, None] == lane[None, :], cross, 0.0), axis=0)
    linear = 2.0 * weight * tl.load(c + at, mask=live, other=0.0).to(weight.dtype)
    team = safe // group
    threshold = -tl.load(limit + row)
    infinity = float("inf")
    allowed = tl.load(room + row)
    count = 0
    going = count < allowed
    while going:
        a = tl.where(live & (inside != 0), square + linear, infinity)
        b = tl.where(live & (inside == 0), square - linear, infinity)
        delta = (a[None, :] + b[:, None]) - cross
        if GROUPED:
            delta = tl.where(team[None, :] == team[:, None], delta, infinity)
        best_of_kept = tl.min(delta, axis=0)
        best = tl.min(best_of_kept, axis=0)
        going = best < threshold
        if going:
            u = tl.min(tl.where(best_of_kept == best, lane, N), axis=0)
            is_u = lane == u
            a_u = tl.sum(tl.where(is_u, square + linear, 0.0), axis=0)
            cross_u = tl.sum(tl.where(is_u[:, None], cross, 0.0), axis=0)
            partner = (a_u + b) - cross_u
            if GROUPED:
                team_u = tl.sum(tl.where(is_u, team, 0), axis=0)
                partner = tl.where(team == team_u, partner, infinity)
            p = tl.min(tl.where(partner == tl.min(partner, axis=0), lane, N), axis=0)
            is_p = lane == p
            cross_p = tl.sum(tl.where(is_p[:, None], cross, 0.0), axis=0)
            linear += cross_u - cross_p
            inside = tl.where(is_u, 0, tl.where(is_p, 1, inside))
            count += 1
            going = count < allowed
    tl.store(made + row, count)
    tl.store(kept_after + row * N + lane, inside.to(tl.int8), mask=live)


@triton.jit
def move_correlation(gram, c, index, columns, change, n, N: tl.constexpr, BLOCK: tl.constexpr):
    """Add Σ_k change_k · G[columns_k, :] to c for one row and BLOCK columns; the sum in c's dtype.

    The program's row of c is index[program]. Columns that do not change cost no traffic.
    """
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = j < n
    at = c + tl.load(index + row).to(tl.int64) * n + j
    total = tl.load(at, mask=inside, other=0.0)
    for k in range(N):
        by = tl.load(change + row * N + k)
        if by != 0.0:
            line = tl.load(columns + row * N + k)
            values = tl.load(gram + line * n + j, mask=inside, other=0.0)
            total += by.to(total.dtype) * values.to(total.dtype)
    tl.store(at, total, mask=inside)


@triton.jit
def column_terms(x, c, kept, index, diagonal, d, a, b, e, n, margin, BLOCK: tl.constexpr):
    """Write a, b and e of one row and BLOCK columns, computed in float64, in the dtype of a.

    a and b are lowered by margin · (their size + e²) + 2⁻⁸⁰; +inf where a column is on the other side.
    The program's row of x, c and kept is index[program].
    """
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = j < n
    at = tl.load(index + row).to(tl.int64) * n + j
    weight = tl.load(x + at, mask=inside, other=0.0).to(tl.float64)
    side = tl.load(kept + at, mask=inside, other=0)
    square = weight * weight * tl.load(diagonal + j, mask=inside, other=0.0)
    linear = 2.0 * weight * tl.load(c + at, mask=inside, other=0.0).to(tl.float64)
    span = tl.abs(weight) * tl.load(d + j, mask=inside, other=0.0)
    value = tl.where(side != 0, square + linear, square - linear)
    if margin > 0:
        value -= margin * (tl.abs(value) + span * span) + 2.0**-80
    out = row * n + j
    tl.store(a + out, tl.where(side != 0, value, float("inf")).to(a.dtype.element_ty), mask=inside)
    tl.store(b + out, tl.where(side != 0, float("inf"), value).to(a.dtype.element_ty), mask=inside)
    tl.store(e + out, (span * (1.0 + 2.0**-20)).to(a.dtype.element_ty), mask=inside)


@triton.jit
def lower_envelope(b, e, grid, out, n, T: tl.constexpr, BLOCK: tl.constexpr):
    """Write out_k = min_p (b_p − 2 grid_k e_p) over one row, for T values of grid."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, T)
    slope = -2.0 * tl.load(grid + row * T + k)
    least = tl.full((T, BLOCK), float("inf"), b.dtype.element_ty)
    for start in range(0, n, BLOCK):
        p = start + tl.arange(0, BLOCK)
        inside = p < n
        b_p = tl.load(b + row * n + p, mask=inside, other=float("inf"))
        e_p = tl.load(e + row * n + p, mask=inside, other=0.0)
        least = tl.minimum(least, tl.fma(slope[:, None], e_p[None, :], b_p[None, :]))
    tl.store(out + row * T + k, tl.min(least, axis=1))


@triton.jit
def list_finite(values, columns, count, n, BLOCK: tl.constexpr):
    """List the columns at which a row of values is below +inf, ascending, and count them."""
    row = tl.program_id(0).to(tl.int64)
    listed = 0
    for start in range(0, n, BLOCK):
        j = start + tl.arange(0, BLOCK)
        value = tl.load(values + row * n + j, mask=j < n, other=float("inf"))
        hit = (value < float("inf")).to(tl.int32)
        tl.store(columns + row * n + listed + tl.cumsum(hit, 0) - hit, j, mask=hit != 0)
        listed += tl.sum(hit, axis=0)
    tl.store(count + row, listed)


@triton.jit
def scan_survivors(
    gram,
    x,
    a,
    b,
    e,
    rho,
    limit,
    kept_list,
    kept_count,
    pruned_list,
    pruned_count,
    value,
    partner,
    n,
    group,
    GROUPED: tl.constexpr,
    BU: tl.constexpr,
    BP: tl.constexpr,
):
    """Find the best partner of BU kept columns of one row, among the row's listed columns only.

    A pair is looked up in G only if a_u + b_p − 2 min(ρ_u, ρ_p) e_u e_p < −limit: no other can gain
    more than the limit, because |x_u x_p G_up| ≤ min(ρ_u, ρ_p) e_u e_p. Ties: the lowest p.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BU
    many = tl.load(kept_count + row)
    if first < many:
        slot = first + tl.arange(0, BU)
        in_u = slot < many
        u = tl.load(kept_list + row * n + slot, mask=in_u, other=0)
        a_u = tl.load(a + row * n + u, mask=in_u, other=float("inf"))
        h_u = -2.0 * tl.load(x + row * n + u)
        e_u = tl.load(e + row * n + u)
        rho_u = tl.load(rho + u)
        threshold = -tl.load(limit + row)
        least = tl.full((BU, BP), float("inf"), a.dtype.element_ty)
        which = tl.zeros((BU, BP), tl.int32)
        others = tl.load(pruned_count + row)
        for start in range(0, others, BP):
            slot_p = start + tl.arange(0, BP)
            in_p = slot_p < others
            p = tl.load(pruned_list + row * n + slot_p, mask=in_p, other=0)
            b_p = tl.load(b + row * n + p, mask=in_p, other=float("inf"))
            x_p = tl.load(x + row * n + p)
            e_p = tl.load(e + row * n + p)
            rho_p = tl.load(rho + p)
            reach = 2.0 * tl.minimum(rho_u[:, None], rho_p[None, :])
            hope = (a_u[:, None] + b_p[None, :]) - reach * (e_u[:, None] * e_p[None, :]) < threshold
            if GROUPED:
                hope = hope & ((u // group)[:, None] == (p // group)[None, :])
            g = tl.load(gram + u[:, None] * n + p[None, :], mask=hope, other=0.0)
            product = x_p[None, :] * g.to(x_p.dtype)
            delta = a_u[:, None] + tl.fma(h_u[:, None], product, b_p[None, :])
            better = hope & (delta < least)
            least = tl.where(better, delta, least)
            which = tl.where(better, p[None, :], which)
        best = tl.min(least, axis=1)
        lowest = tl.min(tl.where(least == best[:, None], which, n), axis=1)
        good = in_u & (best < threshold)
        tl.store(value + row * n + u, best, mask=good)
        tl.store(partner + row * n + u, lowest, mask=good)


@triton.jit
def scan_groups(
    blocks, x, a, b, value, kept_best, pruned_best, n, M, groups, MP: tl.constexpr, BG: tl.constexpr
):
    """Find the best swap inside each of BG groups of M consecutive columns of one row (N:M).

    blocks is [groups, M, M], the diagonal blocks of G. Ties: the lowest u, then the lowest p.
    """
    row = tl.program_id(0).to(tl.int64)
    team = tl.program_id(1) * BG + tl.arange(0, BG)
    i = tl.arange(0, MP)
    column = team[:, None] * M + i[None, :]
    inside = (team < groups)[:, None] & (i < M)[None, :]
    weight = tl.load(x + row * n + column, mask=inside, other=0.0)
    a_u = tl.load(a + row * n + column, mask=inside, other=float("inf"))
    b_p = tl.load(b + row * n + column, mask=inside, other=float("inf"))
    g = tl.load(
        blocks + (team[:, None, None] * M + i[None, :, None]) * M + i[None, None, :],
        mask=inside[:, :, None] & (i < M)[None, None, :],
        other=0.0,
    )
    product = weight[:, None, :] * g.to(weight.dtype)
    delta = a_u[:, :, None] + tl.fma(-2.0 * weight[:, :, None], product, b_p[:, None, :])
    best_of_kept = tl.min(delta, axis=2)
    best = tl.min(best_of_kept, axis=1)
    partner = tl.min(tl.where(delta == best_of_kept[:, :, None], i[None, None, :], MP), axis=2)
    u = tl.min(tl.where(best_of_kept == best[:, None], i[None, :], MP), axis=1)
    p = tl.sum(tl.where(i[None, :] == u[:, None], partner, 0), axis=1)
    out = row * groups + team
    tl.store(value + out, best, mask=team < groups)
    tl.store(kept_best + out, team * M + u, mask=team < groups)
    tl.store(pruned_best + out, team * M + p, mask=team < groups)
