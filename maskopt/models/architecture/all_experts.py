"""Experts observed on all tokens, not only on those routed to them; what a block computes stays."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer, is_experts


@contextmanager
def experts_see_all(
    block: nn.Module, prefix: str, layers: Sequence[Layer], local: threading.local
) -> Iterator[None]:
    """Before experts run as routed, run all of them on all tokens; `local.watch` of the thread observes only
    that. Raises ModelError for experts that are not given a routing which could be replaced."""
    handles = []

    def names(path: str) -> frozenset[str]:
        return frozenset(layer.name for layer in layers if layer.name.startswith(path))

    def hook(module: nn.Module, inside: frozenset[str], everything: Callable[..., None]) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if getattr(local, "busy", False) or not hasattr(local, "watch"):
                return
            local.busy = True
            try:
                everything(module, args, kwargs)
            finally:
                local.busy = False
            local.watch.muted = local.watch.muted | inside

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not getattr(local, "busy", False) and hasattr(local, "watch"):
                local.watch.muted = local.watch.muted - inside

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    for name, module in block.named_modules():
        path = prefix + (f"{name}." if name else "")
        if is_experts(module) and names(path):
            if not takes_routing(module):
                raise ModelError(
                    f"{path}: {type(module).__name__} is not given a routing that could be replaced; "
                    "leave out `all_experts`"
                )
            hook(module, names(path), _run_fused)
        elif (experts := _expert_list(module)) and names(path + experts):
            hook(module, names(f"{path}{experts}."), _run_listed)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def takes_routing(module: nn.Module) -> bool:
    """Is the module called with hidden states, chosen experts, and their weights?"""
    try:
        inspect.signature(module.forward).bind(None, None, None)
    except TypeError:
        return False
    return True


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
