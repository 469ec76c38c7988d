"""What a manifest says of parts that were trained: whether it can be so, and which weights it lets differ.

That training gave these losses is nothing that a folder shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maskopt.models.verification.manifest import Manifest

#: of how a run trained, what decides which weights differ, and what it may be
_HOW = {
    "granularity": ("block", "part"),
    "train": ("weights", "all"),
    "begin": ("none", "least-squares"),
}
#: after a block's name, of a sample that it gave NaN of in the dense model
_IN_DENSE = " (dense)"


def check_parts(manifest: Manifest) -> None:
    """Every layer that was trained is in one part, every part holds one, and its epoch is one that can be.

    Raises:
        VerificationError: with the first contradiction.
    """
    parts, how = manifest.record["parts"], manifest.options.get("training", {})
    if manifest.options.get("update") != "blockwise":
        if parts or how:
            raise manifest.wrong("has trained parts, and its options train none")
        return
    epochs = how.get("epochs")
    if type(epochs) is not int or any(how.get(key) not in may for key, may in _HOW.items()):
        raise manifest.wrong("does not say how its weights were trained")
    for part in parts:
        of = f"part {part['part']!r} of block {part['block']}"
        if (part["part"] == "") != (how["granularity"] == "block"):
            raise manifest.wrong(f"{of}: the options train others")
        if part["epoch"] > epochs:
            raise manifest.wrong(f"{of}: was trained longer than the options say")
        same = all(part[f"{text}_before"] == part[f"{text}_after"] for text in ("fitted", "held"))
        if not (part["held_after"] < part["held_before"] if part["epoch"] else same):
            raise manifest.wrong(f"{of}: its epoch is not what its losses say")
    homes = [_home(layer, parts) for layer in manifest.layers if not layer["fallback"]]
    if any(len(home) != 1 for home in homes):
        raise manifest.wrong("has a trained layer that is in no part, or in two")
    if {home[0] for home in homes} != set(range(len(parts))):
        raise manifest.wrong("has a trained part that holds no layer")


def set_anew(manifest: Manifest) -> list[dict[str, Any]]:
    """Layers whose kept weights may differ from the original's: refitted, or of a part that became better."""
    layers = [layer for layer in manifest.layers if not layer["fallback"]]
    how = manifest.options.get("training", {})
    if manifest.options.get("update", "none") == "none":
        return []
    return [layer for layer in layers if how.get("begin") != "none" or _bettered(manifest, layer)]


def seen_in_dense(manifest: Manifest) -> bool:
    """Whether samples were left out for what the dense model gave; it walks along while parts are trained."""
    return any(x["layer"].endswith(_IN_DENSE) for x in manifest.record["bad_samples"])


def trained_vectors(manifest: Manifest, tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """What names of norms and biases that may have been trained begin with.

    Args:
        tensors: those with masks. Their names are those of the blocks up to the first number. (Another part
            of the model may number blocks of its own.)
    """
    if manifest.options.get("training", {}).get("train") != "all":
        return ()
    number_of = {layer["block"]: _split(layer["name"])[1] for layer in manifest.layers}
    found = set()
    for name in tensors:
        before, number, after = _split(name)
        parts = [p for p in manifest.record["parts"] if number_of[p["block"]] == number]
        inside = [part for part in parts if _holds(part["part"], after)]
        for part in inside or parts:
            # what is stored under another name than the model's could be of any part
            end = f"{part['part']}." if inside and part["part"] else ""
            if part["epoch"]:
                found.add(f"{before}{number}.{end}")
    return tuple(found)


def _bettered(manifest: Manifest, layer: Mapping[str, Any]) -> bool:
    parts = manifest.record["parts"]
    return any(parts[index]["epoch"] for index in _home(layer, parts))


def _home(layer: Mapping[str, Any], parts: list[dict[str, Any]]) -> list[int]:
    """Which parts hold a layer."""
    inside = _split(layer["name"])[2]
    return [
        index
        for index, part in enumerate(parts)
        if part["block"] == layer["block"] and _holds(part["part"], inside)
    ]


def _holds(part: str, inside: str) -> bool:
    """Is what has this name inside its block in a part of that name?"""
    return not part or f"{inside}.".startswith(f"{part}.")


def _split(name: str) -> tuple[str, str, str]:
    """Before, at, and after the first number of a name; all of it is before where there is none."""
    words = name.split(".")
    for place, word in enumerate(words):
        if word.isdecimal():
            return ".".join([*words[:place], ""]), word, ".".join(words[place + 1 :])
    return name, "", ""
