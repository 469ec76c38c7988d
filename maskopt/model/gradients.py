"""How much the loss depends on what leaves each block: forward and backward once through the dense model.

All windows go forward through the blocks, and what enters each is kept; then backward, each block computed
once more with what autograd needs. So, as in every walk, the weights of one block are in memory at a time.
The loss is the cross-entropy of the windows' own next tokens, as in an empirical Fisher matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskopt.errors import ModelError
from maskopt.model.activations import Activations
from maskopt.model.forward import Captured, ending
from maskopt.model.source import Source
from maskopt.model.threads import Threads
from maskopt.model.tokens import Windows

#: matrices [length, vocabulary] of float32 that the loss of a window and its gradient take
LOGITS = 4


@dataclass(frozen=True)
class DenseModel:
    """A model whose blocks are as they were, and windows that are about to enter the first.

    Attributes:
        captured: what the blocks are called with, and the states that enter block 0.
        folder: for files of hidden states; None keeps them in memory.
        tick: called with how many windows went one step: `steps` of them each.
    """

    source: Source
    windows: Windows
    captured: Captured
    pool: Threads
    folder: Path | None
    tick: Callable[[int], None]

    @staticmethod
    def steps(blocks: int) -> int:
        """Through every block, the head, and back through every block but the first."""
        return 2 * blocks

    def output_gradients(self) -> Float[Tensor, "blocks windows length"]:
        """Norms of the loss's gradient by every token's hidden state as it leaves each block.

        Raises:
            ModelError: NaN or infinite activations or gradients.
        """
        blocks, count = len(self.source.blocks), len(self.windows)
        norms = torch.zeros(blocks, count, self.windows.length)
        with ExitStack() as held:
            later = [held.enter_context(self._empty()) for _ in range(blocks)]
            # the first are those of the walk to come, and stay as they are
            entered = [self.captured.states, *later]
            for index in range(blocks):
                self._forward(index, entered[index], entered[index + 1])
            gradients = entered.pop()  # of the states in it, in their place
            self._through_the_head(gradients)
            for index in reversed(range(blocks)):
                for window in range(count):
                    norms[index, window] = gradients[window][0].float().norm(dim=1)
                if index:
                    self._backward(index, entered[index], gradients)
        if not bool(torch.isfinite(norms).all()):
            raise ModelError("the loss has NaN or infinite gradients; try `dtype` float32")
        return norms

    def _empty(self) -> Activations:
        states = self.captured.states
        return Activations(len(self.windows), states.shape, states.dtype, self.folder)

    def _each(self, of: Callable[[int], Tensor], into: Activations) -> None:
        """Every window's, several at once, each on one thread of its own."""
        for wave in self.pool.waves(range(len(self.windows))):
            found = self.pool.run([lambda w=w: of(w) for w in wave])  # type: ignore[misc]
            for window, state in zip(wave, found, strict=True):
                into[window] = state
            self.tick(len(wave))

    def _forward(self, index: int, entered: Activations, left: Activations) -> None:
        calls, device = self.captured.calls[index], self.source.device
        with self.source.open(index) as block:
            self._each(lambda w: calls[w](block, entered[w].to(device)), left)

    def _through_the_head(self, states: Activations) -> None:
        """The states that leave the last block become the gradients by them."""
        tokens, device = self.windows.tokens, self.source.device
        first = self.windows.beginning.first_target

        def loss(window: int, state: Tensor) -> Tensor:
            ids = tokens[window : window + 1].to(device)
            logits = end(ids, state)[0, first - 1 : -1].float()
            return nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum")

        source = self.source
        with source.head(), ending(source.model, source.blocks, self.captured.outputs) as end:
            self._each(lambda w: _gradient(states[w].to(device), lambda x: loss(w, x)), states)
        source.load_outside()  # the head leaves nothing in memory

    def _backward(self, index: int, entered: Activations, gradients: Activations) -> None:
        """Gradients by what leaves a block become those by what enters it."""
        calls, device = self.captured.calls[index], self.source.device
        with self.source.open(index) as block:

            def through(window: int) -> Tensor:
                onto = gradients[window].to(device)
                return _gradient(
                    entered[window].to(device), lambda x: calls[window](block, x), onto
                )

            self._each(through, gradients)


def _gradient(
    at: Tensor, function: Callable[[Tensor], Tensor], onto: Tensor | None = None
) -> Tensor:
    """Of the function's value, times `onto` where it is no number."""
    with torch.enable_grad():
        leaf = at.requires_grad_()
        value = function(leaf.clone())  # a block may change its input in place
        (found,) = torch.autograd.grad(value, leaf, onto)
    return found
