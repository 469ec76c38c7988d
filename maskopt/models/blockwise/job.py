"""One walk through the blocks of a model: what a prune, a certificate and a perplexity have in common.

    with open_job(model, text, options) as job:
        for block in job.blocks():
            grams = block.grams()
            ...
            block.advance()

All windows go through one block after the other. While a block is at hand its weights are in memory,
and may be changed; `grams` says what its layers are given, `advance` sends the windows through it, and
their hidden states become the inputs of the next block.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskopt.errors import DataError, ModelError
from maskopt.models.architecture.blocks import Layer, choose, vocabulary_size
from maskopt.models.architecture.opening import capped_length, open_source
from maskopt.models.architecture.source import Source
from maskopt.models.blockwise.activations import Activations
from maskopt.models.blockwise.collect import OpenBlock, Samples
from maskopt.models.blockwise.cuda_copies import lanes_to
from maskopt.models.blockwise.distributed import ALONE, Ranks
from maskopt.models.blockwise.forward import Captured, capture, ending
from maskopt.models.blockwise.gradients import DenseModel, Gradients
from maskopt.models.blockwise.memory import (
    Load,
    by_block,
    check_memory,
    state_copies,
    trained_states,
)
from maskopt.models.blockwise.progress import OnBlockProgress, ticker
from maskopt.models.blockwise.threads import Threads
from maskopt.models.blockwise.walk_block import Block
from maskopt.models.blockwise.windows import held_out, windows_of
from maskopt.models.calibration.token_weights import (
    GRADIENT,
    SKIP_FIRST,
    UNIFORM,
    weights_of_tokens,
)
from maskopt.models.calibration.tokens import (
    Windows,
    check_vocabulary,
)
from maskopt.models.options.walk import GRADIENT_WINDOWS, WalkOptions

if TYPE_CHECKING:
    from maskopt.models.checkpoints.report import FinishedBlock


def open_job(
    model: nn.Module | str | Path,
    text: Any,
    options: WalkOptions,
    *,
    tokenizer: Any = None,
    whole: bool = False,
    limit: int | None = None,
    on_progress: OnBlockProgress | None = None,
    ranks: Ranks = ALONE,
) -> Job:
    """A model with windows of text, ready to be walked through.

    Args:
        model: in memory, or a folder (or a name on the hub).
        text: token windows int64 [samples, length]; or text, see `read_documents`, a list of
            strings for documents; with the option `chat`, conversations, see
            `read_conversations`; None: for a look at the layers without a walk.
        tokenizer: for text; None takes that of the model's folder.
        whole: walk through all blocks, and take all of the text in consecutive windows. Else the
            walk ends at the last block with a chosen layer, and the windows are random crops.
        limit: of a whole walk: take only the first so many windows.
        on_progress: called with `BlockProgress`.
        ranks: the processes that walk together.

    Raises:
        MaskoptError: model, text or options cannot be used, or not together.
    """
    source = open_source(
        model,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
    )
    layers = choose(source.blocks.all_layers(), options.include, options.exclude)
    options.check_layers(layers)
    windows = None
    if text is not None:
        windows = windows_of(source, text, tokenizer, options, whole, limit)
        check_vocabulary(windows, vocabulary_size(source.model))
        if windows.length < 2 and (options.token_weights == SKIP_FIRST or options.backward):
            name = "sensitivity" if options.sensitive else "token_weights"
            raise DataError(
                f"`{name}` {getattr(options, name)} leaves nothing of windows of a single token"
            )
    return Job(source, layers, windows, options, whole=whole, on_progress=on_progress, ranks=ranks)


class Job:
    """A model, the chosen layers, and the windows that are to go through its blocks.

    Leaving its `with` frees what it holds, as does the end of `blocks` where there is no `with`.

    Attributes:
        layers: the chosen ones, in the order of the model.
        windows: None where the job was opened without text.
        last: the block that the walk ends with.
        threads: as many at once on the CPU.
        pool: those threads, while the walk goes on.
        gradients: of the dense model's loss, once a walk that needs them has begun.
        ranks: the processes that walk together, each with windows of its own.
    """

    def __init__(
        self,
        source: Source,
        layers: Sequence[Layer],
        windows: Windows | None,
        options: WalkOptions,
        *,
        whole: bool = False,
        on_progress: OnBlockProgress | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.source, self.layers, self.options = source, layers, options
        self.ranks = ranks
        self.windows, self.whole = windows, whole
        self.count = options.samples if windows is None else len(windows)
        if not whole:
            held_out(self.count, options.holdout)
        self.length = (
            capped_length(source.model, options.seq_len) if windows is None else windows.length
        )
        self.last = len(source.blocks) - 1 if whole else max(layer.block for layer in layers)
        self.threads = options.threads or torch.get_num_threads()
        self.activation_memory = int(options.activation_memory)
        if options.max_memory is not None:
            self.activation_memory = check_memory(self.load, int(options.max_memory))
        self.tell = on_progress or (lambda _: None)
        self.pool: Threads
        self._captured: Captured | None = None
        self.gradients: Gradients | None = None
        self._held: ExitStack | None = None
        self._walk: Generator[Block, None, None] | None = None

    def few(self) -> list[int]:
        """The first windows that masks are fitted to, enough to tell which layers and rows matter."""
        aside = held_out(self.count, self.options.holdout)
        return [window for window in range(self.count) if window not in aside][:GRADIENT_WINDOWS]

    def again(self, options: WalkOptions) -> Job:
        """Another walk through the same model, with the same windows."""
        options.check_layers(self.layers)
        return Job(
            self.source,
            self.layers,
            self.windows,
            options,
            whole=self.whole,
            on_progress=self.tell,
            ranks=self.ranks,
        )

    def whole_again(self, options: WalkOptions, windows: Sequence[int]) -> Job:
        """A walk through all blocks of the same model, with some of the windows."""
        assert self.windows is not None
        some = self.windows.take(windows)
        return Job(self.source, self.layers, some, options, whole=True, on_progress=self.tell)

    @property
    def load(self) -> Load:
        """What the memory of the walk depends on."""
        return Load(
            self.source,
            self.layers,
            self.count,
            self.length,
            self.threads,
            self.activation_memory,
            held=self.options.holdout > 0 and not self.whole,
            beside=self.options.beside,
            refit=self.options.refit is not None,
            trained=self.trained_states,
            gradients=0 if self.whole else self.options.gradient_windows(self.count),
            variants=0
            if self.whole
            else self.options.variant_windows(self.count, len(self.source.blocks)),
        )

    def blocks(
        self, finished: Mapping[int, FinishedBlock] | None = None, folder: Path | None = None
    ) -> Iterator[Block]:
        """Every block up to the last one, with its weights in memory while it is at hand.

        Args:
            finished: blocks that an earlier run has done: they are not yielded, the windows are
                only sent through them as that run left them.
            folder: for a file of hidden states, where they take more than `activation_memory`.
        """
        self._walk = self._blocks(finished or {}, folder or Path(tempfile.gettempdir()))
        return self._walk

    def _blocks(
        self, finished: Mapping[int, FinishedBlock], folder: Path
    ) -> Generator[Block, None, None]:
        waiting = [index for index in range(self.last + 1) if index not in finished]
        stop = self.last + 1 if self.whole else max(waiting, default=-1) + 1
        if not stop:
            return
        chosen = by_block(self.layers)
        with ExitStack() as until_the_end:
            held = self._held or until_the_end
            captured = self._captured = self._start(held, folder)
            samples = self._samples(captured.states, held, folder)
            if self.options.backward and not self.whole:
                self.gradients = self._dense_gradients(captured, samples.held, folder)
            for index in range(stop):
                done = finished.get(index)
                edits = None if done is None or self.options.one_pass else done.edits
                if done is not None:
                    samples.drop({bad["sample"] for bad in done.bad})
                    if samples.dense is not None:
                        with self.source.open(index, None) as module:
                            self._opened(index, module, captured, samples).advance_dense()
                with self.source.open(index, edits) as module:
                    block = self._opened(index, module, captured, samples, chosen.get(index, []))
                    if done is not None:
                        block.dense_advanced = True
                        block.advance("replay")
                        continue
                    yield block
                    if not block.advanced and self.goes_on(index):
                        raise RuntimeError(f"block {index} was left without advance()")

    def _opened(
        self,
        index: int,
        module: nn.Module,
        captured: Captured,
        samples: Samples,
        layers: Sequence[Layer] = (),
    ) -> Block:
        opened = OpenBlock(
            self.source.model,
            module,
            self.source.blocks.prefix(index).rstrip("."),
            self.source.device,
            captured.calls[index],
            samples,
            self.pool,
            self.ranks,
        )
        return Block(self, index, layers, opened)

    def goes_on(self, index: int) -> bool:
        """Does anything need the output of block `index`?"""
        return self.whole or index < self.last

    @contextmanager
    def logits(self, like: Job | None = None) -> Iterator[Callable[[int], Tensor]]:
        """After a whole walk: a function of a window's index that gives its logits [length, vocabulary].
        The output head is in memory meanwhile, but for what equals that of `like`, where it is in memory,
        too; it may be entered again."""
        captured = self._captured
        assert self.windows is not None
        assert captured is not None
        tokens, device = self.windows.tokens, self.source.device

        def of(window: int) -> Tensor:
            state = captured.states[window].to(device)
            return end(tokens[window : window + 1].to(device), state)[0]

        with self.after_blocks(like) as end:
            yield of

    @contextmanager
    def after_blocks(self, like: Job | None = None) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """After a whole walk: what the model makes of token ids [1, length] and of what leaves the last block
        for them, [1, length, width]: the logits [1, length, vocabulary]. As for `logits`."""
        assert self._captured is not None
        blocks, outputs = self.source.blocks, self._captured.outputs
        source = None if like is None else like.source
        with self.source.head(source), ending(self.source.model, blocks, outputs) as end:
            yield end

    def rest(self) -> None:
        """After a whole walk: keep nothing in memory but the states, until `logits`."""
        self.source.drop()

    def last_state(self, window: int) -> Tensor:
        """After a whole walk: what leaves the last block for a window, [length, width]."""
        assert self._captured is not None
        return self._captured.states[window][0]

    @contextmanager
    def in_memory(self, *, recompute: bool = False) -> Iterator[Callable[[int], Tensor]]:
        """All of the model in memory, in place of a walk: what leaves its last block for the window of an
        index, [1, length, width]; it can be differentiated by the blocks' parameters.

        Args:
            recompute: for its gradients keep only what enters each block, and compute the rest again.
        """
        with ExitStack() as until_the_end:
            held = self._held or until_the_end
            captured = self._start(held, Path(tempfile.gettempdir()))
            self.source.load_whole()
            modules = [self.source.blocks.modules[i] for i in range(len(self.source.blocks))]

            def of(window: int) -> Tensor:
                # a block may change its input in place
                state = captured.states[window].to(self.source.device, copy=True)
                again = recompute and torch.is_grad_enabled()
                for module, calls in zip(modules, captured.calls, strict=True):
                    state = (
                        checkpoint(calls[window], module, state, use_reentrant=False)
                        if again
                        else calls[window](module, state)
                    )
                return state

            yield of

    def __enter__(self) -> Job:
        self._held = ExitStack()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._walk is not None:
            self._walk.close()
        if self._held is not None:
            self._held.close()
            self._held = None
        self._captured = None

    def _start(self, held: ExitStack, folder: Path) -> Captured:
        """Everything before the first block."""
        if self.windows is None:
            raise ModelError("there is no text to walk through the blocks; name some")
        self.pool = held.enter_context(Threads(self.source.device, self.threads))
        self.source.load_outside()
        with torch.no_grad():
            captured = capture(
                self.source.model,
                self.source.blocks,
                self.windows.tokens,
                self.pool,
                self.source.device,
                self.ranks.own(range(len(self.windows))),
                lambda size: folder if self._spills(size) else None,
            )
        held.enter_context(captured.states)
        return captured

    def _samples(self, states: Activations, held: ExitStack, folder: Path) -> Samples:
        """The windows, as they come to the first block."""
        assert self.windows is not None
        skip = None if self.whole else self.options.skip_bad_samples
        count = len(self.windows)
        aside = frozenset() if self.whole else held_out(count, self.options.holdout)
        dense = None
        if self.options.beside:
            mine = self.ranks.own(range(count))
            size = len(mine) * states.shape.numel() * states.dtype.itemsize
            place = folder if self._spills(size) else None
            lanes = lanes_to(self.source.device)
            dense = Activations(mine, states.shape, states.dtype, place, lanes)
            held.enter_context(dense)
            for sample in mine:
                dense[sample] = states[sample]
        return Samples(states, count, self.windows.source, skip_bad=skip, held=aside, dense=dense)

    def _dense_gradients(self, captured: Captured, aside: Set[int], folder: Path) -> Gradients:
        """Of the dense model's loss, as options ask for them."""
        assert self.windows is not None
        blocks, states = len(self.source.blocks), captured.states
        # where tokens are weighted by them, those of the windows kept aside are, too
        weighted = self.options.token_weights == GRADIENT
        chosen = list(range(len(self.windows))) if weighted else self.few()
        size = (
            (blocks + 1)
            * len(self.ranks.own(chosen))
            * states.shape.numel()
            * states.dtype.itemsize
        )
        place = folder if size > self.activation_memory else None
        layers = self.layers if self.options.sensitive else ()
        steps = DenseModel.steps(blocks, of_layers=bool(layers)) * len(chosen)
        tick = ticker(self.tell, 0, self.last + 1, "gradients", steps)
        dense = DenseModel(
            self.source, self.windows, chosen, captured, self.pool, place, tick, self.ranks
        )
        return dense.gradients(layers, aside)

    def weights_of_tokens(self, block: int, states: Activations) -> Callable[[int], Tensor] | None:
        """What each token of a window counts, `states` entering the block; None: all of them once."""
        token_weights = self.options.token_weights
        if token_weights == UNIFORM:
            return None
        norms = None if self.gradients is None else self.gradients.norms[block]

        def of(window: int) -> Tensor:
            return weights_of_tokens(
                states[window], token_weights, None if norms is None else norms[window]
            )

        return of

    @cached_property
    def trained_states(self) -> int:
        """Hidden states of a window that are kept while the kept weights of a block are trained."""
        return trained_states(self.source, self.layers, self.options.reconstruction)

    def _spills(self, size: int) -> bool:
        """Whether hidden states of so many bytes, and those that are kept beside them, go to a file."""
        copies = state_copies(beside=self.options.beside, trained=self.trained_states)
        return copies * size > self.activation_memory
