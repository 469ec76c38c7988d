"""The last stage of a prune with `distillation`: all kept weights trained together.

By then the run's folder holds the pruned model, not yet in view; an interrupted run goes on there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from maskopt.errors import OptionError
from maskopt.models.architecture.source import FolderSource
from maskopt.models.blockwise.job import Job, open_job
from maskopt.models.blockwise.memory import check_memory
from maskopt.models.blockwise.progress import BlockProgress
from maskopt.models.blockwise.windows import check_targets, held_out, windows_of
from maskopt.models.calibration.tokens import Windows
from maskopt.models.checkpoints.write import write_shard
from maskopt.models.options.distill import DistillOptions
from maskopt.models.pruning.output import FolderResults
from maskopt.models.training.whole import open_teacher, train_whole


def distillation_windows(job: Job, text: Any, tokenizer: Any, options: DistillOptions) -> Windows:
    """The windows to train on. Raises MaskoptError, before anything is pruned: they or the model cannot be
    used, or it takes more than `max_memory`."""
    source = job.source
    if not isinstance(source, FolderSource):
        raise OptionError("`distillation` needs a model folder and an `output`; save the model")
    if source.checkpoint.config.get("auto_map"):
        raise OptionError(
            f"{source.checkpoint.folder}: config.json asks to run code that comes with the model (auto_map), "
            "which is not copied; leave out `distillation`, copy it to the result and run `maskopt distill`"
        )
    windows = windows_of(source, text, tokenizer, options, False, None)
    check_targets(windows)
    held_out(len(windows), options.holdout)
    if options.max_memory is not None:
        check_memory(replace(job.load, together=True), int(options.max_memory))
    return windows


def distil(results: FolderResults, windows: Windows, options: DistillOptions) -> None:
    """Train the pruned model that lies staged in the run's folder, and write its shards again."""
    job, run, folder = results.job, results.folder_run, results.stage()
    blocks = len(job.source.blocks)
    job.source.drop()

    def tell(what: str, done: int, total: int) -> None:
        job.tell(BlockProgress(blocks, blocks, f"distillation, {what}", done, total))

    student = open_job(folder, windows, replace(options, max_memory=None))
    assert job.source.checkpoint is not None
    dense = open_teacher(job.source.checkpoint.folder, student, options)
    trained, edits = train_whole(student, dense, options, run.work, run.journal, tell)
    pruned = student.source.checkpoint
    assert pruned is not None
    for name in pruned.shards:
        run.check_models()
        results.distilled[name] = write_shard(pruned, name, folder / name, edits)
    results.losses = {
        "before": trained.before._asdict(),
        "after": trained.after._asdict(),
        "epoch": trained.epoch,
        "diverged": trained.diverged,
    }
