"""Perplexity by the convention of the field.

Text joined by blank lines, tokenised once, cut into non-overlapping windows, the tail dropped; the
mean cross-entropy over the length − 1 shifted targets of every window, and its exponential.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskopt.errors import DataError, ModelError
from maskopt.model.activations import Activations
from maskopt.model.blocks import vocabulary_size
from maskopt.model.collect import Samples, forward
from maskopt.model.forward import Workers, capture, ending
from maskopt.model.opening import capped_length, open_source
from maskopt.model.source import FolderSource, Source
from maskopt.model.tokens import Windows, check_vocabulary, evaluation_windows, token_windows

#: positions whose logits are brought to float32 at a time
POSITIONS = 128


@dataclass(frozen=True)
class Perplexity:
    """`value` is exp(`cross_entropy`), natural logarithm, over `targets` predicted tokens."""

    value: float
    cross_entropy: float
    windows: int
    length: int
    targets: int
    source: str
    sha256: str


def perplexity(
    model: nn.Module | str | Path,
    tokenizer_or_tokens: Any = None,
    *,
    text: str | Path | Sequence[str] | None = None,
    seq_len: int = 2048,
    windows: int | None = None,
    text_field: str = "text",
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    activation_memory: int = 4 * 2**30,
    trust_remote_code: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a causal language model, in memory or in a folder.

    As in pruning, all windows go through one block after the other, and of a folder only one block
    is in memory at a time; at the end the head makes the logits of `threads` windows at once.

    Args:
        model: a module, or a folder (or a name on the hub).
        tokenizer_or_tokens: a tokenizer for `text`, or token windows int64 [windows, length].
        text: see `maskopt.model.text.read_documents`; a list of strings is taken as documents.
        windows: take only the first so many.
        device, dtype, threads: as in `maskopt.prune_model`; the result does not depend on threads.
        activation_memory: bytes of hidden states above which they go to a temporary file.
        on_progress: called with (window passes done, all of them: one a block, and one at the end).

    Raises:
        DataError: no text or less than one window. ModelError: a model that cannot be read; NaN or
            infinite activations or logits.
    """
    given = tokenizer_or_tokens
    training = isinstance(model, nn.Module) and model.training
    source, tokenizer = open_source(
        model, given, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    if isinstance(given, Tensor):
        given = token_windows(given, "token tensor")
    if not isinstance(given, Windows):
        if text is None:
            raise DataError("perplexity needs text or tokens")
        length = capped_length(source.model, seq_len)
        given = evaluation_windows(text, tokenizer, seq_len=length, field=text_field, limit=windows)
    elif windows is not None:
        given = Windows(given.tokens[:windows], given.source)
    if given.length < 2:
        raise DataError("perplexity needs windows of at least two tokens")
    check_vocabulary(given, vocabulary_size(source.model))
    del tokenizer
    with Workers(source.device, threads or torch.get_num_threads()) as workers, torch.no_grad():
        try:
            total = _summed(source, given, workers, activation_memory, on_progress)
        finally:
            source.model.train(training)
    targets = len(given) * (given.length - 1)
    mean = total / targets
    return Perplexity(
        math.exp(mean) if mean < 700 else math.inf,
        mean,
        len(given),
        given.length,
        targets,
        given.source,
        given.digest,
    )


class _Windows(Samples):
    """Windows on their way through the model; none may be left out."""

    def __init__(self, states: Activations, windows: Windows) -> None:
        super().__init__(states, len(windows))
        self.source = windows.source

    def leave_out(self, sample: int, layer: str) -> None:
        raise ModelError(
            f"window {sample} of {self.source}: NaN or infinite activations in {layer!r}; "
            "try --dtype float32"
        )


def _summed(
    source: Source,
    windows: Windows,
    workers: Workers,
    activation_memory: int,
    on_progress: Callable[[int, int], None] | None,
) -> float:
    """Cross-entropy summed over the targets of all windows, in their order."""
    blocks, device = source.blocks, source.device
    passes, done = (len(blocks) + 1) * len(windows), 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, passes)

    def folder(size: int) -> Path | None:
        return Path(tempfile.gettempdir()) if size > activation_memory else None

    if isinstance(source, FolderSource):
        source.load_outside()
    captured = capture(source.model, blocks, windows.tokens, workers, device, folder)
    with captured.states:
        flow = _Windows(captured.states, windows)
        for index in range(len(blocks)):
            with source.open(index) as block:
                calls = captured.calls[index]
                forward(block, blocks.prefix(index), calls, flow, workers, device, tick)

        def summed(window: int) -> float:
            tokens = windows.tokens[window : window + 1].to(device)
            logits = end(tokens, captured.states[window].to(device))[0]
            return _cross_entropy(logits, tokens[0])

        total = 0.0
        with source.head(), ending(source.model, blocks, captured.outputs) as end:
            for wave in workers.waves(range(len(windows))):
                parts = workers.run([lambda w=w: summed(w) for w in wave])  # type: ignore[misc]
                for window, part in zip(wave, parts, strict=True):
                    if not math.isfinite(part):
                        raise ModelError(
                            f"window {window} of {windows.source}: NaN or infinite logits"
                        )
                    total += part
                tick(len(wave))
    return total


def _cross_entropy(logits: Tensor, tokens: Tensor) -> float:
    """Summed over the shifted targets; logits [length, vocabulary], tokens [length]."""
    total = 0.0
    for start in range(0, logits.shape[0] - 1, POSITIONS):
        stop = min(start + POSITIONS, logits.shape[0] - 1)
        part = logits[start:stop].float()
        total += float(
            nn.functional.cross_entropy(part, tokens[start + 1 : stop + 1], reduction="sum")
        )
    return total
