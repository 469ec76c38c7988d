"""Options of a command from a file: TOML, or the manifest of an earlier run.

Keys are names of options. Options of the command line override a file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from maskopt.core.fields import REQUIRED, Option
from maskopt.errors import OptionError, near

#: not allowed in a file: it may come from a stranger
_TRUST = "trust_remote_code"
#: options that say how a run begins, not what it computes
_NOT_KEPT = ("overwrite", "resume", "dry_run", _TRUST)


def read_config(path: Path, known: Mapping[str, Option]) -> dict[str, Any]:
    """Values of a file by option.

    Raises:
        OptionError: no such file, not TOML, a key that is no option, `trust_remote_code`, or a bad value.
        ModelError: a manifest that was changed.
    """
    given = _of_manifest(path) if path.suffix == ".json" else _of_toml(path)
    if _TRUST in given:
        raise OptionError(
            f"{path}: `{_TRUST}` cannot be set in a file; remove it, and give it on the command line"
        )
    for key, value in given.items():
        if key not in known or key in _NOT_KEPT:
            raise OptionError(f"{path}: no option is called {key!r}{near(key, known)}")
        if isinstance(value, bool | int | float):
            known[key].checked(value, f"{path}: `{key}`")
    return given


def config_text(values: Mapping[str, Any]) -> str:
    """TOML of the values, without those that are not set.

    Raises:
        OptionError: a null in a mapping.
    """
    table: dict[str, Any] = {}
    for name, value in values.items():
        if name in _NOT_KEPT or value is REQUIRED or value in (None, {}, [], ()):
            continue
        if isinstance(value, Mapping):
            _check_no_null(name, value)
        value = list(value) if isinstance(value, tuple) else value
        table[name] = (
            value if isinstance(value, Mapping | list | bool | int | float) else str(value)
        )
    # tables come last: a key after a table would belong to it
    return tomli_w.dumps(dict(sorted(table.items(), key=lambda x: isinstance(x[1], Mapping))))


def _check_no_null(key: str, given: Mapping[str, Any]) -> None:
    """Raise OptionError for a value, read from JSON, that TOML cannot hold."""
    for name, value in given.items():
        try:
            tomli_w.dumps({name: value})
        except TypeError:
            raise OptionError(
                f"`{key}` {name}: null cannot be said in TOML; leave it out where that is the default"
            ) from None


def _of_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"`config` {path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"`config` {path}: is no TOML: {error}") from None


def _of_manifest(path: Path) -> dict[str, Any]:
    """The options that repeat a run, without its text, of which a manifest has only the name."""
    from maskopt.models.checkpoints.report import read_manifest
    from maskopt.models.pruning.rerun import options_again

    manifest = read_manifest(path, smaller=True)
    try:
        return options_again(manifest["fingerprint"], path)
    except OptionError:  # which is a TypeError, too
        raise
    except (KeyError, TypeError, AttributeError):
        raise OptionError(f"{path}: holds no options of a prune") from None
