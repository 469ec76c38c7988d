"""A row on the CPU: what `Row` does with vectors, in one compiled call each, and products by torch.

Each call of torch releases Python's lock and waits for it again: with a hundred small calls a row, two
threads are no faster than one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maskopt.solvers.least_squares import row_kernel as kernel
from maskopt.solvers.least_squares.state import CHUNK, SAFETY, Block, Pairs, Row, part_of


class CompiledRow(Row):
    """See `Row`; the same to within rounding."""

    def look(self) -> None:
        rest = self.scratch("rest", len(self.target))
        slots = self.kept, self.pruned, self.v, rest, self.r, self.left
        self.explained = kernel.look(*_arrays(self.metric.damped, self.target, *slots))

    def likely(self, count: int) -> Pairs:
        diagonals = _arrays(self.metric.alone, self.metric.spread)
        u, p = kernel.likely(*self._state(), *diagonals, self.metric.group_size, count)
        return Pairs(torch.from_numpy(u), torch.from_numpy(p))

    def block(self, pairs: Pairs) -> Block:
        u, p = pairs.u.numpy(), pairs.p.numpy()
        outer = self._lines(p)
        columns = self.scratch("block", len(self.kept), len(u) + len(p))
        b = torch.mm(self.m, outer.T, out=columns[:, len(u) :])
        inner = torch.mm(outer, b, out=self.scratch("inner", len(p), len(p)))
        state = _arrays(self.metric.damped, self.m, self.v, self.r, self.pruned)
        z, y = kernel.tableau(*state, u, p, columns.numpy(), inner.numpy())
        return Block(columns, torch.from_numpy(z), torch.from_numpy(y))

    def exchange(self, u: Tensor, p: Tensor, block: Block) -> None:
        w = torch.linalg.inv(block.z)
        scaled = torch.mm(block.columns, w, out=self.scratch("scaled", *block.columns.shape))
        self.m.addmm_(scaled, block.columns.T)
        state = self.m, self.v, self.kept, self.pruned
        kernel.settle_in(*_arrays(*state, u, p, scaled, w, block.y))
        self.fresh = False
        self.look()

    def drift(self) -> float:
        signs = self.scratch.signs(len(self.v))
        solved = torch.mv(self.m, signs, out=self.scratch("solved", len(self.v)))
        rest = self.scratch("rest", len(self.target))
        off = kernel.apart(*_arrays(self.metric.damped, self.kept, solved, signs, rest))
        return off / max(1.0, len(self.v) ** 0.5)

    def improving(self, count: int, threshold: float) -> Pairs | None:
        p = self._suspects().numpy()
        if not len(p):
            return None
        outer = self._lines(p)
        b = torch.mm(outer, self.m, out=self.scratch("columns", *outer.shape))
        self.formed += b.numel()
        alone, size = self.metric.alone.numpy(), self.metric.group_size
        products = _arrays(b, outer)
        u, p = kernel.best_pairs(*products, *self._state(), p, alone, size, threshold, count)
        return Pairs(torch.from_numpy(u), torch.from_numpy(p)) if len(p) else None

    def _suspects(self) -> Tensor:
        metric, state = self.metric, self._state()
        if metric.group_size < len(self.target):
            shared = _arrays(metric.damped, metric.spread)
            flagged, formed = kernel.suspects_of_groups(*state, *shared, metric.group_size, SAFETY)
            self.formed += formed
            return torch.from_numpy(flagged)
        screen = kernel.screen(*state, metric.spread.numpy(), SAFETY)
        u, p, widths, cost, price, square, twice, least, flagged = screen
        if not len(u) or not len(p):
            return torch.from_numpy(p[:0])
        outer = self._lines(p)
        slots = torch.from_numpy(u)
        for first in range(0, len(u), CHUNK):
            part, width = slots[first : first + CHUNK], int(widths[first])
            lines = self.scratch("lines", len(part), len(self.kept))
            torch.index_select(self.m, 0, part, out=lines)
            b = torch.mm(lines, outer[:width].T, out=self.scratch("b", len(part), width))
            self.formed += b.numel()
            kernel.flag(b.numpy(), cost[first:], price[first:], square, twice, least, flagged)
        return torch.from_numpy(np.sort(p[flagged]))

    def _state(self) -> list[np.ndarray]:
        """M, v, r, and the inputs in the slots."""
        return _arrays(self.m, self.v, self.r, self.kept, self.pruned)

    def _lines(self, p: np.ndarray) -> Tensor:
        """A_p,S of slots p."""
        inputs = torch.from_numpy(self.pruned.numpy()[p])
        out = self.scratch("outer", len(inputs), len(self.kept))
        return part_of(self.metric.damped, inputs, self.kept, out)


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in tensors]
