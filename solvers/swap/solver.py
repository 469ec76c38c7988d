"""`swap` as the registry sees it: options in, Solution out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from maskopt.errors import OptionError
from maskopt.problem import LayerProblem
from maskopt.solution import Solution, Status
from maskopt.solver import Capabilities
from maskopt.solvers.scores import WandaSolver
from maskopt.solvers.swap.batch import Batch
from maskopt.solvers.swap.literal import refine_literally

#: what a solve may use beyond weight and G where the caller sets no limit
DEFAULT_MEMORY = {"cpu": 2**30, "cuda": 4 * 2**30}


class SwapSolver:
    """1-swap local search (SparseSwaps, arXiv 2512.10922) to a proven 1-swap optimum."""

    name = "swap"
    capabilities = Capabilities(proves="1-swap", note="best exchanges of one kept and one pruned")
    default_warm_start: str | None = "wanda"

    def unavailable(self) -> str | None:
        return None

    def solve(
        self,
        problem: LayerProblem,
        *,
        warm_start: Tensor | None = None,
        kernel: str = "auto",
        max_swaps: int | None = None,
        time_limit: float | None = None,
        memory_limit: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Solution:
        """Swap every row until no 1-swap improves, which is then proven (SWAP_OPTIMAL).

        Args:
            warm_start: bool [rows, n]; Wanda's mask where none is given.
            kernel: `literal`, or `auto`.
            max_swaps: stop a row after so many; None: when 1-swap optimal. A row stopped early is
                FEASIBLE, and another call with its mask as the warm start goes on from there.
            time_limit: stop all rows after so many seconds; the same holds for them.
            memory_limit: bytes beyond weight and G (default 1 GiB on CPU, 4 GiB on CUDA).
            on_progress: called with (rows done, rows).
        """
        _check_options(kernel, max_swaps, time_limit, memory_limit)
        began = time.monotonic()
        deadline = math.inf if time_limit is None else began + time_limit
        kept = warm_start if warm_start is not None else WandaSolver().solve(problem).mask
        memory = max(2, memory_limit or DEFAULT_MEMORY.get(problem.device.type, 2**30))
        tile = max(1, memory // 2 // (64 * problem.n))
        masks, proven, swaps = [], [], []
        for start in range(0, problem.rows, tile):
            rows = slice(start, start + tile)
            batch = Batch.of(problem.take(rows), kept[rows])

            def progress(done: int, before: int = start) -> None:
                if on_progress is not None:
                    on_progress(before + done, problem.rows)

            proven.append(
                refine_literally(
                    batch,
                    max_swaps=max_swaps,
                    deadline=deadline,
                    memory=memory // 2,
                    progress=progress,
                )
            )
            masks.append(batch.kept)
            swaps.append(batch.swaps)
        return Solution.of(
            problem,
            torch.cat(masks),
            solver=self.name,
            status=[
                Status.SWAP_OPTIMAL if done else Status.FEASIBLE
                for done in torch.cat(proven).tolist()
            ],
            seconds=time.monotonic() - began,
            trace={"kernel": "literal", "swaps": torch.cat(swaps).cpu()},
        )


def _check_options(
    kernel: str, max_swaps: int | None, time_limit: float | None, memory_limit: int | None
) -> None:
    known = ("auto", "literal")
    if kernel not in known:
        raise OptionError(f"swap: unknown kernel {kernel!r}; known: {', '.join(known)}")
    if max_swaps is not None and max_swaps < 0:
        raise OptionError(f"swap: max_swaps must be at least 0, not {max_swaps}")
    if time_limit is not None and not time_limit >= 0:
        raise OptionError(f"swap: time_limit must be at least 0 seconds, not {time_limit}")
    if memory_limit is not None and memory_limit <= 0:
        raise OptionError(f"swap: memory_limit must be a positive number of bytes: {memory_limit}")
