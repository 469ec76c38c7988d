"""The CPU kernel: the loops of `numba_*.py`, in as many threads as torch uses."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskopt.solution import SWAP_FLOOR, SWAP_TOLERANCE
from maskopt.solvers.swap.batch import ACCEPT, Batch

#: rows of one task at least, so that each tile of G that is brought in serves several
_TASK = 4
_RELATIVE, _FLOOR = ACCEPT * SWAP_TOLERANCE, ACCEPT * SWAP_FLOOR


class NumbaKernel:
    """Compiled loops over rows; threads share nothing but G."""

    name = "numba"
    patience = 256

    def __init__(self, batch: Batch) -> None:
        from maskopt.solvers.swap import numba_price, numba_product, numba_search

        self._product: Any = numba_product
        self._search: Any = numba_search
        self._price: Any = numba_price
        self.single = batch.single
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads)  # its threads end with the kernel
        self._gram = batch.gram.numpy()
        self._propose = torch.float32 if batch.single else torch.float64
        self._low = np.float32 if batch.single else np.float64
        self._diagonal = batch.diagonal.numpy()
        self._reach, self._rho = self._couplings()

    def refresh(self, batch: Batch, rows: Tensor) -> None:
        """As in `Kernel`; the sum over pruned columns in one fixed order."""

        def task(part: np.ndarray) -> None:
            self._product.product_rows(
                self._gram,
                batch.x.numpy(),
                batch.kept.numpy(),
                batch.c.numpy(),
                batch.objective.numpy(),
                part,
            )

        self._run(task, rows, pieces=1)

    def search(self, batch: Batch, rows: Tensor, most: int) -> None:
        """As in `Kernel`; a row runs through all its rounds in one go."""
        low = batch.proposing(self._propose).numpy()

        def task(part: np.ndarray) -> None:
            self._search.search_rows(
                self._gram,
                batch.x.numpy(),
                low,
                self._diagonal,
                batch.kept.numpy(),
                batch.c.numpy(),
                batch.partner.numpy(),
                batch.cross.numpy(),
                batch.objective.numpy(),
                batch.mass.numpy(),
                batch.swaps.numpy(),
                batch.rounds.numpy(),
                part,
                batch.group,
                _RELATIVE,
                _FLOOR,
                most,
            )

        self._run(task, rows, pieces=8)

    def price(self, batch: Batch, rows: Tensor) -> Tensor:
        """As in `Kernel`."""
        low = batch.proposing(self._propose).numpy()
        improving = np.zeros(batch.rows, np.bool_)

        def task(part: np.ndarray) -> None:
            self._price.price_rows(
                self._gram,
                batch.x.numpy(),
                low,
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
                part,
                batch.group,
                _RELATIVE,
                _FLOOR,
                4.0 * float(np.finfo(self._low).eps),
            )

        self._run(task, rows, pieces=8)
        return torch.from_numpy(improving)[rows]

    def _run(self, task: Callable[[np.ndarray], None], rows: Tensor, pieces: int) -> None:
        """The task on all rows, in a few pieces a thread, so that a slow row holds up little."""
        array = rows.numpy()
        count = min(self._threads * pieces, -(-len(array) // _TASK))
        if count <= 1 or self._threads == 1:
            task(array)
            return
        list(self._pool.map(task, np.array_split(array, count)))

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

        def task(part: np.ndarray) -> None:
            first, last = int(part[0]), int(part[-1]) + 1
            self._product.reach_rows(self._gram, inverse.astype(self._low), 0, out, first, last)

        self._run(task, torch.arange(len(d)), pieces=4)
        return out
