"""The CUDA kernels of 1-swap search, written in Triton; nothing here imports Triton by itself."""

from __future__ import annotations

import os

import torch


def unavailable(device: torch.device | str | None = None) -> str | None:
    """Return the reason why the Triton kernels cannot run (on a device), or None.

    They run on CUDA devices, and under TRITON_INTERPRET=1 anywhere (slowly, for tests).
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"the package triton cannot be imported ({error}); pip install triton (Linux)"
    on_gpu = device is None or torch.device(device).type == "cuda"
    if os.environ.get("TRITON_INTERPRET") == "1" and (device is None or not on_gpu):
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if not on_gpu:
        return f"the problem is on {device}; move weight and gram to a CUDA device"
    if torch.cuda.get_device_capability() < (7, 0):
        return "Triton needs a CUDA device of compute capability 7.0 or above"
    return None
