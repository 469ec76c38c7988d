"""Parameters and buffers of a model that come and go; masks and weights of layers as whole parameters."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer
from maskopt.models.architecture.transformers_adapter import initialise
from maskopt.models.checkpoints.result import TensorMask

#: a parameter by its name, as the tensors that a checkpoint stores
AsStored = Callable[[str, Tensor], dict[str, Tensor]]


def check_finite(name: str, parameter: Tensor) -> None:
    """Raise ModelError for NaN or infinity, slab by slab: a mask of all of an embedding takes much memory."""
    if parameter.is_floating_point():
        for slab in parameter.detach().split(4096):
            if not bool(torch.isfinite(slab).all()):
                raise ModelError(f"parameter {name!r} holds NaN or infinite weights")


def share_equal(module: nn.Module, other: nn.Module) -> None:
    """Let parameters whose data equal those of `other` by the same name be held once, as the other's."""
    theirs = dict(other.named_parameters())
    for name, own in module.named_parameters():
        same = theirs.get(name)
        if same is None or own.is_meta or same.is_meta:
            continue
        if (own.dtype, own.device) == (same.dtype, same.device) and torch.equal(own, same):
            own.data = same.data
    return_memory()


def release(module: nn.Module) -> None:
    """Leave the module's parameters without data; shared ones stay shared."""
    _drop_data(module)
    return_memory()


def _drop_data(module: nn.Module) -> None:
    places = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False)
    ]
    bare = {id(p): torch.empty_like(p, device="meta") for _, _, p in places if not p.is_meta}
    empty = {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in bare.items()}
    for part, name, parameter in places:
        if id(parameter) in empty:
            setattr(part, name, empty[id(parameter)])


def return_memory() -> None:
    """Ask the C library to give freed memory back to the system, where it can be asked (glibc)."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def real_buffers(model: Any, device: torch.device) -> None:
    """Give every buffer memory and its initial value (position frequencies and the like)."""
    from transformers import PreTrainedModel

    owners = [(name, m) for name, m in model.named_modules() if isinstance(m, PreTrainedModel)]
    with torch.no_grad():
        for path, module in model.named_modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                real = torch.empty_like(buffer, device=device)
                module._buffers[name] = real.fill_(_unset(real.dtype))
            if any(True for _ in module.named_buffers(recurse=False)):
                inside = [o for o in owners if not o[0] or (path + ".").startswith(o[0] + ".")]
                initialise(max(inside, key=lambda owner: len(owner[0]))[1], module)


def check_buffers(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        unset = _unset(buffer.dtype)
        same = torch.isnan(buffer) if isinstance(unset, float) else buffer == unset
        if buffer.numel() and buffer.dtype != torch.bool and bool(same.all()):
            raise ModelError(
                f"buffer {name!r} is neither stored nor computed by transformers; "
                "load the model in memory and give it to prune_model"
            )


def _unset(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return math.nan
    return False if dtype == torch.bool else torch.iinfo(dtype).min if dtype.is_signed else 255


def stored_masks(
    model: nn.Module, masks: Mapping[str, tuple[Layer, Tensor]], as_stored: AsStored
) -> dict[str, TensorMask]:
    """Masks of layers [rows, n], by name, as masks of the checkpoint's tensors."""
    result: dict[str, TensorMask] = {}
    axes = {x.parameter: x.input_axis + (x.expert is not None) for x, _ in masks.values()}
    for name, kept in merged(model, masks, True).items():
        n = kept.shape[axes[name]]
        from_end = axes[name] - kept.ndim
        for key, part in as_stored(name, kept).items():
            axis = from_end + part.ndim
            if part.shape[from_end] != n:  # the conversion exchanged inputs and outputs
                axis = part.ndim - 2 if axis == part.ndim - 1 else part.ndim - 1
            result[key] = TensorMask(part.contiguous(), axis)
    return result


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
