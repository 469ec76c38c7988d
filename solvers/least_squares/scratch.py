# mypy: disallow-untyped-defs=False
"""Memory that one row after another works in: on the CPU fresh pages cost more than the work in them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskopt.solvers.compiled import loop


class Scratch:
    """Buffers by name, float64; each is handed out again, and holds one thing at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[str, Tensor] = {}
        self._signs: dict[int, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = torch.empty(size, dtype=torch.float64, device=self.device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)

    def signs(self, size: int) -> Tensor:
        """Random signs, the same for every row of this size."""
        if size not in self._signs:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randint(0, 2, (size,), generator=generator)
            self._signs[size] = (drawn * 2 - 1).to(self.device, torch.float64)
        return self._signs[size]


def part_of(matrix: Tensor, lines: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """matrix[lines, columns], written to `out` [lines, columns]."""
    if matrix.device.type != "cpu":
        return out.copy_(matrix[lines[:, None], columns[None, :]])
    _gather(matrix.numpy(), lines.numpy(), columns.numpy(), out.numpy())
    return out


@loop(nogil=True)
def _gather(matrix, lines, columns, out):
    for i in range(len(lines)):
        line = matrix[lines[i]]
        for j in range(len(columns)):
            out[i, j] = line[columns[j]]


#: size below which LAPACK inverts a matrix
_LEAF = 96


def inverse(matrix: Tensor, out: Tensor, work: Tensor) -> Tensor:
    """Of definite matrices [rows, k, k], by halves: 4k³/3 operations a row, nearly all of them products. NaN
    where rounding left something that is not definite.

    Args:
        matrix: is used up.
        out: [rows, k, k], not the same memory.
        work: [rows · k²/2] at least.
    """
    count, size = matrix.shape[:2]
    if size <= _LEAF:
        # the lower left quarter is not up to date
        upper, broken = torch.linalg.cholesky_ex(matrix, upper=True)
        lost = (broken != 0)[:, None, None]
        upper = torch.where(lost, torch.eye(size, dtype=upper.dtype, device=upper.device), upper)
        return out.copy_(torch.cholesky_inverse(upper, upper=True)).masked_fill_(lost, torch.nan)
    half = size // 2
    one, two, corner = out[:, :half, :half], out[:, half:, half:], out[:, :half, half:]
    cross = matrix[:, :half, half:]
    needed = count * half * (size - half)
    moved, rest = work[:needed].view(count, half, -1), work[needed:]
    inverse(matrix[:, :half, :half], one, rest)
    torch.bmm(one, cross, out=moved)
    _add_upper(matrix[:, half:, half:], cross.mT, moved, -1)
    inverse(matrix[:, half:, half:], two, rest)
    torch.bmm(moved, two, out=corner)
    corner.neg_()
    out[:, half:, :half] = corner.mT
    _add_upper(one, corner, moved.mT, -1)
    quarter = half // 2
    one[:, quarter:, :quarter] = one[:, :quarter, quarter:].mT
    return out


def _add_upper(matrix: Tensor, left: Tensor, right: Tensor, alpha: int) -> None:
    """alpha · left · right, which is symmetric, onto all of a matrix but the lower left quarter."""
    quarter = matrix.shape[1] // 2
    matrix[:, :quarter].baddbmm_(left[:, :quarter], right, alpha=alpha)
    matrix[:, quarter:, quarter:].baddbmm_(left[:, quarter:], right[:, :, quarter:], alpha=alpha)
