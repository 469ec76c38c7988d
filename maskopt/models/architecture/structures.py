"""What can be cut out of a decoder block whole: channels of its MLP, attention heads.

The columns of `down_proj` are channels, blocks of columns of `o_proj` heads. What produces them goes along:
rows of `gate_proj` and `up_proj`, of `q_proj`, and of `k_proj` and `v_proj` where whole key–value groups go.
The names are those of transformers. Whether a configuration can describe the new sizes is tested on the model
that it then describes (`maskopt.models.structured.change`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from maskopt.core.pattern import NM, Pattern, Unstructured
from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Blocks, Layer

CHANNELS, HEADS = "channels", "heads"
#: what modules are called that route
ROUTERS = ("gate", "router")
#: what configurations call the number of blocks, of experts, and the channels of an MLP
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
WIDTHS = ("ffn_dim", "ffn_hidden_size", "intermediate_size")
#: settings that list indices of blocks; other lists have an entry a block
BLOCK_INDICES = (
    *("attn_layer_indices", "cross_attention_layers", "full_attn_idxs", "mlp_only_layers"),
    "moe_layers",
)
#: what consumes channels → what produces them, in one of these forms; fused: one after the other
_MLPS: Mapping[str, Sequence[tuple[str, ...]]] = {
    "down_proj": (("gate_proj", "up_proj"), ("gate_up_proj",), ("up_proj",)),
    "fc2": (("fc1",),),
    "dense_4h_to_h": (("dense_h_to_4h",),),
}
_FUSED_MLP = "gate_up_proj"
_ATTENTIONS: Mapping[str, Sequence[tuple[str, ...]]] = {
    "o_proj": (("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
    "out_proj": (("q_proj", "k_proj", "v_proj"),),
    "dense": (("q_proj", "k_proj", "v_proj"),),
}
_FUSED_ATTENTION = "qkv_proj"
#: of an index that belongs to no structure
NONE = -1


@dataclass(frozen=True)
class Cut:
    """How a parameter is cut along an axis: `parts` are (length, width) in order along it, structures 0, 1, …
    of `width` indices each; width 0: stays."""

    axis: int
    parts: Sequence[tuple[int, int]]

    @property
    def size(self) -> int:
        return sum(length for length, _ in self.parts)

    @property
    def structure(self) -> Int[Tensor, " size"]:
        """Of every index, NONE where it stays."""
        found = [
            torch.arange(length) // width if width else torch.full((length,), NONE)
            for length, width in self.parts
        ]
        return torch.cat(found)

    def inside(self, kept: Bool[Tensor, " structures"]) -> Int[Tensor, " left"]:
        """The indices that stay."""
        structure = self.structure
        stays = structure == NONE
        stays[~stays] = kept[structure[~stays]]
        return stays.nonzero()[:, 0]


@dataclass(frozen=True)
class Structures:
    """The channels or the heads of one block.

    Attributes:
        unit: what one is called in messages.
        consumer: the layer whose inputs they are.
        pattern: which of them may stay.
        cuts: by the parameter's name in the model.
    """

    kind: str
    unit: str
    consumer: Layer
    count: int
    pattern: Pattern
    cuts: Mapping[str, Cut]

    @property
    def groups(self) -> Int[Tensor, " n"]:
        """The structure of every input of the consumer."""
        return self.cuts[self.consumer.parameter].structure

    @property
    def kept(self) -> int:
        """How many stay."""
        return self.count - self.pattern.pruned_in(1, self.count)


def channels_of(blocks: Blocks, index: int, share: float, round_to: int) -> Structures:
    """The channels of a block's MLP; `share` goes, and a multiple of `round_to` stays."""
    consumer, producers = _find(blocks, index, _MLPS, "MLP", CHANNELS)
    n = consumer.n
    kept = -(-(n - Unstructured(sparsity=share).pruned_in(1, n)) // round_to) * round_to
    if kept >= n:
        raise ModelError(
            f"layer {consumer.name!r}: a share of {share:g} of its {n} channels, what stays being a multiple "
            f"of {round_to}, is none; take a larger `channels` or a smaller `round_to`"
        )
    cuts = {consumer.parameter: Cut(1, [(n, 1)])}
    for producer in producers:
        halves = 2 if producer.name.endswith(_FUSED_MLP) else 1
        cuts |= _rows_and_bias(blocks.model, producer, [(n, 1)] * halves)
    return Structures(CHANNELS, "channel", consumer, n, Unstructured(keep=kept), cuts)


def heads_of(blocks: Blocks, index: int, share: float) -> Structures:
    """The heads of a block: whole key–value groups if the share takes one, else heads of every group."""
    consumer, producers = _find(blocks, index, _ATTENTIONS, "attention", HEADS)
    heads, groups, width = attention_of(blocks.model, consumer)
    each = heads // groups
    gone = Unstructured(sparsity=share).pruned_in(1, groups)
    unit, size, count = "key–value group", each * width, groups
    pattern: Pattern = Unstructured(keep=groups - gone)
    if not gone:
        gone = Unstructured(sparsity=share).pruned_in(1, each)
        unit, size, count = "head", width, heads
        if not gone:
            raise ModelError(
                f"layer {consumer.name!r}: a share of {share:g} of {groups} key–value groups with "
                f"{each} heads each is none; {_least(groups, each)}"
            )
        pattern = NM(keep=each - gone, of=each)
    query = (consumer.n, size)
    key = (groups * width, width if unit != "head" else 0)
    cuts = {consumer.parameter: Cut(1, [query])}
    for producer in producers:
        last = producer.name.rpartition(".")[2]
        rows = {"q_proj": [query], _FUSED_ATTENTION: [query, key, key]}.get(last, [key])
        cuts |= _rows_and_bias(blocks.model, producer, rows)
    return Structures(HEADS, unit, consumer, count, pattern, cuts)


def _least(groups: int, each: int) -> str:
    """The smallest share that takes something."""
    parts = max(groups, each)
    if parts == 1:
        return "there is a single head; leave out `heads`"
    shares = (x / 1000 for x in range(1, 1000))
    share = next(x for x in shares if Unstructured(sparsity=x).pruned_in(1, parts))
    return f"`heads` {share:g} takes one"


def attention_of(model: nn.Module, consumer: Layer) -> tuple[int, int, int]:
    """Query heads, key–value heads, width of each; ModelError where they do not fit the layer."""
    text: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
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
    what: str,
    option: str,
) -> tuple[Layer, list[Layer]]:
    """The layer that consumes the structures of a block, and those that produce them."""
    layers = {layer.name: layer for layer in blocks.layers(index) if layer.expert is None}
    found = []
    for name, consumer in layers.items():
        last = name.rpartition(".")[2]
        for form in known.get(last, ()):
            names = [f"{consumer.parent}.{part}" for part in form]
            if consumer.input_axis == 1 and all(n in layers for n in names):
                found.append((consumer, [layers[n] for n in names]))
                break
    if len(found) != 1:
        forms = "; ".join(f"{', '.join(f)} → {c}" for c, fs in known.items() for f in fs)
        raise ModelError(
            f"block {blocks.prefix(index).rstrip('.')!r} has {len(found) or 'no'} {what}s of a form that is "
            f"known ({forms}); leave out `{option}`"
        )
    return found[0]


def _rows_and_bias(
    model: nn.Module, producer: Layer, parts: Sequence[tuple[int, int]]
) -> dict[str, Cut]:
    """The cuts of what produces structures; none where all of its rows stay."""
    cut = Cut(0, parts)
    if producer.rows != cut.size:
        raise ModelError(
            f"layer {producer.name!r} has {producer.rows} outputs where {cut.size} were expected; it cannot "
            "be cut"
        )
    if not any(width for _, width in parts):
        return {}
    bias = producer.parameter.removesuffix("weight") + "bias"
    there = [producer.parameter, *([bias] if bias in dict(model.named_parameters()) else [])]
    return dict.fromkeys(there, cut)
