"""A Hugging Face model folder, read without trusting it: configuration, shards, tensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from maskopt.errors import ModelError
from maskopt.models.checkpoints.safefile import (
    SafeFile,
    TensorEntry,
    open_file,
    open_safe,
    write_file,
)
from maskopt.models.checkpoints.schema import far_more_than_stored, pairs, plain_name

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON = 256 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model folder: `shards` by file name, and `where`: tensor name → its file."""

    folder: Path
    config: dict[str, Any]
    shards: dict[str, SafeFile]
    where: dict[str, str]

    def entry(self, name: str) -> TensorEntry:
        return self.shards[self.where[name]].entries[name]

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype."""
        return self.shards[self.where[name]].read(name)

    @cached_property
    def shard_digests(self) -> dict[str, str]:
        """SHA-256 of every shard's bytes."""
        return {name: file_digest(self.folder / name) for name in sorted(self.shards)}

    @property
    def digest(self) -> str:
        """SHA-256 over config.json and all shards: two models are the same if this is."""
        parts = {"config.json": file_digest(self.folder / "config.json"), **self.shard_digests}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        return sum(shard.size for shard in self.shards.values())


def open_checkpoint(folder: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Check a model folder's configuration, index and shard headers. Raises ModelError: no such folder, a
    broken config.json or one that asks for code, quantised or pickled weights, an adapter, a link or an index
    that leads out of the folder, a missing tensor, a truncated shard."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder")
    check_link(folder / "config.json")
    config = read_json(folder / "config.json", "a model folder needs one")
    _check_config(folder, config, trust_remote_code)
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder}: holds an adapter (adapter_config.json), which loaders put onto other weights; "
            "merge it into its model first"
        )
    names, weight_map = _shard_names(folder)
    for name in names:
        check_link(folder / name)
    shards = {name: open_safe(folder / name) for name in names}
    where: dict[str, str] = {}
    for name, shard in shards.items():
        for tensor in shard.entries:
            if tensor in where:
                raise ModelError(f"{folder}: tensor {tensor!r} is in {where[tensor]} and in {name}")
            where[tensor] = name
    for tensor, name in weight_map.items():
        if where.get(tensor) != name:
            raise ModelError(f"{folder}: {INDEX} says that {tensor!r} is in {name}; it is not")
    entries = [shards[name].entries[key] for key, name in where.items()]
    if what := far_more_than_stored(config, {x.name: x.shape for x in entries}):
        raise ModelError(f"{folder / 'config.json'}: {what}")
    return Checkpoint(folder, config, shards, where)


def _check_config(folder: Path, config: Any, trust_remote_code: bool) -> None:
    """Raise ModelError for an entry, at any depth, that runs code or has other weights loaded."""
    for key, value in pairs(config):
        if not value:
            continue
        if key == "auto_map" and not trust_remote_code:
            raise ModelError(
                f"{folder}: config.json asks to run code that comes with the model (auto_map), which is "
                "not run unless `trust_remote_code` says so; without auto_map transformers' own code runs"
            )
        if "implementation" in key and "/" in json.dumps(value) and not trust_remote_code:
            raise ModelError(
                f"{folder}: config.json asks to run a kernel from the hub ({key}), which is not run unless "
                f"`trust_remote_code` says so; without {key} transformers' own code runs"
            )
        if key == "quantization_config":
            raise ModelError(
                f"{folder}: the weights are quantised (quantization_config in config.json); "
                "prune the original weights"
            )
        if key == "transformers_weights":
            raise ModelError(
                f"{folder}: config.json has transformers load {value!r} (transformers_weights) in place "
                f"of {SINGLE}; rename the weights and leave that out"
            )


def resolve_model(model: str | Path, *, trust_remote_code: bool = False) -> Path:
    """A local folder, or a model of the hub, fetched without code unless that may run."""
    name = str(model)
    if not names_hub_model(name):
        return Path(model)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.md"]
    wanted += ["LICENSE*", "NOTICE*", "USE_POLICY*"] + ["*.py"] * trust_remote_code
    # the weights once more, in the layout of other programs
    ignored = ["consolidated*.safetensors", "*/*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=ignored))
    except Exception as error:  # the hub client raises whatever its layers raise
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{name}: neither a folder nor a model of the hub: {line}") from error


def names_hub_model(name: str) -> bool:
    """Is it OWNER/NAME, and no folder that is here?"""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def read_json(path: Path, why: str = "") -> dict[str, Any]:
    """A JSON object from a file; ModelError where it is missing, unreadable, too large or something else."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file" + (f"; {why}" if why else ""))
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_JSON:
            raise ModelError(f"{path}: larger than {MAX_JSON >> 20} MiB, which no such file is")
        data = file.read()
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


def write_json(path: Path, value: Any) -> str:
    """A record of ours: a JSON object that appears whole or not at all; its SHA-256."""
    return write_file(path, [(json.dumps(value, indent=1, sort_keys=True) + "\n").encode()])


def file_digest(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def damage(folder: Path, digests: Mapping[str, str]) -> str | None:
    """Which file does not match its SHA-256, in words; None: all do. Existence and headers come first."""
    for name in sorted(digests):
        if not (folder / name).is_file():
            return f"{name} is {'a folder' if (folder / name).is_dir() else 'gone'}"
    for name in sorted(digests):
        if name.endswith(".safetensors"):
            try:
                open_safe(folder / name)
            except ModelError as error:
                return f"{name} was changed since ({error})"
    changed = (n for n in sorted(digests) if file_digest(folder / n) != digests[n])
    return next((f"{name} was changed since" for name in changed), None)


def check_link(file: Path) -> None:
    """Raise ModelError for a link to no file, or out of the folder and the hub's blob store."""
    real, home = Path(os.path.realpath(file)), Path(os.path.realpath(file.parent))
    in_cache = home.parent.name == "snapshots" and home.parent.parent / "blobs" in real.parents
    if not (home in real.parents or in_cache):
        raise ModelError(
            f"{file}: is a link out of the model folder, to {real}; put the file itself there"
        )
    if file.is_symlink() and not file.is_file():
        raise ModelError(
            f"{file}: cannot be read: is a link to {real}, which is no file; put the file itself there"
        )


def _shard_names(folder: Path) -> tuple[list[str], dict[str, str]]:
    if (folder / SINGLE).is_file():
        return [SINGLE], {}
    if (folder / INDEX).is_file():
        check_link(folder / INDEX)
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{folder / INDEX}: holds no weight_map")
        for tensor, name in weight_map.items():
            if not plain_name(name) or not name.endswith(".safetensors"):
                raise ModelError(
                    f"{folder / INDEX}: {tensor[:200]!r} is said to be in {str(name)[:200]!r}, "
                    "which is not the name of a safetensors file in the folder"
                )
        return sorted(set(weight_map.values())), weight_map
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    found = (file for end in ("bin", "pt", "pth") for file in sorted(folder.glob(f"*.{end}")))
    pickles = next((file.name for file in found), "")
    if pickles:
        raise ModelError(
            f"{folder}: holds pickled weights only ({pickles}), which can run code when loaded and "
            "are refused; save the model as safetensors first"
        )
    hint = f" (it holds {', '.join(others[:3])})" if others else ""
    raise ModelError(f"{folder}: neither {SINGLE} nor {INDEX} is there{hint}")
