"""Rebuild the options and the command line of a run from its manifest's fingerprint."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskopt.core.pattern import pattern_from_dict
from maskopt.errors import OptionError, PatternError
from maskopt.models.checkpoints.workspace import MANIFEST
from maskopt.models.options.prune import BOTH, ROWS, PruneOptions
from maskopt.models.options.structured import ShrinkOptions
from maskopt.models.options.walk import MASKS

#: options that are repeated NAME=VALUE, by their flags
_REPEATED = {"solver_options": "option", "training": "training"}
#: options that a fingerprint records. Anybody can write a manifest: it must not grant trust or name a path
_RECORDED = {"removed", "experts"} | {
    f.name
    for kind in (PruneOptions, ShrinkOptions)
    for f in dataclasses.fields(kind)
    if f.metadata["decides"] == MASKS
}


def options_again(fingerprint: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """Options as the command line names them, without a text that is not on the hub. Raises OptionError: a
    sparsity that the command line cannot express, or an option that is not recorded."""
    options, text = dict(fingerprint["options"]), fingerprint["calibration"]
    if odd := set(options) - _RECORDED:
        raise OptionError(
            f"{where}: sets `{min(odd)}`, which a manifest cannot set; give it on the command line"
        )
    if not isinstance(options.get("counts", {}), Mapping):  # the command line would read a file
        raise OptionError(f"{where}: `counts` must be an object, not {options['counts']!r:.60}")
    if "removed" in options:  # whole blocks: how many, on as many windows
        blocks = len(options["removed"])
        options = {"blocks": blocks, "windows": text["samples"], "seq_len": text["length"]}
    elif "experts" in options:
        options = {name: value for name, value in options.items() if name != "update"}
        options |= {"samples": text["samples"], "seq_len": text["length"]}
    else:
        if "channels" not in options:  # a model that was made smaller has no pattern
            options["sparsity"] = _sparsity(where, options.get("sparsity"))
            # rows whose limits are not named have none, where the command line's default would be some
            if options.get("allocation") in (ROWS, BOTH) and options.get("max_deviation") is None:
                options["max_deviation"] = 1.0
        options |= {"samples": text["samples"], "seq_len": text["length"]}
    bos = text["beginning"]["bos"]
    if bos in ("auto", "always", "never"):
        options["bos"] = bos
    options["chat"] = bos == "template"
    precision = fingerprint["dtype"]
    # `auto` is that on the CPU; elsewhere it depends on the model, of which nothing is known here
    if (fingerprint["device"], precision) != ("cpu", "float32"):
        options["dtype"] = precision
    if str(text["source"]).startswith("hf:"):
        options["calibration"] = text["source"]
    return {key: value for key, value in options.items() if value not in (None, {}, [])}


def command_again(fingerprint: Mapping[str, Any], folder: str | Path) -> list[str]:
    """Commands that make the same bytes from the same model and text: one that takes the options from the
    manifest in `folder`, and, where the command line can express them, one with all that are not the
    default."""
    command = "prune" if "sparsity" in fingerprint["options"] else "prune-structured"
    begin, end = f"maskopt {command} MODEL", "--calibration TEXT --output AGAIN"
    lines = [f"{begin} --config {shlex.quote(str(Path(folder) / MANIFEST))} {end}"]
    try:
        options = options_again(fingerprint, folder)
    except OptionError:
        return lines
    if "counts" in options:
        return lines
    kind = PruneOptions if command == "prune" else ShrinkOptions
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    words = [
        word
        for name, value in options.items()
        if name != "calibration" and value != defaults.get(name)
        for word in _words(name, value)
    ]
    return [*lines, f"{begin} {shlex.join(words)} {end}"]


def _words(name: str, value: Any) -> list[str]:
    flag = "--" + _REPEATED.get(name, name).replace("_", "-")
    if name in _REPEATED:
        return [word for k, v in value.items() for word in (flag, f"{k}={json.dumps(v)}")]
    if value is True:
        return [flag]
    if value is False:
        return []  # no switch of an option is on by default
    return [flag, ",".join(value) if isinstance(value, list) else str(value)]


def _sparsity(where: str | Path, record: Any) -> str:
    """As the command line takes it."""
    try:
        return str(pattern_from_dict(record))
    except (KeyError, TypeError, PatternError):
        raise OptionError(f"{where}: holds no sparsity") from None
