"""The independent checks of the objective F: refitted weights. Nothing here is shared with any solver.

Solvers work on systems of the kept inputs, A_SS; everything here is by H = A⁻¹ on the pruned ones, or by LU.
With K = (H_PP)⁻¹ and ŵ = Hb,

    F(p) = ŵ_PᵀKŵ_P + c − gᵀHg,    r_P = Kŵ_P,    v_S = ŵ_S − H_SP r_P,    M = H_SS − H_SP K H_PS

and keeping p in place of u changes F by what p's return saves and what u costs when p is there again,

    Δ(u, p) = (v_u − B_up r_p/K_pp)² / (M_uu + B_up²/K_pp) − r_p²/K_pp,    B = −H_SP K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.core.problem import LayerProblem
from maskopt.protocol.solution import swap_threshold

#: numbers in the systems that are solved at a time
_AT_ONCE = 2**24


def improving_refit_swap(
    layer: LayerProblem, mask: Tensor, tolerance: float
) -> tuple[int, int, float] | None:
    """(kept, pruned, delta) of the best swap of one row under F, where one improves; mask [n]."""
    row = _solved(layer, mask)
    kept, pruned, k, r = row.kept, row.pruned, row.k, row.r
    if not len(kept) or not len(pruned) or layer.least_squares.flat:
        return None  # no pair, or a G of 0, where every mask costs the same
    mass = layer.diagonal_mass()[0] * row.scale * row.scale
    threshold = float(swap_threshold(row.objective, mass, tolerance, refit=True))
    # roots before squares: of a G of 1e-165 the squares would be 0
    size = k.diagonal().sqrt()
    saved = (r / size).square()
    change = (row.pull / size).square() + row.own[:, None]
    delta = ((row.v[:, None] - row.pull * (r / k.diagonal())) / change.sqrt()).square() - saved
    if layer.group_size < layer.n:
        apart = kept[:, None] // layer.group_size != pruned[None, :] // layer.group_size
        delta[apart] = torch.inf
    line, column = divmod(int(delta.argmin()), len(pruned))
    value = float(delta[line, column])
    gain = value / row.scale / row.scale
    if not value < -threshold or gain == 0:  # less than a float64 can say
        return None
    return int(kept[line]), int(pruned[column]), gain


def refit_prices(layer: LayerProblem, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one row, float64: what pruning each kept input costs [n] (∞ for the others), what keeping each
    pruned one again saves [n] (−∞ for the others), and F."""
    row = _solved(layer, mask)
    objective = row.objective / row.scale / row.scale
    cost = torch.full_like(layer.weight[0], torch.inf, dtype=torch.float64)
    gain = torch.full_like(cost, -torch.inf)
    if layer.least_squares.flat:  # every mask costs the same
        return cost.masked_fill(mask, 0.0), gain.masked_fill(~mask, 0.0), objective
    cost[row.kept] = (row.v / row.own.sqrt() / row.scale).square()
    gain[row.pruned] = (row.r / row.k.diagonal().sqrt() / row.scale).square()
    return cost, gain, objective


@dataclass
class _Solved:
    """One row, its weights brought within range by `scale`: K, r, v, the diagonal of M, B, and F."""

    kept: Tensor
    pruned: Tensor
    k: Tensor
    r: Tensor
    v: Tensor
    own: Tensor
    pull: Tensor
    objective: Tensor
    scale: float


def _solved(layer: LayerProblem, mask: Tensor) -> _Solved:
    inverse, b, constant, scale = _scaled(layer)
    kept, pruned = mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]
    free = inverse @ b
    k = torch.linalg.inv(inverse[pruned][:, pruned])
    k = (k + k.T) / 2
    r = k @ free[pruned]
    cross = inverse[kept][:, pruned]
    pull = -cross @ k
    own = inverse.diagonal()[kept] + (pull * cross).sum(1)
    lost = torch.zeros_like(constant) if layer.least_squares.flat else free[pruned] @ r
    objective = (lost + constant).clamp(min=0.0)
    return _Solved(kept, pruned, k, r, free[kept] - cross @ r, own, pull, objective, scale)


def refitted_cost(layer: LayerProblem, mask: Tensor, row: int) -> Float[Tensor, ""]:
    """F of one row by LU of A_SS, float64; mask [rows, n]."""
    squares, w = layer.least_squares, layer.weight[row].double()
    damped = squares.damped
    kept = mask[row].nonzero()[:, 0]
    b = damped @ w
    if layer.linear is not None:
        b = b + layer.linear.correlation[row]
    lost = w.clone()
    if len(kept):
        lost[kept] -= torch.linalg.solve(damped[kept][:, kept], b[kept])
    # of a G of 0, A is the identity that stands in for it, and nothing is lost
    total = torch.zeros_like(lost[:1]).sum() if squares.flat else lost @ (damped @ lost)
    if layer.linear is not None:
        total = total + 2 * lost @ layer.linear.correlation[row] + layer.linear.constant[row]
    return total.clamp(min=0.0)


def refitted_costs(layer: LayerProblem, row: int, p: Tensor) -> Float[Tensor, " masks"]:
    """F of every mask p [masks, n] (1 = pruned, as many in each) of a row, float64 on the CPU."""
    inverse, b, constant, scale = _scaled(layer.take([row]))
    inverse, b, constant = inverse.cpu(), b.cpu(), constant.cpu()
    free = inverse @ b
    pruned = p.nonzero()[:, 1].view(len(p), -1)
    if layer.least_squares.flat:
        return torch.zeros(len(p), dtype=torch.float64) + constant / scale / scale
    costs = []
    for part in pruned.split(max(1, _AT_ONCE // max(1, pruned.shape[1] ** 2))):
        # not by LU: batches of them, of 160 inputs and more, never return where MKL has two threads
        factor = torch.linalg.cholesky(inverse[part[:, :, None], part[:, None, :]])
        half = torch.linalg.solve_triangular(factor, free[part][..., None], upper=False)
        costs.append(half[..., 0].square().sum(1))
    return (torch.cat(costs) + constant).clamp(min=0.0) / scale / scale


def within_range(weight: Tensor) -> float:
    """A power of two that brings extreme weights within range without changing any comparison."""
    return 2.0 ** min(1000, -math.frexp(float(weight.abs().max()) or 1.0)[1])


def _scaled(layer: LayerProblem) -> tuple[Tensor, Tensor, Tensor, float]:
    """H, b, c − gᵀHg of one row, its weights brought within range by a power of two, and that power."""
    squares = layer.least_squares
    w = layer.weight[0].double()
    scale = within_range(w)
    b = squares.damped @ (w * scale)
    constant = torch.zeros((), dtype=torch.float64, device=w.device)
    if layer.linear is not None:
        g = layer.linear.correlation[0] * scale
        b = b + g
        half = torch.linalg.solve_triangular(
            torch.linalg.cholesky(squares.damped), g[:, None], upper=False
        )
        constant = layer.linear.constant[0] * scale * scale - half.square().sum()
    return squares.inverse, b, constant, scale
