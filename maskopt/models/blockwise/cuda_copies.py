"""Copies between the host and a CUDA device that go beside what the device computes.

Hidden states of windows wait in page-locked memory of the host. While a window goes through a block, the next
one's are on their way up and the last one's on their way down, each on a stream of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Upload(NamedTuple):
    """A tensor on its way to the device, and the event of its arrival."""

    there: Tensor
    arrived: Any


class Lanes:
    """One stream in each direction; to be used from the thread that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def buffer(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Memory of the host that can be copied from and to without the processor."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def up(self, host: Tensor, after: Any | None) -> Upload:
        """Begin to send a buffer up, once what writes to it has happened."""
        with torch.cuda.stream(self._up):
            if after is not None:
                self._up.wait_event(after)
            there = host.to(self.device, non_blocking=True)
            return Upload(there, self._up.record_event())

    def take(self, upload: Upload) -> Tensor:
        """What was sent up, for all that is computed from here on."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(upload.arrived)
        upload.there.record_stream(current)  # its memory is not used again before that is done
        return upload.there

    def down(self, state: Tensor, host: Tensor, after: Any | None) -> Any:
        """Begin to bring down what has been computed until here, once what reads the buffer has happened.

        Returns:
            The event of its arrival.
        """
        self._down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._down):
            if after is not None:
                self._down.wait_event(after)
            host.copy_(state, non_blocking=True)
            state.record_stream(self._down)
            return self._down.record_event()

    def wait(self, event: Any) -> None:
        """Until it has happened."""
        event.synchronize()


def lanes_to(device: torch.device) -> Lanes | None:
    """None where there is nothing to copy to."""
    return Lanes(device) if device.type == "cuda" else None
