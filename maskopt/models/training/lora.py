"""LoRA around pruned layers: the product of its two matrices is masked wherever it is used.

PEFT's layers are told by what they have, so that PEFT itself is not needed: `base_layer`, the layer that it
was put around; `lora_A`, `lora_B`, `scaling` and `lora_dropout` by adapter; and `get_delta_weight`, the
product in the layout of the base layer's weight, which merging and unmerging use as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from maskopt.errors import ModelError

#: what PEFT calls the layer that it was put around
_BASE = "base_layer"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model of transformers inside what `torch.compile`, data parallelism and PEFT put around it."""
    if isinstance(model, DistributedDataParallel | nn.DataParallel):
        return unwrapped(model.module)
    compiled = getattr(model, "_orig_mod", None)
    if compiled is not None:
        return unwrapped(compiled)
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else unwrapped(inner())


def base_name(name: str) -> str:
    """A layer's name as it is without adapters."""
    return ".".join(part for part in name.split(".") if part != _BASE)


@dataclass(frozen=True)
class LoraLayer:
    """PEFT's layer around a pruned one, and which weights of that are kept, in its layout."""

    module: Any
    kept: Bool[Tensor, "one two"]

    @classmethod
    def of(cls, model: nn.Module, masks: Mapping[int, Tensor]) -> list[LoraLayer]:
        """All of a model.

        Args:
            masks: by the `id` of the base layers' weights.

        Raises:
            ModelError: adapters of another kind around a pruned layer.
        """
        found = []
        for name, module in model.named_modules():
            base = getattr(module, _BASE, None)
            own = dict(base.named_parameters(recurse=False)) if isinstance(base, nn.Module) else {}
            held = {key: masks[id(weight)] for key, weight in own.items() if id(weight) in masks}
            if not held:
                continue
            if set(held) != {"weight"}:
                raise ModelError(
                    f"{name!r} has an adapter on {min(held)!r}, which is pruned; masks are held through "
                    "LoRA on layers, not on parameters"
                )
            kept = held["weight"]
            _check(name, module)
            found.append(cls(module, kept))
        return found

    @property
    def merged(self) -> bool:
        """Whether no product stands beside the base layer's weight any more."""
        return bool(self.module.merged) or not self.module.lora_A

    def hold(self) -> Callable[[], None]:
        """Mask the product from here on; a function that undoes it."""
        module, kept = self.module, self.kept
        delta, forward = module.get_delta_weight, module.forward

        def masked_delta(adapter: str) -> Float[Tensor, "one two"]:
            found: Tensor = delta(adapter)
            return found.masked_fill(~kept.to(found.device), 0)

        def masked_forward(x: Tensor, *arguments: Any, **more: Any) -> Tensor:
            if module.disable_adapters or module.merged:
                result: Tensor = forward(x, *arguments, **more)
                return result
            if more.get("adapter_names") is not None:
                raise ModelError("adapters that differ inside a batch cannot be held to masks")
            result = module.base_layer(x, *arguments, **more)
            dtype = result.dtype
            for adapter in module.active_adapters:
                if adapter in module.lora_A:
                    product = masked_delta(adapter)
                    given = module.lora_dropout[adapter](x.to(product.dtype))
                    by_rows = not isinstance(module.base_layer, Conv1D)
                    result = result + given @ (product.T if by_rows else product)
            return result.to(dtype)

        module.get_delta_weight, module.forward = masked_delta, masked_forward

        def undo() -> None:
            del module.get_delta_weight, module.forward

        return undo


def _check(name: str, module: Any) -> None:
    """Raise ModelError where a layer's adapters are none that a mask can be put on."""
    if not all(hasattr(module, part) for part in ("lora_A", "lora_B", "get_delta_weight")):
        raise ModelError(
            f"{name!r} is a pruned layer with an adapter of {type(module).__name__}; masks are held "
            "through LoRA alone"
        )
    if not isinstance(module.base_layer, nn.Linear | Conv1D):
        raise ModelError(f"{name!r}: LoRA around {type(module.base_layer).__name__} is not held")
    variants = {**getattr(module, "lora_variant", {})}
    biases = [a for a, has in getattr(module, "lora_bias", {}).items() if has]
    if variants or biases:
        one = next(iter([*variants, *biases]))
        raise ModelError(
            f"{name!r}: adapter {one!r} is a variant of LoRA (DoRA, a bias of its own …), whose product "
            "no mask can be put on; use plain LoRA"
        )
