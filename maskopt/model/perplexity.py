"""Perplexity by the convention of the field.

Text joined by blank lines, tokenised once, cut into non-overlapping windows, the tail dropped; the
mean cross-entropy over the length − 1 shifted targets of every window, and its exponential.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskopt.errors import DataError, ModelError
from maskopt.model.job import Job, open_job, tokens_or_tokenizer
from maskopt.model.options import WalkOptions
from maskopt.model.progress import Progress
from maskopt.model.tokens import Windows

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
    options = WalkOptions(
        seq_len=seq_len,
        text_field=text_field,
        device=device,
        dtype=dtype,
        threads=threads,
        activation_memory=activation_memory,
        trust_remote_code=trust_remote_code,
    )
    given, tokenizer = tokens_or_tokenizer(tokenizer_or_tokens, text)
    if given is None:
        raise DataError("perplexity needs text or tokens")
    training = isinstance(model, nn.Module) and model.training
    try:
        job = open_job(model, given, options, tokenizer=tokenizer, whole=True, limit=windows)
        cut = job.windows
        assert cut is not None
        if cut.length < 2:
            raise DataError("perplexity needs windows of at least two tokens")
        total = _summed(job, cut, on_progress or (lambda done, total: None))
    finally:
        if isinstance(model, nn.Module):
            model.train(training)
    targets = len(cut) * (cut.length - 1)
    mean = total / targets
    return Perplexity(
        math.exp(mean) if mean < 700 else math.inf,
        mean,
        len(cut),
        cut.length,
        targets,
        cut.source,
        cut.digest,
    )


def _summed(job: Job, windows: Windows, tell: Callable[[int, int], None]) -> float:
    """Cross-entropy summed over the targets of all windows, in their order."""
    count = len(windows)
    passes = (job.last + 2) * count

    def told(event: Progress) -> None:
        if event.done:
            tell(event.block * count + event.done, passes)

    job.tell = told
    with job, torch.no_grad():
        for block in job.blocks():
            block.advance()
        total = 0.0
        with job.logits() as logits:

            def summed(window: int) -> float:
                return _cross_entropy(logits(window), windows.tokens[window])

            for wave in job.pool.waves(range(count)):
                parts = job.pool.run([lambda w=w: summed(w) for w in wave])  # type: ignore[misc]
                for window, part in zip(wave, parts, strict=True):
                    if not math.isfinite(part):
                        raise ModelError(
                            f"window {window} of {windows.source}: NaN or infinite logits"
                        )
                    total += part
                tell(passes - count + wave[-1] + 1, passes)
    return total


def _cross_entropy(logits: Tensor, tokens: Tensor) -> float:
    """Summed over the shifted targets; logits [length, vocabulary], tokens [length]."""
    tokens, total = tokens.to(logits.device), 0.0
    for start in range(0, logits.shape[0] - 1, POSITIONS):
        stop = min(start + POSITIONS, logits.shape[0] - 1)
        part = logits[start:stop].float()
        total += float(
            nn.functional.cross_entropy(part, tokens[start + 1 : stop + 1], reduction="sum")
        )
    return total
