"""What a prune makes of a checkpoint's tensors: pruned entries are zero, refitted ones are set anew.

New weights of a block lie in a safetensors file beside its masks, a tensor for each that has any, in the
checkpoint's dtype and shape. NaN stands where a tensor stays as it is (experts that were left out, layers
pruned by magnitude).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskopt.core.files import atomic_write
from maskopt.models.checkpoints.mask_file import MaskFile, MaskFiles, unpack
from maskopt.models.checkpoints.safefile import DTYPES, SafeFile, TensorEntry, open_safe, write_safe

#: whole numbers as wide as an element, by its bytes: zero is zero in all of them
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Edits:
    """Masks, and where weights were refitted the file that holds the new ones of a tensor."""

    masks: MaskFile | MaskFiles
    values: Mapping[str, SafeFile] = field(default_factory=dict)

    @classmethod
    def of(cls, masks: MaskFile | MaskFiles, values: Iterable[Path]) -> Edits:
        """Raises ModelError for a file of new weights that is none."""
        files = [open_safe(path) for path in values]
        return cls(masks, {name: file for file in files for name in file.entries})

    def __contains__(self, name: object) -> bool:
        return name in self.masks

    def apply(self, name: str, tensor: Tensor) -> None:
        """To a tensor of the checkpoint, in its stored layout; in place."""
        new = self.values[name].read(name).view(-1) if name in self.values else None
        kept = unpack(self.masks.packed(name), 0, tensor.numel()) if name in self.masks else None
        _edit(tensor.view(-1), new, kept)

    def chunks(self, entry: TensorEntry, source: SafeFile, step: int) -> Iterator[np.ndarray]:
        """The bytes of a tensor of `source` as they become, `step` at a time."""
        packed = self.masks.packed(entry.name) if entry.name in self.masks else None
        there = self.values.get(entry.name)
        new = None if there is None else there.chunks(there.entries[entry.name], step)
        dtype, position = entry.torch_dtype, 0
        for chunk in source.chunks(entry, step):
            elements = torch.from_numpy(chunk).view(dtype)
            values = None if new is None else torch.from_numpy(next(new)).view(dtype)
            kept = None if packed is None else unpack(packed, position, len(elements))
            _edit(elements, values, kept)
            position += len(elements)
            yield chunk


def _edit(elements: Tensor, new: Tensor | None, kept: Tensor | None) -> None:
    """Some elements of a tensor [count], in place: set anew where `new` is a number, zero where not kept."""
    words = elements.view(WORDS[elements.dtype.itemsize])  # not all dtypes can be filled
    if new is not None:
        words.copy_(torch.where(new.float().isnan(), words, new.view(words.dtype)))
    if kept is not None:
        words.masked_fill_(kept.logical_not_(), 0)


def write_values(path: Path, values: Mapping[str, Tensor]) -> None:
    """A file of new weights; it appears whole or not at all."""
    shapes = {name: (_NAMES[value.dtype], tuple(value.shape)) for name, value in values.items()}
    with atomic_write(path) as file:
        write_safe(file, shapes, {})
        for value in values.values():
            file.write(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
