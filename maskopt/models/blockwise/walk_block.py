"""A block of a walk while it is at hand: its weights are in memory, to be looked at and changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from maskopt.models.architecture.blocks import Layer
from maskopt.models.blockwise.collect import BadSample, Grams, OpenBlock, collect, pass_on
from maskopt.models.blockwise.progress import Tick, ticker
from maskopt.models.blockwise.rounds import check_multiplied, first_round

if TYPE_CHECKING:
    from maskopt.models.blockwise.job import Job


class Block:
    """One block of a walk, its weights in memory: to be looked at, changed, and left by `advance`.

    Attributes:
        index: of the block in the model.
        layers: the chosen ones among its layers, in the order of the model.
        opened: its module, and what it takes to run samples through it.
        bad: samples that were left out since the block was opened.
    """

    def __init__(self, job: Job, index: int, layers: Sequence[Layer], opened: OpenBlock) -> None:
        self.job, self.index, self.layers = job, index, layers
        self.advanced = self.dense_advanced = False
        self.opened = opened
        self._before = len(opened.samples.bad)

    @property
    def bad(self) -> list[BadSample]:
        return self.opened.samples.bad[self._before :]

    def ticker(self, stage: str, total: int) -> Tick:
        """Tell the job's `on_progress` that a stage of this block begins; call it with what is done."""
        return ticker(self.job.tell, self.index, self.job.last + 1, stage, total)

    def grams(self, layers: Sequence[Layer] | None = None) -> Grams:
        """Gram matrices of the inputs of the layers (all chosen ones), the block being as it is now.

        With `calibrate_on` dense, the samples move on with the same pass, as long as a
        block follows that needs them.
        """
        if self.advanced:
            raise RuntimeError(f"the samples have left block {self.index}")
        advance = self.job.options.one_pass and self.job.goes_on(self.index)
        with torch.no_grad():
            grams = collect(
                self.opened,
                self.layers if layers is None else layers,
                advance=advance,
                moved=self.job.options.moved,
                all_experts=self.job.options.all_experts,
                weights=self.job.weights_of_tokens(self.index, self.opened.samples.states),
                tick=self.ticker("calibrate", len(self.opened.samples.active)),
            )
        self.advanced = advance
        self.dense_advanced |= self.job.options.moved
        return grams

    def rounds(self) -> Iterator[tuple[Sequence[Layer], Grams]]:
        """The chosen layers with their Gram matrices, all in one round; or, where the job's options
        say `true_sequential`, those that share their inputs in a round, each round on what the layers
        of the rounds before, as they are by then, produce.

        Raises:
            ModelError: a parameter that looks like experts and is none.
        """
        waiting = list(self.layers)
        while waiting:
            grams = self.grams(waiting)
            layers, waiting = waiting, []
            if self.job.options.true_sequential:
                layers, waiting = first_round(layers, grams)
            check_multiplied(self.job.source.model, layers, grams)
            yield layers, grams
            del grams  # their memory is needed

    def advance(self, stage: str = "forward") -> None:
        """Send the samples through the block as it is now; what comes out are the inputs of the next
        one. Nothing runs where nothing needs them, or where they have moved on already."""
        if not self.dense_advanced:
            self.advance_dense()
        if not self.advanced and self.job.goes_on(self.index):
            samples = self.opened.samples
            tick = self.ticker(stage, len(samples.active))
            with torch.no_grad():
                pass_on(self.opened, samples.states, tick)
        self.advanced = True

    def advance_dense(self) -> None:
        """Send the dense hidden states, where there are any, through the block, whose weights nobody has
        changed."""
        dense = self.opened.samples.dense
        if dense is not None and self.job.goes_on(self.index):
            with torch.no_grad():
                pass_on(self.opened, dense)
        self.dense_advanced = True
