"""Tabu search: best swaps that are made even when they cost, out of 1-swap optima.

A move exchanges one kept and one pruned input, the best that is not tabu (see `tabu_kernel` for which
pairs it looks at); both then stay where they are for `tenure` to 3/2·`tenure` moves, so that the search
climbs out of its optimum instead of falling back (Glover, 1989; with pair exchange the classical
strong heuristic for diversity and k-cluster problems, which this is). After `patience` moves without a
new best mask a row returns to its best one and holds random inputs for a while, which sends it
elsewhere. The best mask ever seen is kept (anytime, monotone), and `swap` ends the run with its proof.

The search is float32 with c from scratch every SCRATCH moves; what is compared and reported is float64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from maskopt.errors import OptionError
from maskopt.problem import LayerProblem
from maskopt.solution import Solution
from maskopt.solver import Capabilities
from maskopt.solvers.greedy.scores import WandaSolver
from maskopt.solvers.swap import SwapSolver

#: moves between two entries of the history
ROUND = 256
#: moves between two computations of c from scratch, a multiple of ROUND
SCRATCH = 4 * ROUND
#: rows between two looks at the clock
_TILE = 128
#: tenure where groups are many: the best of 5 … 20 on real layers, as the one above for a single group
_TENURE_NM = 15
#: share of a time limit that the search may use; `swap` has the rest
_SEARCH_SHARE = 0.9


class TabuSolver:
    """Runs on the CPU; a problem on another device is copied there and the mask back."""

    name = "tabu"
    capabilities = Capabilities(
        proves="1-swap", note="tabu search by pair exchange, on the CPU, then swap"
    )
    default_warm_start: str | None = "relax"

    def unavailable(self) -> str | None:
        return None

    def solve(
        self,
        problem: LayerProblem,
        *,
        warm_start: Tensor | None = None,
        moves: int = 1000,
        tenure: int | None = None,
        patience: int = 300,
        time_limit: float | None = None,
        seed: int = 0,
        memory_limit: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Solution:
        """Search every row for `moves` moves beyond its first local optimum.

        Args:
            warm_start: bool [rows, n]; never ends above it. Wanda's mask where none is given.
            moves: per row.
            tenure: least number of moves an input stays put; 3 + n/160 where not given, 15 for N:M.
            patience: moves without a new best mask after which a row restarts from it; 0: never.
            time_limit: seconds, for the search and the swaps after it; the best masks so far count.
            seed: of tenures and restarts. The same for every row, so that a row's result does not
                depend on the batch it is in.
            memory_limit: handed to `swap`.
            on_progress: called with (moves made of all rows, moves in all).

        `trace`: moves (per row), history (sum of the rows' objectives after each round, float32
        accuracy), start_objective, search_seconds, swaps (made by the final `swap`).
        """
        if moves < 0 or patience < 0 or (tenure is not None and tenure < 1):
            raise OptionError("tabu: moves ≥ 0, patience ≥ 0 and tenure ≥ 1")
        if time_limit is not None and not time_limit >= 0:
            raise OptionError(f"tabu: time_limit must be at least 0 seconds, not {time_limit}")
        began = time.monotonic()
        start = warm_start if warm_start is not None else WandaSolver().solve(problem).mask
        if tenure is None:
            tenure = _TENURE_NM if problem.group_size < problem.n else 3 + problem.n // 160
            tenure = max(1, min(tenure, problem.n // 4))
        limit = math.inf if time_limit is None else began + _SEARCH_SHARE * time_limit
        found, made, history = _search(
            problem, start, moves, tenure, patience, seed, limit, on_progress
        )
        start_objective = problem.objective(start)
        better = problem.objective(found) < start_objective
        mask = torch.where(better[:, None], found, start)
        search_seconds = time.monotonic() - began
        left = None if time_limit is None else max(0.0, began + time_limit - time.monotonic())
        refined = SwapSolver().solve(
            problem, warm_start=mask, time_limit=left, memory_limit=memory_limit
        )
        return Solution.of(
            problem,
            refined.mask,
            solver=self.name,
            status=refined.status,
            seconds=time.monotonic() - began,
            trace={
                "moves": made,
                "history": history,
                "start_objective": start_objective,
                "search_seconds": search_seconds,
                "swaps": refined.trace["swaps"],
            },
        )


def _search(
    problem: LayerProblem,
    start: Tensor,
    moves: int,
    tenure: int,
    patience: int,
    seed: int,
    limit: float,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[Tensor, int, list[float]]:
    """The best masks, the moves made by every row, and Σ objective after each round."""
    from maskopt.solvers.search.tabu_kernel import search

    rows, n = problem.rows, problem.n
    x, gram, scale = _scaled(problem)
    square = np.square(x) * np.diagonal(gram)
    pruned = (~start).cpu().numpy().astype(np.uint8)
    best = pruned.copy()
    expiry = np.zeros((rows, n), np.int32)
    state = np.full((rows, 1), seed % 2**64, np.uint64)
    clock = np.zeros((rows, 3), np.int64)
    slope = np.empty((rows, n), np.float32)
    values = np.zeros((rows, 2))  # now, and the best
    history: list[float] = []
    made = 0
    while made < moves and time.monotonic() < limit:
        step = min(ROUND, moves - made)
        for first in range(0, rows, _TILE):
            if time.monotonic() >= limit:
                break
            tile = slice(first, first + _TILE)
            search(
                x[tile],
                gram,
                square[tile],
                pruned[tile],
                best[tile],
                expiry[tile],
                state[tile],
                clock[tile],
                slope[tile],
                values[tile],
                problem.group_size,
                step,
                made % SCRATCH == 0,
                tenure,
                tenure // 2,
                patience,
                max(1, n // 10),
            )
        made += step
        history.append(float((values[:, 1] * scale).sum()))
        if on_progress is not None:
            on_progress(made * rows, moves * rows)
    return torch.from_numpy(best == 0).to(problem.device), made, history


def _scaled(problem: LayerProblem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows scaled to Σ x²G_jj = 1 in float32, G in float32, and the factor back to objectives."""
    gram = problem.gram.cpu()
    peak = float(gram.diagonal().max())
    if peak > 0 and not 1e-9 < peak < 1e9:
        gram = gram.double() / peak
    weight = problem.weight.cpu().double()
    size = weight.abs().amax(1, keepdim=True)
    weight = weight / size.where(size > 0, 1.0)
    mass = weight.square() @ gram.diagonal().double()
    root = mass.where(mass > 0, 1.0).sqrt()
    factor = (root * size[:, 0]).square() * (peak if peak > 0 and not 1e-9 < peak < 1e9 else 1.0)
    x = (weight / root[:, None]).float().contiguous().numpy()
    return x, gram.float().contiguous().numpy(), factor.numpy()
