"""Which windows of tokens a walk sends through a model: those given, or cut from a text; and which of them
are kept aside."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from maskopt.core.pattern import as_written
from maskopt.errors import DataError
from maskopt.models.architecture.opening import capped_length, load_tokenizer
from maskopt.models.architecture.source import Source
from maskopt.models.calibration.chat import chat_calibration_windows, chat_evaluation_windows
from maskopt.models.calibration.tokens import (
    Windows,
    calibration_windows,
    check_count,
    evaluation_windows,
    token_windows,
)
from maskopt.models.options.walk import WalkOptions


def tokens_or_tokenizer(given: Any, text: Any) -> tuple[Any, Any]:
    """(text, tokenizer) out of an argument that may be either tokens, which are then the text, or a
    tokenizer for the text.

    Raises:
        DataError: tokens, and a text beside them.
    """
    if not isinstance(given, Tensor | Windows):
        return text, given
    if text is not None:
        raise DataError("there are both tokens and `calibration`; leave one of them out")
    return given, None


def windows_of(
    source: Source, text: Any, tokenizer: Any, options: WalkOptions, whole: bool, limit: int | None
) -> Windows:
    """The windows of `open_job`'s text; see there.

    Raises:
        MaskoptError: a text, a tokenizer or numbers that cannot be used.
    """
    if limit is not None:
        check_count("windows", limit)
    if isinstance(text, Windows | Tensor) and not options.chat:
        given = text if isinstance(text, Windows) else token_windows(text, "token tensor")
        most = capped_length(source.model, given.length)
        if given.length > most:
            raise DataError(
                f"windows of {given.length} tokens are longer than the model's {most} positions; cut them"
            )
        return given if limit is None else given.take(slice(limit))
    if tokenizer is None and source.checkpoint is not None:
        tokenizer = load_tokenizer(
            source.checkpoint.folder, trust_remote_code=options.trust_remote_code
        )
    length = capped_length(source.model, options.seq_len)
    if options.chat and whole:
        return chat_evaluation_windows(text, tokenizer, seq_len=length, limit=limit)
    if options.chat:
        return chat_calibration_windows(
            text, tokenizer, samples=options.samples, seq_len=length, seed=options.seed
        )
    if whole:
        return evaluation_windows(
            text,
            tokenizer,
            seq_len=length,
            field=options.text_field,
            limit=limit,
            bos=options.bos,
        )
    return calibration_windows(
        text,
        tokenizer,
        samples=options.samples,
        seq_len=length,
        seed=options.seed,
        field=options.text_field,
        bos=options.bos,
    )


def held_out(windows: int, share: float) -> frozenset[int]:
    """The windows that are kept aside: the last ones, ⌊share·windows⌋.

    Raises:
        DataError: none would be kept aside, or none would be left.
    """
    count = math.floor(as_written(share) * windows)
    if share and not 0 < count < windows:
        raise DataError(
            f"`holdout` {share} of {windows} windows keeps {count} aside; take more windows"
        )
    return frozenset(range(windows - count, windows))
