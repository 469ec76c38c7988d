"""Observe the inputs of layers, wherever the model's code writes the product.

Inside a `Watch`, every product of activations with a watched weight is recorded: `nn.Linear`, `Conv1D`, an
expert's slice of a 3-D parameter, in `linear`, `addmm`, `matmul` or `bmm`. The weight is recognised by its
address. A `WatchGradients` sums gradients by the outputs. Experts may be observed on all tokens, not only on
those routed to them, without a change of what a block computes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer, is_experts, matrix, takes_routing

#: position of (input, weight) among the arguments of each product
_PRODUCTS: dict[Callable[..., Any], tuple[int, int]] = {
    F.linear: (0, 1),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), (1, 2)),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), (0, 1)),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), (0, 1)),
}
#: those whose weight may stand on either side (in `linear` it is the second by definition)
_EITHER_WAY = set(_PRODUCTS) - {F.linear}


class WatchedWeights:
    """Where the weights of some layers lie in memory."""

    def __init__(self, model: nn.Module, layers: Iterable[Layer]) -> None:
        self._by_address: dict[int, Layer] = {}
        self._experts: dict[str, list[Layer]] = {}
        for layer in layers:
            self._by_address[matrix(model, layer).data_ptr()] = layer
            if layer.expert is not None:
                self._experts.setdefault(layer.parameter, []).append(layer)

    def find(self, weight: Tensor) -> list[tuple[int | None, Layer]]:
        """Layers whose matrix the tensor is, each with its index in a 3-D input; None: all of it."""
        layer = self._by_address.get(weight.data_ptr())
        if layer is None:
            return []
        if layer.expert is not None and weight.ndim == 3:
            return [(expert.expert, expert) for expert in self._experts[layer.parameter]]
        return [(None, layer)]


def _products(
    func: Callable[..., Any], args: tuple[Any, ...]
) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Inputs [..., n] of a product, a tensor that may be a weight, and whether that is on the left."""
    places = _PRODUCTS.get(func)
    if places is None or len(args) <= places[1]:
        return
    one, two = args[places[0]], args[places[1]]
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return
    yield one, two, False
    if func in _EITHER_WAY and two.ndim > 1:
        yield two.mT, one, True


class Seen(Exception):
    """The wanted inputs of a forward pass are recorded."""


class Watch(TorchFunctionMode):
    """Records, per layer name, the inputs of one forward pass as [tokens, n] tensors, without layers in
    `muted`, which a hook may change on the way. The pass ends by `Seen` once the input of the layer `until`
    is recorded."""

    def __init__(
        self, weights: WatchedWeights, *, copy: bool = False, until: str | None = None
    ) -> None:
        super().__init__()
        self.weights = weights
        self.copy = copy
        self.until = until
        self.inputs: dict[str, list[Tensor]] = {}
        self.muted: frozenset[str] = frozenset()
        self._held: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for inputs, weight, _ in _products(func, args):
            self._record(inputs, weight)
        if self.until in self.inputs:
            raise Seen
        return func(*args, **(kwargs or {}))

    @property
    def overwritten(self) -> bool:
        """Did the model's code change a recorded input in place afterwards?"""
        return any(tensor._version != version for tensor, version in self._held)

    def _record(self, inputs: Tensor, weight: Tensor) -> None:
        for expert, layer in self.weights.find(weight):
            if layer.name in self.muted:
                continue
            part = inputs if expert is None else inputs[expert]
            if part.shape[-1] != layer.n:
                raise RuntimeError(
                    f"layer {layer.name!r} has {layer.n} inputs, but was given {part.shape[-1]}"
                )
            if not part.numel():
                continue  # an expert without tokens; empty tensors also seem to be all the same one
            if self.copy:
                part = part.clone()
            else:
                self._held.append((part, part._version))
            self.inputs.setdefault(layer.name, []).append(part.reshape(-1, layer.n))


class WatchGradients(TorchFunctionMode):
    """By layer, squares of the loss's gradient by each output, summed over tokens, float64 [rows]."""

    def __init__(self, weights: WatchedWeights) -> None:
        super().__init__()
        self.weights = weights
        self.squares: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for _, weight, transposed in _products(func, args):
            layers = self.weights.find(weight)
            if layers and output.requires_grad and output.numel():
                output.register_hook(partial(self._add, layers, transposed))
        return output

    def _add(
        self, layers: Sequence[tuple[int | None, Layer]], transposed: bool, gradient: Tensor
    ) -> None:
        gradient = gradient.mT if transposed else gradient
        for expert, layer in layers:
            part = gradient if expert is None else gradient[expert]
            squares = part.reshape(-1, layer.rows).double().square().sum(0)
            known = self.squares.get(layer.name)
            self.squares[layer.name] = squares if known is None else known + squares


def experts_see_all(
    block: nn.Module, prefix: str, layers: Sequence[Layer], local: threading.local
) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Modules of experts with forward functions that first run all experts on all tokens, then as routed;
    `local.watch` of the thread observes only the first. Raises ModelError for experts that are not given a
    routing which could be replaced."""

    def forward(
        module: nn.Module,
        routed: Callable[..., Any],
        inside: frozenset[str],
        everything: Callable[..., None],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if getattr(local, "busy", False):
            return routed(*args, **kwargs)
        local.busy = True
        try:
            everything(module, args, kwargs)
        finally:
            local.busy = False
        local.watch.muted = local.watch.muted | inside
        output = routed(*args, **kwargs)
        local.watch.muted = local.watch.muted - inside
        return output

    def names(path: str) -> frozenset[str]:
        return frozenset(layer.name for layer in layers if layer.name.startswith(path))

    for name, module in block.named_modules():
        path = prefix + (f"{name}." if name else "")
        if is_experts(module) and names(path):
            if not takes_routing(module):
                raise ModelError(
                    f"{path}: {type(module).__name__} is not given a routing that could be replaced; "
                    "leave out `all_experts`"
                )
            yield module, partial(forward, module, module.forward, names(path), _run_fused)
        elif (experts := _expert_list(module)) and names(path + experts):
            inside = names(f"{path}{experts}.")
            yield module, partial(forward, module, module.forward, inside, _run_listed)


def _run_fused(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call fused experts as if every token were routed to all of them."""
    hidden = args[0] if args else kwargs["hidden_states"]
    count = next(p.shape[0] for _, p in module.named_parameters(recurse=False) if p.ndim == 3)
    flat = hidden.reshape(-1, hidden.shape[-1])
    index = torch.arange(count, device=flat.device).expand(flat.shape[0], count)
    module(flat, index, torch.full_like(index, 1.0 / count, dtype=flat.dtype))


def _run_listed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call every expert of a module list on all tokens."""
    hidden = args[0] if args else next(iter(kwargs.values()))
    flat = hidden.reshape(-1, hidden.shape[-1])
    for expert in getattr(module, _expert_list(module)):
        expert(flat)


def _expert_list(module: nn.Module) -> str:
    """The first child that is a list of experts; empty where there is none."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and "expert" in name and len(child) > 1:
            return name
    return ""
