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

from maskopt.core.limits import clock
from maskopt.solvers.swap.batch import Batch, by_count
from maskopt.solvers.swap.engine import Outcome

#: bytes per pair that a scan holds at once: Δ, the gathered G, a temporary
_PAIR_BYTES = 4


def refine_literally(
    batch: Batch,
    *,
    max_swaps: int | None,
    deadline: float,
    memory: int,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """As `engine.refine`, in `memory` bytes."""
    everything = torch.arange(batch.rows, device=batch.x.device)
    refresh(batch, everything, memory)
    batch.add_linear(everything)
    outcome = Outcome(proven=batch.swaps < 0, scans=batch.swaps.clone())
    outcome.objectives.append(batch.objective * batch.scale)
    proven = torch.zeros(batch.rows, dtype=torch.bool, device=batch.x.device)
    double = torch.full_like(proven, not batch.single)
    active = batch.swaps < (math.inf if max_swaps is None else max_swaps)
    while bool(active.any()) and clock() < deadline:
        for exact in (False, True):
            rows = (active & (double == exact)).nonzero()[:, 0]
            if not len(rows):
                continue
            kept, pruned, delta = best_swaps(batch, rows, exact, memory)
            outcome.scans[rows] += 1
            improving = delta < -batch.threshold(rows)
            proven[rows[~improving]] = exact
            active[rows[~improving]] = not exact
            double[rows[~improving]] = True
            swap(batch, rows[improving], kept[improving], pruned[improving], delta[improving])
        active &= batch.swaps < (math.inf if max_swaps is None else max_swaps)
        if progress is not None:
            progress(batch.rows - int(active.sum()))
    outcome.proven = proven
    outcome.objectives.append(batch.objective * batch.scale)
    refresh(batch, everything, memory)
    batch.add_linear(everything)
    return outcome


def refresh(batch: Batch, rows: Tensor, memory: int) -> None:
    """c and f without a linear part of some rows from scratch, float64, G widened a few columns at a time."""
    dropped = torch.where(batch.kept[rows], 0.0, batch.x[rows])
    step = max(1, memory // (2 * 8 * batch.n))
    for start in range(0, batch.n, step):
        block = slice(start, start + step)
        batch.c[rows, block] = dropped @ batch.gram[:, block].double()
    batch.objective[rows] = (batch.c[rows] * dropped).sum(1)


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
    """The best pair of each row over all legal pairs: kept [rows], pruned [rows], Δ float64, +inf where no
    pair exists; ties: the lowest kept, then the lowest pruned index. Pairs are compared in float64 where
    `exact`, else in float32."""
    kept, pruned = torch.zeros_like(rows), torch.zeros_like(rows)
    delta = torch.zeros(rows.shape, dtype=torch.float64, device=rows.device)
    for some in by_count(batch.kept[rows]):
        found = _best_alike(batch, rows[some], exact, memory)
        kept[some], pruned[some], delta[some] = found
    return kept, pruned, delta


def _best_alike(
    batch: Batch, rows: Tensor, exact: bool, memory: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows that keep as many each."""
    groups = batch.n // batch.group
    keep = int(batch.kept[rows[0]].sum()) // groups
    pairs = groups * keep * (batch.group - keep)
    if pairs == 0:
        none = torch.zeros_like(rows)
        return none, none, torch.full_like(none, torch.inf, dtype=torch.float64)
    bytes_per_row = pairs * _PAIR_BYTES * (4 if exact else 2)
    tile = max(1, memory // bytes_per_row)
    slices = -(-bytes_per_row // memory) if tile == 1 else 1
    found = [_best_of_tile(batch, part, exact, slices) for part in rows.split(tile)]
    kept, pruned, delta = (torch.cat(parts) for parts in zip(*found, strict=True))
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
        line = torch.arange(len(rows), device=rows.device)
        best_kept = torch.where(better, part[line, group, u], best_kept)
        best_pruned = torch.where(better, pruned[line, group, position % size[2]], best_pruned)
    line = torch.arange(len(rows), device=rows.device)
    exact_delta = a[line, best_kept] + b[line, best_pruned]
    cross = batch.gram[best_kept, best_pruned].double()
    exact_delta -= 2 * x[line, best_kept] * x[line, best_pruned] * cross
    return best_kept, best_pruned, exact_delta
