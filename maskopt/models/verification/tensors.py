"""Comparison of every tensor of a pruned folder with its mask and with the original."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from maskopt.core.files import bytes_of
from maskopt.errors import VerificationError
from maskopt.models.checkpoints.schema import MASK_FORMAT, read_layout
from maskopt.models.verification.bases import InBases
from maskopt.models.verification.folder import (
    Weights,
    check_finite,
    opened,
    read_tensor,
)
from maskopt.models.verification.manifest import (
    Manifest,
    Slice,
    called_like,
    groups,
    key_of,
    numbers,
    updated_layers,
    updated_vectors,
)

OnTensor = Callable[[int, int], None]


def check_tensors(
    manifest: Manifest,
    weights: Weights,
    masks: Masks,
    original: Weights | None,
    bases: InBases,
    on_progress: OnTensor,
) -> list[Slice]:
    """Compare every tensor with its mask and, where it was not updated, the original; return all matrices."""
    slices: list[Slice] = []
    by_magnitude = {key_of(x) for x in manifest.layers if x["fallback"]}
    updated, vectors = updated_layers(manifest), updated_vectors(manifest, masks.layout)
    for done, name in enumerate(sorted(weights.where), 1):
        tensor = weights.read(name)
        dense = room = None
        if original is not None:
            dense = original.read(name)
            if (tensor.dtype, tensor.shape) != (dense.dtype, dense.shape):
                raise VerificationError(f"{name!r} has another dtype or shape than the original")
            dense, room = bases.of(name, dense)
        same: Tensor | None = None
        if name in masks.layout:
            kept, changeable = masks.kept(name, tensor), bool(updated) or manifest.distilled
            if bytes_of(tensor)[~kept.reshape(-1)].any():  # minus zero is a change, too
                raise weights.wrong(f"{name!r} holds weights that its mask prunes")
            # A matrix of which nothing is pruned is that of an expert that was left out.
            same = kept.clone()
            for part, mask, weight in _slices(name, kept, masks.layout[name][1], dense):
                if part.pruned:
                    _check_rows(manifest, part, mask)
                if weight is not None and part.key in by_magnitude:
                    _measure(manifest, part, mask, weight)
                free = manifest.distilled and part.pruned
                if free or (part.key in updated and (part.pruned or not part.expert)):
                    matrix = same[part.key[0][-1]] if part.expert else same
                    matrix.fill_(False)
                slices.append(part)
            subject = "a kept weight"
        else:
            changeable, subject = bool(vectors), "it is not pruned and"
            if tensor.ndim == 1 and name.startswith(vectors):
                same = torch.zeros_like(tensor, dtype=torch.bool)
        if dense is not None and _differs(tensor, dense, same, room):
            raise VerificationError(f"{name!r}: {subject} differs from the original")
        if changeable:
            check_finite(weights, name, tensor)
        on_progress(done, len(weights.where))
    return slices


def _slices(
    name: str, kept: Tensor, axis: int, dense: Tensor | None
) -> Iterator[tuple[Slice, Tensor, Tensor | None]]:
    """Yield the matrices [rows, n] of a masked tensor, their masks, and their weights in the original."""
    weights = None if dense is None else _matrices(dense, axis)
    for index, mask in enumerate(_matrices(kept, axis)):
        expert = kept.ndim == 3
        place = (*numbers(name), index) if expert else numbers(name)
        rows, n = mask.shape
        part = Slice(name, (place, n), rows, n, int((~mask).sum()), expert)
        yield part, mask, None if weights is None else weights[index]


def _matrices(stored: Tensor, axis: int) -> list[Tensor]:
    moved = stored.movedim(axis, -1).contiguous()
    return [moved] if moved.ndim == 2 else list(moved)


def _check_rows(manifest: Manifest, part: Slice, kept: Tensor) -> None:
    """Require that every row prunes as many weights as a row of a layer in this place may.

    How many rows there are is compared with all layers of the place, in `check_masks`.
    """
    limits = manifest.limits_at(part.key)
    group = min((size for size, _, _ in limits), default=part.n)
    counts = (~kept).view(part.rows, -1, group).sum(-1)
    legal = torch.zeros_like(counts, dtype=torch.bool)
    for _, least, most in limits:
        legal |= (counts >= least) & (counts <= most)
    if not bool(legal.all()):
        row = int((~legal).any(1).nonzero()[0])
        fault = "as in no layer there"
        if manifest.options.rows_differ:
            fault = "beyond the deviation of its layer"
        elif limits and not manifest.options.counts:
            fault = f"not {min(limits)[1]} of every {group}"
        raise VerificationError(
            f"{part.tensor!r}, row {row}: {int((~kept[row]).sum())} of {part.n} pruned, {fault}"
        )


def _measure(manifest: Manifest, part: Slice, kept: Tensor, weight: Tensor) -> None:
    """Sum the squares that pruning by magnitude removes, and find out whether it removes the least."""
    weight = weight.to(getattr(torch, manifest.record["fingerprint"]["dtype"])).double()
    part.square = float(weight.masked_fill(kept, 0).square().sum())
    group = kept.numel() if manifest.unlimited else part.n
    if not manifest.options.rows_differ:
        group = groups(manifest.options.pattern, part.n)[0]
    size, kept = weight.abs().view(-1, group), kept.view(-1, group)
    largest = size.masked_fill(kept, 0).amax(1)
    part.least_first = bool((largest <= size.masked_fill(~kept, torch.inf).amin(1)).all())


class Masks:
    """Packed masks of a folder, by the name of their tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with opened(path) as file:
            layout = read_layout(path, file.metadata() or {}, file.keys())
        self.layout = {x: (item["shape"], item["input_axis"]) for x, item in layout.items()}
        self._digests = {name: item["sha256"] for name, item in layout.items()}

    def _wrong(self, fault: str) -> VerificationError:
        return VerificationError(f"{self.path}: {fault}")

    def check_names(self, manifest: Manifest, weights: Weights) -> None:
        """Require that layers have masks, and that the folder has the tensors with a mask."""
        for layer in manifest.layers:
            name = called_like(layer["name"], weights.where)
            if name is not None and name not in self.layout:
                raise weights.wrong(f"layer {layer['name']!r} has no mask")
        if missing := set(self.layout) - set(weights.where):
            raise weights.wrong(f"tensor {min(missing)!r} has a mask and is not there")

    def kept(self, name: str, of: Tensor) -> Tensor:
        """Return the mask of a tensor, bool in its shape."""
        shape, axis = self.layout[name]
        if list(of.shape) != shape:
            raise self._wrong(f"mask of {name!r} has another shape")
        packed = read_tensor(self.path, name)
        if packed.dtype != torch.uint8 or packed.shape != ((of.numel() + 7) // 8,):
            raise self._wrong(f"mask of {name!r} has the wrong number of bits")
        head = json.dumps([MASK_FORMAT, name, shape, axis]).encode()
        digest = hashlib.sha256(head + b"\n" + packed.numpy().tobytes()).hexdigest()
        if digest != self._digests[name]:
            raise self._wrong(f"mask of {name!r} has another digest")
        places = torch.arange(8, dtype=torch.uint8)
        bits = ((packed[:, None] >> places) & 1).view(-1)[: of.numel()]
        return bits.bool().view(of.shape)


def _differs(tensor: Tensor, original: Tensor, where: Tensor | None, room: Tensor | None) -> bool:
    """Return whether two tensors differ by a bit, or by more than `room`: at places `where`, or anywhere."""
    if room is None:
        differs = (bytes_of(tensor) != bytes_of(original)).any(1)
    else:
        differs = ~((tensor.double() - original).abs() <= room).reshape(-1)
    if where is not None:
        differs &= where.reshape(-1)
    return bool(differs.any())
