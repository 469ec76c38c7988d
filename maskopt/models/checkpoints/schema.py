"""The shape of JSON records that a stranger may have written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

#: entries of config.json that count blocks or experts; so many are built in seconds
_COUNTS = re.compile(r"(.*_)?(n|num)_(.*_)?(layers?|blocks|experts)|(en|de)coder_layers|depth")
_FEW = 1024
MANIFEST_FORMAT = "maskopt-manifest-1"
#: of a manifest: weights are pruned; or channels and heads, experts, or blocks are removed
PRUNE, STRUCTURES, EXPERTS, BLOCKS = KINDS = ("prune", "structures", "experts", "blocks")
_KEYS = {
    *("format", "kind", "fingerprint", "sparsity", "layers", "trained", "distillation"),
    *("bad_samples", "files", "seconds", "memory", "sha256"),
}


def has_keys_of_its_kind(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest has all keys of its kind, and no others."""
    return manifest.keys() == _KEYS | ({"shrunk"} if manifest["kind"] != PRUNE else set())


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def is_size(value: Any) -> bool:
    return is_count(value) and value > 0


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_amount(value: Any) -> bool:
    return is_number(value) and value >= 0


def fits(value: Any, shape: Any) -> bool:
    """Whether a JSON value has a shape.

    Args:
        shape: a type, a predicate, a constant, a tuple of alternatives, a list with the shape of every
            element, or an object by keys: `key?` may be missing, `...` stands for all other keys.
    """
    if isinstance(shape, type):
        return type(value) is shape
    if callable(shape):
        return bool(shape(value))
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    if not isinstance(shape, dict):
        return type(value) is type(shape) and bool(value == shape)
    if not isinstance(value, dict):
        return False
    named = {key.removesuffix("?"): key for key in shape if key is not ...}
    return all(key in value for key in shape if key in named) and all(
        fits(item, shape[named[key]] if key in named else shape[...])
        for key, item in value.items()
        if key in named or ... in shape
    )


def plain_name(name: Any) -> bool:
    """Is it a file name without a path, which cannot lead out of a folder?"""
    return (
        isinstance(name, str)
        and 0 < len(name) < 256
        and name not in (".", "..")
        and not set(name) & set('/\\:\0*?"<>|')
        and name.isprintable()
    )


def pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of all objects inside a JSON value."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            value = list(value.values())
        waiting += value if isinstance(value, list) else []


def far_more_than_stored(config: Any, shapes: Mapping[str, Sequence[int]]) -> str:
    """A setting that counts far more blocks or experts than are stored, which take hours to build."""
    blocks, experts, each = set(), set(), 0
    for name, shape in shapes.items():
        numbers = [part for part in name.split(".") if part.isdecimal()]
        blocks.update(numbers[:1])
        experts.update(numbers[1:])
        if len(shape) == 3 and min(shape):
            each = max(each, shape[0])
    for key, value in pairs(config):
        if type(value) is not int or not _COUNTS.fullmatch(key):
            continue
        of_experts = "expert" in key
        stored = max(len(experts), each) if of_experts else len(blocks)
        if value > max(2 * stored, _FEW):
            what = "experts" if of_experts else "blocks"
            return (
                f"`{key}` is {value}, and the stored tensors have {stored} {what}; correct `{key}`"
            )
    return ""
