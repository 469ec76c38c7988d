"""Hidden states between two blocks: [samples, length, width], in memory or in a mapped file. On a CUDA device
they wait in page-locked memory; while a window goes through a block, the next window's state is copied up and
the last one's down, each on a stream of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.core.files import NO_SPACE
from maskopt.errors import ModelError


class Upload(NamedTuple):
    """A tensor on its way to the device, and the event of its arrival."""

    there: Tensor
    arrived: Any


class Lanes:
    """Streams of copies to and from a device, for the thread that computes there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def buffer(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Page-locked memory of the host."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def up(self, host: Tensor, after: Any | None) -> Upload:
        """Begin to copy a buffer up, once the event `after` (of a write to it) has happened."""
        with torch.cuda.stream(self._up):
            if after is not None:
                self._up.wait_event(after)
            there = host.to(self.device, non_blocking=True)
            return Upload(there, self._up.record_event())

    def take(self, upload: Upload) -> Tensor:
        """The uploaded tensor, for all that is computed from here on."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(upload.arrived)
        upload.there.record_stream(current)  # its memory is not used again before that is done
        return upload.there

    def down(self, state: Tensor, host: Tensor, after: Any | None) -> Any:
        """Begin to copy a result down after the event `after`; returns the event of its arrival."""
        self._down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._down):
            if after is not None:
                self._down.wait_event(after)
            host.copy_(state, non_blocking=True)
            state.record_stream(self._down)
            return self._down.record_event()


def lanes_to(device: torch.device) -> Lanes | None:
    """None where there is nothing to copy to."""
    return Lanes(device) if device.type == "cuda" else None


class Activations:
    """One hidden state per sample, all of one shape, read and overwritten sample by sample.

    Args:
        shape: of one sample, e.g. [1, length, width]; `bytes` is its size.
        folder: of a nameless file of which one sample at a time is mapped; None keeps them in memory.
        lanes: to the device that computes; not used for a file.
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
        self.bytes = shape.numel() * dtype.itemsize
        self._place = {sample: place for place, sample in enumerate(samples)}
        self._memory: dict[int, Tensor] = {}
        self._file: IO[bytes] | None = None
        if folder is not None:
            size = max(1, len(samples) * self.bytes)  # no file can be reserved without a byte
            self._file = _reserved(folder, size)

    def __getitem__(self, sample: int) -> Float[Tensor, "1 length width"]:
        if self._file is not None:
            mapped = self._map(self._file, sample)
            return torch.from_numpy(np.array(mapped)).view(self.dtype).view(self.shape)
        if (coming := self._coming.get(sample)) is not None:
            coming.synchronize()
        return self._memory[sample].clone()  # a block may change its input in place

    def on(self, device: torch.device, sample: int) -> Float[Tensor, "1 length width"]:
        """The sample's state on the device that computes; the next sample's is sent ahead."""
        if self._lanes is None:
            return self[sample].to(device)
        upload = self._ahead.pop(sample, None) or self._sent(self._lanes, sample)
        following = self._following.get(sample)
        self._ahead = {}
        if following is not None:
            self._ahead[following] = self._sent(self._lanes, following)
        return self._lanes.take(upload)

    def _sent(self, lanes: Lanes, sample: int) -> Upload:
        return lanes.up(self._memory[sample], self._coming.get(sample))

    def __setitem__(self, sample: int, state: Float[Tensor, "1 length width"]) -> None:
        lanes = self._lanes
        if lanes is not None and state.device == lanes.device:
            if sample not in self._memory:
                self._memory[sample] = lanes.buffer(self.shape, self.dtype)
            sent = self._ahead.pop(sample, None)  # is of no use any more, but may still read
            arrived = None if sent is None else sent.arrived
            self._coming[sample] = lanes.down(state.detach(), self._memory[sample], arrived)
            return
        state = state.detach().to("cpu", self.dtype).contiguous()
        if self._file is not None:
            mapped = self._map(self._file, sample)
            mapped[:] = state.view(torch.uint8).view(-1).numpy()
            mapped.flush()
            return
        if lanes is not None:
            state = lanes.buffer(self.shape, self.dtype).copy_(state)
        self._memory[sample] = state
        self._ahead.pop(sample, None)
        self._coming.pop(sample, None)

    def _map(self, file: IO[bytes], sample: int) -> np.memmap:
        offset = self._place[sample] * self.bytes
        return np.memmap(file, np.uint8, "r+", offset=offset, shape=(self.bytes,))

    def close(self) -> None:
        self._memory, self._ahead, self._coming = {}, {}, {}
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _reserved(folder: Path, size: int) -> IO[bytes]:
    """A file with room made at once: a disk that fills up under a mapped file would kill the process. It has
    no name, so that it ends with the process, whatever ends that."""
    file = None
    try:
        file = tempfile.TemporaryFile(dir=folder, prefix="activations.")  # noqa: SIM115
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    except OSError as error:
        if file is not None:
            file.close()
        gib, said = f"{size / 2**30:.2f} GiB of hidden states", error.strerror
        memory = "keep them in memory with a larger `activation_memory`"
        if error.errno in NO_SPACE:
            raise ModelError(
                f"{folder}: no room for {gib} ({said}); free some, or {memory}"
            ) from error
        raise ModelError(f"{folder}: {gib} cannot be written there ({said}); {memory}") from error
    return file
