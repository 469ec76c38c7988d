"""Options of a command from a file: TOML, or the manifest of an earlier prune.

The file stands in for defaults: what is on the command line goes before it. Keys are the library's names of
the options (`solver_options`, `seq_len`), and `model`, `calibration`, `output`.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer

from maskopt.errors import OptionError, near

#: that a file must not set: whoever wrote it may be a stranger
_TRUST = "trust_remote_code"
#: values that are no options of a run, or that no file may set
_NOT_KEPT = ("config", "print_config", "overwrite", "resume", "dry", "help_all", _TRUST)


def _load(ctx: typer.Context, value: Path | None) -> Path | None:
    """Before the other options are looked at."""
    if value is not None:
        ctx.default_map = read_config(value, ctx.command.params)
    return value


Config = Annotated[
    Path | None,
    typer.Option(
        help="Read options (also MODEL, --calibration and --output) from a TOML file, as --print-config "
        "writes it, or from a manifest. Options of the command line override it.",
        rich_help_panel="Output",
        metavar="…",
        is_eager=True,
        callback=_load,
    ),
]
PrintConfig = Annotated[
    bool,
    typer.Option(
        "--print-config",
        help="Print all options as a file for --config and exit.",
        rich_help_panel="Output",
        metavar="",
    ),
]


def read_config(path: Path, parameters: Sequence[Any]) -> dict[str, Any]:
    """Values for a command's parameters, by their names.

    Raises:
        OptionError: no such file, not TOML, a key that is no option, `trust_remote_code`, or true or false
            for one that is no switch.
        ModelError: a manifest that was changed.
    """
    given = _of_manifest(path) if path.suffix == ".json" else _of_toml(path)
    if _TRUST in given:
        raise OptionError(
            f"{path}: `{_TRUST}` cannot be set in a file; remove it, and give it on the command line"
        )
    known = {_key(p): p for p in parameters if p.name not in _NOT_KEPT}
    for key, value in given.items():
        if key not in known:
            raise OptionError(f"{path}: no option is called {key!r}{near(key, set(known))}")
        # which would count as 1 where a number is asked for
        if isinstance(value, bool) and not getattr(known[key], "is_flag", False):
            raise OptionError(f"{path}: `{key}` is no switch, to be {str(value).lower()}")
    return {known[key].name: _as_given(key, value) for key, value in given.items()}


def config_text(values: Mapping[str, Any], parameters: Sequence[Any]) -> str:
    """TOML of a command's values, of which those that are not set are left out.

    Args:
        values: by parameter name, with mappings for repeated NAME=VALUE.

    Raises:
        OptionError: a null in such a mapping.
    """
    table: dict[str, Any] = {}
    for parameter in parameters:
        value = values.get(parameter.name)
        if value is None or parameter.name in _NOT_KEPT or value in ({}, [], ()):
            continue
        if isinstance(value, tuple):
            value = list(value)
        if isinstance(value, Mapping):
            _check_no_null(_key(parameter), value)
        plain = isinstance(value, Mapping | list | bool | int | float)
        table[_key(parameter)] = value if plain else str(value)
    # tables come last: what follows one would belong to it
    return tomli_w.dumps(dict(sorted(table.items(), key=lambda x: isinstance(x[1], Mapping))))


def _check_no_null(key: str, given: Mapping[str, Any]) -> None:
    """Raise OptionError for a value, read from JSON, that TOML cannot say."""
    for name, value in given.items():
        try:
            tomli_w.dumps({name: value})
        except TypeError:
            raise OptionError(
                f"`{key}` {name}: null cannot be said in TOML; leave it out where that is the default"
            ) from None


def said(ctx: typer.Context, options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a command's options those of the command line, and those of the file that are not at their default:
    `--print-config` writes them all."""
    usual = {parameter.name: parameter.default for parameter in ctx.command.params}
    sources = {name: getattr(ctx.get_parameter_source(name), "name", "") for name in options}
    return {
        name: value
        for name, value in options.items()
        if sources[name] != "DEFAULT" and (sources[name] != "DEFAULT_MAP" or value != usual[name])
    }


def _key(parameter: Any) -> str:
    """What the library calls it; of a parameter that is none of its options, its flag."""
    from maskopt.cli.parameters import FIELDS

    if parameter.name in FIELDS or parameter.param_type_name == "argument":
        return str(parameter.name)
    return str(parameter.opts[0]).removeprefix("--").replace("-", "_")


def _of_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"`config` {path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"`config` {path}: is no TOML: {error}") from None


def _of_manifest(path: Path) -> dict[str, Any]:
    """What decided a result, as options that decide it again. Of the text a manifest has only the name."""
    from maskopt.models.checkpoints.report import read_manifest
    from maskopt.models.pruning.rerun import options_again

    manifest = read_manifest(path, smaller=True)
    try:
        return options_again(manifest["fingerprint"], path)
    except OptionError:  # which is a TypeError, too
        raise
    except (KeyError, TypeError, AttributeError):
        raise OptionError(f"{path}: holds no options of a prune") from None


def _as_given(key: str, value: Any) -> Any:
    """As it would stand on the command line."""
    from maskopt.cli.parameters import FILES

    if key in FILES:
        return json.dumps(value) if isinstance(value, Mapping) else value
    if isinstance(value, Mapping):
        return [f"{name}={json.dumps(item)}" for name, item in value.items()]
    return value
