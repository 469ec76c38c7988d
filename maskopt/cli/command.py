"""A command from declared options: its command line, its file of options, and its help.

A file of options is TOML, or the manifest of an earlier run. Its keys are names of options; the command line
overrides it.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer
from typer.core import TyperCommand

from maskopt.cli.console import several, write_text
from maskopt.cli.view import show_as
from maskopt.core.fields import (
    GROUPS,
    JSON_FILE,
    OUTPUT,
    REQUIRED,
    Option,
    alternatives,
    argument,
    option,
    parameters_of,
)
from maskopt.errors import MaskoptError, OptionError, near
from maskopt.models.checkpoints.schema import read_manifest
from maskopt.models.checkpoints.workspace import check_inputs
from maskopt.models.options.walk import name_patterns

SOURCES = "FILE.txt, FILE.jsonl, a folder, tokens .npy, hf:DATASET[:SPLIT]"
#: options of several commands, as default values in their signatures
MODEL = argument("A model folder, or a name on the hub.")
OVERWRITE = option(False, "Replace existing output.", OUTPUT)
RESUME = option(False, "Continue an interrupted run with the same options.", OUTPUT)
CARDINALITY = option(None, "Number of elements to select (matrix, .mc, .rudy).", least=0)
MAXIMIZE = option(False, "Maximize xᵀQx of a matrix instead of minimizing it.")
JOBS = option(1, "Number of rows at a time; −1: one per core.")
DRY_RUN = option(False, "Estimate memory, disk and time; write nothing.", OUTPUT)
#: heading of options of a source that may also be an instance
FOR_A_MODEL = "If the source is a model"
_ORDER = ("Arguments", "Options", FOR_A_MODEL, *GROUPS)
#: not allowed in a file: it may come from a stranger
_TRUST = "trust_remote_code"
#: options that say how a run begins, not what it computes
_NOT_KEPT = ("overwrite", "resume", "dry_run", _TRUST)
_CONFIG = "Read options from a TOML file of --print-config or from a manifest; the command line overrides it."
_PRINT_CONFIG = "Print all options as a file for --config and exit."
#: options of commands whose options may come from a file, and of every command
_OF_FILES = (
    Option("config", Path | None, None, _CONFIG, group=OUTPUT, shown=True),
    Option("print_config", bool, False, _PRINT_CONFIG, group=OUTPUT),
)
_OF_ALL = (
    Option("quiet", bool, False, "Show no progress.", group=OUTPUT),
    Option("log_json", bool, False, "Progress as JSON lines on stderr.", group=OUTPUT),
    Option("help_all", bool, False, "Show all options and exit.", group=OUTPUT, shown=True),
)
_METAVARS = {int: "N", float: "X", Path: "PATH", str: "TEXT"}


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        run: is called with the values of `own` and, of `library`, with the values that were given.
        own: options of the function's signature.
        library: fields of classes of options.
        example: last line of the help.
        config: whether options may come from a file.
        shared: whether several processes can run it together.
        completed: adds the values that the given ones imply, e.g. of a recipe.
    """

    name: str
    run: Callable[..., None]
    own: tuple[Option, ...]
    library: tuple[Option, ...]
    example: str
    config: bool = False
    shared: bool = False
    completed: Callable[[dict[str, Any]], dict[str, Any]] = dict

    @property
    def of_run(self) -> dict[str, Option]:
        """Options that a file may hold, by name."""
        return {one.name: one for one in (*self.own, *self.library)}

    @property
    def options(self) -> tuple[Option, ...]:
        """All options, in the order of the help."""
        return (*self.own, *self.library, *(_OF_FILES if self.config else ()), *_OF_ALL)

    def __call__(self, words: Mapping[str, Any]) -> None:
        """Run with the words of the command line."""
        file: Path | None = words.get("config")
        # errors in a file name its keys, not the flags of the command line
        stored = {} if file is None else self._stored(file)
        try:
            given = {
                one.name: read_value(one, word)
                for one in self.options
                if one.name != "config"
                and (word := words[one.name]) not in (None, [], ())
                and (word is not False or one.default is None)
            }
            self._run(given, file, stored)
        except MaskoptError as error:
            # flags in place of the command's options in backticks
            flags = {f"`{one.name}`": flag(one.name) for one in self.options if not one.argument}
            said = re.sub(r"`\w+`", lambda found: flags.get(found[0], found[0]), str(error))
            error.args = (said, *error.args[1:])
            raise

    def _stored(self, path: Path) -> dict[str, Any]:
        """Return the values of a file of options.

        OptionError: no such file, not TOML, a key that is no option, `trust_remote_code`, or a bad value;
        ModelError: a manifest that was changed.
        """
        known, given = self.of_run, _options_in(path)
        if _TRUST in given:
            raise OptionError(
                f"{path}: `{_TRUST}` cannot be set in a file; remove it, and give it on the command line"
            )
        for key, value in given.items():
            if key not in known or key in _NOT_KEPT:
                raise OptionError(f"{path}: no option is called {key!r}{near(key, known)}")
            if isinstance(value, bool | int | float):
                known[key].checked(value, f"{path}: `{key}`")
        return {name: read_value(known[name], value) for name, value in given.items()}

    def _run(self, given: dict[str, Any], file: Path | None, stored: dict[str, Any]) -> None:
        show_as(quiet=given.pop("quiet", False), log_json=given.pop("log_json", False))
        if several() and not self.shared:
            raise OptionError(
                "only prune and sweep run as several processes; start this command without torchrun"
            )
        usual = {name: one.default for name, one in self.of_run.items()}
        printed = given.pop("print_config", False)
        values = self.completed({**stored, **given})
        if printed:
            typer.echo(config_text({**usual, **values}), nl=False)
            return
        # a printed file holds all options, which are not all asked for
        values = {n: value for n, value in values.items() if n in given or value != usual[n]}
        own = {}
        for one in self.own:
            value = values.pop(one.name, one.default)
            if value is REQUIRED:
                raise OptionError(f"`{one.name}` is missing: {one.help}")
            own[one.name] = one.checked(value)
        if file is not None and own["output"] is not None:
            check_inputs(own["output"], config_file=file)
        self.run(**own, **values)

    def typed(self) -> Any:
        """Return the command for a group of typer."""

        def run(**words: Any) -> None:
            self(words)

        parameters = [_parameter(one, required=not self.config) for one in self.options]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        run.__doc__ = self.run.__doc__
        app = typer.Typer(add_completion=False)
        kind = type("Shown", (ShownCommand,), {"declared": self})
        app.command(self.name.split()[-1], cls=kind)(run)
        return typer.main.get_command(app)


def command(
    *library: Option, example: str, name: str = "", **more: Any
) -> Callable[[Callable[..., None]], Command]:
    """Make a command of a function whose default values are options.

    The function takes given values of `library` as keywords. `name` is by default that of the function; other
    arguments are those of `Command`.
    """

    def made(run: Callable[..., None]) -> Command:
        called, own = name or run.__name__.replace("_", "-"), parameters_of(run)
        return Command(called, run, own, library, example, **more)

    return made


class ShownCommand(TyperCommand):
    """A command of typer whose help is made from the declarations."""

    declared: Command

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.width = min(shutil.get_terminal_size().columns, 80)
        full = ctx.params.get("help_all", False)
        options = [one for one in self.declared.options if full or one.shown or one.argument]
        arguments = [one for one in options if one.argument]
        words = " ".join(("[OPTIONS]", *map(_argument, arguments)))
        formatter.write_usage(f"maskopt {self.declared.name}", words)
        write_text(formatter, self.help)
        for group in sorted(set(map(_heading, options)), key=_ORDER.index):
            with formatter.section(group):
                lines = [(left(one), described(one)) for one in options if _heading(one) == group]
                formatter.write_dl(lines, col_max=26)
        write_text(formatter, f"Example: {self.declared.example}")


def _heading(one: Option) -> str:
    return "Arguments" if one.argument else one.group or "Options"


def flag(name: str) -> str:
    """Return the flag of an option: `seq_len` → --seq-len."""
    return "--" + name.replace("_", "-")


def described(one: Option) -> str:
    """Return the help of an option on the command line, with its default."""
    text = re.sub(r"`([a-z]+(?:_[a-z]+)*)`", lambda found: flag(found[1]), one.sentence)
    if one.default is REQUIRED:
        return text if one.argument else f"{text} [required]"
    if one.default is None or one.default is False or one.default in ((), {}):
        return text
    size = one.unit == "bytes"
    return f"{text} [default: {f'{one.default // 2**30}GiB' if size else one.default}]"


def _argument(one: Option) -> str:
    name = one.name.upper() + ("..." if typing.get_origin(one.hint) is list else "")
    return name if one.default is REQUIRED else f"[{name}]"


def left(one: Option) -> str:
    """Return flag and value of an option: `--allocation [uniform|rows|layers|both]`."""
    if one.argument:
        return _argument(one)
    names = ("-o, " if one.name == "output" else "") + _flags(one)[0]
    kind = _kind(one)
    if kind is bool:
        return names
    if one.choices:
        return f"{names} [{'|'.join(one.choices)}]"
    if Mapping in _origins(one):
        return f"{names} {'PATH' if one.unit == JSON_FILE else 'NAME=VALUE'}"
    return f"{names} {'SIZE' if one.unit == 'bytes' else _METAVARS.get(kind, 'NAMES')}"


def _origins(one: Option) -> list[Any]:
    return [typing.get_origin(kind) or kind for kind in alternatives(one.hint)]


def _kind(one: Option) -> Any:
    """Return the type of an option's word, or words, on the command line."""
    kinds = [kind for kind in alternatives(one.hint) if kind is not types.NoneType]
    if str in kinds or one.unit == JSON_FILE:
        return str
    if typing.get_origin(kinds[0]) is list:
        return kinds[0]
    return list[str] if typing.get_origin(kinds[0]) else kinds[0]


def _flags(one: Option) -> list[str]:
    name = flag(one.name)
    if one.hint == bool | None:
        return [f"{name}/--no-{name.removeprefix('--')}"]
    return [name, *(["-o"] if one.name == "output" else [])]


def _parameter(one: Option, *, required: bool) -> inspect.Parameter:
    """Return the parameter of which typer makes the option; without a default, to find given values."""
    needed = required and one.default is REQUIRED
    if one.argument:
        facts = typer.Argument(help=described(one))
    else:
        eager = _show_all if one.name == "help_all" else None
        facts = typer.Option(
            *_flags(one), help=described(one), callback=eager, is_eager=bool(eager)
        )
    kind = _kind(one) if needed else _kind(one) | None
    default = inspect.Parameter.empty if needed else None
    return inspect.Parameter(
        one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, facts]
    )


def _show_all(ctx: typer.Context, asked: bool | None) -> None:
    if asked:
        ctx.params["help_all"] = True
        typer.echo(ctx.get_help())
        raise typer.Exit


def read_value(one: Option, given: Any) -> Any:
    """Convert a word of the command line or a value of a file to what the library takes."""
    origins = _origins(one)
    if Mapping in origins:
        if one.unit == JSON_FILE and isinstance(given, str):
            return _read_counts(given)
        return read_pairs(given) if isinstance(given, list) else given
    if tuple in origins:
        return name_patterns(given)
    if not isinstance(given, str):
        return given
    if float in origins:
        with suppress(ValueError):
            return float(given)
        return given
    if int in origins and given.isdecimal():
        return int(given)
    return Path(given) if Path in origins else given


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def option_list(text: str | None) -> list[str]:
    """Split a list of names: `a, b` → ['a', 'b']."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def read_pairs(items: Sequence[str]) -> dict[str, Any]:
    """Read `NAME=VALUE`, the value as JSON if it is JSON, else as text; OptionError without `=`."""
    options: dict[str, Any] = {}
    for item in items:
        name, sign, value = item.partition("=")
        if not sign or not name:
            raise OptionError(f"an option takes NAME=VALUE, not {item!r}")
        options[name.replace("-", "_")] = value
        with suppress(ValueError):
            options[name.replace("-", "_")] = json.loads(value)
    return options


def text_of(sources: list[str] | str | None) -> Any:
    """Return the sources of `--calibration` as the library takes them: one alone, or shares by source."""
    if not isinstance(sources, list):
        return sources
    shares: dict[str, float | None] = {}
    for source in sources:
        name, _, share = source.rpartition("=")
        if name and share.replace(".", "", 1).isdecimal():
            shares[name] = float(share)
        else:
            shares[source] = None
    if len(sources) == 1 and shares.get(sources[0], 0) is None:
        return sources[0]
    return shares


def _read_counts(path: str) -> dict[str, Any]:
    """Read counts by layer name from a JSON file or from JSON itself; OptionError for anything else."""
    try:
        text = path if path.startswith("{") else Path(path).read_text(encoding="utf-8")
        counts = json.loads(text)
    except OSError as error:
        raise OptionError(f"`counts` {path}: cannot be read: {error.strerror}") from None
    except ValueError:
        counts = None
    if not isinstance(counts, dict) or not counts:
        raise OptionError(f'`counts` {path}: must be JSON, {{"layer name": inputs pruned per row}}')
    return counts


def config_text(values: Mapping[str, Any]) -> str:
    """Return TOML of the values that are set; OptionError for a null in a mapping."""
    table: dict[str, Any] = {}
    for name, value in values.items():
        if name in _NOT_KEPT or value is REQUIRED or value in (None, {}, [], ()):
            continue
        for key, word in value.items() if isinstance(value, Mapping) else ():
            try:
                tomli_w.dumps({key: word})
            except TypeError:
                raise OptionError(
                    f"`{name}` {key}: null cannot be said in TOML; leave it out where that is the default"
                ) from None
        value = list(value) if isinstance(value, tuple) else value
        plain = isinstance(value, Mapping | list | bool | int | float)
        table[name] = value if plain else str(value)
    # tables come last: a key after a table would belong to it
    return tomli_w.dumps(dict(sorted(table.items(), key=lambda x: isinstance(x[1], Mapping))))


def _options_in(path: Path) -> dict[str, Any]:
    """Read options of a TOML file, or of the run that wrote a manifest.

    A manifest holds no text, so `calibration` is missing.
    """
    if path.suffix == ".json":
        from maskopt.models.pruning.card import options_again

        manifest = read_manifest(path, smaller=True)
        return options_again(manifest["kind"], manifest["fingerprint"], path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"`config` {path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"`config` {path}: is no TOML: {error}") from None
