"""The CPU kernel: the loops of `numba_*.py`, in threads of its own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maskopt.protocol.solution import SWAP_FLOOR, SWAP_TOLERANCE
from maskopt.solvers.compiled import RowThreads
from maskopt.solvers.swap.engine import ACCEPT, Batch
from maskopt.solvers.swap.numba_common import product_rows, reach_rows
from maskopt.solvers.swap.numba_price import SLACK, price_rows
from maskopt.solvers.swap.numba_search import search_rows

_RELATIVE, _FLOOR = ACCEPT * SWAP_TOLERANCE, ACCEPT * SWAP_FLOOR


class NumbaKernel:
    """Compiled loops over rows; threads share nothing but G."""

    patience = 256

    def __init__(self, batch: Batch, threads: int) -> None:
        self.single = batch.single
        self._threads = RowThreads(threads)
        self._gram = batch.gram.numpy()
        self._low = np.float32 if batch.single else np.float64
        self._diagonal = batch.diagonal.numpy()
        self._reach, self._rho = self._couplings()

    def refresh(self, batch: Batch, rows: Tensor) -> None:
        """As in `Kernel`; the sum over pruned columns in one fixed order."""
        arrays = (batch.x, batch.kept, batch.c, batch.objective)
        self._threads.run(product_rows, rows.numpy(), self._gram, *(x.numpy() for x in arrays))
        batch.add_linear(rows)

    def search(self, batch: Batch, rows: Tensor, most: int) -> None:
        """As in `Kernel`; a row runs through all its rounds in one go."""
        counts = batch.swaps.numpy(), batch.rounds.numpy()
        plan = batch.group, _RELATIVE, _FLOOR, most
        arrays = self._gram, self._diagonal, self._arrays(batch)
        self._threads.run(search_rows, rows.numpy(), *arrays, counts, plan)

    def price(self, batch: Batch, rows: Tensor) -> Tensor:
        """As in `Kernel`."""
        improving = np.zeros(batch.rows, np.bool_)
        bounds = self._diagonal, self._reach, self._rho
        arrays = self._gram, bounds, self._arrays(batch), improving, batch.priced.numpy()
        plan = batch.group, _RELATIVE, _FLOOR, 4.0 * float(np.finfo(self._low).eps)
        self._threads.run(price_rows, rows.numpy(), *arrays, plan)
        return torch.from_numpy(improving)[rows]

    def _arrays(self, batch: Batch) -> tuple[np.ndarray, ...]:
        """The rows as the loops of both steps take them."""
        rows = batch.x, batch.low, batch.kept, batch.c
        found = batch.partner, batch.cross, batch.objective, batch.mass
        return tuple(tensor.numpy() for tensor in rows + found)

    def _couplings(self) -> tuple[np.ndarray, np.ndarray]:
        """d and ρ with |G_ij| ≤ d_i d_j, and |G_ij| ≤ ρ_i d_i d_j for j ≠ i; ρ rounded up.

        d is √G_jj; where G is indefinite by more than rounding, the root of its row's largest entry.
        """
        d = np.sqrt(np.maximum(self._diagonal, 0.0))
        rho = self._strongest(d)
        if rho.max(initial=0.0) > 1.0 + 1e-3:
            d = np.sqrt(np.abs(self._gram).max(1).astype(np.float64))
            rho = self._strongest(d)
        return d, rho * SLACK

    def _strongest(self, d: np.ndarray) -> np.ndarray:
        scale = d.max(initial=0.0)
        with np.errstate(divide="ignore"):
            inverse = np.where(d > 1e-12 * scale, 1.0 / d, 1e12 / scale if scale > 0 else 0.0)
        out = np.zeros(len(d), np.float64)
        low = inverse.astype(self._low)
        self._threads.run(reach_rows, np.arange(len(d)), self._gram, low, out)
        return out
