"""Output folder that appears whole, and the journal of its run.

During a run, `OUT/.maskopt/` holds the lock, the journal, the masks of finished blocks and, under `out/`, the
files of the result. The last step renames those into OUT, the manifest last. The journal has one line per
fact, each with its own digest, flushed before it counts. A last line that a crash cut off is dropped; any
other damage is refused.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from maskopt.core.files import NO_SPACE, same_file
from maskopt.errors import ModelError
from maskopt.models.checkpoints.checkpoint import write_file, write_json
from maskopt.models.checkpoints.schema import (
    LAYER,
    MANIFEST,
    MASKS,
    TRAINED,
    fits,
    is_count,
    manifest_digest,
    plain_name,
)

HIDDEN = ".maskopt"
JOURNAL = "journal.jsonl"
#: what the hidden folder is called while it is removed
GONE = ".maskopt.gone"
#: lists of names in the hidden folder: what a commit moves, and what an earlier result left to be deleted
_COMMITTED, _EARLIER = "committed", "earlier"
#: the model card: users may edit it, so that manifests leave it out
CARD = "README.md"
#: shapes of a journal's records
_SHAPES = {
    "header": {"header": dict},
    "block": {
        "index": lambda v: is_count(v) and v < 10**5,
        "masks": str,
        "weights?": str,
        "layers": [LAYER],
        "trained?": [TRAINED],
        "bad": [{"sample": int}],
    },
    "shard": {"name": plain_name},
    "progress": {
        "before": lambda v: fits(v, [float]) and len(v) == 2,
        "file": plain_name,
        "digest": str,
        "step": is_count,
        "epoch": is_count,
        "held": float,
    },
}


class Workspace:
    """Output folder; `keep` keeps the hidden folder after an error, `moving`: a commit has begun."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.hidden = output / HIDDEN
        self.staging = self.hidden / "out"
        self.blocks = self.hidden / "blocks"
        self.journal = self.hidden / JOURNAL
        self.keep = self.moving = False

    def write_record(self, name: str) -> None:
        """List the staged files, for results without a manifest: `overwrite` deletes only what is listed."""
        write_json(self.staging / name, {"files": sorted(f.name for f in self.staging.iterdir())})

    def commit(self) -> None:
        """Move the staged files into the output folder, the manifest last, and remove earlier files.

        A list of the files is on disk first, so that a resumed run finishes an interrupted commit.
        """
        earlier = set(_names(self.hidden / _EARLIER))
        mark = self.hidden / _COMMITTED
        names = _names(mark) or sorted(file.name for file in self.staging.iterdir())
        if not all(map(plain_name, names)):
            raise ModelError(f"{mark}: is damaged; start over with `overwrite`")
        staged = {name for name in names if (self.staging / name).exists()}
        if new := [n for n in staged - earlier if os.path.lexists(self.output / n)]:
            raise _in_the_way(self.output, new)
        _write_names(mark, names)
        self.moving = True
        for name in names:
            if name != MANIFEST and name in staged:
                os.replace(self.staging / name, self.output / name)
        for name in earlier - set(names):
            (self.output / name).unlink(missing_ok=True)
        if (self.staging / MANIFEST).exists():
            os.replace(self.staging / MANIFEST, self.output / MANIFEST)
        if os.name == "posix":  # the renames must outlast a crash
            handle = os.open(self.output, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def remove(self) -> None:
        """Remove the hidden folder, by a rename first: a killed process leaves no unfinished run."""
        gone = self.output / GONE
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(self.hidden, gone)
        shutil.rmtree(gone)


@contextmanager
def open_workspace(output: Path, *, overwrite: bool, resume: bool = False) -> Iterator[Workspace]:
    """Lock an output folder for one process; ModelError where it cannot be used or written."""
    work = Workspace(output)
    work.keep = resume
    check_output(output, overwrite=overwrite, resume=resume)
    made: list[Path] = []
    with plain_errors(output, work):
        made = [p for p in (output, *output.parents) if not p.exists()]
        _check_hidden(work)
        work.hidden.mkdir(parents=True, exist_ok=True)
        with _locked(work):
            if work.journal.exists() and not (resume or overwrite):
                raise ModelError(
                    f"{output}: holds an unfinished run; go on with `resume`, "
                    "or drop it with `overwrite`"
                )
            shutil.rmtree(output / GONE, ignore_errors=True)
            # files that an interrupted commit has moved must stay known, whatever becomes of this run
            work.keep |= any(_names(work.hidden / note) for note in (_COMMITTED, _EARLIER))
            _write_names(work.hidden / _EARLIER, sorted(earlier_files(output)))
            if not resume:
                for inner in (work.staging, work.blocks):
                    shutil.rmtree(inner, ignore_errors=True)
                work.journal.unlink(missing_ok=True)
                (work.hidden / _COMMITTED).unlink(missing_ok=True)
            work.staging.mkdir(exist_ok=True)
            work.blocks.mkdir(exist_ok=True)
            for folder in (work.hidden, work.staging, work.blocks):
                for file in (*folder.glob(".*.tmp"), *folder.glob("activations.*")):
                    file.unlink(missing_ok=True)  # half-written
            try:
                yield work
            except BaseException:
                if not (work.keep or work.moving):
                    shutil.rmtree(work.hidden, ignore_errors=True)
                    for folder in made:
                        with contextlib.suppress(OSError):
                            folder.rmdir()
                raise
            work.remove()


def earlier_files(output: Path) -> set[str]:
    """Return the names of files there that a manifest or another record, or an interrupted run, lists."""
    hidden = output / HIDDEN
    moved = {n for n in _names(hidden / _COMMITTED) if not (hidden / "out" / n).exists()}
    listed = moved.union(_names(hidden / _EARLIER))
    for record in output.glob("maskopt-*.json"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            listed |= {record.name, *json.loads(record.read_bytes())["files"]}
    if MANIFEST in listed:
        listed.add(CARD)
    return {
        entry.name
        for entry in output.iterdir()
        if entry.name in listed
        and plain_name(entry.name)
        and (entry.is_file() or entry.is_symlink())
    }


def _names(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _write_names(path: Path, names: Collection[str]) -> None:
    write_file(path, ["\n".join(names).encode()])


def unfinished(output: Path) -> bool:
    """Return whether there is an interrupted run that could go on."""
    return (output / HIDDEN / JOURNAL).exists()


def check_output(
    output: Path,
    *,
    overwrite: bool,
    resume: bool = False,
    complete: str = MANIFEST,
    more: Collection[str] = (),
    **inputs: Any,
) -> None:
    """Check an output folder before any work.

    Args:
        complete: the file that a finished run leaves.
        more: further names of the result.
        inputs: as for `check_inputs`.

    Raises:
        ModelError: no folder, the current or the home folder, one that overlaps with an input, holds other
            files, or is not empty (unless `overwrite`, or `resume` with something to resume).
    """
    check_place(output)
    check_inputs(output, **inputs)
    if output.exists() and not output.is_dir():
        raise ModelError(f"{output}: exists and is not a folder")
    try:
        names = {entry.name for entry in output.iterdir()} if output.exists() else set()
        ours = {*earlier_files(output), *more} if names else set()
    except OSError as error:
        raise ModelError(f"{output}: cannot be read: {error.strerror}") from None
    if resume and HIDDEN not in names:
        if complete not in names:
            raise ModelError(f"{output}: nothing to resume there; start without `resume`")
        return  # nothing will be written
    if others := names - {HIDDEN, GONE} - ours:
        raise _in_the_way(output, others)
    if names & ours and not (overwrite or resume):
        raise ModelError(f"{output}: exists and is not empty; `overwrite` replaces it")


def check_place(output: Path) -> None:
    """Refuse the current and the home folder; an empty name, say of a shell variable, means the former."""
    current, home = Path.cwd(), Path(os.path.expanduser("~"))
    if any(same_file(output, place) for place in (current, *current.parents, home)):
        raise ModelError(
            f"`output` {str(output)!r} is empty, or is the current folder, one above it or the home folder; "
            "name a folder for the result alone"
        )


def _in_the_way(output: Path, names: Collection[str]) -> ModelError:
    first = ", ".join(sorted(names)[:5]) + (", …" if len(names) > 5 else "")
    return ModelError(
        f"{output}: exists and is not empty, and its manifest does not list {len(names)} of the files and "
        f"folders there: {first}; choose another output folder, or move them away"
    )


def check_dense(folder: Path) -> None:
    """Raise ModelError for a folder that `maskopt prune` wrote."""
    if (folder / MASKS).is_file():
        raise ModelError(
            f"{folder}: was pruned by maskopt already (it holds {MASKS}); prune the dense model that it was "
            "made of, or train this one further with `maskopt distill`"
        )


def check_inputs(output: Path, **inputs: Any) -> None:
    """Refuse an output folder that overlaps with an input, or shares a file with it."""
    files = _files(output)
    for role, path in inputs.items():
        if not isinstance(path, str | Path) or not os.path.exists(path):
            continue
        role, path = role.replace("_", " "), Path(path)
        inside = any(same_file(output, folder) for folder in _above(path))
        if inside or any(same_file(path, folder) for folder in _above(output)):
            raise ModelError(
                f"{output}: is the {role} itself, lies in it or holds it ({path}); choose another output "
                "folder"
            )
        if shared := files.keys() & _files(path).keys():
            raise ModelError(
                f"{output}: its {files[min(shared)]} is a file of the {role} itself, by a link; choose "
                "another output folder"
            )


def _above(path: Path) -> list[Path]:
    real = Path(os.path.realpath(path))
    return [real, *real.parents]


def _files(path: Path) -> dict[tuple[int, int], str]:
    """Return the names of a folder's files, or of the file itself, by device and inode."""
    names = {}
    with contextlib.suppress(OSError, ValueError):
        for file in path.iterdir() if path.is_dir() else [path]:
            if file.is_file():
                stat = file.stat()
                names[stat.st_dev, stat.st_ino] = file.name
    return names


def _check_hidden(work: Workspace) -> None:
    """Refuse links, which lead elsewhere, and folders in the place of files, which cannot be replaced."""
    folders = (work.hidden, work.staging, work.blocks, work.output / GONE)
    inside = work.hidden.rglob("*") if work.hidden.is_dir() else ()
    for path in (work.hidden, work.output / GONE, *inside):
        if path.is_symlink() or (path.is_dir() and path not in folders):
            kind = "link" if path.is_symlink() else "folder"
            raise ModelError(f"{path}: is a {kind}, which maskopt never makes there; remove it")


@contextmanager
def plain_errors(output: Path, work: Workspace | None = None) -> Iterator[None]:
    """Raise ModelError, one line, for an error of the operating system."""
    try:
        yield
    except OSError as error:
        resumable = work is not None and work.keep
        hint = "; free some and go on with `resume`" if resumable else ""
        if error.errno in NO_SPACE:
            raise ModelError(
                f"{output}: no space left on the disk ({error.strerror}){hint}"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ModelError(f"{output}: cannot be written: {error.strerror}") from error
        name = error.filename or output
        raise ModelError(f"{name}: {error.strerror or error}") from error


@contextmanager
def _locked(work: Workspace) -> Iterator[None]:
    path = work.hidden / "lock"
    busy = ModelError(f"{work.output}: another process is at work in it")

    def check_in_place(handle: int) -> None:
        # the process before may have moved the file away between our open and our lock
        try:
            in_place = os.path.samestat(os.fstat(handle), path.stat())
        except FileNotFoundError:
            in_place = False
        if not in_place:
            raise busy

    # not thread_local: a generator may be closed by another thread than the one that began it
    lock = FileLock(path, timeout=0, thread_local=False, on_acquired=check_in_place)
    try:
        lock.acquire()
    except Timeout:
        raise busy from None
    try:
        yield
    finally:
        lock.release()


# --- the journal


class Journal:
    """Records of a run in a file, to which new ones are added.

    They are the run's fingerprint, finished blocks by index, digests of finished shards, and the last save of
    unfinished training.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Any] | None = None
        self.blocks: dict[int, dict[str, Any]] = {}
        self.shards: dict[str, str] = {}
        self.progress: dict[str, Any] | None = None
        if path.exists():
            for number, record in enumerate(read_journal(path), start=1):
                kind = str(record.get("kind"))
                first = (kind == "header") == (number == 1)
                if not first or kind not in _SHAPES or not fits(record, _SHAPES[kind]):
                    raise ModelError(f"{path}, line {number}: not a journal of maskopt")
                self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        if record["kind"] == "header":
            self.header = record["header"]
        elif record["kind"] == "block":
            self.blocks[record["index"]] = record
        elif record["kind"] == "shard":
            self.shards[record["name"]] = str(record.get("digest"))
        else:
            self.progress = record

    def add(self, kind: str, **record: Any) -> None:
        """Append a record of a kind in `_SHAPES`, in place of a last line that a crash cut off."""
        record = {"kind": kind, **record}
        line = json.dumps({**record, "sha256": manifest_digest(record)}, sort_keys=True) + "\n"
        with open(self.path, "ab") as file:
            complete = self.path.read_bytes().rfind(b"\n") + 1
            if file.tell() != complete:
                file.truncate(complete)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self._take(record)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Read all complete records; ModelError where a line does not match its digest."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    lines = data.split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line.decode("utf-8"))
            digest = record.pop("sha256")
            # other bytes may mean the same: 1E-05, a 17th digit
            same = json.dumps({**record, "sha256": digest}, sort_keys=True).encode() == line
            sound = same and digest == manifest_digest(record)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise ModelError(
                f"{path}, line {number}: the journal is damaged; start over with `overwrite`"
            )
        records.append(record)
    return records
