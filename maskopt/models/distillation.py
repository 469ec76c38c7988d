"""`distill_model`: a folder that was pruned before, trained as a whole towards the dense model."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from maskopt.errors import DataError, ModelError
from maskopt.models.architecture.source import FolderSource
from maskopt.models.blockwise.job import Job, open_job
from maskopt.models.blockwise.memory import check_memory
from maskopt.models.calibration.tokens import tokens_or_tokenizer
from maskopt.models.checkpoints.checkpoint import Checkpoint, file_digest, write_file, write_json
from maskopt.models.checkpoints.result import (
    MaskFile,
    check_masks,
    copy_file,
    copy_side_files,
    disk_needed,
)
from maskopt.models.checkpoints.schema import MASKS
from maskopt.models.checkpoints.workspace import CARD, Workspace
from maskopt.models.options.walk import DistillOptions, options_by_name
from maskopt.models.pruning.run import Run, fingerprint_of
from maskopt.models.structured.change import folder_source
from maskopt.models.training.tasks import OnDistill, disk_of_training, open_teacher, train_whole
from maskopt.models.training.trainer import Losses, Trained

FORMAT = "maskopt-distill-1"
#: fingerprint, losses and digests of a result
RECORD = "maskopt-distill.json"
_NOTE = """

## Trained after pruning

The weights that the masks keep were trained together afterwards, towards the predictions of the dense
model (`maskopt distill`; `maskopt-distill.json` has the figures). What is said above of errors, and the
commands that make the same bytes, are of the model before that. `maskopt verify FOLDER --masks PRUNED`
holds the zeros of both against each other.
"""


@dataclass(frozen=True)
class Distilled(Trained):
    """The result of `distill_model`; losses are KL(dense ‖ pruned) of the next token, nats."""

    seconds: float
    output: Path


def distill_model(
    pruned: str | Path,
    teacher: str | Path,
    tokenizer_or_tokens: Any = None,
    options: DistillOptions | None = None,
    *,
    output: str | Path,
    calibration: Any = None,
    overwrite: bool = False,
    resume: bool = False,
    on_progress: OnDistill | None = None,
    **shorthand: Any,
) -> Distilled:
    """Train a pruned folder's kept weights until the model predicts what the dense one predicts.

    The pruned model is in memory as a whole: 33 bytes a weight of the layers with masks, 4 more per further
    thread, and what autograd keeps of a window per thread. The dense model is read block by block.

    Args:
        pruned: what `maskopt prune` wrote.
        teacher: folder of the dense model, or its name on the hub.
        tokenizer_or_tokens: as for `prune_model`, and so is `calibration`.
        output: folder for a copy of `pruned` with updated kept weights and `maskopt-distill.json`.
        resume: go on with an interrupted run of the same options, from its last save (`save_every`).

    Raises:
        MaskoptError: no masks, another teacher, unusable text or options, more than `max_memory` allows.
    """
    began = time.perf_counter()
    options = options_by_name(DistillOptions, options, shorthand)
    for model in (pruned, teacher):
        if not isinstance(model, str | Path):
            raise ModelError(
                f"distillation is of folders, not of a {type(model).__name__} in memory; save it first"
            )
    inputs: dict[str, Any] = {"model": pruned, "teacher": teacher, "calibration": calibration}
    run = Run(output, overwrite=overwrite, resume=resume, complete=RECORD, **inputs)
    text, tokenizer = tokens_or_tokenizer(tokenizer_or_tokens, calibration)
    if text is None:
        raise DataError("distillation needs `calibration` text or tokens; name a source of text")
    student = open_job(pruned, text, replace(options, max_memory=None), tokenizer=tokenizer)
    if options.max_memory is not None:
        load = replace(student.load, together=True, recompute=options.recompute)
        student.activation_memory = check_memory(load, int(options.max_memory))
    source, masks = _with_masks(student)
    dense = open_teacher(teacher, student, options)
    _check_same_model(folder_source(dense.source), source.checkpoint)
    taught_by = folder_source(dense.source).checkpoint
    run.reads(model=source.checkpoint, teacher=taught_by)
    fingerprint = {**fingerprint_of(student, options.record()), "teacher": taught_by.digest}
    if (record := run.finished(fingerprint)) is not None:
        return Distilled(**vars(_trained(run, record)), seconds=0.0, output=run.output)
    weights = sum(math.prod(masks.shape(name)) for name in masks.names)
    needed = disk_needed(source.checkpoint) + disk_of_training(weights, options)
    remedy = "; `save_every` 0 takes less, and cannot be resumed"
    with run.opened(needed, fingerprint, remedy) as work:
        how = (work, run.journal, run.check_models, on_progress or (lambda *_: None))
        trained, files = train_whole(student, dense, options, *how)
        _write(source.checkpoint, masks, files, trained, fingerprint, work)
    return Distilled(**vars(trained), seconds=time.perf_counter() - began, output=run.output)


def _trained(run: Run, record: Mapping[str, Any]) -> Trained:
    """What a complete run recorded."""
    try:
        before, after = (Losses(**record[name]) for name in ("before", "after"))
        return Trained(before, after, record["epoch"], record["diverged"])
    except (KeyError, TypeError):
        raise ModelError(
            f"{run.output / RECORD}: is damaged; start over with `overwrite`"
        ) from None


def _write(
    checkpoint: Checkpoint,
    masks: MaskFile,
    files: dict[str, str],
    trained: Trained,
    fingerprint: Mapping[str, Any],
    work: Workspace,
) -> None:
    """Write the rest of the folder whose shards are `files`, and move it into view."""
    staging = work.staging
    copy_side_files(checkpoint, staging)
    copy_file(masks.path, staging / MASKS)
    card = staging / CARD
    before = card.read_text(encoding="utf-8") if card.exists() else f"# {work.output.name}"
    # a folder that was trained in this way before holds the note already
    after = before if _NOTE.strip() in before else before.rstrip() + _NOTE
    write_file(card, [after.encode()])
    files |= {f.name: file_digest(f) for f in staging.iterdir() if f.name not in files}
    record = {"format": FORMAT, "fingerprint": fingerprint, **trained.record(), "files": files}
    write_json(staging / RECORD, record)
    work.commit()


def _with_masks(student: Job) -> tuple[FolderSource, MaskFile]:
    """The pruned folder's source, and its masks."""
    source = folder_source(student.source)
    folder = source.checkpoint.folder
    if not (folder / MASKS).is_file():
        raise ModelError(f"{folder}: holds no {MASKS}; name a folder that `maskopt prune` wrote")
    masks = MaskFile(folder / MASKS)
    check_masks(source.checkpoint, masks)
    if all(bool(masks.read(name).kept.all()) for name in masks.names):
        raise ModelError(f"{folder}: its masks prune nothing, so there is nothing to train")
    student.windows.check_targets()
    if not student.held:
        raise DataError("distillation needs windows that judge it: give a `holdout` such as 0.1")
    return source, masks


def _check_same_model(source: FolderSource, pruned: Checkpoint) -> None:
    """Raise ModelError unless both have the same tensors, and the same values of those outside the blocks."""
    dense = source.checkpoint
    why = f"{pruned.folder} was not made of {dense.folder}"
    for name in sorted({*dense.where} | {*pruned.where}):
        shapes = [c.entry(name).shape if name in c.where else None for c in (dense, pruned)]
        if shapes[0] != shapes[1]:
            raise ModelError(f"{why}: tensor {name!r} is in one of them only, or of other shapes")
    inside = {
        tensor
        for index, block in enumerate(source.blocks.modules)
        for name, _ in block.named_parameters()
        for tensor in source.conversion.sources(source.blocks.prefix(index) + name)
    }
    for name in sorted({*dense.where} - inside):
        if not torch.equal(dense.read(name), pruned.read(name)):
            raise ModelError(f"{why}: tensor {name!r} has other values, and no prune changes it")
