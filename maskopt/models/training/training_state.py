"""Where training stands after a step, and the files that it goes on from when it was interrupted.

A file of tensors appears whole, then a line of the journal counts it, then the file before it goes: whenever
the process ends, the last line's file is there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from maskopt.errors import ModelError
from maskopt.models.checkpoints.checkpoint import file_digest
from maskopt.models.checkpoints.journal import Journal
from maskopt.models.checkpoints.safefile import open_safe, write_tensors
from maskopt.models.checkpoints.workspace import Workspace

#: of a trained weight on disk: itself, two moments, and the best epoch's
BYTES = 16
KINDS = ("weights", "first", "second", "best")


class Losses(NamedTuple):
    """Mean over windows."""

    fitted: float
    held: float


@dataclass(frozen=True)
class Progress:
    """Where training stands.

    Attributes:
        step: so many are taken; epochs that end before the last of them are judged.
        before: losses at the start.
        held, epoch: the least loss of the windows kept aside, and the epoch that left it; 0: the start.
        tensors: float32, of every trained parameter by its name: `weights`, AdamW's moments `first` and
            `second`, and `best`, the weights of the best epoch, none where that is the start.
    """

    step: int
    before: Losses
    held: float
    epoch: int
    tensors: Mapping[str, Mapping[str, Tensor]]


class Keeper(Protocol):
    """Holds where training stands."""

    def last(self) -> Progress | None:
        """What there is to go on from."""
        ...

    def due(self) -> bool:
        """Shall it be told where training stands?"""
        ...

    def keep(self, at: Progress) -> None: ...


class FolderKeeper:
    """In an output folder's workspace, now and then.

    Args:
        every: seconds from one time to the next; 0: never.
        device: of the tensors that are read back.
    """

    def __init__(
        self, work: Workspace, journal: Journal, every: float, device: torch.device
    ) -> None:
        self._work, self._journal = work, journal
        self._every, self._device = every, device
        self._since = time.monotonic()

    def last(self) -> Progress | None:
        record = self._journal.progress
        if record is None:
            return None
        path = self._work.blocks / record["file"]
        if not path.exists() or file_digest(path) != record["digest"]:
            raise ModelError(
                f"{path}: does not match the journal: it was changed; start over with `overwrite`"
            )
        file = open_safe(path)
        tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        for stored in file.entries:
            kind, name = stored.split("/", 1)
            tensors[kind][name] = file.read(stored).to(self._device)
        before = Losses(*record["before"])
        return Progress(record["step"], before, record["held"], record["epoch"], tensors)

    def due(self) -> bool:
        return 0 < self._every <= time.monotonic() - self._since

    def keep(self, at: Progress) -> None:
        path = self._work.blocks / f"step-{at.step:08d}.safetensors"
        every = {
            f"{kind}/{name}": tensor for kind in KINDS for name, tensor in at.tensors[kind].items()
        }
        digest = write_tensors(path, every)
        record: dict[str, Any] = {"file": path.name, "digest": digest, "step": at.step}
        record |= {"before": list(at.before), "held": at.held, "epoch": at.epoch}
        self._work.keep = True  # from the moment that the journal may hold it
        self._journal.set_progress(record)
        for other in self._work.blocks.glob("step-*.safetensors"):
            if other.name != path.name:
                other.unlink()
        self._since = time.monotonic()
