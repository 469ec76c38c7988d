"""Masks of layers as masks of the tensors that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maskopt.errors import ModelError
from maskopt.model.blocks import Layer
from maskopt.model.loading import Loader
from maskopt.model.maskfile import TensorMask
from maskopt.model.transformers_adapter import revert


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
    for name, mask in _merged(model, masks).items():
        if loader is None:
            result |= _converted(model, name, mask)
            continue
        sources = loader.conversion.sources(name)
        if len(sources) == 1 and name not in loader.conversion.converted:
            stored = {sources[0]: mask}
        else:
            stored = _converted(model, name, mask)
        if set(stored) != set(sources):
            raise ModelError(
                f"parameter {name!r} is stored as {', '.join(sources[:3])}, which cannot be matched"
            )
        for key, part in stored.items():
            if loader.checkpoint.entry(key).shape != tuple(part.kept.shape):
                raise ModelError(f"tensor {key!r} is not stored in the shape of its parameter")
        result |= stored
    return result


def _merged(model: nn.Module, masks: Mapping[str, tuple[Layer, Tensor]]) -> dict[str, TensorMask]:
    """Masks of layers as masks of parameters, in the model's layout."""
    merged: dict[str, TensorMask] = {}
    for layer, kept in masks.values():
        oriented = kept if layer.input_axis == 1 else kept.T
        if layer.expert is None:
            merged[layer.parameter] = TensorMask(oriented.contiguous(), layer.input_axis)
            continue
        if layer.parameter not in merged:
            shape = model.get_parameter(layer.parameter).shape
            whole = torch.ones(shape, dtype=torch.bool)
            merged[layer.parameter] = TensorMask(whole, layer.input_axis + 1)
        merged[layer.parameter].kept[layer.expert] = oriented
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
