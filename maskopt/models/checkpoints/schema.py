"""The shape of JSON records that a stranger may have written."""

from __future__ import annotations

import math
from typing import Any


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
