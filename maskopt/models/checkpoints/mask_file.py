"""Masks on disk: packed bits in a safetensors file, one entry per weight tensor of the checkpoint.

Bit i of an entry (least significant first) is element i of the tensor in its stored layout; 1 = kept.
The header's metadata holds, per tensor, its shape, the axis that counts inputs, and a SHA-256 of all of
that and the bits, so a flipped bit is noticed on reading.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from maskopt.core.files import atomic_write
from maskopt.errors import ModelError
from maskopt.models.checkpoints.safefile import CHUNK, SafeFile, open_safe, write_safe

FORMAT = "maskopt-masks-1"


@dataclass(frozen=True)
class TensorMask:
    """The mask of one stored tensor. `kept` is bool in the tensor's shape; `input_axis` counts the
    inputs, the axis before or after it the outputs; a leading third axis counts experts."""

    kept: Bool[Tensor, ...]
    input_axis: int

    def rows(self) -> Bool[Tensor, "rows n"]:
        """As rows of inputs."""
        moved = self.kept.movedim(self.input_axis, -1)
        return moved.reshape(-1, moved.shape[-1])


class MaskFile:
    """A checked mask file, read tensor by tensor.

    Raises:
        ModelError: not a mask file, or its header contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: SafeFile = open_safe(path)
        if self.file.metadata.get("format") != FORMAT:
            raise ModelError(f"{path}: not a mask file of format {FORMAT}")
        try:
            layout = json.loads(self.file.metadata["tensors"])
        except (KeyError, ValueError, RecursionError):
            raise ModelError(f"{path}: the header of the masks is damaged") from None
        if not isinstance(layout, dict) or set(layout) != set(self.file.entries):
            raise ModelError(f"{path}: the header names other tensors than the file holds")
        self.layout: dict[str, dict[str, Any]] = layout
        for name, item in layout.items():
            entry = self.file.entries[name]
            if not _sound(item) or entry.dtype != "U8":
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
        """The bits of one tensor's mask as they are stored, their digest checked."""
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

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files = {name: file for file in map(MaskFile, paths) for name in file.names}

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def packed(self, name: str) -> np.ndarray:
        return self._files[name].packed(name)


def unpack(packed: np.ndarray, start: int, count: int) -> Bool[Tensor, " count"]:
    """Elements start … start + count of a packed mask; `start` is a multiple of 8."""
    part = packed[start // 8 : (start + count + 7) // 8]
    return torch.from_numpy(np.unpackbits(part, count=count, bitorder="little").view(bool))


def write_masks(path: Path, masks: Mapping[str, TensorMask]) -> None:
    """Write a mask file; it appears whole or not at all."""
    packed = {name: _pack(mask.kept) for name, mask in masks.items()}
    layout = {
        name: {
            "shape": list(mask.kept.shape),
            "input_axis": mask.input_axis,
            "sha256": _digest(name, list(mask.kept.shape), mask.input_axis, packed[name]),
        }
        for name, mask in masks.items()
    }
    with atomic_write(path) as file:
        write_safe(file, {n: ("U8", b.shape) for n, b in packed.items()}, _metadata(layout))
        for bits in packed.values():
            file.write(bits.tobytes())


def join_masks(path: Path, parts: Iterable[Path]) -> None:
    """One mask file out of several, tensor by tensor, without holding them in memory."""
    files = [MaskFile(part) for part in parts]
    layout: dict[str, dict[str, Any]] = {}
    for part in files:
        if both := set(layout) & set(part.layout):
            raise ModelError(f"{part.path}: mask {min(both)!r} is in another part as well")
        layout.update(part.layout)
    tensors = {name: ("U8", part.file.entries[name].shape) for part in files for name in part.names}
    with atomic_write(path) as file:
        write_safe(file, tensors, _metadata(layout))
        for part in files:
            for name in part.names:
                for chunk in part.file.chunks(part.file.entries[name], CHUNK):
                    file.write(chunk.data)


def _metadata(layout: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {"format": FORMAT, "tensors": json.dumps(layout, separators=(",", ":"))}


def _pack(kept: Tensor) -> np.ndarray:
    return np.packbits(kept.contiguous().view(-1).cpu().numpy(), bitorder="little")


def _digest(name: str, shape: list[int], input_axis: int, packed: np.ndarray) -> str:
    head = json.dumps([FORMAT, name, shape, input_axis]).encode()
    return hashlib.sha256(head + b"\n" + packed.tobytes()).hexdigest()


def _sound(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and set(item) == {"shape", "input_axis", "sha256"}
        and isinstance(item["shape"], list)
        and len(item["shape"]) in (2, 3)
        and all(type(s) is int and 0 < s < 2**40 for s in item["shape"])
        and type(item["input_axis"]) is int
        and len(item["shape"]) - 2 <= item["input_axis"] < len(item["shape"])
        and isinstance(item["sha256"], str)
    )
