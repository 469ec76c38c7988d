"""A pruned model trained as a whole, its masks fixed, to predict what the dense model predicts.

    walk    the dense model, block by block: the states that leave its last block
    train   all kept weights together, by KL(dense ‖ pruned) of the next token (`training.trainer`)
    write   the pruned folder with the new weights

This is knowledge distillation (Hinton, Vinyals and Dean, arXiv 1503.02531) at temperature 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
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
from maskopt.models.checkpoints.journal import Journal
from maskopt.models.checkpoints.mask_file import MaskFile
from maskopt.models.checkpoints.unchanged import Unchanged
from maskopt.models.checkpoints.workspace import (
    MASKS,
    Workspace,
    check_inputs,
    check_output,
    open_workspace,
)
from maskopt.models.checkpoints.write import check_masks, disk_needed
from maskopt.models.distillation.output import RECORD, finished_result, write_distilled
from maskopt.models.evaluation.evaluate import check_targets, walk_whole
from maskopt.models.options.distill import DistillOptions
from maskopt.models.options.walk import WalkOptions, options_by_name
from maskopt.models.pruning.fingerprint import fingerprint_of
from maskopt.models.pruning.output import check_disk
from maskopt.models.structured.reduced import folder_source
from maskopt.models.training.trainer import BYTES, FolderKeeper, Task, Trained, train

#: called with what goes on, how much of it is done, and of how much
OnDistill = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Distilled(Trained):
    """What became of a model. Losses are KL(dense ‖ pruned) of the next token, nats, mean over targets; of as
    many of the fitted windows as were kept aside, and of those.

    Attributes:
        seconds: in all, the walk of the dense model and the writing included; 0 where all was done already.
    """

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
    a weight of the layers with masks on one thread, 4 more on each other one, and beside them what autograd
    keeps of a window on every thread. The dense model goes through block by block.

    Args:
        pruned: the folder that `maskopt prune` wrote; it is left as it is.
        teacher: the dense model's folder, or its name on the hub.
        tokenizer_or_tokens: as for `prune_model`.
        calibration: as for `prune_model`.
        options: how to train.
        output: folder of the result, a copy of `pruned` with other weights in the places that its masks keep,
            and `maskopt-distill.json`, which says how they came about.
        resume: go on with an interrupted run of the same options, from what it saved last (`save_every`).
        on_progress: called with what goes on, how much of it is done, and of how much.
        shorthand: single options by name, with or without `options`: `epochs=2, samples=64`.

    Raises:
        MaskoptError: no masks in the folder, or not a teacher of this model; text or options that cannot be
            used; more than `max_memory` allows.
    """
    began, target = time.perf_counter(), Path(output)
    if resume and overwrite:
        raise ModelError("`resume` goes on with what `overwrite` drops; choose one")
    options = options_by_name(DistillOptions, options, shorthand)
    tell = on_progress or (lambda what, done, total: None)
    for given in (pruned, teacher):
        if not isinstance(given, str | Path):
            raise ModelError(
                f"distillation is of folders, not of a {type(given).__name__} in memory; save it first"
            )
    text, tokenizer = tokens_or_tokenizer(tokenizer_or_tokens, calibration)
    if text is None:
        raise DataError("distillation needs `calibration` text or tokens; name a source of text")
    inputs: dict[str, Any] = {"model": pruned, "teacher": teacher, "calibration": calibration}
    check_output(target, overwrite=overwrite, resume=resume, complete=RECORD, **inputs)
    student = open_job(pruned, text, replace(options, max_memory=None), tokenizer=tokenizer)
    if options.max_memory is not None:
        load = replace(student.load, together=True, recompute=options.recompute)
        student.activation_memory = check_memory(load, int(options.max_memory))
    source, masks = _with_masks(student)
    dense = _teacher(teacher, student, options)
    taught_by = folder_source(dense.source).checkpoint
    check_inputs(target, model=source.checkpoint.folder, teacher=taught_by.folder)
    models = [Unchanged(checkpoint) for checkpoint in (source.checkpoint, taught_by)]
    fingerprint = {**fingerprint_of(student, options.record()), "teacher": taught_by.digest}
    if resume and (finished := finished_result(target, fingerprint)) is not None:
        return Distilled(**vars(finished), seconds=0.0, output=target)
    with open_workspace(target, overwrite=overwrite, resume=resume) as work:
        _check_disk(source, masks, options, work)
        journal = Journal(work.journal)
        journal.begin(fingerprint)
        keeper = FolderKeeper(work, journal, 60 * options.save_every, source.device)
        # the dense model's threads begin first, so that they end last
        with dense, student:
            walk_whole(dense, lambda done, total: tell("dense model", done, total))
            dense.source.drop()
            trained, layers = _train(student, dense, options, keeper, tell)
        for model in models:
            model.check()
        new = {layer.name: (layer, matrix(source.model, layer).cpu()) for layer in layers}
        write_distilled(source, masks, new, trained, fingerprint, work)
    return Distilled(**vars(trained), seconds=time.perf_counter() - began, output=target)


def _check_disk(
    source: FolderSource, masks: MaskFile, options: DistillOptions, work: Workspace
) -> None:
    """Raise ModelError where there is no room for the result, and twice for what `resume` goes on from."""
    needed = disk_needed(source.checkpoint, True)
    if options.save_every:
        needed += 2 * BYTES * sum(math.prod(masks.shape(name)) for name in masks.names)
    there = sum(file.stat().st_size for file in work.hidden.rglob("*") if file.is_file())
    check_disk(work.output, needed - there, "; `save_every` 0 takes less, and cannot be resumed")


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
    """The dense model with the same windows, ready for its walk.

    Raises:
        ModelError: the student was not made of it.
    """
    walk = WalkOptions(
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        activation_memory=student.activation_memory,
        trust_remote_code=options.trust_remote_code,
    )
    dense = open_job(teacher, student.windows, walk, whole=True)
    source, own = folder_source(dense.source), folder_source(student.source)
    _check_alike(source, own)
    return dense


def _check_alike(source: FolderSource, own: FolderSource) -> None:
    """Raise ModelError unless both have the same tensors, and the same values of those outside the blocks."""
    dense, pruned = source.checkpoint, own.checkpoint
    why = f"{pruned.folder} was not made of {dense.folder}"
    for name in sorted({*dense.where} | {*pruned.where}):
        shapes = [c.entry(name).shape if name in c.where else None for c in (dense, pruned)]
        if shapes[0] != shapes[1]:
            raise ModelError(f"{why}: tensor {name!r} is in one of them only, or of other shapes")
    blocks = source.blocks
    inside = {
        tensor
        for index, block in enumerate(blocks.modules)
        for name, _ in block.named_parameters()
        for tensor in source.stored_parts(blocks.prefix(index) + name)
    }
    for name in sorted({*dense.where} - inside):
        if not torch.equal(dense.read(name), pruned.read(name)):
            raise ModelError(f"{why}: tensor {name!r} has other values, and no prune changes it")


def _train(
    student: Job, dense: Job, options: DistillOptions, keeper: FolderKeeper, tell: OnDistill
) -> tuple[Trained, list[Layer]]:
    """Train the student in memory; the layers that may have changed."""
    source = folder_source(student.source)
    aside = held_out(student.count, options.holdout)
    fitted = [window for window in range(student.count) if window not in aside]
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
            sorted(aside),
            # passes of all windows would take nearly as long as an epoch
            reported=fitted[: len(aside)],
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
    """Layers of which something is pruned, and their masks, [rows, n], by name: what an exclusion left as it
    was stays so.

    Raises:
        ModelError: weights in pruned places that are not zero.
    """
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
