"""Perplexity of models on consecutive windows of text, with intervals, and what pruning changed.

Windows are those of `evaluation_windows`. Perplexity is the exponential of the mean cross-entropy over their
shifted targets; tokens of a beginning are no targets. Of several models the first is the reference, window by
window. All windows go through one model after the other, one block at a time; then the logits of every window
are compared, with the output heads in memory, equal ones once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskopt.errors import DataError, ModelError, OptionError
from maskopt.models.architecture.blocks import text_config
from maskopt.models.blockwise.job import Job, open_job, walk_whole
from maskopt.models.calibration.tokens import Windows, tokens_or_tokenizer
from maskopt.models.options.walk import EVALUATION, WalkOptions, check_names
from maskopt.models.training.tasks import CACHED, kl

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


@dataclass(frozen=True)
class Change:
    """Comparison of a model with the first one on the same windows; intervals are 95%, by bootstrap.

    Attributes:
        ratio, ratio_low, ratio_high: of the perplexities, paired by window.
        kl, kl_low, kl_high: KL(first ‖ this) of the next token, nats, mean over targets.
        agreement: share of targets for which both find the same token most likely.
        hidden_mean, hidden_median: over the tokens that predict a target, of ‖h' − h‖² / ‖h‖² for the
            output h of the last block. A few tokens with massive activations make most of the mean.
    """

    ratio: float
    ratio_low: float
    ratio_high: float
    kl: float
    kl_low: float
    kl_high: float
    agreement: float
    hidden_mean: float
    hidden_median: float


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of a model; `losses`: mean cross-entropy of windows, nats; `change`: None for the first."""

    model: str
    perplexity: Perplexity
    losses: tuple[float, ...]
    change: Change | None = None


@dataclass(frozen=True)
class PanelRatio:
    """Geometric mean over several texts of a model's perplexity divided by the first model's.

    `low` and `high` are a 95% interval, by bootstrap over the windows of each text, paired by window.
    """

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f})"


def perplexity(
    model: nn.Module | str | Path,
    tokenizer_or_tokens: Any = None,
    *,
    text: str | Path | Sequence[Any] | None = None,
    windows: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Perplexity:
    """Return the perplexity of a causal language model, in memory or in a folder.

    As in pruning, all windows go through one block after the other; at the end the head makes the logits of
    `threads` windows at once.

    Args:
        model: a module, or a folder (or a name on the hub).
        tokenizer_or_tokens: a tokenizer for `text`, or token windows int64 [windows, length].
        text: see `maskopt.models.calibration.tokens.read_documents`; a list of strings is taken as documents.
            With `chat`, see `maskopt.models.calibration.chat.read_conversations`.
        windows: take only the first so many.
        on_progress: called with (window passes done, all of them: one a block, and one at the end).
        options: `seq_len`, `text_field`, `chat`, `bos`, `device`, `dtype`, `threads`, `activation_memory`,
            `trust_remote_code`, as in `maskopt.PruneOptions`.

    Raises:
        OptionError: another option, or an impossible value.
        DataError: no text or less than one window.
        ModelError: a model that cannot be read; NaN or infinite activations or logits.
    """
    check_names(options, EVALUATION)
    walk = WalkOptions(**options)
    text, tokenizer = tokens_or_tokenizer(tokenizer_or_tokens, text)
    if text is None:
        raise DataError("perplexity needs text or tokens")
    tell = on_progress or (lambda done, total: None)
    training = isinstance(model, nn.Module) and model.training
    try:
        job = open_job(model, text, walk, tokenizer=tokenizer, whole=True, limit=windows)
        [evaluation] = _evaluated([""], [job], lambda _, done, total: tell(done, total))
    finally:
        if isinstance(model, nn.Module):
            model.train(training)
    return evaluation.perplexity


def evaluate(
    models: Sequence[str | Path],
    text: Any,
    options: WalkOptions,
    *,
    windows: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Evaluation]:
    """Evaluate model folders on the same text, in at most `windows` windows, against the first of them.

    Args:
        text: as for `perplexity`.
        on_progress: called with (model, window passes done, all of them).

    Raises:
        MaskoptError: no model, other vocabularies, hidden sizes or tokenizers, too little text, NaN.
    """
    if not models:
        raise OptionError("name at least one model")
    tell = on_progress or (lambda model, done, total: None)
    jobs = [open_job(model, text, options, whole=True, limit=windows) for model in models]
    return _evaluated([str(model) for model in models], jobs, tell)


def panel_ratios(losses: Sequence[Sequence[Sequence[float]]]) -> list[PanelRatio]:
    """Return the geometric mean of the perplexity ratios of every model but the first.

    Args:
        losses: by model, then by text, the `losses` of an `Evaluation`; the first model is the reference.

    Raises:
        DataError: models that were not evaluated on the same windows.
    """
    if len({tuple(len(text) for text in texts) for texts in losses}) > 1:
        raise DataError("the models were evaluated on other texts, or in other numbers of windows")
    dense, *others = [[torch.tensor(text, dtype=torch.float64) for text in x] for x in losses]
    ratios = []
    for texts in others:
        nats = [text - reference for text, reference in zip(texts, dense, strict=True)]
        mean = sum(float(text.mean()) for text in nats) / len(nats)
        ratios.append(PanelRatio(*map(exponential, (mean, *interval(*nats)))))
    return ratios


def _evaluated(
    names: Sequence[str], jobs: Sequence[Job], tell: Callable[[str, int, int], None]
) -> list[Evaluation]:
    _check_same_windows(names, jobs)
    with ExitStack() as held:
        for name, job in zip(names, jobs, strict=True):
            held.enter_context(job)
            walk_whole(job, partial(tell, name))
            if len(jobs) > 1:
                job.source.drop()

        def judged(done: int) -> None:
            for name, job in zip(names, jobs, strict=True):
                tell(name, job.passes + done, job.passes + job.count)

        sums = _sums(jobs, judged)
        windows = jobs[0].windows
        evaluations = []
        for number, (name, job) in enumerate(zip(names, jobs, strict=True)):
            losses = sums[:, number, 0]
            change = _change(jobs[0], job, sums[:, 0, 0], sums[:, number]) if number else None
            means = tuple((losses / windows.targets).tolist())
            evaluations.append(Evaluation(name, _perplexity_of(losses, windows), means, change))
    return evaluations


def _check_same_windows(models: Sequence[str], jobs: Sequence[Job]) -> None:
    first = jobs[0].windows
    first.check_targets()
    for model, job in zip(models[1:], jobs[1:], strict=True):
        for size in ("vocab_size", "hidden_size"):
            of_first = getattr(text_config(jobs[0].source.model), size, None)
            of_this = getattr(text_config(job.source.model), size, None)
            if of_first != of_this:
                raise DataError(
                    f"{models[0]} and {model} differ in {size} ({of_first} and {of_this}); evaluate them one "
                    "by one"
                )
        if job.windows.digest != first.digest:
            raise DataError(
                f"{models[0]} and {model} cut the text into different tokens; models can be compared "
                "only where their tokenizers are the same"
            )


def _sums(jobs: Sequence[Job], tell: Callable[[int], None]) -> Float[Tensor, "windows models 3"]:
    """Return sums over targets, by window and model: cross-entropy, KL(first ‖ this), agreements."""
    first = jobs[0]
    tokens = first.windows.tokens
    with ExitStack() as heads:
        ends = [heads.enter_context(x.after_blocks(None if x is first else first)) for x in jobs]

        def logits(number: int, window: int) -> Tensor:
            job, device = jobs[number], jobs[number].source.device
            ids = tokens[window : window + 1].to(device)
            return ends[number](ids, job.last_state(window)[None].to(device))[0]

        def sums(window: int) -> Tensor:
            reference = logits(0, window)
            by_model = [_judged(first, window, reference)]
            for number, job in enumerate(jobs[1:], 1):
                by_model.append(_judged(job, window, logits(number, window), reference))
            return torch.stack(by_model)

        every: list[Tensor] = []
        for window, of_window in first.pool.each(sums, range(len(tokens))):
            every.append(of_window)
            tell(window + 1)
    return torch.stack(every)


def _judged(
    job: Job,
    window: int,
    logits: Float[Tensor, "length vocabulary"],
    reference: Float[Tensor, "length vocabulary"] | None = None,
) -> Float[Tensor, 3]:
    """Sum over the targets of a window: cross-entropy, KL(reference ‖ this), agreements; float64.

    By logsumexp, since torch's log_softmax sums a large vocabulary less exactly in float32: by up to 7e-5
    nats with 262,144 tokens. Raises ModelError for a cross-entropy that is not finite.
    """
    first, last = job.windows.beginning.first_target, logits.shape[0] - 1
    targets = job.windows.tokens[window][1:, None].to(logits.device)
    sums = torch.zeros(3, dtype=torch.float64, device=logits.device)
    for start in range(first - 1, last, CACHED):
        part = slice(start, min(start + CACHED, last))
        scores = logits[part].float()
        norm = scores.logsumexp(1, keepdim=True)
        sums[0] += (norm - scores.gather(1, targets[part])).sum(dtype=torch.float64)
        if reference is not None:
            other = reference[part].float()
            log_p = other - other.logsumexp(1, keepdim=True)
            sums[1] += kl(log_p.exp(), log_p, scores - norm)
            sums[2] += (other.argmax(1) == scores.argmax(1)).sum()
    if not math.isfinite(float(sums[0])):
        folder = "" if job.source.checkpoint is None else f"{job.source.checkpoint.folder}: "
        where = f"window {window} of {job.windows.source}"
        raise ModelError(f"{folder}{where}: NaN or infinite logits")
    return sums.cpu()


def _change(
    first: Job, job: Job, losses: Float[Tensor, " windows"], sums: Float[Tensor, "windows 3"]
) -> Change:
    """Compare a model with the first one, whose cross-entropies are `losses`."""
    windows = job.windows
    targets = windows.targets
    changes = []
    for window in range(len(windows)):
        dense, other = (x.last_state(window)[-1 - targets : -1].double() for x in (first, job))
        changes.append((other - dense).square().sum(1) / dense.square().sum(1).clamp(min=1e-300))
    hidden = torch.cat(changes)
    difference = (sums[:, 0] - losses) / targets
    ratio, kl = interval(difference), interval(sums[:, 1] / targets)
    return Change(
        ratio=exponential(float(difference.mean())),
        ratio_low=exponential(ratio[0]),
        ratio_high=exponential(ratio[1]),
        kl=float(sums[:, 1].mean()) / targets,
        kl_low=kl[0],
        kl_high=kl[1],
        agreement=float(sums[:, 2].mean()) / targets,
        hidden_mean=float(hidden.mean()),
        hidden_median=float(hidden.median()),
    )


def _perplexity_of(summed: Float[Tensor, " windows"], windows: Windows) -> Perplexity:
    """Return the perplexity, given the cross-entropy summed over the targets of each window."""
    per_window = windows.targets
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


def interval(*texts: Float[Tensor, " windows"]) -> tuple[float, float]:
    """Return a 95% interval of the mean over texts of the mean over a text's windows.

    It is a percentile bootstrap over the windows of each text, seeded.
    """
    generator = torch.Generator().manual_seed(0)
    means = torch.zeros(RESAMPLES, dtype=torch.float64)
    for values in texts:
        lots = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
        means += values.double()[lots].mean(1) / len(texts)
    means = means.sort().values
    cut = round(0.025 * RESAMPLES)
    return float(means[cut]), float(means[-1 - cut])


def exponential(nats: float) -> float:
    """Return exp(nats), ∞ where a float64 cannot hold it."""
    return math.exp(nats) if nats < 700 else math.inf
