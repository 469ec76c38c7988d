"""One walk through the blocks of a model, for all that prunes, bounds or evaluates.

    with open_job(model, text, options) as job:
        for block in job.blocks():
            grams = block.grams()
            ...
            block.advance()

All windows go through one block after the other. While a block is open its weights are in memory and may be
changed; `grams` sums what its layers receive, `advance` sends the windows through it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskopt.errors import DataError, ModelError, OptionError
from maskopt.models.architecture.blocks import Layer, choose, vocabulary_size
from maskopt.models.architecture.source import Source, capped_length, load_tokenizer, open_source
from maskopt.models.blockwise.activations import Activations, lanes_to
from maskopt.models.blockwise.collect import (
    BadSample,
    Grams,
    OpenBlock,
    Samples,
    collect,
    pass_on,
)
from maskopt.models.blockwise.distributed import ALONE, Ranks
from maskopt.models.blockwise.forward import (
    BlockProgress,
    Captured,
    OnBlockProgress,
    Threads,
    Tick,
    capture,
    ending,
    ticker,
)
from maskopt.models.blockwise.gradients import DenseModel, Gradients
from maskopt.models.blockwise.memory import Load, check_memory
from maskopt.models.calibration.chat import chat_windows
from maskopt.models.calibration.generation import write_windows
from maskopt.models.calibration.mixture import mixed, window_counts
from maskopt.models.calibration.tokens import (
    GRADIENT,
    SELF,
    SKIP_FIRST,
    UNIFORM,
    Windows,
    calibration_windows,
    check_vocabulary,
    evaluation_windows,
    held_out,
    token_windows,
    weights_of_tokens,
)
from maskopt.models.checkpoints.bos import TEMPLATE, beginning_of
from maskopt.models.checkpoints.report import FinishedBlock, grouped
from maskopt.models.checkpoints.schema import IN_DENSE
from maskopt.models.options.walk import GRADIENT_WINDOWS, WalkOptions


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
    written: Tensor | None = None,
) -> Job:
    """A model with windows of text, ready for a walk; MaskoptError where these or the options cannot be used.

    Args:
        model: in memory, or a folder (or a name on the hub).
        text: token windows int64 [samples, length]; or text, see `read_documents`, or with the option `chat`
            conversations, see `read_conversations`; None: for a look at the layers without a walk.
        tokenizer: for text; None takes that of the model's folder.
        whole: walk through all blocks with all of the text, in at most `limit` consecutive windows; else up
            to the last block with a chosen layer, with random crops.
        ranks: the processes that walk together.
        written: windows that the model wrote in an earlier run.
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
        how: dict[str, Any] = {"ranks": ranks, "written": written, "on_progress": on_progress}
        windows = windows_of(source, text, tokenizer, options, whole, limit, **how)
        check_vocabulary(windows, vocabulary_size(source.model))
        backward = options.gradient_windows(len(windows)) > 0
        if windows.length < 2 and (options.token_weights == SKIP_FIRST or backward):
            name = "sensitivity" if options.sensitive else "token_weights"
            raise DataError(
                f"`{name}` {getattr(options, name)} leaves nothing of windows of a single token"
            )
    return Job(source, layers, windows, options, whole=whole, on_progress=on_progress, ranks=ranks)


def windows_of(
    source: Source,
    text: Any,
    tokenizer: Any,
    options: WalkOptions,
    whole: bool,
    limit: int | None,
    *,
    on_progress: OnBlockProgress | None = None,
    ranks: Ranks = ALONE,
    written: Tensor | None = None,
) -> Windows:
    """The windows of `open_job`'s text; MaskoptError for text, tokenizer or numbers that cannot be used."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise OptionError(f"`windows` must be a whole number of at least 1, not {limit!r}")
    if isinstance(text, Windows | Tensor) and not options.chat:
        given = text if isinstance(text, Windows) else token_windows(text, "token tensor")
        most = capped_length(source.model, given.length)
        if given.length > most:
            raise DataError(
                f"windows of {given.length} tokens are longer than the model's {most} positions; cut them"
            )
        return given if limit is None else given.take(slice(limit))
    own: dict[str, Any] = {"on_progress": on_progress, "ranks": ranks, "written": written}
    if isinstance(text, Mapping):
        if whole:
            raise DataError(
                "a mixture of sources is for calibration; evaluate on one text at a time"
            )
        counts = window_counts(list(text.values()), options.samples)
        parts = []
        for part, count in zip(text, counts, strict=True):
            counted = replace(options, samples=count)
            parts.append(windows_of(source, part, tokenizer, counted, False, None, **own))
        return mixed(parts)
    if tokenizer is None and source.checkpoint is not None:
        trust = options.trust_remote_code
        tokenizer = load_tokenizer(source.checkpoint.folder, trust_remote_code=trust)
    length = capped_length(source.model, options.seq_len)
    if whole and length < 2:
        raise OptionError(f"`seq_len` must be a whole number of at least 2, not {length!r}")
    if text == SELF and not whole:
        return _own_text(source, tokenizer, options, length, **own)
    if options.chat:
        samples, seed = (limit, None) if whole else (options.samples, options.seed)
        return chat_windows(text, tokenizer, samples=samples, seq_len=length, seed=seed)
    how: dict[str, Any] = {"seq_len": length, "field": options.text_field, "bos": options.bos}
    if whole:
        return evaluation_windows(text, tokenizer, limit=limit, **how)
    return calibration_windows(text, tokenizer, samples=options.samples, seed=options.seed, **how)


def _own_text(
    source: Source,
    tokenizer: Any,
    options: WalkOptions,
    length: int,
    *,
    on_progress: OnBlockProgress | None,
    ranks: Ranks,
    written: Tensor | None,
) -> Windows:
    """The windows that the model writes, or `written` ones of an earlier run; of several processes the first
    one writes."""
    if written is not None:
        if written.shape != (options.samples, length):
            raise DataError(
                f"the stored windows that the model wrote are {list(written.shape)}, not "
                f"{[options.samples, length]}; give the `samples` and `seq_len` of that run"
            )
        kept = TEMPLATE if options.chat else beginning_of(tokenizer, options.bos)
        return Windows(written.long(), SELF, kept, written.long())
    tell, total = on_progress or (lambda _: None), options.samples * length
    tick = ticker(tell, 0, len(source.blocks), "writing text", total)
    return ranks.agreed(
        lambda: write_windows(
            source,
            tokenizer,
            samples=options.samples,
            seq_len=length,
            seed=options.seed,
            bos=options.bos,
            chat=options.chat,
            on_tokens=tick,
        )
    )


class Job:
    """A model, the chosen layers, and the windows for its blocks. Leaving its `with` frees what it holds.

    Attributes:
        held: indices of the held-out windows.
        few: the first fitted windows, enough to measure which layers and rows matter.
        last: the block that the walk ends with.
        needed: blocks whose outputs are needed.
        passes: of windows through blocks, in a whole walk.
        pool: the threads on the CPU, during the walk.
        gradients: of the dense model's loss, once a walk that needs them has begun.
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
        self._windows, self.whole = windows, whole
        self.count = options.samples if windows is None else len(windows)
        self.held = frozenset() if whole else held_out(self.count, options.holdout)
        self.few = [w for w in range(self.count) if w not in self.held][:GRADIENT_WINDOWS]
        capped = capped_length(source.model, options.seq_len)
        self.length = capped if windows is None else windows.length
        self.last = len(source.blocks) - 1 if whole else max(layer.block for layer in layers)
        self.needed = self.last + whole
        self.passes = (self.last + 1) * self.count
        self.threads = options.threads or torch.get_num_threads()
        self.activation_memory = int(options.activation_memory)
        if options.max_memory is not None:
            self.activation_memory = check_memory(self.load, int(options.max_memory))
        self.tell = on_progress or (lambda _: None)
        self.pool: Threads
        self._captured: Captured | None = None
        self.gradients: Gradients | None = None
        self._until_exit: ExitStack | None = None
        self._walk: Generator[Block, None, None] | None = None

    @property
    def text(self) -> Windows | None:
        """The windows; None where the job was opened without text."""
        return self._windows

    @property
    def windows(self) -> Windows:
        """Raises ModelError where the job was opened without text."""
        if self._windows is None:
            raise ModelError("there is no text to walk through the blocks; name some")
        return self._windows

    def again(self, options: WalkOptions) -> Job:
        """Another walk through the same model, with the same windows."""
        options.check_layers(self.layers)
        how: dict[str, Any] = {"whole": self.whole, "on_progress": self.tell, "ranks": self.ranks}
        return Job(self.source, self.layers, self._windows, options, **how)

    @property
    def load(self) -> Load:
        """What the memory of the walk depends on."""
        windows = self.count, self.length
        how = self.threads, self.activation_memory
        return Load(self.source, self.layers, self.options, *windows, *how)

    def blocks(
        self, finished: Mapping[int, FinishedBlock] | None = None, folder: Path | None = None
    ) -> Iterator[Block]:
        """Every block up to the last one, with its weights in memory while it is open; hidden states go to a
        file in `folder` above `activation_memory`. Windows go through `finished` blocks as an earlier run
        left them."""
        self._walk = self._blocks(finished or {}, folder or Path(tempfile.gettempdir()))
        return self._walk

    def _blocks(
        self, finished: Mapping[int, FinishedBlock], folder: Path
    ) -> Generator[Block, None, None]:
        waiting = [index for index in range(self.last + 1) if index not in finished]
        stop = self.last + 1 if self.whole else max(waiting, default=-1) + 1
        if not stop:
            return
        chosen = grouped(self.layers, "block")
        with ExitStack() as until_the_end:
            stack = self._until_exit or until_the_end
            captured = self._captured = self._start(stack, folder)
            samples = self._samples(captured.states, stack, folder)
            if self.options.gradient_windows(self.count) and not self.whole:
                self.gradients = self._dense_gradients(captured, folder)
            for index in range(stop):
                done = finished.get(index)
                edits = None if done is None or self.options.one_pass else done.edits
                if done is not None:
                    samples.drop({bad["sample"] for bad in done.bad})
                    if samples.dense is not None:
                        with self.source.open(index) as module:
                            Block(self, index, [], module, captured, samples).run_dense()
                with self.source.open(index, edits) as module:
                    layers = chosen.get(index, [])
                    block = Block(self, index, layers, module, captured, samples)
                    if done is not None:
                        block.advance("replay")
                        continue
                    block.run_dense()
                    yield block
                    if not block.advanced and index < self.needed:
                        raise RuntimeError(f"block {index} was left without advance()")

    @contextmanager
    def after_blocks(self, like: Job | None = None) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """Context of a function of ids [1, length] and the last output [1, length, width] to logits."""
        assert self._captured is not None
        source = None if like is None else like.source
        with self.source.head(source), ending(self.source, self._captured.outputs) as end:
            yield end

    def last_state(self, window: int) -> Tensor:
        """After a whole walk: the last block's output for a window, [length, width]."""
        assert self._captured is not None
        return self._captured.states[window][0]

    def in_memory(self, *, recompute: bool = False) -> Callable[[int], Tensor]:
        """Load the whole model, inside the job's `with`; a differentiable function of a window to the last
        block's output."""
        assert self._until_exit is not None
        captured = self._start(self._until_exit, Path(tempfile.gettempdir()))
        self.source.load_whole()

        def of(window: int) -> Tensor:
            # a block may change its input in place
            state = captured.states[window].to(self.source.device, copy=True)
            again = recompute and torch.is_grad_enabled()
            for module, calls in zip(self.source.blocks.modules, captured.calls, strict=True):
                if again:
                    state = checkpoint(calls[window], module, state, use_reentrant=False)
                else:
                    state = calls[window](module, state)
            return state

        return of

    def __enter__(self) -> Job:
        self._until_exit = ExitStack()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._walk is not None:
            self._walk.close()
        assert self._until_exit is not None
        self._until_exit.close()
        self._until_exit = self._captured = None

    def _start(self, stack: ExitStack, folder: Path) -> Captured:
        """Everything before the first block."""
        self.pool = stack.enter_context(Threads(self.source.device, self.threads))
        self.source.load_outside()
        with torch.no_grad():
            captured = capture(
                self.source,
                self.windows.tokens,
                self.pool,
                self.ranks.own(range(self.count)),
                lambda size: folder if self._spills(size) else None,
            )
        stack.enter_context(captured.states)
        return captured

    def _samples(self, states: Activations, stack: ExitStack, folder: Path) -> Samples:
        """The windows before the first block."""
        skip = None if self.whole else self.options.skip_bad_samples
        dense = None
        if self.options.reconstruction is not None:
            mine = self.ranks.own(range(self.count))
            place = folder if self._spills(len(mine) * states.bytes) else None
            lanes = lanes_to(self.source.device)
            dense = Activations(mine, states.shape, states.dtype, place, lanes)
            stack.enter_context(dense)
            for sample in mine:
                dense[sample] = states[sample]
        active, words = list(range(self.count)), self.windows.source
        return Samples(states, dense, active, words, skip, self.held)

    def _dense_gradients(self, captured: Captured, folder: Path) -> Gradients:
        """Of the dense model's loss, as options ask for them."""
        blocks = len(self.source.blocks)
        # where tokens are weighted by them, those of held-out windows are, too
        weighted = self.options.token_weights == GRADIENT
        chosen = list(range(self.count)) if weighted else self.few
        size = (blocks + 1) * len(self.ranks.own(chosen)) * captured.states.bytes
        place = folder if size > self.activation_memory else None
        layers = self.layers if self.options.sensitive else ()
        # through every block, the head, and back through every block (but the first, without layers)
        steps = (2 * blocks + bool(layers)) * len(chosen)
        tick = ticker(self.tell, 0, self.last + 1, "gradients", steps)
        what = (self.source, self.windows, chosen, captured, self.pool)
        return DenseModel(*what, place, tick, self.ranks).gradients(layers, self.held)

    def _spills(self, size: int) -> bool:
        """Whether hidden states of so many bytes, and those kept along with them, go to a file."""
        return self.options.copies * size > self.activation_memory


class Block(OpenBlock):
    """One block of a walk, its weights in memory: changed by the caller, and left by `advance`. `layers` are
    the chosen ones."""

    def __init__(
        self,
        job: Job,
        index: int,
        layers: Sequence[Layer],
        module: nn.Module,
        captured: Captured,
        samples: Samples,
    ) -> None:
        self.job, self.index, self.layers = job, index, layers
        self.model, self.device = job.source.model, job.source.device
        self.name = job.source.blocks.prefix(index).rstrip(".")
        self.module, self.calls, self.samples = module, captured.calls[index], samples
        self.threads, self.ranks = job.pool, job.ranks
        self.advanced, self._before = False, len(samples.bad)

    @property
    def bad(self) -> list[BadSample]:
        """Samples that were left out since the block was opened."""
        return self.samples.bad[self._before :]

    def ticker(self, stage: str, total: int) -> Tick:
        """Report to the job's `on_progress` that a stage of this block begins; call it with what is done."""
        return ticker(self.job.tell, self.index, self.job.last + 1, stage, total)

    def grams(self, layers: Sequence[Layer] | None = None) -> Grams:
        """Gram matrices of the layers' inputs; with `calibrate_on` dense, the samples advance, too."""
        if self.advanced:
            raise RuntimeError(f"the samples have left block {self.index}")
        options, gradients = self.job.options, self.job.gradients
        advance = options.one_pass and self.index < self.job.needed

        def weights(window: int) -> Tensor:
            gradient = None if gradients is None else gradients.norms[self.index, window]
            return weights_of_tokens(self.samples.states[window], options.token_weights, gradient)

        with torch.no_grad():
            grams = collect(
                self,
                self.layers if layers is None else layers,
                advance=advance,
                all_experts=options.all_experts,
                weights=None if options.token_weights == UNIFORM else weights,
                tick=self.ticker("calibrate", len(self.samples.active)),
            )
        self.advanced = advance
        return grams

    def rounds(self) -> Iterator[tuple[Sequence[Layer], Grams]]:
        """The chosen layers with their Gram matrices, in one round; with `true_sequential`, one per shared
        inputs, after the layers of earlier rounds were changed. ModelError for a 3-D parameter that holds no
        experts."""
        waiting = list(self.layers)
        while waiting:
            grams = self.grams(waiting)
            layers, waiting = waiting, []
            if self.job.options.true_sequential:
                layers, waiting = grams.first_round(layers)
            self._check_multiplied(layers, grams)
            yield layers, grams
            del grams  # their memory is needed

    def _check_multiplied(self, layers: Sequence[Layer], grams: Grams) -> None:
        seen = {layer.parameter for layer in layers if grams.of(layer.name) is not None}
        unseen: dict[str, list[Layer]] = {}
        for layer in layers:
            if layer.expert is not None and layer.parameter not in seen:
                unseen.setdefault(layer.parameter, []).append(layer)
        for name, parts in unseen.items():
            if len(parts) == self.job.source.model.get_parameter(name).shape[0]:
                raise ModelError(
                    f"parameter {name!r} looks like experts, but no token was multiplied with any of them; "
                    f"leave it out with `exclude` {parts[0].kind!r}"
                )

    def advance(self, stage: str = "forward") -> None:
        """Send the samples on through the block as it is now, where a later block needs them."""
        if not self.advanced and self.index < self.job.needed:
            tick = self.ticker(stage, len(self.samples.active))
            pass_on(self, self.samples.states, tick)
        self.advanced = True

    def run_dense(self) -> None:
        """Send the dense hidden states, where there are any, through the block while its weights are dense:
        its outputs are the targets of its training."""
        if (dense := self.samples.dense) is not None:
            tick = self.ticker("targets", len(self.samples.active))
            pass_on(self, dense, tick, where=self.name + IN_DENSE)


def walk_whole(job: Job, tell: Callable[[int, int], None]) -> None:
    """Send all windows through all blocks; `tell` is called with passes done, and their number."""

    def report(event: BlockProgress) -> None:
        if event.done:
            tell(event.block * job.count + event.done, job.passes + job.count)

    job.tell = report
    for block in job.blocks():
        block.advance()
