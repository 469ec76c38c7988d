"""Triangle and pentagonal inequalities that hold for every mask.

On z = 2p − 1 (with z_0 = 1 as index −1) an odd sum of signs has a square of at least 1, so that of three
inputs a·z_iz_j + b·z_iz_k + ab·z_jz_k + 1 ≥ 0, and likewise of five.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from maskopt.errors import VerificationError

#: unit roundoff of float64
_U = 2.0**-53
#: in place of an input of a cut: z_0; none
OF_Z0, NO_INPUT = -1, -2
#: of the inputs and signs of cuts
_WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Cuts:
    """Triangle and pentagonal inequalities of one row.

    For an odd number k ≥ 3 of inputs and signs b, Σ_{i<j} b_ib_jz_iz_j + (k − 1)/2 ≥ 0.

    Attributes:
        index: int64 [m, places], distinct inputs of a row; OF_Z0 (−1): z_0 = 1; NO_INPUT (−2) in places that
            are not needed.
        sign: int8 [m, places − 1], the signs ±1 of all but the first, whose sign is 1.
        multiplier: float64 [m], τ ≥ 0.
    """

    index: Tensor
    sign: Tensor
    multiplier: Tensor


def check_cuts(cuts: Cuts, n: int, row: int) -> None:
    """Raise VerificationError where one is no inequality of all masks of a row of n inputs."""
    index, sign, tau = cuts.index, cuts.sign, cuts.multiplier
    m, places = tau.numel(), index.shape[-1] if index.ndim else 0
    shapes = index.shape, sign.shape, tau.shape
    if shapes != ((m, places), (m, places - 1), (m,)) or tau.dtype != torch.float64:
        raise VerificationError(f"certificate: the cuts of row {row} have the wrong shape or type")
    # a fraction would be cut off here, and count in full in the cut
    if m and (index.dtype not in _WHOLE or sign.dtype not in _WHOLE):
        raise VerificationError(
            f"certificate: the cuts of row {row} have inputs or signs that are not whole numbers"
        )
    fault = _fault(index.long(), sign, tau, n) if m else ""
    if fault:
        raise VerificationError(f"certificate: a cut of row {row} {fault}")


def _fault(index: Tensor, sign: Tensor, tau: Tensor, n: int) -> str:
    used, places = index != NO_INPUT, torch.arange(index.shape[1], device=index.device)
    if int(index.min()) < NO_INPUT or int(index.max()) >= n:
        return "names an input outside the row"
    # an even sum of signs may be 0
    if not bool(((used.sum(1) % 2 == 1) & (used.sum(1) >= 3)).all()):
        return "has no odd number of inputs, or one"
    names = torch.where(used, index, NO_INPUT - 1 - places).sort(1).values
    if bool((names[:, 1:] == names[:, :-1]).any()):
        return "names an input twice"
    if not bool(((sign == 1) | (sign == -1) | ~used[:, 1:]).all()):
        return "has a sign that is not ±1"
    sound = bool((torch.isfinite(tau) & (tau >= 0)).all())
    return "" if sound else "has a negative multiplier"


class CutForm(NamedTuple):
    """The form Σ τ c_t(p) = pᵀKp + kᵀp + κ, with K None where there are no cuts.

    Attributes:
        size: a bound of the size of its terms.
        error: what rounding may change in all entries of K, k and κ together.
    """

    matrix: Tensor | None
    linear: Tensor
    constant: float
    size: float
    error: float


def cut_form(cuts: Cuts | None, n: int, like: Tensor) -> CutForm:
    """Return the quadratic form of the cuts of a row of n inputs, on the device of `like`."""
    linear = torch.zeros(n, dtype=torch.float64, device=like.device)
    if cuts is None or len(cuts.multiplier) == 0:
        return CutForm(None, linear, 0.0, 0.0, 0.0)
    tau = cuts.multiplier.to(like)
    index = cuts.index.to(like.device).long()
    signs = torch.cat([torch.ones_like(tau)[:, None], cuts.sign.to(like)], 1)
    used = index != NO_INPUT
    inputs = used.sum(1)
    matrix = torch.zeros(n, n, dtype=torch.float64, device=like.device)
    constant = (tau * (inputs // 2)).sum()
    for left, right in itertools.combinations(range(index.shape[1]), 2):
        present = used[:, left] & used[:, right]
        weight = (tau * signs[:, left] * signs[:, right])[present]
        i, j = index[present, left], index[present, right]
        both = (i >= 0) & (j >= 0)
        # z_iz_j = 4p_ip_j − 2p_i − 2p_j + 1
        for x, y in ((i, j), (j, i)):
            matrix.index_put_((x[both], y[both]), 2 * weight[both], accumulate=True)
            linear.index_add_(0, x[both], -2 * weight[both])
        constant = constant + weight[both].sum()
        # z_0z_j = 2p_j − 1
        alone = ~both
        linear.index_add_(0, torch.maximum(i, j)[alone], 2 * weight[alone])
        constant = constant - weight[alone].sum()
    # of every pair of inputs; 16 τ of a triangle
    pairs = inputs * (inputs - 1) // 2
    size = 16 / 3 * float((tau * pairs).sum())
    # no sum has more terms than there are pairs and cuts twice over; all terms of all sums are below 2·size
    terms = 2 * int(pairs.sum()) + len(tau)
    return CutForm(matrix, linear, float(constant), size, 2 * terms * _U * 2 * size)
