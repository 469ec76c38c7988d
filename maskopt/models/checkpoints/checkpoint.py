"""A Hugging Face model folder, read without trusting it: shards, tensors, configuration.

The package safetensors checks the header of a file against the file's size. Data is then read by position:
nothing is unpickled, and only the requested tensors are in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskopt.core.files import atomic_write, bytes_of
from maskopt.errors import ModelError, first_line
from maskopt.models.checkpoints.bases import Basis
from maskopt.models.checkpoints.schema import (
    CONFIG,
    INDEX,
    SINGLE,
    check_link,
    check_settings,
    far_more_than_stored,
    file_digest,
    is_count,
    manifest_digest,
    open_file,
    read_index,
    read_json,
    shards_of,
)

CHUNK = 16 * 2**20

#: safetensors' names of element types
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Place of a tensor in a file: absolute byte range, element type, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class SafeFile:
    """Checked header of one file. `entries` are in the order of their bytes."""

    path: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int
    size: int

    def read(self, name: str) -> Tensor:
        """Return the tensor as stored, in memory of its own."""
        entry = self.entries[name]
        flat = torch.from_numpy(self._read(entry.start, entry.size))
        return flat.view(entry.torch_dtype).view(entry.shape)

    def chunks(self, entry: TensorEntry) -> Iterator[np.ndarray]:
        """Yield the tensor's bytes, CHUNK at a time."""
        for start in range(entry.start, entry.stop, CHUNK):
            yield self._read(start, min(CHUNK, entry.stop - start))

    def header_bytes(self) -> bytes:
        return self._read(0, self.data_start).tobytes()

    def _read(self, start: int, size: int) -> np.ndarray:
        buffer, done = np.empty(size, dtype=np.uint8), 0
        with open_file(self.path) as file:
            file.seek(start)
            while done < size:
                try:
                    count = file.readinto(buffer.data[done:])  # type: ignore[attr-defined]
                except OSError as error:
                    raise ModelError(f"{self.path}: cannot be read: {error.strerror}") from None
                if not count:
                    raise ModelError(f"{self.path}: truncated at byte {start + done}")
                done += count
        return buffer


def open_safe(path: Path) -> SafeFile:
    """Read the header of a file; ModelError where it is not safetensors, damaged or truncated."""
    with open_file(path) as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(8)
        try:
            # The package refuses headers whose tensors do not cover the file to the last byte.
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            reason = _other_format(head) or f"or incomplete: {first_line(error)}"
            raise ModelError(f"{path}: not a safetensors file, {reason}") from None
        (length,) = struct.unpack("<Q", head)
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    entries = []
    for name, value in header.items():
        dtype, shape = value["dtype"], tuple(value["shape"])
        if dtype not in DTYPES or not all(map(is_count, shape)):
            raise ModelError(f"{path}: tensor {name[:200]!r}: cannot be read: {dtype} {shape}")
        start, stop = (8 + length + offset for offset in value["data_offsets"])
        entries.append(TensorEntry(name, dtype, shape, start, stop))
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    return SafeFile(path, {entry.name: entry for entry in entries}, metadata, 8 + length, size)


def _other_format(head: bytes) -> str:
    """Describe a file that is often found in the place of safetensors, by its first bytes."""
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return "but a pickle; maskopt never loads pickled weights: save them as safetensors first"
    if head.startswith(b"version "):
        return "but a Git LFS pointer: fetch the real file with `git lfs pull`"
    return ""


def write_file(path: Path, chunks: Iterable[Any]) -> str:
    """Write bytes or arrays of them to a file that appears whole or not at all; return its SHA-256."""
    digest = hashlib.sha256()
    with atomic_write(path) as file, ThreadPoolExecutor(1) as other:
        for chunk in chunks:
            hashed = other.submit(digest.update, chunk)
            file.write(chunk)
            hashed.result()
    return digest.hexdigest()


def safe_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the header for tensors given as name → (dtype, shape); their bytes follow in order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def safe_bytes(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | np.ndarray]:
    """Yield a safetensors file, part by part."""
    shapes = {name: (NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()}
    yield safe_header(shapes, metadata)
    for value in tensors.values():
        yield bytes_of(value).numpy()


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file; return its SHA-256."""
    return write_file(path, safe_bytes(tensors, metadata))


# --- folders


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a model folder.

    Attributes:
        shards: by file name.
        where: the file of every tensor.
        bases: of tensors that are read in another basis than their own.
    """

    folder: Path
    config: dict[str, Any]
    shards: dict[str, SafeFile]
    where: dict[str, str]
    bases: dict[str, Basis] = field(default_factory=dict, kw_only=True)

    def entry(self, name: str) -> TensorEntry:
        return self.shards[self.where[name]].entries[name]

    def read(self, name: str) -> Tensor:
        """Return one tensor in its stored dtype."""
        tensor = self.shards[self.where[name]].read(name)
        return self.bases[name].apply(tensor) if name in self.bases else tensor

    @cached_property
    def shard_digests(self) -> dict[str, str]:
        """SHA-256 of every shard's bytes."""
        return {name: file_digest(self.folder / name) for name in sorted(self.shards)}

    @property
    def digest(self) -> str:
        """SHA-256 over config.json and all shards: two models are the same if this is."""
        return manifest_digest({CONFIG: file_digest(self.folder / CONFIG), **self.shard_digests})

    @property
    def bytes(self) -> int:
        return sum(shard.size for shard in self.shards.values())


def open_checkpoint(folder: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Check a model folder's configuration, index and shard headers.

    Raises:
        ModelError: no such folder, a broken config.json or one that asks for code, quantised or pickled
            weights, an adapter, a link or an index that leads out of the folder, a missing tensor, a
            truncated shard.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder")
    check_link(folder / CONFIG)
    config = read_json(folder / CONFIG, "a model folder needs one")
    remedy = "it is not run unless `trust_remote_code` says so; without this key transformers' own code runs"
    check_settings(folder / CONFIG, config, None if trust_remote_code else remedy)
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder}: holds an adapter (adapter_config.json), which loaders put onto other weights; "
            "merge it into its model first"
        )
    names, weight_map = _shard_names(folder)
    for name in names:
        check_link(folder / name)
    shards = {name: open_safe(folder / name) for name in names}
    held = {name: shard.entries for name, shard in shards.items()}
    where = shards_of(folder, held, weight_map)
    entries = [shards[name].entries[key] for key, name in where.items()]
    if fault := far_more_than_stored(config, {x.name: x.shape for x in entries}):
        raise ModelError(f"{folder / CONFIG}: {fault}")
    return Checkpoint(folder, config, shards, where)


def resolve_model(model: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Return a local folder, or that of a model of the hub, fetched without code unless that may run."""
    name = str(model)
    if not names_hub_model(name):
        return Path(model)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.md"]
    wanted += ["LICENSE*", "NOTICE*", "USE_POLICY*"] + ["*.py"] * trust_remote_code
    # the weights once more, in the layout of other programs
    ignored = ["consolidated*.safetensors", "*/*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=ignored))
    except Exception as error:  # the hub client raises whatever its layers raise
        reason = f"{name}: neither a folder nor a model of the hub: {first_line(error)}"
        raise ModelError(reason) from error


def names_hub_model(name: str) -> bool:
    """Return whether it is OWNER/NAME, and no folder that exists."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def write_json(path: Path, value: Any) -> str:
    """Write a JSON object to a file that appears whole or not at all; return its SHA-256."""
    return write_file(path, [(json.dumps(value, indent=1, sort_keys=True) + "\n").encode()])


def damage(folder: Path, digests: Mapping[str, str]) -> str | None:
    """Describe a file that is gone or does not match its SHA-256; None where all do."""
    for name in sorted(digests):
        if not (folder / name).is_file():
            return f"{name} is {'a folder' if (folder / name).is_dir() else 'gone'}"
    for name in sorted(digests):
        if file_digest(folder / name) != digests[name]:
            return f"{name} was changed since"
    return None


def _shard_names(folder: Path) -> tuple[list[str], dict[str, str]]:
    if (folder / SINGLE).is_file():
        return [SINGLE], {}
    if (folder / INDEX).is_file():
        check_link(folder / INDEX)
        weight_map = read_index(folder)
        return sorted(set(weight_map.values())), weight_map
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    pickles = sorted(file.name for end in ("bin", "pt", "pth") for file in folder.glob(f"*.{end}"))
    if pickles:
        raise ModelError(
            f"{folder}: holds pickled weights only ({pickles[0]}), which can run code when loaded and "
            "are refused; save the model as safetensors first"
        )
    hint = f" (it holds {', '.join(others[:3])})" if others else ""
    raise ModelError(f"{folder}: neither {SINGLE} nor {INDEX} is there{hint}")
