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
from maskopt.model.blocks import vocabulary_size
from maskopt.model.checkpoint import open_checkpoint, resolve_model
from maskopt.model.opening import (
    DTYPES,
    capped_length,
    choose_device,
    load_tokenizer,
)
from maskopt.model.source import quietly, stored_dtype
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
    trust_remote_code: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a causal language model, in memory or in a folder.

    Args:
        model: a module, or a folder, which is then loaded as a whole.
        tokenizer_or_tokens: a tokenizer for `text`, or token windows int64 [windows, length].
        text: see `maskopt.model.text.read_documents`; a list of strings is taken as documents.
        windows: take only the first so many.
        on_progress: called with (windows done, windows).

    Raises:
        DataError: no text or less than one window. ModelError: NaN or infinite logits.
    """
    given = tokenizer_or_tokens
    if isinstance(model, nn.Module):
        lm = model if device == "auto" else model.to(choose_device(device))
    else:
        lm, tokenizer = load_model(
            model, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
        given = tokenizer if given is None else given
    if isinstance(given, Tensor):
        given = token_windows(given, "token tensor")
    if not isinstance(given, Windows):
        if text is None:
            raise DataError("perplexity needs text or tokens")
        length = capped_length(lm, seq_len)
        given = evaluation_windows(text, given, seq_len=length, field=text_field, limit=windows)
    elif windows is not None:
        given = Windows(given.tokens[:windows], given.source)
    if given.length < 2:
        raise DataError("perplexity needs windows of at least two tokens")
    check_vocabulary(given, vocabulary_size(lm))
    place = next(lm.parameters()).device
    was_training = lm.training
    lm.eval()
    total = 0.0
    with torch.no_grad():
        for index in range(len(given)):
            tokens = given.tokens[index : index + 1].to(place)
            logits = lm(input_ids=tokens, use_cache=False).logits[0]
            total += _cross_entropy(logits, tokens[0])
            if not math.isfinite(total):
                raise ModelError(f"window {index} of {given.source}: NaN or infinite logits")
            if on_progress is not None:
                on_progress(index + 1, len(given))
    lm.train(was_training)
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


def load_model(
    folder: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A model folder as a whole, and its tokenizer; checked as `open_checkpoint` does.

    Only safetensors are read; `dtype="auto"` is the stored one, float32 on the CPU.
    """
    from transformers import AutoModelForCausalLM

    target = choose_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype must be auto or one of {', '.join(DTYPES)}, not {dtype!r}")
    checkpoint = open_checkpoint(resolve_model(folder), trust_remote_code=trust_remote_code)
    if dtype == "auto":
        working = torch.float32 if target.type == "cpu" else stored_dtype(checkpoint)
    else:
        working = DTYPES[dtype]
    try:
        with quietly():
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                dtype=working,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # models fail to load in as many ways as there are models
        line = (str(error).splitlines() or [""])[0]
        raise ModelError(f"{folder}: {type(error).__name__}: {line}") from error
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)
    lm: Any = model
    return lm.to(target).eval(), tokenizer


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
