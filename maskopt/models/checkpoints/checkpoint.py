"""A Hugging Face model folder, read without trusting it: shards, tensors, configuration.

The header of a safetensors file is checked against the file's size before any data is read, and data is read
by position: nothing is unpickled or mapped, and only the requested tensors are in memory.
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
from torch import Tensor

from maskopt.core.files import atomic_write
from maskopt.errors import ModelError, first_line
from maskopt.models.checkpoints.bases import Basis
from maskopt.models.checkpoints.schema import (
    INDEX,
    SINGLE,
    check_link,
    far_more_than_stored,
    fits,
    is_count,
    open_file,
    pairs,
    read_index,
    read_json,
    shards_of,
)

MAX_HEADER = 100 * 2**20
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
    """Where a tensor lies: absolute byte range, element type, shape."""

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
    """The checked header of one file. `entries` are in the order of their bytes."""

    path: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int
    size: int

    def read(self, name: str) -> Tensor:
        """The tensor as stored, in its own memory."""
        entry = self.entries[name]
        flat = torch.from_numpy(self._read(entry.start, entry.size))
        return flat.view(entry.torch_dtype).view(entry.shape)

    def chunks(self, entry: TensorEntry) -> Iterator[np.ndarray]:
        """The tensor's bytes, CHUNK at a time."""
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
    """The header of a file, checked against its size; ModelError where it is not safetensors."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        if len(head) < 8:
            raise ModelError(f"{path}: not a safetensors file ({size} bytes long)")
        (length,) = struct.unpack("<Q", head)
        if length > MAX_HEADER or length > size - 8:
            kind = _what_it_is(head)
            raise ModelError(
                f"{path}: not a safetensors file{kind}"
                if kind or length > MAX_HEADER
                else f"{path}: truncated: the header alone says {length} bytes, the file has {size}"
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: not a safetensors file{_what_it_is(head)}") from None
    if not isinstance(header, dict):
        raise ModelError(f"{path}: not a safetensors file (the header is no object)")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ModelError(f"{path}: the header's metadata is not a map of strings")
    data_start = 8 + length
    entries = [_entry(path, name, value, data_start) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    position = data_start
    for entry in entries:
        if entry.start != position:
            raise ModelError(f"{path}: tensor {entry.name!r} overlaps another or leaves a gap")
        position = entry.stop
    if position != size:
        what = "truncated" if position > size else "too long"
        raise ModelError(
            f"{path}: {what}: the header asks for {position} bytes, the file has {size}"
        )
    return SafeFile(path, {entry.name: entry for entry in entries}, metadata, data_start, size)


def write_file(path: Path, chunks: Iterable[Any]) -> str:
    """Write a file that appears whole or not at all, out of bytes or flat arrays of them; its SHA-256."""
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
    """The header for tensors given as name → (dtype, shape); their bytes follow in order."""
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
    """A safetensors file, part by part."""
    shapes = {name: (NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()}
    yield safe_header(shapes, metadata)
    yield from map(bytes_of, tensors.values())


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file; its SHA-256."""
    return write_file(path, safe_bytes(tensors, metadata))


def bytes_of(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes as safetensors stores them."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    def bad(reason: str) -> ModelError:
        return ModelError(f"{path}: tensor {name[:200]!r}: {reason}")

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise bad("the header does not give its dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"unknown element type {str(dtype)[:50]!r}")
    if not fits([shape, offsets], [[is_count]]) or len(offsets) != 2 or len(shape) > 16:
        raise bad("shape and data_offsets must be whole numbers of a possible size")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise bad(f"shape {shape} of {dtype} takes {size} bytes, not {offsets[1] - offsets[0]}")
    return TensorEntry(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _what_it_is(head: bytes) -> str:
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return " but a pickle; maskopt never loads pickled weights: save them as safetensors first"
    if head.startswith(b"version "):
        return " but a Git LFS pointer: fetch the real file with `git lfs pull`"
    return ""


# --- folders


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model folder: `shards` by file name, and `where`: tensor name → its file. `bases`:
    which tensors are read in another basis than their own."""

    folder: Path
    config: dict[str, Any]
    shards: dict[str, SafeFile]
    where: dict[str, str]
    bases: dict[str, Basis] = field(default_factory=dict, kw_only=True)

    def entry(self, name: str) -> TensorEntry:
        return self.shards[self.where[name]].entries[name]

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype."""
        tensor = self.shards[self.where[name]].read(name)
        return self.bases[name].apply(tensor) if name in self.bases else tensor

    @cached_property
    def shard_digests(self) -> dict[str, str]:
        """SHA-256 of every shard's bytes."""
        return {name: file_digest(self.folder / name) for name in sorted(self.shards)}

    @property
    def digest(self) -> str:
        """SHA-256 over config.json and all shards: two models are the same if this is."""
        parts = {"config.json": file_digest(self.folder / "config.json"), **self.shard_digests}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        return sum(shard.size for shard in self.shards.values())


def open_checkpoint(folder: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Check a model folder's configuration, index and shard headers. Raises ModelError: no such folder, a
    broken config.json or one that asks for code, quantised or pickled weights, an adapter, a link or an index
    that leads out of the folder, a missing tensor, a truncated shard."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder")
    check_link(folder / "config.json")
    config = read_json(folder / "config.json", "a model folder needs one")
    _check_config(folder, config, trust_remote_code)
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
    if what := far_more_than_stored(config, {x.name: x.shape for x in entries}):
        raise ModelError(f"{folder / 'config.json'}: {what}")
    return Checkpoint(folder, config, shards, where)


def _check_config(folder: Path, config: Any, trust_remote_code: bool) -> None:
    """Raise ModelError for an entry, at any depth, that runs code or has other weights loaded."""
    for key, value in pairs(config):
        if not value:
            continue
        if key == "auto_map" and not trust_remote_code:
            raise ModelError(
                f"{folder}: config.json asks to run code that comes with the model (auto_map), which is "
                "not run unless `trust_remote_code` says so; without auto_map transformers' own code runs"
            )
        if "implementation" in key and "/" in json.dumps(value) and not trust_remote_code:
            raise ModelError(
                f"{folder}: config.json asks to run a kernel from the hub ({key}), which is not run unless "
                f"`trust_remote_code` says so; without {key} transformers' own code runs"
            )
        if key == "quantization_config":
            raise ModelError(
                f"{folder}: the weights are quantised (quantization_config in config.json); "
                "prune the original weights"
            )
        if key == "transformers_weights":
            raise ModelError(
                f"{folder}: config.json has transformers load {value!r} (transformers_weights) in place "
                f"of {SINGLE}; rename the weights and leave that out"
            )


def resolve_model(model: str | Path, *, trust_remote_code: bool = False) -> Path:
    """A local folder, or a model of the hub, fetched without code unless that may run."""
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
        what = f"{name}: neither a folder nor a model of the hub: {first_line(error)}"
        raise ModelError(what) from error


def names_hub_model(name: str) -> bool:
    """Is it OWNER/NAME, and no folder that is here?"""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def write_json(path: Path, value: Any) -> str:
    """A record of ours: a JSON object that appears whole or not at all; its SHA-256."""
    return write_file(path, [(json.dumps(value, indent=1, sort_keys=True) + "\n").encode()])


def file_digest(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def damage(folder: Path, digests: Mapping[str, str]) -> str | None:
    """Which file does not match its SHA-256, in words; None: all do. Existence comes first."""
    for name in sorted(digests):
        if not (folder / name).is_file():
            return f"{name} is {'a folder' if (folder / name).is_dir() else 'gone'}"
    changed = (n for n in sorted(digests) if file_digest(folder / n) != digests[n])
    return next((f"{name} was changed since" for name in changed), None)


def _shard_names(folder: Path) -> tuple[list[str], dict[str, str]]:
    if (folder / SINGLE).is_file():
        return [SINGLE], {}
    if (folder / INDEX).is_file():
        check_link(folder / INDEX)
        weight_map = read_index(folder)
        return sorted(set(weight_map.values())), weight_map
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    found = (file for end in ("bin", "pt", "pth") for file in sorted(folder.glob(f"*.{end}")))
    pickles = next((file.name for file in found), "")
    if pickles:
        raise ModelError(
            f"{folder}: holds pickled weights only ({pickles}), which can run code when loaded and "
            "are refused; save the model as safetensors first"
        )
    hint = f" (it holds {', '.join(others[:3])})" if others else ""
    raise ModelError(f"{folder}: neither {SINGLE} nor {INDEX} is there{hint}")
