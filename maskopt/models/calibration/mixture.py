"""Calibration text from several sources: how many windows each gives, and their order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from maskopt.core.pattern import as_written
from maskopt.errors import DataError
from maskopt.models.calibration.tokens import Windows


def window_counts(shares: Sequence[float], samples: int) -> list[int]:
    """Return how many of `samples` windows each source gives: largest remainders, first sources first.

    Raises:
        DataError: a source that would give none.
    """
    exact = [as_written(share) * samples for share in shares]
    counts = [math.floor(count) for count in exact]
    order = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in order[: samples - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        raise DataError(
            f"{samples} windows are too few for these shares of {len(shares)} sources; take more `samples`"
        )
    return counts


def mixed(parts: Sequence[Windows]) -> Windows:
    """Return the windows of all parts, in turns: every stretch of them holds about the share of each part,
    the held-out windows and those for gradients as well.

    Raises:
        DataError: windows of different lengths.
    """
    lengths = sorted({part.length for part in parts})
    if len(lengths) > 1:
        raise DataError(f"the sources have windows of {lengths} tokens; a mixture needs one length")
    places = [
        ((2 * i + 1) / len(part), number, i)
        for number, part in enumerate(parts)
        for i in range(len(part))
    ]
    tokens = torch.stack([parts[number].tokens[i] for _, number, i in sorted(places)])
    words = " + ".join(f"{len(part)} of {part.source}" for part in parts)
    written = next((part.written for part in parts if part.written is not None), None)
    longest = max((part.beginning for part in parts), key=lambda one: one.first_target)
    return Windows(tokens, words, longest, written)
