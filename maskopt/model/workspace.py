"""An output folder that appears whole: locked, filled in a hidden place, moved into view at the end.

While work goes on, everything lies in `OUT/.maskopt/`: the lock, the journal, the masks of finished
blocks, and under `out/` the files of the result. The last step renames those into OUT, the manifest
last, and removes the hidden folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from maskopt.errors import ModelError
from maskopt.files import NO_SPACE, atomic_write
from maskopt.model.checkpoint import plain_name

HIDDEN = ".maskopt"
JOURNAL = "journal.jsonl"
#: what the hidden folder is called while it is removed
GONE = ".maskopt.gone"
MANIFEST = "maskopt-manifest.json"
#: of safetensors' format, not of its ending: servers load every *.safetensors beside a model of one file
MASKS = "maskopt-masks.bits"
#: the model card: users may edit it, so that manifests leave it out
CARD = "README.md"
#: how names of files begin that no one else makes, and how those of weights, masks and Gram matrices end
_OURS, _STORED = "maskopt-", (".safetensors", ".safetensors.index.json", ".packed", ".bits")
#: what else transformers reads of a model folder, if it is there
_BESIDE_CONFIG = (
    *("generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)


class Workspace:
    """A locked output folder.

    Attributes:
        output: the folder of the result.
        hidden: for lock, journal and blocks.
        staging: where the result's files are made.
        keep: leave the hidden folder behind if the work ends by an error, so that it can resume.
        moving: files of the result are on their way into the output folder.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.hidden = output / HIDDEN
        self.staging = self.hidden / "out"
        self.blocks = self.hidden / "blocks"
        self.journal = self.hidden / JOURNAL
        self.keep = self.moving = False

    def remove_temporaries(self) -> None:
        """Drop what an interrupted run left half-written."""
        for folder in (self.hidden, self.staging, self.blocks):
            for file in folder.glob(".*.tmp"):
                file.unlink(missing_ok=True)
            for file in folder.glob("activations.*"):
                file.unlink(missing_ok=True)

    def commit(self) -> None:
        """Move the staged files into the output folder, then drop what an earlier result left there, and
        move the manifest last.

        The list of files is on disk before the first of them moves, so an interrupted commit is
        finished by the next run that resumes; nothing that is staged is dropped from then on.
        """
        mark = self.hidden / "committed"
        if not mark.exists():
            with atomic_write(mark) as file:
                file.write("\n".join(sorted(f.name for f in self.staging.iterdir())).encode())
        names = mark.read_text().split("\n")
        if not all(map(plain_name, names)):
            raise ModelError(f"{mark}: is damaged; start over with `overwrite`")
        self.moving = True
        for name in names:
            if name != MANIFEST and (self.staging / name).exists():
                os.replace(self.staging / name, self.output / name)
        for name in earlier_files(self.output) - set(names):
            (self.output / name).unlink()
        if (self.staging / MANIFEST).exists():
            os.replace(self.staging / MANIFEST, self.output / MANIFEST)
        sync_folder(self.output)

    def remove(self) -> None:
        """Drop the hidden folder: out of the way by one rename, so that a process killed meanwhile
        leaves nothing that looks like an unfinished run."""
        gone = self.output / GONE
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(self.hidden, gone)
        shutil.rmtree(gone)


@contextmanager
def open_workspace(output: Path, *, overwrite: bool, resume: bool) -> Iterator[Workspace]:
    """Lock an output folder for one process.

    Raises:
        ModelError: it is no folder, is not empty (unless `overwrite`, or `resume` with a journal in
            it), cannot be written, another process is at work in it, or the disk fills up.
    """
    work = Workspace(output)
    work.keep = resume
    check_output(output, overwrite=overwrite, resume=resume)
    made: list[Path] = []
    with plain_errors(output, work):
        made = [p for p in (output, *output.parents) if not p.exists()]
        _check_no_links(work)
        work.hidden.mkdir(parents=True, exist_ok=True)
        with _locked(work):
            if work.journal.exists() and not (resume or overwrite):
                raise ModelError(
                    f"{output}: holds an unfinished run; go on with `resume`, "
                    "or drop it with `overwrite`"
                )
            shutil.rmtree(output / GONE, ignore_errors=True)
            if not resume:
                for inner in (work.staging, work.blocks):
                    shutil.rmtree(inner, ignore_errors=True)
                work.journal.unlink(missing_ok=True)
                (work.hidden / "committed").unlink(missing_ok=True)
            work.staging.mkdir(exist_ok=True)
            work.blocks.mkdir(exist_ok=True)
            work.remove_temporaries()
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
    """Names of the files that a result in the folder consists of: what its manifest lists, what only maskopt
    makes, and weights and tokenizer, since those of an earlier model would be loaded beside others."""
    try:
        listed = {*json.loads((output / MANIFEST).read_bytes())["files"], CARD}
    except (OSError, ValueError, LookupError, TypeError):
        listed = set()
    if (output / "config.json").exists():
        listed |= {*_BESIDE_CONFIG}
    return {
        entry.name
        for entry in output.iterdir()
        if (entry.name in listed or entry.name.startswith(_OURS) or entry.name.endswith(_STORED))
        and (entry.is_file() or entry.is_symlink())
    }


def sync_folder(folder: Path) -> None:
    """Make renames in the folder last, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def unfinished(output: Path) -> bool:
    """Is there an interrupted run that could go on?"""
    return (output / HIDDEN / JOURNAL).exists()


def check_output(output: Path, *, overwrite: bool, resume: bool, complete: str = MANIFEST) -> None:
    """Refuse an output folder at a glance, before any work: see `open_workspace`. `complete`: the file that
    says that a run is finished."""
    if not output.exists():
        if resume:
            raise ModelError(f"{output}: nothing to resume there; start without `resume`")
        return
    if not output.is_dir():
        raise ModelError(f"{output}: exists and is not a folder")
    try:
        names = {entry.name for entry in output.iterdir()}
    except OSError as error:
        raise ModelError(f"{output}: cannot be read: {error.strerror}") from None
    if resume:
        if HIDDEN not in names and complete not in names:
            raise ModelError(f"{output}: nothing to resume there; start without `resume`")
        return
    if names - {HIDDEN, GONE} and not overwrite:
        raise ModelError(f"{output}: exists and is not empty; `overwrite` replaces it")


def _check_no_links(work: Workspace) -> None:
    """What is written into the hidden folder must not land elsewhere."""
    inside = work.hidden.rglob("*") if work.hidden.is_dir() else ()
    for path in (work.hidden, work.output / GONE, *inside):
        if path.is_symlink():
            raise ModelError(f"{path}: is a link, which maskopt never makes there; remove it")


@contextmanager
def plain_errors(output: Path, work: Workspace | None = None) -> Iterator[None]:
    """Say in one line what the operating system refused."""
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
