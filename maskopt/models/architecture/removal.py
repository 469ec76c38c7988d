"""Experts and blocks that can be removed from a model, and what that leaves of its configuration and its
stored tensors. Experts go with their rows of the router, blocks with all of their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from maskopt.core.pattern import Unstructured
from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Blocks, is_experts, takes_routing
from maskopt.models.architecture.structures import Change, Cut, Kept, stored_settings
from maskopt.models.architecture.transformers_adapter import Conversion

#: what modules are called that route
_ROUTERS = ("gate", "router")
#: what configurations call the number of blocks, of experts, and of those that a token goes to
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EACH = ("num_experts_per_tok", "moe_topk", "moe_k", "num_selected_experts")
#: settings that list indices of blocks; other lists have an entry a block
_BLOCK_INDICES = (
    *("attn_layer_indices", "cross_attention_layers", "full_attn_idxs", "mlp_only_layers"),
    "moe_layers",
)
#: the name of a stored tensor of one expert
_EXPERT = re.compile(r"(?P<home>.*\bexperts)\.(?P<number>\d+)\.(?P<rest>.*)")


@dataclass(frozen=True)
class Mixture:
    """Experts of a block that tokens are routed to, by the `name` of their module: `count` of them, to `each`
    of which a token goes; `parameters` have experts on their first axis, the router's among them."""

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
    """The mixtures of a block; ModelError for experts that cannot be removed from module or router."""
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
        each, parent = _each(blocks.model, full), block.get_submodule(name.rpartition(".")[0])
        count = next(p.shape[0] for _, p in module.named_parameters(recurse=False) if p.ndim == 3)
        parameters = [f"{full}.{n}" for n, p in module.named_parameters() if p.shape[0] == count]

        def of_router(named: Iterable[tuple[str, Tensor]], count: int = count) -> list[str]:
            return [
                n
                for n, x in named
                if n.partition(".")[0] in _ROUTERS and x.ndim and x.shape[0] == count
            ]

        routers, kept = of_router(parent.named_parameters()), of_router(parent.named_buffers())
        if not routers or kept:
            what = "is of no known form"
            if kept:
                what = f"keeps {kept[0]!r} in addition to its weights"
            raise ModelError(f"{full}: its router {what}; leave out `experts`")
        parameters += [f"{full.rpartition('.')[0]}.{n}" for n in routers]
        found.append(Mixture(full, name, index, count, each, tuple(parameters)))
    return found


def _each(model: nn.Module, name: str) -> int:
    """To how many experts a token goes; ModelError where the configuration does not say."""
    text: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    groups = getattr(text, "n_group", None) or 1
    if groups > 1 and (getattr(text, "topk_group", None) or groups) < groups:
        raise ModelError(
            f"{name}: its router chooses among {groups} groups of experts first; leave out `experts`"
        )
    for key in _EACH:
        if isinstance(value := getattr(text, key, None), int):
            return value
    raise ModelError(
        f"{name}: the configuration does not say how many experts a token goes to; leave out `experts`"
    )


def experts_left(mixtures: Sequence[Mixture], share: float) -> int:
    """How many experts of each mixture stay; ModelError where a model cannot do without this share."""
    if not mixtures:
        raise ModelError("the model has no experts that tokens are routed to; leave out `experts`")
    counts = {(m.count, m.each) for m in mixtures}
    if len(counts) > 1:
        raise ModelError(
            "its blocks have different numbers of experts, and a configuration names one; leave out `experts`"
        )
    (count, each) = counts.pop()
    gone = Unstructured(sparsity=share).pruned_in(1, count)
    if not gone:
        raise ModelError(
            f"a share of {share:g} of {count} experts is none; take a larger `experts`"
        )
    if count - gone < each:
        raise ModelError(
            f"a share of {share:g} leaves {count - gone} of {count} experts, and a token goes to {each}; "
            "take a smaller `experts`"
        )
    return count - gone


def expert_settings(
    model: nn.Module, config: Mapping[str, Any], mixtures: Sequence[Mixture], left: int
) -> dict[str, int]:
    """The settings of the stored `config` that count experts; all such words if none is stored."""
    text: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    keys = [key for key in _COUNTS if getattr(text, key, None) == mixtures[0].count]
    stored = stored_settings(config)
    return dict.fromkeys([key for key in keys if key in stored] or keys, left)


def without_experts(
    conversion: Conversion, settings: Mapping[str, int], mixtures: Sequence[Mixture], kept: Kept
) -> Change:
    """What is left of the stored model; ModelError for experts that are neither stored as the model's
    parameters nor one by one."""
    names: dict[str, str | None] = {name: name for name in conversion.keys}
    cuts: dict[str, list[tuple[str, Cut]]] = {}
    for mixture in mixtures:
        numbers = {old: new for new, old in enumerate(kept[mixture.name].nonzero()[:, 0].tolist())}
        for parameter in mixture.parameters:
            tensor = conversion.stored_as_is(parameter)
            if tensor is not None:
                cuts[tensor] = [(mixture.name, Cut(0, [(mixture.count, 1)]))]
                continue
            for name in conversion.sources(parameter):
                found = _EXPERT.match(name)
                if found is None or int(found["number"]) >= mixture.count:
                    raise ModelError(
                        f"parameter {parameter!r} is stored in another form than expert by expert; its "
                        "experts cannot be removed"
                    )
                new = numbers.get(int(found["number"]))
                names[name] = None if new is None else f"{found['home']}.{new}.{found['rest']}"
    return Change(settings, names, cuts, kept)


def block_settings(
    blocks: Blocks, config: Mapping[str, Any], removed: Sequence[int]
) -> dict[str, Any]:
    """The number of blocks in the stored `config`, and settings with an entry for each block or with their
    numbers."""
    stored, count = stored_settings(config), len(blocks)
    keys = [key for key in _DEPTHS if stored.get(key) == count]
    settings: dict[str, Any] = {(keys or _DEPTHS)[0]: count - len(removed)}
    text: Any = blocks.model.config.get_text_config()  # type: ignore[operator, union-attr]
    for key, value in text.to_dict().items():
        if key in _BLOCK_INDICES and isinstance(value, list):
            left = [index for index in value if index not in removed]
            settings[key] = [index - sum(gone < index for gone in removed) for index in left]
        elif isinstance(value, list) and len(value) == count and not key.endswith("token_id"):
            settings[key] = [item for index, item in enumerate(value) if index not in removed]
    return settings


def without_blocks(
    conversion: Conversion, blocks: Blocks, settings: Mapping[str, Any], removed: Sequence[int]
) -> Change:
    """What is left of the stored model: the decoder's blocks have new names, not those of a vision tower."""
    last, inside = blocks.name.rpartition(".")[2], f"{blocks.name}."
    names = [name for name in blocks.model.state_dict() if name.startswith(inside)]
    own = set(conversion.needed(names))
    new = {x: renumbered(x, last, removed) if x in own else x for x in conversion.keys}
    return Change(settings, new)


def renumbered(name: str, blocks: str, removed: Sequence[int]) -> str | None:
    """The name of a block's tensor once others are removed; None for one that is."""
    found = re.search(rf"(?:^|\.){re.escape(blocks)}\.(\d+)\.", name)
    if found is None:
        return name
    index = int(found[1])
    if index in removed:
        return None
    new = index - sum(gone < index for gone in removed)
    return f"{name[: found.start(1)]}{new}{name[found.end(1) :]}"
