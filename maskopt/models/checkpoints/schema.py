"""Checks of all that is read from an untrusted model folder, except weights and masks.

These are file names and links, JSON, configuration, index, headers of masks, and the manifest of a run.
Runs and `verify` share them. Weights and masks are read once for runs (`maskopt.models.checkpoints`) and once
more, in another way, for `verify`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from maskopt.core.pattern import parse_sparsity
from maskopt.errors import ModelError
from maskopt.models.checkpoints.bos import BOS, GIVEN, TEMPLATE

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, MANIFEST = "config.json", "maskopt-manifest.json"
#: a safetensors file of another ending: servers load every *.safetensors of a folder
MASKS = "maskopt-masks.bits"
BASES = "maskopt-bases.bits"
#: in a manifest, after the name of a block whose output was seen in the dense model
IN_DENSE = " (dense)"
#: token ids of the windows that the dense model wrote
WRITTEN = "maskopt-windows.bits"
#: endings of files that are copied along with the weights: configuration, tokenizer, templates
COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
#: beginnings of names that are not: of files of maskopt, hidden ones, and adapters, which change the weights
NOT_COPIED = ("maskopt-", ".", "adapter_")
#: files that no loader reads
LEGAL_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
LEGAL_SUFFIXES = ("", ".txt", ".md", ".rst", ".pdf", ".html")
MAX_JSON = 256 * 2**20
MANIFEST_FORMAT, MASK_FORMAT = "maskopt-manifest-1", "maskopt-masks-1"
BASES_FORMAT = "maskopt-bases-1"
#: of a manifest: weights are pruned; or channels and heads, experts, or blocks are removed
PRUNE, STRUCTURES, EXPERTS, BLOCKS = KINDS = ("prune", "structures", "experts", "blocks")
#: entries of config.json that count blocks or experts; so many are built in seconds
_COUNTS = re.compile(r"(.*_)?(n|num)_(.*_)?(layers?|blocks|experts)|(en|de)coder_layers|depth")
_FEW = 1024
#: keys of JSON files that make transformers run code from outside its package
_CODE_KEYS = ("auto_map", "custom_pipelines")
#: keys of config.json that make a loader take other weights, or convert these
_WEIGHT_KEYS = {
    "quantization_config": "the weights are quantised; take the original weights",
    "transformers_weights": f"a loader takes other weights than {SINGLE}; rename the weights",
}


# --- files


def open_file(path: Path) -> IO[bytes]:
    """Open a regular file for reading; ModelError for a pipe, a device, or a file that cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ModelError(f"{path}: not a regular file")
        return open(path, "rb")
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None


def file_digest(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def read_value(path: Path, **options: Any) -> Any:
    """Read JSON with options of `json.loads`; ModelError where it is missing, too large or no JSON."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_JSON:
            raise ModelError(f"{path}: larger than {MAX_JSON >> 20} MiB, which no such file is")
        data = file.read()
    try:
        return json.loads(data.decode("utf-8"), **options)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({str(error)[:100]})") from None


def read_json(path: Path, why: str = "", **options: Any) -> dict[str, Any]:
    """Read a JSON object as `read_value` does; `why`: what a missing one means."""
    if not path.is_file() and why:
        raise ModelError(f"{path}: no such file; {why}")
    value = read_value(path, **options)
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


def check_link(file: Path) -> None:
    """Raise ModelError for a link to no file, or out of the folder and the hub's blob store."""
    real, home = Path(os.path.realpath(file)), Path(os.path.realpath(file.parent))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if real.parent not in (home, blobs):
        raise ModelError(
            f"{file}: is a link out of the model folder, to {real}; put the file itself there"
        )
    if file.is_symlink() and not file.is_file():
        raise ModelError(
            f"{file}: cannot be read: is a link to {real}, which is no file; put the file itself there"
        )


def read_index(folder: Path) -> dict[str, str]:
    """Read the shards of tensors from an index; ModelError for names that lead out of the folder."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / INDEX}: holds no weight_map")
    for tensor, name in weight_map.items():
        if not plain_name(name) or not name.endswith(".safetensors"):
            raise ModelError(
                f"{folder / INDEX}: {tensor[:200]!r} is said to be in {str(name)[:200]!r}, "
                "which is not the name of a safetensors file in the folder"
            )
    return weight_map


def shards_of(
    folder: Path, held: Mapping[str, Iterable[str]], index: Mapping[str, str]
) -> dict[str, str]:
    """Return the shard of every tensor, given the tensors that each shard holds.

    Raises:
        ModelError: a tensor is in two of them, or not where the index says.
    """
    where: dict[str, str] = {}
    for shard, tensors in held.items():
        for tensor in tensors:
            if tensor in where:
                raise ModelError(
                    f"{folder}: tensor {tensor!r} is in {where[tensor]} and in {shard}"
                )
            where[tensor] = shard
    for tensor, shard in index.items():
        if where.get(tensor) != shard:
            raise ModelError(
                f"{folder / INDEX}: says that {tensor[:200]!r} is in {shard}; it is not"
            )
    return where


# --- shapes of JSON values


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def is_size(value: Any) -> bool:
    return is_count(value) and value > 0


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_amount(value: Any) -> bool:
    return is_number(value) and value >= 0


def fits(value: Any, shape: Any) -> bool:
    """Return whether a JSON value has a shape.

    Args:
        shape: a type, a predicate, a constant, a tuple of alternatives, a list with the shape of every
            element, or an object by keys: `key?` may be missing, `...` stands for all other keys.
    """
    if isinstance(shape, type):
        return type(value) is shape
    if callable(shape):
        return bool(shape(value))
    if isinstance(shape, tuple):
        return any(fits(value, alternative) for alternative in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    if not isinstance(shape, dict):
        return type(value) is type(shape) and bool(value == shape)
    if not isinstance(value, dict):
        return False
    named = {key.removesuffix("?"): key for key in shape if key is not ...}
    return all(key in value for key in shape if key in named) and all(
        fits(item, shape[named[key]] if key in named else shape[...])
        for key, item in value.items()
        if key in named or ... in shape
    )


def plain_name(name: Any) -> bool:
    """Return whether it is a file name without a path, which cannot lead out of a folder."""
    return (
        isinstance(name, str)
        and 0 < len(name) < 256
        and name not in (".", "..")
        and not set(name) & set('/\\:\0*?"<>|')
        and name.isprintable()
    )


def is_copied(name: str) -> bool:
    """Return whether files of that name, configuration and tokenizers, are copied along with the weights."""
    other = name.startswith(NOT_COPIED) or name.endswith(".index.json")
    return name.endswith(COPIED) and not other


def pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield keys and values of all objects inside a JSON value."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            value = list(value.values())
        waiting += value if isinstance(value, list) else []


def check_settings(path: Path, settings: Any, remedy: str | None) -> None:
    """Raise ModelError for an entry of a JSON file that runs code or has other weights loaded.

    Args:
        remedy: what the message about code says; None: code may run.
    """
    for key, value in pairs(settings):
        if path.name == CONFIG and key in _WEIGHT_KEYS and value:
            raise ModelError(f"{path}: {_WEIGHT_KEYS[key]} ({key})")
        code = key in _CODE_KEYS and isinstance(value, dict | list | str) and bool(value)
        # the value may name a kernel of the hub, `owner/name`
        kernel = "implementation" in key and "/" in json.dumps(value)
        if remedy is not None and (code or kernel):
            raise ModelError(f"{path}: asks to run code ({key}); {remedy}")


def far_more_than_stored(config: Any, shapes: Mapping[str, Sequence[int]]) -> str:
    """Describe a setting that counts far more blocks or experts than are stored and takes hours to build."""
    blocks, experts, each = set(), set(), 0
    for name, shape in shapes.items():
        numbers = [part for part in name.split(".") if part.isdecimal()]
        blocks.update(numbers[:1])
        experts.update(numbers[1:])
        if len(shape) == 3 and min(shape):
            each = max(each, shape[0])
    for key, value in pairs(config):
        if type(value) is not int or not _COUNTS.fullmatch(key):
            continue
        parts, stored = "blocks", len(blocks)
        if "expert" in key:
            parts, stored = "experts", max(len(experts), each)
        if value > max(2 * stored, _FEW):
            return f"`{key}` is {value}, and the stored tensors have {stored} {parts}; correct it"
    return ""


def differences(old: Any, new: Any, path: str = "") -> str:
    """Describe the first places where two JSON values differ, and count the others; empty for equal ones."""
    lines = list(_apart(old, new, path))
    more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
    return "; ".join(lines[:5]) + more


def _apart(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _apart(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path} was {old!r}, is {new!r}"


# --- headers of masks, and manifests


#: of a mask, in the header of its file
_MASK = {
    "shape": lambda v: fits(v, [is_size]) and len(v) in (2, 3),
    "input_axis": is_count,
    "sha256": str,
}


def read_layout(
    path: Path, metadata: Mapping[str, str], names: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Read shape, axis of the inputs and digest of each mask of a file; ModelError for another file."""
    if metadata.get("format") != MASK_FORMAT:
        raise ModelError(f"{path}: not a mask file of format {MASK_FORMAT}")
    try:
        layout = json.loads(metadata["tensors"])
    except (KeyError, ValueError, RecursionError):
        raise ModelError(f"{path}: the header of the masks is damaged") from None
    if not isinstance(layout, dict) or set(layout) != set(names):
        raise ModelError(f"{path}: the header names other tensors than the file holds")
    for name, item in layout.items():
        sound = fits(item, _MASK) and set(item) == set(_MASK)
        if not sound or not 0 <= len(item["shape"]) - 1 - item["input_axis"] <= 1:
            raise ModelError(f"{path}: the header of mask {name[:200]!r} is damaged")
    return layout


_STATUSES = ("optimal", "swap-optimal", "feasible")
_MAYBE_AMOUNT, _MAYBE_COUNT = (None, is_amount), (None, is_count)


def _is_choice(value: Any) -> bool:
    """Return whether it lists indices of structures, in order."""
    return fits(value, [is_count]) and bool(value) and bool(value == sorted(set(value)))


#: of the reports of layers and of trained blocks
LAYER = {
    **dict.fromkeys(("name", "pattern", "kind"), str),
    **dict.fromkeys(("rows", "n"), is_size),
    **dict.fromkeys(("pruned", "tokens", "block"), is_count),
    **dict.fromkeys(("error", "lower_bound", "energy", "gram_shrinkage", "seconds"), is_amount),
    **dict.fromkeys(("error_held", "energy_held", "error_kept"), _MAYBE_AMOUNT),
    **dict.fromkeys(("error_wanda", "damping"), _MAYBE_AMOUNT),
    **dict.fromkeys(("swaps", "scans"), _MAYBE_COUNT),
    "improvement_quantiles": (None, lambda v: fits(v, [is_number]) and len(v) == 5),
    "statuses": lambda v: fits(v, {...: is_size}) and set(v) <= set(_STATUSES),
    "fallback": bool, "objective": ("kept", "least-squares", "updated"),
}  # fmt: skip
TRAINED = {
    **dict.fromkeys(("fitted_before", "fitted_after", "held_before", "held_after"), is_number),
    "block": is_count, "epoch": is_count, "diverged": bool, "seconds": is_amount,
}  # fmt: skip
_COMMON = {
    "format": MANIFEST_FORMAT, "kind": str, "sha256": str,
    "sparsity": is_amount, "seconds": is_amount, "memory": {...: _MAYBE_COUNT},
    "layers": [{**LAYER, "sparsity": is_amount}], "trained": [TRAINED],
    "distillation": (None, {
        "before": {"fitted": is_number, "held": is_number},
        "after": {"fitted": is_number, "held": is_number},
        "epoch": is_count, "diverged": bool,
    }),
    "bad_samples": [{"sample": is_count, "layer": str}],
    "files": {...: str},
}  # fmt: skip
#: of a fingerprint of any kind
_RUN = {
    "dtype": ("float64", "float32", "float16", "bfloat16"), "device": str,
    "calibration": {
        "samples": is_size, "length": is_size, "source": str, "sha256": str,
        "beginning": {"bos": (*BOS, GIVEN.bos, TEMPLATE.bos), "ids": [is_count]},
    },
}  # fmt: skip
#: of a smaller model that was trained afterwards: the run of `maskopt distill`
_DISTILLED = {
    "options": {"epochs": is_size, ...: lambda _: True}, "versions": {...: str},
    "model": str, "teacher": str, **_RUN,
}  # fmt: skip
_SMALLER = {
    **_COMMON, "shrunk": {"kept": {...: _is_choice}, "updated": [str]},
}  # fmt: skip
#: options that say how much is removed
_REMOVED = {
    STRUCTURES: {
        "channels": is_amount, "heads": is_amount, "round_to": is_size,
        "removed?": lambda v: v == [] or _is_choice(v),
    },
    EXPERTS: {"experts": is_amount}, BLOCKS: {"removed": _is_choice},
}  # fmt: skip
#: of a manifest, by its kind
SHAPES: dict[str, dict[str, Any]] = {
    PRUNE: {
        **_COMMON,
        "fingerprint": {
            "options": {
                "sparsity": parse_sparsity, "counts?": {...: is_count},
                "training?": dict, "distillation?": dict,
            },
            "model": str, "bases?": str, **_RUN,
        },
    },
    **{
        kind: {
            **_SMALLER,
            "fingerprint": {
                "model": str, "options": options, "distillation?": _DISTILLED, **_RUN,
            },
        }
        for kind, options in _REMOVED.items()
    },
}  # fmt: skip


def read_manifest(path: Path, *, smaller: bool = False) -> dict[str, Any]:
    """Read a manifest of a prune, or (`smaller`) of any kind; ModelError where it is missing or changed."""
    manifest = read_json(
        path, "the folder was not written by maskopt prune", parse_constant=_no_number
    )
    kind = manifest.get("kind")
    if manifest.get("format") != MANIFEST_FORMAT or kind not in KINDS:
        raise ModelError(f"{path}: not a manifest of format {MANIFEST_FORMAT}")
    try:
        shape = SHAPES[kind]
        sound = manifest["sha256"] == manifest_digest(manifest) and fits(manifest, shape)
        sound = sound and manifest.keys() == shape.keys()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ModelError(f"{path}: the manifest is damaged or was changed")
    if odd := [name for name in manifest["files"] if not plain_name(name)]:
        raise ModelError(
            f"{path}: {min(odd)[:200]!r} is not there; `files` must have names without a path"
        )
    if kind != PRUNE and not smaller:
        raise ModelError(
            f"{path}: the folder was written by maskopt prune-structured, and is a dense model without masks"
        )
    return manifest


def manifest_digest(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON object without its own entry `sha256`."""
    unsigned = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(unsigned, sort_keys=True).encode()).hexdigest()


def _no_number(constant: str) -> float:
    """Refuse NaN and infinities, for `json.loads`."""
    raise ValueError(constant)
