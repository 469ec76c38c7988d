"""Certified lower bounds of F, of refitted weights: what a certificate is, and how it is checked.

With A = G + λD, b = Aw + g and C = wᵀAw + 2gᵀw + c, F(p) is the least of vᵀAv − 2bᵀv + C over v that is zero
where p prunes. Take d ≥ 0 with B = A − diag(d) ⪰ 0. On every legal set S of kept inputs and for any α,

    dⱼvⱼ² ≥ 2αⱼvⱼ − αⱼ²/dⱼ  for j in S,     dⱼvⱼ² = 0  elsewhere,

so that F ≥ C + minᵥ {vᵀBv − 2(b−α)ᵀv} − Σ_S αⱼ²/dⱼ: the dual of the perspective relaxation (Günlük and
Linderoth, *Perspective reformulations of mixed integer nonlinear programs*, Math. Program. 2010). With
α = b − Bv̂ for *any* v̂ the minimum is at v̂, and

    F(p) ≥ C − v̂ᵀBv̂ − the greatest sum of (b − Bv̂)ⱼ²/dⱼ over as many j as are kept.

Where rows trade, the sum Σ ωᵣFᵣ has one such bound, with the greatest of all rows' ωᵣ(b − Bv̂)ⱼ²/dⱼ over as
many as the layer keeps. So (d, v̂) is a certificate that anybody can check in float64; however badly it was
computed, it costs tightness and never validity. What is missing to B ⪰ 0 is taken off d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.certificates.certificate import (
    Certificate,
    certificate_arrays,
    certificate_from,
    evenly,
    least_total,
    missing,
)
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.errors import ProblemError, VerificationError

#: unit roundoff of float64
_U = 2.0**-53


@dataclass(frozen=True)
class RefitCertificate:
    """What proves lower bounds of F.

    Attributes:
        split: float64 [rows, n], d ≥ 0.
        point: float64 [rows, n], v̂; any point is valid.
    """

    split: Float[Tensor, "rows n"]
    point: Float[Tensor, "rows n"]

    def check(self, problem: LayerProblem | RowProblem) -> Float[Tensor, " rows"]:
        """The lower bound of every row that this certificate proves, float64, at least 0. Of rows that trade
        it is one bound of Σ ωᵣFᵣ, as equal parts of it.

        Raises:
            VerificationError: shapes that do not fit, values that are not finite, d < 0; a problem that
                keeps its weights.
        """
        layer = problem.as_layer() if isinstance(problem, RowProblem) else problem
        if layer.refit is None:
            raise VerificationError("a certificate of refitted weights proves nothing of kept ones")
        self._check_shapes(layer)
        if layer.least_squares.flat:  # a G of 0: A is the identity that stands in for it
            return torch.zeros(layer.rows, dtype=torch.float64, device=layer.device)
        parts = [_at_point(self, layer, row) for row in range(layer.rows)]
        offset, price = (torch.stack([part[i] for part in parts]) for i in (0, 1))
        if layer.pooled:
            every, kept = layer.shares[:, None] * price, price.numel() - layer.pruned
            least, most = layer.row_limits
            terms = (layer.rows + 4) * _U * (layer.shares @ offset.abs())
            dearest = -least_total(-every, kept, (layer.n - most, layer.n - least))
            dearest = dearest * (1 + (price.numel() + 8) * _U)
            value = evenly(layer.shares @ offset - terms - dearest, layer)
        else:
            kept = layer.group_size - layer.pruned_per_group
            grouped = price.view(layer.rows, -1, layer.group_size)
            dearest = grouped.topk(kept, dim=2).values.sum((1, 2))
            value = offset - dearest * (1 + (layer.n + 8) * _U)
        return torch.where(torch.isfinite(value), value, 0.0).clamp(min=0.0)

    def take(self, rows: Sequence[int]) -> RefitCertificate:
        """The certificate of some rows only."""
        index = torch.as_tensor(list(rows), device=self.split.device)
        return RefitCertificate(self.split[index], self.point[index])

    def _check_shapes(self, layer: LayerProblem) -> None:
        for what in ("split", "point"):
            tensor = getattr(self, what)
            if tensor.shape != layer.weight.shape or tensor.dtype != torch.float64:
                raise VerificationError(
                    f"certificate: {what} must be float64 {list(layer.weight.shape)}, "
                    f"not {tensor.dtype} {list(tensor.shape)}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise VerificationError(f"certificate: {what} holds NaN or infinite values")
        if bool((self.split < 0).any()):
            raise VerificationError("certificate: the split of the diagonal is negative")


def _at_point(
    certificate: RefitCertificate, layer: LayerProblem, row: int
) -> tuple[Tensor, Tensor]:
    """C − v̂ᵀBv̂, less what rounding may add, and (b − Bv̂)ⱼ²/dⱼ, plus what rounding may take off it."""
    w = layer.weight[row].double()
    a, n = layer.least_squares.damped, layer.n
    v = certificate.point[row].to(w)
    d = certificate.split[row].to(w)
    b = a - torch.diag(d)
    lack = missing(b) + 4 * _U * float(a.diagonal().max())
    d = d - lack
    g, constant = torch.zeros_like(w), torch.zeros_like(w[:1]).sum()
    if layer.linear is not None:
        g, constant = layer.linear.correlation[row], layer.linear.constant[row]
    wanted = a @ w + g
    image = b @ v + lack * v
    offset = w @ (a @ w) + 2 * g @ w + constant - v @ image
    # |A_ij| ≤ √(A_ii A_jj), and |B_ij| no more than twice that
    size = a.diagonal().sqrt()
    reach, far = size @ w.abs(), size @ v.abs()
    off = (n + 6) * _U * (size * (reach + 4 * far) + g.abs() + lack * v.abs())
    terms = reach**2 + 2 * g.abs() @ w.abs() + constant + 4 * far**2 + lack * v @ v
    alpha = (wanted - image).abs() + off
    # an input of no d can be paid for only where nothing is asked of it
    price = torch.where(d > 0, (alpha / d.clamp(min=1e-300).sqrt()).square(), torch.inf)
    return offset - (2 * n + 8) * _U * terms, price * (1 + 8 * _U)


#: of weights as they are, or of refitted ones
AnyCertificate = Certificate | RefitCertificate


def stored(certificate: AnyCertificate) -> dict[str, np.ndarray]:
    """The arrays of a certificate, for an .npz."""
    if isinstance(certificate, Certificate):
        return certificate_arrays(certificate)
    return {"split": certificate.split.cpu().numpy(), "point": certificate.point.cpu().numpy()}


def restored(arrays: dict[str, np.ndarray], path: str) -> AnyCertificate:
    """Inverse of `stored`.

    Raises:
        ProblemError: not the arrays of a certificate.
    """
    if "split" not in arrays:
        return certificate_from(arrays, path)
    try:
        return RefitCertificate(*(torch.from_numpy(arrays[name]) for name in ("split", "point")))
    except (KeyError, TypeError) as error:
        raise ProblemError(f"{path}: not a sound certificate ({error})") from None
