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


def check_writable(path: Path) -> None:
    """Raise OptionError where no file of that name can be written, before there is something to write."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OptionError(f"{path.parent}: no such folder")
    if path.is_dir():
        raise OptionError(f"{path}: is a folder; name a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError(f"{path.parent}: cannot be written to")


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
