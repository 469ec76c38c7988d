"""Notice that a model folder changed while a run was reading it.

Every file's size and times are taken when the run begins. Before anything read from the model is kept for
good they are looked at again; only a file of which they differ is read again, for its digest. (A file that is
changed and put back between two looks goes unnoticed.)
"""

from __future__ import annotations

import os
from pathlib import Path

from maskopt.errors import ModelError
from maskopt.models.checkpoints.checkpoint import Checkpoint, file_digest, read_json
from maskopt.models.checkpoints.safefile import open_safe
from maskopt.models.checkpoints.write import side_files

CONFIG = "config.json"


class Unchanged:
    """What the files of a model folder were when a run began.

    Raises:
        ModelError: what was read of the model before is not what lies there now.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.folder = checkpoint, checkpoint.folder
        self._side = side_files(checkpoint.folder, checkpoint.shards)
        self._stamps = {name: _stamp(self.folder / name) for name in self._names()}
        self._digests = {name: file_digest(self.folder / name) for name in self._side}
        self._digests |= checkpoint.shard_digests  # taken after the stamps: later changes show
        if read_json(self.folder / CONFIG) != checkpoint.config:
            raise self._changed(CONFIG)
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

    def _names(self) -> list[str]:
        return [*self._side, *self.checkpoint.shards]

    def _changed(self, name: str) -> ModelError:
        return ModelError(
            f"{self.folder / name}: changed while the run was under way, so its result would be of no one "
            "model; put the file back and go on with `resume`, or start over"
        )


def _stamp(path: Path) -> tuple[int, ...] | None:
    """None where the file is gone."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
