"""Hidden states between two blocks: [samples, length, width], in memory or in a mapped file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.core.files import NO_SPACE
from maskopt.errors import ModelError
from maskopt.models.blockwise.cuda_copies import Lanes, Upload


class States(Protocol):
    """Hidden states [1, length, width] by sample."""

    def __getitem__(self, sample: int, /) -> Tensor: ...

    def __setitem__(self, sample: int, state: Tensor, /) -> None: ...

    def on(self, device: torch.device, sample: int, /) -> Tensor:
        """One of them on the device where it is computed on."""
        ...


class Activations:
    """One hidden state per sample, all of one shape, read and overwritten sample by sample.

    Args:
        samples: which.
        shape: of one sample, e.g. [1, length, width].
        dtype: of the hidden states.
        folder: None keeps them in memory. Else they lie in a nameless file in that folder, and one
            sample at a time is mapped: the resident size stays that of one sample.
        lanes: to a device that they are computed on; what is in memory goes there and back beside that.
    """

    def __init__(
        self,
        samples: Sequence[int],
        shape: torch.Size,
        dtype: torch.dtype,
        folder: Path | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._lanes = lanes if folder is None else None
        self._following = dict(pairwise(samples))
        self._ahead: dict[int, Upload] = {}
        self._coming: dict[int, Any] = {}
        self._bytes = shape.numel() * dtype.itemsize
        self._place = {sample: place for place, sample in enumerate(samples)}
        self._memory: dict[int, Tensor] | None = None
        self._file: int | None = None
        if folder is None:
            self._memory = {}
        else:
            size = max(1, len(samples) * self._bytes)  # no file can be reserved without a byte
            self._file, name = _make(folder, size)
            if os.name == "posix":
                os.unlink(name)  # the file lives as long as the process, whatever ends it
                self._name = None
            else:
                self._name = Path(name)
            _reserve(self._file, size, folder)

    @property
    def in_file(self) -> bool:
        """Whether they lie in a file."""
        return self._memory is None

    def __getitem__(self, sample: int) -> Float[Tensor, "1 length width"]:
        if self._memory is not None:
            if sample in self._coming and self._lanes is not None:
                self._lanes.wait(self._coming[sample])
            return self._memory[sample].clone()  # a block may change its input in place
        mapped = self._map(sample)
        return torch.from_numpy(np.array(mapped)).view(self.dtype).view(self.shape)

    def on(self, device: torch.device, sample: int) -> Float[Tensor, "1 length width"]:
        """The sample's state on the device where it is computed on; the next sample's is sent ahead."""
        if self._lanes is None:
            return self[sample].to(device)
        upload = self._ahead.pop(sample, None) or self._sent(sample)
        following = self._following.get(sample)
        self._ahead = {}
        if following is not None:
            self._ahead[following] = self._sent(following)
        return self._lanes.take(upload)

    def _sent(self, sample: int) -> Upload:
        assert self._lanes is not None
        assert self._memory is not None
        return self._lanes.up(self._memory[sample], self._coming.get(sample))

    def __setitem__(self, sample: int, state: Float[Tensor, "1 length width"]) -> None:
        if self._lanes is not None and state.device == self._lanes.device:
            assert self._memory is not None
            buffer = self._memory.get(sample)
            if buffer is None:
                buffer = self._memory[sample] = self._lanes.buffer(self.shape, self.dtype)
            sent = self._ahead.pop(sample, None)  # is of no use any more, but may still read
            arrived = None if sent is None else sent.arrived
            self._coming[sample] = self._lanes.down(state.detach(), buffer, arrived)
            return
        state = state.detach().to("cpu", self.dtype).contiguous()
        if self._memory is not None:
            if self._lanes is not None:
                state = self._lanes.buffer(self.shape, self.dtype).copy_(state)
            self._memory[sample] = state
            self._ahead.pop(sample, None)
            self._coming.pop(sample, None)
            return
        mapped = self._map(sample)
        mapped[:] = state.view(torch.uint8).view(-1).numpy()
        mapped.flush()

    def _map(self, sample: int) -> np.memmap:
        assert self._file is not None
        with os.fdopen(os.dup(self._file), "r+b") as file:
            return np.memmap(
                file, np.uint8, "r+", offset=self._place[sample] * self._bytes, shape=(self._bytes,)
            )

    def close(self) -> None:
        self._memory = None
        self._ahead, self._coming = {}, {}
        if self._file is not None:
            os.close(self._file)
            self._file = None
            if self._name is not None:
                self._name.unlink(missing_ok=True)

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _make(folder: Path, size: int) -> tuple[int, str]:
    try:
        return tempfile.mkstemp(dir=folder, prefix="activations.")
    except OSError as error:
        raise _unwritable(folder, size, error) from error


def _reserve(file: int, size: int, folder: Path) -> None:
    """Make room at once: a disk that fills up under a mapped file would kill the process."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        else:
            os.truncate(file, size)
    except OSError as error:
        os.close(file)
        raise _unwritable(folder, size, error) from error


def _unwritable(folder: Path, size: int, error: OSError) -> ModelError:
    gib, said = f"{size / 2**30:.2f} GiB of hidden states", error.strerror
    memory = "keep them in memory with a larger `activation_memory`"
    if error.errno in NO_SPACE:
        return ModelError(f"{folder}: no room for {gib} ({said}); free some, or {memory}")
    return ModelError(f"{folder}: {gib} cannot be written there ({said}); {memory}")
