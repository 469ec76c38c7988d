"""From text to windows of tokens: seeded crops for calibration, consecutive windows for perplexity.

A source of text is a file, a folder, JSON lines, or a named data set, each read as a list of documents.

`weights_of_tokens` says how much each token of a window counts in the Gram matrices. Models leave in the
first token a hidden state hundreds of times as large as the others (Sun et al., *Massive activations in large
language models*, arXiv 2402.17762). An error is added to the hidden state, which the next block normalises;
to first order the loss changes by its gradient by that state.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskopt.core.files import from_json
from maskopt.core.pattern import as_written
from maskopt.errors import DataError, ModelError, first_line, near
from maskopt.models.checkpoints.bos import GIVEN, Beginning, beginning_of, tokens_of

#: name → (dataset, configuration, data files by split, text column): the conventions of the field
PRESETS: dict[str, tuple[str, str | None, dict[str, str] | None, str]] = {
    "c4": (
        "allenai/c4",
        None,
        {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        "text",
    ),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "text"),
}
TEXT_SUFFIXES = (".txt", ".md", ".text")
#: names, as a source of text, what the dense model writes; a file of this name is ./self
SELF = "self"
#: uses of windows that the model wrote, in their file
CALIBRATION, DISTILLATION = "calibration", "distillation"


def read_documents(source: str | Path, *, field: str = "text") -> list[str]:
    """The documents of a source, in a fixed order; empty ones are left out.

    Args:
        source: a text file (one document), a `.jsonl` file (one document a line, under `field`), a folder
            (every text and JSON-lines file in it, sorted by path), or `hf:NAME[:SPLIT]` for the `datasets`
            package, where NAME may be a preset (`c4`, `wikitext2`).

    Raises:
        DataError: nothing there, not UTF-8, not JSON, no such field, or no text at all.
    """
    name = str(source)
    if name.startswith("hf:"):
        documents = _hub_documents(name, field)
    else:
        documents = _path_documents(Path(source), field)
    filled = [document for document in documents if document.strip()]
    if not filled:
        count = f": {len(documents)} documents, all of them empty" if len(documents) > 1 else ""
        raise DataError(f"{name}: there is no text in it{count}")
    return filled


def _path_documents(path: Path, field: str) -> list[str]:
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and file.suffix.lower() in (*TEXT_SUFFIXES, ".jsonl")
        )
        if not files:
            known = ", ".join((*TEXT_SUFFIXES, ".jsonl"))
            raise DataError(f"{path}: the folder holds no text file ({known})")
        return [document for file in files for document in _path_documents(file, field)]
    return _json_lines(path, field) if path.suffix.lower() == ".jsonl" else [_read_text(path)]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or folder") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of every line of a file of JSON lines; DataError where it cannot be read."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = from_json(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error})") from None
        yield where, value


def _json_lines(path: Path, field: str) -> list[str]:
    documents = []
    for where, record in json_records(path):
        if not isinstance(record, dict):
            raise DataError(f"{where}: no text under {field!r}: the line is not a JSON object")
        text = record.get(field)
        if not isinstance(text, str):
            kind = "null" if text is None else type(text).__name__
            hint = f": the value is {kind}" if field in record else near(field, record)
            if isinstance(record.get("messages"), list):
                hint = "; it has messages: give `chat`"
            raise DataError(f"{where}: no text under {field!r}{hint}")
        documents.append(text)
    return documents


def _hub_documents(name: str, field: str) -> list[str]:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    _, dataset, *rest = name.split(":")
    if not dataset or len(rest) > 1:
        raise DataError(f"{name!r}: write hf:NAME or hf:NAME:SPLIT; presets: {', '.join(PRESETS)}")
    split = rest[0] if rest else "train"
    try:
        validate_repo_id(dataset)  # `datasets` reads a folder where the name is a path
    except HFValidationError:
        raise DataError(
            f"{name}: {dataset!r} is not the name of a data set on the hub; give a file or a folder "
            "without hf:"
        ) from None
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise DataError(f"{name}: needs the package datasets: pip install datasets") from None
    repository, configuration, files, field = PRESETS.get(dataset, (dataset, None, None, field))
    arguments: dict[str, Any] = {"split": split}
    if files is not None:
        if split not in files:
            raise DataError(f"{name}: no split {split!r}{near(split, files)}")
        arguments["data_files"] = {split: files[split]}
    try:
        table = datasets.load_dataset(repository, configuration, **arguments)
        column: Sequence[Any] = table[field]
    except Exception as error:  # the hub client raises whatever its layers raise
        said = dict.fromkeys((name, type(error).__name__, first_line(error)))  # the type once
        raise DataError(": ".join(said)) from error
    documents = [document for document in column if isinstance(document, str)]
    if not documents:
        raise DataError(f"{name}: no value of the column {field!r} is text")
    # WikiText-2 comes a line per record; its convention is one text, joined by blank lines
    return ["\n\n".join(documents)] if dataset == "wikitext2" else documents


#: all tokens count once; the first of a window does not; each by one over the mean square of its hidden
#: state; each by the norm of the loss's gradient by its hidden state
UNIFORM, SKIP_FIRST, RELATIVE, GRADIENT = "uniform", "skip-first", "relative", "gradient"
TOKEN_WEIGHTS = UNIFORM, SKIP_FIRST, RELATIVE, GRADIENT


def weights_of_tokens(
    state: Float[Tensor, "1 length width"],
    token_weights: str,
    gradients: Float[Tensor, " length"] | None = None,
) -> Float[Tensor, " length"]:
    """Weights of a window's tokens, with a mean of 1.

    Args:
        state: the window's hidden state as it enters the block.
        token_weights: `skip-first`, `relative` or `gradient`.
        gradients: for `gradient`, norms of the loss's gradient by each token's hidden state after the block
            in the dense model; see `maskopt.models.blockwise.gradients`.
    """
    if token_weights == SKIP_FIRST:
        weights = torch.ones(state.shape[1])
        weights[0] = 0.0
    elif token_weights == RELATIVE:
        size = state[0].float().square().mean(1)
        weights = 1.0 / size.clamp(min=1e-12 * float(size.max()) or 1.0)
    else:
        assert gradients is not None
        weights = gradients if bool(gradients.any()) else torch.ones_like(gradients)
    return (weights * (len(weights) / float(weights.sum()))).to(state.device)


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length, int64 [samples, length], without padding; `source`: from where, in
    words; `written`: those among them that the model wrote."""

    tokens: Int[Tensor, "samples length"]
    source: str
    beginning: Beginning = GIVEN
    written: Int[Tensor, "some length"] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of shape and token ids: what the manifest records."""
        samples, length = self.tokens.shape
        head = f"{samples}x{length}:".encode()
        return hashlib.sha256(head + self.tokens.numpy().astype("<i8").tobytes()).hexdigest()

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def take(self, chosen: slice | list[int]) -> Windows:
        """Some of the windows."""
        return Windows(self.tokens[chosen], self.source, self.beginning)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def targets(self) -> int:
        """Predicted tokens of a window."""
        return self.length - self.beginning.first_target

    def check_targets(self) -> None:
        """Raise DataError where nothing in a window is predicted."""
        if self.targets <= 0:
            raise DataError(
                "nothing is predicted in these windows; take windows of at least two tokens, and one of text"
            )


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
        ids = self.encoded("\n\n".join(self.documents))
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


def tokens_or_tokenizer(given: Any, text: Any, needs: str = "") -> tuple[Any, Any]:
    """Return (text, tokenizer) of an argument that is either tokens, which are then the text, or a tokenizer.

    A text may be a mixture, shares by source. Raises DataError for bad shares, or tokens and a text, and
    ModelError for neither where something `needs` a text.
    """
    if isinstance(given, Tensor | Windows):
        if text is not None:
            raise DataError("there are both tokens and `calibration`; leave one of them out")
        return given, None
    if needs and text is None:
        raise ModelError(f"{needs} `calibration` text or tokens; name a source of text")
    return check_shares(text) if isinstance(text, Mapping) else text, given


def check_shares(sources: Mapping[Any, float | None]) -> dict[Any, float]:
    """Return the share of every source: those without one divide what the others leave equally.

    Raises:
        DataError: no source, a share that is not in (0, 1], or shares that do not sum to 1.
    """
    for name, share in sources.items():
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if share is not None and not (number and 0 < share <= 1):
            raise DataError(f"`calibration` {name}: its share must be in (0, 1], not {share!r}")
    left = 1 - sum(as_written(share) for share in sources.values() if share is not None)
    open_shares = sum(share is None for share in sources.values())
    if not sources or left < 0 or (left > 0) != (open_shares > 0):
        raise DataError(
            "`calibration`: the shares of the sources must sum to 1; sources without a share divide the rest "
            "equally, which must not be nothing"
        )
    rest = float(left) / max(open_shares, 1)
    return {name: rest if share is None else float(share) for name, share in sources.items()}


def held_out(windows: int, share: float) -> frozenset[int]:
    """The held-out windows: the last ⌊share·windows⌋; DataError where these would be none."""
    count = math.floor(as_written(share) * windows)
    if share and not count:
        raise DataError(
            f"`holdout` {share} of {windows} windows holds out none; take at least "
            f"{math.ceil(1 / as_written(share))} windows (`samples`), or a larger `holdout`"
        )
    return frozenset(range(windows - count, windows))


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
