"""How much the loss depends on the outputs of blocks and layers: once forward and back through the dense
model; and the weights of errors that follow from it.

All windows go forward through the blocks, and what enters each is kept; then backward, each block computed
once more with what autograd needs. The weights of one block are in memory at a time. The loss is the
cross-entropy of the windows' own next tokens, as in an empirical Fisher matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskopt.core.inputs import all_finite
from maskopt.core.problem import LayerProblem
from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer
from maskopt.models.architecture.source import Source
from maskopt.models.blockwise.activations import Activations
from maskopt.models.blockwise.distributed import ALONE, Ranks
from maskopt.models.blockwise.forward import Captured, Threads, ending
from maskopt.models.blockwise.watch import WatchedWeights, WatchGradients
from maskopt.models.calibration.tokens import Windows
from maskopt.models.options.prune import FISHER, RELATIVE

#: matrices [length, vocabulary] of float32 that the loss of a window and its gradient take
LOGITS = 4
#: lower limit of a row's weight, relative to the layer's mean, so that no row is pruned away
LEAST = 1e-3


@dataclass(frozen=True)
class Gradients:
    """Of the loss, in the dense model.

    Attributes:
        norms: [blocks, windows, length], of the gradient by every token's hidden state after each block; zero
            for windows that did not go through.
        squares: by layer name, float64 [rows], of the gradient by each output, summed over the tokens and
            divided by the number of predicted tokens. Half of Σᵣ squaresᵣ fᵣ is the loss per token that
            errors fᵣ of a layer's rows cost, to second order, with the diagonal of the empirical Fisher
            matrix as curvature. Layers that received no token are left out.
    """

    norms: Float[Tensor, "blocks windows length"]
    squares: Mapping[str, Float[Tensor, " rows"]]


@dataclass(frozen=True)
class DenseModel:
    """A model whose blocks are still dense, and `chosen` windows before the first block.

    Attributes:
        folder: for files of hidden states; None keeps them in memory.
        tick: called with the number of windows that went one of their `steps`.
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

    def gradients(self, layers: Sequence[Layer] = (), held: Set[int] = frozenset()) -> Gradients:
        """Gradients of the loss by the outputs of the blocks, and by those of some layers; windows `held` do
        not count in the squares. Raises ModelError: NaN or infinite activations or gradients."""
        blocks = len(self.source.blocks)
        norms = torch.zeros(blocks, len(self.windows), self.windows.length)
        squares: dict[str, Tensor] = {}
        with ExitStack() as until_the_end:
            states = self.captured.states
            shape: Any = (self.mine, states.shape, states.dtype, self.folder)
            later = [until_the_end.enter_context(Activations(*shape)) for _ in range(blocks)]
            # the first are those of the walk to come, and do not change
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
        # the others' windows are zero in each
        norms = torch.stack(self.ranks.gathered(norms)).sum(0)
        everything = (norms, *squares.values())
        if not all(map(all_finite, everything)):
            raise ModelError("the loss has NaN or infinite gradients; try `dtype` float32")
        return Gradients(norms, squares)

    def _mean(self, found: Mapping[int, Mapping[str, Tensor]], held: Set[int]) -> dict[str, Tensor]:
        """Over the windows that count, in their order: the sum does not depend on the threads."""
        used = [window for window in self.chosen if window not in held]
        tokens = len(used) * self.windows.targets
        total: dict[str, Tensor] = {}
        for window in used:
            for name, squares in found[window].items():
                total[name] = total[name] + squares if name in total else squares
        return {name: squares / tokens for name, squares in total.items()}

    def _each(self, of: Callable[[int], Tensor], into: Activations) -> None:
        """Compute every window's state, several at once."""
        for window, state in self.pool.each(of, self.mine):
            into[window] = state
            self.tick(self.ranks.size)

    def _forward(self, index: int, entered: Activations, left: Activations) -> None:
        calls, device = self.captured.calls[index], self.source.device
        with self.source.open(index) as block:
            self._each(lambda w: calls[w](block, entered[w].to(device)), left)

    def _through_the_head(self, states: Activations) -> None:
        """Replace the last block's outputs by the gradients by them."""
        tokens, device = self.windows.tokens, self.source.device
        first = self.windows.beginning.first_target

        def loss(window: int, state: Tensor) -> Tensor:
            ids = tokens[window : window + 1].to(device)
            logits = end(ids, state)[0, first - 1 : -1].float()
            return nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum")

        source = self.source
        with source.head(), ending(source, self.captured.outputs) as end:
            self._each(lambda w: _gradient(states[w].to(device), lambda x: loss(w, x)), states)
        source.load_outside()  # the head leaves nothing in memory

    def _backward(
        self, index: int, entered: Activations, gradients: Activations, layers: Sequence[Layer]
    ) -> dict[int, dict[str, Tensor]]:
        """Replace gradients by outputs by those by inputs; squares by window and layer."""
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
    """Of the function's value, times `onto` where it is no scalar."""
    with torch.enable_grad():
        leaf = at.requires_grad_()
        value = function(leaf.clone())  # a block may change its input in place
        (found,) = torch.autograd.grad(value, leaf, onto)
    return found


def row_sensitivity(
    problem: LayerProblem, sensitivity: str, gradients: Gradients | None, *, of_layer: bool
) -> Float[Tensor, " rows"]:
    """The weight of each row's error, float64, in units that all layers have in common.

    Args:
        gradients: of the loss, for `fisher`; a layer that it does not depend on has weight 0.
        of_layer: `relative` is to the layer's energy; else to each row's own.
    """
    energy = problem.output_energy()
    ones = torch.ones_like(energy)
    if sensitivity == RELATIVE:
        whole = energy.sum().expand_as(energy) if of_layer else energy
        return ones / whole.clamp(min=LEAST * float(whole.mean()) or 1.0)
    if sensitivity == FISHER:
        assert gradients is not None
        squares = gradients.squares.get(problem.name)
        return 0 * ones if squares is None else squares.to(energy) / 2
    return ones
