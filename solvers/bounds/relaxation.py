"""The continuous relaxation of every row of a layer at once, by accelerated projected gradient.

min xᵀQ_row x + cᵀx over {0 ≤ x ≤ 1, Σ over each group = s}, Q_row = diag(w)(G + diag(d))diag(w). A
step is one matrix product G·(w⊙x) over all rows. The metric is D = diag(Q) + a part of its mean,
scaled by λ_max(D^-½QD^-½) from a power iteration, so that outlier inputs do not shrink the step of
the rest. FISTA (Beck and Teboulle 2009) with the gradient restart of O'Donoghue and Candès (2015).
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskopt.limits import Limits
from maskopt.problem import LayerProblem
from maskopt.solvers.bounds.project import project

_TILE_BYTES = 512 * 2**20


def relax(
    problem: LayerProblem,
    shift: Tensor | None = None,
    *,
    steps: int,
    limits: Limits,
) -> Tensor:
    """x [rows, n] in float64. `shift` [n] (≤ 0) is d; its cost moves to the linear term, p² = p."""
    tile = max(1, _TILE_BYTES // (40 * problem.n))
    parts = [
        _relax(problem.take(slice(first, first + tile)), shift, steps, limits)
        for first in range(0, problem.rows, tile)
    ]
    return torch.cat(parts)


def _relax(problem: LayerProblem, shift: Tensor | None, steps: int, limits: Limits) -> Tensor:
    rows, n, group, pruned = problem.rows, problem.n, problem.group_size, problem.pruned_per_group
    if pruned in (0, group):
        return torch.full_like(problem.weight, float(pruned > 0), dtype=torch.float64)
    gram = problem.gram.double()
    w = problem.weight.double()
    mass = (w.square() @ gram.diagonal()).clamp(min=1e-300)
    w = w * (n / mass).sqrt()[:, None]  # mean diagonal of Q: 1
    linear = torch.zeros_like(w) if shift is None else -shift * w.square()
    if shift is not None:
        gram = gram + torch.diag(shift)
    gram, w, linear = gram.float(), w.float(), linear.float()
    diagonal = w.square() * gram.diagonal().clamp(min=0)
    metric = diagonal + 0.1
    root = metric.rsqrt()

    v = torch.rand(rows, n, generator=torch.Generator().manual_seed(0)).to(w)
    largest = torch.ones(rows, 1, device=w.device)
    for _ in range(15):
        v = v / v.norm(dim=1, keepdim=True).clamp(min=1e-30)
        v = root * w * ((w * root * v) @ gram)
        largest = v.norm(dim=1, keepdim=True)
    inverse = 1 / (2.1 * largest.clamp(min=1e-6) * metric)

    multiplier = torch.zeros(rows, n // group, device=w.device)
    x = torch.full_like(w, pruned / group)
    z, momentum = x, torch.ones(rows, 1, device=w.device)
    for _ in range(steps):
        gradient = 2 * w * ((w * z) @ gram) + linear
        new = project(z - inverse * gradient, inverse, group, pruned, multiplier)
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        wrong = ((z - new) / inverse * (new - x)).sum(1, keepdim=True) > 0
        following = torch.where(wrong, 1.0, following)
        beta = torch.where(wrong, 0.0, (momentum - 1) / following)
        z, x, momentum = new + beta * (new - x), new, following
        if limits.expired:
            break
    # a row whose scale does not fit float32 falls back on the middle of the polytope
    return torch.where(torch.isfinite(x), x, pruned / group).double()
