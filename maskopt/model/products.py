"""float32 products on the CPU by the faster of torch's two libraries, where it is as precise.

torch multiplies float32 matrices with MKL, whose kernels for processors other than Intel's leave half of
their AVX-512 units idle; oneDNN's do not. To oneDNN torch goes only where it is allowed to round to bfloat16
(`torch.backends.mkldnn.matmul.fp32_precision`), which oneDNN makes use of where it gains by it. So a product
says first whether it does here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

#: of torch 2.9 and later; elsewhere all stays as it is
_SETTING: Any = getattr(torch.backends.mkldnn, "matmul", None)
_ROUNDED = "bf16"
#: relative error of a product in float32, 3e-7 as measured, and not in bfloat16, 3e-3
_PRECISE = 1e-5

_lock = threading.Lock()
_users = 0
_before = ""


@contextmanager
def fast_products() -> Iterator[None]:
    """In here float32 products on the CPU take the faster library, if they are as precise by it.

    The setting is the process's: what other threads multiply meanwhile is as precise, too. It is as before
    once all are out.
    """
    if not _precise():
        yield
        return
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _users, _before
    with _lock:
        if _users == 0:
            _before = _SETTING.fp32_precision
            _SETTING.fp32_precision = _ROUNDED
        _users += 1


def _leave() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            _SETTING.fp32_precision = _before


@cache
def _precise() -> bool:
    """Are float32 products that may be rounded to bfloat16 not rounded here?"""
    if _SETTING is None:
        return False
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    _enter()
    try:
        error = (left @ right - exact).norm() / exact.norm()
    finally:
        _leave()
    return float(error) < _PRECISE
