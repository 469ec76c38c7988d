"""All uses of undocumented parts of transformers, and parameters and buffers that are loaded and released.

Such parts change without notice; the oldest and the newest tested release are named here.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from maskopt.core.inputs import all_finite
from maskopt.errors import ModelError, first_line
from maskopt.models.checkpoints.schema import CONFIG

#: the oldest and the newest minor release that the tests pass with
SUPPORTED = ("5.6", "5.24")


@functools.cache
def check_version(installed: str = transformers.__version__) -> None:
    """Raise ModelError for a transformers older than the oldest tested release; warn once of a newer one."""
    oldest, newest = SUPPORTED
    remedy = f'pip install "transformers>={oldest},<={newest}.*"'
    if _minor(installed) < _minor(oldest):
        raise ModelError(f"transformers {installed} is too old for maskopt; {remedy}")
    if _minor(installed) > _minor(newest):
        warnings.warn(
            f"transformers {installed} is newer than maskopt was tested with; "
            f"if a model cannot be loaded: {remedy}",
            stacklevel=2,
        )


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


class Conversion:
    """Conversion of a checkpoint's tensors to a model's parameters, by transformers' own rules.

    Args:
        model: without weights; it remembers the rules that were used, which `revert` undoes.
        place: what messages call the checkpoint.

    Attributes:
        keys: names of the tensors.
        converted: parameters that the checkpoint stores otherwise (experts one by one, say).

    Raises:
        ModelError: two tensors are the same parameter, such as with and without the name of the base model.
    """

    def __init__(self, model: Any, keys: Iterable[str], place: str) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        check_version()
        self.model, self.place, self.keys = model, place, sorted(keys)
        self.rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in self.rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self.rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        empty = model.state_dict()
        prefix = model.base_model_prefix
        #: parameter → the tensors that it and the parameters made along with it come from
        self._sources: dict[str, list[str]] = {}
        #: parameter → the one that stands for all that are made of the same tensors
        self._first: dict[str, str] = {}
        self.converted: set[str] = set()
        seen: dict[tuple[str, str], str] = {}
        for key in self.keys:
            name, pattern = rename_source_key(key, renamings, converters, prefix, empty)
            if name not in empty and key in empty:
                name, pattern = rename_source_key(key, [], [], prefix, empty)
            if name not in empty:
                continue
            part = "" if pattern is None else key.removeprefix(f"{prefix}.")
            if (other := seen.setdefault((name, part), key)) != key:
                raise ModelError(
                    f"{place}: the tensors {other!r} and {key!r} are the same parameter; remove one of them"
                )
            self._sources.setdefault(name, []).append(key)
            if pattern is None:
                self._first[name] = name
                continue
            rule = by_pattern[pattern]
            for target in rule.target_patterns:
                other = name.replace(rule.target_patterns[0], target)
                self._first[other] = name
                self.converted.add(other)
        model._weight_conversions = [rule for rule in self.rules if rule.was_used()]

    def sources(self, name: str) -> list[str]:
        """Return the checkpoint tensors that parameter `name` is made of; ModelError where there is none."""
        if name not in self._first:
            raise ModelError(f"{self.place}: no tensor for parameter {name!r}")
        return self._sources[self._first[name]]

    def stored_as_is(self, name: str) -> str | None:
        """Return the checkpoint tensor that is parameter `name`; None where it is converted."""
        sources = self.sources(name)
        return sources[0] if len(sources) == 1 and name not in self.converted else None

    def needed(self, names: Iterable[str]) -> list[str]:
        """Return all tensors to load for those of the parameters and buffers that the checkpoint stores."""
        firsts = sorted({self._first[name] for name in names if name in self._first})
        return [key for first in firsts for key in self._sources[first]]

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Convert tensors into the model's parameters on the device; ModelError where one does not fit."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(
            device_map={"": device},
            weight_mapping=self.rules,  # type: ignore[arg-type, unused-ignore]
            dtype=next(self.model.parameters()).dtype,
        )
        load: Any = convert_and_load_state_dict_in_model
        # up to 5.15 the function asks for a plan of tensor parallelism
        plan = {"tp_plan": None} if "tp_plan" in inspect.signature(load).parameters else {}
        info, _ = load(self.model, dict(tensors), config, **plan)
        if info.mismatched_keys:
            name, stored, expected = min(info.mismatched_keys, key=str)
            raise ModelError(
                f"{self.place}: {name!r} is {list(stored)} in the shards, "
                f"{list(expected)} by config.json"
            )
        if info.conversion_errors or info.error_msgs:
            first = next(iter([*info.conversion_errors.values(), *info.error_msgs]))
            line = (str(first).strip().splitlines() or ["?"])[-1]
            raise ModelError(f"{self.place}: cannot be loaded: {line}")


def revert(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert parameters to the tensors that a checkpoint stores, by transformers' rules for saving."""
    from transformers.core_model_loading import revert_weight_conversion

    check_version()
    return revert_weight_conversion(model, dict(tensors))  # type: ignore[arg-type]


def tie(model: Any, missing: set[str]) -> None:
    """Let the parameters named `missing` share the ones that the model ties them to."""
    model.tie_weights(missing_keys=missing, recompute_mapping=False)


def set_eager_experts(model: nn.Module) -> None:
    """Let experts run one after the other, each as a matrix product that can be observed."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"


def empty_model(folder: Path, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Make the model that a folder's configuration describes, without weights; ModelError where it fails.

    `options` are those of `AutoModelForCausalLM.from_config`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **trust)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **trust, **options)
    except Exception as error:  # configurations fail in as many ways as there are models
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{folder / CONFIG}: makes no model: {reason}") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Switch off the progress bars of transformers."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def reading_gguf() -> Iterator[None]:
    """Let transformers parse a GGUF file once, not for configuration, weights and tokenizer each.

    It is read from a plain array, since slices of a memory map are slow, and without a progress bar that no
    switch turns off.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    class Reader(gguf.GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    once = patch.object(gguf, "GGUFReader", functools.cache(Reader))
    with once, patch.object(reading, "tqdm", lambda items, **_: items):
        yield


def forget_quantisation(model: Any) -> None:
    """Let a model whose weights were dequantised on loading be saved as a plain one."""
    del model.hf_quantizer
    model.config.quantization_config = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


# --- parameters and buffers


def check_finite(name: str, parameter: Tensor) -> None:
    """Raise ModelError for NaN or infinity, slab by slab: a mask of all of an embedding takes much memory."""
    if parameter.is_floating_point():
        for slab in parameter.detach().split(4096):
            if not all_finite(slab):
                raise ModelError(f"parameter {name!r} holds NaN or infinite weights")


def share_equal(module: nn.Module, other: nn.Module) -> None:
    """Let parameters whose data equal those of `other` by the same name be held once, as the other's."""
    theirs = dict(other.named_parameters())
    for name, ours in module.named_parameters():
        same = theirs.get(name)
        if same is None or ours.is_meta or same.is_meta:
            continue
        if (ours.dtype, ours.device) == (same.dtype, same.device) and torch.equal(ours, same):
            ours.data = same.data
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
                owner: Any = max(inside, key=lambda owner: len(owner[0]))[1]
                owner._init_weights(module)


def check_buffers(model: nn.Module) -> None:
    """Raise ModelError for a buffer that nothing has set since `real_buffers`."""
    for name, buffer in model.named_buffers():
        unset = _unset(buffer.dtype)
        same = torch.isnan(buffer) if isinstance(unset, float) else buffer == unset
        if buffer.numel() and buffer.dtype != torch.bool and bool(same.all()):
            raise ModelError(
                f"buffer {name!r} is neither stored nor computed by transformers; "
                "load the model in memory and give it to prune_model"
            )


def _unset(dtype: torch.dtype) -> float | int | bool:
    """Return a value that marks the entries of a buffer that were never computed."""
    if dtype.is_floating_point:
        return math.nan
    if dtype == torch.bool:
        return False
    return torch.iinfo(dtype).min if dtype.is_signed else 255
