"""What a loader would take out of a pruned folder: the weights, and nothing else that it could take.

Shares no code with what reads and writes models.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskopt.errors import VerificationError
from maskopt.models.verification.shape import pairs, too_many

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MASKS = "maskopt-masks.bits"
MANIFEST = "maskopt-manifest.json"
CONFIG = "config.json"
#: what a prune copies beside the weights: configuration, tokenizer, templates
COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
#: what `maskopt` itself writes beside the weights
OWN = (MASKS, MANIFEST, "maskopt-distill.json")
#: what transformers' Trainer and tokenizers leave in a folder, and no loader takes for weights or code
SAVED = re.compile(
    r"training_args\.bin|(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|checkpoint-\d+|runs|"
    r"additional_chat_templates"
)
#: what no loader reads; such files may also have come later
HARMLESS_NAMES = ("README", "LICENSE", "NOTICE", "USE_POLICY", ".gitattributes", ".gitignore")
HARMLESS_ENDINGS = ("", ".txt", ".md", ".rst", ".pdf", ".html")
#: keys of JSON files that make transformers run code that it does not hold itself
CODE_KEYS = ("auto_map", "custom_pipelines")
#: part of keys whose value may name a kernel of the hub, `owner/name`
KERNEL_KEYS = "implementation"
#: keys of config.json that have other weights loaded, or these otherwise
WEIGHT_KEYS = ("transformers_weights", "quantization_config")


@dataclass(frozen=True)
class Weights:
    """The tensors that `from_pretrained` loads from a folder.

    Attributes:
        where: tensor name → its file.
        files: names of the shards and, where there are several, of the index.
        unnamed: tensors that lie in a shard and that the index does not name.
    """

    folder: Path
    where: dict[str, Path]
    files: tuple[str, ...]
    unnamed: frozenset[str]


def read_weights(folder: Path) -> Weights:
    """Find tensors as transformers does: one file is taken before an index, and of a shard everything.

    Raises:
        VerificationError: no safetensors weights, an index that leads out of the folder or names a
            tensor that is not there, a tensor in two shards; a configuration of far more blocks or experts.
    """
    weights = _found(folder)
    if os.path.lexists(folder / CONFIG):
        check_counts(folder, weights)
    return weights


def check_counts(folder: Path, weights: Weights) -> None:
    """Raise VerificationError where a folder's configuration has far more blocks or experts than there are
    tensors for: nobody can wait until such a model is built."""
    if wrong := too_many(read_object(folder / CONFIG), lambda: shapes(weights)):
        raise VerificationError(f"{folder / CONFIG}: {wrong}")


def shapes(weights: Weights) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of the tensors; no weight is read."""
    for path in sorted(set(weights.where.values())):
        with opened(path) as file:
            yield from ((name, file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _found(folder: Path) -> Weights:
    single = folder / SINGLE
    if single.is_file():
        with opened(single) as file:
            return Weights(folder, dict.fromkeys(file.keys(), single), (SINGLE,), frozenset())
    if not (folder / INDEX).is_file():
        raise VerificationError(f"{folder}: holds no safetensors weights")
    named = read_object(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise VerificationError(f"{folder / INDEX}: holds no weight_map")
    for tensor, shard in named.items():
        if not isinstance(shard, str) or not is_plain(shard) or not shard.endswith(".safetensors"):
            raise VerificationError(
                f"{folder / INDEX}: {tensor[:200]!r} is said to be in {str(shard)[:200]!r}, which is "
                "not the name of a safetensors file in the folder"
            )
    shards = sorted(set(named.values()))
    where: dict[str, Path] = {}
    for shard in shards:
        with opened(folder / shard) as file:
            held = list(file.keys())
        for name in held:
            if name in where:
                raise VerificationError(
                    f"{folder}: tensor {name!r} is in {where[name].name} and in {shard}"
                )
            where[name] = folder / shard
    for tensor, shard in named.items():
        if where.get(tensor) != folder / shard:
            raise VerificationError(
                f"{folder / INDEX}: says that {tensor[:200]!r} is in {shard}; it is not"
            )
    return Weights(folder, where, (*shards, INDEX), frozenset(where) - frozenset(named))


def check_entries(
    folder: Path,
    listed: Mapping[str, str],
    weights: Weights,
    *,
    needed: Collection[str] = (MASKS, CONFIG),
) -> None:
    """Compare every file with the manifest's digest, and refuse everything else that a loader could
    take for weights, configuration or code.

    Args:
        listed: the manifest's files, name → SHA-256.
        needed: files beside the weights that must be among them.

    Raises:
        VerificationError: a file that is missing, changed, unknown, or a link out of the folder.
    """
    check_beside(weights, lambda name: name in listed or name == MANIFEST)
    for name, digest in sorted(listed.items()):
        if not is_plain(name) or not os.path.lexists(folder / name):
            raise VerificationError(f"{folder}: file {name[:200]!r} of the manifest is not there")
        if not (name in weights.files or name == MASKS or is_copied(name) or _is_harmless(name)):
            raise _could_be_taken(folder / name)
        check_regular(folder / name)
        if sha256(folder / name) != digest:
            raise VerificationError(f"{folder / name}: was changed: its digest is another one")
    for name in (*weights.files, *needed):
        if name not in listed:
            raise VerificationError(f"{folder / name}: the manifest does not know this file")


def check_beside(weights: Weights, is_known: Callable[[str], bool]) -> None:
    """Refuse all in the folder of weights, but for the known files, that a loader could take for weights,
    configuration or code.

    Raises:
        VerificationError: such a file, or a link out of the folder.
    """
    folder = weights.folder
    if SINGLE in weights.files and os.path.lexists(folder / INDEX):
        raise VerificationError(
            f"{folder}: a loader could take either {SINGLE} or the shards of {INDEX}; "
            "a result holds one of them"
        )
    for entry in sorted(folder.iterdir()):
        known = is_known(entry.name)
        if not known and (entry.is_dir() or not _is_harmless(entry.name)):
            raise _could_be_taken(entry)
        if not entry.is_dir():
            check_regular(entry)


def check_configuration(
    folder: Path,
    names: Iterable[str],
    compared: Collection[str],
    remedy: str = "whether the original does, too, only a comparison with it (`original`) can show",
) -> None:
    """Refuse configuration that has a loader take other weights, or run code.

    Args:
        names: of the files in the folder.
        compared: files that are the original's, so that code which they ask for is the original's, too.
    """
    for name in sorted(names):
        if not name.endswith(".json") or name in (INDEX, MANIFEST):
            continue
        for key, value in pairs(read_json(folder / name)):
            if name == CONFIG and key in WEIGHT_KEYS and value:
                raise VerificationError(
                    f"{folder / name}: has a loader take other weights than those of the result "
                    f"({key})"
                )
            named = key in CODE_KEYS and isinstance(value, dict | list | str) and bool(value)
            kernel = KERNEL_KEYS in key and "/" in json.dumps(value)
            if (named or kernel) and name not in compared:
                raise VerificationError(f"{folder / name}: asks to run code ({key}); {remedy}")
    read_object(folder / CONFIG)


def asks_for_code(folder: Path) -> bool:
    """Does config.json name code of its own, without which transformers may not know the model?"""
    return bool(read_object(folder / CONFIG).get("auto_map"))


def is_copied(name: str) -> bool:
    """Is it a name under which configuration and tokenizers are copied from the original?"""
    special = name.endswith(".index.json") or name.startswith(("adapter_", "maskopt-", "."))
    return name.endswith(COPIED) and not special


def is_plain(name: str) -> bool:
    """Is it a file name without any path, which every system takes?"""
    odd = set(name) & set('/\\:\0*?"<>|') or not name.isprintable()
    return 0 < len(name) < 256 and name not in (".", "..") and not odd


def check_regular(file: Path) -> None:
    """Raise VerificationError for a pipe, a device, or a link out of the folder. Links into the blobs of
    the hub's cache, beside the snapshot, stay inside."""
    real, home = Path(os.path.realpath(file)), Path(os.path.realpath(file.parent))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if real.parent not in (home, blobs):
        raise VerificationError(f"{file}: is a link out of the folder, to {real}")
    try:
        regular = stat.S_ISREG(os.stat(file).st_mode)
    except OSError as error:
        raise VerificationError(f"{file}: cannot be read: {error.strerror}") from None
    if not regular:
        raise VerificationError(f"{file}: not a regular file, so a loader could hang on it")


def opened(path: Path) -> Any:
    check_regular(path)
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise VerificationError(f"{path}: cannot be read as safetensors: {line}") from None


def tensor(path: Path, name: str) -> Tensor:
    with opened(path) as file:
        try:
            return file.get_tensor(name)
        except SafetensorError as error:
            raise VerificationError(f"{path}: {name!r}: {error}") from None


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are stored alike."""
    pair = (x.contiguous().view(-1).view(torch.uint8) for x in (one, other))
    return torch.equal(*pair)


def read_json(path: Path) -> Any:
    """Raises VerificationError where it is unreadable or not JSON."""
    check_regular(path)
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        raise VerificationError(f"{path}: cannot be read as JSON") from None


def read_object(path: Path) -> dict[str, Any]:
    """Raises VerificationError where it is no JSON object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise VerificationError(f"{path}: not a JSON object")
    return value


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_harmless(name: str) -> bool:
    ending = Path(name).suffix
    read = name.startswith(HARMLESS_NAMES) and (ending in HARMLESS_ENDINGS or ending[1:].isdigit())
    return read or ending == ".md"


def _could_be_taken(path: Path) -> VerificationError:
    return VerificationError(
        f"{path}: is not of the result, and a loader could take it for weights, configuration or code; "
        "move it elsewhere"
    )
