"""The configuration of a smaller model: the original's, but for the sizes that follow from what was removed.

Shares no code with what writes models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from maskopt.errors import VerificationError
from maskopt.models.verification.folder import CONFIG, read_object
from maskopt.models.verification.loading import Loading
from maskopt.models.verification.structured_cuts import (
    Heads,
    consumers,
    count_of,
    loses_channels,
    value,
)

#: what configurations call the number of blocks, of experts, of channels
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_WIDTHS = ("ffn_dim", "ffn_hidden_size", "intermediate_size")
#: settings that name blocks by their numbers
_NUMBERED = {
    *("attn_layer_indices", "cross_attention_layers", "full_attn_idxs", "mlp_only_layers"),
    "moe_layers",
}


def check_settings(shrunk: Mapping[str, Any], ours: Loading, theirs: Loading | None) -> None:
    """The configuration says the sizes of the manifest, these are what the removal leaves, and all else is as
    in the original.

    Args:
        theirs: of the original; without it, only the first is looked at.

    Raises:
        VerificationError: not so.
    """
    where, said = ours.weights.folder / CONFIG, shrunk["settings"]
    for key, size in said.items():
        if value(ours, key) != size:
            raise VerificationError(f"{where}: {key} is not the {size} of the manifest")
    if theirs is None:
        return
    before = read_object(theirs.weights.folder / CONFIG)
    nested = before.get("text_config")
    of_text = isinstance(nested, dict) and not any(key in before for key in said)
    (before["text_config"] if of_text else before).update(said)
    if before != read_object(where):
        raise VerificationError(f"{where}: differs from the original in more than the sizes")
    left = _left(shrunk, theirs)
    if odd := set(said) - set(left):
        raise VerificationError(
            f"{where}: {min(odd)} is no size of what was removed, and must be the original's"
        )
    for key, size in left.items():
        if value(ours, key) != size:
            raise VerificationError(
                f"{where}: {key} is not the original's without what was removed, which is {size}"
            )


def _left(shrunk: Mapping[str, Any], theirs: Loading) -> dict[str, Any]:
    """What the removal leaves of the original's sizes."""
    if "blocks" in shrunk:
        return _of_blocks(shrunk, theirs)
    if "experts" in shrunk:
        return _of_experts(shrunk, theirs)
    found: dict[str, Any] = {}
    for consumer, width in consumers(shrunk, theirs).items():
        kept = len(shrunk["kept"][consumer])
        if loses_channels(consumer):
            # where several words stand for it, the first is what the family reads
            found |= dict.fromkeys([k for k in _WIDTHS if value(theirs, k) == width][:1], kept)
        else:
            heads = Heads.of(consumer, width, shrunk, theirs)
            found |= {
                "num_attention_heads": kept * heads.each if heads.whole else kept,
                "head_dim": heads.width,
            }
            if value(theirs, "num_key_value_heads") is not None:
                found["num_key_value_heads"] = kept if heads.whole else heads.groups
    return found


def _of_experts(shrunk: Mapping[str, Any], theirs: Loading) -> dict[str, Any]:
    """Of a stored configuration's words for the number of experts, those that it has."""
    found: dict[str, Any] = {}
    for mixture, kept in shrunk["kept"].items():
        count = count_of(mixture, theirs)
        keys = [k for k in _COUNTS if k in shrunk["settings"] and value(theirs, k) == count]
        found |= dict.fromkeys(keys, len(kept))
    return found


def depth_of(settings: Mapping[str, Any], theirs: Loading) -> tuple[str, int]:
    """What the configuration calls the number of blocks, and how many the original has.

    Raises:
        VerificationError: the manifest says no size of that name, or several.
    """
    keys = [key for key in _DEPTHS if key in settings]
    if len(keys) != 1 or type(value(theirs, keys[0])) is not int:
        raise VerificationError(
            f"{theirs.weights.folder / CONFIG}: the manifest does not say how many blocks are left of it"
        )
    return keys[0], value(theirs, keys[0])


def _of_blocks(shrunk: Mapping[str, Any], theirs: Loading) -> dict[str, Any]:
    """The number of blocks that are left, and of settings with one entry a block, or with blocks by their
    numbers, what those say."""
    removed = shrunk["blocks"]
    depth, count = depth_of(shrunk["settings"], theirs)
    found: dict[str, Any] = {depth: count - len(removed)}
    for key, listed in theirs.settings.to_dict().items():
        if key in _NUMBERED and isinstance(listed, list):
            found[key] = renumbered(listed, removed)
        elif isinstance(listed, list) and len(listed) == count and not key.endswith("token_id"):
            found[key] = [item for index, item in enumerate(listed) if index not in removed]
    return found


def renumbered(numbers: Sequence[int], removed: Sequence[int]) -> list[int]:
    """Blocks by their numbers, which those behind a removed one change; the removed are gone."""
    left = [number for number in numbers if number not in removed]
    return [number - len([gone for gone in removed if gone < number]) for number in left]
