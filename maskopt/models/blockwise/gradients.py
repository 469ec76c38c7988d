"""How much the loss depends on what blocks and layers give: once forward and back through the dense model.

All windows go forward through the blocks, and what enters each is kept; then backward, each block computed
once more with what autograd needs. So, as in every walk, the weights of one block are in memory at a time.
The loss is the cross-entropy of the windows' own next tokens, as in an empirical Fisher matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer
from maskopt.models.architecture.source import Source
from maskopt.models.blockwise.activations import Activations
from maskopt.models.blockwise.distributed import ALONE, Ranks
from maskopt.models.blockwise.forward import Captured, ending
from maskopt.models.blockwise.threads import Threads
from maskopt.models.blockwise.watch import WatchedWeights, WatchGradients
from maskopt.models.calibration.tokens import Windows

#: matrices [length, vocabulary] of float32 that the loss of a window and its gradient take
LOGITS = 4


@dataclass(frozen=True)
class Gradients:
    """Of the loss, in the dense model.

    Attributes:
        norms: [blocks, windows, length], of that by every token's hidden state as it leaves each block; zero
            for windows that did not go through.
        squares: by layer name, float64 [rows], of the gradient by each output: summed over the tokens, a part
            of the number of tokens that the loss is of. Half of Σᵣ squaresᵣ fᵣ is what errors fᵣ of a layer's
            rows cost each token, to second order, with the diagonal of the empirical Fisher matrix for the
            loss's curvature. Layers that no token came to are left out.
    """

    norms: Float[Tensor, "blocks windows length"]
    squares: Mapping[str, Float[Tensor, " rows"]]


@dataclass(frozen=True)
class DenseModel:
    """A model whose blocks are as they were, and windows that are about to enter the first.

    Attributes:
        chosen: those that go through, ascending.
        captured: what the blocks are called with, and the states that enter block 0.
        folder: for files of hidden states; None keeps them in memory.
        tick: called with how many windows went one step: `steps` of them each.
        ranks: the processes that have the windows among themselves.
    """

    source: Source
    windows: Windows
    chosen: Sequence[int]
    captured: Captured
    pool: Threads
    folder: Path | None
    tick: Callable[[int], None]
    ranks: Ranks = ALONE

    @property
    def mine(self) -> list[int]:
        """The chosen windows that go through here."""
        return self.ranks.own(self.chosen)

    @staticmethod
    def steps(blocks: int, *, of_layers: bool = False) -> int:
        """Through every block, the head, and back through every block (but the first, where layers do not
        matter)."""
        return 2 * blocks + of_layers

    def gradients(self, layers: Sequence[Layer] = (), held: Set[int] = frozenset()) -> Gradients:
        """Gradients of the loss by the states that leave the blocks, and by the outputs of some layers.

        Args:
            held: windows that do not count in the squares.

        Raises:
            ModelError: NaN or infinite activations or gradients.
        """
        blocks = len(self.source.blocks)
        norms = torch.zeros(blocks, len(self.windows), self.windows.length)
        squares: dict[str, Tensor] = {}
        with ExitStack() as until_the_end:
            later = [until_the_end.enter_context(self._empty()) for _ in range(blocks)]
            # the first are those of the walk to come, and stay as they are
            entered = [self.captured.states, *later]
            for index in range(blocks):
                self._forward(index, entered[index], entered[index + 1])
            gradients = entered.pop()  # of the states in it, in their place
            self._through_the_head(gradients)
            for index in reversed(range(blocks)):
                for window in self.mine:
                    norms[index, window] = gradients[window][0].float().norm(dim=1)
                mine = [layer for layer in layers if layer.block == index]
                if index or mine:
                    found = self._backward(index, entered[index], gradients, mine)
                    squares |= self._mean(found, held)
        norms = torch.stack(self.ranks.gathered(norms)).sum(
            0
        )  # the others' windows are zero in each
        everything = (norms, *squares.values())
        if not all(bool(torch.isfinite(values).all()) for values in everything):
            raise ModelError("the loss has NaN or infinite gradients; try `dtype` float32")
        return Gradients(norms, squares)

    def _mean(self, found: Mapping[int, Mapping[str, Tensor]], held: Set[int]) -> dict[str, Tensor]:
        """Over the windows that count, in their order: the sum does not depend on the threads."""
        used = [window for window in self.chosen if window not in held]
        tokens = len(used) * (self.windows.length - self.windows.beginning.first_target)
        total: dict[str, Tensor] = {}
        for window in used:
            for name, squares in found[window].items():
                total[name] = total[name] + squares if name in total else squares
        return {name: squares / tokens for name, squares in total.items()}

    def _empty(self) -> Activations:
        states = self.captured.states
        return Activations(self.mine, states.shape, states.dtype, self.folder)

    def _each(self, of: Callable[[int], Tensor], into: Activations) -> None:
        """Every window's, several at once, each on one thread of its own."""
        for wave in self.ranks.waves(self.chosen, self.pool.count):
            mine = self.ranks.own(wave)
            found = self.pool.run([lambda w=w: of(w) for w in mine])  # type: ignore[misc]
            for window, state in zip(mine, found, strict=True):
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

    def _backward(
        self, index: int, entered: Activations, gradients: Activations, layers: Sequence[Layer]
    ) -> dict[int, dict[str, Tensor]]:
        """Gradients by what leaves a block become those by what enters it.

        Returns, by window and layer name, the squares of those by the layers' outputs.
        """
        calls, device = self.captured.calls[index], self.source.device
        squares: dict[int, dict[str, Tensor]] = {}
        with self.source.open(index) as block:
            weights = WatchedWeights(self.source.model, layers)

            def through(window: int) -> Tensor:
                watch = WatchGradients(weights)

                def watched(state: Tensor) -> Tensor:
                    with watch:
                        return calls[window](block, state)

                onto = gradients[window].to(device)
                found = _gradient(entered[window].to(device), watched, onto)
                squares[window] = watch.squares
                return found

            self._each(through, gradients)
        return {w: found for theirs in self.ranks.gathered(squares) for w, found in theirs.items()}


def _gradient(
    at: Tensor, function: Callable[[Tensor], Tensor], onto: Tensor | None = None
) -> Tensor:
    """Of the function's value, times `onto` where it is no number."""
    with torch.enable_grad():
        leaf = at.requires_grad_()
        value = function(leaf.clone())  # a block may change its input in place
        (found,) = torch.autograd.grad(value, leaf, onto)
    return found
