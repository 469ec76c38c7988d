"""The shape of a manifest: its keys, and kinds of values; and the counts in a configuration. Whether they are
true is another matter.

Shares no code with what writes manifests.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

FORMAT = "maskopt-manifest-1"
#: entries of a configuration that count blocks or experts
COUNTS = re.compile(r"(.*_)?(n|num)_(.*_)?(layers?|blocks|experts)|(en|de)coder_layers|depth")
#: so many blocks or experts are built in seconds
FEW = 1024
STATUSES = ("optimal", "swap-optimal", "feasible")

Check = Callable[[Any], bool]


def no_number(constant: str) -> float:
    """For `json.loads`: NaN and infinities are no numbers."""
    raise ValueError(constant)


def pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of all objects inside a JSON value."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def too_many(config: Any, tensors: Callable[[], Iterable[tuple[str, list[int]]]]) -> str | None:
    """The entry of a configuration that counts far more blocks or experts than the tensors (name, shape)
    have, in words. Such a model takes hours to build, even without its weights."""
    for key, value in pairs(config):
        if type(value) is not int or value <= FEW or not COUNTS.fullmatch(key):
            continue
        names: set[str] = set()
        stored, part = 0, slice(1, None) if "expert" in key else slice(1)
        for name, shape in tensors():
            names.update([piece for piece in name.split(".") if piece.isdecimal()][part])
            if part.start and len(shape) == 3 and min(shape):
                stored = max(stored, shape[0])
        stored = max(stored, len(names))
        if value > 2 * stored:  # some families count a block twice
            what = "experts" if part.start else "blocks"
            return f"`{key}` is {value}, and the stored tensors have {stored} {what}"
    return None


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _size(value: Any) -> bool:
    return _count(value) and value > 0


def _amount(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _pattern(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    keep = value.get("keep")
    if value.get("kind") == "nm" and set(value) == {"kind", "keep", "of"}:
        return _count(keep) and _size(value["of"]) and keep <= value["of"] < 2**31
    of_rows = {"per", "max_deviation"}
    if value.get("kind") != "unstructured" or set(value) - of_rows != {"kind", "sparsity", "keep"}:
        return False
    if "per" in value and value["per"] != "layer":
        return False
    if "max_deviation" in value and not ("per" in value and _deviation(value["max_deviation"])):
        return False
    sparsity = value["sparsity"]
    return _count(keep) if sparsity is None else keep is None and _amount(sparsity) and sparsity < 1


def _deviation(value: Any) -> bool:
    return _share(value) and value < 1


def _share(value: Any) -> bool:
    return _amount(value) and value <= 1


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _each(shape: Any) -> Check:
    """Every value of an object, or every element of a list."""

    def check(value: Any) -> bool:
        inner = value.values() if isinstance(value, dict) else value
        return all(_fits(item, shape) for item in inner)

    return check


def _kind(kind: type, shape: Any) -> Check:
    each = _each(shape)
    return lambda value: isinstance(value, kind) and each(value)


class _Optional(NamedTuple):
    """Of a key that folders of earlier versions do not have."""

    check: Check


def _fits(value: Any, shape: Any) -> bool:
    """Has an object the keys of the shape, with such values? Others may be there, too."""
    if callable(shape):
        return bool(shape(value))
    return isinstance(value, dict) and all(_has(value, key, inner) for key, inner in shape.items())


def _has(value: dict[str, Any], key: str, inner: Any) -> bool:
    if isinstance(inner, _Optional):
        return key not in value or inner.check(value[key])
    return key in value and _fits(value[key], inner)


def _statuses(value: Any) -> bool:
    return (
        isinstance(value, dict) and set(value) <= set(STATUSES) and all(map(_size, value.values()))
    )


_LAYER = {
    "name": _text, "rows": _size, "n": _size, "pattern": _text, "pruned": _count,
    "error_start": _maybe(_amount), "error": _amount, "lower_bound": _amount,
    "statuses": _statuses, "tokens": _count, "fallback": lambda v: type(v) is bool,
    "seconds": _amount, "sparsity": _amount, "block": _count, "kind": _text, "energy": _amount,
    "error_held": _maybe(_amount), "energy_held": _maybe(_amount), "gram_shrinkage": _amount,
    "error_kept": _maybe(_amount), "objective": lambda v: v in ("kept", "refitted", "updated"),
    "damping": _maybe(_amount), "error_uniform": _maybe(_amount),
    "swaps": _Optional(_maybe(_count)), "scans": _Optional(_maybe(_count)),
    "improvement_quantiles": _Optional(_maybe(lambda v: _kind(list, _number)(v) and len(v) == 5)),
}  # fmt: skip
_PART = {
    "block": _count, "part": _text, "fitted_before": _number, "fitted_after": _number,
    "held_before": _number, "held_after": _number, "epoch": _count,
    "diverged": lambda v: type(v) is bool, "seconds": _amount,
}  # fmt: skip
_OPTIONS = {
    "sparsity": _pattern, "include": _texts, "exclude": _texts, "min_tokens": _size,
}  # fmt: skip
_SHAPE = {
    "format": lambda v: v == FORMAT,
    "fingerprint": lambda v: (
        _fits(v, {"options": _OPTIONS})
        and _kind(dict, _count)(v["options"].get("counts", {}))
        and _maybe(_share)(v["options"].get("max_deviation"))
        and _share(v["options"].get("damping_exponent", 0.0))
        and _text(v.get("model", ""))
        and _text(v.get("dtype", ""))
        and isinstance(v["options"].get("training", {}), dict)
    ),
    "sparsity": _amount,
    "layers": _kind(list, _LAYER),
    "parts": _kind(list, _PART),
    "bad_samples": _kind(list, {"sample": _count, "layer": _text}),
    "fallbacks": _texts,
    "tensors": _kind(dict, {"input_axis": _count, "pattern": _pattern}),
    "files": _kind(dict, _text),
    "seconds": _amount,
    "memory": _Optional(_kind(dict, _maybe(_count))),
}  # fmt: skip


def has_shape(manifest: Any) -> bool:
    """Whether a manifest has all keys, with values of the right kinds."""
    return _fits(manifest, _SHAPE)
