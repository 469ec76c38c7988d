"""Files of a result: masks, shards with masks and updated weights, and copied files.

A check finds out whether the checkpoint changes during a run.

Masks are packed bits in a safetensors file, one entry per weight tensor of the checkpoint. Bit i of an entry
(least significant first) is element i of the tensor in its stored layout; 1 = kept. The header's metadata
holds, per tensor, its shape, the axis that counts inputs, and a SHA-256 of these and the bits. Of shards in
which nothing is renamed or cut, headers, dtypes and layout are the original's, and so is every weight that is
neither pruned nor updated.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from maskopt.core.files import atomic_write, bytes_of
from maskopt.errors import ModelError
from maskopt.models.checkpoints.bases import Bases, Basis
from maskopt.models.checkpoints.checkpoint import (
    CHUNK,
    Checkpoint,
    SafeFile,
    TensorEntry,
    open_safe,
    safe_bytes,
    safe_header,
    write_file,
    write_tensors,
)
from maskopt.models.checkpoints.schema import (
    BASES_FORMAT,
    COPIED,
    INDEX,
    LEGAL_NAMES,
    LEGAL_SUFFIXES,
    MASK_FORMAT,
    NOT_COPIED,
    SINGLE,
    WRITTEN,
    check_link,
    file_digest,
    is_copied,
    open_file,
    plain_name,
    read_json,
    read_layout,
)

#: whole numbers as wide as an element, by its bytes: zero is zero in all of them
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: where tokenizers keep further chat templates; results are folders without folders
_TEMPLATES = "additional_chat_templates"

_log = logging.getLogger("maskopt.models")


@dataclass(frozen=True)
class TensorMask:
    """Mask of one stored tensor: bool in its shape, True = kept.

    `input_axis` counts the inputs, the axis before or after it the outputs; a leading third axis counts
    experts.
    """

    kept: Bool[Tensor, ...]
    input_axis: int

    def rows(self) -> Bool[Tensor, "rows n"]:
        """Return the mask as rows of inputs."""
        moved = self.kept.movedim(self.input_axis, -1)
        return moved.reshape(-1, moved.shape[-1])


class MaskFile:
    """Checked mask file, read tensor by tensor; ModelError for another file or a damaged header."""

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

    @property
    def bases(self) -> str | None:
        """Digest of the bases in which the model was pruned; None: it was pruned as it is stored."""
        return self.file.metadata.get("bases")

    def __contains__(self, name: object) -> bool:
        return name in self.layout

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.layout[name]["shape"])

    def packed(self, name: str) -> np.ndarray:
        """Return the stored bits of one tensor's mask; ModelError where their digest is another one."""
        item = self.layout[name]
        packed = self.file.read(name).numpy()
        if item["sha256"] != _digest(name, item["shape"], item["input_axis"], packed):
            raise ModelError(
                f"{self.path}: mask {name!r} does not match its digest: it was changed"
            )
        return packed

    def read(self, name: str) -> TensorMask:
        """Return the mask of one tensor; ModelError where its digest is another one."""
        item = self.layout[name]
        bits = unpack(self.packed(name), 0, math.prod(item["shape"]))
        return TensorMask(bits.view(item["shape"]), item["input_axis"])


def unpack(packed: np.ndarray, start: int, count: int) -> Bool[Tensor, " count"]:
    """Return elements start … start + count of a packed mask; `start` is a multiple of 8."""
    part = packed[start // 8 : (start + count + 7) // 8]
    return torch.from_numpy(np.unpackbits(part, count=count, bitorder="little").view(bool))


def write_masks(path: Path, masks: Mapping[str, TensorMask]) -> str:
    """Write a mask file, which appears whole or not at all; return its SHA-256."""
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


def join_masks(path: Path, parts: Iterable[Path], bases: str | None = None) -> str:
    """Join mask files tensor by tensor, without holding them in memory; return the SHA-256 of the whole.

    Args:
        bases: digest of those in which the model was pruned.
    """
    files = [MaskFile(part) for part in parts]
    layout: dict[str, dict[str, Any]] = {}
    for part in files:
        if both := set(layout) & set(part.layout):
            raise ModelError(f"{part.path}: mask {min(both)!r} is in another part as well")
        layout.update(part.layout)
    bits = (part.file.read(name).numpy() for part in files for name in part.names)
    return _write(path, layout, bits, {} if bases is None else {"bases": bases})


def _write(
    path: Path,
    layout: Mapping[str, Any],
    bits: Iterable[np.ndarray],
    more: Mapping[str, str] | None = None,
) -> str:
    shapes = {name: ("U8", ((math.prod(item["shape"]) + 7) // 8,)) for name, item in layout.items()}
    about = {"format": MASK_FORMAT, "tensors": json.dumps(layout, separators=(",", ":"))}
    about |= more or {}
    return write_file(path, chain([safe_header(shapes, about)], bits))


def _digest(name: str, shape: list[int], input_axis: int, packed: np.ndarray) -> str:
    head = json.dumps([MASK_FORMAT, name, shape, input_axis]).encode()
    return hashlib.sha256(head + b"\n" + packed.tobytes()).hexdigest()


@dataclass(frozen=True)
class Edits:
    """Files with the mask and the updated weights of each tensor; there NaN is an unchanged weight."""

    masks: Mapping[str, MaskFile] = field(default_factory=dict)
    values: Mapping[str, SafeFile] = field(default_factory=dict)

    @classmethod
    def of(cls, masks: Iterable[Path], values: Iterable[Path] = ()) -> Edits:
        """Open the files; ModelError for one of another form."""
        kept = {name: file for file in map(MaskFile, masks) for name in file.names}
        return cls(kept, {name: file for file in map(open_safe, values) for name in file.entries})

    def apply(self, name: str, tensor: Tensor) -> None:
        """Change a tensor of the checkpoint, in its stored layout, in place, a part at a time."""
        words = tensor.view(-1).view(WORDS[tensor.dtype.itemsize])  # not all dtypes can be filled
        new = self.values[name].read(name).view(-1) if name in self.values else None
        packed = self.masks[name].packed(name) if name in self.masks else None
        for start in range(0, len(words), CHUNK):
            part = words[start : start + CHUNK]
            if new is not None:
                values = new[start : start + CHUNK]
                part.copy_(torch.where(values.float().isnan(), part, values.view(part.dtype)))
            if packed is not None:
                part.masked_fill_(~unpack(packed, start, len(part)), 0)


# --- bases, in a file of the form of safetensors: changes by name; the metadata says what they change


def bases_file(bases: Bases) -> bytes:
    """Return the content of the file, which is the same for the same bases."""
    changes = {bases[name].of: bases[name].change for name in sorted(bases)}
    tensors = {x: {"of": bases[x].of, "axis": bases[x].axis} for x in sorted(bases)}
    about = {"format": BASES_FORMAT, "tensors": json.dumps(tensors)}
    return b"".join(map(bytes, safe_bytes(changes, about)))


def bases_digest(bases: Bases) -> str:
    return hashlib.sha256(bases_file(bases)).hexdigest()


def read_bases(path: Path) -> Bases:
    """Read the bases in a file; ModelError where it holds none."""
    file = open_safe(path)
    try:
        if file.metadata["format"] == BASES_FORMAT:
            changes = {name: file.read(name) for name in file.entries}
            tensors = json.loads(file.metadata["tensors"])
            return {name: Basis(change=changes[x["of"]], **x) for name, x in tensors.items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        pass
    raise ModelError(f"{path}: is no file of bases; start over with `overwrite`")


# --- windows that the dense model wrote, by their use


def write_windows_file(path: Path, windows: Mapping[str, Tensor]) -> str:
    """Write the token ids of windows; return the SHA-256 of the file."""
    return write_tensors(path, {use: x.int() for use, x in windows.items()}, {"format": WRITTEN})


def read_windows(folder: Path, use: str) -> Tensor | None:
    """Return the windows of a use that lie in a folder, None where there are none."""
    path = folder / WRITTEN
    if not path.is_file():
        return None
    file = open_safe(path)
    return file.read(use) if use in file.entries else None


# --- shards and copies


def check_masks(checkpoint: Checkpoint, masks: MaskFile) -> None:
    """Raise ModelError where the masks do not belong to the checkpoint."""
    for name in masks.names:
        if name not in checkpoint.where:
            raise ModelError(f"{masks.path}: mask {name!r} has no tensor in {checkpoint.folder}")
        shape = checkpoint.entry(name).shape
        if shape != masks.shape(name):
            raise ModelError(
                f"{masks.path}: mask {name!r} is {list(masks.shape(name))}, "
                f"the tensor in {checkpoint.folder} {list(shape)}"
            )


def write_shard(
    checkpoint: Checkpoint,
    shard: str,
    target: Path,
    edits: Edits,
    *,
    names: Mapping[str, str | None] | None = None,
    left: Mapping[str, Mapping[int, Tensor]] | None = None,
) -> str:
    """Write one shard with its edits; return the SHA-256 of the file.

    Args:
        names: new names of tensors, None for a dropped one. Default: all names stay.
        left: indices that stay of a tensor along an axis. Without `names` and `left` the header is copied.
    """
    source = checkpoint.shards[shard]
    named = {e.name: e.name if names is None else names[e.name] for e in source.entries.values()}
    entries = [entry for entry in source.entries.values() if named[entry.name] is not None]
    cuts = left or {}

    def shape(entry: TensorEntry) -> tuple[int, ...]:
        axes = cuts.get(entry.name, {})
        return tuple(len(axes[a]) if a in axes else size for a, size in enumerate(entry.shape))

    def data() -> Iterator[Any]:
        if names is None and left is None:
            yield source.header_bytes()
        else:
            shapes = {str(named[e.name]): (e.dtype, shape(e)) for e in entries}
            yield safe_header(shapes, source.metadata)
        for entry in entries:
            changed = (cuts, edits.masks, edits.values, checkpoint.bases)
            if not any(entry.name in names_changed for names_changed in changed):
                yield from source.chunks(entry)
                continue
            tensor = checkpoint.read(entry.name)
            edits.apply(entry.name, tensor)
            for axis, indices in cuts.get(entry.name, {}).items():
                tensor = tensor.index_select(axis, indices)
            yield bytes_of(tensor).numpy()

    return write_file(target, data())


def side_files(folder: Path, shards: Container[str]) -> list[str]:
    """Return names of configuration, tokenizer and licence files; ModelError for a link out of the folder."""
    names = []
    for file in sorted(folder.iterdir()):
        name = file.name
        legal = name.startswith(LEGAL_NAMES) and file.suffix in LEGAL_SUFFIXES
        card = name.endswith(".md") and not name.startswith(NOT_COPIED)
        index = name == INDEX and SINGLE not in shards
        if not plain_name(name) or not (is_copied(name) or legal or card or index):
            continue
        check_link(file)
        if file.is_file():
            names.append(name)
    return names


def copy_side_files(checkpoint: Checkpoint, target: Path) -> list[str]:
    """Copy the files of `side_files`; return their names."""
    copied = side_files(checkpoint.folder, checkpoint.shards)
    if (checkpoint.folder / _TEMPLATES).is_dir():
        _log.warning(
            "%s: chat templates with names of their own are not copied; the one by default is",
            checkpoint.folder / _TEMPLATES,
        )
    for file in sorted(checkpoint.folder.iterdir()):
        if file.name.endswith((*COPIED, ".md")) and not plain_name(file.name):
            _log.warning("%s: is not copied; not every system takes its name", file)
    for name in copied:
        copy_file(checkpoint.folder / name, target / name)
    return copied


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, which appears whole or not at all; ModelError where there is none."""
    with open_file(source) as original, atomic_write(target) as copy:
        shutil.copyfileobj(original, copy)


def disk_needed(checkpoint: Checkpoint, least_squares: bool = False) -> int:
    """Return the bytes that the pruned copy takes, with masks and, until it is complete, updated weights."""
    entries = (x for shard in checkpoint.shards.values() for x in shard.entries.values())
    elements = sum(math.prod(entry.shape) for entry in entries)
    return checkpoint.bytes * (2 if least_squares else 1) + elements // 4 + 64 * 2**20


class Unchanged:
    """State of a model folder when a run begins; ModelError where it has changed since it was opened.

    Sizes and times of all files are compared before anything that was read is written; only where they differ
    is a file read again. (A file that is changed and restored between two checks goes unnoticed.)
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.folder = checkpoint, checkpoint.folder
        self._side = side_files(checkpoint.folder, checkpoint.shards)
        names = [*self._side, *checkpoint.shards]
        self._stamps = {name: _stamp(self.folder / name) for name in names}
        self._digests = {name: file_digest(self.folder / name) for name in self._side}
        self._digests |= checkpoint.shard_digests  # taken after the stamps: later changes show
        if read_json(self.folder / "config.json") != checkpoint.config:
            raise self._changed("config.json")
        for name, shard in checkpoint.shards.items():
            if open_safe(self.folder / name).entries != shard.entries:
                raise self._changed(name)

    def check(self) -> None:
        """Raise ModelError where a file is another one than at the beginning, is gone, or is new."""
        if odd := set(self._side) ^ set(side_files(self.checkpoint.folder, self.checkpoint.shards)):
            raise self._changed(min(odd))
        for name, before in self._stamps.items():
            now = _stamp(self.folder / name)
            if now == before:
                continue
            if now is None or file_digest(self.folder / name) != self._digests[name]:
                raise self._changed(name)
            self._stamps[name] = now

    def _changed(self, name: str) -> ModelError:
        return ModelError(
            f"{self.folder / name}: changed while the run was under way, so its result would be of no one "
            "model; put the file back and go on with `resume`, or start over"
        )


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
