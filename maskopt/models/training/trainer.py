"""Training of a module's kept weights by a loss of windows: of a part of a block, or of a whole model.

AdamW with a warm-up and a cosine decay, in float32, on a few windows a step, whose gradients are summed in
the order of the windows: the result does not depend on the number of threads. Held-out windows judge every
epoch and the start, and the best weights stay.

To save the progress a file of tensors is written whole, then a line of the journal names it, then the file
before it is removed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskopt.errors import ModelError
from maskopt.models.blockwise.forward import Threads
from maskopt.models.checkpoints.checkpoint import open_safe, write_tensors
from maskopt.models.checkpoints.schema import file_digest
from maskopt.models.checkpoints.workspace import Journal, Workspace
from maskopt.models.options.walk import DistillOptions, Reconstruction

#: share of the steps in which the learning rate rises
_WARM_UP = 0.05
#: factor of the learning rate of vectors: a norm's entry scales a whole column, so errors do not cancel as in
#: a matrix
_OF_VECTORS = 0.1
#: multiple of the loss at the start above which training has diverged; and the least loss at the start for
#: it, since near 0 AdamW takes full steps by rounding
_DIVERGED, _NOTHING = 10.0, 1e-4
#: a learning rate that float32 holds, whatever is made of it
_MOST_RATE = 1e30
#: per trained weight on disk: the weight, two moments, and the best epoch's weight
BYTES = 16
#: what AdamW calls its moments
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Losses(NamedTuple):
    """Losses, mean over windows."""

    fitted: float
    held: float


#: float32, by `kind/name` of every trained parameter: `weights`, AdamW's moments, and `best`, the weights of
#: the best epoch, none where that is the start
Tensors = Mapping[str, Tensor]


@dataclass
class TrainingState:
    """The progress of training; every epoch that ended within the taken steps is judged.

    Attributes:
        step: steps taken.
        before: losses at the start.
        held, epoch: the least held-out loss, and its epoch (0: the start).
    """

    step: int
    before: Losses
    held: float
    epoch: int


@dataclass(frozen=True)
class Trained:
    """The result of training.

    Attributes:
        before, after: losses; equal where nothing was better than the start.
        epoch: the best one; 0: the start.
        diverged: NaN, or a loss far above that of the start, ended it.
    """

    before: Losses
    after: Losses
    epoch: int
    diverged: bool

    def record(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        losses = {"before": self.before._asdict(), "after": self.after._asdict()}
        return {**losses, "epoch": self.epoch, "diverged": self.diverged}


@dataclass(frozen=True)
class Task:
    """A module, and the loss of its training.

    Attributes:
        name, remedy: of the module, and the remedy for NaN, for errors.
        free: by parameter name inside it, bool in its shape: entries that may change.
        stored: by parameter name, the dtype in which it will be written.
        loss: of a window; differentiable by the free parameters where gradients are enabled, and called from
            several threads.
        reported: fitted windows whose loss is reported before and after.
        pool: threads for the windows of a step.
    """

    name: str
    remedy: str
    module: nn.Module
    free: Mapping[str, Tensor]
    stored: Mapping[str, torch.dtype]
    loss: Callable[[int], Float[Tensor, ""]]
    fitted: Sequence[int]
    held: Sequence[int]
    reported: Sequence[int]
    options: Reconstruction | DistillOptions
    pool: Threads


def train(
    task: Task,
    generator: torch.Generator,
    tick: Callable[[int], None],
    keeper: FolderKeeper | None = None,
) -> Trained:
    """Train a module's free weights, in place; its other parameters do not change by a bit.

    Args:
        generator: a new one, for the order of the windows.
        keeper: saves the progress; training goes on from what it holds.
    """
    named = dict(task.module.named_parameters())
    stored = {name: (p.data, p.grad, p.requires_grad) for name, p in named.items()}
    weights = [named[name] for name in task.free]
    try:
        for name, parameter in named.items():
            parameter.grad = None
            parameter.requires_grad_(name in task.free)
            parameter.data = parameter.data.float()
        for weight in weights:
            weight.data = weight.data.clone()
        rounding = [(stored[name][0].dtype, task.stored[name]) for name in task.free]
        trained = _epochs(task, weights, rounding, generator, tick, keeper)
        new = [weight.data for weight in weights]
    finally:
        for name, parameter in named.items():
            parameter.grad = None  # Its dtype is another than that of the restored data.
            parameter.data, parameter.grad, _ = stored[name]
            parameter.requires_grad_(stored[name][2])
    if trained.epoch:
        for name, value in zip(task.free, new, strict=True):
            old = named[name].data
            old.copy_(torch.where(task.free[name], value.to(old.dtype), old))
    return trained


def _epochs(
    task: Task,
    weights: Sequence[nn.Parameter],
    rounding: Sequence[tuple[torch.dtype, torch.dtype]],
    generator: torch.Generator,
    tick: Callable[[int], None],
    keeper: FolderKeeper | None,
) -> Trained:
    """Train by epochs; each is judged, and kept, with weights as stored: rounded to these dtypes in turn."""
    options, count = task.options, len(task.fitted)
    named = dict(zip(task.free, weights, strict=True))
    per_epoch = math.ceil(count / options.batch)
    optimizer, start = _optimizer(task, weights), _rounded(weights, rounding)
    saved = None if keeper is None else keeper.last()
    if saved is None:
        before = Losses(*_losses_at(task, weights, start, task.reported, task.held))
        if not math.isfinite(before.held):
            raise ModelError(
                f"{task.name} gives NaN or infinite values where it is to be trained; {task.remedy}"
            )
        at, best = TrainingState(0, before, before.held, 0), start
    else:
        at, tensors = saved
        _go_on(tensors, at.step, optimizer, named)
        best = [tensors[f"best/{name}"] for name in named] if at.epoch else start
    done, diverged = at.step, False
    for number in range(1, options.epochs + 1):
        order = torch.randperm(count, generator=generator).tolist()
        for step in range((number - 1) * per_epoch, number * per_epoch):
            first = step % per_epoch * options.batch
            windows = [task.fitted[i] for i in order[first : first + options.batch]]
            if step >= done:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * _rate(step, options.epochs * per_epoch)
                _set_gradients(task, weights, windows)
                optimizer.step()
                # AdamW decays whole parameters, also the experts of one that are not free.
                if options.weight_decay:
                    for weight, free, value in zip(weights, task.free.values(), start, strict=True):
                        weight.data = torch.where(free, weight.data, value)
                at.step = step + 1
                if keeper is not None and keeper.due():
                    keeper.keep(at, _tensors(optimizer, named, best if at.epoch else []))
            tick(len(windows))
        if number * per_epoch < done:
            continue  # The interrupted run judged this epoch.
        now = _rounded(weights, rounding)
        (held,) = _losses_at(task, weights, now, task.held)
        diverged = not held <= _DIVERGED * max(at.before.held, _NOTHING)
        if diverged:
            break
        if held < at.held:
            at.held, at.epoch, best = held, number, now
    for weight, value in zip(weights, best, strict=True):
        weight.data = value
    after = Losses(_mean(task, task.reported), at.held) if at.epoch else at.before
    return Trained(at.before, after, at.epoch, diverged)


def _optimizer(task: Task, weights: Sequence[nn.Parameter]) -> torch.optim.AdamW:
    """Make AdamW with one group a parameter, whose highest learning rate is its `peak`.

    The peak is relative to the root mean square of the free entries. For vectors it is `_OF_VECTORS` times
    that, or times that of the matrices where a vector is 0.
    """
    sizes = [
        float(weight.detach()[free].square().mean().sqrt()) if bool(free.any()) else 0.0
        for weight, free in zip(weights, task.free.values(), strict=True)
    ]
    of_matrices = [size for size, w in zip(sizes, weights, strict=True) if w.ndim > 1]
    usual = sum(of_matrices) / max(1, len(of_matrices))
    groups: list[dict[str, Any]] = []
    for weight, size in zip(weights, sizes, strict=True):
        vector = weight.ndim == 1
        scale = _OF_VECTORS * (size or usual) if vector else size
        peak = min(task.options.learning_rate * scale, _MOST_RATE)
        decay = 0.0 if vector else task.options.weight_decay
        groups.append({"params": [weight], "peak": peak, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def _tensors(
    optimizer: torch.optim.AdamW, named: Mapping[str, nn.Parameter], best: Sequence[Tensor]
) -> Tensors:
    tensors = {f"best/{name}": value for name, value in zip(named, best, strict=bool(best))}
    for name, weight in named.items():
        tensors[f"weights/{name}"] = weight.data
        tensors |= {f"{kind}/{name}": optimizer.state[weight][kind] for kind in _MOMENTS}
    return tensors


def _go_on(
    tensors: Tensors, step: int, optimizer: torch.optim.AdamW, named: Mapping[str, nn.Parameter]
) -> None:
    """Restore the weights and moments of a training that was interrupted after so many steps."""
    for name, weight in named.items():
        moments = {kind: tensors[f"{kind}/{name}"] for kind in _MOMENTS}
        optimizer.state[weight] = {"step": torch.tensor(float(step)), **moments}
        weight.data = tensors[f"weights/{name}"]


def _rounded(
    weights: Sequence[nn.Parameter], rounding: Sequence[tuple[torch.dtype, torch.dtype]]
) -> list[Tensor]:
    """Return copies in float32, rounded to these dtypes."""
    return [
        weight.detach().clone().to(first).to(then).float()
        for weight, (first, then) in zip(weights, rounding, strict=True)
    ]


def _losses_at(
    task: Task,
    weights: Sequence[nn.Parameter],
    values: Sequence[Tensor],
    *windows: Sequence[int],
) -> list[float]:
    """Return the mean losses of lists of windows, with the weights at these values."""
    exact = [weight.data for weight in weights]
    for weight, value in zip(weights, values, strict=True):
        weight.data = value
    losses = [_mean(task, part) for part in windows]
    for weight, value in zip(weights, exact, strict=True):
        weight.data = value
    return losses


def _rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a linear warm-up, then a cosine decay."""
    rise = max(1, round(_WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _set_gradients(task: Task, weights: Sequence[nn.Parameter], windows: Sequence[int]) -> None:
    """Set the gradients of the mean loss of some windows, zero where nothing may change."""

    def gradients(window: int) -> tuple[Tensor | None, ...]:
        # A weight that the window does not reach, such as an expert's, has the gradient None.
        with torch.enable_grad():
            loss = task.loss(window)
            if not loss.requires_grad:
                return (None,) * len(weights)
            return torch.autograd.grad(loss, list(weights), allow_unused=True)

    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    for _, of_window in task.pool.each(gradients, windows):
        for weight, gradient in zip(weights, of_window, strict=True):
            assert weight.grad is not None
            if gradient is not None:
                weight.grad.add_(gradient)
        del of_window, gradient  # Their memory is free before the next ones are made.
    for weight, free in zip(weights, task.free.values(), strict=True):
        assert weight.grad is not None
        weight.grad.div_(len(windows)).masked_fill_(~free, 0)


def _mean(task: Task, windows: Sequence[int]) -> float:
    total = 0.0
    for _, loss in task.pool.each(lambda window: float(task.loss(window)), windows):
        total += loss
    return total / len(windows)


class FolderKeeper:
    """The progress saved in an output folder's workspace every `every` seconds (0: never)."""

    def __init__(
        self, work: Workspace, journal: Journal, every: float, device: torch.device
    ) -> None:
        self._work, self._journal = work, journal
        self._every, self._device = every, device
        self._since = time.monotonic()

    def last(self) -> tuple[TrainingState, Tensors] | None:
        """Return the progress to go on from, or None."""
        record = self._journal.progress
        if record is None:
            return None
        path = self._work.blocks / record["file"]
        if not path.exists() or file_digest(path) != record["digest"]:
            raise ModelError(
                f"{path}: does not match the journal: it was changed; start over with `overwrite`"
            )
        file = open_safe(path)
        tensors = {name: file.read(name).to(self._device) for name in file.entries}
        before = Losses(*record["before"])
        return TrainingState(record["step"], before, record["held"], record["epoch"]), tensors

    def due(self) -> bool:
        """Return whether it is time to save the progress."""
        return 0 < self._every <= time.monotonic() - self._since

    def keep(self, at: TrainingState, tensors: Tensors) -> None:
        path = self._work.blocks / f"step-{at.step:08d}.safetensors"
        digest = write_tensors(path, tensors)
        self._work.keep = True  # The journal may hold it from here on.
        self._journal.add("progress", file=path.name, digest=digest, **asdict(at))
        for other in self._work.blocks.glob("step-*.safetensors"):
            if other.name != path.name:
                other.unlink()
        self._since = time.monotonic()
