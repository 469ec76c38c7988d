"""KL(dense ‖ changed) of the next token: of logits, as a loss of windows, and of variants of a model.

A variant has no weights of its own: it differs by what happened to its hidden states in some block. All
variants go through the blocks together, so that each block is in memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.errors import ModelError
from maskopt.models.blockwise.activations import Activations, States
from maskopt.models.blockwise.forward import ticker
from maskopt.models.blockwise.job import Block, Job
from maskopt.models.blockwise.memory import POSITIONS, check_memory, hidden_size

#: positions at a time whose logits stay in a processor's cache, with a vocabulary of 262,144
CACHED = 4
#: every so many tokens of a window is judged: a large vocabulary costs more than the blocks
EVERY = 8
Key = TypeVar("Key")


def kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Float[Tensor, ""]:
    """KL(p ‖ q) of distributions [positions, vocabulary], summed over the positions, nats."""
    return (log_p - log_q).mul_(p).sum()


@torch.no_grad()
def divergence(
    wanted: Float[Tensor, "positions vocabulary"],
    found: Float[Tensor, "positions vocabulary"],
    slope: Float[Tensor, "positions vocabulary"] | None = None,
) -> Float[Tensor, ""]:
    """`kl` of the softmax of two logits; `slope` receives its derivative by `found`, q − p."""
    step = CACHED if found.device.type == "cpu" else len(found)
    total = found.new_zeros(())
    for start in range(0, len(found), step):
        part = slice(start, start + step)
        log_p, log_q = wanted[part].log_softmax(1), found[part].log_softmax(1)
        p = log_p.exp()
        total += kl(p, log_p, log_q)
        if slope is not None:
            torch.sub(log_q.exp_(), p, out=slope[part])
    return total


@contextmanager
def divergence_loss(
    student: Job, dense: Job, states: Callable[[int], Tensor]
) -> Iterator[Callable[[int], Float[Tensor, ""]]]:
    """A function of a window: KL(dense ‖ student), mean over its targets, through the head of both in memory.

    Args:
        dense: after its whole walk.
        states: of a window, the output of the student's last block, [1, length, width].
    """
    windows, device = student.windows, student.source.device
    first, last = windows.beginning.first_target - 1, windows.length - 1

    def of(window: int) -> Tensor:
        own, tokens = states(window), windows.tokens[window : window + 1].to(device)
        taught = dense.last_state(window)[None].to(device)
        leaf = own.detach().requires_grad_(torch.is_grad_enabled())
        gradient = torch.zeros_like(leaf)
        total = torch.zeros((), device=device)
        for start in range(first, last, POSITIONS):
            part = slice(start, min(start + POSITIONS, last))
            with torch.no_grad():
                wanted = end(tokens[:, part], taught[:, part])
            found = end(tokens[:, part], leaf[:, part])
            slope = torch.empty_like(found[0], dtype=torch.float32) if found.requires_grad else None
            total += divergence(wanted[0].float(), found[0].detach().float(), slope)
            if slope is not None:
                gradient += torch.autograd.grad(found, leaf, slope[None].to(found.dtype))[0]
        return _Known.apply(own, total, gradient) / (last - first)

    with dense.after_blocks(student) as end:
        yield of


class _Known(torch.autograd.Function):
    """A value whose gradient by a tensor is known already, so that logits need not be kept for it."""

    @staticmethod
    def forward(ctx: Any, at: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *onto: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return onto[0] * gradient, None, None


def place(job: Job, variants: int, folder: Path) -> Path | None:
    """The folder, if hidden states of so many variants go to a file there; None: in memory."""
    most = job.activation_memory
    if job.options.max_memory is not None:
        load = replace(job.load, variants=variants * job.count)
        most = check_memory(load, int(job.options.max_memory))
    size = job.count * job.length * hidden_size(job.source.model) * 4 * variants
    return folder if size > most else None


@dataclass(frozen=True)
class Variant:
    """One variant's hidden states, among those of all."""

    states: Activations
    first: int

    def __getitem__(self, window: int) -> Tensor:
        return self.states[self.first + window]

    def __setitem__(self, window: int, state: Tensor) -> None:
        self.states[self.first + window] = state

    def on(self, device: torch.device, window: int) -> Tensor:
        return self[window].to(device)


class Variants(dict[Key, Variant]):
    """At most `most` variants by key; hidden states in memory, or in one file in `folder`."""

    def __init__(self, job: Job, most: int, folder: Path | None) -> None:
        super().__init__()
        self.windows = range(job.count)
        self._most, self._folder = most, folder
        self._states: Activations | None = None

    def begin(self, key: Key, states: States, like: Activations) -> Variant:
        """Another one, which begins with these states."""
        if self._states is None:
            places = range(self._most * len(self.windows))
            self._states = Activations(places, like.shape, like.dtype, self._folder)
        variant = Variant(self._states, len(self) * len(self.windows))
        for window in self.windows:
            variant[window] = states[window]
        self[key] = variant
        return variant

    def __enter__(self) -> Variants[Key]:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._states is not None:
            self._states.close()


def through(block: Block, states: States, windows: Sequence[int]) -> None:
    """Send the windows of a variant through the block, in place; ModelError for NaN or infinity."""
    for window, state in block.threads.each(lambda w: block.run(w, states), windows):
        if not bool(torch.isfinite(state).all()):
            raise ModelError(f"{block.name}: NaN or infinite activations in window {window}")
        states[window] = state


def divergences(job: Job, held: Mapping[Key, States], every: int = EVERY) -> dict[Key, float]:
    """KL(model ‖ variant), nats per token, over each `every`th token, after the job's whole walk."""
    tokens, device = job.windows.tokens, job.source.device
    some = torch.arange(every - 1, job.windows.length, every)
    if not len(some):
        some = torch.tensor([job.windows.length - 1])
    tick = ticker(job.tell, job.last, job.last + 1, "output", len(held) * len(tokens))
    total = dict.fromkeys(held, 0.0)
    with job.after_blocks() as end:

        def logs(state: Tensor, window: int) -> Tensor:
            ids = tokens[window : window + 1, some]
            return end(ids.to(device), state[:, some].to(device))[0].float().log_softmax(1)

        for window in range(len(tokens)):
            wanted = logs(job.last_state(window)[None], window)
            likely = wanted.exp()
            for key, states in held.items():
                of_tokens = (likely * (wanted - logs(states[window], window))).sum(1)
                total[key] += float(of_tokens.double().sum())  # what is allocated depends on it
                tick(1)
    return {key: of_all / (len(tokens) * len(some)) for key, of_all in total.items()}
