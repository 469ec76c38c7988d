"""Perplexity of a model on consecutive windows of text.

Text joined by blank lines, tokenised once, cut into non-overlapping windows, the tail dropped, each window
beginning with what the tokenizer puts before a text (`checkpoints.bos`); the mean cross-entropy over
the shifted targets of every window, of which a beginning is none, and its exponential.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskopt.errors import DataError, ModelError
from maskopt.models.blockwise.job import Job, open_job
from maskopt.models.blockwise.progress import BlockProgress
from maskopt.models.blockwise.windows import tokens_or_tokenizer
from maskopt.models.calibration.tokens import Windows
from maskopt.models.options.walk import EVALUATION, WalkOptions, check_names

#: positions at a time, few, so that their logits in float32 stay in the cache: 262,144 a position, of Gemma
POSITIONS = 4
#: of the windows, for an interval
RESAMPLES = 2000


@dataclass(frozen=True)
class Perplexity:
    """`value` is exp(`cross_entropy`), natural logarithm, over `targets` predicted tokens.

    `low` and `high` are a 95% interval of the value, by bootstrap over the windows; `beginning` says what
    the windows begin with.
    """

    value: float
    cross_entropy: float
    low: float
    high: float
    windows: int
    length: int
    targets: int
    beginning: str
    source: str
    sha256: str


def perplexity(
    model: nn.Module | str | Path,
    tokenizer_or_tokens: Any = None,
    *,
    text: str | Path | Sequence[Any] | None = None,
    windows: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Perplexity:
    """Perplexity of a causal language model, in memory or in a folder.

    As in pruning, all windows go through one block after the other, and of a folder only one block
    is in memory at a time; at the end the head makes the logits of `threads` windows at once.

    Args:
        model: a module, or a folder (or a name on the hub).
        tokenizer_or_tokens: a tokenizer for `text`, or token windows int64 [windows, length].
        text: see `maskopt.models.calibration.text.read_documents`; a list of strings is taken as documents.
            With `chat`, see `maskopt.models.calibration.chat.read_conversations`.
        windows: take only the first so many.
        on_progress: called with (window passes done, all of them: one a block, and one at the end).
        options: `seq_len`, `text_field`, `chat`, `bos`, `device`, `dtype`, `threads`,
            `activation_memory`, `trust_remote_code`, as in `maskopt.PruneOptions`.

    Raises:
        OptionError: another option, or an impossible value.
        DataError: no text or less than one window.
        ModelError: a model that cannot be read; NaN or infinite activations or logits.
    """
    check_names(options, EVALUATION)
    walk = WalkOptions(**options)
    given, tokenizer = tokens_or_tokenizer(tokenizer_or_tokens, text)
    if given is None:
        raise DataError("perplexity needs text or tokens")
    training = isinstance(model, nn.Module) and model.training
    try:
        job = open_job(model, given, walk, tokenizer=tokenizer, whole=True, limit=windows)
        cut = job.windows
        assert cut is not None
        check_targets(cut)
        with job:
            summed = _window_losses(job, on_progress or (lambda done, total: None))
    finally:
        if isinstance(model, nn.Module):
            model.train(training)
    return perplexity_of(summed, cut)


def check_targets(windows: Windows) -> None:
    """Raise DataError where nothing in a window is predicted."""
    if windows.length <= windows.beginning.first_target:
        raise DataError(
            "nothing is predicted in these windows; take windows of at least two tokens, and one of text"
        )


def perplexity_of(summed: Float[Tensor, " windows"], windows: Windows) -> Perplexity:
    """Out of the cross-entropy summed over the targets of each window."""
    per_window = windows.length - windows.beginning.first_target
    low, high = interval(summed / per_window)
    # summed one after the other, as the windows came
    mean = sum(summed.tolist()) / (per_window * len(windows))
    return Perplexity(
        value=exponential(mean),
        cross_entropy=mean,
        low=exponential(low),
        high=exponential(high),
        windows=len(windows),
        length=windows.length,
        targets=per_window * len(windows),
        beginning=str(windows.beginning),
        source=windows.source,
        sha256=windows.digest,
    )


def interval(values: Float[Tensor, " windows"]) -> tuple[float, float]:
    """A 95% interval of the mean, by percentile bootstrap over the windows, seeded."""
    generator = torch.Generator().manual_seed(0)
    lots = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = values.double()[lots].mean(1).sort().values
    cut = round(0.025 * RESAMPLES)
    return float(means[cut]), float(means[-1 - cut])


def _window_losses(job: Job, tell: Callable[[int, int], None]) -> Float[Tensor, " windows"]:
    """Walk through the whole model; cross-entropy summed over the targets of each window, float64."""
    walk_whole(job, tell)
    with job.logits() as logits:
        return of_windows(
            job,
            lambda window: cross_entropy(job, window, logits(window)),
            lambda done: tell(walk_passes(job) + done, all_passes(job)),
        )


def walk_passes(job: Job) -> int:
    """Window passes of `walk_whole`."""
    assert job.windows is not None
    return (job.last + 1) * len(job.windows)


def all_passes(job: Job) -> int:
    """Those, and one a window through the output head."""
    assert job.windows is not None
    return walk_passes(job) + len(job.windows)


def walk_whole(job: Job, tell: Callable[[int, int], None]) -> None:
    """Send all windows through all blocks; a pass is then left, `of_windows`."""
    assert job.windows is not None
    count, passes = len(job.windows), all_passes(job)

    def told(event: BlockProgress) -> None:
        if event.done:
            tell(event.block * count + event.done, passes)

    job.tell = told
    with torch.no_grad():
        for block in job.blocks():
            block.advance()


def of_windows(job: Job, sums: Callable[[int], Tensor], tell: Callable[[int], None]) -> Tensor:
    """What `sums` makes of each window's index, [windows, …], several side by side. `tell` is called with
    how many are done."""
    assert job.windows is not None
    found: list[Tensor] = []
    for wave in job.pool.waves(range(len(job.windows))):
        found += job.pool.run([lambda w=w: sums(w) for w in wave])  # type: ignore[misc]
        tell(len(found))
    return torch.stack(found)


def exponential(nats: float) -> float:
    """∞ where a float64 cannot hold it."""
    return math.exp(nats) if nats < 700 else math.inf


def exponentials(
    logits: Float[Tensor, "positions vocabulary"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each position: exp(a − max a), log Σ exp a, and the most likely token. torch's own log_softmax
    sums a large vocabulary less exactly in float32: by up to 7e-5 nats where there are 262,144 tokens."""
    largest, top = logits.max(1)
    weights = (logits - largest[:, None]).exp_()
    return weights, largest + weights.sum(1).log(), top


def cross_entropy(
    job: Job, window: int, logits: Float[Tensor, "length vocabulary"]
) -> Float[Tensor, ""]:
    """Summed over the targets of a window, float64.

    Raises:
        ModelError: it is not finite.
    """
    assert job.windows is not None
    first, last = job.windows.beginning.first_target, logits.shape[0] - 1
    targets = job.windows.tokens[window][1:, None].to(logits.device)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for start in range(first - 1, last, POSITIONS):
        part = slice(start, min(start + POSITIONS, last))
        of_part = logits[part].float()
        loss = exponentials(of_part)[1] - of_part.gather(1, targets[part])[:, 0]
        total += loss.sum(dtype=torch.float64)
    check_loss(job, window, total)
    return total.cpu()


def check_loss(job: Job, window: int, loss: Tensor) -> None:
    """Raise ModelError where a cross-entropy is not finite."""
    assert job.windows is not None
    if not math.isfinite(float(loss)):
        folder = "" if job.source.checkpoint is None else f"{job.source.checkpoint.folder}: "
        where = f"window {window} of {job.windows.source}"
        raise ModelError(f"{folder}{where}: NaN or infinite logits")
