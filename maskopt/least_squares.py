"""Least squares for the weights that a mask keeps: what the others did is taken over as far as can be.

For a row with the kept set S, of all v that are zero outside S the best is

    v_S = (G + λI)_SS⁻¹ ((G + λI)w + g)_S,     v = argmin (w−v)ᵀ(G + λI)(w−v) + 2gᵀ(w−v) + c

(g and c only where the problem has a linear part). The damping λ keeps v near w where the calibration inputs
say little. Since w − v is w on what is pruned, whatever v is, λ‖w − v‖² is least for the mask's own choice
v_S = w_S: the refitted row's error, without λ, is never above that of the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskopt.errors import OptionError
from maskopt.limits import Limits, one_thread_each
from maskopt.problem import LayerProblem, RowProblem

#: bytes of gathered matrices that one thread works on, where the caller sets no limit
_TILE_BYTES = 2**28
#: relative residual in float64 at which a row is done, steps of refinement at most, and the residual above
#: which a factor in float32 was not good enough
_DONE, _REFINEMENTS, _POOR = 1e-10, 12, 1e-7
#: part of the mean diagonal that makes a singular G_SS definite where λ does not
_RIDGE = 1e-10


@dataclass(frozen=True)
class Refitted:
    """A layer's weights after the least squares.

    Attributes:
        weight: float64 [rows, n], zero where the mask prunes.
        error: float64 [rows], mean square of what the outputs miss their targets by.
        residual: float64 [rows], ‖b − Av‖/‖b‖ of the normal equations Av = b for these weights; far from 0
            where a row kept the mask's own, since least squares could not better them within rounding.
    """

    weight: Float[Tensor, "rows n"]
    error: Float[Tensor, " rows"]
    residual: Float[Tensor, " rows"]


def refit(
    problem: LayerProblem | RowProblem,
    mask: Bool[Tensor, "rows n"],
    *,
    damping: float = 0.01,
    limits: Limits | None = None,
) -> Refitted:
    """The best weights on what a mask keeps; every row's error is at most the mask's objective.

    Cholesky of every row's own G_SS, k³/3 operations a row of k kept weights: in float32 with refinement in
    float64 where G is float32 and that does, else in float64.

    Args:
        mask: legal, True = kept.
        damping: λ in units of the mean of G's diagonal, at least 0.
        limits: memory and threads.

    Raises:
        OptionError: a damping below 0. WarmStartError: a mask that is not legal.
    """
    if not damping >= 0:
        raise OptionError(f"`damping` must be at least 0, not {damping!r}")
    layer = problem.as_layer() if isinstance(problem, RowProblem) else problem
    limits = limits or Limits()
    mask = layer.check_mask(mask)
    system = _System.of(layer, mask, damping)
    kept = int(mask[0].sum())
    threads = (limits.threads or torch.get_num_threads()) if layer.device.type == "cpu" else 1
    row_bytes = 3 * system.gram.element_size() * max(kept, 1) ** 2 + 64 * layer.n
    tile = max(1, min(limits.bytes(threads * _TILE_BYTES) // threads // row_bytes, layer.rows))
    parts = [slice(first, first + tile) for first in range(0, layer.rows, tile)]
    weight = torch.cat(one_thread_each(lambda i: system.solve(parts[i]), len(parts), threads))
    error, kept_error = layer.error(weight), layer.objective(mask)
    # rounding: of rows that least squares cannot better, the weights stay
    worse = ~(error <= kept_error)
    weight = torch.where(worse[:, None], torch.where(mask, layer.weight.double(), 0.0), weight)
    return Refitted(weight, error.where(~worse, kept_error), system.residual(weight))


@dataclass(frozen=True)
class _System:
    """The normal equations of all rows: of each, those of its kept inputs.

    Attributes:
        gram: G, in its dtype.
        exact: G in float64.
        target: float64 [rows, n], (G + λI)w + g.
        ridge: λ.
    """

    mask: Bool[Tensor, "rows n"]
    gram: Float[Tensor, "n n"]
    exact: Float[Tensor, "n n"]
    target: Float[Tensor, "rows n"]
    ridge: float

    @classmethod
    def of(cls, layer: LayerProblem, mask: Tensor, damping: float) -> _System:
        exact, weight = layer.gram.double(), layer.weight.double()
        ridge = damping * float(exact.diagonal().mean())
        target = weight @ exact + ridge * weight
        if layer.linear is not None:
            target = target + layer.linear.correlation
        return cls(mask, layer.gram, exact, target, ridge)

    def residual(self, weight: Float[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
        """‖b − Av‖/‖b‖ of the kept inputs, float64."""
        rest = self.target - (weight @ self.exact + self.ridge * weight)
        wanted, rest = (torch.where(self.mask, x, 0.0) for x in (self.target, rest))
        return rest.norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-300)

    def solve(self, rows: slice) -> Float[Tensor, "some n"]:
        """v of some rows."""
        mask = self.mask[rows]
        index = mask.nonzero()[:, 1].view(len(mask), int(mask[0].sum()))
        weight, residual = self._refined(rows, index, self.gram)
        poor = (~(residual <= _POOR)).nonzero()[:, 0]
        if len(poor) and self.gram.dtype != torch.float64:
            chosen = torch.arange(len(self.mask), device=mask.device)[rows][poor]
            weight[poor], residual[poor] = self._refined(chosen, index[poor], self.exact)
        return weight

    def _refined(self, rows: slice | Tensor, index: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        """Factors in the dtype of `gram`, refined in float64. ∞ where a factorisation breaks down."""
        wanted = self.target[rows].gather(1, index)
        factor = self._factor(index, gram)
        size = wanted.norm(dim=1).clamp(min=1e-300)
        full = torch.zeros_like(self.target[rows])
        best, least = full.clone(), torch.full_like(size, torch.inf)
        rest = wanted
        for _ in range(_REFINEMENTS):
            step = torch.cholesky_solve(rest.to(gram.dtype)[..., None], factor)[..., 0].double()
            full = full.scatter_add(1, index, step)
            rest = wanted - (full @ self.exact + self.ridge * full).gather(1, index)
            residual = (rest.norm(dim=1) / size).nan_to_num(nan=torch.inf)
            better = residual < least
            best = torch.where(better[:, None], full, best)
            least = torch.where(better, residual, least)
            if not bool((better & (residual > _DONE)).any()):
                break
        return best, least

    def _factor(self, index: Tensor, gram: Tensor) -> Tensor:
        """Cholesky factors [rows, k, k] of (G + λI)_SS; NaN where it is not definite in this dtype."""
        matrix = gram[index[:, :, None], index[:, None, :]]
        least = _RIDGE * float(self.exact.diagonal().mean()) if gram.dtype == torch.float64 else 0.0
        matrix.diagonal(dim1=1, dim2=2).add_(max(self.ridge, least) or 1.0)
        factor, broken = torch.linalg.cholesky_ex(matrix)
        return factor.masked_fill_((broken > 0)[:, None, None], torch.nan)
