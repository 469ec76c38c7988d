"""Kept weights of a module, trained by a loss of windows: of a part of a block, or of a whole model.

AdamW with a warm-up and a cosine decay, in float32, on a few windows a step, whose gradients are summed in
the order of the windows: the result does not depend on the number of threads. Windows kept aside judge every
epoch, and the best one is what stays, the weights at the start among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskopt.errors import ModelError
from maskopt.models.blockwise.threads import Threads
from maskopt.models.training.training_state import Keeper, Losses, Progress

#: of all steps, how many the learning rate rises for
_WARM_UP = 0.05
#: of the learning rate: a norm's entry scales a whole column, so errors do not cancel as a matrix's do
_OF_VECTORS = 0.1
#: of a loss at the start: above it training has diverged; and what a start without any counts as, where
#: AdamW takes full steps by rounding
_DIVERGED, _NOTHING = 10.0, 1e-4
#: a learning rate that float32 holds, whatever is made of it
_MOST_RATE = 1e30


class Steps(Protocol):
    """How far training goes, as the options of `Reconstruction` of these names say."""

    @property
    def epochs(self) -> int: ...

    @property
    def batch(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...


@dataclass(frozen=True)
class Trained:
    """What became of a module.

    Attributes:
        before, after: losses; the same where nothing was better than the start.
        epoch: the best one; 0: the start.
        diverged: NaN, or a loss far above that of the start, ended it.
    """

    before: Losses
    after: Losses
    epoch: int
    diverged: bool


@dataclass(frozen=True)
class Task:
    """A module, and what its weights are to be trained for.

    Attributes:
        name, remedy: of the module, and what helps where it gives NaN, for errors.
        free: by parameter name inside it, bool in its shape: entries that may change.
        stored: likewise, the dtype in which it will be written.
        loss: of a window, of the fitted and of the held ones; it can be differentiated by the free parameters
            where gradients are asked for, and is called from several threads.
        told: of the fitted windows, those whose loss is told before and after.
    """

    name: str
    remedy: str
    module: nn.Module
    free: Mapping[str, Tensor]
    stored: Mapping[str, torch.dtype]
    loss: Callable[[int], Float[Tensor, ""]]
    fitted: Sequence[int]
    held: Sequence[int]
    told: Sequence[int]
    how: Steps


def train(
    task: Task,
    pool: Threads,
    generator: torch.Generator,
    tick: Callable[[int], None],
    keeper: Keeper | None = None,
) -> Trained:
    """Train a module's free weights, in place; its other parameters are as they were, bit for bit.

    Args:
        generator: as new, of the order of the windows.
        keeper: training goes on from what it holds, and tells it where it stands after every step.
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
        trained = _epochs(task, weights, rounding, pool, generator, tick, keeper)
        new = [weight.data for weight in weights]
    finally:
        for name, parameter in named.items():
            parameter.grad = None  # of another dtype than the data that come back
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
    pool: Threads,
    generator: torch.Generator,
    tick: Callable[[int], None],
    keeper: Keeper | None,
) -> Trained:
    """Every epoch is judged, and kept, as it will be stored: rounded to these dtypes, one after the other."""
    how, count, named = task.how, len(task.fitted), dict(zip(task.free, weights, strict=True))
    per_epoch = math.ceil(count / how.batch)
    optimizer, start = _optimizer(task, weights), _rounded(weights, rounding)
    place = None if keeper is None else _go_on(keeper, optimizer, named, start)
    if place is None:
        place = _Place(0, _losses_at_start(task, weights, start, pool), start)
    done, diverged = place.step, False
    for number in range(1, how.epochs + 1):
        order = torch.randperm(count, generator=generator).tolist()
        for step in range((number - 1) * per_epoch, number * per_epoch):
            first = step % per_epoch * how.batch
            windows = [task.fitted[i] for i in order[first : first + how.batch]]
            if step >= done:
                _set_rate(optimizer, _rate(step, how.epochs * per_epoch))
                _set_gradients(task, weights, windows, pool)
                optimizer.step()
                if how.weight_decay:
                    _give_back(task, weights, start)
                place.step = step + 1
                if keeper is not None and keeper.due():
                    keeper.keep(_progress(place, optimizer, named))
            tick(len(windows))
        if number * per_epoch < done:
            continue  # judged by the run that is gone on with
        now = _rounded(weights, rounding)
        with _in_place(weights, now):
            held = _mean(task, task.held, pool)
        diverged = not held <= _DIVERGED * max(place.before.held, _NOTHING)
        if diverged:
            break
        if held < place.held:
            place.held, place.epoch, place.best = held, number, now
    for weight, value in zip(weights, place.best, strict=True):
        weight.data = value
    before, after = place.before, place.before
    if place.epoch:
        after = Losses(_mean(task, task.told, pool), place.held)
    return Trained(before, after, place.epoch, diverged)


class _Place:
    """Where training stands: steps that are taken, the losses at the start, and of the best epoch weights,
    loss on the windows kept aside, and number, 0 being the start."""

    def __init__(self, step: int, before: Losses, best: Sequence[Tensor]) -> None:
        self.step, self.before, self.best = step, before, best
        self.held, self.epoch = before.held, 0


def _optimizer(task: Task, weights: Sequence[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW whose groups know their highest learning rate, `peak`."""
    sizes = _sizes(list(zip(weights, task.free.values(), strict=True)))
    groups = [
        {
            "params": [weight],
            "peak": min(task.how.learning_rate * size, _MOST_RATE),
            "weight_decay": task.how.weight_decay if weight.ndim > 1 else 0.0,
        }
        for weight, size in zip(weights, sizes, strict=True)
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def _set_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate


def _give_back(task: Task, weights: Sequence[nn.Parameter], start: Sequence[Tensor]) -> None:
    """What is not free has what it had: the decay is of whole parameters, of which some experts may stay."""
    for weight, free, value in zip(weights, task.free.values(), start, strict=True):
        weight.data = torch.where(free, weight.data, value)


def _losses_at_start(
    task: Task, weights: Sequence[nn.Parameter], kept: Sequence[Tensor], pool: Threads
) -> Losses:
    with _in_place(weights, kept):
        losses = Losses(_mean(task, task.told, pool), _mean(task, task.held, pool))
    if not math.isfinite(losses.held):
        raise ModelError(
            f"{task.name} gives NaN or infinite values where it is to be trained; {task.remedy}"
        )
    return losses


def _progress(
    place: _Place, optimizer: torch.optim.AdamW, named: Mapping[str, nn.Parameter]
) -> Progress:
    moments = {name: optimizer.state[weight] for name, weight in named.items()}
    tensors = {
        "weights": {name: weight.data for name, weight in named.items()},
        "first": {name: of["exp_avg"] for name, of in moments.items()},
        "second": {name: of["exp_avg_sq"] for name, of in moments.items()},
        "best": dict(zip(named, place.best, strict=True)) if place.epoch else {},
    }
    return Progress(place.step, place.before, place.held, place.epoch, tensors)


def _go_on(
    keeper: Keeper,
    optimizer: torch.optim.AdamW,
    named: Mapping[str, nn.Parameter],
    start: list[Tensor],
) -> _Place | None:
    """Weights and moments become what they were when training was interrupted, if it was."""
    at = keeper.last()
    if at is None:
        return None
    first, second = at.tensors["first"], at.tensors["second"]
    step = torch.tensor(float(at.step))
    state = {
        index: {"step": step.clone(), "exp_avg": first[name], "exp_avg_sq": second[name]}
        for index, name in enumerate(named)
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    for name, weight in named.items():
        weight.data = at.tensors["weights"][name]
    best = at.tensors["best"]
    place = _Place(at.step, at.before, [best[name] for name in named] if at.epoch else start)
    place.held, place.epoch = at.held, at.epoch
    return place


def _rounded(
    weights: Sequence[nn.Parameter], rounding: Sequence[tuple[torch.dtype, torch.dtype]]
) -> list[Tensor]:
    """Copies in float32, of what those dtypes can hold."""
    return [
        weight.detach().clone().to(first).to(then).float()
        for weight, (first, then) in zip(weights, rounding, strict=True)
    ]


@contextmanager
def _in_place(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    exact = [weight.data for weight in weights]
    try:
        for weight, value in zip(weights, values, strict=True):
            weight.data = value
        yield
    finally:
        for weight, value in zip(weights, exact, strict=True):
            weight.data = value


def _sizes(weights: Sequence[tuple[nn.Parameter, Tensor]]) -> list[float]:
    """Root mean squares of what may change; of vectors a part of it, or, where it is 0, of the matrices'."""
    found = [
        float(weight.detach()[free].square().mean().sqrt()) if bool(free.any()) else 0.0
        for weight, free in weights
    ]
    of_matrices = [size for size, (w, _) in zip(found, weights, strict=True) if w.ndim > 1]
    usual = sum(of_matrices) / max(1, len(of_matrices))
    return [
        _OF_VECTORS * (size or usual) if w.ndim == 1 else size
        for size, (w, _) in zip(found, weights, strict=True)
    ]


def _rate(step: int, steps: int) -> float:
    """Of the learning rate: up in a line, down in half a cosine."""
    rise = max(1, round(_WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _set_gradients(
    task: Task, weights: Sequence[nn.Parameter], windows: Sequence[int], pool: Threads
) -> None:
    """Gradients of the mean loss of some windows, zero where nothing may change."""

    def gradients(window: int) -> tuple[Tensor | None, ...]:
        """None: of a weight that the window did not come by, such as an expert's."""
        with torch.enable_grad():
            loss = task.loss(window)
            if not loss.requires_grad:
                return (None,) * len(weights)
            return torch.autograd.grad(loss, list(weights), allow_unused=True)

    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    for wave in pool.waves(windows):
        for found in pool.run([lambda w=w: gradients(w) for w in wave]):  # type: ignore[misc]
            for weight, gradient in zip(weights, found, strict=True):
                assert weight.grad is not None
                if gradient is not None:
                    weight.grad.add_(gradient)
            del found, gradient  # before the next wave's are made
    for weight, free in zip(weights, task.free.values(), strict=True):
        assert weight.grad is not None
        weight.grad.div_(len(windows)).masked_fill_(~free, 0)


def _mean(task: Task, windows: Sequence[int], pool: Threads) -> float:
    total = 0.0
    for wave in pool.waves(windows):
        for loss in pool.run([lambda w=w: float(task.loss(w)) for w in wave]):  # type: ignore[misc]
            total += loss
    return total / len(windows)
