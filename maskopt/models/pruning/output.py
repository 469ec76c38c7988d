"""Where the result of a prune goes: into memory, or block by block into a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskopt.core.files import check_writable
from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer
from maskopt.models.architecture.source import FolderSource
from maskopt.models.blockwise.collect import Grams
from maskopt.models.blockwise.forward import BlockProgress
from maskopt.models.blockwise.job import Block, Job, open_job
from maskopt.models.calibration.tokens import Windows
from maskopt.models.checkpoints.checkpoint import open_checkpoint, write_file, write_tensors
from maskopt.models.checkpoints.report import (
    FinishedBlock,
    LayerReport,
    PruneReport,
    TrainedBlock,
    read_reports,
)
from maskopt.models.checkpoints.result import (
    Edits,
    MaskFile,
    TensorMask,
    bases_digest,
    bases_file,
    check_masks,
    copy_side_files,
    disk_needed,
    join_masks,
    side_files,
    write_masks,
    write_shard,
    write_windows_file,
)
from maskopt.models.checkpoints.schema import BASES, MASKS, PRUNE, WRITTEN, file_digest
from maskopt.models.checkpoints.workspace import plain_errors
from maskopt.models.options.prune import NONE, PruneOptions
from maskopt.models.pruning.gram_store import StoredBlock
from maskopt.models.pruning.run import Run, peaks
from maskopt.models.training.tasks import disk_of_training, open_teacher, train_whole

#: lists the files of a folder that `apply_masks` wrote
APPLIED = "maskopt-apply.json"

#: tensors of layers, [rows, n], by their names
LayerTensors = dict[str, tuple[Layer, Tensor]]
#: report, mask [rows, n], and float64 [rows, n] of weights that were updated
LayerResult = tuple[Layer, LayerReport, Tensor, Tensor | None]


@dataclass
class BlockResult:
    """What was found of a block: masks, updated weights (float64, zero where pruned), and trained norms and
    biases by the tensor's name, in the stored dtype."""

    reports: dict[str, LayerReport] = field(default_factory=dict)
    masks: LayerTensors = field(default_factory=dict)
    weights: LayerTensors = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    trained: list[TrainedBlock] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        block: Block | StoredBlock,
        solve: Callable[[Sequence[Layer], Grams], Iterator[LayerResult]],
    ) -> BlockResult:
        """Solve the layers of a block, round by round."""
        found = cls()
        for layers, grams in block.rounds():
            tick = block.ticker("solve", len(layers))
            for layer, report, mask, new in solve(layers, grams):
                found.reports[layer.name], found.masks[layer.name] = report, (layer, mask)
                if new is not None:
                    found.weights[layer.name] = layer, new
                tick(1, report)
            del grams  # the next pass needs their memory
        return found


class Results:
    """The results of a run by block; `masks` are bool [rows, n] by layer, of a model in memory."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.blocks: dict[int, FinishedBlock] = {}
        self.masks: dict[str, Tensor] = {}
        self.losses: dict[str, Any] | None = None
        self.output: Path | None = None

    @contextmanager
    def opened(self, _fingerprint: Mapping[str, Any]) -> Iterator[Path]:
        """Begin the run or go on with it; yields the folder for hidden states."""
        yield Path(tempfile.gettempdir())

    def keep(self, block: Block | StoredBlock, found: BlockResult) -> None:
        """Send the samples through the block as it is now, and record what was found of it."""
        block.advance()
        names = [layer.name for layer in block.layers]
        bad = [asdict(sample) for sample in block.bad]
        done = FinishedBlock([found.reports[name] for name in names], found.trained, bad)
        self.blocks[block.index] = done
        found.masks = {name: found.masks[name] for name in names}
        self.job.ranks.agreed(lambda: self._add(block.index, done, found))

    def _add(self, _index: int, _done: FinishedBlock, found: BlockResult) -> None:
        self.masks |= {name: mask for name, (_, mask) in found.masks.items()}

    def finish(self, report: PruneReport) -> None:
        """Write the rest of the pruned folder, if it is one, and move it into view."""

    def report(self, fingerprint: Mapping[str, Any], kind: str = PRUNE) -> PruneReport:
        """The report of all blocks, in the order of the model."""
        done = [self.blocks[index] for index in sorted(self.blocks)]
        return PruneReport(
            [layer for block in done for layer in block.layers],
            fingerprint,
            [sample for block in done for sample in block.bad],
            self.masks,
            self.output,
            trained=[one for block in done for one in block.trained],
            memory=peaks(self.job.source.device),
            distillation=self.losses,
            kind=kind,
        )


class FolderResults(Results):
    """Masks go to disk block by block, with a journal; a shard is written once all its masks are, unless the
    caller writes `shards`."""

    def __init__(self, job: Job, run: Run, *, shards: bool = True) -> None:
        super().__init__(job)
        source = job.source
        assert isinstance(source, FolderSource)
        self._run, self._source, self._shards = run, source, shards
        self.output = run.output
        self._distilled: dict[str, str] = {}
        #: windows that the model wrote, by their use
        self.written: dict[str, Tensor] = {}
        self._block_of = {
            t: layer.block
            for layer in job.layers
            for t in source.conversion.sources(layer.parameter)
        }
        for block in {layer.block for layer in job.layers}:
            self._block_of |= {name: block for name, _ in source.vectors(block).values()}
        run.reads(model=source.checkpoint)

    @contextmanager
    def opened(self, fingerprint: Mapping[str, Any]) -> Iterator[Path]:
        updated = fingerprint["options"]["update"] != NONE
        needed = disk_needed(self._source.checkpoint, updated)
        if isinstance(options := self.job.options, PruneOptions) and options.distilled is not None:
            weights = sum(layer.rows * layer.n for layer in self.job.layers)
            needed += disk_of_training(weights, options.distilled)
        with self._run.opened(needed, fingerprint) as work:
            self._run.ranks.agreed(self._check_blocks)
            if (bases := self._source.checkpoint.bases) and self._run.ranks.leads:
                write_file(work.staging / BASES, [bases_file(bases)])
            if self.written and self._run.ranks.leads:
                write_windows_file(work.staging / WRITTEN, self.written)
            self.blocks = self.stored_blocks()
            yield work.hidden

    def _check_blocks(self) -> None:
        journal = self._run.journal
        for index, record in journal.blocks.items():
            for kind in ("masks", "weights"):
                path = self._path(index, kind)
                if kind in record and (not path.exists() or file_digest(path) != record[kind]):
                    raise ModelError(
                        f"{path}: does not match the journal: it was changed; start over with `overwrite`"
                    )
        for name, digest in list(journal.shards.items()):
            if not self._holds(name, digest):
                del journal.shards[name]  # it is written again, from the masks

    def _holds(self, shard: str, digest: str) -> bool:
        """Whether a finished shard is still there unchanged. A commit may have moved it already."""
        for folder in (self._run.work.staging, self._run.output):
            if shard in self._source.checkpoint.shards and (folder / shard).is_file():
                return file_digest(folder / shard) == digest
        return False

    def _add(self, index: int, done: FinishedBlock, found: BlockResult) -> None:
        """Write what was found of a block, and the shards that are complete with it."""
        self._run.check_models()
        masks = self._source.stored(found.masks)
        digests = {"masks": write_masks(self._path(index, "masks"), masks)}
        if found.weights or found.vectors:
            values = {**self._source.stored_values(found.weights), **found.vectors}
            digests["weights"] = write_tensors(self._path(index, "weights"), values)
        self._run.work.keep = True  # from the moment that the journal may hold the block
        reports = {name: list(map(asdict, getattr(done, name))) for name in ("layers", "trained")}
        self._run.journal.add("block", index=index, **digests, **reports, bad=list(done.bad))
        if self._shards:
            self.write_shards()

    def write_shards(self) -> Mapping[str, str]:
        """Write the shards that only tensors of finished blocks lie in, once; SHA-256 of all written ones."""
        journal, checkpoint = self._run.journal, self._source.checkpoint
        edits = self.edits()
        for name, shard in checkpoint.shards.items():
            blocks = {self._block_of[t] for t in shard.entries if t in self._block_of}
            if name not in journal.shards and blocks <= journal.blocks.keys():
                path = self._run.work.staging / name
                digest = write_shard(checkpoint, name, path, edits)
                self._run.check_models()
                journal.add("shard", name=name, digest=digest)
        return journal.shards

    def join_masks(self) -> str:
        """Stage the masks of all blocks in one file; its SHA-256."""
        path = self._run.work.staging / MASKS
        parts = [self._path(i, "masks") for i in sorted(self._run.journal.blocks)]
        bases = self._source.checkpoint.bases
        digest = join_masks(path, parts, bases_digest(bases) if bases else None)
        check_masks(self._source.checkpoint, MaskFile(path))
        return digest

    def distil(self, windows: Windows) -> None:
        """Train all kept weights of the staged model together, and write its shards again."""
        job, run, tell = self.job, self._run, self.job.tell
        assert isinstance(job.options, PruneOptions)
        options = job.options.distilled
        assert options is not None
        self.join_masks()
        self.write_shards()
        copy_side_files(self._source.checkpoint, run.work.staging)
        blocks = len(job.source.blocks)
        job.source.drop()

        def on_stage(what: str, done: int, total: int) -> None:
            tell(BlockProgress(blocks, blocks, f"distillation, {what}", done, total))

        student = open_job(run.work.staging, windows, replace(options.walk, max_memory=None))
        dense = open_teacher(self._source.checkpoint.folder, student, options)
        how = (run.work, run.journal, run.check_models, on_stage)
        trained, self._distilled = train_whole(student, dense, options, *how)
        self.losses = trained.record()

    def finish(self, report: PruneReport) -> None:
        files = {MASKS: self.join_masks(), **self.write_shards(), **self._distilled}
        if bases := self._source.checkpoint.bases:
            files[BASES] = bases_digest(bases)
        if self.written:
            files[WRITTEN] = file_digest(self._run.work.staging / WRITTEN)
        self._run.finish(report, files)

    def stored_blocks(self) -> dict[int, FinishedBlock]:
        """All finished blocks in the journal, with the edits of their tensors."""
        found = {}
        for index, record in self._run.journal.blocks.items():
            if index <= self.job.last:
                layers = read_reports(LayerReport, record["layers"])
                trained = read_reports(TrainedBlock, record.get("trained", []))
                edits = self.edits([index])
                found[index] = FinishedBlock(layers, trained, record["bad"], edits)
        return found

    def edits(self, indices: Sequence[int] | None = None) -> Edits:
        """Masks and new weights of finished blocks; None: of all."""
        records = self._run.journal.blocks
        blocks = list(records) if indices is None else indices
        masks = [self._path(index, "masks") for index in blocks]
        values = [self._path(index, "weights") for index in blocks if "weights" in records[index]]
        return Edits.of(masks, values)

    def _path(self, index: int, kind: str) -> Path:
        """Of a block's `masks` or `weights`."""
        name = f"{index:05d}{'.weights' * (kind == 'weights')}.safetensors"
        return self._run.work.blocks / name


def apply_masks(
    model: str | Path, masks: str | Path, output: str | Path, *, overwrite: bool = False
) -> Path:
    """Copy a model folder with masked entries set to zero; ModelError for masks of another model."""
    checkpoint = open_checkpoint(model)
    run = Run(output, overwrite=overwrite, model=model, mask_file=masks)
    file = MaskFile(Path(masks))
    if file.bases is not None:
        raise ModelError(
            f"{masks}: are masks of the model in other bases (`transform`), and would remove other "
            "weights of this one; copy the pruned folder"
        )
    check_masks(checkpoint, file)
    side_files(checkpoint.folder, checkpoint.shards)  # refuses links before anything is written
    with run.opened(disk_needed(checkpoint)) as work:
        join_masks(work.staging / MASKS, [Path(masks)])
        for shard in checkpoint.shards:
            write_shard(checkpoint, shard, work.staging / shard, Edits.of([file.path]))
        copy_side_files(checkpoint, work.staging)
        work.write_record(APPLIED)
        work.commit()
    return run.output


def extract_masks(
    model: str | Path, output: str | Path, *, overwrite: bool = False
) -> dict[str, float]:
    """Write the nonzero pattern of the linear layers as a mask file; returns the share of zeros by tensor."""
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
                for name, mask in source.stored(whole).items()
            }
            sparsities |= {name: 1 - float(m.kept.float().mean()) for name, m in masks.items()}
            files.append(Path(parts) / f"{index:05d}.safetensors")
            write_masks(files[-1], masks)
        join_masks(path, files)
    return sparsities
