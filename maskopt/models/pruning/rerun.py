"""Rebuild the options and the command line of a run from its manifest."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskopt.core.fields import RECORDED, options_of
from maskopt.core.pattern import parse_sparsity
from maskopt.errors import OptionError, PatternError
from maskopt.models.checkpoints.schema import BLOCKS, EXPERTS, MANIFEST, PRUNE
from maskopt.models.options.prune import BOTH, ROWS, PruneOptions
from maskopt.models.options.structured import ShrinkOptions

#: keys that a fingerprint records. Anybody can write a manifest: it must not grant trust or name a path
_RECORDED = {"removed", "experts"} | {
    one.name
    for kind in (PruneOptions, ShrinkOptions)
    for one in options_of(kind)
    if one.group in RECORDED
}


def options_again(kind: str, fingerprint: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """Options that repeat a run, its text only if it is of the hub; OptionError for other options."""
    options, text = dict(fingerprint["options"]), fingerprint["calibration"]
    if odd := set(options) - _RECORDED:
        raise OptionError(
            f"{where}: sets `{min(odd)}`, which a manifest cannot set; give it on the command line"
        )
    windows = {"samples": text["samples"], "seq_len": text["length"]}
    if kind == BLOCKS:  # how many, scored on as many windows
        options = {"blocks": len(options["removed"]), "windows": windows.pop("samples")}
    elif kind == EXPERTS:
        options.pop("update", None)
    elif kind == PRUNE:
        try:
            parse_sparsity(options["sparsity"])
        except (KeyError, TypeError, PatternError):
            raise OptionError(f"{where}: holds no sparsity") from None
        # rows without recorded limits have none, where the default would set some
        if options.get("allocation") in (ROWS, BOTH) and options.get("max_deviation") is None:
            options["max_deviation"] = 1.0
    options |= windows
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


def command_again(kind: str, fingerprint: Mapping[str, Any], folder: str | Path) -> list[str]:
    """Commands that give the same bytes from the same model and text, whose paths a manifest does not have:
    one that reads the manifest in `folder`, and one with all options that are not at their default (not if it
    has no sparsity, or counts of all layers)."""
    command = "prune" if kind == PRUNE else "prune-structured"
    begin, end = f"maskopt {command} MODEL", "--calibration TEXT --output AGAIN"
    lines = [f"{begin} --config {shlex.quote(str(Path(folder) / MANIFEST))} {end}"]
    try:
        options = options_again(kind, fingerprint, folder)
    except OptionError:
        return lines
    if "counts" in options:
        return lines
    usual = {
        one.name: one.default
        for one in options_of(PruneOptions if kind == PRUNE else ShrinkOptions)
    }
    words = [
        word
        for name, value in options.items()
        if name != "calibration" and value != usual.get(name)
        for word in _words("--" + name.replace("_", "-"), value)
    ]
    return [*lines, f"{begin} {shlex.join(words)} {end}"]


def _words(flag: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [word for k, v in value.items() for word in (flag, f"{k}={json.dumps(v)}")]
    if isinstance(value, bool):  # no switch is on by default
        return [flag] if value else []
    return [flag, ",".join(value) if isinstance(value, list) else str(value)]
