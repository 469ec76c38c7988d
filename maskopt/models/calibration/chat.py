"""From conversations to windows of tokens, through the model's own chat template.

A template is a program that comes with the model. transformers runs it in Jinja's sandbox, where it reaches
nothing but the messages and the special tokens; its errors are reported with the conversation.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from maskopt.errors import DataError, first_line
from maskopt.models.calibration.tokens import Windows, are_tokens, json_records
from maskopt.models.checkpoints.bos import TEMPLATE, no_panic

MESSAGES = "messages"
#: what templates write; some accept others silently, and the model has never seen those
ROLES = ("system", "developer", "user", "assistant", "tool")
#: output of `strftime_now` in a template: windows must not depend on the day on which they are made. It is
#: the default day of the templates of Llama 3
DAY = {
    "%Y": "2024", "%y": "24", "%m": "07", "%B": "July", "%b": "Jul", "%d": "26", "%-d": "26", "%e": "26",
    "%A": "Friday", "%a": "Fri", "%H": "00", "%I": "12", "%M": "00", "%S": "00", "%p": "AM",
}  # fmt: skip
#: a macro in place of the function `strftime_now`. Jinja drops the newline after the block's end, so that the
#: template still begins a line
_DAY = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{words}')" for code, words in DAY.items())
    + " }}{% endmacro %}\n"
)
#: characters of a template's error message
_LONGEST_REASON = 200


#: messages with a role and a text each, and their place in words
Conversation = tuple[list[dict[str, Any]], str]


def chat_windows(
    source: str | Path | Sequence[Any],
    tokenizer: Any,
    *,
    samples: int | None,
    seq_len: int,
    seed: int | None,
) -> Windows:
    """`samples` windows of `seq_len` tokens of conversations in random order, the same for the same seed.
    Without a seed they are in their own order, each used once, in at most `samples` windows (None: all).

    A window begins with a conversation, is filled with the next ones, and cuts the last. Once all have been
    used they are used again, in another order, as the windows' source says.

    Raises:
        DataError: as `read_conversations`; no chat template, one that refuses, or less than one window.
    """
    conversations = read_conversations(source)
    tokens = _tokeniser(conversations, tokenizer)
    words, order = _name(source), list(range(len(conversations)))
    if seed is None or samples is None:
        rows = _packed(tokens, order, seq_len, samples)
    else:
        generator, rows = random.Random(seed), []
        while len(rows) < samples:
            words = _name(source) + ", conversations used again" * bool(rows)
            generator.shuffle(order)
            rows += _packed(tokens, order, seq_len, samples - len(rows))
    return Windows(torch.tensor(rows, dtype=torch.int64), words, TEMPLATE)


def read_conversations(source: str | Path | Sequence[Any]) -> list[Conversation]:
    """The conversations of a source, in its order.

    Args:
        source: a `.jsonl` file, each line `{"messages": [{"role": …, "content": …}, …]}` or the list alone;
            or a sequence of such objects.

    Raises:
        DataError: no such file, not JSON, no conversation, or one of another form; file and line are named.
    """
    if are_tokens(source):
        raise DataError("these are tokens already, not messages; leave `chat` out")
    if isinstance(source, str | Path):
        if Path(source).suffix.lower() != ".jsonl":
            raise DataError(
                f"{source}: `chat` takes JSON lines of messages, FILE.jsonl; other text goes without it"
            )
        records: Iterable[tuple[str, Any]] = json_records(Path(source))
    else:
        records = ((f"given conversation {i}", r) for i, r in enumerate(source, start=1))
    conversations = [(_messages(r, where), where) for where, r in records]
    if not conversations:
        raise DataError(f"{_name(source)}: there is no conversation in it")
    return conversations


def _messages(record: Any, where: str) -> list[dict[str, Any]]:
    messages = record.get(MESSAGES) if isinstance(record, dict) else record
    if not isinstance(messages, list):
        raise DataError(f"{where}: no list under {MESSAGES!r}{_remedy(record)}")
    if not messages:
        raise DataError(f"{where}: a conversation without messages; leave it out")
    for number, message in enumerate(messages, start=1):
        place = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{place}: not an object with role and content")
        role = message.get("role")
        if "role" not in message and "from" in message:
            raise DataError(
                f"{place}: has from and value; call them role and content, and say user for human, "
                "assistant for gpt"
            )
        if role not in ROLES:
            known = ", ".join(ROLES)
            raise DataError(f"{place}: the role must be one of: {known}; not {role!r:.60}")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{place}: no text under 'content'; join its parts, or leave it out")
    return messages


def _remedy(record: Any) -> str:
    """What to do with an object that holds its messages elsewhere."""
    for name, value in record.items() if isinstance(record, dict) else ():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return f"; call {name!r} so, with role and content in each message"
    return "; give objects with messages of role and content"


def _packed(
    tokens: Callable[[int], list[int]], order: Sequence[int], length: int, limit: int | None
) -> list[list[int]]:
    """The first windows that the conversations fill in this order; DataError where they fill none."""
    rows: list[list[int]] = []
    window: list[int] = []
    for index in order:
        if len(rows) == limit:
            break
        window += tokens(index)[: length - len(window)]
        if len(window) == length:
            rows.append(window)
            window = []
    if not rows:
        total = sum(len(tokens(index)) for index in order)
        raise DataError(
            f"the conversations have {total} tokens, less than one window of {length}; give more "
            "of them or a smaller `seq_len`"
        )
    return rows


def _tokeniser(conversations: Sequence[Conversation], tokenizer: Any) -> Callable[[int], list[int]]:
    """The tokens of a conversation, made when they are first needed; by the template alone: the tokenizer
    puts nothing before it."""
    template = _template(tokenizer)

    @functools.cache
    def tokens(index: int) -> list[int]:
        messages, where = conversations[index]
        try:
            with no_panic(getattr(tokenizer, "name_or_path", "")):
                ids = tokenizer.apply_chat_template(
                    messages,
                    chat_template=template,
                    add_generation_prompt=False,
                    tokenize=True,
                    return_dict=False,
                    tokenizer_kwargs={"verbose": False},
                )
        except DataError:
            raise
        except Exception as error:  # a template is a program of the model's: it may raise anything
            raise DataError(
                f"{where}: the model's chat template refuses it ({_reason(error)})"
            ) from error
        return [int(token) for token in ids]

    return tokens


def _template(tokenizer: Any) -> str:
    """The tokenizer's chat template, on a fixed day; DataError where it has no default one."""
    if tokenizer is None:
        raise DataError("conversations need the model's tokenizer; give one, or token tensors")
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template: the model was not tuned for chats, or its files lack "
            "chat_template.jinja; leave `chat` out, and give text"
        )
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:  # templates by name, none of them called default
        raise DataError(f"the tokenizer: {_reason(error)}") from error
    return _DAY + template if "strftime_now" in template else template


def _reason(error: Exception) -> str:
    """In one printable line: the text of a template is untrusted."""
    line = first_line(error)[:_LONGEST_REASON]
    return f"{type(error).__name__}: {''.join(c for c in line if c.isprintable())}"


def _name(source: str | Path | Sequence[Any]) -> str:
    return Path(source).name if isinstance(source, str | Path) else "given conversations"
