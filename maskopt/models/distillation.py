"""Training of a pruned or smaller model folder as a whole towards the dense model."""

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
from maskopt.models.calibration.tokens import SELF, tokens_or_tokenizer
from maskopt.models.checkpoints.checkpoint import Checkpoint, damage, write_file, write_json
from maskopt.models.checkpoints.report import PruneReport
from maskopt.models.checkpoints.result import (
    MaskFile,
    check_masks,
    copy_file,
    copy_side_files,
    disk_needed,
)
from maskopt.models.checkpoints.schema import MANIFEST, MASKS, file_digest, read_manifest
from maskopt.models.checkpoints.workspace import CARD, Workspace
from maskopt.models.options.walk import DistillOptions, options_by_name
from maskopt.models.pruning.run import Run, fingerprint_of, peaks
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
    """The result of `distill_model`; losses are KL(dense ‖ student) of the next token, nats."""

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
    """Train a pruned or smaller folder until it predicts what the dense model predicts.

    Kept weights are trained if the folder has masks. All weights of the blocks are trained if
    structures were removed. The student is in memory as a whole: 33 bytes a trained weight, 4 more
    per further thread, and what autograd keeps of a window per thread. The dense model is read
    block by block.

    Args:
        pruned: what `maskopt prune` or `maskopt prune-structured` wrote.
        teacher: folder of the dense model, or its name on the hub.
        tokenizer_or_tokens: as for `prune_model`, and so is `calibration`.
        output: folder for a copy of `pruned` with updated weights. Beside masks it holds
            `maskopt-distill.json`; the manifest of a smaller model holds the figures itself.
        resume: go on with an interrupted run of the same options, from its last save (`save_every`).

    Raises:
        MaskoptError: no masks and no smaller model, another teacher, unusable text or options, more
            than `max_memory` allows.
    """
    began = time.perf_counter()
    options = options_by_name(DistillOptions, options, shorthand)
    for model in (pruned, teacher):
        if not isinstance(model, str | Path):
            raise ModelError(
                f"distillation is of folders, not of a {type(model).__name__} in memory; save it first"
            )
    has_masks = (Path(pruned) / MASKS).is_file()
    inputs: dict[str, Any] = {"model": pruned, "teacher": teacher, "calibration": calibration}
    complete = RECORD if has_masks else MANIFEST
    run = Run(output, overwrite=overwrite, resume=resume, complete=complete, **inputs)
    student = _open_student(pruned, teacher, tokenizer_or_tokens, calibration, options)
    source = folder_source(student.source)
    checkpoint = source.checkpoint
    masks = _masks(checkpoint) if has_masks else None
    manifest = None if has_masks else _smaller_manifest(checkpoint)
    dense = open_teacher(teacher, student, options)
    _check_same_model(folder_source(dense.source), source, same_shapes=has_masks)
    taught_by = folder_source(dense.source).checkpoint
    run.reads(model=checkpoint, teacher=taught_by)
    fingerprint = {**fingerprint_of(student, options.record()), "teacher": taught_by.digest}
    if manifest is not None:
        fingerprint = {**manifest["fingerprint"], "distillation": fingerprint}
    if (record := run.finished(fingerprint)) is not None:
        return Distilled(**vars(_trained(run, record)), seconds=0.0, output=run.output)
    needed = disk_needed(checkpoint) + disk_of_training(_trained_weights(source, masks), options)
    remedy = "; `save_every` 0 takes less, and cannot be resumed"
    with run.opened(needed, fingerprint, remedy) as work:
        tell = on_progress or (lambda *_: None)
        trained, files = train_whole(
            student, dense, options, work, run.journal, run.check_models, tell
        )
        if masks is not None:
            _write(checkpoint, masks, files, trained, fingerprint, work)
        elif manifest is not None:
            _write_smaller(run, source, manifest, files, trained, fingerprint)
    return Distilled(**vars(trained), seconds=time.perf_counter() - began, output=run.output)


def _open_student(
    pruned: str | Path,
    teacher: str | Path,
    tokenizer_or_tokens: Any,
    calibration: Any,
    options: DistillOptions,
) -> Job:
    """Open the folder and its text; MaskoptError where it cannot be trained on that, or in that memory."""
    text, tokenizer = tokens_or_tokenizer(tokenizer_or_tokens, calibration)
    if text is None:
        raise DataError("distillation needs `calibration` text or tokens; name a source of text")
    walk = replace(options.walk, max_memory=None)
    if text == SELF or isinstance(text, Mapping):  # the teacher writes, not its student
        text = open_job(teacher, text, walk, tokenizer=tokenizer).windows
    student = open_job(pruned, text, walk, tokenizer=tokenizer)
    if options.max_memory is not None:
        load = replace(student.load, together=True, recompute=options.recompute)
        student.activation_memory = check_memory(load, int(options.max_memory))
    student.windows.check_targets()
    if not student.held:
        raise DataError("distillation needs windows that judge it: give a `holdout` such as 0.1")
    return student


def _trained_weights(source: FolderSource, masks: MaskFile | None) -> int:
    """Return an upper bound of the number of weights that are trained."""
    if masks is not None:
        return sum(math.prod(masks.shape(name)) for name in masks.names)
    return sum(source.model.get_parameter(name).numel() for name in source.blocks.inside())


def _trained(run: Run, record: Mapping[str, Any]) -> Trained:
    """Return the losses that a complete run recorded."""
    figures = record if run.complete == RECORD else record["distillation"]
    try:
        before, after = (Losses(**figures[name]) for name in ("before", "after"))
        return Trained(before, after, figures["epoch"], figures["diverged"])
    except (KeyError, TypeError):
        raise ModelError(
            f"{run.output / run.complete}: is damaged; start over with `overwrite`"
        ) from None


def _write_smaller(
    run: Run,
    source: FolderSource,
    manifest: Mapping[str, Any],
    files: Mapping[str, str],
    trained: Trained,
    fingerprint: Mapping[str, Any],
) -> None:
    """Write the rest of a smaller folder whose shards are `files`, and move it into view."""
    shrunk = manifest["shrunk"]
    if trained.epoch:
        inside = source.conversion.needed(source.blocks.inside())
        shrunk = {**shrunk, "updated": sorted({*shrunk["updated"], *inside})}
    report = PruneReport.of(
        manifest,
        run.output,
        fingerprint=fingerprint,
        memory=peaks(source.device),
        distillation=trained.record(),
    )
    run.finish(report, files, shrunk=shrunk)


def _write(
    checkpoint: Checkpoint,
    masks: MaskFile,
    files: dict[str, str],
    trained: Trained,
    fingerprint: Mapping[str, Any],
    work: Workspace,
) -> None:
    """Write the rest of a masked folder whose shards are `files`, and move it into view."""
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


def _masks(checkpoint: Checkpoint) -> MaskFile:
    """Return the masks of a pruned folder; ModelError where they do not fit or prune nothing."""
    masks = MaskFile(checkpoint.folder / MASKS)
    check_masks(checkpoint, masks)
    if all(bool(masks.read(name).kept.all()) for name in masks.names):
        raise ModelError(
            f"{checkpoint.folder}: its masks prune nothing, so there is nothing to train"
        )
    return masks


def _smaller_manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the manifest of a smaller folder; ModelError where it is missing or does not match."""
    folder = checkpoint.folder
    if not (folder / MANIFEST).is_file():
        raise ModelError(
            f"{folder}: holds no {MASKS} and no {MANIFEST}; name a folder that `maskopt prune` or "
            "`maskopt prune-structured` wrote"
        )
    manifest = read_manifest(folder / MANIFEST, smaller=True)
    if fault := damage(folder, manifest["files"]):
        raise ModelError(f"{folder}: is not what its manifest describes: {fault}")
    return manifest


def _check_same_model(teacher: FolderSource, student: FolderSource, *, same_shapes: bool) -> None:
    """Raise ModelError unless both have the same tensors outside the blocks.

    With `same_shapes` those of the blocks must have the same names and shapes, too.
    """
    dense, trained = teacher.checkpoint, student.checkpoint
    why = f"{trained.folder} was not made of {dense.folder}"
    inside: set[str] = set()
    for source in (teacher, student):
        # Blocks that are removed take their buffers along; a prune changes none.
        named = dict(source.model.named_parameters()) if same_shapes else source.model.state_dict()
        of_blocks = [name for name in named if name.startswith(f"{source.blocks.name}.")]
        inside.update(source.conversion.needed(of_blocks))
    for name in sorted({*dense.where} | {*trained.where}):
        if name in inside and not same_shapes:
            continue
        shapes = [c.entry(name).shape if name in c.where else None for c in (dense, trained)]
        if shapes[0] != shapes[1]:
            raise ModelError(f"{why}: tensor {name!r} is in one of them only, or of other shapes")
        if name not in inside and not torch.equal(dense.read(name), trained.read(name)):
            raise ModelError(f"{why}: tensor {name!r} has other values, and no prune changes it")
