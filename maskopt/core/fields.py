"""Options as the fields of a frozen dataclass: one line of help each, a unit, a range, checked once.

    @dataclass(frozen=True)
    class Tabu(Solver):
        moves: int = option(1000, "moves of a row", least=0)

The command line, the documentation and the check on construction all read the same fields.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from maskopt.errors import OptionError, near

#: what `_hints` has made, by class
_HINTS: WeakKeyDictionary[type, dict[str, Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Option:
    """What is known about an option.

    Attributes:
        name, type: as in the class, the type in words.
        default: what holds where nothing is given.
        help: one line.
        unit: of the value; empty where it is a count of what `help` names, or a word.
        least, most: the closed range; None: no end.
        below: an open upper end.
        choices: the words that are allowed.
    """

    name: str
    type: str
    default: Any
    help: str
    unit: str = ""
    least: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def range(self) -> str:
        """In words: `≥ 1`, `[0, 1)`, `a or b`; empty where anything of the type will do."""
        if self.choices:
            return " or ".join(self.choices)
        end = self.most if self.most is not None else self.below
        if self.least is None and end is None:
            return ""
        if end is None:
            return f"≥ {self.least:g}"
        left = "(−∞" if self.least is None else f"[{self.least:g}"
        return f"{left}, {end:g}{']' if self.most is not None else ')'}"


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that is an option; see `Option`."""
    facts = {"help": help, "unit": unit, "least": least, "most": most, "below": below}
    return field(default=default, metadata={**facts, "choices": choices})


def options_of(kind: type) -> tuple[Option, ...]:
    """The options of a class, in the order of its fields. A field's metadata may hold other facts, too."""
    hints, facts = _hints(kind), {f.name for f in dataclasses.fields(Option)}
    return tuple(
        Option(
            f.name,
            _words(hints[f.name]),
            f.default,
            **{fact: value for fact, value in f.metadata.items() if fact in facts},
        )
        for f in dataclasses.fields(kind)
        if "help" in f.metadata
    )


def check_options(value: Any, owner: str = "") -> None:
    """Check type and range of every option of an instance; lists become tuples where those are meant, and
    NumPy's numbers those of Python, which a manifest can hold.

    Args:
        owner: named before the option; without one the option stands in backticks.

    Raises:
        OptionError: names the option, what it may be, and what it was.
    """
    hints = _hints(type(value))
    for known in options_of(type(value)):
        given = getattr(value, known.name)
        if isinstance(given, list) and typing.get_origin(hints[known.name]) is tuple:
            given = tuple(given)
        elif isinstance(given, np.generic):
            given = given.item()
        object.__setattr__(value, known.name, given)
        if not _fits(given, hints[known.name]) or not _in_range(given, known):
            wanted = " ".join(part for part in (known.type, known.range) if part)
            name = f"{owner}: {known.name}" if owner else f"`{known.name}`"
            raise OptionError(f"{name} must be {wanted}, not {given!r}")


def build(
    kind: type, name: str, options: Mapping[str, Any], what: str, others: Iterable[str] = ()
) -> Any:
    """An instance with the given options; `others` are names that mean something elsewhere, and may be
    what was mistyped.

    Raises:
        OptionError: an option that the class does not have (near names are given), or a bad value.
    """
    names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    for given in options:
        if given not in names:
            hint = near(given, [*names, *others]) or "; it has none"
            raise OptionError(f"{what} {name!r} has no option {given!r}{hint}")
    return kind(**options)


def _hints(kind: type) -> dict[str, Any]:
    """Of the class's fields; made once, since to make them takes a tenth of the time of a small problem."""
    if kind not in _HINTS:
        _HINTS[kind] = typing.get_type_hints(kind)
    return _HINTS[kind]


def _alternatives(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        yield from typing.get_args(hint)
    else:
        yield hint


def _fits(value: Any, hint: Any) -> bool:
    for kind in _alternatives(hint):
        if kind is type(None):
            if value is None:
                return True
        elif typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)[0]
            if isinstance(value, tuple) and all(_fits(part, inner) for part in value):
                return True
        elif kind is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return True
        elif kind is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return True
        elif isinstance(value, typing.get_origin(kind) or kind):
            return True
    return False


def holds_its_kinds(value: Any) -> bool:
    """Whether the fields of a dataclass's instance are of the kinds that they are declared to be; of what
    is in a list or a mapping nothing is said."""
    return all(_fits(getattr(value, name), hint) for name, hint in _hints(type(value)).items())


def _in_range(value: Any, known: Option) -> bool:
    if known.choices:
        return value is None or value in known.choices
    if value is None or not isinstance(value, int | float):
        return True
    # written so that NaN is in no range; no option means anything where it is infinite
    return (
        -math.inf < value < math.inf
        and (known.least is None or value >= known.least)
        and (known.most is None or value <= known.most)
        and (known.below is None or value < known.below)
    )


def _words(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    parts = []
    for kind in _alternatives(hint):
        if kind is type(None):
            parts.append("None")
        elif typing.get_origin(kind) is tuple:
            parts.append('a list of names (on the command line NAME=["one","two"])')
        else:
            parts.append(names.get(kind, getattr(kind, "__name__", str(kind))))
    return " or ".join(parts)
