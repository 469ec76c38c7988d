"""A pruned model trained as a whole, its masks fixed, to predict what the dense model predicts.

This is knowledge distillation (Hinton, Vinyals and Dean, arXiv 1503.02531) at temperature 1: one walk through
the dense model, then all kept weights trained together by KL(dense ‖ pruned) of the next token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskopt.errors import DataError, ModelError
from maskopt.models.architecture.blocks import Layer, matrix
from maskopt.models.architecture.loading import merged
from maskopt.models.architecture.source import FolderSource, layer_masks
from maskopt.models.blockwise.divergence import divergence_loss
from maskopt.models.blockwise.job import Job, open_job
from maskopt.models.blockwise.memory import check_memory
from maskopt.models.blockwise.windows import held_out, tokens_or_tokenizer
from maskopt.models.checkpoints.checkpoint import Checkpoint, file_digest, write_json
from maskopt.models.checkpoints.mask_file import Edits, MaskFile
from maskopt.models.checkpoints.safefile import write_file, write_tensors
from maskopt.models.checkpoints.workspace import CARD, MASKS, Workspace
from maskopt.models.checkpoints.write import (
    check_masks,
    copy_file,
    copy_side_files,
    disk_needed,
    write_shard,
)
from maskopt.models.evaluation.evaluate import check_targets, walk_whole
from maskopt.models.options.distill import DistillOptions
from maskopt.models.options.walk import WalkOptions, options_by_name
from maskopt.models.pruning.run import Run, fingerprint_of
from maskopt.models.structured.change import folder_source
from maskopt.models.training.trainer import (
    BYTES,
    FolderKeeper,
    Losses,
    Task,
    Trained,
    train,
)

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

#: called with the name of a stage, how much of it is done, and of how much
OnDistill = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Distilled(Trained):
    """The result of `distill_model`. Losses are KL(dense ‖ pruned) of the next token, nats, means over
    targets: of the held-out windows, and of as many fitted ones. `seconds` is 0 where all was done
    already."""

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

    The pruned model, its gradients and the optimiser's moments are in memory as a whole, in float32: 33 bytes
    a weight of the layers with masks on one thread, 4 more on each other one, and the window that autograd
    keeps on every thread. The dense model is read block by block.

    Args:
        pruned: the folder that `maskopt prune` wrote; it is not changed.
        teacher: the dense model's folder, or its name on the hub.
        tokenizer_or_tokens: as for `prune_model`.
        calibration: as for `prune_model`.
        options: how to train.
        output: folder of the result: a copy of `pruned` with updated kept weights, and the record
            `maskopt-distill.json`.
        resume: go on with an interrupted run of the same options, from its last save (`save_every`).
        on_progress: called with the name of a stage, how much of it is done, and of how much.
        shorthand: single options by name, with or without `options`: `epochs=2, samples=64`.

    Raises:
        MaskoptError: no masks in the folder, or another teacher; text or options that cannot be used; more
            than `max_memory` allows.
    """
    began = time.perf_counter()
    options = options_by_name(DistillOptions, options, shorthand)
    tell = on_progress or (lambda what, done, total: None)
    for given in (pruned, teacher):
        if not isinstance(given, str | Path):
            raise ModelError(
                f"distillation is of folders, not of a {type(given).__name__} in memory; save it first"
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
    dense = _teacher(teacher, student, options)
    taught_by = folder_source(dense.source).checkpoint
    run.reads(model=source.checkpoint, teacher=taught_by)
    fingerprint = {**fingerprint_of(student, options.record()), "teacher": taught_by.digest}
    if (record := run.finished(fingerprint)) is not None:
        return Distilled(**vars(_trained(run, record)), seconds=0.0, output=run.output)
    needed = disk_needed(source.checkpoint, True)
    if options.save_every:  # what `resume` goes on from, twice
        needed += 2 * BYTES * sum(math.prod(masks.shape(name)) for name in masks.names)
    remedy = "; `save_every` 0 takes less, and cannot be resumed"
    with run.opened(needed, fingerprint, remedy) as work:
        keeper = FolderKeeper(work, run.journal, 60 * options.save_every, source.device)
        # the dense model's threads begin first, so that they end last
        with dense, student:
            walk_whole(dense, lambda done, total: tell("dense model", done, total))
            dense.source.drop()
            trained, layers = _train(student, dense, options, keeper, tell)
        run.check_models()
        new = {layer.name: (layer, matrix(source.model, layer).cpu()) for layer in layers}
        _write(source, masks, new, trained, fingerprint, work)
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
    source: FolderSource,
    masks: MaskFile,
    new: Mapping[str, tuple[Layer, Tensor]],
    trained: Trained,
    fingerprint: Mapping[str, Any],
    work: Workspace,
) -> None:
    """Write the pruned folder with new weights [rows, n] of the layers with masks, and move it into view."""
    staging, checkpoint = work.staging, source.checkpoint
    values = work.blocks / "distilled.values"
    write_tensors(values, source.stored_values(new))
    edits = Edits.of(masks, [values])
    files = {
        shard: write_shard(checkpoint, shard, staging / shard, edits) for shard in checkpoint.shards
    }
    copy_side_files(checkpoint, staging)
    copy_file(masks.path, staging / MASKS)
    card = staging / CARD
    before = card.read_text(encoding="utf-8") if card.exists() else f"# {work.output.name}"
    # a folder that was trained in this way before holds the note already
    after = before if _NOTE.strip() in before else before.rstrip() + _NOTE
    write_file(card, [after.encode()])
    files |= {f.name: file_digest(f) for f in staging.iterdir() if f.name not in files}
    record = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "before": trained.before._asdict(),
        "after": trained.after._asdict(),
        "epoch": trained.epoch,
        "diverged": trained.diverged,
        "files": files,
    }
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
    assert student.windows is not None
    check_targets(student.windows)
    if not held_out(student.count, student.options.holdout):
        raise DataError("distillation needs windows that judge it: give a `holdout` such as 0.1")
    return source, masks


def _teacher(teacher: str | Path, student: Job, options: DistillOptions) -> Job:
    """The dense model with the same windows; ModelError where the student was not made of it."""
    same = ("device", "dtype", "threads", "trust_remote_code")
    walk = WalkOptions(
        activation_memory=student.activation_memory, **{n: getattr(options, n) for n in same}
    )
    dense = open_job(teacher, student.windows, walk, whole=True)
    _check_same_model(folder_source(dense.source), folder_source(student.source).checkpoint)
    return dense


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
        for tensor in source.stored_parts(source.blocks.prefix(index) + name)
    }
    for name in sorted({*dense.where} - inside):
        if not torch.equal(dense.read(name), pruned.read(name)):
            raise ModelError(f"{why}: tensor {name!r} has other values, and no prune changes it")


def _train(
    student: Job, dense: Job, options: DistillOptions, keeper: FolderKeeper, tell: OnDistill
) -> tuple[Trained, list[Layer]]:
    """Train the student in memory; also the layers that may have changed."""
    source = folder_source(student.source)
    held = held_out(student.count, options.holdout)
    fitted = [window for window in range(student.count) if window not in held]
    with (
        student.in_memory(recompute=options.recompute) as states,
        divergence_loss(student, dense, states) as loss,
    ):
        kept = _kept(source, options)
        free = {
            name: mask.to(source.device) for name, mask in merged(source.model, kept, False).items()
        }
        layers = [layer for layer, _ in kept.values()]
        stored = {layer.parameter: source.stored_dtype(layer) for layer in layers}
        task = Task(
            str(source.checkpoint.folder),
            "`maskopt eval` says whether it or the dense model does",
            source.model,
            free,
            stored,
            loss,
            fitted,
            sorted(held),
            # passes of all windows would take nearly as long as an epoch
            reported=fitted[: len(held)],
            how=options,
        )
        done, total = 0, options.epochs * len(fitted)

        def tick(windows: int) -> None:
            nonlocal done
            done += windows
            tell("train", done, total)

        generator = torch.Generator().manual_seed(options.seed)
        return train(task, student.pool, generator, tick, keeper), layers


def _kept(source: FolderSource, options: DistillOptions) -> dict[str, tuple[Layer, Tensor]]:
    """Layers that are pruned, and their masks [rows, n], by name; ModelError for pruned weights that are not
    zero."""
    checkpoint, kept = source.checkpoint, {}
    path, trust = checkpoint.folder / MASKS, options.trust_remote_code
    for layer, mask in layer_masks(checkpoint, path, trust_remote_code=trust):
        if bool((matrix(source.model, layer).cpu()[~mask] != 0).any()):
            raise ModelError(
                f"{checkpoint.folder}: layer {layer.name!r} holds weights that its mask prunes; "
                "`maskopt masks apply` the masks to it first"
            )
        if not bool(mask.all()):
            kept[layer.name] = layer, mask
    return kept
