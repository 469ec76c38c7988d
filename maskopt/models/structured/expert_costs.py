"""The experts of a mixture as structures of a block: where they are, and what removing some of them costs.

A token's output is Σ gₑ·Eₑ(x) over the experts e that it is routed to. Without the experts P it misses
Σ_{e∈P} gₑ·Eₑ(x), whose mean square is pᵀQp with

    Q_ef = mean over tokens of gₑ·g_f·⟨Eₑ(x), E_f(x)⟩,

a Gram matrix, so that a mixture is one row with as many entries as it has experts. What the smaller model
does then, it does otherwise: the router gives such a token to its next best experts. That is measured
afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from maskopt.errors import ModelError
from maskopt.models.architecture.all_experts import takes_routing
from maskopt.models.architecture.blocks import Blocks, is_experts
from maskopt.models.blockwise.job import Block

T = TypeVar("T")

#: what modules are called that route
_ROUTERS = ("gate", "router")
#: what configurations call the number of experts that a token goes to
_EACH = ("num_experts_per_tok", "moe_topk", "moe_k", "num_selected_experts")


@dataclass(frozen=True)
class Mixture:
    """Experts of a block that tokens are routed to.

    Attributes:
        name: of the module that holds them, in the model.
        kind: the same inside the block.
        block: its index.
        count: how many there are.
        each: to how many of them a token goes.
        parameters: along whose first axis they lie, by their names in the model, the router's among them.
    """

    name: str
    kind: str
    block: int
    count: int
    each: int
    parameters: tuple[str, ...]

    @property
    def parent(self) -> str:
        """The module that routes, and adds up."""
        return self.name.rpartition(".")[0]


def mixtures_of(blocks: Blocks, index: int) -> list[Mixture]:
    """Those of a block; none where it has an MLP of another kind.

    Raises:
        ModelError: experts that cannot be removed from what holds or routes to them.
    """
    block, found = blocks.modules[index], []
    for name, module in block.named_modules():
        if not is_experts(module):
            continue
        full = blocks.prefix(index) + name
        if not takes_routing(module):
            raise ModelError(
                f"{full}: {type(module).__name__} is not given a routing, and its experts cannot be removed; "
                "leave out `experts`"
            )
        _check_one_group(blocks.model, full)
        parent = block.get_submodule(name.rpartition(".")[0])
        count = next(p.shape[0] for _, p in module.named_parameters(recurse=False) if p.ndim == 3)
        parameters = [f"{full}.{n}" for n, p in module.named_parameters() if p.shape[0] == count]
        routers = [
            f"{full.rpartition('.')[0]}.{n}"
            for n, p in parent.named_parameters()
            if n.partition(".")[0] in _ROUTERS and p.shape[0] == count
        ]
        kept = [
            n
            for n, b in parent.named_buffers()
            if n.partition(".")[0] in _ROUTERS and b.ndim and b.shape[0] == count
        ]
        if not routers or kept:
            what = (
                f"keeps {kept[0]!r} in addition to its weights" if kept else "is of no known form"
            )
            raise ModelError(f"{full}: its router {what}; leave out `experts`")
        each = _each(blocks.model, full)
        found.append(Mixture(full, name, index, count, each, (*parameters, *routers)))
    return found


def _check_one_group(model: nn.Module, name: str) -> None:
    """Raise ModelError where a token chooses groups of experts first: those that are left would be dealt out
    to the groups anew."""
    text: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    groups = getattr(text, "n_group", None) or 1
    if groups > 1 and (getattr(text, "topk_group", None) or groups) < groups:
        raise ModelError(
            f"{name}: its router chooses among {groups} groups of experts first; leave out `experts`"
        )


def _each(model: nn.Module, name: str) -> int:
    text: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    for key in _EACH:
        if isinstance(value := getattr(text, key, None), int):
            return value
    raise ModelError(
        f"{name}: the configuration does not say how many experts a token goes to; leave out `experts`"
    )


def cut(model: nn.Module, mixture: Mixture, kept: Int[Tensor, " kept"]) -> None:
    """Leave only these experts in the model, in this order."""
    for name in mixture.parameters:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data[kept.to(parameter.device)]


def costs(block: Block, mixture: Mixture) -> tuple[Float[Tensor, "experts experts"], int]:
    """Q of a mixture in float64, from all windows, and how many tokens it is the mean over."""
    module = block.job.source.model.get_submodule(mixture.name)

    def visit(args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> tuple[Tensor, int]:
        hidden, index, weights = (*args, *kwargs.values())
        index = index.reshape(-1, index.shape[-1])
        weights = weights.reshape(index.shape)
        flat = hidden.reshape(-1, hidden.shape[-1])
        parts = torch.stack(
            [module(flat, index[:, [j]], weights[:, [j]]) for j in range(index.shape[1])], 1
        ).double()
        products = parts @ parts.transpose(1, 2)
        place = index[:, :, None] * mixture.count + index[:, None, :]
        q = torch.zeros(mixture.count**2, dtype=torch.float64, device=flat.device)
        q.index_add_(0, place.reshape(-1), products.reshape(-1))
        return q.view(mixture.count, mixture.count).cpu(), len(flat)

    found = seen_by(block, module, mixture.name, visit)
    tokens = sum(count for _, count in found)
    total = torch.stack([q for q, _ in found]).sum(0) / max(tokens, 1)
    return (total + total.T) / 2, tokens


def change_of(block: Block, mixture: Mixture, dense: nn.Module) -> tuple[float, float]:
    """How far the mixture's outputs are from those of what it was, on the same inputs, and these themselves:
    mean squares over tokens, summed over the outputs."""
    module = block.job.source.model.get_submodule(mixture.parent)

    def visit(
        args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> tuple[Tensor, Tensor, int]:
        before, after = _hidden(dense(*args, **kwargs)).double(), _hidden(output).double()
        error, energy = (after - before).square().sum(), before.square().sum()
        return error, energy, before.numel() // before.shape[-1]

    found = seen_by(block, module, mixture.parent, visit)
    tokens = max(sum(count for *_, count in found), 1)
    return tuple(float(sum(one[i] for one in found)) / tokens for i in (0, 1))  # type: ignore[return-value]


def seen_by(
    block: Block,
    module: nn.Module,
    name: str,
    visit: Callable[[tuple[Any, ...], dict[str, Any], Any], T],
) -> list[T]:
    """What `visit` makes of arguments and output of a module's call, for every window in its order; the
    windows stay where they are.

    Raises:
        ModelError: a call that is not made once a window; NaN or infinite activations.
    """
    opened, local = block.opened, threading.local()

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not getattr(local, "busy", True):
            local.busy = True  # a visit may call the module
            local.found.append(
                (visit(args, kwargs, output), bool(_hidden(output).isfinite().all()))
            )
            local.busy = False

    def one(sample: int) -> list[tuple[T, bool]]:
        local.found, local.busy = [], False
        opened.run(sample, opened.samples.states)
        local.busy = True
        found: list[tuple[T, bool]] = local.found
        return found

    handle, seen = module.register_forward_hook(hook, with_kwargs=True), []
    try:
        for wave in block.job.pool.waves(list(opened.samples.active)):
            passes = block.job.pool.run([lambda s=s: one(s) for s in wave])  # type: ignore[misc]
            for sample, calls in zip(wave, passes, strict=True):
                if len(calls) != 1:
                    raise ModelError(f"{name}: is called {len(calls)} times a window, not once")
                if calls[0][1]:
                    seen.append(calls[0][0])
                else:
                    opened.samples.leave_out(sample, name)
    finally:
        handle.remove()
    return seen


def _hidden(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple | list) else output
    return found
