"""The CPU kernel: the loops of `numba_*.py`, in threads of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskopt.protocol.solution import SWAP_FLOOR, SWAP_TOLERANCE
from maskopt.solvers.parallel import RowThreads
from maskopt.solvers.swap.batch import ACCEPT, Batch
from maskopt.solvers.swap.numba_price import SLACK, price_rows
from maskopt.solvers.swap.numba_product import product_rows, reach_rows
from maskopt.solvers.swap.numba_search import search_rows

_RELATIVE, _FLOOR = ACCEPT * SWAP_TOLERANCE, ACCEPT * SWAP_FLOOR


class NumbaKernel:
    """Compiled loops over rows; threads share nothing but G."""

    name = "numba"
    patience = 256

    def __init__(self, batch: Batch, threads: int) -> None:
        self.single = batch.single
        self._threads = RowThreads(threads)
        # of the same dtype as the proposals, so that loops are compiled for two dtypes and not for three
        self._gram = batch.gram.to(batch.low.dtype).numpy()
        self._diagonal = batch.diagonal.numpy()
        # only scans without groups need them
        couplings: tuple[Any, Any] = self._couplings() if batch.group == batch.n else (None, None)
        self._reach, self._rho = couplings

    def refresh(self, batch: Batch, rows: Tensor) -> None:
        """As in `Kernel`; the sum over pruned columns in one fixed order."""
        self._threads.run(
            product_rows, rows.numpy(), self._gram, batch.x.numpy(), batch.kept.numpy(),
            batch.c.numpy(), batch.objective.numpy(),
        )  # fmt: skip

    def search(self, batch: Batch, rows: Tensor, most: int) -> None:
        """As in `Kernel`; a row runs through all its rounds in one go."""
        self._threads.run(
            search_rows, rows.numpy(), self._gram, batch.x.numpy(), batch.low.numpy(),
            self._diagonal, batch.kept.numpy(), batch.c.numpy(), batch.partner.numpy(),
            batch.cross.numpy(), batch.objective.numpy(), batch.mass.numpy(), batch.swaps.numpy(),
            batch.rounds.numpy(), batch.group % batch.n, _RELATIVE, _FLOOR, most,
        )  # fmt: skip

    def price(self, batch: Batch, rows: Tensor) -> Tensor:
        """As in `Kernel`."""
        improving = np.zeros(batch.rows, np.bool_)
        self._threads.run(
            price_rows, rows.numpy(), self._gram, batch.x.numpy(), batch.low.numpy(),
            self._diagonal, self._reach, self._rho, batch.kept.numpy(), batch.c.numpy(),
            batch.partner.numpy(), batch.cross.numpy(), batch.objective.numpy(), batch.mass.numpy(),
            improving, batch.priced.numpy(), batch.group, _RELATIVE, _FLOOR,
            4.0 * float(np.finfo(self._gram.dtype).eps),
        )  # fmt: skip
        return torch.from_numpy(improving)[rows]

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
        out = np.zeros(len(d))
        low = inverse.astype(self._gram.dtype)
        self._threads.run(reach_rows, np.arange(len(d)), self._gram, low, out)
        return out
