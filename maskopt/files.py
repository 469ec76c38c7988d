"""Files appear whole or not at all, and hold no pickles."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from maskopt.errors import OptionError, ProblemError

FORMAT = "maskopt-1"
#: what the operating system says where a disk is full
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: weights, where there is a config.json; safetensors files are weights in any folder
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf")


def check_writable(path: Path, *, overwrite: bool | None, **inputs: Any) -> None:
    """Raise OptionError where a file must not or cannot be written, before there is something to write.

    Args:
        overwrite: an existing file may be replaced, unless it belongs to a model. None: the file grows.
        inputs: what the command reads, by what it is called. Only paths count.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OptionError(f"{path.parent}: no such folder")
    if path.is_dir():
        raise OptionError(f"{path}: is a folder; name a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError(f"{path.parent}: cannot be written to")
    for name, given in inputs.items():
        if isinstance(given, str | Path) and same_file(path, given):
            raise OptionError(f"{path} is the {name} itself; name another file for the output")
    if overwrite is None or not path.exists():
        return
    # of a link, where it lies and where it leads to: not every writer replaces the link itself
    if any(map(_holds_model, {folder, Path(os.path.realpath(path)).parent})):
        raise OptionError(f"{path}: is a file of a model folder; name a file in another folder")
    if not overwrite:
        raise OptionError(f"{path} exists; pass `overwrite` to replace it")


def same_file(one: str | Path, other: str | Path) -> bool:
    """Do two paths lead to the same file or folder? Links and bind mounts are noticed."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # one does not exist, or is no path
        return False


def _holds_model(folder: Path) -> bool:
    names = os.listdir(folder)
    weights = (".safetensors", *(_OTHER_WEIGHTS if "config.json" in names else ()))
    return any(name.endswith(weights) for name in names)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file, flushed to disk and then renamed onto `path`; gone if the body raises."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            error.filename = str(path)  # a full disk does not say of what
        raise


def write_arrays(
    path: str | os.PathLike[str],
    kind: str,
    header: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> None:
    """An .npz of arrays under a JSON header that says which kind of thing it is."""
    text = json.dumps({"format": FORMAT, "kind": kind, **header})
    with atomic_write(Path(path)) as file:
        np.savez(file, header=np.array(text), **arrays)  # type: ignore[arg-type]


def read_arrays(
    path: str | os.PathLike[str], *kinds: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of what `write_arrays` wrote.

    Raises:
        ProblemError: no such file, not ours, or another kind of thing.
    """
    try:
        # EOFError, zipfile and zlib errors, and ValueError for pickles: all mean "not ours"
        with np.load(path, allow_pickle=False) as archive:
            header = json.loads(str(archive["header"]))
            arrays = {name: archive[name] for name in archive.files if name != "header"}
    except FileNotFoundError:
        raise ProblemError(f"{path}: no such file") from None
    except Exception as error:
        raise ProblemError(f"{path}: not a maskopt instance ({error})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ProblemError(f"{path}: not a maskopt instance of a format that this version reads")
    if header.get("kind") not in kinds:
        wanted = " or ".join(kinds)
        raise ProblemError(f"{path}: holds a {header.get('kind')}, not a {wanted}")
    return header, arrays


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
