"""Variants of a model that go through its blocks together, so that each block is in memory once, and what
they change in the distribution of the next token.

A variant has no weights of its own: it differs by what happened to its hidden states in some block, and goes
through all others as the model does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from maskopt.errors import ModelError
from maskopt.models.blockwise.activations import Activations, States
from maskopt.models.blockwise.job import Block, Job
from maskopt.models.blockwise.memory import check_memory, hidden_size
from maskopt.models.blockwise.progress import ticker

#: every so many tokens of a window is judged: a large vocabulary costs more than the blocks
EVERY = 8
Key = TypeVar("Key")


def place(job: Job, variants: int, folder: Path) -> Path | None:
    """The folder, if the hidden states of so many variants must go to a file there; None: in memory.

    Raises:
        ModelError: `max_memory` allows not even what is left then.
    """
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
    """Variants by key; their hidden states lie in memory, or all in one file.

    Args:
        most: how many there will be.
        folder: for the file; None: in memory.
    """

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
    """The windows of one variant through the block as it is now, in place.

    Raises:
        ModelError: NaN or infinite activations.
    """
    opened = block.opened
    for window, state in opened.threads.each(lambda w: opened.run(w, states), windows):
        if not bool(torch.isfinite(state).all()):
            raise ModelError(f"{opened.name}: NaN or infinite activations in window {window}")
        states[window] = state


def divergences(job: Job, held: Mapping[Key, States], every: int = EVERY) -> dict[Key, float]:
    """KL(model ‖ variant), nats per token, over each `every`th token of every window.

    Args:
        job: after its whole walk.
        held: the output of the last block, of every variant.
    """
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
