"""Every tensor of a pruned folder against its mask, and against the original's.

Shares no code with what packs masks and writes models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskopt.errors import VerificationError
from maskopt.models.verification.folder import Weights, opened, tensor
from maskopt.models.verification.manifest import Manifest, Slice, called_like, numbers
from maskopt.models.verification.parts import set_anew, trained_vectors

#: elements compared at a time
SLAB = 2**24
MASK_FORMAT = "maskopt-masks-1"


def check_tensors(
    manifest: Manifest,
    weights: Weights,
    masks: Masks,
    original: Weights | None,
    on_progress: Callable[[int, int], None] | None,
) -> list[Slice]:
    """Compare every tensor with its mask and with the original; the masks' matrices.

    Kept weights are those of the original but in layers that the manifest says were refitted or trained, and
    all else is but norms and biases of blocks in which it says that those were trained, too.
    """
    slices: list[Slice] = []
    by_magnitude = {(numbers(x["name"]), x["n"]) for x in manifest.layers if x["fallback"]}
    refitted = {(numbers(x["name"]), x["n"]) for x in set_anew(manifest)}
    trained = trained_vectors(manifest, masks.layout)
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
            same = kept
            if kept is not None and refitted:
                same = kept & ~_places(name, kept, masks.layout[name][1], refitted)
            if found.ndim == 1 and name.startswith(trained):
                same = torch.zeros_like(found, dtype=torch.bool)
            _check_same(name, found, dense, same)
        changeable = refitted if kept is not None else trained
        if changeable and not bool(torch.isfinite(found.float()).all()):
            raise VerificationError(f"{weights.folder}: {name!r} holds NaN or infinite weights")
        if kept is not None:
            axis = masks.layout[name][1]
            slices += _slices(manifest, name, kept, dense, axis, by_magnitude)
        if on_progress is not None:
            on_progress(done + 1, len(weights.where))
    return slices


def _slices(
    manifest: Manifest,
    name: str,
    kept: Tensor,
    dense: Tensor | None,
    axis: int,
    by_magnitude: Set[tuple[Any, int]],
) -> Iterator[Slice]:
    """The matrices of one masked tensor, every row of theirs counted.

    Args:
        by_magnitude: place and inputs of the layers that were pruned so.
    """
    weights = None if dense is None else _matrices(dense, axis)
    for index, mask in enumerate(_matrices(kept, axis)):
        place = (*numbers(name), index) if kept.ndim == 3 else numbers(name)
        rows, n = mask.shape
        part = Slice(name, place, rows, n, int((~mask).sum()), expert=kept.ndim == 3)
        # not of an expert that was left out
        if part.pruned and manifest.rows_trade:
            _check_limits(manifest, part, mask)
        elif part.pruned and manifest.counts:
            _check_counts(manifest, part, mask)
        elif part.pruned:
            _check_rows(manifest, part, mask)
        if weights is not None and (place, n) in by_magnitude:
            weight = weights[index].to(_working_dtype(manifest)).double()
            part.square = float(weight.masked_fill(mask, 0).square().sum())
            whole = manifest.rows_trade and manifest.max_deviation is None
            group = (
                mask.numel() if whole else n if manifest.rows_trade else manifest.rule.groups(n)[0]
            )
            size, some = weight.abs().view(-1, group), mask.view(-1, group)
            largest = size.masked_fill(some, 0).amax(1)
            part.least_first = bool((largest <= size.masked_fill(~some, torch.inf).amin(1)).all())
        yield part


def _places(name: str, kept: Tensor, axis: int, of: Set[tuple[Any, int]]) -> Tensor:
    """Bool in the shape of a mask: whether the matrix that an entry is in is one of those. An expert of which
    nothing is pruned was left out."""
    places = torch.zeros_like(kept, dtype=torch.bool)
    n = kept.shape[axis]
    if kept.ndim == 2:
        return places.fill_((numbers(name), n) in of)
    for expert, mask in enumerate(kept):
        places[expert] = ((*numbers(name), expert), n) in of and not mask.all()
    return places


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


def _check_counts(manifest: Manifest, part: Slice, kept: Tensor) -> None:
    """Every row prunes as many as a layer there does; how many rows do is compared with all of them."""
    there = manifest.counts_at.get((part.numbers, part.n), set())
    for row, count in enumerate((~kept).sum(1).tolist()):
        if count not in there:
            raise VerificationError(
                f"{part.tensor!r}, row {row}: {count} of {part.n} pruned, as in no layer there"
            )


def _check_limits(manifest: Manifest, part: Slice, kept: Tensor) -> None:
    """Every row prunes as many as one that trades may in a layer there."""
    there = manifest.limits_at.get((part.numbers, part.n), set())
    for row, count in enumerate((~kept).sum(1).tolist()):
        if not any(least <= count <= most for least, most in there):
            raise VerificationError(
                f"{part.tensor!r}, row {row}: {count} of {part.n} pruned, beyond the deviation of its layer"
            )


class Masks:
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

    def check_names(self, manifest: Manifest, weights: Weights) -> None:
        """The masks are those of the manifest's tensors, and the tensors are there."""
        folder = weights.folder
        if set(self.layout) != set(manifest.tensors):
            raise VerificationError(f"{folder}: masks and manifest name different tensors")
        for layer in manifest.layers:
            name = called_like(layer["name"], weights.where)
            if name is not None and name not in self.layout:
                raise VerificationError(f"{folder}: layer {layer['name']!r} has no mask")
        if missing := set(self.layout) - set(weights.where):
            raise VerificationError(
                f"{folder}: tensor {min(missing)!r} has a mask and is not there"
            )
        for name, (_, axis) in self.layout.items():
            if manifest.tensors[name]["input_axis"] != axis:
                raise VerificationError(
                    f"{folder}: {name!r}: masks and manifest differ in the axis"
                )

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
