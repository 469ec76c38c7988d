"""Masks on disk, and what they and updated weights make of a checkpoint's tensors.

Masks are packed bits in a safetensors file, one entry per weight tensor of the checkpoint. Bit i of an entry
(least significant first) is element i of the tensor in its stored layout; 1 = kept. The header's metadata
holds, per tensor, its shape, the axis that counts inputs, and a SHA-256 of these and the bits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from maskopt.errors import ModelError
from maskopt.models.checkpoints.checkpoint import (
    SafeFile,
    TensorEntry,
    open_safe,
    safe_header,
    write_file,
)
from maskopt.models.checkpoints.schema import MASK_FORMAT, read_layout

#: whole numbers as wide as an element, by its bytes: zero is zero in all of them
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorMask:
    """The mask of one stored tensor: bool in its shape, True = kept. `input_axis` counts the inputs, the axis
    before or after it the outputs; a leading third axis counts experts."""

    kept: Bool[Tensor, ...]
    input_axis: int

    def rows(self) -> Bool[Tensor, "rows n"]:
        """As rows of inputs."""
        moved = self.kept.movedim(self.input_axis, -1)
        return moved.reshape(-1, moved.shape[-1])


class MaskFile:
    """A checked mask file, read tensor by tensor; ModelError for another file or a damaged header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: SafeFile = open_safe(path)
        self.layout = read_layout(path, self.file.metadata, self.file.entries)
        for name, item in self.layout.items():
            entry = self.file.entries[name]
            if entry.dtype != "U8":
                raise ModelError(f"{path}: the header of mask {name[:200]!r} is damaged")
            if entry.shape != ((math.prod(item["shape"]) + 7) // 8,):
                raise ModelError(f"{path}: mask {name[:200]!r} has the wrong number of bits")

    @property
    def names(self) -> list[str]:
        return list(self.layout)

    def __contains__(self, name: object) -> bool:
        return name in self.layout

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.layout[name]["shape"])

    def packed(self, name: str) -> np.ndarray:
        """The stored bits of one tensor's mask, their digest checked."""
        item = self.layout[name]
        packed = self.file.read(name).numpy()
        if item["sha256"] != _digest(name, item["shape"], item["input_axis"], packed):
            raise ModelError(
                f"{self.path}: mask {name!r} does not match its digest: it was changed"
            )
        return packed

    def read(self, name: str) -> TensorMask:
        """The mask of one tensor, its digest checked."""
        item = self.layout[name]
        bits = unpack(self.packed(name), 0, math.prod(item["shape"]))
        return TensorMask(bits.view(item["shape"]), item["input_axis"])


class MaskFiles:
    """Several mask files read as one."""

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        self._files = {name: file for file in map(MaskFile, paths) for name in file.names}

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def packed(self, name: str) -> np.ndarray:
        return self._files[name].packed(name)


def unpack(packed: np.ndarray, start: int, count: int) -> Bool[Tensor, " count"]:
    """Elements start … start + count of a packed mask; `start` is a multiple of 8."""
    part = packed[start // 8 : (start + count + 7) // 8]
    return torch.from_numpy(np.unpackbits(part, count=count, bitorder="little").view(bool))


def write_masks(path: Path, masks: Mapping[str, TensorMask]) -> str:
    """Write a mask file; it appears whole or not at all. Its SHA-256."""
    packed = {
        name: np.packbits(mask.kept.contiguous().view(-1).cpu().numpy(), bitorder="little")
        for name, mask in masks.items()
    }
    layout = {
        name: {
            "shape": list(mask.kept.shape),
            "input_axis": mask.input_axis,
            "sha256": _digest(name, list(mask.kept.shape), mask.input_axis, packed[name]),
        }
        for name, mask in masks.items()
    }
    return _write(path, layout, packed.values())


def join_masks(path: Path, parts: Iterable[Path]) -> str:
    """One mask file out of several, tensor by tensor, without holding them in memory; its SHA-256."""
    files = [MaskFile(part) for part in parts]
    layout: dict[str, dict[str, Any]] = {}
    for part in files:
        if both := set(layout) & set(part.layout):
            raise ModelError(f"{part.path}: mask {min(both)!r} is in another part as well")
        layout.update(part.layout)
    bits = (part.file.read(name).numpy() for part in files for name in part.names)
    return _write(path, layout, bits)


def _write(path: Path, layout: Mapping[str, Any], bits: Iterable[np.ndarray]) -> str:
    shapes = {name: ("U8", ((math.prod(item["shape"]) + 7) // 8,)) for name, item in layout.items()}
    about = {"format": MASK_FORMAT, "tensors": json.dumps(layout, separators=(",", ":"))}
    return write_file(path, chain([safe_header(shapes, about)], bits))


def _digest(name: str, shape: list[int], input_axis: int, packed: np.ndarray) -> str:
    head = json.dumps([MASK_FORMAT, name, shape, input_axis]).encode()
    return hashlib.sha256(head + b"\n" + packed.tobytes()).hexdigest()


@dataclass(frozen=True)
class Edits:
    """Masks, and by tensor the file with its updated weights as stored; NaN: an unchanged weight."""

    masks: MaskFile | MaskFiles = field(default_factory=MaskFiles)
    values: Mapping[str, SafeFile] = field(default_factory=dict)

    @classmethod
    def of(cls, masks: MaskFile | MaskFiles, values: Iterable[Path]) -> Edits:
        """Raises ModelError for a file of new weights that is none."""
        files = [open_safe(path) for path in values]
        return cls(masks, {name: file for file in files for name in file.entries})

    def __contains__(self, name: object) -> bool:
        return name in self.masks

    def apply(self, name: str, tensor: Tensor) -> None:
        """To a tensor of the checkpoint, in its stored layout; in place."""
        new = self.values[name].read(name).view(-1) if name in self.values else None
        kept = unpack(self.masks.packed(name), 0, tensor.numel()) if name in self.masks else None
        _edit(tensor.view(-1), new, kept)

    def chunks(self, entry: TensorEntry, source: SafeFile, step: int) -> Iterator[np.ndarray]:
        """The new bytes of a tensor of `source`, `step` at a time."""
        packed = self.masks.packed(entry.name) if entry.name in self.masks else None
        there = self.values.get(entry.name)
        new = None if there is None else there.chunks(there.entries[entry.name], step)
        dtype, position = entry.torch_dtype, 0
        for chunk in source.chunks(entry, step):
            elements = torch.from_numpy(chunk).view(dtype)
            values = None if new is None else torch.from_numpy(next(new)).view(dtype)
            kept = None if packed is None else unpack(packed, position, len(elements))
            _edit(elements, values, kept)
            position += len(elements)
            yield chunk


def _edit(elements: Tensor, new: Tensor | None, kept: Tensor | None) -> None:
    """Update elements [count] in place where `new` is a number, and set pruned ones to zero."""
    words = elements.view(WORDS[elements.dtype.itemsize])  # not all dtypes can be filled
    if new is not None:
        words.copy_(torch.where(new.float().isnan(), words, new.view(words.dtype)))
    if kept is not None:
        words.masked_fill_(kept.logical_not_(), 0)
