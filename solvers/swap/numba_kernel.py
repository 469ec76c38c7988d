"""The CPU kernel: the loops of `numba_*.py`, in threads of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskopt.protocol.solution import SWAP_FLOOR, SWAP_TOLERANCE
from maskopt.solvers.parallel import RowThreads
from maskopt.solvers.swap.batch import ACCEPT, Batch

_RELATIVE, _FLOOR = ACCEPT * SWAP_TOLERANCE, ACCEPT * SWAP_FLOOR


class NumbaKernel:
    """Compiled loops over rows; threads share nothing but G."""

    name = "numba"
    patience = 256

    def __init__(self, batch: Batch, threads: int) -> None:
        from maskopt.solvers.swap import numba_price, numba_product, numba_search

        self._product: Any = numba_product
        self._search: Any = numba_search
        self._price: Any = numba_price
        self.single = batch.single
        self._threads = RowThreads(threads)
        self._gram = batch.gram.numpy()
        self._propose = torch.float32 if batch.single else torch.float64
        self._low = np.float32 if batch.single else np.float64
        self._diagonal = batch.diagonal.numpy()
        self._reach, self._rho = self._couplings()

    def refresh(self, batch: Batch, rows: Tensor) -> None:
        """As in `Kernel`; the sum over pruned columns in one fixed order."""
        self._threads.run(
            self._product.product_rows,
            rows.numpy(),
            self._gram,
            batch.x.numpy(),
            batch.kept.numpy(),
            batch.c.numpy(),
            batch.objective.numpy(),
        )

    def search(self, batch: Batch, rows: Tensor, most: int) -> None:
        """As in `Kernel`; a row runs through all its rounds in one go."""
        self._threads.run(
            self._search.search_rows,
            rows.numpy(),
            self._gram,
            batch.x.numpy(),
            batch.proposing(self._propose).numpy(),
            self._diagonal,
            batch.kept.numpy(),
            batch.c.numpy(),
            batch.partner.numpy(),
            batch.cross.numpy(),
            batch.objective.numpy(),
            batch.mass.numpy(),
            batch.swaps.numpy(),
            batch.rounds.numpy(),
            batch.group,
            _RELATIVE,
            _FLOOR,
            most,
        )

    def price(self, batch: Batch, rows: Tensor) -> Tensor:
        """As in `Kernel`."""
        improving = np.zeros(batch.rows, np.bool_)
        self._threads.run(
            self._price.price_rows,
            rows.numpy(),
            self._gram,
            batch.x.numpy(),
            batch.proposing(self._propose).numpy(),
            self._diagonal,
            self._reach,
            self._rho,
            batch.kept.numpy(),
            batch.c.numpy(),
            batch.partner.numpy(),
            batch.cross.numpy(),
            batch.objective.numpy(),
            batch.mass.numpy(),
            improving,
            batch.priced.numpy(),
            batch.group,
            _RELATIVE,
            _FLOOR,
            4.0 * float(np.finfo(self._low).eps),
        )
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
        return d, rho * self._price.SLACK

    def _strongest(self, d: np.ndarray) -> np.ndarray:
        scale = d.max(initial=0.0)
        with np.errstate(divide="ignore"):
            inverse = np.where(d > 1e-12 * scale, 1.0 / d, 1e12 / scale if scale > 0 else 0.0)
        out = np.zeros(len(d), np.float64)

        low = inverse.astype(self._low)
        self._threads.run(self._product.reach_rows, np.arange(len(d)), self._gram, low, out)
        return out
