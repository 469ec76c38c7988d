"""Safetensors files read and written without trusting them.

The header is checked against the file's size before any data is read, and data is read by position: nothing
is unpickled or mapped, and only the requested tensors are in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from maskopt.core.files import atomic_write
from maskopt.errors import ModelError

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
        with open_file(self.path) as file:
            buffer = _read_exactly(file, entry.start, entry.size, self.path)
        flat = torch.from_numpy(buffer)
        return flat.view(entry.torch_dtype).view(entry.shape)

    def chunks(self, entry: TensorEntry, step: int) -> Iterator[np.ndarray]:
        """The tensor's bytes, `step` at a time."""
        with open_file(self.path) as file:
            for start in range(entry.start, entry.stop, step):
                yield _read_exactly(file, start, min(step, entry.stop - start), self.path)

    def part(self, entry: TensorEntry, start: int, size: int) -> np.ndarray:
        """`size` of the tensor's bytes from `start` on; ModelError where there are fewer."""
        if start + size > entry.size:
            raise ModelError(f"{self.path}: tensor {entry.name!r} ends too early")
        with open_file(self.path) as file:
            return _read_exactly(file, entry.start + start, size, self.path)

    def header_bytes(self) -> bytes:
        with open_file(self.path) as file:
            return _read_exactly(file, 0, self.data_start, self.path).tobytes()


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
    with atomic_write(path) as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
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


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file; its SHA-256."""
    shapes = {name: (NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()}
    data = (bytes_of(value) for value in tensors.values())
    return write_file(path, itertools.chain([safe_header(shapes, metadata)], data))


def bytes_of(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes as safetensors stores them."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()


def open_file(path: Path) -> IO[bytes]:
    """A regular file for reading; ModelError for a pipe, a device, or a file that cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ModelError(f"{path}: not a regular file")
        return open(path, "rb")
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    def bad(reason: str) -> ModelError:
        return ModelError(f"{path}: tensor {name[:200]!r}: {reason}")

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise bad("the header does not give its dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"unknown element type {str(dtype)[:50]!r}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise bad("shape and data_offsets must be whole numbers")
    if len(shape) > 16 or any(s >= 2**48 for s in shape) or max(offsets) >= 2**62:
        raise bad("shape or data_offsets are absurdly large")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise bad(f"shape {shape} of {dtype} takes {size} bytes, not {offsets[1] - offsets[0]}")
    return TensorEntry(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value
    )


def _what_it_is(head: bytes) -> str:
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return " but a pickle; maskopt never loads pickled weights: save them as safetensors first"
    if head.startswith(b"version "):
        return " but a Git LFS pointer: fetch the real file with `git lfs pull`"
    return ""


def _read_exactly(file: IO[bytes], start: int, size: int, path: Path) -> np.ndarray:
    buffer = np.empty(size, dtype=np.uint8)
    view = buffer.data
    done = 0
    file.seek(start)
    while done < size:
        try:
            count = file.readinto(view[done:])  # type: ignore[attr-defined]
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
        if not count:
            raise ModelError(f"{path}: truncated at byte {start + done}")
        done += count
    return buffer
