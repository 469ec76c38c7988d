"""Bases of a result: read again, compared with the model's structure, and applied to the original's tensors.

No code is shared with `maskopt.models.checkpoints.bases`, which applied them for the prune.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from maskopt.errors import VerificationError
from maskopt.models.architecture.blocks import Blocks
from maskopt.models.architecture.structures import Inner, inner_values
from maskopt.models.checkpoints.schema import BASES, BASES_FORMAT, fits, is_count
from maskopt.models.options.prune import NONE
from maskopt.models.verification.folder import Loading, Weights, opened, read_tensor
from maskopt.models.verification.manifest import Manifest

#: by how much an entry of RRᵀ may differ from that of the identity
_ORTHOGONAL = 1e-9


class InBases:
    """Tensors of the original in the bases of the prune; without bases they are unchanged.

    Raises VerificationError where file, manifest and model do not fit together.
    """

    def __init__(self, manifest: Manifest, weights: Weights, loading: Loading | None) -> None:
        self.path, self._changes = weights.folder / BASES, dict[str, tuple[int, Tensor]]()
        said = manifest.record["fingerprint"].get("bases")
        if said != manifest.record["files"].get(BASES):
            raise manifest.wrong("names bases without their file, or a file of other bases")
        if said is None:
            return
        if manifest.options.transform == NONE:
            raise manifest.wrong("has bases, and its options change none")
        if loading is None:
            raise manifest.wrong(
                "has bases, which cannot be compared with a model that needs its own code"
            )
        tensors, changes = self._read()
        expected = _expected(loading)
        for of, change in changes.items():
            inner, axes = expected.get(of, (None, {}))
            if inner is None or {n: a for n, (o, a) in tensors.items() if o == of} != axes:
                raise self._wrong(f"{of[:200]!r} changes other tensors than those that go together")
            self._check(of, change, inner)
            self._changes |= {name: (axis, change) for name, axis in axes.items()}

    def _wrong(self, fault: str) -> VerificationError:
        return VerificationError(f"{self.path}: {fault}")

    def _read(self) -> tuple[dict[str, tuple[str, int]], dict[str, Tensor]]:
        with opened(self.path) as file:
            about, names = file.metadata() or {}, list(file.keys())
        try:
            tensors = json.loads(about["tensors"])
            shape = {...: {"of": str, "axis": is_count}}
            sound = about["format"] == BASES_FORMAT and fits(tensors, shape)
            sound = sound and {item["of"] for item in tensors.values()} == set(names)
        except (KeyError, ValueError, TypeError):
            sound = False
        if not sound:
            raise self._wrong("is damaged")
        changes = {name: read_tensor(self.path, name) for name in names}
        return {name: (item["of"], item["axis"]) for name, item in tensors.items()}, changes

    def _check(self, of: str, change: Tensor, inner: Inner) -> None:
        """Require an order of all channels, or an orthogonal matrix for every group of heads."""
        if inner.width:
            shape: tuple[int, ...] = (inner.groups, inner.width, inner.width)
            sound = change.dtype == torch.float64 and tuple(change.shape) == shape
            identity = torch.eye(inner.width, dtype=torch.float64)
            # A comparison with NaN is False.
            sound = sound and bool((change @ change.mT - identity).abs().max() <= _ORTHOGONAL)
        else:
            sound = change.dtype == torch.int64 and change.ndim == 1
            sound = sound and change.sort().values.tolist() == list(range(inner.consumer.n))
        if not sound:
            raise self._wrong(f"{of[:200]!r} is neither an order nor orthogonal")

    def __bool__(self) -> bool:
        return bool(self._changes)

    def of(self, name: str, original: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return a tensor of the original and, where it is rounded, a bound of the rounding errors."""
        if name not in self._changes:
            return original, None
        axis, change = self._changes[name]
        if change.ndim == 1:
            parts = original.shape[axis] // len(change)
            places = torch.cat([change + part * len(change) for part in range(parts)])
            return original.index_select(axis, places), None
        exact, size = torch.empty_like(original, dtype=torch.float64), change.shape[1]
        bound = torch.empty_like(exact)
        heads = original.shape[axis] // size
        for head in range(heads):
            rotation = change[head * len(change) // heads]
            rows = original.narrow(axis, head * size, size).double()
            for into, by, values in ((exact, rotation, rows), (bound, rotation.abs(), rows.abs())):
                new = torch.tensordot(by, values, dims=([1], [axis])).movedim(0, axis)
                into.narrow(axis, head * size, size).copy_(new)
        # half a unit in the last place of what is stored, and sums of float64 in any order
        last = torch.finfo(original.dtype)
        room = exact.abs() * (last.eps / 2 * (1 + 2.0**-20)) + last.smallest_normal * last.eps
        return exact, room + bound * (2 * size * 2.0**-53)


def _expected(loading: Loading) -> dict[str, tuple[Inner, dict[str, int]]]:
    """Return the values that could be in another basis, by the stored name of the layer that takes them.

    Each comes with the stored tensors that go together, and their axes.
    """
    values: dict[str, tuple[Inner, dict[str, int]]] = {}
    blocks = Blocks(loading.model)
    for index in range(len(blocks)):
        for inner in inner_values(blocks, index):
            stored = {name: loading.conversion.stored_as_is(name) for name in inner.axes}
            names = {name: inner.axes[key] for key, name in stored.items() if name is not None}
            if len(names) == len(stored):
                values[str(stored[inner.consumer.parameter])] = inner, names
    return values
