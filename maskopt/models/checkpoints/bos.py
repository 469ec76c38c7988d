"""Beginning of a window of tokens: what the model's tokenizer puts before a text.

A model that was trained on texts with a beginning token (BOS) has never seen crops without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskopt.errors import DataError, first_line

#: what callers may ask for
BOS = ("auto", "always", "never")
#: a text of which every tokenizer makes at least one token
_PROBE = "a"


@dataclass(frozen=True)
class Beginning:
    """Beginning of every window.

    Attributes:
        bos: `auto`: what the tokenizer puts before a text. `always`: its BOS token, even where it puts none.
            `never`: nothing, as in tables of LLaMA-1 and 2. `given`: tokens were given. `template`: a
            conversation, as the model's chat template begins it.
        ids: token ids; empty where there are none, or where they are given or the template's.
    """

    bos: str
    ids: tuple[int, ...] = ()

    @property
    def first_target(self) -> int:
        """The first position of a window that is predicted: neither its beginning nor its first token."""
        return max(1, len(self.ids))

    def record(self) -> dict[str, Any]:
        """Return JSON values for the manifest."""
        return {"bos": self.bos, "ids": list(self.ids)}

    def __str__(self) -> str:
        if self.bos == "given":
            return "as given"
        if self.bos == "template":
            return "chats through the model's template"
        ids = " ".join(map(str, self.ids))
        return f"beginning with token {ids}" if self.ids else "without a beginning token"


GIVEN = Beginning("given")
TEMPLATE = Beginning("template")


def beginning_of(tokenizer: Any, bos: str = "auto") -> Beginning:
    """Return the beginning of this tokenizer's windows; DataError where it has no such token."""
    if bos not in BOS:
        raise DataError(f"`bos` must be one of: {', '.join(BOS)}; not {bos!r}")
    if bos == "never":
        return Beginning(bos)
    ids = _put_before(tokenizer)
    if bos == "always" and not ids:
        token = getattr(tokenizer, "bos_token_id", None)
        if token is None:
            raise DataError(
                "the tokenizer has no beginning-of-sequence token; use `bos` auto or never"
            )
        ids = (int(token),)
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    for token in ids:
        if token < 0 or (size is not None and token >= size):
            raise DataError(
                f"the tokenizer's beginning-of-sequence token {token} is outside its vocabulary of {size}"
            )
    return Beginning(bos, ids)


def tokens_of(tokenizer: Any, text: str, *, whole: bool) -> list[int]:
    """Return the token ids of a text; `whole`: with what the tokenizer puts around it."""
    with no_panic(getattr(tokenizer, "name_or_path", "")):
        options = {} if whole else {"add_special_tokens": False}
        return [int(token) for token in tokenizer(text, verbose=False, **options)["input_ids"]]


@contextmanager
def no_panic(folder: str | Path) -> Iterator[None]:
    """Raise DataError where a tokenizer panics: its library is in Rust, and a panic is a BaseException."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"{Path(folder) / 'tokenizer.json'}: the tokenizer's library stopped on this file "
            f"({first_line(error)}); replace it by that of the original model"
        ) from None


def _put_before(tokenizer: Any) -> tuple[int, ...]:
    whole, plain = (tokens_of(tokenizer, _PROBE, whole=x) for x in (True, False))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    raise DataError(
        "the tokenizer makes other tokens of a text with and without special tokens; use `bos` never"
    )
