"""The most memory that this process has taken, as the system tells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def peaks(device: torch.device) -> Mapping[str, int | None]:
    """Bytes of the `process` (resident; None where the system has no /proc) and, on CUDA, of tensors on the
    `device` (None elsewhere)."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"process": _resident(), "device": on_device}


def _resident() -> int | None:
    # not getrusage: Linux counts there what the process was forked from
    if not _STATUS.is_file():
        return None
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else None
