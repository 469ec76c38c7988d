"""Masks and new weights of layers as those of the tensors that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer
from maskopt.models.architecture.loading import Loader
from maskopt.models.architecture.transformers_adapter import revert
from maskopt.models.checkpoints.mask_file import TensorMask


def stored_masks(
    model: nn.Module, masks: Mapping[str, tuple[Layer, Tensor]], loader: Loader | None
) -> dict[str, TensorMask]:
    """Masks of layers [rows, n], by the layer's name, as masks of the checkpoint's tensors.

    Where the checkpoint stores a parameter otherwise (experts one by one, say), transformers' own
    conversion for saving is applied to the mask; so it is where there is no checkpoint yet (`loader` None).

    Raises:
        ModelError: a parameter that the conversion does not store where it was read from.
    """
    result: dict[str, TensorMask] = {}
    axes = {
        layer.parameter: layer.input_axis + (layer.expert is not None)
        for layer, _ in masks.values()
    }
    for name, kept in merged(model, masks, True).items():
        mask = TensorMask(kept, axes[name])
        if loader is None:
            result |= _converted(model, name, mask)
            continue
        sources = loader.conversion.sources(name)
        alike = len(sources) == 1 and name not in loader.conversion.converted
        stored = {sources[0]: mask} if alike else _converted(model, name, mask)
        _check_stored(loader, name, {key: part.kept for key, part in stored.items()})
        result |= stored
    return result


def stored_values(
    model: nn.Module, values: Mapping[str, tuple[Layer, Tensor]], loader: Loader
) -> dict[str, Tensor]:
    """New weights of layers [rows, n], by the layer's name, as those of the checkpoint's tensors.

    Args:
        values: in the dtype in which they are stored.

    Returns:
        In the tensors' shapes, NaN where a tensor holds what is of no such layer.

    Raises:
        ModelError: as for `stored_masks`.
    """
    result: dict[str, Tensor] = {}
    for name, whole in merged(model, values, torch.nan).items():
        sources = loader.conversion.sources(name)
        alike = len(sources) == 1 and name not in loader.conversion.converted
        stored = {sources[0]: whole} if alike else revert(model, {name: whole})
        _check_stored(loader, name, stored)
        result |= {key: part.contiguous() for key, part in stored.items()}
    return result


def _check_stored(loader: Loader, name: str, stored: Mapping[str, Tensor]) -> None:
    sources = loader.conversion.sources(name)
    if set(stored) != set(sources):
        raise ModelError(
            f"parameter {name!r} is stored as {', '.join(sources[:3])}, which cannot be matched"
        )
    for key, part in stored.items():
        if loader.checkpoint.entry(key).shape != tuple(part.shape):
            raise ModelError(f"tensor {key!r} is not stored in the shape of its parameter")


def merged(
    model: nn.Module, parts: Mapping[str, tuple[Layer, Tensor]], rest: bool | float
) -> dict[str, Tensor]:
    """Matrices of layers [rows, n] as parameters in the model's layout; `rest` for experts without one."""
    merged: dict[str, Tensor] = {}
    for layer, part in parts.values():
        oriented = part if layer.input_axis == 1 else part.T
        if layer.expert is None:
            merged[layer.parameter] = oriented.contiguous()
            continue
        if layer.parameter not in merged:
            shape = model.get_parameter(layer.parameter).shape
            merged[layer.parameter] = torch.full(shape, rest, dtype=part.dtype)
        merged[layer.parameter][layer.expert] = oriented
    return merged


def _converted(model: nn.Module, name: str, mask: TensorMask) -> dict[str, TensorMask]:
    """The mask of parameter `name` as transformers would save the parameter."""
    from_end = mask.input_axis - mask.kept.ndim
    result: dict[str, TensorMask] = {}
    for key, part in revert(model, {name: mask.kept}).items():
        axis = from_end + part.ndim
        if _swapped(mask, part):
            axis = part.ndim - 2 if axis == part.ndim - 1 else part.ndim - 1
        result[key] = TensorMask(part.contiguous(), axis)
    return result


def _swapped(mask: TensorMask, part: Tensor) -> bool:
    """Did a conversion exchange inputs and outputs? The number of inputs tells."""
    n = mask.kept.shape[mask.input_axis]
    axis = mask.input_axis - mask.kept.ndim
    return part.shape[axis] != n
