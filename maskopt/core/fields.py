"""Options as fields of a dataclass: each is declared once, with its help, unit, range, choices and group.

    @dataclass(frozen=True)
    class Tabu(Solver):
        moves: int = option(1000, "moves of a row", least=1)

The command line, configuration files, manifests, the documentation and the check on construction read the
same fields.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from functools import cache
from typing import Any

import numpy as np

from maskopt.errors import OptionError, near

#: default of an option that must be given
REQUIRED = MISSING
#: groups of options, by what they are about: headings of a command's help
SELECTION, UPDATE, TRAINING = "Selection", "Update of kept weights", "Training"
TEXT, CALIBRATION, RUNTIME, OUTPUT = "Text", "Calibration", "Runtime", "Output"
GROUPS = SELECTION, UPDATE, TRAINING, TEXT, CALIBRATION, RUNTIME, OUTPUT
#: unit of a mapping that the command line reads from a file
JSON_FILE = "JSON file"


@dataclass(frozen=True)
class Option:
    """The declaration of an option.

    Attributes:
        name: of the field; on the command line with hyphens.
        hint: type hint.
        default: `REQUIRED` if there is none.
        help: one line.
        unit: of the value; empty for a word, or a count of what `help` names.
        least, most: closed range; None: no limit.
        below: open upper limit.
        choices: allowed words.
        group: heading in a command's help.
        needs: another option, and its values with which this one has an effect (none: any that is given).
        shown: in `--help`; all options are in `--help-all`.
        argument: positional on the command line.
        recorded: a manifest records its value, since it decides the result.
    """

    name: str
    hint: Any
    default: Any
    help: str
    unit: str = ""
    least: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    group: str = ""
    needs: tuple[str, ...] = ()
    shown: bool | None = None
    argument: bool = False
    recorded: bool = True

    @property
    def type(self) -> str:
        """Type in words."""
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        names |= {types.NoneType: "None"}
        lists = 'a list of names (on the command line NAME=["one","two"])'
        return " or ".join(
            lists
            if typing.get_origin(kind) is tuple
            else names.get(kind, getattr(kind, "__name__", str(kind)))
            for kind in alternatives(self.hint)
        )

    @property
    def range(self) -> str:
        """Range in words: `≥ 1`, `[0, 1)`, `a or b`; empty if any value of the type is allowed."""
        if self.choices:
            return " or ".join(self.choices)
        end = self.most if self.most is not None else self.below
        if self.least is None and end is None:
            return ""
        if end is None:
            return f"≥ {self.least:g}"
        left = "(−∞" if self.least is None else f"[{self.least:g}"
        return f"{left}, {end:g}{']' if self.most is not None else ')'}"

    @property
    def condition(self) -> str:
        """Needed value of another option: `update` blockwise."""
        name, *values = self.needs
        *most, last = values or [""]
        return f"`{name}` {' or '.join(filter(None, (', '.join(most), last)))}".rstrip()

    def has_effect(self, other: Any) -> bool:
        """Return whether the option has an effect with this value of the one that it needs."""
        return other in self.needs[1:] if self.needs[1:] else bool(other)

    @property
    def sentence(self) -> str:
        """The help, after the condition."""
        if not self.needs:
            return self.help
        return f"With {self.condition}: {self.help[0].lower()}{self.help[1:]}"

    def checked(self, value: Any, called: str = "") -> Any:
        """Return the value; a list becomes a tuple, and a NumPy number a Python number.

        OptionError names the option (`called`, or its name in backticks), the allowed and the given value.
        """
        kinds = [typing.get_origin(kind) for kind in alternatives(self.hint)]
        if isinstance(value, list) and tuple in kinds:
            value = tuple(value)
        elif isinstance(value, str) and kinds[0] is list:  # of a configuration file
            value = [value]
        elif isinstance(value, np.generic):
            value = value.item()
        if not _fits(value, self.hint) or not self._in_range(value):
            wanted = " ".join(part for part in (self.type, self.range) if part) + ","
            if self.choices:
                wanted = f"one of: {', '.join(self.choices)};"
            raise OptionError(f"{called or f'`{self.name}`'} must be {wanted} not {value!r}")
        return value

    def _in_range(self, value: Any) -> bool:
        if self.choices:
            return value is None or value in self.choices
        if not isinstance(value, int | float):
            return True
        # NaN and infinity fail the first comparison
        return (
            -math.inf < value < math.inf
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


def option(default: Any, help: str, group: str = "", **facts: Any) -> Any:
    """Declare a dataclass field as an option, by attributes of `Option`; `dict`: an empty default."""
    metadata = {"help": help, "group": group, **facts}
    if default is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def argument(help: str, default: Any = REQUIRED) -> Any:
    """Declare an option that is positional on the command line."""
    return option(default, help, argument=True)


def options_of(kind: type, *names: str) -> tuple[Option, ...]:
    """Return the options of a dataclass in the order of its fields, or only those with the given names."""
    known = {}
    for f in dataclasses.fields(kind):
        if "help" in f.metadata:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            known[f.name] = Option(f.name, _hints(kind)[f.name], default, **f.metadata)
    return tuple(known[name] for name in names or known)


def parameters_of(function: Callable[..., Any]) -> tuple[Option, ...]:
    """Return the options that are default values in a function's signature; `--help` shows them all."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    fields = [(p.name, p.annotation, p.default) for p in parameters if p.kind is not p.VAR_KEYWORD]
    made = options_of(dataclasses.make_dataclass(function.__name__, fields, kw_only=True))
    return tuple(dataclasses.replace(known, shown=known.shown is not False) for known in made)


def check_options(value: Any, owner: str = "") -> None:
    """Check every option of an instance, and normalise it, by `Option.checked`; `owner`: named in errors."""
    for known in options_of(type(value)):
        called = f"{owner}: {known.name}" if owner else ""
        object.__setattr__(value, known.name, known.checked(getattr(value, known.name), called))


def check_needs(value: Any) -> None:
    """Raise OptionError for an option that is given without the option that it needs."""
    for known in options_of(type(value)):
        changed = known.needs and getattr(value, known.name) != known.default
        if changed and not known.has_effect(getattr(value, known.needs[0])):
            raise OptionError(f"`{known.name}` needs {known.condition}")


def build(
    kind: type, name: str, options: Mapping[str, Any], what: str, others: Iterable[str] = ()
) -> Any:
    """Make an instance with the given options.

    OptionError for a bad value, or an option that the class does not have; its hint may name `others`, too.
    """
    names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    for option_name in options:
        if option_name not in names:
            hint = near(option_name, [*names, *others]) or "; it has none"
            raise OptionError(f"{what} {name!r} has no option {option_name!r}{hint}")
    return kind(**options)


@cache  # making them takes a tenth of the time of a small problem
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    of_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if of_union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    for kind in alternatives(hint):
        origin = typing.get_origin(kind) or kind
        if origin is tuple:
            inner = typing.get_args(kind)[0]
            if isinstance(value, tuple) and all(_fits(part, inner) for part in value):
                return True
        elif origin in (int, float):
            if isinstance(value, int | origin) and not isinstance(value, bool):
                return True
        elif isinstance(value, origin):
            return True
    return False


def holds_its_kinds(value: Any) -> bool:
    """Return whether fields have the declared types; items of lists and mappings are not checked."""
    return all(_fits(getattr(value, name), hint) for name, hint in _hints(value.__class__).items())
