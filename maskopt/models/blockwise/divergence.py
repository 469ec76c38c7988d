"""KL(dense ‖ changed) of the next token: of logits, as a loss of windows, and of variants of a model.

A variant has no weights of its own: it differs by what happened to its hidden states in some block. All
variants go through the blocks together, so that each block is in memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.models.blockwise.activations import Activations
from maskopt.models.blockwise.forward import ticker
from maskopt.models.blockwise.job import Job
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
        # a value whose gradient is known already, so that logits need not be kept for it
        return (total + ((own - own.detach()) * gradient).sum()) / (last - first)

    with dense.after_blocks(student) as end:
        yield of


def place(job: Job, variants: int, folder: Path) -> Path | None:
    """The folder, if hidden states of so many variants go to a file there; None: in memory."""
    most = job.activation_memory
    if job.options.max_memory is not None:
        load = replace(job.load, variants=variants * job.count)
        most = check_memory(load, int(job.options.max_memory))
    size = job.count * job.length * hidden_size(job.source.model) * 4 * variants
    return folder if size > most else None


class Variants(dict[Key, int]):
    """At most `most` variants: by key, the place of its first window in the hidden `states` of all of them,
    which are in memory, or where that is too small in one file in `folder`."""

    states: Activations

    def __init__(self, job: Job, most: int, folder: Path) -> None:
        super().__init__()
        self.windows = range(job.count)
        self._most, self._folder = most, place(job, most, folder)

    def begin(self, key: Key, entered: Activations, like: Key | None = None) -> int:
        """Another one, which begins with what enters a block, or with the states of the one `like` it."""
        first = len(self) * len(self.windows)
        if not self:
            places = range(self._most * len(self.windows))
            self.states = Activations(places, entered.shape, entered.dtype, self._folder)
        for window in self.windows:
            state = entered[window] if like is None else self.states[self[like] + window]
            self.states[first + window] = state
        self[key] = first
        return first

    def __enter__(self) -> Variants[Key]:
        return self

    def __exit__(self, *raised: object) -> None:
        if self:
            self.states.close()


def divergences(
    job: Job, held: Variants[Key], keys: Iterable[Key], every: int = EVERY
) -> dict[Key, float]:
    """KL(model ‖ variant), nats per token, over each `every`th token, after the job's whole walk."""
    tokens, device = job.windows.tokens, job.source.device
    total = dict.fromkeys(keys, 0.0)
    some = torch.arange(every - 1, job.windows.length, every)
    if not len(some):
        some = torch.tensor([job.windows.length - 1])
    tick = ticker(job.tell, job.last, job.last + 1, "output", len(total) * len(tokens))
    with job.after_blocks() as end:

        def logs(state: Tensor, window: int) -> Tensor:
            ids = tokens[window : window + 1, some]
            return end(ids.to(device), state[:, some].to(device))[0].float().log_softmax(1)

        for window in range(len(tokens)):
            wanted = logs(job.last_state(window)[None], window)
            likely = wanted.exp()
            for key in total:
                changed = logs(held.states[held[key] + window], window)
                of_tokens = (likely * (wanted - changed)).sum(1)
                total[key] += float(of_tokens.double().sum())  # what is allocated depends on it
                tick(1)
    return {key: of_all / (len(tokens) * len(some)) for key, of_all in total.items()}
