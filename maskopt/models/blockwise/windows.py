"""The windows of tokens of a walk: given, or cut from a text; and which of them are held out."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from maskopt.core.pattern import as_written
from maskopt.errors import DataError, ModelError, OptionError
from maskopt.models.architecture.source import Source, capped_length, load_tokenizer
from maskopt.models.calibration.chat import chat_windows
from maskopt.models.calibration.tokens import (
    Windows,
    calibration_windows,
    evaluation_windows,
    token_windows,
)
from maskopt.models.options.walk import WalkOptions


def tokens_or_tokenizer(given: Any, text: Any, needs: str = "") -> tuple[Any, Any]:
    """(text, tokenizer) from an argument that is either tokens, which are then the text, or a tokenizer.
    Raises DataError for tokens and a text, and ModelError for neither where something `needs` a text."""
    if isinstance(given, Tensor | Windows):
        if text is not None:
            raise DataError("there are both tokens and `calibration`; leave one of them out")
        return given, None
    if needs and text is None:
        raise ModelError(f"{needs} `calibration` text or tokens; name a source of text")
    return text, given


def windows_of(
    source: Source, text: Any, tokenizer: Any, options: WalkOptions, whole: bool, limit: int | None
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
    if tokenizer is None and source.checkpoint is not None:
        trust = options.trust_remote_code
        tokenizer = load_tokenizer(source.checkpoint.folder, trust_remote_code=trust)
    length = capped_length(source.model, options.seq_len)
    if whole and length < 2:
        raise OptionError(f"`seq_len` must be a whole number of at least 2, not {length!r}")
    if options.chat:
        samples, seed = (limit, None) if whole else (options.samples, options.seed)
        return chat_windows(text, tokenizer, samples=samples, seq_len=length, seed=seed)
    how: dict[str, Any] = {"seq_len": length, "field": options.text_field, "bos": options.bos}
    if whole:
        return evaluation_windows(text, tokenizer, limit=limit, **how)
    return calibration_windows(text, tokenizer, samples=options.samples, seed=options.seed, **how)


def check_targets(windows: Windows) -> None:
    """Raise DataError where nothing in a window is predicted."""
    if windows.length <= windows.beginning.first_target:
        raise DataError(
            "nothing is predicted in these windows; take windows of at least two tokens, and one of text"
        )


def held_out(windows: int, share: float) -> frozenset[int]:
    """The held-out windows: the last ⌊share·windows⌋; DataError where these would be none."""
    count = math.floor(as_written(share) * windows)
    if share and not count:
        raise DataError(
            f"`holdout` {share} of {windows} windows holds out none; take at least "
            f"{math.ceil(1 / as_written(share))} windows (`samples`), or a larger `holdout`"
        )
    return frozenset(range(windows - count, windows))
