"""Masks held while a pruned model is trained on: pruned weights stay zero under any optimiser.

Gradients of pruned weights are set to zero, and after every step of any optimiser the weights once more, for
optimisers that move weights without a gradient. LoRA's product is masked in the forward pass and where it is
merged. PEFT's layers are recognised by their attributes, so that PEFT itself is not needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Blocks, Layer, merged
from maskopt.models.architecture.source import layer_masks
from maskopt.models.checkpoints.checkpoint import open_checkpoint
from maskopt.models.checkpoints.schema import MASKS

if TYPE_CHECKING:
    from transformers import TrainerCallback

Masks = Mapping[str, Bool[Tensor, "rows n"]]
#: PEFT's name of the layer inside its own
_BASE = "base_layer"


def keep_masks(
    model: nn.Module, masks: str | Path | Masks, *, trust_remote_code: bool = False
) -> KeptMasks:
    """Hold a pruned model's zeros from here on, until the result is closed.

        with maskopt.keep_masks(model, "OUT"):
            trainer.train()

    Call it once the model is on its device and, with PEFT, once its adapters are there. Zeros are then held
    through every `torch.optim.Optimizer` and through merging LoRA, which comes before it is closed.

    Args:
        model: the pruned model, as transformers loads it, or PEFT's model around it; either one compiled,
            or in DistributedDataParallel.
        masks: the folder that `maskopt prune` wrote; or bool [rows, n] by layer name, True = kept, as in
            `PruneReport.masks`.
        trust_remote_code: run code that comes with the folder to find the layers of its masks.

    Raises:
        ModelError: masks of layers that the model does not have, or of other shapes; weights in pruned
            places that are not zero; adapters that change weights otherwise than LoRA does.
    """
    inner = unwrapped(model)
    held = parameter_masks(inner, masks, trust_remote_code=trust_remote_code)
    pairs = {name: (inner.get_parameter(name), kept) for name, kept in held.items()}
    return KeptMasks(pairs, inner)


def parameter_masks(
    model: nn.Module, masks: str | Path | Masks, *, trust_remote_code: bool = False
) -> dict[str, Bool[Tensor, ...]]:
    """Return masks of layers as those of the model's parameters, by name and in their shapes, True = kept.

    Arguments and errors are those of `keep_masks`.
    """
    if not isinstance(masks, Mapping):
        folder = Path(masks)
        checkpoint = open_checkpoint(folder, trust_remote_code=trust_remote_code)
        if not (folder / MASKS).is_file():
            raise ModelError(
                f"{folder}: holds no {MASKS}; name a folder that `maskopt prune` wrote"
            )
        pairs = layer_masks(checkpoint, folder / MASKS, trust_remote_code=trust_remote_code)
        masks = {layer.name: kept for layer, kept in pairs}
    layers = {
        ".".join(part for part in layer.name.split(".") if part != _BASE): layer
        for layer in Blocks(model).all_layers()
    }
    if missing := sorted(set(masks) - set(layers)):
        raise ModelError(f"the model has no layer {missing[0]!r}, and the masks have one for it")
    parts = {name: (layers[name], _checked(model, layers[name], x)) for name, x in masks.items()}
    return {
        name: kept.to(model.get_parameter(name).device, copy=True)
        for name, kept in merged(model, parts, True).items()
    }


class KeptMasks:
    """The zeros of a model that are held.

    Leaving its `with`, or `close`, sets them once more and ends the hold; it warns where LoRA's product is
    not merged, since it is masked no longer then.

    A held mask takes a byte for each weight of the pruned layers, on their device; a step takes one pass over
    these weights more, and their gradients another. With LoRA the product of its two matrices is made in full
    in every pass of a layer: rank · rows · n products, and the gradient's.
    """

    def __init__(
        self, held: Mapping[str, tuple[nn.Parameter, Bool[Tensor, ...]]], model: nn.Module
    ) -> None:
        self._held = dict(held)
        lost = self._lost_by_name()
        if any(lost.values()):
            name = next(name for name, count in lost.items() if count)
            raise ModelError(
                f"{name!r} holds weights that its mask prunes ({sum(lost.values())} in all): give the pruned "
                "model, or `maskopt masks apply` the masks to this one first"
            )
        self._lora = _lora_layers(model, {id(p): kept for p, kept in self._held.values()})
        self._undo: list[Callable[[], None]] = []
        for parameter, kept in self._held.values():
            if parameter.requires_grad:
                hook = parameter.register_hook(lambda x, kept=kept: x.masked_fill(~kept, 0))
                self._undo.append(hook.remove)
        self._undo.append(register_optimizer_step_post_hook(self._after_step).remove)
        self._undo += [_mask_product(module, kept) for module, kept in self._lora]

    @property
    def bytes(self) -> int:
        """The memory of the masks."""
        return sum(kept.nbytes for _, kept in self._held.values())

    def apply(self) -> None:
        """Set every pruned weight to zero."""
        with torch.no_grad():
            for parameter, kept in self._held.values():
                if not parameter.is_meta:
                    parameter.masked_fill_(~kept, 0)

    def lost(self) -> int:
        """Return the number of pruned weights that are not zero now."""
        return sum(self._lost_by_name().values())

    def close(self) -> None:
        """Set every pruned weight to zero, and hold none of them any longer."""
        if self._undo and (lost := self.lost()):
            warnings.warn(
                f"{lost} pruned weights were not zero when the masks were let go; the model with zeros "
                "there is not the one that was trained: call `keep_masks` after all adapters are added, and "
                "with an optimiser that is none of torch's take its `callback`",
                stacklevel=2,
            )
        self.apply()
        if self._undo and not all(module.merged or not module.lora_A for module, _ in self._lora):
            warnings.warn(
                "LoRA around pruned layers is not merged, and its product is masked no longer: it changes "
                "pruned weights, too; call `merge_and_unload()` before the masks are let go",
                stacklevel=2,
            )
        while self._undo:
            self._undo.pop()()

    def callback(self) -> TrainerCallback:
        """Return a callback of `transformers.Trainer` that sets zeros after every step of any optimiser."""
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_step_end(_, *arguments: Any, **more: Any) -> None:
                self.apply()

            on_train_end = on_step_end

        return Callback()

    def __enter__(self) -> KeptMasks:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _lost_by_name(self) -> dict[str, int]:
        return {
            name: int((parameter.detach().masked_fill(kept, 0) != 0).sum())
            for name, (parameter, kept) in self._held.items()
        }

    def _after_step(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        held = {id(p) for p, _ in self._held.values()}
        if any(id(p) in held for group in optimizer.param_groups for p in group["params"]):
            self.apply()


def _checked(model: nn.Module, layer: Layer, mask: Any) -> Bool[Tensor, "rows n"]:
    """Return a layer's mask as a tensor; ModelError for another dtype or shape."""
    try:
        model.get_parameter(layer.parameter)
    except AttributeError:
        raise ModelError(
            f"{layer.parameter!r} is no parameter any longer: masks are on it already; remove those first"
        ) from None
    kept = torch.as_tensor(mask)
    if kept.dtype != torch.bool:
        raise ModelError(
            f"layer {layer.name!r}: its mask must be bool (True = kept), not {kept.dtype}"
        )
    if tuple(kept.shape) != (layer.rows, layer.n):
        raise ModelError(
            f"layer {layer.name!r} is {layer.rows} × {layer.n}, its mask {' × '.join(map(str, kept.shape))}"
        )
    return kept


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model of transformers inside wrappers of `torch.compile`, data parallelism and PEFT."""
    if isinstance(model, DistributedDataParallel | nn.DataParallel):
        return unwrapped(model.module)
    compiled = getattr(model, "_orig_mod", None)
    if compiled is not None:
        return unwrapped(compiled)
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else unwrapped(inner())


def _lora_layers(model: nn.Module, masks: Mapping[int, Tensor]) -> list[tuple[Any, Tensor]]:
    """Return PEFT's modules around pruned layers, each with its mask in the layout of the base weight.

    Args:
        masks: by the `id` of the base layers' weights.

    Raises:
        ModelError: adapters of another kind around a pruned layer.
    """
    layers = []
    for name, module in model.named_modules():
        base = getattr(module, _BASE, None)
        if not isinstance(base, nn.Module):
            continue
        parameters = base.named_parameters(recurse=False)
        held = {key: masks[id(weight)] for key, weight in parameters if id(weight) in masks}
        if not held:
            continue
        if set(held) != {"weight"}:
            raise ModelError(
                f"{name!r} has an adapter on {min(held)!r}, which is pruned; masks are held through "
                "LoRA on layers, not on parameters"
            )
        if not all(hasattr(module, part) for part in ("lora_A", "lora_B", "get_delta_weight")):
            raise ModelError(
                f"{name!r} is a pruned layer with an adapter of {type(module).__name__}; masks are held "
                "through LoRA alone"
            )
        if not isinstance(base, nn.Linear | Conv1D):
            raise ModelError(f"{name!r}: LoRA around {type(base).__name__} is not held")
        biases = [a for a, has in getattr(module, "lora_bias", {}).items() if has]
        if others := [*getattr(module, "lora_variant", {}), *biases]:
            raise ModelError(
                f"{name!r}: adapter {others[0]!r} is a variant of LoRA (DoRA, a bias of its own …), whose "
                "product no mask can be put on; use plain LoRA"
            )
        layers.append((module, held["weight"]))
    return layers


def _mask_product(module: Any, kept: Bool[Tensor, "first second"]) -> Callable[[], None]:
    """Mask the product of a LoRA module from here on, and return a function that undoes it."""
    delta, forward = module.get_delta_weight, module.forward

    def masked_delta(adapter: str) -> Float[Tensor, "first second"]:
        product: Tensor = delta(adapter)
        return product.masked_fill(~kept.to(product.device), 0)

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
                if not isinstance(module.base_layer, Conv1D):
                    product = product.T
                result = result + module.lora_dropout[adapter](x.to(product.dtype)) @ product
        return result.to(dtype)

    module.get_delta_weight, module.forward = masked_delta, masked_forward

    def undo() -> None:
        del module.get_delta_weight, module.forward

    return undo
