"""Some rows, and joined rows, of what holds one value a row: tensors, sequences, dataclasses of these."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


def take_rows(value: Value, rows: Tensor | Sequence[int]) -> Value:
    """Some rows by their indices, in their order; None, words and numbers hold for all rows and stay."""
    index = torch.as_tensor(rows, dtype=torch.int64)
    taken: Any = value
    if found := _fields_of(value):
        taken = _replaced(value, {name: take_rows(x, index) for name, x in found.items()})
    elif isinstance(value, Tensor):
        taken = value[index.to(value.device)]
    elif isinstance(value, tuple | list) and value:
        taken = type(value)(value[row] for row in index.tolist())
    return taken


def join_rows(parts: Sequence[Value]) -> Value:
    """The rows of several parts in order. Of tensors of different widths the last column is repeated."""
    every: Sequence[Any] = parts
    first = every[0]
    joined: Any = first
    if found := _fields_of(first):
        joined = _replaced(first, {n: join_rows([getattr(p, n) for p in every]) for n in found})
    elif isinstance(first, Tensor):
        joined = torch.cat(_of_one_width(every))
    elif isinstance(first, tuple | list):
        joined = type(first)(itertools.chain(*every))
    return joined


def _fields_of(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)} if is_dataclass(value) else {}


def _replaced(value: Any, changes: dict[str, Any]) -> Any:
    return replace(value, **changes)


def _of_one_width(parts: Sequence[Tensor]) -> list[Tensor]:
    widths = [part.shape[1] if part.ndim > 1 else 0 for part in parts]
    if len(set(widths)) == 1:
        return list(parts)
    return [torch.cat([x, x[:, -1:].expand(-1, max(widths) - x.shape[1])], 1) for x in parts]
