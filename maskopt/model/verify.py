"""Check a pruned model folder against its manifest, its masks and the original.

Shares no code with what writes those: files are read by the safetensors library, bits unpacked, digests
computed and layers found here. The manifest's digest is not keyed, so anybody can write a manifest; what
it says is therefore only compared with what weights and masks say. What they cannot say (errors, bounds,
statuses) is called claimed, unless `maskopt.model.recheck` computes it again from calibration text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskopt.errors import VerificationError
from maskopt.model.verify_folder import (
    CONFIG,
    INDEX,
    MASKS,
    Weights,
    asks_for_code,
    check_configuration,
    check_entries,
    check_regular,
    is_copied,
    opened,
    read_object,
    read_weights,
    sha256,
    tensor,
)
from maskopt.model.verify_manifest import (
    Manifest,
    Slice,
    check_counts,
    check_fallbacks,
    check_layers,
    check_names,
    numbers,
    read_manifest,
)

#: elements compared at a time
SLAB = 2**24
MASK_FORMAT = "maskopt-masks-1"
#: relative difference at which the stated error of a layer pruned by magnitude is wrong
SUM_TOLERANCE = 1e-9
#: keys of config.json that saving a model writes anew
REWRITTEN = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Verified:
    """What holds. Every number is computed from weights and masks.

    Attributes:
        layers, tensors: pruned layers, and the masked tensors that hold them.
        two_four: how many of the tensors are 2:4.
        rows, sparsity: of the pruned layers.
        files: whose digests were compared.
        against: the original that was compared with, if one was.
        checked_layers: names of the layers whose errors and statuses were computed again.
        tolerance: relative difference up to which those errors had to agree; it depends on the precision
            that the manifest names. Statuses hold under the same change of the error.
        checked: what was computed from weights, masks and original.
        claimed: what the manifest says and nothing here shows.
    """

    layers: int
    tensors: int
    two_four: int
    rows: int
    files: int
    sparsity: float
    against: Path | None
    checked_layers: tuple[str, ...] = ()
    tolerance: float | None = None
    checked: tuple[str, ...] = ()
    claimed: tuple[str, ...] = ()


def verify_output(
    output: str | Path,
    against: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    calibration: Any = None,
    layers: Sequence[str] = (),
    text_field: str = "text",
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> Verified:
    """Re-read a folder that `prune_model` wrote.

    Checks that it holds exactly what `from_pretrained` would load and nothing else that a loader could
    take for weights or code; that every file has its digest; that every row (or group) of every mask
    prunes exactly as many as the pattern says; that every pruned weight is zero; that names, counts,
    pattern and sparsity in the manifest are those of the masks and of the model's structure.

    Args:
        against: the original model folder. It must have the manifest's digest, the same tensors, and bit
            for bit the same kept weights, other tensors, configuration and tokenizer. Errors of
            layers pruned by magnitude are computed again.
        on_progress: called with tensors done and their number.
        calibration: the text (or tokens) that the prune was given, as for `prune_model`; needs
            `against`. Errors and statuses of the chosen layers are computed again.
        layers: name patterns that choose them; all by default.
        text_field: where JSON lines hold their text.
        threads: for the passes through the model, on the CPU.
        trust_remote_code: run code that comes with the original to build the model.

    Raises:
        VerificationError: with the first thing that does not hold.
    """
    folder = Path(output)
    if calibration is not None and against is None:
        raise VerificationError("errors can only be computed again with the original (against)")
    if layers and calibration is None:
        raise VerificationError("layers chooses what calibration computes again; give both")
    manifest = read_manifest(folder)
    weights = read_weights(folder)
    check_entries(folder, manifest.files, weights)
    masks = _Masks(folder / MASKS)
    _check_same_tensors(folder, weights, masks, manifest)
    original = None if against is None else read_weights(Path(against))
    same: set[str] = set()
    if original is not None:
        _check_same_names(folder, weights, original)
        same = _same_files(manifest, weights, original)
    elif weights.unnamed:
        raise VerificationError(
            f"{folder / INDEX}: the index does not name {min(weights.unnamed)!r}, which lies in a shard"
        )
    check_configuration(folder, manifest.files, compared=same)
    check_layers(manifest)
    names_known = trust_remote_code or not asks_for_code(folder)
    if names_known:
        home = folder if original is None else original.folder
        check_names(manifest, home, trust_remote_code=trust_remote_code)
    slices = _check_tensors(manifest, weights, masks, original, on_progress)
    rows, sparsity = check_counts(manifest, slices)
    recomputed: list[str] = []
    tolerance = None
    if against is not None:
        recomputed = check_fallbacks(manifest, slices, SUM_TOLERANCE)
        tolerance = SUM_TOLERANCE if recomputed else None
    if against is not None and calibration is not None:
        from maskopt.model.recheck import recheck_layers

        again, tolerance = recheck_layers(
            manifest, folder, Path(against), calibration, layers=layers, text_field=text_field,
            threads=threads, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        recomputed = [x["name"] for x in manifest.layers if x["name"] in {*recomputed, *again}]
    checked, claimed = _told_apart(
        manifest, same, len(recomputed),
        compared=against is not None, names=names_known, again=calibration is not None,
    )  # fmt: skip
    return Verified(
        layers=len(manifest.layers),
        tensors=len(masks.layout),
        two_four=len(masks.layout) if manifest.rule.two_four else 0,
        rows=rows,
        files=len(manifest.files),
        sparsity=sparsity,
        against=None if against is None else Path(against),
        checked_layers=tuple(recomputed),
        tolerance=tolerance,
        checked=checked,
        claimed=claimed,
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
    manifest, where = read_manifest(folder), read_weights(folder).where
    if not manifest.rule.two_four:
        raise VerificationError(f"{folder}: holds no 2:4 layer")
    converted = []
    for name, info in manifest.tensors.items():
        if name not in where:
            raise VerificationError(f"{folder}: tensor {name!r} has a mask and is not there")
        weight = tensor(where[name], name).half().cuda()
        axis = info["input_axis"]
        weight = weight.movedim(axis, -1).reshape(-1, weight.shape[axis])
        try:
            converted.append((name, to_sparse_semi_structured(weight.contiguous())))
        except (RuntimeError, ValueError, NotImplementedError) as error:
            line = str(error).splitlines()[0]
            raise VerificationError(f"{name!r} is not accepted as 2:4: {line}") from error
    return converted


def _told_apart(
    manifest: Manifest, same: set[str], recomputed: int, *, compared: bool, names: bool, again: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is checked, and what is claimed."""
    layers = manifest.layers
    every = recomputed == len(layers)
    bounds = not again or any(layer["lower_bound"] for layer in layers)
    optima = again and any("optimal" in layer["statuses"] for layer in layers)
    facts = {
        "files": True,
        "counts": True,
        "pattern": True,
        "sparsity": True,
        "names": names,
        "kept weights": compared,
        "configuration and tokenizer": compared and {*filter(is_copied, manifest.files)} <= same,
        "errors": every,
        "statuses": every,
        **({"optima": False} if optima else {}),
        **({"bounds": False} if bounds else {}),
        "start errors": False,
        "options": False,
    }
    checked = tuple(fact for fact, known in facts.items() if known)
    return checked, tuple(fact for fact, known in facts.items() if not known)


def _check_same_tensors(folder: Path, weights: Weights, masks: _Masks, manifest: Manifest) -> None:
    if set(masks.layout) != set(manifest.tensors):
        raise VerificationError(f"{folder}: masks and manifest name different tensors")
    if missing := set(masks.layout) - set(weights.where):
        raise VerificationError(f"{folder}: tensor {min(missing)!r} has a mask and is not there")
    for name, (_, axis) in masks.layout.items():
        if manifest.tensors[name]["input_axis"] != axis:
            raise VerificationError(f"{folder}: {name!r}: masks and manifest differ in the axis")


def _check_same_names(folder: Path, weights: Weights, original: Weights) -> None:
    if odd := set(weights.where) ^ set(original.where):
        raise VerificationError(f"{folder}: tensor {min(odd)!r} is in only one of the two models")
    if weights.unnamed != original.unnamed:
        raise VerificationError(
            f"{folder / INDEX}: the index does not name the same tensors as the original's"
        )


def _same_files(manifest: Manifest, weights: Weights, original: Weights) -> set[str]:
    """Names of the files beside the weights that are those of the original.

    Of a model folder, pruning copies them all, byte by byte, and the manifest holds the folder's digest.
    A model in memory was saved anew: its configuration must mean the same, the rest may differ.

    Raises:
        VerificationError: a file that is another one, is missing, or is not the original's.
    """
    folder, home = weights.folder, original.folder
    theirs = {
        file.name
        for file in home.iterdir()
        if is_copied(file.name) and file.is_file() and _stays(file)
    }
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


def _check_tensors(
    manifest: Manifest,
    weights: Weights,
    masks: _Masks,
    original: Weights | None,
    on_progress: Callable[[int, int], None] | None,
) -> list[Slice]:
    """Compare every tensor with its mask and with the original; the masks' matrices."""
    slices: list[Slice] = []
    for done, (name, path) in enumerate(sorted(weights.where.items())):
        found = tensor(path, name)
        kept = dense = None
        if name in masks.layout:
            kept = masks.kept(name, found)
            if _bytes(found)[~kept.reshape(-1)].any():  # minus zero is a change, too
                raise VerificationError(
                    f"{weights.folder}: {name!r} holds weights that its mask prunes"
                )
        if original is not None:
            dense = tensor(original.where[name], name)
            _check_same(name, found, dense, kept)
        if kept is not None:
            slices += _slices(manifest, name, kept, dense, masks.layout[name][1])
        if on_progress is not None:
            on_progress(done + 1, len(weights.where))
    return slices


def _slices(
    manifest: Manifest, name: str, kept: Tensor, dense: Tensor | None, axis: int
) -> Iterator[Slice]:
    """The matrices of one masked tensor, every row of theirs counted."""
    by_magnitude = {(numbers(x["name"]), x["n"]) for x in manifest.layers if x["fallback"]}
    weights = None if dense is None else _matrices(dense, axis)
    for index, mask in enumerate(_matrices(kept, axis)):
        place = (*numbers(name), index) if kept.ndim == 3 else numbers(name)
        rows, n = mask.shape
        part = Slice(name, place, rows, n, int((~mask).sum()))
        if part.pruned:  # else an expert that was left out
            _check_rows(manifest, part, mask)
        if weights is not None and (place, n) in by_magnitude:
            weight = weights[index].to(_working_dtype(manifest)).double()
            part.square = float(weight.masked_fill(mask, 0).square().sum())
            group, _ = manifest.rule.groups(n)
            size, some = weight.abs().view(-1, group), mask.view(-1, group)
            largest = size.masked_fill(some, 0).amax(1)
            part.least_first = bool((largest <= size.masked_fill(~some, torch.inf).amin(1)).all())
        yield part


def _matrices(stored: Tensor, axis: int) -> list[Tensor]:
    """The matrices [rows, n] of a stored tensor, one for each expert."""
    moved = stored.movedim(axis, -1).contiguous()
    return [moved] if moved.ndim == 2 else list(moved)


def _working_dtype(manifest: Manifest) -> torch.dtype:
    said = manifest.record["fingerprint"].get("dtype")
    dtype = getattr(torch, said, None) if isinstance(said, str) else None
    if not isinstance(dtype, torch.dtype):
        raise manifest.wrong(f"says that its run worked in {str(said)[:50]!r}, which is no dtype")
    return dtype


def _check_rows(manifest: Manifest, part: Slice, kept: Tensor) -> None:
    group, expected = manifest.rule.groups(part.n)
    counts = (~kept).view(part.rows, -1, group).sum(-1)
    wrong = (counts != expected).any(1).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise VerificationError(
            f"{part.tensor!r}, row {row}: {int((~kept[row]).sum())} of {part.n} pruned, "
            f"not {expected} of every {group}"
        )


class _Masks:
    """The packed masks of a folder, by the name of their tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.layout: dict[str, tuple[list[int], int]] = {}
        self._digests: dict[str, str] = {}
        damaged = VerificationError(f"{path}: the header of the masks is damaged")
        with opened(path) as file:
            names, metadata = list(file.keys()), file.metadata() or {}
        try:
            layout = json.loads(metadata["tensors"])
            for name in names:
                shape, axis = layout[name]["shape"], layout[name]["input_axis"]
                if len(shape) not in (2, 3) or axis not in (len(shape) - 2, len(shape) - 1):
                    raise damaged
                self.layout[name] = (shape, axis)
                self._digests[name] = layout[name]["sha256"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise damaged from None
        if metadata.get("format") != MASK_FORMAT or len(layout) != len(names):
            raise damaged

    def kept(self, name: str, of: Tensor) -> Tensor:
        """The mask of a tensor, bool in its shape."""
        shape, axis = self.layout[name]
        if list(of.shape) != shape:
            raise VerificationError(f"{self.path}: mask of {name!r} has another shape")
        packed = tensor(self.path, name)
        if packed.dtype != torch.uint8 or packed.shape != ((of.numel() + 7) // 8,):
            raise VerificationError(f"{self.path}: mask of {name!r} has the wrong number of bits")
        head = json.dumps([MASK_FORMAT, name, shape, axis]).encode()
        digest = hashlib.sha256(head + b"\n" + packed.numpy().tobytes()).hexdigest()
        if digest != self._digests[name]:
            raise VerificationError(f"{self.path}: mask of {name!r} has another digest")
        places = torch.arange(8, dtype=torch.uint8)
        bits = ((packed[:, None] >> places) & 1).view(-1)[: of.numel()]
        return bits.bool().view(of.shape)


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


def _bytes(stored: Tensor) -> Tensor:
    """[elements, bytes of one]"""
    flat = stored.contiguous().view(-1)
    return flat.view(torch.uint8).view(-1, stored.dtype.itemsize)
