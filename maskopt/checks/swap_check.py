"""The costs of masks and of changes of masks, by definition in float64, and the check of 1-swap optimality.

Nothing here is shared with any solver.

For unchanged weights, with Q = diag(w)·G·diag(w) and c = G(w ⊙ p) + g,

    f(p) = pᵀQp + 2gᵀ(w ⊙ p) + c₀
    prune u:  w_u²G_uu + 2 w_u c_u      keep p again:  2 w_p c_p − w_p²G_pp
    swap u, p:  Δ(u, p) = 2 w_u c_u + w_u²G_uu − 2 w_p c_p + w_p²G_pp − 2 w_u w_p G_up

(SparseSwaps, arXiv 2512.10922). For updated weights, solvers work on systems of the kept inputs, A_SS; this
module works with H = A⁻¹ on the pruned ones, or by LU. With K = (H_PP)⁻¹ and ŵ = Hb,

    F(p) = ŵ_PᵀKŵ_P + c₀ − gᵀHg,    r_P = Kŵ_P,    v_S = ŵ_S − H_SP r_P,    M = H_SS − H_SP K H_PS
    prune u:  v_u²/M_uu      keep p again:  r_p²/K_pp
    swap u, p:  Δ(u, p) = (v_u − B_up r_p/K_pp)² / (M_uu + B_up²/K_pp) − r_p²/K_pp,    B = −H_SP K.

Rows do not interact: a swap between two rows of a shared budget changes Σ ωᵣ fᵣ by what pruning costs the
one, less what the other saves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskopt.core.inputs import range_scale
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.errors import VerificationError
from maskopt.protocol.solution import SWAP_TOLERANCE, swap_threshold

#: most numbers in one temporary array
AT_ONCE = 2**22


class Prices(NamedTuple):
    """The prices of single removals and returns, float64.

    Attributes:
        prune: [rows, n], the cost of pruning a kept input; ∞ for others.
        keep: [rows, n], the saving of keeping a pruned input again; −∞ for others.
        objective: [rows], of the mask.
    """

    prune: Tensor
    keep: Tensor
    objective: Tensor


class Swaps(NamedTuple):
    """The swaps of one row, float64, for weights times `scale`, a power of two.

    Attributes:
        delta: from kept and pruned inputs, the changes [kept, pruned] of the objective.
        objective: of the mask.
        mass: the scale of rounding (`LayerProblem.diagonal_mass`).
        scale: keeps squares within range.
    """

    delta: Callable[[Tensor, Tensor], Tensor]
    objective: Tensor
    mass: Tensor
    scale: float


class UnchangedCosts:
    """The objective f of a layer's rows."""

    def __init__(self, layer: LayerProblem) -> None:
        self.layer = layer

    def cost(self, mask: Bool[Tensor, "rows n"], row: int) -> Tensor:
        """Return f of one row, by its pruned columns alone."""
        layer, pruned = self.layer, (~mask[row]).nonzero()[:, 0]
        w = layer.weight[row, pruned].double()
        step = max(1, AT_ONCE // max(1, len(pruned)))
        total = 2 * w @ layer.correlation[row, pruned] + layer.constant[row]
        for part, weight in zip(pruned.split(step), w.split(step), strict=True):
            total = total + weight @ (layer.gram[part][:, pruned].double() @ w)
        return total.clamp(min=0.0)

    def costs(self, row: int, p: Float[Tensor, "masks n"]) -> Float[Tensor, " masks"]:
        """Return f of one row under many masks, 1 = pruned, on the CPU."""
        layer = self.layer
        dropped = p * layer.weight[row].double().cpu()
        costs = ((dropped @ layer.gram.double().cpu()) * dropped).sum(1)
        costs += 2 * dropped @ layer.correlation[row].cpu() + layer.constant[row].cpu()
        return costs.clamp(min=0.0)

    def prices(self, mask: Bool[Tensor, "rows n"]) -> Prices:
        """Return the prices of all rows."""
        layer = self.layer
        w = layer.weight.double()
        dropped = w * ~mask
        c, objective = self._products(dropped, layer.correlation, layer.constant)
        alone = w.square() * layer.gram.diagonal().double()
        prune = (alone + 2 * w * c).masked_fill(~mask, torch.inf)
        keep = (2 * w * c - alone).masked_fill(mask, -torch.inf)
        return Prices(prune, keep, objective)

    def swaps(self, mask: Bool[Tensor, "rows n"], row: int) -> Swaps:
        """Return the swaps of one row."""
        layer, scale = self.layer, float(range_scale(self.layer.weight[row]))
        w, gram = layer.weight[row].double() * scale, layer.gram
        constant = layer.constant[row] * scale * scale
        dropped = torch.where(mask[row], 0.0, w)[None]
        products, objective = self._products(dropped, layer.correlation[row] * scale, constant)
        alone, slope = w.square() * gram.diagonal().double(), 2 * w * products[0]

        def delta(kept: Tensor, pruned: Tensor) -> Tensor:
            cross = gram[kept][:, pruned].double()
            single = (alone + slope)[kept][:, None] + (alone - slope)[pruned]
            return single - 2 * w[kept][:, None] * w[pruned] * cross

        return Swaps(delta, objective[0], alone.sum() + constant, scale)

    def _products(
        self, dropped: Float[Tensor, "rows n"], correlation: Tensor, constant: Tensor
    ) -> tuple[Float[Tensor, "rows n"], Float[Tensor, " rows"]]:
        """Return c = G(w ⊙ p) + g, and f."""
        parts = self.layer.gram.split(max(1, AT_ONCE // self.layer.n))
        c = torch.cat([dropped @ part.double().T for part in parts], 1)
        objective = (dropped * (c + 2 * correlation)).sum(1) + constant
        return c + correlation, objective.clamp(min=0.0)


class _Solved(NamedTuple):
    """One row of updated weights, times `scale`: K, r, v, the diagonal of M (`m`), B (`pull`), and F."""

    kept: Tensor
    pruned: Tensor
    k: Tensor
    r: Tensor
    v: Tensor
    m: Tensor
    pull: Tensor
    objective: Tensor
    scale: float


class UpdatedCosts:
    """The objective F of a layer's rows."""

    def __init__(self, layer: LayerProblem) -> None:
        self.layer, self.squares = layer, layer.least_squares

    def cost(self, mask: Bool[Tensor, "rows n"], row: int) -> Tensor:
        """Return F of one row, by LU of A_SS."""
        damped, w = self.squares.damped, self.layer.weight[row].double()
        g = self.layer.correlation[row]
        kept, lost = mask[row].nonzero()[:, 0], w.clone()
        if len(kept):
            lost[kept] -= torch.linalg.solve(damped[kept][:, kept], (damped @ w + g)[kept])
        # where G is 0, A is an identity that stands in for it, and nothing is lost
        total = torch.zeros_like(lost[0]) if self.squares.flat else lost @ (damped @ lost)
        return (total + 2 * lost @ g + self.layer.constant[row]).clamp(min=0.0)

    def costs(self, row: int, p: Float[Tensor, "masks n"]) -> Float[Tensor, " masks"]:
        """Return F of one row under many masks, 1 = pruned and equally many in each, on the CPU."""
        b, constant, scale = self._scaled(row)
        inverse, b, constant = self.squares.inverse.cpu(), b.cpu(), constant.cpu()
        free = inverse @ b
        pruned = p.nonzero()[:, 1].view(len(p), -1)
        if self.squares.flat:
            return torch.zeros(len(p), dtype=torch.float64) + constant / scale / scale
        costs = []
        for part in pruned.split(max(1, 4 * AT_ONCE // max(1, pruned.shape[1] ** 2))):
            # not by LU: batches of them, of 160 inputs and more, never return where MKL has two threads
            factor = torch.linalg.cholesky(inverse[part[:, :, None], part[:, None, :]])
            half = torch.linalg.solve_triangular(factor, free[part][..., None], upper=False)
            costs.append(half[..., 0].square().sum(1))
        return (torch.cat(costs) + constant).clamp(min=0.0) / scale / scale

    def prices(self, mask: Bool[Tensor, "rows n"]) -> Prices:
        """Return the prices of all rows."""
        prune = torch.full(mask.shape, torch.inf, dtype=torch.float64, device=mask.device)
        keep, objective = -prune, prune[:, 0].clone()
        for row in range(len(mask)):
            s = self._solved(mask, row)
            objective[row] = s.objective / s.scale / s.scale
            if self.squares.flat:  # every mask costs the same
                prune[row, s.kept], keep[row, s.pruned] = 0.0, 0.0
                continue
            prune[row, s.kept] = (s.v / s.m.sqrt() / s.scale).square()
            keep[row, s.pruned] = (s.r / s.k.diagonal().sqrt() / s.scale).square()
        return Prices(prune, keep, objective)

    def swaps(self, mask: Bool[Tensor, "rows n"], row: int) -> Swaps:
        """Return the swaps of one row."""
        s, n = self._solved(mask, row), self.layer.n
        mass = self.layer.take([row]).diagonal_mass()[0] * s.scale * s.scale
        # roots before squares: for a G of 1e-165 the squares would be 0
        size, place = s.k.diagonal().sqrt(), torch.zeros(n, dtype=torch.long, device=mask.device)
        place[s.kept] = torch.arange(len(s.kept), device=mask.device)
        place[s.pruned] = torch.arange(len(s.pruned), device=mask.device)

        def delta(kept: Tensor, pruned: Tensor) -> Tensor:
            i, j = place[kept], place[pruned]
            if self.squares.flat:
                return torch.zeros(len(i), len(j), dtype=torch.float64, device=mask.device)
            pull = s.pull[i][:, j]
            change = (pull / size[j]).square() + s.m[i][:, None]
            weight = s.v[i][:, None] - pull * (s.r[j] / s.k.diagonal()[j])
            cost = (weight / change.sqrt()).square() - (s.r[j] / size[j]).square()
            # less than a float64 can hold without the scale is no change
            return cost.masked_fill(cost / s.scale / s.scale == 0, 0.0)

        return Swaps(delta, s.objective, mass, s.scale)

    def _solved(self, mask: Bool[Tensor, "rows n"], row: int) -> _Solved:
        b, constant, scale = self._scaled(row)
        inverse = self.squares.inverse
        kept, pruned = mask[row].nonzero()[:, 0], (~mask[row]).nonzero()[:, 0]
        free = inverse @ b
        k = torch.linalg.inv(inverse[pruned][:, pruned])
        k = (k + k.T) / 2
        r, cross = k @ free[pruned], inverse[kept][:, pruned]
        pull = -cross @ k
        m = inverse.diagonal()[kept] + (pull * cross).sum(1)
        lost = torch.zeros_like(constant) if self.squares.flat else free[pruned] @ r
        objective = (lost + constant).clamp(min=0.0)
        return _Solved(kept, pruned, k, r, free[kept] - cross @ r, m, pull, objective, scale)

    def _scaled(self, row: int) -> tuple[Tensor, Tensor, float]:
        """Return b and c₀ − gᵀHg of one row for weights times a power of two, and that power."""
        scale = float(range_scale(self.layer.weight[row]))
        g = (self.layer.correlation[row] * scale)[:, None]
        b = self.squares.damped @ (self.layer.weight[row].double() * scale) + g[:, 0]
        half = torch.linalg.solve_triangular(self.squares.factor, g, upper=False)
        return b, self.layer.constant[row] * scale * scale - half.square().sum(), scale


def costs_of(layer: LayerProblem) -> UnchangedCosts | UpdatedCosts:
    """Return the costs under the objective of the layer."""
    return UnchangedCosts(layer) if layer.update is None else UpdatedCosts(layer)


class SwapMove(NamedTuple):
    """Prune input `kept` of row `row`, and keep input `pruned` of row `other`, which the mask prunes.

    The objective, of a shared budget the sum Σ ωᵣ fᵣ, changes by `delta` (< 0).
    """

    kept: int
    pruned: int
    delta: float
    row: int = 0
    other: int = 0


def improving_swap(
    problem: RowProblem | LayerProblem, mask: Tensor, tolerance: float = SWAP_TOLERANCE
) -> SwapMove | None:
    """Return the best legal swap of one row, or of a layer with a shared budget; None: none improves.

    It is computed in float64. Ties go to the lowest kept, then the lowest pruned index.

    Args:
        problem: a row, a layer of one row, or a layer with a shared budget; VerificationError for others.
        mask: bool [n], [1, n] or [rows, n], True = kept; must be legal.
        tolerance: a swap improves when it lowers the objective by more than this part of it and by more than
            float64 rounding (`swap_threshold`); 0 asks for any decrease above rounding.
    """
    layer = problem.as_layer()
    if layer.rows != layer.rows_per_budget:
        raise VerificationError("improving_swap takes one row; use problem.row(i)")
    mask = layer.check_mask(mask)
    moves = [improving_swap_between_rows(layer, mask, tolerance)] if layer.rows > 1 else []
    moves += [_inside(layer, mask, row, tolerance) for row in range(layer.rows)]
    return min((move for move in moves if move), key=lambda move: move.delta, default=None)


def _inside(
    layer: LayerProblem, mask: Bool[Tensor, "rows n"], row: int, tolerance: float
) -> SwapMove | None:
    """Return the best swap inside one row, which keeps its count."""
    swaps = costs_of(layer).swaps(mask, row)
    share = float(layer.shares[row]) if layer.shared_budget else 1.0
    least = -float(swap_threshold(swaps.objective, swaps.mass, tolerance, update=layer.update))
    best: SwapMove | None = None
    for inside in torch.arange(layer.n, device=mask.device).split(layer.group_size):
        kept, pruned = inside[mask[row, inside]], inside[~mask[row, inside]]
        if not len(kept) or not len(pruned):
            continue
        for part in kept.split(max(1, AT_ONCE // len(pruned))):
            delta = swaps.delta(part, pruned)
            i, j = divmod(int(delta.argmin()), len(pruned))
            value = float(delta[i, j])
            if value < least:
                best, least = SwapMove(int(part[i]), int(pruned[j]), value, row, row), value
    if best is None:
        return None
    return best._replace(delta=share * (best.delta / swaps.scale / swaps.scale))


def improving_swap_between_rows(
    layer: LayerProblem, mask: Bool[Tensor, "rows n"], tolerance: float
) -> SwapMove | None:
    """Return the best swap between two rows of a shared budget.

    It must lower the sum by more than `swap_threshold` of both rows.
    """
    prices, share = costs_of(layer).prices(mask), layer.shares
    mass = layer.diagonal_mass()
    slack = swap_threshold(prices.objective, mass, tolerance, update=layer.update)
    low, high = prices.prune.min(1), prices.keep.max(1)
    pruned, (least, most) = (~mask).sum(1), layer.row_limits
    low.values[pruned >= most], high.values[pruned <= least] = torch.inf, -torch.inf
    give, take = share * (low.values + slack), share * (high.values - slack)
    # the two best of each side, since the best may be of one row, inside which they interact
    pairs = [
        (float(give[i] - take[j]), i, j)
        for i in give.argsort(stable=True)[:2].tolist()
        for j in take.argsort(descending=True, stable=True)[:2].tolist()
        if i != j
    ]
    if not pairs or not min(pairs)[0] < 0:
        return None
    _, row, other = min(pairs)
    delta = float(share[row] * low.values[row] - share[other] * high.values[other])
    return SwapMove(int(low.indices[row]), int(high.indices[other]), delta, row, other)
