"""Where a smaller model goes: the folder, journal and shards of a prune, its tensors cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from maskopt.models.architecture.source import FolderSource
from maskopt.models.architecture.structures import Structures
from maskopt.models.blockwise.job import Job
from maskopt.models.checkpoints.checkpoint import file_digest
from maskopt.models.checkpoints.mask_file import MaskFile, MaskFiles, unpack
from maskopt.models.checkpoints.report import PruneReport, write_manifest
from maskopt.models.checkpoints.safefile import open_safe
from maskopt.models.checkpoints.weight_edits import Edits
from maskopt.models.checkpoints.workspace import MANIFEST
from maskopt.models.checkpoints.write import copy_side_files
from maskopt.models.pruning.card import hub_name, write_card
from maskopt.models.pruning.output import FolderRun
from maskopt.models.structured.reduced import (
    StoredCut,
    write_config,
    write_index,
    write_smaller_shard,
)
from maskopt.models.structured.rewritten import check_same_output


class ShrinkRun(FolderRun):
    """Masks of consumers go to disk block by block; a shard is cut once all that cut it are there."""

    def __init__(
        self,
        source: FolderSource,
        every: Sequence[Structures],
        cuts: Mapping[str, StoredCut],
        settings: Mapping[str, int],
        output: Path,
        *,
        overwrite: bool,
        resume: bool,
    ) -> None:
        layers = [one.consumer for one in every]
        super().__init__(source, layers, output, overwrite=overwrite, resume=resume)
        self._every = {one.consumer.name: one for one in every}
        self._cuts, self._settings = cuts, settings
        for name, cut in cuts.items():
            self._block_of[name] = self._every[cut.cuts[0][0]].consumer.block

    def finish_smaller(self, job: Job, report: PruneReport) -> None:
        """Write what is left to write, hold it against the original with zeros in its place, and move all of
        it into view.

        Raises:
            ModelError: what was written computes something else.
        """
        work, checkpoint = self.work, self.source.checkpoint
        self._write_finished_shards()
        files = dict(self.journal.shards)
        beside = copy_side_files(checkpoint, work.staging)
        write_config(checkpoint, work.staging, self._settings)
        sizes = [open_safe(work.staging / name) for name in checkpoint.shards]
        total = sum(entry.size for shard in sizes for entry in shard.entries.values())
        write_index(checkpoint, work.staging, total)
        home = checkpoint.folder
        for name in write_card(work.staging, report, hub_name(home), home.name, beside):
            files[name] = file_digest(work.staging / name)
        self.model.check()
        self._check_output(job, report)
        write_manifest(work.staging / MANIFEST, report, files, {}, shrunk=self._record())
        work.commit()

    def _check_output(self, job: Job, report: PruneReport) -> None:
        bad = {sample["sample"] for sample in report.bad_samples}
        assert job.windows is not None
        windows = [window for window in range(len(job.windows)) if window not in bad]
        if windows:
            done = {index: self.done(index) for index in self.journal.blocks}
            check_same_output(
                job,
                self.work.staging,
                "what was removed does more in this family than pass through the layer that takes it",
                window=windows[0],
                finished={i: replace(one, bad=[]) for i, one in done.items() if one is not None},
            )

    def _write_shard(self, name: str, edits: Edits) -> str:
        kept = self._kept(edits.masks)
        target = self.work.staging / name
        return write_smaller_shard(self.source.checkpoint, name, edits, self._cuts, kept, target)

    def _kept(self, masks: MaskFile | MaskFiles) -> dict[str, Bool[Tensor, " m"]]:
        """The structures that stay, by consumer, of the blocks that are done. All rows of a consumer's mask
        are alike, so the first one tells."""
        found = {}
        for name, one in self._every.items():
            tensor = self.source.stored_parts(one.consumer.parameter)[0]
            if tensor in masks:
                columns = unpack(masks.packed(tensor), 0, one.consumer.n)
                stays = torch.zeros(one.count, dtype=torch.bool)
                stays[one.groups[columns]] = True
                found[name] = stays
        return found

    def _record(self) -> dict[str, object]:
        """What went, for those who check: settings, cuts and kept structures, by names of stored tensors."""
        masks = MaskFiles(self._path(index, "masks") for index in self.journal.blocks)
        tensors = {
            name: [
                {"axis": cut.axis, "parts": [list(part) for part in cut.parts], "by": consumer}
                for consumer, cut in stored.cuts
            ]
            for name, stored in self._cuts.items()
        }
        return {
            "settings": dict(self._settings),
            "kept": {
                name: stays.nonzero()[:, 0].tolist() for name, stays in self._kept(masks).items()
            },
            "tensors": tensors,
            "set_anew": sorted(
                self.source.stored_parts(one.consumer.parameter)[0]
                for one in self._every.values()
                if self._values(self.journal.blocks)
            ),
        }
