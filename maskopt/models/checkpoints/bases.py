"""Other bases of stored tensors, in which the model computes the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """Another basis of the indices along an axis of a tensor.

    Attributes:
        of: what the file calls the change.
        change: int64 [n], the index that each place takes, in every part of n indices; or float64
            [groups, d, d], by which the blocks of d indices in each of so many parts are multiplied.
    """

    of: str
    change: Tensor
    axis: int

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the tensor in this basis, in its dtype; products are in float64."""
        moved, change = tensor.movedim(self.axis, 0), self.change.to(tensor.device)
        if change.ndim == 1:
            new = moved.reshape(-1, len(change), *moved.shape[1:])[:, change]
        else:
            groups, width, _ = change.shape
            blocks = moved.reshape(groups, len(moved) // (groups * width), width, -1)
            new = (change[:, None] @ blocks.double()).to(tensor.dtype)
        return new.reshape(moved.shape).movedim(0, self.axis).contiguous()


#: by the name of a stored tensor
Bases = Mapping[str, Basis]
