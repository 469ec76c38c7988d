"""A model folder without some of its tensors: written, held against the original so changed, and moved into
view."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskopt.errors import ModelError
from maskopt.models.architecture.source import FolderSource
from maskopt.models.blockwise.job import Block, Job, open_job
from maskopt.models.checkpoints.checkpoint import file_digest
from maskopt.models.checkpoints.report import FinishedBlock, PruneReport, write_manifest
from maskopt.models.checkpoints.workspace import MANIFEST, Workspace
from maskopt.models.checkpoints.write import copy_side_files, side_files
from maskopt.models.options.walk import WalkOptions
from maskopt.models.pruning.card import hub_name, write_card
from maskopt.models.structured.reduced import (
    StoredCut,
    folder_source,
    write_config,
    write_renamed_shards,
)

#: relative difference of the last hidden states
_SAME = 1e-2


@dataclass(frozen=True)
class Change:
    """What becomes of a stored model.

    Attributes:
        settings: of its configuration, by key.
        names: of every tensor; None: it is gone.
        cuts, kept: as for `write_renamed_shards`.
        prepare: makes the same of an opened block of the original; it may also leave the block by itself.
        why: in words, what it means if both do not give the same.
    """

    settings: Mapping[str, Any]
    names: Mapping[str, str | None]
    prepare: Callable[[Block], None]
    why: str
    cuts: Mapping[str, StoredCut] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For the manifest, and those who check."""
        return {
            "settings": dict(self.settings),
            "names": {new: old for old, new in self.names.items() if new not in (None, old)},
            "gone": sorted(old for old, new in self.names.items() if new is None),
            "kept": {name: stays.nonzero()[:, 0].tolist() for name, stays in self.kept.items()},
            "tensors": {
                name: [
                    {"axis": cut.axis, "parts": [list(part) for part in cut.parts], "by": by}
                    for by, cut in stored.cuts
                ]
                for name, stored in self.cuts.items()
            },
            "set_anew": [],
        }


def rewritable(job: Job) -> FolderSource:
    """The job's model, of a folder whose written copy can be opened, and so be held against it.

    Raises:
        ModelError: it needs code that comes with the model: results hold none.
    """
    source = folder_source(job.source)
    if source.checkpoint.config.get("auto_map"):
        raise ModelError(
            f"{source.checkpoint.folder}: config.json asks to run code that comes with the model (auto_map), "
            "and code is not copied: the smaller model could not be checked. Without auto_map transformers' "
            "own code runs"
        )
    side_files(source.checkpoint.folder, source.checkpoint.shards)  # refuses links before the walk
    return source


def write_changed(
    job: Job, work: Workspace, change: Change, report: PruneReport, **more: Any
) -> None:
    """Write the changed model with its card and manifest, and move all of it into view.

    Args:
        job: of the original, a folder.
        more: beside the change in the manifest's record.

    Raises:
        ModelError: what was written does not compute what the original so changed computes.
    """
    checkpoint, staging = folder_source(job.source).checkpoint, work.staging
    beside = copy_side_files(checkpoint, staging)
    files = write_renamed_shards(checkpoint, change.names, change.cuts, change.kept, staging)
    write_config(checkpoint, staging, change.settings)
    home = checkpoint.folder
    for name in write_card(staging, report, hub_name(home), home.name, beside):
        files[name] = file_digest(staging / name)
    check_same_output(job, staging, change.why, prepare=change.prepare)
    write_manifest(staging / MANIFEST, report, files, {}, shrunk={**change.record(), **more})
    work.commit()


def check_same_output(
    job: Job,
    written: Path,
    why: str,
    *,
    window: int = 0,
    prepare: Callable[[Block], None] = lambda _: None,
    finished: Mapping[int, FinishedBlock] | None = None,
) -> None:
    """Send a window through the original, changed block by block, and through what was written.

    Args:
        job: of the original, a folder.
        why: in words, what it means if both do not give the same.
        prepare: changes an opened block of the original, or leaves it by itself.
        finished: blocks of the original as they were left by a run.

    Raises:
        ModelError: they do not.
    """
    assert job.windows is not None
    original, tokens = folder_source(job.source).checkpoint.folder, job.windows.tokens
    # in float32, so that a sum in another order is no difference
    walk = WalkOptions(device=job.options.device, dtype="float32", threads=job.options.threads)
    states = []
    for folder, change, done in ((original, prepare, finished), (written, lambda _: None, None)):
        with (
            open_job(folder, tokens[window : window + 1], walk, whole=True) as one,
            torch.no_grad(),
        ):
            try:
                for block in one.blocks(done):
                    change(block)
                    block.advance()
            except RuntimeError as error:  # torch's, of shapes that do not fit
                if folder != written:
                    raise
                raise ModelError(f"the smaller model does not run ({error}): {why}") from error
            states.append(one.last_state(0).double())
    apart = float((states[1] - states[0]).norm() / states[0].norm())
    if not apart <= _SAME:
        raise ModelError(f"the smaller model's output is off by {apart:.1e}: {why}")
