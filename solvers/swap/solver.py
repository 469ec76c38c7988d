"""`swap` as the registry sees it: options in, Solution out."""

from __future__ import annotations

import importlib.util
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from maskopt.errors import OptionError, SolverError
from maskopt.problem import LayerProblem
from maskopt.solution import Solution, Status
from maskopt.solver import Capabilities
from maskopt.solvers.greedy.scores import WandaSolver
from maskopt.solvers.swap.batch import Batch
from maskopt.solvers.swap.engine import Kernel, Record, refine
from maskopt.solvers.swap.literal import refine_literally
from maskopt.solvers.swap.triton import unavailable as triton_unavailable

KERNELS = ("auto", "literal", "torch", "numba", "triton")
#: what a solve may use beyond weight and G where the caller sets no limit
DEFAULT_MEMORY = {"cpu": 2**30, "cuda": 4 * 2**30}
#: bytes per weight that a batch and the workings of a kernel take: x, c and copies in float64
_ROW_BYTES = 128

_log = logging.getLogger("maskopt.swap")


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
            kernel: `auto` (numba on CPU, triton on CUDA, torch where they are missing), or one of
                `numba`, `triton`, `torch`, and `literal`, the paper's algorithm to the letter.
            max_swaps: stop a row after so many; None: when 1-swap optimal. A row stopped early is
                FEASIBLE, and another call with its mask as the warm start goes on from there.
            time_limit: stop all rows after so many seconds; the same holds for them.
            memory_limit: bytes beyond weight and G (default 1 GiB on CPU, 4 GiB on CUDA), aimed at
                by the number of rows, and of pairs, handled at a time.
            on_progress: called with (rows done, rows).

        The trace says `kernel`, and per row `swaps`, `scans` (exact scans over all pairs, the proof
        included), `rounds` of candidates, `pairs` (whose Δ the scans had to form), and `error`
        [rounds + 1, rows]: the objective at the start and after each round of search and scan.
        """
        _check_options(kernel, max_swaps, time_limit, memory_limit)
        name = _choose_kernel(kernel, problem)
        deadline = math.inf if time_limit is None else time.monotonic() + time_limit
        kept = warm_start if warm_start is not None else WandaSolver().solve(problem).mask
        memory = max(2, memory_limit or DEFAULT_MEMORY.get(problem.device.type, 2**30))
        with _threads_for(name) as threads:
            parts = self._parts(
                problem, kept, name, threads, max_swaps, deadline, memory, on_progress
            )
            return self._solution(name, parts)

    def _parts(
        self,
        problem: LayerProblem,
        kept: Tensor,
        name: str,
        threads: int,
        max_swaps: int | None,
        deadline: float,
        memory: int,
        on_progress: Callable[[int, int], None] | None,
    ) -> list[tuple[Batch, Record]]:
        """The rows in tiles that fit into the memory, each refined."""
        tile = max(1, min(problem.rows, memory // 2 // (_ROW_BYTES * problem.n)))
        built: Kernel | None = None
        parts: list[tuple[Batch, Record]] = []
        start = 0
        while start < problem.rows:
            rows = slice(start, start + tile)

            def progress(done: int, before: int = start) -> None:
                if on_progress is not None:
                    on_progress(before + done, problem.rows)

            try:
                batch = Batch.of(problem.take(rows), kept[rows])
                if name == "literal":
                    record = refine_literally(
                        batch,
                        max_swaps=max_swaps,
                        deadline=deadline,
                        memory=memory // 2,
                        progress=progress,
                    )
                else:
                    if built is None or built.single != batch.single:
                        built = make_kernel(name, batch, memory // 2, threads)
                    record = refine(
                        batch,
                        built,
                        max_swaps=max_swaps,
                        deadline=deadline,
                        progress=progress if on_progress is not None else None,
                    )
            except torch.OutOfMemoryError:
                if tile == 1 and memory <= 2**20:
                    raise
                tile, memory, built = max(1, tile // 2), max(2, memory // 2), None
                torch.cuda.empty_cache()
                _log.warning("swap: out of memory on the device; going on with %d rows", tile)
                continue
            parts.append((batch.result(), record))
            start += tile
        return parts

    def _solution(self, kernel: str, parts: list[tuple[Batch, Record]]) -> Solution:
        def gather(values: list[Tensor]) -> Tensor:
            return torch.cat(values).cpu()

        proven = gather([record.proven for _, record in parts]).tolist()
        objective = torch.cat([b.objective.clamp(min=0.0) * b.scale for b, _ in parts])
        length = max(len(record.objectives) for _, record in parts)
        error = [
            torch.stack(r.objectives + [r.objectives[-1]] * (length - len(r.objectives)))
            for _, r in parts
        ]
        trace: dict[str, Any] = {
            "kernel": kernel,
            "swaps": gather([batch.swaps for batch, _ in parts]),
            "scans": gather([record.scans for _, record in parts]),
            "rounds": gather([batch.rounds for batch, _ in parts]),
            "pairs": gather([batch.priced for batch, _ in parts]),
            "error": torch.cat(error, 1).cpu(),
        }
        return Solution(
            mask=torch.cat([batch.kept for batch, _ in parts]),
            objective=objective,
            lower_bound=torch.zeros_like(objective),
            status=tuple(Status.SWAP_OPTIMAL if done else Status.FEASIBLE for done in proven),
            solver=self.name,
            trace=trace,
        )


@contextmanager
def _threads_for(kernel: str) -> Iterator[int]:
    """How many threads a kernel may use.

    The compiled loops bring threads of their own, and those of torch, which wait by spinning, would
    take the cores from them: torch has one as long as they run.
    """
    threads = torch.get_num_threads()
    if kernel != "numba":
        yield threads
        return
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def make_kernel(name: str, batch: Batch, memory: int, threads: int) -> Kernel:
    """The kernel of that name, for the layer of the batch; `threads` are those of numba."""
    if name == "numba":
        from maskopt.solvers.swap.numba_kernel import NumbaKernel

        return NumbaKernel(batch, threads)
    if name == "torch":
        from maskopt.solvers.swap.torch_kernel import TorchKernel

        return TorchKernel(batch, memory)
    if name == "triton":
        from maskopt.solvers.swap.triton.engine import TritonKernel

        return TritonKernel(batch, memory=memory)
    raise SolverError(f"swap: no kernel {name!r}")


def _choose_kernel(kernel: str, problem: LayerProblem) -> str:
    on_cpu = problem.device.type == "cpu"
    has_numba = importlib.util.find_spec("numba") is not None
    missing = triton_unavailable(problem.device)
    if kernel == "auto":
        if on_cpu:
            return "numba" if has_numba else "torch"
        return "triton" if missing is None else "torch"
    if kernel == "triton" and missing:
        raise SolverError(
            f"swap: kernel 'triton' cannot run here: {missing}; or use kernel='torch'"
        )
    if kernel == "numba" and not (on_cpu and has_numba):
        why = "the package numba is not installed" if on_cpu else f"not for {problem.device}"
        raise SolverError(f"swap: kernel 'numba' cannot run here: {why}; use kernel='torch'")
    return kernel


def _check_options(
    kernel: str, max_swaps: int | None, time_limit: float | None, memory_limit: int | None
) -> None:
    if kernel not in KERNELS:
        raise OptionError(f"swap: unknown kernel {kernel!r}; known: {', '.join(KERNELS)}")
    if max_swaps is not None and max_swaps < 0:
        raise OptionError(f"swap: max_swaps must be at least 0, not {max_swaps}")
    if time_limit is not None and not time_limit >= 0:
        raise OptionError(f"swap: time_limit must be at least 0 seconds, not {time_limit}")
    if memory_limit is not None and memory_limit <= 0:
        raise OptionError(f"swap: memory_limit must be a positive number of bytes: {memory_limit}")
