"""A pruned model trained as a whole, its masks fixed, to predict what the dense model predicts.

This is knowledge distillation (Hinton, Vinyals and Dean, arXiv 1503.02531) at temperature 1: one walk through
the dense model, then all kept weights trained together by KL(dense ‖ pruned) of the next token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer, matrix, merged
from maskopt.models.architecture.source import FolderSource, layer_masks
from maskopt.models.blockwise.divergence import divergence_loss
from maskopt.models.blockwise.job import Job, open_job, walk_whole
from maskopt.models.blockwise.windows import held_out
from maskopt.models.checkpoints.checkpoint import write_tensors
from maskopt.models.checkpoints.result import Edits, write_shard
from maskopt.models.checkpoints.schema import MASKS
from maskopt.models.checkpoints.workspace import Journal, Workspace
from maskopt.models.options.walk import DistillOptions, WalkOptions
from maskopt.models.training.trainer import BYTES, FolderKeeper, Task, Trained, train

#: called with the name of a stage, how much of it is done, and of how much
OnDistill = Callable[[str, int, int], None]


def disk_of_training(weights: int, options: DistillOptions) -> int:
    """Bytes of the new weights and, twice, of what an interrupted training goes on from."""
    return weights * (4 + 2 * BYTES * bool(options.save_every))


def open_teacher(model: str | Path, student: Job, options: DistillOptions) -> Job:
    """The dense model with the same windows."""
    same = ("device", "dtype", "threads", "trust_remote_code")
    walk = WalkOptions(
        activation_memory=student.activation_memory, **{n: getattr(options, n) for n in same}
    )
    return open_job(model, student.windows, walk, whole=True)


def train_whole(
    student: Job,
    dense: Job,
    options: DistillOptions,
    work: Workspace,
    journal: Journal,
    check: Callable[[], None],
    tell: OnDistill,
) -> tuple[Trained, dict[str, str]]:
    """Train all kept weights of a pruned folder, and stage its shards in a run's workspace, where the
    progress is saved. `check` is called before a shard is written. Returns the losses, and the SHA-256 of the
    shards; ModelError for pruned weights that are not zero, or NaN."""
    source = student.source
    assert isinstance(source, FolderSource)
    keeper = FolderKeeper(work, journal, 60 * options.save_every, source.device)
    # the dense model's threads begin first, so that they end last
    with dense, student:
        walk_whole(dense, lambda done, total: tell("dense model", done, total))
        dense.source.drop()
        trained, layers = _train(student, dense, options, keeper, tell)
    new = {layer.name: (layer, matrix(source.model, layer).cpu()) for layer in layers}
    values = work.blocks / "distilled.values"
    write_tensors(values, source.stored_values(new))
    checkpoint, files = source.checkpoint, dict[str, str]()
    edits = Edits.of([checkpoint.folder / MASKS], [values])
    for shard in checkpoint.shards:
        check()
        files[shard] = write_shard(checkpoint, shard, work.staging / shard, edits)
    return trained, files


def _train(
    student: Job, dense: Job, options: DistillOptions, keeper: FolderKeeper, tell: OnDistill
) -> tuple[Trained, list[Layer]]:
    """Train the student in memory; also the layers that may have changed."""
    source = student.source
    assert isinstance(source, FolderSource)
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
    """Pruned layers and their masks [rows, n]; ModelError for pruned weights that are not zero."""
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
