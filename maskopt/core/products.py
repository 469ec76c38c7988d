"""float32 products on the CPU by the faster of torch's two libraries, where it is as precise.

torch multiplies float32 matrices with MKL, which on an AMD EPYC with AVX-512 is less than half as fast as
oneDNN, at the same error. torch uses oneDNN only where it may round to bfloat16
(`torch.set_float32_matmul_precision("medium")`); a product shows first whether oneDNN rounds here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_ALLOWED = "medium"
#: relative error of a product in float32, 3e-7 as measured, and not in bfloat16, 3e-3
_PRECISE = 1e-5

_lock = threading.Lock()
_users = 0
_before = ""


@contextmanager
def fast_products() -> Iterator[None]:
    """Within it float32 products on the CPU take the faster library, if that is as precise.

    The setting is the process's, and is reset once all users are out. Nothing changes where there is an
    accelerator, whose products would be rounded, or where the setting was made by torch's newer means.
    """
    if not (_precise() and _enter()):
        yield
        return
    try:
        yield
    finally:
        _leave()


def _enter() -> bool:
    """False, and nothing done, where the setting was made by newer means."""
    global _users, _before
    with _lock:
        if _users == 0:
            try:
                _before = torch.get_float32_matmul_precision()
            except RuntimeError:
                return False
            torch.set_float32_matmul_precision(_ALLOWED)
        _users += 1
    return True


def _leave() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            torch.set_float32_matmul_precision(_before)


@cache
def _precise() -> bool:
    """Are float32 products that may be rounded to bfloat16 not rounded here?"""
    if torch.accelerator.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    # whatever torch makes numbers of where nothing is said
    left, right = (
        torch.randn(256, 256, generator=generator, dtype=torch.float32) for _ in range(2)
    )
    exact = left.double() @ right.double()
    if not _enter():
        return False
    try:
        error = (left @ right - exact).norm() / exact.norm()
    finally:
        _leave()
    return float(error) < _PRECISE
