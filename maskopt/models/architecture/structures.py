"""Parts that can be removed whole, and the configuration and stored tensors of the smaller model.

Channels are columns of `down_proj`, heads blocks of columns of `o_proj`. What produces them goes along: rows
of `gate_proj` and `up_proj`, of `q_proj`, and of `k_proj` and `v_proj` where whole key–value groups go.
Experts go with their rows of the router, blocks with all of their tensors. The names are those of
transformers. Whether a configuration can describe the new sizes is tested on the model
that it then describes (`maskopt.models.structured.change`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from maskopt.core.pattern import NM, Pattern, Unstructured
from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Blocks, Layer, Mixture, text_config
from maskopt.models.architecture.transformers_adapter import Conversion

#: what a channel is called in messages
CHANNEL = "channel"
#: what configurations call the number of blocks, of experts, and the channels of an MLP
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_WIDTHS = ("ffn_dim", "ffn_hidden_size", "intermediate_size")
#: settings that list indices of blocks; other lists have an entry a block
_BLOCK_INDICES = (
    *("attn_layer_indices", "cross_attention_layers", "full_attn_idxs", "mlp_only_layers"),
    "moe_layers",
)
#: the name of a stored tensor of one expert
_EXPERT = re.compile(r"(?P<home>.*\bexperts)\.(?P<number>\d+)\.(?P<rest>.*)")
#: what consumes channels → what produces them, in one of these forms; fused: one after the other
_MLPS: Mapping[str, Sequence[tuple[str, ...]]] = {
    "down_proj": (("gate_proj", "up_proj"), ("gate_up_proj",), ("up_proj",)),
    "fc2": (("fc1",),),
    "dense_4h_to_h": (("dense_h_to_4h",),),
}
_ATTENTIONS: Mapping[str, Sequence[tuple[str, ...]]] = {
    "o_proj": (("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
    "out_proj": (("q_proj", "k_proj", "v_proj"),),
    "dense": (("q_proj", "k_proj", "v_proj"),),
}
#: of an index that belongs to no structure
NONE = -1


@dataclass(frozen=True)
class Cut:
    """Cut of a parameter along an axis.

    `parts` are (length, width) in order along it, structures 0, 1, … of `width` indices each; width 0: stays.
    """

    axis: int
    parts: Sequence[tuple[int, int]]

    @property
    def structure(self) -> Int[Tensor, " size"]:
        """Structure of every index, NONE where it stays."""
        numbers = [
            torch.arange(length) // width if width else torch.full((length,), NONE)
            for length, width in self.parts
        ]
        return torch.cat(numbers)

    def inside(self, kept: Bool[Tensor, " structures"]) -> Int[Tensor, " left"]:
        """Return the indices that stay."""
        structure = self.structure
        stays = structure == NONE
        stays[~stays] = kept[structure[~stays]]
        return stays.nonzero()[:, 0]


#: by the name of a stored tensor, how it is cut along one or two axes, and by whose structures
TensorCuts = Mapping[str, Sequence[tuple[str, Cut]]]
#: bool, True = stays: the structures of a consumer or mixture, by its name
Kept = Mapping[str, Bool[Tensor, " structures"]]


@dataclass(frozen=True)
class Change:
    """Change that a removal makes to a stored model.

    Attributes:
        settings: new values in its configuration, by key.
        names: new names of all tensors, None for one that is removed; empty: all keep their names.
    """

    settings: Mapping[str, Any]
    names: Mapping[str, str | None] = field(default_factory=dict)
    cuts: TensorCuts = field(default_factory=dict)
    kept: Kept = field(default_factory=dict)


def changed(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with other settings of its text model."""
    nested = config.get("text_config")
    if isinstance(nested, dict) and not any(key in config for key in settings):
        return {**config, "text_config": {**nested, **settings}}
    return {**config, **settings}


def _stored_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a configuration, with those of its text model on the same level."""
    nested = config.get("text_config")
    return {**config, **(nested if isinstance(nested, dict) else {})}


def cannot_say(model: nn.Module, sizes: str) -> ModelError:
    family = getattr(model.config, "model_type", type(model).__name__)
    return ModelError(
        f"the configuration of {family} models cannot describe the smaller model: {sizes}; ask for "
        "another share or number, or for other structures"
    )


@dataclass(frozen=True)
class Structures:
    """Channels or heads of one block.

    Attributes:
        unit: what one is called in messages.
        consumer: the layer whose inputs they are.
        pattern: which of them may stay.
        cuts: by the parameter's name in the model.
        settings: what the configuration says of as many as stay, by key.
    """

    unit: str
    consumer: Layer
    count: int
    pattern: Pattern
    cuts: Mapping[str, Cut]
    settings: Mapping[str, int]

    @property
    def groups(self) -> Int[Tensor, " n"]:
        """Structure of every input of the consumer."""
        return self.cuts[self.consumer.parameter].structure

    @property
    def kept(self) -> int:
        """Number of structures that stay."""
        return self.count - self.pattern.pruned_in(1, self.count)


def structures_of(blocks: Blocks, channels: float, heads: float, round_to: int) -> list[Structures]:
    """Return the structures of all blocks, in the order of the model, where such shares are removed."""
    every = list[Structures]()
    for index in range(len(blocks)):
        if heads:
            every.append(_heads_of(blocks, index, heads))
        if channels:
            every.append(_channels_of(blocks, index, channels, round_to))
    return every


def structure_settings(model: nn.Module, every: Sequence[Structures]) -> dict[str, int]:
    """Return new settings by key; ModelError where a configuration cannot describe these sizes."""
    settings: dict[str, int] = {}
    for structures in every:
        for key, value in structures.settings.items():
            if settings.setdefault(key, value) != value:
                raise cannot_say(model, f"{key} of {settings[key]} and {value}")
    if getattr(text_config(model), "num_key_value_heads", None) is None:
        settings.pop("num_key_value_heads", None)
    return settings


def structure_cuts(conversion: Conversion, every: Sequence[Structures]) -> TensorCuts:
    """Return the cuts of the stored tensors; ModelError for a parameter that is not stored unchanged."""
    cuts: dict[str, list[tuple[str, Cut]]] = {}
    for structures in every:
        for name, cut in structures.cuts.items():
            tensor = conversion.stored_as_is(name)
            if tensor is None:
                raise ModelError(
                    f"parameter {name!r} is stored in another form than the model's; it cannot be cut"
                )
            cuts.setdefault(tensor, []).append((structures.consumer.name, cut))
    return cuts


def _channels_of(blocks: Blocks, index: int, share: float, round_to: int) -> Structures:
    """Find the channels of a block's MLP; `share` goes, and a multiple of `round_to` stays."""
    consumer, producers = _find(blocks, index, _MLPS, "MLP", "channels")
    n = consumer.n
    kept = -(-(n - Unstructured(sparsity=share).pruned_in(1, n)) // round_to) * round_to
    if kept >= n:
        raise ModelError(
            f"layer {consumer.name!r}: a share of {share:g} of its {n} channels, what stays being a multiple "
            f"of {round_to}, is none; take a larger `channels` or a smaller `round_to`"
        )
    text = text_config(blocks.model)
    # where several words stand for the width, the first is what the family reads
    keys = [key for key in _WIDTHS if getattr(text, key, None) == n]
    if not keys:
        raise cannot_say(blocks.model, f"{n} channels")
    cuts = {consumer.parameter: Cut(1, [(n, 1)])}
    for producer in producers:
        halves = 2 if producer.name.endswith("gate_up_proj") else 1
        cuts |= _rows_and_bias(blocks.model, producer, [(n, 1)] * halves)
    return Structures(CHANNEL, consumer, n, Unstructured(keep=kept), cuts, {keys[0]: kept})


def _heads_of(blocks: Blocks, index: int, share: float) -> Structures:
    """Find the heads of a block: key–value groups if the share takes a whole one, else heads of each."""
    consumer, producers = _find(blocks, index, _ATTENTIONS, "attention", "heads")
    heads, groups, width = _attention_of(blocks.model, consumer)
    each = heads // groups
    gone = Unstructured(sparsity=share).pruned_in(1, groups)
    unit, size, count = "key–value group", each * width, groups
    pattern: Pattern = Unstructured(keep=groups - gone)
    new = {"num_attention_heads": heads - gone * each, "num_key_value_heads": groups - gone}
    if not gone:
        gone = Unstructured(sparsity=share).pruned_in(1, each)
        unit, size, count = "head", width, heads
        if not gone:
            raise ModelError(
                f"layer {consumer.name!r}: a share of {share:g} of {groups} key–value groups with "
                f"{each} heads each is none; {_least(groups, each)}"
            )
        pattern = NM(keep=each - gone, of=each)
        new = {"num_attention_heads": groups * (each - gone), "num_key_value_heads": groups}
    query = (consumer.n, size)
    key = (groups * width, width if unit != "head" else 0)
    cuts = {consumer.parameter: Cut(1, [query])}
    for producer in producers:
        last = producer.name.rpartition(".")[2]
        rows = {"q_proj": [query], "qkv_proj": [query, key, key]}.get(last, [key])
        cuts |= _rows_and_bias(blocks.model, producer, rows)
    return Structures(unit, consumer, count, pattern, cuts, {**new, "head_dim": width})


@dataclass(frozen=True)
class Inner:
    """Values inside a block that could be in another basis, with the layers that make and take them.

    Attributes:
        width: of a value head, in which any orthogonal basis may do; 0: channels, which have an order only.
        axes: of the parameters that it would change, biases included, by name.
    """

    producer: Layer
    consumer: Layer
    width: int
    groups: int
    axes: Mapping[str, int]


def inner_values(blocks: Blocks, index: int) -> list[Inner]:
    """Return the value heads and the channels of a block whose layers have a form that is known.

    Whether the block computes the same in another basis depends on what else is between the layers.
    """
    values = []
    for known, part in ((_ATTENTIONS, "attention"), (_MLPS, "MLP")):
        try:
            consumer, producers = _find(blocks, index, known, part, part)
            groups, width = 1, 0
            if known is _ATTENTIONS:
                _, groups, width = _attention_of(blocks.model, consumer)
                producers = [x for x in producers if x.name.endswith("v_proj")]
            size = groups * width or consumer.n
            axes = {consumer.parameter: 1}
            for producer in producers:
                rows = [(size, 1)] * (1 + producer.name.endswith("gate_up_proj"))
                axes |= dict.fromkeys(_rows_and_bias(blocks.model, producer, rows), 0)
        except ModelError:
            continue
        if producers and all(producer.input_axis == 1 for producer in producers):
            values.append(Inner(producers[-1], consumer, width, groups, axes))
    return values


def _least(groups: int, each: int) -> str:
    """Describe the smallest share that removes something."""
    parts = max(groups, each)
    if parts == 1:
        return "there is a single head; leave out `heads`"
    shares = (x / 1000 for x in range(1, 1000))
    share = next(x for x in shares if Unstructured(sparsity=x).pruned_in(1, parts))
    return f"`heads` {share:g} takes one"


def _attention_of(model: nn.Module, consumer: Layer) -> tuple[int, int, int]:
    """Return query heads, key–value heads, width of each; ModelError where they do not fit the layer."""
    text = text_config(model)
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    groups = int(getattr(text, "num_key_value_heads", None) or heads)
    width = int(getattr(text, "head_dim", None) or (consumer.n // heads if heads else 0))
    if not heads or heads * width != consumer.n or heads % groups:
        raise ModelError(
            f"layer {consumer.name!r} has {consumer.n} inputs, which are not the {heads} heads of {width} "
            "that the configuration names; leave out `heads`"
        )
    return heads, groups, width


def _find(
    blocks: Blocks,
    index: int,
    known: Mapping[str, Sequence[tuple[str, ...]]],
    part: str,
    option: str,
) -> tuple[Layer, list[Layer]]:
    """Find the layer that consumes the structures of a block, and those that produce them."""
    layers = {layer.name: layer for layer in blocks.layers(index) if layer.expert is None}
    matches = []
    for name, consumer in layers.items():
        last = name.rpartition(".")[2]
        for form in known.get(last, ()):
            names = [f"{consumer.parent}.{producer}" for producer in form]
            if consumer.input_axis == 1 and all(n in layers for n in names):
                matches.append((consumer, [layers[n] for n in names]))
                break
    if len(matches) != 1:
        forms = "; ".join(f"{', '.join(f)} → {c}" for c, fs in known.items() for f in fs)
        raise ModelError(
            f"block {blocks.prefix(index).rstrip('.')!r} has {len(matches) or 'no'} {part}s of a known form "
            f"({forms}); leave out `{option}`"
        )
    return matches[0]


def _rows_and_bias(
    model: nn.Module, producer: Layer, parts: Sequence[tuple[int, int]]
) -> dict[str, Cut]:
    """Return the cuts of a layer that produces structures; none where all of its rows stay."""
    size = sum(length for length, _ in parts)
    if producer.rows != size:
        raise ModelError(
            f"layer {producer.name!r} has {producer.rows} outputs where {size} were expected; it cannot "
            "be cut"
        )
    if not any(width for _, width in parts):
        return {}
    names = [producer.parameter]
    bias = producer.parameter.removesuffix("weight") + "bias"
    if bias in dict(model.named_parameters()):
        names.append(bias)
    return dict.fromkeys(names, Cut(0, parts))


# --- experts and blocks


def experts_left(mixtures: Sequence[Mixture], share: float) -> int:
    """Return how many experts of each mixture stay; ModelError where a model needs more of them."""
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
    """Return the settings of the stored `config` that count experts; all such words if none is stored."""
    text = text_config(model)
    keys = [key for key in _COUNTS if getattr(text, key, None) == mixtures[0].count]
    stored = _stored_settings(config)
    return dict.fromkeys([key for key in keys if key in stored] or keys, left)


def without_experts(
    conversion: Conversion, settings: Mapping[str, int], mixtures: Sequence[Mixture], kept: Kept
) -> Change:
    """Return the change by removed experts.

    Raises:
        ModelError: experts are neither stored as the model's parameters nor one by one.
    """
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
                match = _EXPERT.match(name)
                if match is None or int(match["number"]) >= mixture.count:
                    raise ModelError(
                        f"parameter {parameter!r} is stored in another form than expert by expert; its "
                        "experts cannot be removed"
                    )
                new = numbers.get(int(match["number"]))
                names[name] = None if new is None else f"{match['home']}.{new}.{match['rest']}"
    return Change(settings, names, cuts, kept)


def block_settings(
    blocks: Blocks, config: Mapping[str, Any], removed: Sequence[int]
) -> dict[str, Any]:
    """Return new settings of the stored `config`: the number of blocks, and lists about single blocks."""
    stored, count = _stored_settings(config), len(blocks)
    keys = [key for key in _DEPTHS if stored.get(key) == count]
    settings: dict[str, Any] = {(keys or _DEPTHS)[0]: count - len(removed)}
    text = text_config(blocks.model)
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
    """Return the change by removed blocks: only the decoder's get new names, not those of a vision tower."""
    last, inside = blocks.name.rpartition(".")[2], f"{blocks.name}."
    names = [name for name in blocks.model.state_dict() if name.startswith(inside)]
    decoder = set(conversion.needed(names))
    new = {x: renumbered(x, last, removed) if x in decoder else x for x in conversion.keys}
    return Change(settings, new)


def renumbered(name: str, blocks: str, removed: Sequence[int]) -> str | None:
    """Return the name of a block's tensor once others are removed; None for one that is removed."""
    match = re.search(rf"(?:^|\.){re.escape(blocks)}\.(\d+)\.", name)
    if match is None:
        return name
    index = int(match[1])
    if index in removed:
        return None
    new = index - sum(gone < index for gone in removed)
    return f"{name[: match.start(1)]}{new}{name[match.end(1) :]}"
