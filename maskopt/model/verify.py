"""Check a pruned model folder against its manifest, its masks and the original.

Shares no code with what writes those: files are read by the safetensors library, bits unpacked and
digests computed here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskopt.errors import VerificationError

#: elements compared at a time
SLAB = 2**24


@dataclass(frozen=True)
class Verified:
    """What was checked: counts of layers, tensors (and those of pattern 2:4), rows, files; bit-identity
    if `against` was given."""

    layers: int
    tensors: int
    two_four: int
    rows: int
    files: int
    sparsity: float
    against: Path | None


def verify_output(
    output: str | Path,
    against: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Verified:
    """Re-read a folder that `prune_model` wrote.

    Checks that the manifest matches its own digest and every file its recorded one; that no other weights
    lie beside them; that every row
    (or group) of every mask prunes exactly as many as the pattern says; that every pruned weight
    is zero; that the manifest's layers and counts are those of the masks. With `against`: that the
    original has the same tensors, that every kept weight and every other tensor is bit for bit the same.

    Raises:
        VerificationError: with the first thing that does not hold.
    """
    folder = Path(output)
    manifest = _manifest(folder)
    for name, digest in manifest["files"].items():
        if Path(name).name != name or not (folder / name).is_file():
            raise VerificationError(f"{folder}: file {name!r} of the manifest is not there")
        if _sha256(folder / name) != digest:
            raise VerificationError(f"{folder / name}: was changed: its digest is another one")
    bits = folder / "maskopt-masks.bits"
    masks = _layout(bits)
    if set(masks) != set(manifest["tensors"]):
        raise VerificationError(f"{folder}: masks and manifest name different tensors")
    _check_listed(folder, manifest["files"])
    where = _where(folder)
    original = None if against is None else _where(Path(against))
    if original is not None and set(original) != set(where):
        odd = min(set(original) ^ set(where))
        raise VerificationError(f"{folder}: tensor {odd!r} is in only one of the two models")
    rows = pruned = 0
    for done, (name, path) in enumerate(sorted(where.items())):
        found = _tensor(path, name)
        kept = None
        if name in masks:
            shape, axis = masks[name]
            if tuple(found.shape) != tuple(shape):
                raise VerificationError(f"{folder}: mask of {name!r} has another shape")
            packed = _tensor(bits, name)
            if packed.numel() != (found.numel() + 7) // 8:
                raise VerificationError(f"{bits}: mask of {name!r} has the wrong number of bits")
            kept = _unpack(packed, found.numel()).view(shape)
            info = manifest["tensors"][name]
            if info["input_axis"] != axis:
                raise VerificationError(
                    f"{folder}: {name!r}: masks and manifest differ in the axis"
                )
            rows += _check_counts(name, kept, axis, info["pattern"])
            pruned += int((~kept).sum())
            if _bytes(found)[~kept.reshape(-1)].any():  # minus zero is a change, too
                raise VerificationError(f"{folder}: {name!r} holds weights that its mask prunes")
        if original is not None:
            _check_same(name, found, _tensor(original[name], name), kept)
        if on_progress is not None:
            on_progress(done + 1, len(where))
    missing = set(masks) - set(where)
    if missing:
        raise VerificationError(f"{folder}: tensor {min(missing)!r} has a mask and is not there")
    layers = manifest["layers"]
    if sum(layer["pruned"] for layer in layers) != pruned:
        raise VerificationError(
            f"{folder}: the manifest counts other pruned weights than the masks"
        )
    total = sum(layer["rows"] * layer["n"] for layer in layers)
    return Verified(
        len(layers),
        len(masks),
        sum(map(_is_two_four, manifest["tensors"].values())),
        rows,
        len(manifest["files"]),
        pruned / total if total else 0.0,
        None if against is None else Path(against),
    )


def semi_structured(output: str | Path) -> list[tuple[str, Any]]:
    """Convert every 2:4 layer by PyTorch's `to_sparse_semi_structured`; needs a CUDA device.

    Returns the converted tensors, in half precision, by name.

    Raises:
        VerificationError: no CUDA device, no 2:4 layers, or PyTorch does not accept one of them.
    """
    from torch.sparse import to_sparse_semi_structured

    if not torch.cuda.is_available():
        raise VerificationError("to_sparse_semi_structured needs a CUDA device; there is none here")
    folder = Path(output)
    converted = []
    for name, info in _manifest(folder)["tensors"].items():
        if not _is_two_four(info):
            continue
        weight = _tensor(_where(folder)[name], name).half().cuda()
        weight = weight.movedim(info["input_axis"], -1).reshape(
            -1, weight.shape[info["input_axis"]]
        )
        try:
            converted.append((name, to_sparse_semi_structured(weight.contiguous())))
        except (RuntimeError, ValueError, NotImplementedError) as error:
            line = str(error).splitlines()[0]
            raise VerificationError(f"{name!r} is not accepted as 2:4: {line}") from error
    if not converted:
        raise VerificationError(f"{folder}: holds no 2:4 layer")
    return converted


def _is_pattern(pattern: Mapping[str, Any]) -> bool:
    keep = pattern["keep"]
    if pattern["kind"] == "nm":
        of = pattern["of"]
        return type(keep) is int and type(of) is int and 0 <= keep <= of and 0 < of < 2**31
    if keep is not None:
        return type(keep) is int and 0 <= keep < 2**31
    return type(pattern["sparsity"]) in (int, float) and 0 <= pattern["sparsity"] < 1


def _is_two_four(info: Mapping[str, Any]) -> bool:
    return (info["pattern"].get("keep"), info["pattern"].get("of")) == (2, 4)


def _check_listed(folder: Path, files: Mapping[str, str]) -> None:
    """Weights beside those of the manifest might be loaded in their place."""
    for file in sorted(folder.iterdir()):
        weights = (".safetensors", ".safetensors.index.json")
        if file.name.endswith(weights) and file.name not in files:
            raise VerificationError(f"{file}: holds weights that the manifest does not know")


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "maskopt-manifest.json"
    try:
        manifest = json.loads(path.read_bytes().decode("utf-8"))
        claimed = manifest.pop("sha256")
        text = json.dumps(manifest, sort_keys=True).encode()
        sound = hashlib.sha256(text).hexdigest() == claimed
        sound = sound and all(
            type(layer[key]) is int
            for layer in manifest["layers"]
            for key in ("pruned", "rows", "n")
        )
        sound = sound and all(
            type(info["input_axis"]) is int and _is_pattern(info["pattern"])
            for info in manifest["tensors"].values()
        )
        sound = sound and all(type(digest) is str for digest in manifest["files"].values())
    except FileNotFoundError:
        raise VerificationError(
            f"{folder}: no manifest; the folder was not written by maskopt prune"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise VerificationError(f"{path}: the manifest is damaged or was changed")
    return manifest


def _layout(path: Path) -> dict[str, tuple[list[int], int]]:
    """Shape and input axis of every mask."""
    with _opened(path) as file:
        names = list(file.keys())
        try:
            layout = json.loads(file.metadata()["tensors"])
            return {name: (layout[name]["shape"], layout[name]["input_axis"]) for name in names}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise VerificationError(f"{path}: the header of the masks is damaged") from None


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise VerificationError(f"{path}: cannot be read as safetensors: {error}") from None


def _where(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        result = {name: folder / Path(shard).name for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise VerificationError(f"{folder}: holds no safetensors weights") from None
    return result


def _tensor(path: Path, name: str) -> Tensor:
    with _opened(path) as file:
        try:
            return file.get_tensor(name)
        except SafetensorError as error:
            raise VerificationError(f"{path}: {name!r}: {error}") from None


def _unpack(bits: Tensor, count: int) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8)
    return ((bits[:, None] >> places) & 1).view(-1)[:count].bool()


def _check_counts(name: str, kept: Tensor, axis: int, pattern: Mapping[str, Any]) -> int:
    rows = kept.movedim(axis, -1).reshape(-1, kept.shape[axis])
    n = rows.shape[1]
    if pattern["kind"] == "nm":
        group, expected = pattern["of"], pattern["of"] - pattern["keep"]
    elif pattern["keep"] is not None:
        group, expected = n, n - pattern["keep"]
    else:
        group, expected = n, math.floor(Fraction(str(pattern["sparsity"])) * n)
    if n % group:
        raise VerificationError(f"{name!r}: {n} inputs do not divide into groups of {group}")
    counts = (~rows).view(rows.shape[0], -1, group).sum(-1)
    whole = rows.view(rows.shape[0], -1).all(1)  # rows of experts that were excluded
    wrong = ((counts != expected).any(1) & ~(whole & (kept.ndim == 3))).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise VerificationError(
            f"{name!r}, row {row}: {int((~rows[row]).sum())} of {n} pruned, "
            f"not {expected} of every {group}"
        )
    return rows.shape[0]


def _check_same(name: str, found: Tensor, original: Tensor, kept: Tensor | None) -> None:
    if found.dtype != original.dtype or found.shape != original.shape:
        raise VerificationError(f"{name!r} has another dtype or shape than the original")
    a, b = _bytes(found), _bytes(original)
    flat = None if kept is None else kept.reshape(-1)
    for start in range(0, len(a), SLAB):
        differs = (a[start : start + SLAB] != b[start : start + SLAB]).any(1)
        if flat is not None:
            differs &= flat[start : start + SLAB]
        if bool(differs.any()):
            what = "a kept weight" if kept is not None else "it is not pruned and"
            raise VerificationError(f"{name!r}: {what} differs from the original")


def _bytes(tensor: Tensor) -> Tensor:
    """[elements, bytes of one]"""
    flat = tensor.contiguous().view(-1)
    return flat.view(torch.uint8).view(-1, tensor.dtype.itemsize)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()
