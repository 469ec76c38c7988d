"""Instances on disk: a problem's arrays and what they mean, in an .npz without pickle."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from maskopt.core.files import read_arrays, write_arrays
from maskopt.core.least_squares import refit_from_dict, refit_to_dict
from maskopt.core.linear_term import Linear
from maskopt.core.pattern import Pattern, pattern_from_dict, pattern_to_dict
from maskopt.core.units import units_from_dict, units_to_dict
from maskopt.errors import ProblemError

if TYPE_CHECKING:
    from maskopt.core.problem import LayerProblem


def write_instance(
    path: str | os.PathLike[str], kind: Literal["layer", "row"], layer: LayerProblem
) -> None:
    """Write a problem, atomically; a row as a layer of one."""
    header = {
        "name": layer.name,
        "pattern": pattern_to_dict(layer.pattern),
        "refit": refit_to_dict(layer.refit),
        "integral": layer.integral,
        "units": units_to_dict(layer.units),
    }
    arrays = {"weight": _as_numpy(layer.weight), "gram": _as_numpy(layer.gram)}
    if layer.mean is not None:
        arrays["mean"] = _as_numpy(layer.mean)
    if layer.variance is not None:
        arrays["variance"] = _as_numpy(layer.variance)
    if layer.omega is not None:
        arrays["omega"] = _as_numpy(layer.omega)
    if layer.linear is not None:
        arrays["correlation"] = _as_numpy(layer.linear.correlation)
        arrays["constant"] = _as_numpy(layer.linear.constant)
    write_arrays(path, kind, header, arrays)


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """NumPy has no bfloat16: it is widened to float32, which holds it exactly."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()


def instance_kind(path: str | os.PathLike[str]) -> str:
    """`layer` or `row`. Raises ProblemError where the file is neither."""
    return str(read_arrays(path, "layer", "row")[0]["kind"])


def read_instance(
    path: str | os.PathLike[str], kind: Literal["layer", "row"]
) -> tuple[np.ndarray, np.ndarray, Pattern, dict[str, Any]]:
    """Weight, G and pattern, and the other arguments of a problem by name; nothing in them is checked yet.

    Raises:
        ProblemError: no such file, or one that lacks a part.
    """
    header, arrays = read_arrays(path, kind)
    if not {"weight", "gram"} <= set(arrays):
        raise ProblemError(f"{path}: not a maskopt instance (it lacks weight or gram)")
    parts = [arrays.get(name) for name in ("correlation", "constant")]
    if (parts[0] is None) != (parts[1] is None):
        raise ProblemError(f"{path}: half a linear part (correlation or constant is missing)")
    more = {
        "name": str(header.get("name", "")),
        "mean": arrays.get("mean"),
        "variance": arrays.get("variance"),
        "linear": None if parts[0] is None else Linear(*parts),  # type: ignore[arg-type]
        "refit": refit_from_dict(header.get("refit")),
        "integral": header.get("integral", False) is True,
        "units": units_from_dict(header.get("units")),
    }
    if kind == "layer":
        more["omega"] = arrays.get("omega")
    return arrays["weight"], arrays["gram"], pattern_from_dict(header.get("pattern")), more
