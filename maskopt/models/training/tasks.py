"""Training towards the dense model with masks fixed: of one block's weights, or of a whole model's.

Blockwise, the targets are the outputs of the dense block in the dense model, which the walk leaves in
`Samples.dense`; once the block's layers are pruned, it is trained on its inputs in the pruned model. As a
whole, the model is trained to predict what the dense model predicts: knowledge distillation (Hinton, Vinyals
and Dean, arXiv 1503.02531) at temperature 1, by one walk through the dense model, then all kept weights
together by KL(dense ‖ pruned) of the next token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer, matrix, merged
from maskopt.models.architecture.source import FolderSource, as_stored, layer_masks
from maskopt.models.blockwise.activations import Activations
from maskopt.models.blockwise.job import Block, Job, open_job, walk_whole
from maskopt.models.blockwise.memory import POSITIONS
from maskopt.models.checkpoints.checkpoint import write_tensors
from maskopt.models.checkpoints.report import TrainedBlock
from maskopt.models.checkpoints.result import Edits, write_shard
from maskopt.models.checkpoints.schema import MASKS
from maskopt.models.checkpoints.workspace import Journal, Workspace
from maskopt.models.options.walk import ALL, DistillOptions, Reconstruction, WalkOptions
from maskopt.models.training.trainer import BYTES, FolderKeeper, Task, Trained, train

#: called with the name of a stage, how much of it is done, and of how much
OnDistill = Callable[[str, int, int], None]

#: lower limit of a token's mean square, relative to that of its window's targets
_LEAST = 1e-6
#: positions at a time whose logits stay in a processor's cache, with a vocabulary of 262,144
CACHED = 4
#: lower limit of a channel's mean square, relative to that of all channels
_LEAST_OF_CHANNEL = 1e-3


def train_block(
    block: Block, options: Reconstruction, seed: int, masks: Mapping[str, tuple[Layer, Tensor]]
) -> tuple[list[TrainedBlock], dict[str, tuple[Layer, Tensor]], dict[str, Tensor]]:
    """Train a pruned block's kept weights in place, if there are any, towards the outputs of the dense block.

    Args:
        masks: of layers that may change, True = kept.

    Returns:
        The losses, and the changes, rounded to the stored dtypes, in the model too: weights [rows, n] by
        layer, and norms and biases by stored tensor.
    """
    began, samples, source = time.perf_counter(), block.samples, block.job.source
    fitted = [window for window in samples.active if window not in samples.held]
    held = [window for window in samples.active if window in samples.held]
    if not held:
        raise ModelError(
            f"{block.name}: no held-out window is left to judge the training; give a larger `holdout`"
        )
    # Norms and biases that may change: the stored tensor and its dtype by name.
    vectors = source.vectors(block.index) if options.train == ALL else {}
    free, stored = _free(block, masks, vectors)
    if not free:
        return [], {}, {}
    assert samples.dense is not None
    targets, states, calls, device = samples.dense, samples.states, block.calls, block.device
    by = _scales(targets, fitted).to(device)

    def loss(window: int) -> Float[Tensor, ""]:
        state = states[window].to(device, torch.float32)
        target = targets[window].to(device, torch.float32)
        return _distance(calls[window](block.module, state, cast=True) * by, target * by)

    task = Task(
        "a block",
        "leave its layers out with `exclude`",
        block.module,
        free,
        stored,
        loss,
        fitted,
        held,
        reported=fitted,
        options=options,
        pool=block.threads,
    )
    generator = torch.Generator().manual_seed((seed * 1_000_003 + block.index) % 2**63)
    tick = block.ticker("train", options.epochs * len(fitted))
    result = train(task, generator, tick)
    losses = (result.before.fitted, result.after.fitted, result.before.held, result.after.held)
    seconds = time.perf_counter() - began
    trained = [TrainedBlock(block.index, *losses, result.epoch, result.diverged, seconds)]
    if not result.epoch:
        return trained, {}, {}  # The block stays as it was stored.
    weights, changed = {}, {}
    for name, (layer, _) in masks.items():
        weight = matrix(source.model, layer)
        new = as_stored(source, layer, weight.double())
        weight.copy_(new.to(weight.dtype))
        weights[name] = layer, new.cpu()
    for name, (tensor, dtype) in vectors.items():
        parameter = source.model.get_parameter(name)
        changed[tensor] = parameter.detach().to("cpu", dtype)
        parameter.copy_(changed[tensor])
    return trained, weights, changed


def _free(
    block: Block,
    masks: Mapping[str, tuple[Layer, Tensor]],
    vectors: Mapping[str, tuple[str, torch.dtype]],
) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
    """Return the entries that may change and the dtypes of storage, by parameter name inside the block."""
    free: dict[str, Tensor] = {}
    stored: dict[str, torch.dtype] = {}
    names = {id(p): name for name, p in block.module.named_parameters()}
    dtypes = {
        layer.parameter: block.job.source.parameter_dtype(layer.parameter)
        for layer, _ in masks.values()
    }
    for place, mask in merged(block.model, dict(masks), False).items():
        name = names[id(block.model.get_parameter(place))]
        free[name], stored[name] = mask.to(block.device), dtypes[place]
    for name, parameter in block.module.named_parameters():
        vector = vectors.get(f"{block.name}.{name}")
        if free and vector is not None:
            free[name] = torch.ones_like(parameter, dtype=torch.bool)
            stored[name] = vector[1]
    return free, stored


def _scales(recorded: Activations, windows: Sequence[int]) -> Float[Tensor, " width"]:
    """Return one over the root mean square of every channel, over tokens scaled to length 1, float32, CPU.

    A few channels of a hidden state may be many times larger than all others; where the next norm has small
    entries there, as in Gemma, later layers see little of it.
    """
    total: Tensor | float = 0.0
    for window in windows:
        square = recorded[window].double().square().flatten(0, -2)
        total = total + (square / square.sum(-1, keepdim=True).clamp(min=1e-30)).sum(0).cpu()
    assert isinstance(total, Tensor)
    return (total / total.mean().clamp(min=1e-30)).clamp(min=_LEAST_OF_CHANNEL).rsqrt().float()


def _distance(output: Tensor, target: Tensor) -> Float[Tensor, ""]:
    """Return a token's squared error relative to its target's square, mean over tokens [1, length, width]."""
    error, size = (output - target).square().sum(-1), target.square().sum(-1)
    return (error / size.clamp(min=_LEAST * float(size.mean()) or 1.0)).mean()


def kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Float[Tensor, ""]:
    """Return KL(p ‖ q) of distributions [positions, vocabulary], summed over the positions, nats."""
    return (log_p - log_q).mul_(p).sum()


@torch.no_grad()
def divergence(
    taught: Float[Tensor, "positions vocabulary"],
    logits: Float[Tensor, "positions vocabulary"],
    slope: Float[Tensor, "positions vocabulary"] | None = None,
) -> Float[Tensor, ""]:
    """Return `kl` of the softmax of two logits; `slope` receives its derivative by `logits`, q − p."""
    step = CACHED if logits.device.type == "cpu" else len(logits)
    total = logits.new_zeros(())
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        log_p, log_q = taught[part].log_softmax(1), logits[part].log_softmax(1)
        p = log_p.exp()
        total += kl(p, log_p, log_q)
        if slope is not None:
            torch.sub(log_q.exp_(), p, out=slope[part])
    return total


@contextmanager
def divergence_loss(
    student: Job, dense: Job, states: Callable[[int], Tensor]
) -> Iterator[Callable[[int], Float[Tensor, ""]]]:
    """Give a window's loss: KL(dense ‖ student), mean over its targets, through the head of both in memory.

    Args:
        dense: after its whole walk.
        states: returns the output of the student's last block for a window, [1, length, width].
    """
    windows, device = student.windows, student.source.device
    first, last = windows.beginning.first_target - 1, windows.length - 1

    def of(window: int) -> Tensor:
        state, tokens = states(window), windows.tokens[window : window + 1].to(device)
        dense_state = dense.last_state(window)[None].to(device)
        leaf = state.detach().requires_grad_(torch.is_grad_enabled())
        gradient = torch.zeros_like(leaf)
        total = torch.zeros((), device=device)
        for start in range(first, last, POSITIONS):
            part = slice(start, min(start + POSITIONS, last))
            with torch.no_grad():
                taught = end(tokens[:, part], dense_state[:, part])
            logits = end(tokens[:, part], leaf[:, part])
            slope = None
            if logits.requires_grad:
                slope = torch.empty_like(logits[0], dtype=torch.float32)
            total += divergence(taught[0].float(), logits[0].detach().float(), slope)
            if slope is not None:
                gradient += torch.autograd.grad(logits, leaf, slope[None].to(logits.dtype))[0]
        # The gradient of this value is known already, so that no logits are kept for it.
        return (total + ((state - state.detach()) * gradient).sum()) / (last - first)

    with dense.after_blocks(student) as end:
        yield of


def disk_of_training(weights: int, options: DistillOptions) -> int:
    """Return the bytes of the new weights and, twice, of a save that an interrupted training goes on from."""
    return weights * (4 + 2 * BYTES * bool(options.save_every))


def open_teacher(model: str | Path, student: Job, options: DistillOptions) -> Job:
    """Open the dense model with the windows of the student."""
    same = ("device", "dtype", "threads", "trust_remote_code")
    walk = WalkOptions(
        activation_memory=student.activation_memory, **{n: getattr(options.walk, n) for n in same}
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
    """Train the free weights of a folder, and stage its shards in a run's workspace.

    The progress is saved in the workspace. `check` is called before a shard is written.

    Returns:
        The losses, and the SHA-256 of every shard by its name.

    Raises:
        ModelError: pruned weights that are not zero, or NaN.
    """
    source = student.source
    assert isinstance(source, FolderSource)
    keeper = FolderKeeper(work, journal, 60 * options.save_every, source.device)
    # The dense model's threads begin first, so that they end last.
    with dense, student:
        walk_whole(dense, lambda done, total: tell("dense model", done, total))
        dense.source.drop()
        trained, free = _train(student, dense, options, keeper, tell)
    values = work.blocks / "distilled.values"
    write_tensors(values, source.stored_parameters(free))
    checkpoint, files = source.checkpoint, dict[str, str]()
    masks = checkpoint.folder / MASKS
    edits = Edits.of([masks] if masks.is_file() else [], [values])
    for shard in checkpoint.shards:
        check()
        files[shard] = write_shard(checkpoint, shard, work.staging / shard, edits)
    return trained, files


def _train(
    student: Job, dense: Job, options: DistillOptions, keeper: FolderKeeper, tell: OnDistill
) -> tuple[Trained, Mapping[str, Tensor]]:
    """Train the student in memory; return the losses and the free entries."""
    source = student.source
    assert isinstance(source, FolderSource)
    fitted = [window for window in range(student.count) if window not in student.held]
    states = student.in_memory(recompute=options.recompute)
    with divergence_loss(student, dense, states) as loss:
        free = free_entries(source, options)
        task = Task(
            str(source.checkpoint.folder),
            "`maskopt eval` says whether it or the dense model does",
            source.model,
            free,
            {name: source.parameter_dtype(name) for name in free},
            loss,
            fitted,
            sorted(student.held),
            # passes of all windows would take nearly as long as an epoch
            reported=fitted[: len(student.held)],
            options=options,
            pool=student.pool,
        )
        done, total = 0, options.epochs * len(fitted)

        def tick(windows: int) -> None:
            nonlocal done
            done += windows
            tell("train", done, total)

        generator = torch.Generator().manual_seed(options.seed)
        return train(task, generator, tick, keeper), free


def free_entries(source: FolderSource, options: DistillOptions) -> dict[str, Tensor]:
    """Return the entries of the model in memory that distillation may change, by parameter.

    With masks in the folder these are the kept entries; without masks, all weights of the blocks.
    """
    path = source.checkpoint.folder / MASKS
    if path.is_file():
        entries = merged(source.model, _pruned_layers(source, path, options), False)
        return {name: mask.to(source.device) for name, mask in entries.items()}
    return {
        name: torch.ones_like(source.model.get_parameter(name), dtype=torch.bool)
        for name in source.blocks.inside()
    }


def _pruned_layers(
    source: FolderSource, path: Path, options: DistillOptions
) -> dict[str, tuple[Layer, Tensor]]:
    """Return pruned layers with masks [rows, n]; ModelError for pruned weights that are not zero."""
    checkpoint, kept = source.checkpoint, {}
    trust = options.trust_remote_code
    for layer, mask in layer_masks(checkpoint, path, trust_remote_code=trust):
        if bool((matrix(source.model, layer).cpu()[~mask] != 0).any()):
            raise ModelError(
                f"{checkpoint.folder}: layer {layer.name!r} holds weights that its mask prunes; "
                "`maskopt masks apply` the masks to it first"
            )
        if not bool(mask.all()):
            kept[layer.name] = layer, mask
    return kept
