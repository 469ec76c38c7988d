"""The shards and other files of a result from those of a checkpoint, and a check that these do not change
meanwhile.

Where nothing is renamed or cut, headers, dtypes and shard layout are the original's, and so is every weight
that is neither pruned nor updated.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from maskopt.core.files import atomic_write
from maskopt.errors import ModelError
from maskopt.models.checkpoints.checkpoint import (
    CHUNK,
    Checkpoint,
    TensorEntry,
    bytes_of,
    file_digest,
    open_safe,
    safe_header,
    write_file,
)
from maskopt.models.checkpoints.mask_file import Edits, MaskFile
from maskopt.models.checkpoints.schema import (
    COPIED,
    INDEX,
    LEGAL_NAMES,
    LEGAL_SUFFIXES,
    SINGLE,
    check_link,
    open_file,
    plain_name,
    read_json,
)

#: what is copied along with the weights; code is not
SIDE_SUFFIXES = (*COPIED, ".md")
#: ours, hidden ones, and adapters, which loaders put upon the weights
NOT_COPIED = ("maskopt-", ".", "adapter_")
#: where tokenizers keep further chat templates; results are folders without folders
_TEMPLATES = "additional_chat_templates"

_log = logging.getLogger("maskopt.models")


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
    """Write one shard with its edits; the SHA-256 of what was written.

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
            if entry.name not in cuts:
                yield from edits.chunks(entry, source, CHUNK)
                continue
            tensor = source.read(entry.name)
            edits.apply(entry.name, tensor)
            for axis, indices in cuts[entry.name].items():
                tensor = tensor.index_select(axis, indices)
            yield bytes_of(tensor)

    return write_file(target, data())


def side_files(folder: Path, shards: Container[str]) -> list[str]:
    """Names of configuration, tokenizer and licence files; ModelError for a link out of the folder."""
    names = []
    for file in sorted(folder.iterdir()):
        if file.name.startswith(NOT_COPIED) or not is_side_file(file.name):
            continue
        if file.name.endswith(".index.json") and (file.name != INDEX or SINGLE in shards):
            continue  # of weights that are not copied
        check_link(file)
        if file.is_file():
            names.append(file.name)
    return names


def is_side_file(name: str) -> bool:
    """Is a file of that name configuration, tokenizer, template, card or licence?"""
    legal = name.startswith(LEGAL_NAMES) and Path(name).suffix in LEGAL_SUFFIXES
    return (legal or Path(name).suffix in SIDE_SUFFIXES) and plain_name(name)


def copy_side_files(checkpoint: Checkpoint, target: Path) -> list[str]:
    """Copy them; their names."""
    copied = side_files(checkpoint.folder, checkpoint.shards)
    if (checkpoint.folder / _TEMPLATES).is_dir():
        _log.warning(
            "%s: chat templates with names of their own are not copied; the one by default is",
            checkpoint.folder / _TEMPLATES,
        )
    for file in sorted(checkpoint.folder.iterdir()):
        if file.suffix in SIDE_SUFFIXES and not plain_name(file.name):
            _log.warning("%s: is not copied; not every system takes its name", file)
    for name in copied:
        copy_file(checkpoint.folder / name, target / name)
    return copied


def copy_file(source: Path, target: Path) -> None:
    """The same bytes; it appears whole or not at all. Raises ModelError where there is no such file."""
    with atomic_write(target) as file, open_file(source) as given:
        shutil.copyfileobj(given, file)


def disk_needed(checkpoint: Checkpoint, least_squares: bool = False) -> int:
    """Bytes that the pruned copy takes, with masks and, until it is complete, updated weights."""
    entries = (x for shard in checkpoint.shards.values() for x in shard.entries.values())
    elements = sum(math.prod(entry.shape) for entry in entries)
    return checkpoint.bytes * (2 if least_squares else 1) + elements // 4 + 64 * 2**20


class Unchanged:
    """The state of a model folder when a run begins; ModelError where it has changed since it was opened.

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
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
