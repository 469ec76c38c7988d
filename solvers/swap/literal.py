"""The paper's algorithm to the letter, the reference of every faster kernel.

SparseSwaps (arXiv 2512.10922), batched over rows in torch: for every swap all |U|·|P| pairs are scanned, and
the best is made, until none improves in float64. Rows and pairs are tiled under a memory limit; c and the
chosen pair are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from maskopt.core.clock import clock
from maskopt.solvers.shared_budget import by_count
from maskopt.solvers.swap.engine import Batch

#: bytes per pair that a scan holds at once: Δ, the gathered G, a temporary
_PAIR_BYTES = 4


def refine_literally(
    batch: Batch,
    *,
    max_swaps: int | None,
    deadline: float,
    memory: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Do the same as `engine.refine`, in `memory` bytes."""
    most = math.inf if max_swaps is None else max_swaps
    all_rows = torch.arange(batch.rows, device=batch.x.device)
    refresh(batch, all_rows, memory)
    batch.history.append(batch.objective * batch.scale)
    double = torch.full_like(batch.proven, not batch.single)
    active = batch.swaps < most
    while bool(active.any()) and clock() < deadline:
        for exact in (False, True):
            rows = (active & (double == exact)).nonzero()[:, 0]
            if not len(rows):
                continue
            kept, pruned, delta = best_swaps(batch, rows, exact, memory)
            batch.scans[rows] += 1
            improving = delta < -batch.threshold(rows)
            batch.proven[rows[~improving]] = exact
            active[rows[~improving]] = not exact
            double[rows[~improving]] = True
            swap(batch, rows[improving], kept[improving], pruned[improving], delta[improving])
        active &= batch.swaps < most
        if progress is not None:
            progress(batch.rows - int(active.sum()))
    batch.history.append(batch.objective * batch.scale)
    refresh(batch, all_rows, memory)


def refresh(batch: Batch, rows: Tensor, memory: int) -> None:
    """Compute c and f of some rows from scratch, float64, G widened a few columns at a time."""
    dropped = torch.where(batch.kept[rows], 0.0, batch.x[rows])
    step = max(1, memory // (2 * 8 * batch.n))
    for start in range(0, batch.n, step):
        block = slice(start, start + step)
        batch.c[rows, block] = dropped @ batch.gram[:, block].double()
    batch.objective[rows] = (batch.c[rows] * dropped).sum(1)
    batch.add_linear(rows)


def swap(batch: Batch, rows: Tensor, kept: Tensor, pruned: Tensor, delta: Tensor) -> None:
    """Make one swap in each of some rows: c ← c + x_u G_:u − x_p G_:p."""
    batch.kept[rows, kept] = False
    batch.kept[rows, pruned] = True
    batch.c[rows] += batch.x[rows, kept, None] * batch.gram[kept].double()
    batch.c[rows] -= batch.x[rows, pruned, None] * batch.gram[pruned].double()
    batch.objective[rows] += delta
    batch.swaps[rows] += 1


def best_swaps(
    batch: Batch, rows: Tensor, exact: bool, memory: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best legal pair of each row: kept [rows], pruned [rows], Δ float64, +inf without a pair.

    Ties: the lowest kept, then the lowest pruned index. Pairs are compared in float64 where `exact`, else in
    float32.
    """
    kept, pruned = torch.zeros_like(rows), torch.zeros_like(rows)
    delta = torch.full(rows.shape, torch.inf, dtype=torch.float64, device=rows.device)
    groups = batch.n // batch.group
    for same_count in by_count(batch.kept[rows]):
        keep = int(batch.kept[rows[same_count[0]]].sum()) // groups
        bytes_per_row = groups * keep * (batch.group - keep) * _PAIR_BYTES * (4 if exact else 2)
        if bytes_per_row == 0:
            continue
        tile = max(1, memory // bytes_per_row)
        slices = -(-bytes_per_row // memory) if tile == 1 else 1
        for part in same_count.split(tile):
            kept[part], pruned[part], delta[part] = _best_of_tile(batch, rows[part], exact, slices)
    return kept, pruned, delta


def _best_of_tile(
    batch: Batch, rows: Tensor, exact: bool, slices: int
) -> tuple[Tensor, Tensor, Tensor]:
    groups = batch.n // batch.group
    mask, x, c = batch.kept[rows], batch.x[rows], batch.c[rows]
    kept = mask.nonzero()[:, 1].view(len(rows), groups, -1)
    pruned = (~mask).nonzero()[:, 1].view(len(rows), groups, -1)
    square, linear = x.square() * batch.diagonal, 2 * x * c
    a, b = square + linear, square - linear
    dtype = torch.float64 if exact else torch.float32

    def pick(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(1, index.flatten(1)).view(index.shape)

    x_p, b_p = pick(x, pruned).to(dtype), pick(b, pruned).to(dtype)
    best = torch.full((len(rows),), torch.inf, dtype=dtype, device=rows.device)
    best_kept, best_pruned = torch.zeros_like(rows), torch.zeros_like(rows)
    line = torch.arange(len(rows), device=rows.device)
    for part in kept.split(max(1, -(-kept.shape[2] // slices)), dim=2):
        delta = batch.gram[part[..., :, None], pruned[..., None, :]].to(dtype)
        delta *= (-2 * pick(x, part)).to(dtype)[..., :, None]
        delta *= x_p[..., None, :]
        delta += pick(a, part).to(dtype)[..., :, None]
        delta += b_p[..., None, :]
        value, position = delta.flatten(1).min(1)
        size = delta.shape[1:]
        group = position // (size[1] * size[2])
        u = position // size[2] % size[1]
        better = value < best
        best = torch.where(better, value, best)
        best_kept = torch.where(better, part[line, group, u], best_kept)
        best_pruned = torch.where(better, pruned[line, group, position % size[2]], best_pruned)
    exact_delta = a[line, best_kept] + b[line, best_pruned]
    cross = batch.gram[best_kept, best_pruned].double()
    exact_delta -= 2 * x[line, best_kept] * x[line, best_pruned] * cross
    return best_kept, best_pruned, exact_delta
