"""Files that appear whole or not at all and hold no pickles; dataclasses as arrays, and by rows."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from maskopt.errors import OptionError, ProblemError

FORMAT = "maskopt-3"
Kind = TypeVar("Kind")
_PROBLEM = re.compile("weight|gram|moments|omega|correlation|constant")
#: the arrays of each kind of file
_ARRAYS = {
    "layer": _PROBLEM,
    "row": _PROBLEM,
    "solution": re.compile(
        r"(mask|objective|lower_bound|weight|omega|trace\.\w+|certificate\.\w+(\.\d+\.\w+)?|proof\.\d+\.\w+)"
    ),
}
#: truth values, whole and real numbers
_NUMBERS = "biuf"
#: error numbers of a full disk
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: weights, where there is a config.json; safetensors files are weights in any folder
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf")


def check_writable(path: Path, *, overwrite: bool | None, **inputs: Any) -> None:
    """Raise OptionError where a file must not or cannot be written.

    Args:
        overwrite: an existing file may be replaced, unless it belongs to a model. None: the file grows.
        inputs: other arguments of the command by name, of which paths must not be `path`.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OptionError(f"{path.parent}: no such folder")
    if path.is_dir():
        raise OptionError(f"{path}: is a folder; name a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError(f"{path.parent}: cannot be written to")
    for name, value in inputs.items():
        if isinstance(value, str | Path) and same_file(path, value):
            raise OptionError(f"{path} is the {name} itself; name another file for the output")
    if overwrite is None or not path.exists():
        return
    # the folders of a link and of its target: not every writer replaces the link itself
    for names in map(os.listdir, {folder, Path(os.path.realpath(path)).parent}):
        weights = (".safetensors", *(_OTHER_WEIGHTS if "config.json" in names else ()))
        if any(name.endswith(weights) for name in names):
            raise OptionError(f"{path}: is a file of a model folder; name a file in another folder")
    if not overwrite:
        raise OptionError(f"{path} exists; pass `overwrite` to replace it")


def same_file(path: str | Path, other: str | Path) -> bool:
    """Return whether two paths lead to the same file or folder, also by links or bind mounts."""
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):  # either does not exist, or is no path
        return False


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that is flushed and then renamed onto `path`; it is deleted if the body raises."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)  # there is no other way to read it
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            error.filename = str(path)  # the error of a full disk names no file
        raise


def pack(value: Any, name: str = "") -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Split a value into words for a header and arrays for `write_arrays`, both by dotted names.

    A dataclass gives its fields, a sequence of dataclasses its entries. None is left out, bfloat16 widened.
    """
    if isinstance(value, Tensor):
        value = value.float() if value.dtype == torch.bfloat16 else value
        return {}, {name: value.detach().cpu().contiguous().numpy()}
    if isinstance(value, np.ndarray):
        return {}, {name: value}
    if is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, list | tuple) and any(map(is_dataclass, value)):
        parts = {str(index): entry for index, entry in enumerate(value)}
    else:
        return ({} if value is None else {name: value}), {}
    words: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for part, entry in parts.items():
        new_words, new_arrays = pack(entry, f"{name}.{part}" if name else part)
        words, arrays = words | new_words, arrays | new_arrays
    return words, arrays


def unpack(
    kind: type[Kind],
    words: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    name: str = "",
    **others: Any,
) -> Kind:
    """Invert `pack`: lists of words become tuples, arrays tensors, except in fields of `np.ndarray`.

    `others` are fields that hold dataclasses. TypeError or ValueError: a missing field, or an array of a type
    that torch lacks.
    """
    values = dict(others)
    for field in fields(kind):  # type: ignore[arg-type]
        key = f"{name}.{field.name}" if name else field.name
        if field.name in others:
            continue
        if key in arrays:
            plain = field.type == "np.ndarray"
            values[field.name] = arrays[key] if plain else torch.from_numpy(arrays[key])
        elif key in words:
            word = words[key]
            values[field.name] = tuple(word) if isinstance(word, list) else word
    return kind(**values)


def unpack_rows(
    kind: type[Kind],
    words: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    name: str,
    rows: int,
) -> list[Kind | None] | None:
    """Invert `pack` for a list of dataclasses, one or None a row; None where no row has one."""
    first = fields(kind)[0].name  # type: ignore[arg-type]
    entries = [
        unpack(kind, words, arrays, f"{name}.{row}") if f"{name}.{row}.{first}" in arrays else None
        for row in range(rows)
    ]
    return entries if any(entry is not None for entry in entries) else None


def write_arrays(
    path: str | os.PathLike[str],
    kind: str,
    header: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Write an .npz of arrays with a JSON header that names their kind."""
    text = json.dumps({"format": FORMAT, "kind": kind, **header})
    with atomic_write(Path(path)) as file:
        np.savez(file, header=np.array(text), **arrays)  # type: ignore[arg-type]


def read_arrays(
    path: str | os.PathLike[str], *kinds: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the header and the arrays of `write_arrays`, in no more memory than the file has bytes.

    ProblemError: no such file, another format or kind, unknown names, compressed or overlapping arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, os.path.getsize(path))
            header = from_json(str(_member(archive, members.pop("header"), "U")))
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                raise ProblemError("not a maskopt instance of a format that this version reads")
            kind = header.get("kind")
            if kind not in kinds:
                raise ProblemError(f"holds a {kind}, not a {' or '.join(kinds)}")
            for name in members:
                if not _ARRAYS[kind].fullmatch(name):
                    raise ProblemError(f"not a sound {kind}: it has no array {name!r}")
            arrays = {name: _member(archive, info, _NUMBERS) for name, info in members.items()}
    except FileNotFoundError:
        raise ProblemError(f"{path}: no such file") from None
    except ProblemError as error:
        raise ProblemError(f"{path}: {error}") from None
    except Exception as error:  # of zipfile, JSON or NumPy: the file is another one
        raise ProblemError(f"{path}: not a maskopt instance ({error})") from None
    return header, arrays


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """List the arrays of an archive by name; ProblemError where they take more memory than its size."""
    members = archive.infolist()
    packed = any(info.compress_type != zipfile.ZIP_STORED for info in members)
    if packed or sum(info.file_size for info in members) > size:
        raise ProblemError("its arrays are compressed, or overlap; write them with numpy.savez")
    return {info.filename.removesuffix(".npy"): info for info in members}


def has_header(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is an archive of `write_arrays`, or no archive that can be read."""
    with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        return "header.npy" in archive.namelist()
    return True


def read_array(path: str | os.PathLike[str]) -> np.ndarray:
    """Read the array of a `.npy`, or the only one of an `.npz`, with the memory of `read_arrays`.

    ProblemError for any other file, which the caller names.
    """
    try:
        size = os.path.getsize(path)
        if Path(path).suffix.lower() == ".npy":
            with open(path, "rb") as file:
                return _read(file, size, Path(path).name, _NUMBERS)
        with zipfile.ZipFile(path) as archive:
            (info, *others) = _members(archive, size).values()
            if others:
                raise ProblemError(f"holds {1 + len(others)} arrays; save one square matrix alone")
            return _member(archive, info, _NUMBERS)
    except ProblemError:
        raise
    except Exception as error:  # of zipfile or NumPy: the file holds no array
        raise ProblemError(f"not an array ({error}); write it with numpy.save") from None


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, kinds: str) -> np.ndarray:
    with archive.open(info) as member:
        return _read(member, info.file_size, info.filename, kinds)


def _read(member: IO[bytes], size: int, name: str, kinds: str) -> np.ndarray:
    """Read an array whose header has one of these kinds and agrees with the length of its file."""
    version = npy.read_magic(member)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(member)
    if dtype.hasobject:
        raise ValueError(f"array {name!r} is a pickle")
    if dtype.kind not in kinds:
        raise ProblemError(f"not a sound file: array {name!r} is of type {dtype}")
    if math.prod(shape) * dtype.itemsize != size - member.tell():
        raise ProblemError(f"not a sound file: array {name!r} is no {dtype} {list(shape)}")
    member.seek(0)
    array: np.ndarray = npy.read_array(member, allow_pickle=False)
    return array


def from_json(text: str) -> Any:
    """Parse JSON text.

    ValueError: other text, too deep nesting, or half of a surrogate pair, which no file can hold.
    """
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it nests too deep") from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"{half} is half of a surrogate pair, and no character") from None
    return value


def take_rows(value: Any, rows: Tensor | Sequence[int]) -> Any:
    """Select rows by their indices from tensors, sequences, and dataclasses of these.

    None, words and numbers hold for all rows and stay.
    """
    index = torch.as_tensor(rows, dtype=torch.int64)
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        return replace(value, **{name: take_rows(getattr(value, name), index) for name in names})
    if isinstance(value, Tensor):
        return value[index.to(value.device)]
    if isinstance(value, tuple | list) and value:
        return type(value)(value[row] for row in index.tolist())
    return value


def join_rows(parts: Sequence[Any]) -> Any:
    """Join the rows of several parts; narrower tensors repeat their last column."""
    first = parts[0]
    if is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in fields(first)]
        joined = {name: join_rows([getattr(p, name) for p in parts]) for name in names}
        return replace(first, **joined)
    if isinstance(first, Tensor):
        if first.ndim == 2:
            most = max(x.shape[1] for x in parts)
            parts = [torch.cat([x, x[:, -1:].expand(-1, most - x.shape[1])], 1) for x in parts]
        return torch.cat(list(parts))
    if isinstance(first, tuple | list):
        return type(first)(itertools.chain(*parts))
    return first


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor as safetensors stores them: uint8 [elements, bytes of one]."""
    flat = tensor.cpu().contiguous().view(-1)
    return flat.view(torch.uint8).view(flat.numel(), tensor.dtype.itemsize)
