"""Masks held while a pruned model is trained on: what was pruned stays zero, whatever the optimiser does.

Gradients of pruned weights are set to zero, so that they have no part in norms and moments; and after every
step of any optimiser pruned weights are set to zero once more, for those that move weights without a
gradient (momentum of before, weight decay towards something else, orthogonalised updates). LoRA's product is
masked in the forward pass and where it is merged: what is trained is what the merged model computes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Blocks, Layer
from maskopt.models.architecture.mask_model import layer_masks
from maskopt.models.checkpoints.checkpoint import open_checkpoint
from maskopt.models.checkpoints.workspace import MASKS
from maskopt.models.training.lora import LoraLayer, base_name, unwrapped

if TYPE_CHECKING:
    from transformers import TrainerCallback

Masks = Mapping[str, Bool[Tensor, "rows n"]]


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
    return KeptMasks(
        {name: (inner.get_parameter(name), kept) for name, kept in held.items()}, inner
    )


def parameter_masks(
    model: nn.Module, masks: str | Path | Masks, *, trust_remote_code: bool = False
) -> dict[str, Bool[Tensor, ...]]:
    """Masks of layers as those of the model's parameters, by their names and in their shapes, True = kept.

    Arguments and errors are those of `keep_masks`.
    """
    known = masks if isinstance(masks, Mapping) else _of_folder(Path(masks), trust_remote_code)
    layers = {base_name(layer.name): layer for layer in Blocks(model).all_layers()}
    if missing := sorted(set(known) - set(layers)):
        raise ModelError(f"the model has no layer {missing[0]!r}, and the masks have one for it")
    held: dict[str, Tensor] = {}
    for name, kept in known.items():
        _put(model, layers[name], kept, held)
    return held


class KeptMasks:
    """The zeros of a model that are held. Leaving its `with`, or `close`, sets them once more and lets go; it
    warns where LoRA's product, which is masked no longer then, is not merged.

    A held mask takes a byte for each weight of the pruned layers, on their device; a step takes one pass over
    these weights more, and their gradients another. With LoRA the product of its two matrices is made in full
    in every pass of a layer: rank · rows · n products, and the gradient's.
    """

    def __init__(
        self, held: Mapping[str, tuple[nn.Parameter, Bool[Tensor, ...]]], model: nn.Module
    ) -> None:
        self._held = dict(held)
        if lost := self.lost():
            name = next(name for name, count in self._lost_by_name() if count)
            raise ModelError(
                f"{name!r} holds weights that its mask prunes ({lost} in all): give the pruned model, or "
                "`maskopt masks apply` the masks to this one first"
            )
        self._lora = LoraLayer.of(model, {id(p): kept for p, kept in self._held.values()})
        self._undo: list[Callable[[], None]] = []
        for parameter, kept in self._held.values():
            if parameter.requires_grad:
                self._undo.append(parameter.register_hook(_masked(kept)).remove)
        self._undo.append(register_optimizer_step_post_hook(self._after_step).remove)
        self._undo += [layer.hold() for layer in self._lora]

    @property
    def bytes(self) -> int:
        """That the masks take."""
        return sum(kept.nbytes for _, kept in self._held.values())

    def apply(self) -> None:
        """Set every pruned weight to zero."""
        with torch.no_grad():
            for parameter, kept in self._held.values():
                if not parameter.is_meta:
                    parameter.masked_fill_(~kept, 0)

    def lost(self) -> int:
        """Pruned weights that are not zero now."""
        return sum(count for _, count in self._lost_by_name())

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
        if self._undo and not all(layer.merged for layer in self._lora):
            warnings.warn(
                "LoRA around pruned layers is not merged, and its product is masked no longer: it changes "
                "pruned weights, too; call `merge_and_unload()` before the masks are let go",
                stacklevel=2,
            )
        while self._undo:
            self._undo.pop()()

    def callback(self) -> TrainerCallback:
        """For `transformers.Trainer`: zeros are set after every step and before anything is saved, for
        optimisers that are none of torch's."""
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_step_end(_, *arguments: Any, **more: Any) -> None:
                self.apply()

            def on_train_end(_, *arguments: Any, **more: Any) -> None:
                self.apply()

        return Callback()

    def __enter__(self) -> KeptMasks:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _lost_by_name(self) -> Iterable[tuple[str, int]]:
        for name, (parameter, kept) in self._held.items():
            yield name, int((parameter.detach().masked_fill(kept, 0) != 0).sum())

    def _after_step(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        mine = {id(p) for p, _ in self._held.values()}
        if any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            self.apply()


def _of_folder(folder: Path, trust_remote_code: bool) -> Masks:
    checkpoint = open_checkpoint(folder, trust_remote_code=trust_remote_code)
    if not (folder / MASKS).is_file():
        raise ModelError(f"{folder}: holds no {MASKS}; name a folder that `maskopt prune` wrote")
    found = layer_masks(checkpoint, folder / MASKS, trust_remote_code=trust_remote_code)
    return {layer.name: kept for layer, kept in found}


def _put(model: nn.Module, layer: Layer, mask: Any, held: dict[str, Tensor]) -> None:
    """Enter a layer's mask into that of its parameter, in the parameter's layout."""
    try:
        parameter = model.get_parameter(layer.parameter)
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
    if layer.parameter not in held:
        held[layer.parameter] = torch.ones_like(parameter, dtype=torch.bool)
    whole = held[layer.parameter]
    place = whole if layer.expert is None else whole[layer.expert]
    (place if layer.input_axis == 1 else place.T).copy_(kept)


def _masked(kept: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(~kept, 0)
