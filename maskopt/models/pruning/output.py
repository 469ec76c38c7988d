"""Where the result of a prune goes: into the model in memory, or block by block into a folder."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskopt.core.files import check_writable
from maskopt.core.pattern import Pattern, pattern_to_dict
from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer
from maskopt.models.architecture.source import FolderSource, Source
from maskopt.models.blockwise.distributed import ALONE, Ranks
from maskopt.models.checkpoints.checkpoint import damage, file_digest, open_checkpoint
from maskopt.models.checkpoints.journal import Journal, differences, in_words
from maskopt.models.checkpoints.mask_file import (
    MaskFile,
    MaskFiles,
    TensorMask,
    join_masks,
    write_masks,
)
from maskopt.models.checkpoints.report import (
    FinishedBlock,
    LayerReport,
    PartReport,
    PruneReport,
    read_layers,
    read_manifest,
    read_parts,
    write_manifest,
)
from maskopt.models.checkpoints.unchanged import Unchanged
from maskopt.models.checkpoints.weight_edits import Edits, write_values
from maskopt.models.checkpoints.workspace import (
    CARD,
    GONE,
    HIDDEN,
    JOURNAL,
    MANIFEST,
    MASKS,
    Workspace,
    check_inputs,
    check_output,
    open_workspace,
    plain_errors,
)
from maskopt.models.checkpoints.write import (
    check_masks,
    copy_side_files,
    disk_needed,
    side_files,
    write_shard,
)
from maskopt.models.options.prune import NONE
from maskopt.models.pruning.card import hub_name, write_card

#: lists the files of a folder that `apply_masks` wrote
APPLIED = "maskopt-apply.json"


class FolderRun:
    """Masks go to disk block by block, with a journal; a shard is written once all its masks are.

    Of several processes rank 0 writes, into a folder that all of them read.
    """

    def __init__(
        self,
        source: FolderSource,
        layers: Sequence[Layer],
        output: Path,
        *,
        overwrite: bool,
        resume: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        self.source, self.output, self.ranks = source, output, ranks
        self._block_of = {
            t: layer.block for layer in layers for t in source.stored_parts(layer.parameter)
        }
        for block in {layer.block for layer in layers}:
            self._block_of |= {name: block for name, _ in source.vectors(block).values()}
        self.overwrite, self.resume = overwrite, resume
        self.masks: dict[str, Tensor] = {}
        self.work: Workspace
        self.journal: Journal
        check_inputs(output, model=source.checkpoint.folder)
        ranks.agreed(lambda: check_output(output, overwrite=overwrite, resume=resume))
        self.model = Unchanged(source.checkpoint)

    @contextmanager
    def opened(self, fingerprint: Mapping[str, Any]) -> Iterator[None]:
        if self.ranks.leads:
            with self._opened(fingerprint):
                self.ranks.agreed(lambda: None)
                yield
            return
        self.ranks.agreed(lambda: None)  # from here on there is a journal
        self.work = Workspace(self.output)
        self.journal = Journal(self.work.journal)
        yield

    @contextmanager
    def _opened(self, fingerprint: Mapping[str, Any]) -> Iterator[None]:
        with open_workspace(self.output, overwrite=self.overwrite, resume=self.resume) as work:
            self.work = work
            there = sum(file.stat().st_size for file in work.hidden.rglob("*") if file.is_file())
            anew = fingerprint["options"]["update"] != NONE
            check_disk(work.output, disk_needed(self.source.checkpoint, anew) - there)
            self.journal = Journal(work.journal)
            self.journal.begin(dict(fingerprint))
            for index, record in self.journal.blocks.items():
                for kind in ("masks", "weights"):
                    path = self._path(index, kind)
                    if kind in record and (not path.exists() or file_digest(path) != record[kind]):
                        raise ModelError(
                            f"{path}: does not match the journal: it was changed; start over with "
                            "`overwrite`"
                        )
            for name, digest in list(self.journal.shards.items()):
                if not self._holds(name, digest):
                    del self.journal.shards[name]  # it is written again, from the masks
            yield

    def _holds(self, shard: str, digest: str) -> bool:
        """Is a finished shard still there as it was written? A commit may have moved it already."""
        for folder in (self.work.staging, self.output):
            if shard in self.source.checkpoint.shards and (folder / shard).is_file():
                return file_digest(folder / shard) == digest
        return False

    def activation_folder(self) -> Path:
        return self.work.hidden

    def done(self, index: int) -> FinishedBlock | None:
        record = self.journal.blocks.get(index)
        if record is None:
            return None
        layers = read_layers(record["layers"], self.work.journal)
        parts = read_parts(record.get("parts", []), self.work.journal)
        edits = Edits.of(MaskFile(self._path(index, "masks")), self._values([index]))
        return FinishedBlock(layers, parts, record["bad"], edits)

    def add(
        self,
        index: int,
        layers: Sequence[LayerReport],
        parts: Sequence[PartReport],
        bad: Sequence[dict[str, Any]],
        masks: Mapping[str, tuple[Layer, Tensor]],
        weights: Mapping[str, tuple[Layer, Tensor]],
        vectors: Mapping[str, Tensor],
    ) -> None:
        """Keep what was found of a block.

        Args:
            masks: bool [rows, n] by name, True = kept.
            weights: float64 [rows, n] of those that were refitted or trained, zero where pruned.
            vectors: norms and biases that were trained, by the tensor's name, as it is stored.
        """
        self.model.check()
        path = self._path(index, "masks")
        write_masks(path, self.source.stored(index, masks))
        digests = {"masks": file_digest(path)}
        if weights or vectors:
            path = self._path(index, "weights")
            write_values(path, {**self.source.stored_values(weights), **vectors})
            digests["weights"] = file_digest(path)
        self.work.keep = True  # from the moment that the journal may hold the block
        self.journal.add_block(
            index,
            {
                **digests,
                "layers": [dataclasses.asdict(layer) for layer in layers],
                "parts": [dataclasses.asdict(part) for part in parts],
                "bad": list(bad),
            },
        )
        self._write_finished_shards()

    def finish(self, report: PruneReport, pattern: Pattern) -> None:
        work, checkpoint = self.work, self.source.checkpoint
        parts = [self._path(index, "masks") for index in sorted(self.journal.blocks)]
        join_masks(work.staging / MASKS, parts)
        masks = MaskFile(work.staging / MASKS)
        check_masks(checkpoint, masks)
        files = {MASKS: file_digest(work.staging / MASKS)}
        self._write_finished_shards()
        files.update(self.journal.shards)
        beside = copy_side_files(checkpoint, work.staging)
        home = checkpoint.folder
        for name in write_card(work.staging, report, hub_name(home), home.name, beside):
            files[name] = file_digest(work.staging / name)
        self.model.check()
        write_manifest(work.staging / MANIFEST, report, files, _tensors(masks, pattern))
        work.commit()

    def _write_finished_shards(self) -> None:
        """Write the shards that only tensors of finished blocks lie in, once."""
        masks = MaskFiles(self._path(index, "masks") for index in self.journal.blocks)
        edits = Edits.of(masks, self._values(self.journal.blocks))
        for name, shard in self.source.checkpoint.shards.items():
            blocks = {self._block_of[t] for t in shard.entries if t in self._block_of}
            waiting = not blocks <= self.journal.blocks.keys()
            if name not in self.journal.shards and not waiting:
                digest = self._write_shard(name, edits)
                self.model.check()
                self.journal.add_shard(name, digest)

    def _write_shard(self, name: str, edits: Edits) -> str:
        """One shard of the result; its digest."""
        return write_shard(self.source.checkpoint, name, edits, self.work.staging / name)

    def _values(self, blocks: Iterable[int]) -> list[Path]:
        """Files of new weights of those blocks that have any."""
        return [self._path(i, "weights") for i in blocks if "weights" in self.journal.blocks[i]]

    def _path(self, index: int, kind: str) -> Path:
        """Of a block's `masks` or `weights`."""
        return self.work.blocks / f"{index:05d}{'.weights' * (kind == 'weights')}.safetensors"


class MemoryRun:
    """Masks are kept in memory; where a folder is asked for, the model is saved at the end."""

    def __init__(
        self, source: Source, output: Path | None, tokenizer: Any, overwrite: bool
    ) -> None:
        self.source, self.output, self.tokenizer = source, output, tokenizer
        self.overwrite = overwrite
        self.masks: dict[str, Tensor] = {}
        self.work: Workspace | None = None
        self._stored: dict[str, TensorMask] = {}
        if output is not None:
            check_output(output, overwrite=overwrite, resume=False)

    @contextmanager
    def opened(self, fingerprint: Mapping[str, Any]) -> Iterator[None]:
        if self.output is None:
            yield
            return
        with open_workspace(self.output, overwrite=self.overwrite, resume=False) as work:
            self.work = work
            yield

    def activation_folder(self) -> Path | None:
        return self.work.hidden if self.work is not None else Path(tempfile.gettempdir())

    def done(self, index: int) -> None:
        return None

    def add(
        self,
        index: int,
        layers: Sequence[LayerReport],
        parts: Sequence[PartReport],
        bad: Sequence[dict[str, Any]],
        masks: Mapping[str, tuple[Layer, Tensor]],
        weights: Mapping[str, tuple[Layer, Tensor]],
        vectors: Mapping[str, Tensor],
    ) -> None:
        self.masks.update({name: mask for name, (_, mask) in masks.items()})
        if self.work is not None:
            self._stored.update(self.source.stored(index, masks))

    def finish(self, report: PruneReport, pattern: Pattern) -> None:
        if self.work is None:
            return
        staging = self.work.staging
        from maskopt.models.architecture.transformers_adapter import quietly

        with quietly():
            self.source.model.save_pretrained(staging)  # type: ignore[operator]
            if self.tokenizer is not None and hasattr(self.tokenizer, "save_pretrained"):
                # templates with names of their own would take a folder of their own
                several = isinstance(getattr(self.tokenizer, "chat_template", None), dict)
                self.tokenizer.save_pretrained(staging, save_jinja_files=not several)
        write_masks(staging / MASKS, self._stored)
        masks = MaskFile(staging / MASKS)
        # of a model that runs already: nothing of its code is run here
        check_masks(open_checkpoint(staging, trust_remote_code=True), masks)
        named = getattr(getattr(self.source.model, "config", None), "_name_or_path", "")
        write_card(staging, report, hub_name(named), Path(named).name or "A model", [])
        listed = (file for file in sorted(staging.iterdir()) if file.name != CARD)
        files = {file.name: file_digest(file) for file in listed}
        write_manifest(staging / MANIFEST, report, files, _tensors(masks, pattern))
        self.work.commit()


#: takes the masks and the new weights of each block and, at the end, makes the result
Run = FolderRun | MemoryRun


def start_run(
    source: Source,
    layers: Sequence[Layer],
    output: Path | None,
    *,
    tokenizer: Any,
    overwrite: bool,
    resume: bool,
    ranks: Ranks,
) -> Run:
    """Where the masks of a prune go.

    Raises:
        ModelError: such a model cannot be written there, or not be resumed.
    """
    if isinstance(source, FolderSource):
        if output is None:
            raise ModelError("pruning a model folder needs an output folder: name `output`")
        return FolderRun(source, layers, output, overwrite=overwrite, resume=resume, ranks=ranks)
    if resume:
        raise ModelError("`resume` needs a model folder; a model in memory is pruned in one go")
    if ranks.size > 1:
        raise ModelError("several processes prune a model folder; save the model first")
    return MemoryRun(source, output, tokenizer, overwrite)


def finished_report(output: Path, fingerprint: Mapping[str, Any]) -> PruneReport | None:
    """The report of a run that is complete; None where there is something left to do.

    Raises:
        ModelError: it is complete, but another run than this one.
    """
    if (output / HIDDEN).exists() or not (output / MANIFEST).exists():
        return None
    manifest = read_manifest(output / MANIFEST, smaller=True)
    lines = differences(manifest["fingerprint"], dict(fingerprint))
    if lines:
        raise ModelError(
            f"{output}: holds the result of another run: {in_words(lines)}; `overwrite` replaces it"
        )
    if what := damage(output, manifest["files"]):
        raise ModelError(
            f"{output}: holds the result of this run, but {what}; `overwrite` writes it again"
        )
    shutil.rmtree(output / GONE, ignore_errors=True)
    layers = read_layers(manifest["layers"], output / MANIFEST)
    parts = read_parts(manifest.get("parts", []), output / MANIFEST)
    return PruneReport(layers, fingerprint, manifest["bad_samples"], {}, output, 0.0, parts)


def recorded_counts(output: Path, options: Mapping[str, Any]) -> dict[str, int] | None:
    """What each layer prunes in the run that a folder holds, finished or not; None where it holds no run.

    Args:
        options: of the run that is to go on, as they are recorded, without counts.

    Raises:
        ModelError: journal or manifest are damaged, or of a run with other options.
    """
    fingerprint = None
    if (output / HIDDEN / JOURNAL).exists():
        fingerprint = Journal(output / HIDDEN / JOURNAL).header
    elif (output / MANIFEST).exists():
        fingerprint = read_manifest(output / MANIFEST)["fingerprint"]
    if fingerprint is None:
        return None
    recorded = fingerprint["options"]
    apart = {"counts": None}
    lines = differences({**recorded, **apart}, {**options, **apart}, "options")
    if lines:
        what = "the unfinished part" if (output / HIDDEN / JOURNAL).exists() else "the result"
        raise ModelError(
            f"{output}: holds {what} of another run: {in_words(lines)}; `overwrite` replaces it"
        )
    return dict(recorded.get("counts", {}))


def apply_masks(
    model: str | Path, masks: str | Path, output: str | Path, *, overwrite: bool = False
) -> Path:
    """`maskopt masks apply`: a copy of a model folder with the masked entries set to zero.

    Raises:
        ModelError: the masks do not belong to the model, or were changed.
    """
    checkpoint, target = open_checkpoint(model), Path(output)
    check_output(target, overwrite=overwrite, resume=False, model=model, mask_file=masks)
    file = MaskFile(Path(masks))
    check_masks(checkpoint, file)
    side_files(checkpoint.folder, checkpoint.shards)  # refuses links before anything is written
    with open_workspace(target, overwrite=overwrite, resume=False) as work:
        check_disk(target, disk_needed(checkpoint))
        join_masks(work.staging / MASKS, [Path(masks)])
        for shard in checkpoint.shards:
            write_shard(checkpoint, shard, Edits(file), work.staging / shard)
        copy_side_files(checkpoint, work.staging)
        work.write_record(APPLIED)
        work.commit()
    return target


def extract_masks(
    model: str | Path, output: str | Path, *, overwrite: bool = False
) -> dict[str, float]:
    """`maskopt masks export`: what is not zero in the linear layers, as a mask file.

    Returns the share of zeros by tensor.
    """
    checkpoint, path = open_checkpoint(model), Path(output)
    check_writable(path, overwrite=overwrite)
    source = FolderSource(checkpoint, torch.device("cpu"), None)
    sparsities: dict[str, float] = {}
    with (
        plain_errors(path),
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".maskopt-") as parts,
    ):
        files = []
        for index in range(len(source.blocks)):
            whole = {
                layer.name: (layer, torch.ones(layer.rows, layer.n, dtype=torch.bool))
                for layer in source.blocks.layers(index)
            }
            masks = {
                name: TensorMask(checkpoint.read(name) != 0, mask.input_axis)
                for name, mask in source.stored(index, whole).items()
            }
            sparsities |= {name: 1 - float(m.kept.float().mean()) for name, m in masks.items()}
            files.append(Path(parts) / f"{index:05d}.safetensors")
            write_masks(files[-1], masks)
        join_masks(path, files)
    return sparsities


def check_disk(output: Path, needed: int, remedy: str = "") -> None:
    """Refuse what the disk cannot hold, with the numbers."""
    free = shutil.disk_usage(output).free
    if free < needed:
        raise ModelError(
            f"{output}: the result takes {needed / 2**30:.2f} GiB, "
            f"{free / 2**30:.2f} GiB are free on the disk{remedy}"
        )


def _tensors(masks: MaskFile, pattern: Pattern) -> dict[str, Any]:
    return {
        name: {"input_axis": masks.layout[name]["input_axis"], "pattern": pattern_to_dict(pattern)}
        for name in masks.names
    }
