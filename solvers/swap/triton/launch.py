"""Tensor functions around the Triton programs of `kernels.py`: shapes, buffers, grids, rounding.

They run where their arguments are, and wait for the device only where a count decides the size of a grid.
Importing this module needs the package `triton`.

**Rounding.** With u = 2⁻²⁴ in float32, a scan computes fl(a + fl(b + h·fl(x_p g))). Rounding a, b, x and G to
float32 included, its error is at most 2u|a_u| + 3u|b_p| + 6u·2|x_u x_p G_up|, to first order, and 2|x_u x_p
G_up| ≤ D_u + D_p where D_j = x_j² d_j² with |G_ij| ≤ d_i d_j (`Reach`). The same holds for the bounds by
which pairs are passed over. `column_terms` therefore takes 8u(|a| + D) off a and 8u(|b| + D) off b: Δ' ≤ Δ
for every pair, and least Δ' ≥ −limit proves that no pair gains more than the limit. That needs a and b
themselves in float64, so c too.
"""

from __future__ import annotations

import torch
import triton
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskopt.solvers.swap.torch_kernel import SLACK, Reach
from maskopt.solvers.swap.triton import kernels

#: values of the grid of `discard`: grid_k = top · 2^(−k/8), over a range of 2¹⁶
GRID = 128
#: kept columns × pruned columns that a program of the scan of survivors holds
BLOCK_U, BLOCK_P = 16, 64
#: columns a program of the row-wise kernels handles at a time
STRIP = 1024


def column_terms(
    x: Float[Tensor, "all n"],
    c: Float[Tensor, "all n"],
    kept: Bool[Tensor, "all n"],
    diagonal: Float[Tensor, " n"],
    reach: Reach,
    dtype: torch.dtype,
    rows: Int[Tensor, " rows"],
    *,
    lowered: bool,
) -> tuple[Float[Tensor, "rows n"], Float[Tensor, "rows n"], Float[Tensor, "rows n"]]:
    """Compute a, b and e = |x_j| d_j, rounded up, of some rows in one launch.

    `lowered`: a and b are made pessimistic. a is +inf where a column is not kept, b where it is not pruned.
    """
    shape = (len(rows), x.shape[1])
    a, b, e = (torch.empty(shape, dtype=dtype, device=x.device) for _ in range(3))
    state = x, c, kept.view(torch.int8), rows, diagonal.double().contiguous(), reach.d
    margin = 4.0 * torch.finfo(dtype).eps if lowered else 0.0
    kernels.column_terms[(len(rows), triton.cdiv(x.shape[1], STRIP))](
        *state, a, b, e, x.shape[1], margin, BLOCK=STRIP, num_warps=4
    )
    return a, b, e


def swap_block(
    gram: Float[Tensor, "n n"],
    x: Float[Tensor, "all n"],
    c: Float[Tensor, "all n"],
    kept: Bool[Tensor, "all n"],
    columns: Int[Tensor, "rows N"],
    limit: Float[Tensor, " rows"],
    rows: Int[Tensor, " rows"],
    *,
    group: int,
    room: Int[Tensor, " rows"],
    dtype: torch.dtype,
) -> tuple[Int[Tensor, " rows"], Bool[Tensor, "rows N"]]:
    """Make the best swaps of each row among its candidate columns until none gains more than the limit.

    Returns the number of swaps of each row, and which candidates are kept then (False where padded).

    Args:
        c: G(x ⊙ pruned); not changed, nor is kept.
        columns: int32, ascending, −1 pads (anywhere); N a power of two from 16 to 128.
        rows: the rows of x, c and kept to work on.
        group: swaps stay inside groups of so many consecutive columns.
        room: a row stops after so many swaps.
        dtype: float32 or float64, which the search is done in.
    """
    many, width = columns.shape
    if width & (width - 1) or not 16 <= width <= 128:
        raise ValueError(f"N must be a power of two from 16 to 128, not {width}")
    made = torch.zeros(many, dtype=torch.int32, device=x.device)
    after = torch.zeros((many, width), dtype=torch.int8, device=x.device)
    state = gram, x, c, kept.view(torch.int8), rows, columns.to(torch.int32).contiguous()
    plan = limit.to(dtype).contiguous(), room.to(torch.int32).contiguous()
    sizes = {"N": width, "GROUPED": group < x.shape[1], "num_warps": swap_block_warps(width, dtype)}
    kernels.swap_block[(many,)](*state, *plan, made, after, x.shape[1], group, **sizes)
    return made, after.bool()


def swap_block_warps(width: int, dtype: torch.dtype) -> int:
    """Count the warps that hold N × N entries in registers: 32 of float32 or 8 of float64 a thread."""
    entries = 8 if dtype == torch.float64 else 32
    return max(1, min(16, width * width // (32 * entries)))


def groups_together(width: int, dtype: torch.dtype) -> int:
    """Return the number of groups of `width` columns that one program of `scan_groups` handles."""
    return max(1, (2048 if dtype == torch.float64 else 4096) // (width * width))


def move_correlation(
    gram: Float[Tensor, "n n"],
    c: Float[Tensor, "all n"],
    columns: Int[Tensor, "rows N"],
    change: Float[Tensor, "rows N"],
    rows: Int[Tensor, " rows"],
) -> None:
    """Add Σ_k change_rk G[columns_rk, :] to c_r of some rows in place, summed in c's dtype."""
    n, width = c.shape[1], columns.shape[1]
    columns = columns.clamp(min=0).to(torch.int32).contiguous()
    change = change.to(c.dtype).contiguous()
    kernels.move_correlation[(len(rows), triton.cdiv(n, STRIP))](
        gram, c, rows, columns, change, n, N=width, BLOCK=STRIP, num_warps=4
    )


def discard(
    a: Float[Tensor, "rows n"],
    b: Float[Tensor, "rows n"],
    e: Float[Tensor, "rows n"],
    rho: Float[Tensor, " n"],
    limit: Float[Tensor, " rows"],
) -> tuple[Float[Tensor, "rows n"], Float[Tensor, "rows n"]]:
    """Write +inf to a and b wherever no pair of the column can gain more than the limit; G is not read.

    Δ(u, p) ≥ a_u + b_p − 2ρ_u e_u e_p, so u is out if a_u + φ(ρ_u e_u) ≥ −limit, where
    φ(t) = min_p (b_p − 2t e_p) falls with t and is tabulated on a geometric grid, entered from
    above. The same for p against the u that are left, and once more for u.
    """
    reach = rho.to(e.dtype) * e * SLACK
    top = reach.amax(1, keepdim=True)
    steps = torch.arange(GRID, dtype=torch.float64, device=a.device)
    grid = (top.double() * torch.exp2(-steps / 8)).to(a.dtype)
    grid[:, 0] = top[:, 0]
    position = torch.where(reach > 0, torch.log2(top.double() / reach.double()) * 8, GRID - 1.0)
    position = position.nan_to_num(nan=0.0).clamp(0, GRID - 1).long()
    position -= (grid.gather(1, position) < reach).long()
    position.clamp_(min=0)
    for turn in range(3):
        side, other = (a, b) if turn != 1 else (b, a)
        envelope = torch.empty_like(grid)
        kernels.lower_envelope[(len(a),)](
            other.contiguous(), e, grid, envelope, a.shape[1], T=GRID, BLOCK=32, num_warps=4
        )
        out = side + envelope.gather(1, position) >= -limit[:, None]
        side = side.masked_fill(out, torch.inf)
        a, b = (side, b) if turn != 1 else (a, side)
    return a, b


def scan(
    gram: Float[Tensor, "n n"],
    x: Float[Tensor, "rows n"],
    a: Float[Tensor, "rows n"],
    b: Float[Tensor, "rows n"],
    e: Float[Tensor, "rows n"],
    reach: Reach,
    limit: Float[Tensor, " rows"],
    group: int,
) -> tuple[Float[Tensor, "rows n"], Int[Tensor, "rows n"], Int[Tensor, " rows"]]:
    """Find the best partner of every kept column, where the pair gains more than the limit.

    Returns the least Δ of the kept column u (∞ where it is not below −limit), and int32 its p, the lowest if
    several; both [rows, n]. And the pairs of each row that `discard` leaves, groups not counted.

    Args:
        a, b, e: of `column_terms`, pessimistic where the outcome is to be a proof; in the dtype of x, +inf
            where a column is not kept (a) or not pruned (b).
        group: pairs stay inside groups of so many consecutive columns.
    """
    rows, n = x.shape
    value = torch.full_like(x, torch.inf)
    partner = torch.full(x.shape, -1, dtype=torch.int32, device=x.device)
    limit = limit.to(x.dtype)
    rho = reach.rho.to(x.dtype) * SLACK
    fewer_a, fewer_b = discard(a, b, e, rho, limit)
    pairs = (fewer_a < torch.inf).sum(1) * (fewer_b < torch.inf).sum(1)
    lists = []
    for values in (fewer_a, fewer_b):
        columns = torch.empty(x.shape, dtype=torch.int32, device=x.device)
        count = torch.empty(rows, dtype=torch.int32, device=x.device)
        kernels.list_finite[(rows,)](values.contiguous(), columns, count, n, BLOCK=STRIP)
        lists += [columns, count]
    longest = int(lists[1].max())
    if longest == 0:
        return value, partner, pairs
    state = gram, x, a.contiguous(), b.contiguous(), e, rho, limit
    sizes = {"GROUPED": group < n, "BU": BLOCK_U, "BP": BLOCK_P}
    kernels.scan_survivors[(rows, triton.cdiv(longest, BLOCK_U))](
        *state, *lists, value, partner, n, group, **sizes, num_warps=4
    )
    return value, partner, pairs


def scan_groups(
    blocks: Float[Tensor, "groups M M"],
    x: Float[Tensor, "rows n"],
    a: Float[Tensor, "rows n"],
    b: Float[Tensor, "rows n"],
) -> tuple[Float[Tensor, "rows groups"], Int[Tensor, "rows groups"], Int[Tensor, "rows groups"]]:
    """Return Δ, u and p of the best swap inside every group of N:M, M ≤ 32 (+inf where there is none)."""
    rows, n = x.shape
    groups, size, _ = blocks.shape
    if size > 32:
        raise ValueError(f"groups of {size} columns; at most 32 fit one program")
    shape = (rows, groups)
    value = torch.empty(shape, dtype=x.dtype, device=x.device)
    kept_best = torch.empty(shape, dtype=torch.int32, device=x.device)
    pruned_best = torch.empty(shape, dtype=torch.int32, device=x.device)
    width = max(2, triton.next_power_of_2(size))
    together = groups_together(width, x.dtype)
    state = (values.contiguous() for values in (blocks, x, a, b))
    outputs = value, kept_best, pruned_best
    kernels.scan_groups[(rows, triton.cdiv(groups, together))](
        *state, *outputs, n, size, groups, MP=width, BG=together, num_warps=4
    )
    return value, kept_best, pruned_best
