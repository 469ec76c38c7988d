"""From text to windows of tokens: seeded crops for calibration, consecutive windows for perplexity."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from maskopt.errors import DataError, OptionError
from maskopt.models.calibration.text import read_documents
from maskopt.models.checkpoints.bos import (
    GIVEN,
    Beginning,
    beginning_of,
    plain_tokens,
    whole_tokens,
)

JOIN = "\n\n"


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length, all real tokens, no padding.

    Attributes:
        tokens: int64 [samples, length].
        source: where they came from, in words.
        beginning: what each of them begins with.
    """

    tokens: Int[Tensor, "samples length"]
    source: str
    beginning: Beginning = GIVEN

    @property
    def digest(self) -> str:
        """SHA-256 of shape and token ids: what the manifest records."""
        samples, length = self.tokens.shape
        head = f"{samples}x{length}:".encode()
        return hashlib.sha256(head + self.tokens.numpy().astype("<i8").tobytes()).hexdigest()

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def take(self, chosen: slice | Sequence[int]) -> Windows:
        """Some of the windows."""
        part = chosen if isinstance(chosen, slice) else list(chosen)
        return Windows(self.tokens[part], self.source, self.beginning)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]


def calibration_windows(
    source: str | Path | Sequence[str] | Tensor,
    tokenizer: Any = None,
    *,
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    field: str = "text",
    bos: str = "auto",
) -> Windows:
    """`samples` random windows of `seq_len` tokens, the same for the same seed: what the tokenizer puts
    before a text (see `maskopt.models.checkpoints.bos`), and a random contiguous crop of a document.

    A crop is taken out of one document that is longer than the crop; each sample draws its
    document anew. Documents too short are skipped; where all are, they are joined by blank lines
    into one. Token tensors [samples, seq_len], or a `.npy` file of one, are taken as they are.

    Raises:
        DataError: no text, or less than one window of it; tokens of a wrong shape.
        OptionError: an impossible length or number of windows.
    """
    check_count("samples", samples)
    check_count("seq_len", seq_len)
    if isinstance(source, Tensor):
        return token_windows(source, "token tensor")
    if _is_npy(source):
        return token_windows(_load_npy(Path(source)), Path(source).name)
    documents, words = _documents("calibration", source, field)
    begin, length = _room(tokenizer, bos, seq_len)
    tokenize = whole_tokens if bos == "never" else plain_tokens
    generator = random.Random(seed)
    pool = list(range(len(documents)))
    encoded: dict[int, list[int]] = {}
    crops: list[list[int]] = []
    while len(crops) < samples and pool:
        place = generator.randrange(len(pool))
        index = pool[place]
        if index not in encoded:
            encoded[index] = tokenize(tokenizer, documents[index])
        ids = encoded[index]
        if len(ids) < length:
            pool[place] = pool[-1]
            pool.pop()
            encoded[index] = []
            continue
        crops.append(_crop(ids, length, generator))
    if not crops:
        ids = tokenize(tokenizer, JOIN.join(documents))
        _check_length("calibration", words, ids, length)
        words += ", documents joined"
        crops = [_crop(ids, length, generator) for _ in range(samples)]
    return _begun(crops, words, begin)


def _documents(use: str, source: Any, field: str) -> tuple[list[str], str]:
    """The texts, and what they are called in messages."""
    if isinstance(source, str | Path):
        return read_documents(source, field=field), _describe(source)
    documents = [text for text in source if text.strip()]
    if not documents:
        raise DataError(f"{use}: there is no text in the given documents")
    return documents, "given documents"


def _room(tokenizer: Any, bos: str, seq_len: int) -> tuple[Beginning, int]:
    """What a window begins with, and how many tokens of text it has room for."""
    if tokenizer is None:
        raise DataError("text needs the model's tokenizer; give one, or token tensors")
    begin = beginning_of(tokenizer, bos)
    if seq_len <= len(begin.ids):
        raise DataError(f"`seq_len` {seq_len} leaves no room after the beginning token; take more")
    return begin, seq_len - len(begin.ids)


def _crop(ids: list[int], length: int, generator: random.Random) -> list[int]:
    start = generator.randint(0, len(ids) - length)
    return ids[start : start + length]


def _check_length(what: str, words: str, ids: list[int], length: int) -> None:
    if len(ids) < length:
        raise DataError(
            f"{what} text ({words}) has {len(ids)} tokens, less than one window of "
            f"{length}; give more text or a smaller `seq_len`"
        )


def _begun(crops: Sequence[list[int]], words: str, begin: Beginning) -> Windows:
    tokens = torch.tensor([[*begin.ids, *crop] for crop in crops], dtype=torch.int64)
    return Windows(tokens, words, begin)


def evaluation_windows(
    source: str | Path | Sequence[str],
    tokenizer: Any,
    *,
    seq_len: int = 2048,
    field: str = "text",
    limit: int | None = None,
    bos: str = "auto",
) -> Windows:
    """Documents joined by a blank line, tokenised once, cut into non-overlapping windows, the tail
    dropped; each window begins with what the tokenizer puts before a text (see
    `maskopt.models.checkpoints.bos`). `limit` keeps the first so many windows. A `.npy` file of tokens
    [windows, length] is taken as it is.

    Raises:
        DataError: no text, or less than one window of it; tokens of a wrong shape.
        OptionError: an impossible length or number of windows.
    """
    check_count("seq_len", seq_len, least=2)
    if _is_npy(source):
        return token_windows(_load_npy(Path(source)), Path(source).name).take(slice(limit))
    documents, words = _documents("evaluation", source, field)
    begin, length = _room(tokenizer, bos, seq_len)
    tokenize = whole_tokens if bos == "never" else plain_tokens
    ids = tokenize(tokenizer, JOIN.join(documents))
    _check_length("evaluation", words, ids, length)
    count = len(ids) // length
    count = min(count, limit) if limit is not None else count
    return _begun([ids[i * length : (i + 1) * length] for i in range(count)], words, begin)


def token_windows(tokens: Any, source: str) -> Windows:
    """Check token tensors given as they are: integers [samples, length], length at least 1."""
    tensor = torch.as_tensor(tokens)
    if tensor.ndim == 1:
        tensor = tensor[None]
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise DataError(f"{source}: tokens must be [samples, length], not {list(tensor.shape)}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise DataError(f"{source}: tokens must be whole numbers, not {tensor.dtype}")
    tensor = tensor.to("cpu", torch.int64).contiguous()
    if int(tensor.min()) < 0:
        raise DataError(f"{source}: token ids must not be negative")
    return Windows(tensor, source)


def check_vocabulary(windows: Windows, size: int) -> None:
    """Raise DataError where a token id does not exist in a vocabulary of `size`."""
    largest = int(windows.tokens.max())
    if largest >= size:
        raise DataError(
            f"{windows.source}: token id {largest} does not exist in the model's vocabulary of "
            f"{size}; tokenizer and model do not belong together"
        )


def are_tokens(source: Any) -> bool:
    """Is it tokens that are taken as they are: windows, a tensor, or a `.npy` file?"""
    return isinstance(source, Windows | Tensor) or _is_npy(source)


def _is_npy(source: Any) -> TypeGuard[str | Path]:
    return isinstance(source, str | Path) and str(source).endswith(".npy")


def _load_npy(path: Path) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise DataError(f"{path}: not a NumPy array file ({error})") from None
    if not isinstance(found, np.ndarray):
        found.close()
        raise DataError(f"{path}: an archive of arrays (.npz); write the tokens with numpy.save")
    if found.dtype.kind not in "iu":
        raise DataError(f"{path}: tokens must be whole numbers, not {found.dtype}")
    # torch has only the byte order of this machine
    return found.astype(found.dtype.newbyteorder("="), copy=False)


def _describe(source: str | Path) -> str:
    return str(source) if str(source).startswith("hf:") else Path(source).name


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise OptionError for what is no such count."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"`{name}` must be a whole number of at least {least}, not {value!r}")
