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

from maskopt.errors import DataError
from maskopt.models.calibration.text import read_documents
from maskopt.models.checkpoints.bos import GIVEN, Beginning, beginning_of, tokens_of

JOIN = "\n\n"


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length, int64 [samples, length], without padding; `source`: from where, in
    words."""

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

    @property
    def targets(self) -> int:
        """Predicted tokens of a window."""
        return self.length - self.beginning.first_target


def calibration_windows(
    source: str | Path | Sequence[str],
    tokenizer: Any = None,
    *,
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    field: str = "text",
    bos: str = "auto",
) -> Windows:
    """`samples` random windows of `seq_len` tokens, the same for the same seed: what the tokenizer puts
    before a text (`maskopt.models.checkpoints.bos`), and a random contiguous crop of a document.

    Each sample draws its document among the documents longer than a crop; where there are none, all are
    joined by blank lines. A `.npy` file of tokens [samples, seq_len] is taken unchanged.

    Raises:
        DataError: no text, or less than one window of it; tokens of a wrong shape.
    """
    if _is_npy(source):
        return token_windows(_load_npy(Path(source)), Path(source).name)
    text = _Text("calibration", source, tokenizer, seq_len, field, bos)
    generator = random.Random(seed)

    def crop(ids: list[int]) -> list[int]:
        start = generator.randint(0, len(ids) - text.length)
        return ids[start : start + text.length]

    pool = list(range(len(text.documents)))
    encoded: dict[int, list[int]] = {}
    crops: list[list[int]] = []
    while len(crops) < samples and pool:
        place = generator.randrange(len(pool))
        index = pool[place]
        if index not in encoded:
            encoded[index] = text.encoded(text.documents[index])
        if len(encoded[index]) < text.length:
            pool[place] = pool[-1]
            pool.pop()
            encoded[index] = []
            continue
        crops.append(crop(encoded[index]))
    if crops:
        return text.windows(crops)
    ids = text.joined()
    return text.windows([crop(ids) for _ in range(samples)], ", documents joined")


class _Text:
    """Documents to be cut into windows: what each begins with, and `length` tokens of text."""

    def __init__(
        self, use: str, source: Any, tokenizer: Any, seq_len: int, field: str, bos: str
    ) -> None:
        self.use, self.words, self._tokenizer = use, "given documents", tokenizer
        if isinstance(source, str | Path):
            self.words = str(source) if str(source).startswith("hf:") else Path(source).name
            self.documents = read_documents(source, field=field)
        else:
            self.documents = [text for text in source if text.strip()]
        if not self.documents:
            raise DataError(f"{use}: there is no text in the given documents")
        if tokenizer is None:
            raise DataError("text needs the model's tokenizer; give one, or token tensors")
        self._begin = beginning_of(tokenizer, bos)
        self.length = seq_len - len(self._begin.ids)
        if self.length <= 0:
            raise DataError(
                f"`seq_len` {seq_len} leaves no room after the beginning token; take more"
            )
        self._whole = bos == "never"

    def encoded(self, text: str) -> list[int]:
        return tokens_of(self._tokenizer, text, whole=self._whole)

    def joined(self) -> list[int]:
        """All documents with blank lines between, at least one window."""
        ids = self.encoded(JOIN.join(self.documents))
        if len(ids) < self.length:
            raise DataError(
                f"{self.use} text ({self.words}) has {len(ids)} tokens, less than one window of "
                f"{self.length}; give more text or a smaller `seq_len`"
            )
        return ids

    def windows(self, crops: Sequence[list[int]], words: str = "") -> Windows:
        tokens = torch.tensor([[*self._begin.ids, *crop] for crop in crops], dtype=torch.int64)
        return Windows(tokens, self.words + words, self._begin)


def evaluation_windows(
    source: str | Path | Sequence[str],
    tokenizer: Any,
    *,
    seq_len: int = 2048,
    field: str = "text",
    limit: int | None = None,
    bos: str = "auto",
) -> Windows:
    """Documents joined by a blank line, tokenised once, cut into non-overlapping windows without the tail;
    each begins with what the tokenizer puts before a text. `limit` keeps the first so many windows. A `.npy`
    file of tokens [windows, length] is taken unchanged.

    Raises:
        DataError: no text, or less than one window of it; tokens of a wrong shape.
    """
    if _is_npy(source):
        return token_windows(_load_npy(Path(source)), Path(source).name).take(slice(limit))
    cut = _Text("evaluation", source, tokenizer, seq_len, field, bos)
    ids = cut.joined()
    starts = range(0, len(ids) - cut.length + 1, cut.length)[:limit]
    return cut.windows([ids[start : start + cut.length] for start in starts])


def token_windows(tokens: Any, source: str) -> Windows:
    """Given tokens as windows: integers [samples, length], length at least 1."""
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
    """Is it tokens instead of text: windows, a tensor, or a `.npy` file?"""
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
