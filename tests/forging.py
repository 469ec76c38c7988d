"""Forged results of a prune: changed in what they say, with every digest made right again."""

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prunes import read_masks
from safetensors.torch import load_file, save_file
from tiny_models import edit_json
from torch import Tensor

from maskopt.core.files import read_arrays, write_arrays
from maskopt.models.checkpoints.checkpoint import open_safe
from maskopt.models.checkpoints.result import MaskFile, TensorMask, write_masks
from maskopt.models.checkpoints.schema import MANIFEST, MASKS

#: what a field could be given
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 10**20, 1.5, "", "../../x", "nm", [], {}, ["x"], {"kind": "block"},
)  # fmt: skip
Change = Callable[[dict[str, Any]], Any]


def forge_manifest(result: Path, change: Change = lambda _: None) -> None:
    """Change the manifest and make all digests right again: they are not keyed."""
    manifest = json.loads((result / MANIFEST).read_text())
    change(manifest)
    for name in manifest["files"]:
        if (result / name).is_file():
            manifest["files"][name] = hashlib.sha256((result / name).read_bytes()).hexdigest()
    (result / MANIFEST).write_text(json.dumps(signed(manifest)))


def fails(error: type[Exception], said: str | None, call: Any, *given: Any, **more: Any) -> None:
    """The call is refused with this message."""
    with pytest.raises(error, match=said):  # noqa: PT012
        call(*given, **more)
        pytest.fail(f"nothing was refused with {said!r}")


def rewrite(
    path: Path, header: Any = (), arrays: Change = lambda _: None, kind: str = "solution"
) -> None:
    """Other entries in the header of a file of this kind, and its arrays after a change."""
    said, held = read_arrays(path, kind)
    said = {name: value for name, value in said.items() if name not in ("format", "kind")}
    arrays(held)
    write_arrays(path, kind, said | dict(header), held)


def copied(result: Path, to: Path) -> Path:
    return Path(shutil.copytree(result, to / "out"))


def flip(path: Path, place: int = -1, bits: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bits
    path.write_bytes(data)


def list_file(result: Path, *names: str) -> None:
    """Enter files into the manifest as if the prune had written them."""
    forge_manifest(result, lambda m: m["files"].update(dict.fromkeys(names, "")))


def change_masks(result: Path, change: Change) -> dict[str, TensorMask]:
    masks = read_masks(result / MASKS)
    change(masks)
    write_masks(result / MASKS, masks)
    forge_manifest(result)
    return masks


def config(**changes: Any) -> Callable[..., None]:
    """Other entries in the configuration of a folder."""
    return lambda folder, *_: edit_json(folder / "config.json", lambda c: c.update(changes))


def record_of(out: Path) -> dict[str, Any]:
    """What the manifest of a smaller folder says of what was removed."""
    return dict(json.loads((out / MANIFEST).read_text())["shrunk"])


def shards(result: Path) -> list[Path]:
    return sorted(result.glob("model*.safetensors"))


def shard_of(result: Path, tensor: str) -> Path:
    return next(path for path in shards(result) if tensor in open_safe(path).entries)


def first_weight_shard(result: Path) -> Path:
    masks = MaskFile(result / MASKS)
    return next(p for p in shards(result) if set(open_safe(p).entries) & set(masks.names))


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_weight(result: Path, where: str, value: float) -> None:
    mask = read_masks(result / MASKS)

    def change(tensors: dict[str, Tensor]) -> None:
        name = next(n for n in tensors if n in mask)
        place = (mask[name].kept if where == "kept" else ~mask[name].kept).nonzero()[0].tolist()
        tensors[name][tuple(place)] = value

    change_tensors(first_weight_shard(result), change)


def prune_by(result: Path, dense: Path, kept_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Other masks, and weights that agree with them; `kept_of` takes the weight and its mask."""
    masks = read_masks(result / MASKS)
    for path in shards(result):
        original = load_file(dense / path.name)
        for name in set(original) & set(masks):
            kept = kept_of(original[name], masks[name].kept)
            masks[name] = TensorMask(kept, masks[name].input_axis)
            original[name] = original[name].masked_fill(~kept, 0)
        save_file(original, path, metadata={"format": "pt"})
    write_masks(result / MASKS, masks)
    forge_manifest(result)


def forged(value: Any, generator: random.Random) -> Any:
    """The JSON value with one thing in it, at any depth, replaced by another value or left out."""
    if not isinstance(value, dict | list) or not value or generator.random() < 0.1:
        return copy.deepcopy(generator.choice(VALUES))
    keys = list(value) if isinstance(value, dict) else range(len(value))
    changed, key = copy.copy(value), generator.choice(keys)
    if generator.random() < 0.1:
        del changed[key]
    else:
        changed[key] = forged(value[key], generator)
    return changed


def signed(record: Any) -> dict[str, Any]:
    """The digests of journals and manifests are no secret."""
    rest = {k: v for k, v in record.items() if k != "sha256"} if isinstance(record, dict) else {}
    return {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def options(**changes: Any) -> Change:
    return lambda manifest: manifest["fingerprint"]["options"].update(changes)


def says(change: Change) -> Callable[..., None]:
    """A forgery of the manifest alone."""
    return lambda result, *_: forge_manifest(result, change)


def edit(*path: Any, to: Any) -> Change:
    """The change that sets what lies at a path of keys and indices, to a value or by a function of it."""

    def change(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to(value[path[-1]]) if callable(to) else to

    return change


def shuffled(_: Tensor, kept: Tensor) -> Tensor:
    """Random masks of as many kept weights a row."""
    return torch.stack([row[torch.randperm(len(row))] for row in kept])


def redraw(result: Path, name: str) -> None:
    change_tensors(shard_of(result, name), lambda tensors: tensors[name].normal_())
