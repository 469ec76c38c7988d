"""Apply masks to a checkpoint: every shard copied byte by byte, pruned entries set to zero.

Headers, dtypes and shard layout are those of the original by construction, and so is every kept weight that
was not refitted.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any

from maskopt.core.files import atomic_write
from maskopt.errors import ModelError
from maskopt.models.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint, check_link, plain_name
from maskopt.models.checkpoints.mask_file import MaskFile
from maskopt.models.checkpoints.safefile import CHUNK, open_file
from maskopt.models.checkpoints.weight_edits import Edits

#: what is copied along with the weights; code is not
SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md")
SIDE_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
LEGAL_SUFFIXES = ("", ".txt", ".md", ".rst", ".pdf", ".html")
#: ours, hidden ones, and adapters, which loaders put upon the weights
NOT_COPIED = ("maskopt-", ".", "adapter_")
#: where tokenizers keep chat templates beside that by default; results are folders without folders
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


def write_shard(checkpoint: Checkpoint, shard: str, edits: Edits, target: Path) -> str:
    """One shard with its edits; the digest of what was written."""
    source = checkpoint.shards[shard]
    digest = hashlib.sha256()
    with atomic_write(target) as file:

        def put(data: Any) -> None:
            file.write(data)
            digest.update(data)

        put(source.header_bytes())
        for entry in source.entries.values():
            for chunk in edits.chunks(entry, source, CHUNK):
                put(chunk)
    return digest.hexdigest()


def side_files(folder: Path, shards: Container[str]) -> list[str]:
    """Names of the files that are copied beside the weights, which are `shards`: configuration, tokenizer
    and licence. Raises ModelError for a link whose content cannot be copied."""
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
    legal = name.startswith(SIDE_NAMES) and Path(name).suffix in LEGAL_SUFFIXES
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


def disk_needed(checkpoint: Checkpoint, refit: bool = False) -> int:
    """Bytes that the pruned copy takes, masks (and until it is whole the new weights) included."""
    elements = sum(
        math.prod(entry.shape) for s in checkpoint.shards.values() for entry in s.entries.values()
    )
    return checkpoint.bytes * (2 if refit else 1) + elements // 4 + 64 * 2**20
