"""Several models on the same windows of text: perplexities with intervals, and what pruning changed.

The first model is the one that the others are held against, window by window: the difference of the
cross-entropies, the Kullback–Leibler divergence of the next-token distributions, and how often the most
likely next token is the same. All windows go through one model after the other, one block at a time; only the
hidden states that leave the last blocks are kept. Then every window's logits of the first model are held
against those of each other; the output heads are in memory meanwhile, those that are equal once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.errors import DataError, OptionError
from maskopt.models.blockwise.job import Job, open_job
from maskopt.models.calibration.tokens import Windows
from maskopt.models.evaluation.perplexity import (
    POSITIONS,
    Perplexity,
    all_passes,
    check_loss,
    check_targets,
    cross_entropy,
    exponential,
    exponentials,
    interval,
    of_windows,
    perplexity_of,
    walk_passes,
    walk_whole,
)
from maskopt.models.options.walk import WalkOptions


@dataclass(frozen=True)
class Change:
    """A model beside the first one on the same windows; intervals are 95%, by bootstrap over windows.

    Attributes:
        ratio, ratio_low, ratio_high: of the perplexities, paired by window.
        kl, kl_low, kl_high: KL(first ‖ this) of the next token, nats, mean over targets.
        agreement: share of targets for which both find the same token most likely.
        hidden_mean, hidden_median: over the tokens that predict a target, of what became of the hidden state
            that leaves the last block: the square of its change, a part of its own square. A few tokens with
            massive activations make most of the mean.
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
    """One model.

    Attributes:
        losses: mean cross-entropy of every window, nats: what any two models may be compared by, paired.
        change: None for the first one.
    """

    model: str
    perplexity: Perplexity
    losses: tuple[float, ...]
    change: Change | None = None

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def evaluate(
    models: Sequence[str | Path],
    text: Any,
    options: WalkOptions,
    *,
    windows: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Evaluation]:
    """Evaluate model folders on the same text; the first is what the others are compared with.

    Args:
        text: as for `perplexity`.
        options: how the models are opened and the text is cut.
        windows: take only the first so many.
        on_progress: called with (model, window passes done, all of them).

    Raises:
        OptionError: no model. DataError: other vocabularies or hidden sizes; tokenizers that cut the text
            differently; too little text.
        ModelError: a model that cannot be read, or gives NaN.
    """
    if not models:
        raise OptionError("name at least one model")
    tell = on_progress or (lambda model, done, total: None)
    names = [str(model) for model in models]
    jobs = [open_job(model, text, options, whole=True, limit=windows) for model in models]
    _check_same_windows(models, jobs)
    with ExitStack() as held:
        for name, job in zip(names, jobs, strict=True):
            held.enter_context(job)
            walk_whole(job, partial(tell, name))
            job.rest()

        def judged(done: int) -> None:
            for name, job in zip(names, jobs, strict=True):
                tell(name, walk_passes(job) + done, all_passes(job))

        sums = _sums(jobs, judged)
        first = jobs[0].windows
        assert first is not None
        found = [_evaluation(names[0], sums[:, 0, 0], first)]
        for number, name in enumerate(names[1:], 1):
            change = _change(jobs[0], jobs[number], sums[:, 0, 0], sums[:, number])
            found.append(_evaluation(name, sums[:, number, 0], first, change))
    return found


def _check_same_windows(models: Sequence[str | Path], jobs: Sequence[Job]) -> None:
    first = jobs[0].windows
    assert first is not None
    check_targets(first)
    sizes: list[Any] = [_text_config(job) for job in jobs]
    for model, job, size in zip(models[1:], jobs[1:], sizes[1:], strict=True):
        assert job.windows is not None
        for what in ("vocab_size", "hidden_size"):
            one, two = (getattr(config, what, None) for config in (sizes[0], size))
            if one != two:
                raise DataError(
                    f"{models[0]} and {model} differ in {what} ({one} and {two}); evaluate them one by one"
                )
        if job.windows.digest != first.digest:
            raise DataError(
                f"{models[0]} and {model} cut the text into different tokens; models can be compared "
                "only where their tokenizers are the same"
            )


def _text_config(job: Job) -> Any:
    model: Any = job.source.model
    return model.config.get_text_config()


def _sums(jobs: Sequence[Job], tell: Callable[[int], None]) -> Float[Tensor, "windows models 3"]:
    """Of every window and model, over the targets: cross-entropy, KL(first ‖ this), agreements."""
    first, *others = jobs
    with ExitStack() as heads:
        reference = heads.enter_context(first.logits())
        logits = [heads.enter_context(job.logits(first)) for job in others]

        def sums(window: int) -> Tensor:
            of_first = reference(window)
            own = torch.zeros(3, dtype=torch.float64)
            own[0] = cross_entropy(first, window, of_first)
            beside = [
                _compare(job, window, of_first, of(window))
                for job, of in zip(others, logits, strict=True)
            ]
            return torch.stack([own, *beside])

        return of_windows(first, sums, tell)


def _change(
    first: Job, job: Job, losses: Float[Tensor, " windows"], sums: Float[Tensor, "windows 3"]
) -> Change:
    """A model beside the first one, whose cross-entropies are `losses`."""
    windows = job.windows
    assert windows is not None
    begin = windows.beginning.first_target
    targets = windows.length - begin
    hidden = torch.cat([_hidden_change(first, job, w, begin) for w in range(len(windows))])
    difference = (sums[:, 0] - losses) / targets
    ratio, divergence = interval(difference), interval(sums[:, 1] / targets)
    return Change(
        ratio=exponential(float(difference.mean())),
        ratio_low=exponential(ratio[0]),
        ratio_high=exponential(ratio[1]),
        kl=float(sums[:, 1].mean()) / targets,
        kl_low=divergence[0],
        kl_high=divergence[1],
        agreement=float(sums[:, 2].mean()) / targets,
        hidden_mean=float(hidden.mean()),
        hidden_median=float(hidden.median()),
    )


def _evaluation(
    name: str, losses: Tensor, windows: Windows, change: Change | None = None
) -> Evaluation:
    """Of cross-entropies that are summed over the targets of each window."""
    targets = windows.length - windows.beginning.first_target
    means = tuple((losses / targets).tolist())
    return Evaluation(name, perplexity_of(losses, windows), means, change)


def _hidden_change(first: Job, job: Job, window: int, begin: int) -> Float[Tensor, " targets"]:
    """Of every token that predicts a target: ‖h' − h‖² / ‖h‖² of the states that leave the last blocks."""
    one, two = (walk.last_state(window)[begin - 1 : -1].double() for walk in (first, job))
    return (two - one).square().sum(1) / one.square().sum(1).clamp(min=1e-300)


def _compare(
    job: Job,
    window: int,
    reference: Float[Tensor, "length vocabulary"],
    logits: Float[Tensor, "length vocabulary"],
) -> Float[Tensor, 3]:
    """Over the targets of a window: cross-entropy, KL(reference ‖ this), agreements; float64.

    KL(p ‖ q) = Σ p (a − b) − log Σ exp a + log Σ exp b for p, q the softmax of a, b: neither distribution
    is written down.
    """
    assert job.windows is not None
    first, last = job.windows.beginning.first_target, logits.shape[0] - 1
    targets = job.windows.tokens[window][1:, None].to(logits.device)
    sums = torch.zeros(3, dtype=torch.float64, device=logits.device)
    for start in range(first - 1, last, POSITIONS):
        part = slice(start, min(start + POSITIONS, last))
        one, two = reference[part].float(), logits[part].float()
        weights, one_norm, one_top = exponentials(one)
        _, two_norm, two_top = exponentials(two)
        mean = (weights * (one - two)).sum(1) / weights.sum(1)
        loss = two_norm - two.gather(1, targets[part])[:, 0]
        for so_far, more in zip(
            sums, (loss, mean - one_norm + two_norm, one_top == two_top), strict=True
        ):
            so_far += more.sum(dtype=torch.float64)
    check_loss(job, window, sums[0])
    return sums.cpu()
