"""Checks of the inputs of a problem: shapes, types, finite values, symmetry and definiteness."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.core.pattern import NM, Pattern, Unstructured
from maskopt.core.units import MOST_WHOLE, surely_semidefinite
from maskopt.errors import MaskoptError, PatternError, ProblemError

#: least eigenvalue of a semidefinite G, as −part of tr(G): what float32 accumulation of xxᵀ leaves (2⁻²³)
PSD_TOLERANCE = 2.0**-23
#: largest |G − Gᵀ| relative to max|G| that is taken for rounding
_ASYMMETRY_TOLERANCE = 1e-3
#: inputs up to which an integral problem is decided in whole numbers, within half a minute
_MOST_EXACT = 200

#: nested lists become float64
ArrayLike = Tensor | np.ndarray | Sequence[Any]


def range_scale(values: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows"]:
    """Return the powers of two, float64, that bring the largest entry of each row to [½, 1); 1 for zeros.

    Products with them are exact, their squares are within range, and no comparison changes.
    """
    exponent = torch.frexp(values.double().abs().amax(-1)).exponent
    return torch.exp2(-exponent.clamp(-1000, 1000).double())


def all_finite(tensor: Tensor) -> bool:
    """Return whether no entry is NaN or infinite."""
    # a finite sum shows it sooner; any other may be an overflow
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def as_tensor(array: ArrayLike, what: str) -> Tensor:
    """Return a tensor with contiguous rows, which kernels read and write in place."""
    if isinstance(array, list | tuple):
        try:
            array = np.asarray(array, dtype=np.float64)
        except (TypeError, ValueError):
            raise ProblemError(f"{what}: lists must hold numbers, all of one length") from None
    if isinstance(array, np.ndarray):
        if array.dtype.kind != "f":
            raise ProblemError(f"{what} must hold real floating-point numbers, not {array.dtype}")
        if array.dtype.itemsize > 8:  # long doubles, which torch does not have
            array = array.astype(np.float64)
        # torch.from_numpy takes native byte order and writable memory only
        array = torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")).copy())
    if not isinstance(array, Tensor):
        raise ProblemError(f"{what} must be a torch tensor or a NumPy array, not {type(array)}")
    if not array.is_floating_point():
        raise ProblemError(f"{what} must hold real floating-point numbers, not {array.dtype}")
    tensor = array.detach().contiguous()
    if tensor.dtype.itemsize < 2:  # float8, in which torch does not calculate
        tensor = tensor.float()
    if not all_finite(tensor):
        count = int((~torch.isfinite(tensor)).sum())
        raise ProblemError(f"{what} holds {count} NaN or infinite values; mend the input first")
    return tensor


def as_mask(
    mask: Any, weight: Tensor, what: str = "mask", error: type[MaskoptError] = ProblemError
) -> Tensor:
    """Return a bool mask for this weight [rows, n] on its device; of one row also [n]; else raise `error`."""
    tensor = torch.as_tensor(mask)
    if tensor.ndim == 1 and weight.shape[0] == 1:
        tensor = tensor[None]
    if tensor.shape != weight.shape:
        raise error(f"{what} has shape {list(tensor.shape)}, the problem {list(weight.shape)}")
    if tensor.dtype != torch.bool:
        raise error(f"{what} must be bool (True = kept), not {tensor.dtype}")
    return tensor.to(weight.device)


def weight_and_gram(weight: ArrayLike, gram: ArrayLike, label: str) -> tuple[Tensor, Tensor]:
    """Return both as tensors; ProblemError unless their shapes fit and they are on one device."""
    w, g = as_tensor(weight, f"{label}weight"), as_tensor(gram, f"{label}gram")
    if w.ndim != 2 or 0 in w.shape:
        raise ProblemError(
            f"{label}weight must be [rows, n] with both at least 1, "
            f"not {list(w.shape)}; one row alone is a RowProblem"
        )
    rows, n = w.shape
    if g.shape != (n, n):
        raise ProblemError(
            f"{label}gram must be [{n}, {n}] to match a weight of [{rows}, {n}], not {list(g.shape)}"
        )
    if g.device != w.device:
        raise ProblemError(
            f"{label}weight is on {w.device} and gram on {g.device}; move both to one device"
        )
    return w, g


def check_rows(rows: Any, count: int) -> None:
    """Raise ProblemError unless rows are a slice, or indices or a bool tensor for `count` rows."""
    sound = isinstance(rows, slice)
    if isinstance(rows, Tensor) and rows.ndim == 1 and rows.dtype == torch.bool:
        sound = len(rows) == count
    elif isinstance(rows, Tensor) and rows.ndim == 1 and is_whole(rows):
        sound = bool(((rows >= -count) & (rows < count)).all())
    elif isinstance(rows, list):
        whole = (isinstance(i, Integral) and not isinstance(i, bool) for i in rows)
        sound = bool(rows) and all(whole) and all(-count <= i < count for i in rows)
    if not sound:
        raise ProblemError(
            f"rows must be a list of indices within 0 … {count - 1}, at least one; not {rows}"
        )


def column_index(columns: Any, n: int) -> Tensor:
    """Return distinct indices of inputs as a tensor; ProblemError for any others."""
    index = torch.as_tensor(columns)
    if index.ndim != 1 or len(index) == 0 or not is_whole(index):
        raise ProblemError("columns must be a list of at least one input index")
    if len(index.unique()) != len(index) or index.min() < 0 or index.max() >= n:
        raise ProblemError(f"columns must be distinct and within 0 … {n - 1}")
    return index.long()


def of_shape(array: ArrayLike, shape: tuple[int, ...], what: str) -> Tensor:
    """Return an array of this shape as a tensor; ProblemError for any other."""
    tensor = as_tensor(array, what)
    if tensor.shape != shape:
        raise ProblemError(f"{what} must be {list(shape)}, not {list(tensor.shape)}")
    return tensor


def moments_of(moments: ArrayLike | None, n: int, label: str) -> Tensor | None:
    """Return the mean of the inputs, [1, n], or mean and variance, [2, n]; None stays None."""
    if moments is None:
        return None
    tensor = torch.atleast_2d(as_tensor(moments, f"{label}moments"))
    if tensor.shape not in ((1, n), (2, n)):
        raise ProblemError(f"{label}moments must be [{n}] or [2, {n}], not {list(tensor.shape)}")
    if bool((tensor[1:] < 0).any()):
        raise ProblemError(f"{label}a variance is a mean of squares, and not below 0")
    return tensor


def shares_of_rows(omega: ArrayLike | None, weight: Tensor, label: str) -> Tensor | None:
    """Return ω in float64, on the device of the weight; None stays None."""
    if omega is None:
        return None
    shares = of_shape(omega, (len(weight),), f"{label}omega")
    if not bool((shares > 0).all()):
        raise ProblemError(f"{label}omega must be more than 0; leave out rows that do not count")
    return shares.to(weight.device, torch.float64)


def symmetric(gram: Tensor, label: str) -> Tensor:
    """Return G in float32 or float64, made symmetric; ProblemError beyond rounding."""
    if gram.dtype not in (torch.float32, torch.float64):
        gram = gram.float()
    if torch.equal(gram, gram.T):
        return gram.contiguous()
    scale = float(gram.abs().max())
    skew = float((gram - gram.T).abs().max())
    if skew > _ASYMMETRY_TOLERANCE * scale:
        raise ProblemError(
            f"{label}gram is not symmetric (entries differ from their mirror by up to {skew:.3g}, "
            f"the largest is {scale:.3g}); a Gram matrix is XXᵀ"
        )
    return (gram + gram.T) / 2


def check_semidefinite(gram: Tensor, label: str) -> None:
    """Raise ProblemError unless G + tolerance·tr(G)·I is positive semidefinite."""
    g = gram.double()
    trace = float(g.trace())
    shift = PSD_TOLERANCE * trace
    if trace > 0:
        shifted = g / trace  # keeps extreme scales within range
        shifted.diagonal().add_(PSD_TOLERANCE)
        # Cholesky decides; only a failure pays for eigenvalues
        if int(torch.linalg.cholesky_ex(shifted).info) == 0:
            return
    elif not g.any():
        return
    least = float(torch.linalg.eigvalsh(g)[0])
    if least < -shift or trace <= 0:
        raise ProblemError(
            f"{label}gram is not positive semidefinite: its least eigenvalue is {least:.6g} "
            f"(trace {trace:.6g}); a Gram matrix is XXᵀ, so check how it was accumulated"
        )


def check_pattern(pattern: Pattern, n: int, label: str) -> None:
    """Raise PatternError, with the layer named, where the pattern does not fit n inputs."""
    if not isinstance(pattern, Unstructured | NM):
        raise PatternError(
            f"{label}a pattern is Unstructured(sparsity=0.5) or NM(keep=2, of=4), not {pattern!r}"
        )
    try:
        pattern.check(n)
    except PatternError as error:
        raise PatternError(f"{label}{error}") from None


def check_costs(weight: Tensor, gram: Tensor, label: str) -> None:
    """Raise ProblemError where the cost of a row is beyond float64, or G below what it is exact for."""
    size = float(gram.diagonal().double().max())
    if 0 < size < torch.finfo(torch.float64).tiny:
        raise ProblemError(
            f"{label}gram has a largest diagonal entry of {size:.3g}, where float64 has few digits; scale it"
        )
    most = weight.abs().max().double()
    if not bool(torch.isfinite(most.square() * gram.diagonal().double().sum())):
        raise ProblemError(
            f"{label}a weight of {float(most):.3g} squared, times the inputs' squares, is beyond float64; "
            "scale weight or gram down"
        )


def is_whole(index: Tensor) -> bool:
    """Return whether the type of a tensor is one of whole numbers."""
    return not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)


def check_integral(weight: Tensor, gram: Tensor, linear: bool, label: str) -> None:
    """Raise ProblemError unless f is a whole number ≥ 0 of every mask, exact in float64."""
    if linear:
        raise ProblemError(f"{label}integral: an objective with a linear part is no sum of wholes")
    arrays = {
        "weight": weight.double(),
        "the diagonal of gram": gram.diagonal().double(),
        "twice gram": 2 * gram.double(),
    }
    for what, array in arrays.items():
        broken = (array != array.round()).nonzero()
        if len(broken):
            value = float(array[tuple(broken[0].tolist())])
            raise ProblemError(
                f"{label}integral: {what} holds {value!r}, not a whole number; leave integral out"
            )
    most = float((weight.double().abs() @ gram.double().abs() * weight.double().abs()).sum(1).max())
    if most >= MOST_WHOLE:
        raise ProblemError(f"{label}integral: sums of {most:.3g} are not whole in float64")
    if not surely_semidefinite(gram.double().cpu().numpy(), _MOST_EXACT):
        raise ProblemError(
            f"{label}integral: gram is not positive semidefinite without tolerance, as whole numbers need; "
            "build the problem by RowProblem.from_quadratic, which shifts the diagonal, or leave integral out"
        )
