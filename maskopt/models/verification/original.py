"""A pruned folder beside the original: the same model's files, but for its weights.

Shares no code with what copies files and writes models.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from maskopt.errors import VerificationError
from maskopt.models.verification.folder import (
    CONFIG,
    INDEX,
    Weights,
    check_regular,
    is_copied,
    is_plain,
    read_object,
    sha256,
)
from maskopt.models.verification.manifest import Manifest

#: keys of config.json that saving a model writes anew
REWRITTEN = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


def same_files(manifest: Manifest, weights: Weights, original: Weights) -> set[str]:
    """Names of the files beside the weights that are those of the original.

    Of a model folder, pruning copies them all, byte by byte, and the manifest holds the folder's digest.
    A model in memory was saved anew: its configuration must mean the same, the rest may differ.

    Raises:
        VerificationError: other tensors; a file that is another one, is missing, or is not the original's.
    """
    folder, home = weights.folder, original.folder
    if odd := set(weights.where) ^ set(original.where):
        raise VerificationError(f"{folder}: tensor {min(odd)!r} is in only one of the two models")
    if weights.unnamed != original.unnamed:
        raise VerificationError(
            f"{folder / INDEX}: the index does not name the same tensors as the original's"
        )
    theirs = copied_files(home)
    ours = set(filter(is_copied, manifest.files))
    same = {n for n in ours & theirs if sha256(folder / n) == sha256(home / n)}
    if manifest.model is None:
        return same | {n for n in ours & theirs - same if _means_the_same(folder, home, n)}
    if manifest.model != _model_digest(original):
        raise manifest.wrong(f"holds the digest of another model than {home}")
    if weights.files != original.files or (
        INDEX in weights.files and sha256(folder / INDEX) != sha256(home / INDEX)
    ):
        raise VerificationError(f"{folder / INDEX}: the index is not that of the original")
    for name in sorted((ours | theirs) - same):
        where = (
            "differs from the original" if name in ours & theirs else "is in only one of the two"
        )
        raise VerificationError(f"{folder / name}: {where}; configuration and tokenizer are copied")
    return same


def copied_files(home: Path) -> set[str]:
    """Names of the files beside an original's weights that its results hold, too."""
    return {
        file.name
        for file in home.iterdir()
        if is_copied(file.name) and is_plain(file.name) and file.is_file() and _stays(file)
    }


def _stays(file: Path) -> bool:
    """Links out of the original are not followed, and what they lead to is not copied."""
    try:
        check_regular(file)
    except VerificationError:
        return False
    return True


def _means_the_same(folder: Path, home: Path, name: str) -> bool:
    """Is a JSON file the same but for what saving a model writes anew?

    Raises:
        VerificationError: config.json has another meaning.
    """
    if name == CONFIG:
        ours, theirs = _configuration(folder), _configuration(home)
        unread = {*read_object(folder / CONFIG)} - {*ours, *REWRITTEN}  # others may read them
        odd = sorted(unread | {k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k)})
        if odd:
            raise VerificationError(f"{folder / CONFIG}: {odd[0]!r} differs from the original")
        return True
    if name != "generation_config.json":
        return False
    ours, theirs = read_object(folder / name), read_object(home / name)
    return all(ours.get(k) == theirs.get(k) for k in {*ours, *theirs} - set(REWRITTEN))


def _configuration(folder: Path) -> dict[str, Any]:
    """What transformers reads out of config.json, defaults filled in."""
    from transformers import AutoConfig

    try:
        read: dict[str, Any] = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    except Exception as error:  # configurations fail in as many ways as there are models
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise VerificationError(f"{folder / CONFIG}: cannot be read: {line}") from error
    return {key: value for key, value in read.items() if key not in REWRITTEN}


def _model_digest(weights: Weights) -> str:
    """SHA-256 over config.json and all shards, as the manifest records it."""
    names = [CONFIG, *(name for name in weights.files if name != INDEX)]
    parts = {name: sha256(weights.folder / name) for name in names}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
