"""`Swap`: a problem, a start and limits in, a Solution out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from maskopt.core.fields import option
from maskopt.core.files import join_rows
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.core.threads import torch_threads
from maskopt.errors import SolverError
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities, Solver
from maskopt.protocol.trace import Trace
from maskopt.solvers.least_squares.search import swap_refitted
from maskopt.solvers.shared_budget import OFFERED, Offers, searched, transfer
from maskopt.solvers.swap.engine import Batch, Kernel, refine
from maskopt.solvers.swap.literal import refine_literally
from maskopt.solvers.swap.numba_kernel import NumbaKernel
from maskopt.solvers.swap.torch_kernel import TorchKernel
from maskopt.solvers.swap.triton import unavailable as triton_unavailable

KERNELS = ("auto", "literal", "torch", "numba", "triton")
#: bytes that a solve may use beyond weight and G where the caller sets no limit
DEFAULT_MEMORY = {"cpu": 2**30, "cuda": 4 * 2**30}
#: bytes per weight that a batch and the workings of a kernel take: x, c and copies in float64
_ROW_BYTES = 128
#: memory below which fewer rows cannot help a full device
_LEAST_MEMORY = 2**20
#: rows whose offers are made at a time
_ROWS = 512

_log = logging.getLogger("maskopt.swap")


@dataclass(frozen=True)
class Swap(Solver):
    """1-swap local search (SparseSwaps, arXiv 2512.10922) to a proven 1-swap optimum.

    The objective is f, or F for updated weights; a shared budget is also searched for swaps between rows. A
    row that `max_swaps` or the time limit stops is FEASIBLE; another call with its mask as the start
    continues.
    """

    name: ClassVar[str] = "swap"
    capabilities: ClassVar[Capabilities] = Capabilities(
        start="needed",
        default_start="wanda",
        proves="1-swap",
        update=True,
        shared_budget=True,
        apart=True,
        note="best exchanges of one kept and one pruned",
    )

    kernel: str = option(
        "auto",
        "what does the steps; auto: numba on the CPU, triton on CUDA (torch where it is missing); "
        "literal: the paper's algorithm to the letter",
        choices=KERNELS,
    )
    max_swaps: int | None = option(
        None, "stop a row after so many; None: when 1-swap optimal", unit="swaps a row", least=0
    )

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        """Swap to a 1-swap optimum; see `Solver.run`.

        SolverError: a kernel that cannot run here, or one named for updated weights.
        """
        assert start is not None
        if problem.update is None:
            return transfer(problem, start, self._search, limits)
        if self.kernel != "auto":
            raise SolverError(
                f"swap: kernel {self.kernel!r} is for unchanged weights; updated ones take 'auto'"
            )
        return swap_refitted(problem, start, self.max_swaps, limits)

    def _search(
        self, problem: LayerProblem, start: Tensor, limits: Limits
    ) -> tuple[Solution, Callable[[], Offers]]:
        """Swap every row at the count of its mask; the rows' offers are made on request."""
        name, threads = _choose_kernel(self.kernel, problem), torch.get_num_threads()
        # compiled loops have threads of their own, from which those of torch, which wait by spinning,
        # would take the cores
        with torch_threads(1 if name == "numba" else None):
            solution = self._swapped(problem, start, name, threads, limits)
        return solution, partial(offers, problem, solution.mask)

    def _swapped(
        self, problem: LayerProblem, start: Tensor, name: str, threads: int, limits: Limits
    ) -> Solution:
        """Swap the rows in tiles that fit into the memory, smaller ones where a device runs out of it."""
        memory = max(2, limits.bytes(DEFAULT_MEMORY.get(problem.device.type, 2**30)))
        tile = max(1, min(problem.rows, memory // 2 // (_ROW_BYTES * problem.n)))
        solutions: list[Solution] = []
        first = 0
        while first < problem.rows:
            rows = slice(first, first + tile)

            def progress(done: int, before: int = first) -> None:
                limits.report(before + done, problem.rows)

            try:
                batch = Batch.of(problem.take(rows), start[rows])
                if name == "literal":
                    search = partial(refine_literally, memory=memory // 2)
                else:
                    search = partial(refine, kernel=make_kernel(name, batch, memory // 2, threads))
                search(
                    batch,
                    max_swaps=self.max_swaps,
                    deadline=limits.deadline,
                    progress=limits.on_progress and progress,
                )
            except torch.OutOfMemoryError:
                if tile == 1 and memory <= _LEAST_MEMORY:
                    raise
                tile, memory = max(1, tile // 2), max(2, memory // 2)
                torch.cuda.empty_cache()
                _log.warning("swap: out of memory on the device; going on with %d rows", tile)
                continue
            solutions.append(_solution(batch, name))
            first += tile
        joined: Solution = join_rows(solutions)
        return joined


def _solution(batch: Batch, kernel: str) -> Solution:
    trace = Trace(
        kernel=kernel,
        swaps=batch.swaps.cpu(),
        scans=batch.scans.cpu(),
        rounds=batch.rounds.cpu(),
        pairs=batch.priced.cpu(),
        history=torch.stack(batch.history, 1).cpu(),
    )
    objective = batch.objective.clamp(min=0.0) * batch.scale
    return searched(batch.kept, objective, batch.proven, trace)


def make_kernel(name: str, batch: Batch, memory: int, threads: int) -> Kernel:
    """Make the kernel of that name for a batch; `threads` are those of numba."""
    if name == "numba":
        return NumbaKernel(batch, threads)
    if name == "torch":
        return TorchKernel(batch, memory)
    from maskopt.solvers.swap.triton.steps import TritonKernel

    return TritonKernel(batch, memory=memory)


def _choose_kernel(kernel: str, problem: LayerProblem) -> str:
    on_cpu = problem.device.type == "cpu"
    if kernel == "auto":
        if on_cpu:
            return "numba"
        return "torch" if triton_unavailable(problem.device) else "triton"
    if kernel == "triton" and (missing := triton_unavailable(problem.device)):
        raise SolverError(
            f"swap: kernel 'triton' cannot run here: {missing}; or use kernel='torch'"
        )
    if kernel == "numba" and not on_cpu:
        raise SolverError(
            f"swap: kernel 'numba' runs on the CPU, not on {problem.device}; use kernel='torch'"
        )
    return kernel


def offers(problem: LayerProblem, mask: Bool[Tensor, "rows n"]) -> Offers:
    """Make the offers of the rows of a shared budget in f, float64.

    With c = G(w ⊙ pruned) (+ g), pruning a kept u costs w_u²G_uu + 2 w_u c_u, keeping a pruned p again saves
    2 w_p c_p − w_p²G_pp, and each moves the price of another j by 2 w_j w_u G_ju.
    """
    return Offers.joined([_offers_of_tile(part, mask[rows]) for rows, part in problem.tiles(_ROWS)])


def _offers_of_tile(problem: LayerProblem, mask: Tensor) -> Offers:
    w = problem.weight.double()
    twice = 2 * w * (problem.products(torch.where(mask, 0.0, w)) + problem.correlation)
    square = w.square() * problem.gram.diagonal().double()
    made = Offers.none(problem.rows, mask.device)
    price = (square + twice).masked_fill(~mask, torch.inf)
    _list_cheapest(problem, price, made.removals, made.costs)
    # the price of a return is its gain, negative
    price = (square - twice).masked_fill(mask, torch.inf)
    _list_cheapest(problem, price, made.returns, made.gains.neg_())
    made.gains.neg_()
    return made


def _list_cheapest(problem: LayerProblem, price: Tensor, inputs: Tensor, prices: Tensor) -> None:
    """List the cheapest input of every row, again and again, among the inputs that are cheapest at first."""
    first = price.topk(min(OFFERED, problem.n), 1, largest=False)
    value, index = first.values.clone(), first.indices
    w = problem.weight.double().gather(1, index)
    cross = problem.gram[index[:, :, None], index[:, None, :]].double()
    cross *= 2 * w[:, :, None] * w[:, None, :]
    rows = torch.arange(problem.rows, device=price.device)
    for step in range(index.shape[1]):
        cheapest = value.min(1)
        finite = cheapest.values < torch.inf
        if not bool(finite.any()):
            return
        inputs[finite, step] = index[rows, cheapest.indices][finite]
        prices[finite, step] = cheapest.values[finite]
        value += cross[rows, cheapest.indices]
        value[rows, cheapest.indices] = torch.inf
