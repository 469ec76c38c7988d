"""Beyond one exchange: compounds of two 1-swaps, exact among candidates.

Write a 1-swap of kept u against pruned q as the step d = e_u − e_q of p. Two steps on four different
inputs, made together, change f by

    Δ(d₁) + Δ(d₂) + 2 d₁ᵀQd₂,     d₁ᵀQd₂ = Q_{u₁u₂} − Q_{u₁q₂} − Q_{q₁u₂} + Q_{q₁q₂}

so each may be bad alone and both good together: a way out of 1-swap optima. For N:M each step stays inside
its group, and the two may lie in different groups. All pairs of CANDIDATES² steps are tried: for an
unstructured row the exchanges of the kept of least a with the pruned of least b, for N:M the legal steps of
least Δ. Rounds alternate with 1-swap search until neither finds anything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numba
import numpy as np
import torch
from torch import Tensor

from maskopt.errors import OptionError
from maskopt.problem import LayerProblem
from maskopt.solution import Solution, Status
from maskopt.solver import Capabilities
from maskopt.solvers.swap import SwapSolver
from maskopt.solvers.swap.batch import Batch
from maskopt.solvers.swap.literal import refresh

#: kept, and pruned, inputs whose exchanges are combined
CANDIDATES = 16
#: compound moves of a row between two 1-swap searches
_MOVES_A_ROUND = 64
_REFRESH_BYTES = 2**28


class KSwapSolver:
    """2-swap local search in candidates, ending at proven 1-swap optima.

    A row that is SWAP_OPTIMAL here is also free of improving compounds of two steps out of its
    candidate steps; `trace["neighbourhood"]` says so in words.
    """

    name = "kswap"
    capabilities = Capabilities(
        devices=("cpu",), proves="1-swap", note="compounds of two exchanges, exact among candidates"
    )
    default_warm_start: str | None = "swap"

    def unavailable(self) -> str | None:
        return None

    def solve(
        self,
        problem: LayerProblem,
        *,
        warm_start: Tensor | None = None,
        candidates: int = CANDIDATES,
        time_limit: float | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Solution:
        """Never above the start.

        Args:
            candidates: K; work and memory of a round grow with K⁴ and K².
            time_limit: seconds; rows that are not done by then are FEASIBLE, or SWAP_OPTIMAL
                where the last 1-swap search proved them so.
            on_progress: called with (rows done, rows).

        `trace`: `moves` (compound moves) per row, `rounds`, `neighbourhood`.
        """
        if not 2 <= candidates <= 64:
            raise OptionError(f"kswap: candidates must lie in 2 … 64, not {candidates}")
        deadline = math.inf if time_limit is None else time.monotonic() + time_limit
        swap = SwapSolver()
        first = swap.solve(problem, warm_start=warm_start, time_limit=time_limit)
        mask, proven = first.mask.clone(), _proven(first)
        moves = torch.zeros(problem.rows, dtype=torch.long)
        active = torch.arange(problem.rows)
        rounds = 0
        while len(active) and time.monotonic() < deadline:
            part = problem.take(active)
            kept, made = compound_moves(part, mask[active], candidates)
            moves[active] += made
            active = active[made > 0]
            rounds += 1
            if len(active):
                moved = made > 0
                mask[active] = kept[moved]
                left = None if time_limit is None else max(0.0, deadline - time.monotonic())
                again = swap.solve(problem.take(active), warm_start=mask[active], time_limit=left)
                mask[active], proven[active] = again.mask, _proven(again)
            if on_progress is not None:
                on_progress(problem.rows - len(active), problem.rows)
        return Solution.of(
            problem,
            mask,
            solver=self.name,
            status=[Status.SWAP_OPTIMAL if p else Status.FEASIBLE for p in proven.tolist()],
            trace={
                "moves": moves,
                "rounds": rounds,
                "neighbourhood": (
                    f"all 1-swaps, and all compounds of two out of {candidates}² candidate 1-swaps"
                    + ("" if not len(active) else f"; {len(active)} rows stopped at the time limit")
                ),
            },
        )


def _proven(solution: Solution) -> Tensor:
    return torch.tensor([status is Status.SWAP_OPTIMAL for status in solution.status])


def compound_moves(
    problem: LayerProblem, mask: Tensor, candidates: int = CANDIDATES
) -> tuple[Tensor, Tensor]:
    """Make improving compounds until none is left among the candidates (or a round is full).

    Returns masks bool [rows, n] and the number of moves int64 [rows].
    """
    batch = Batch.of(problem, mask)
    refresh(batch, torch.arange(batch.rows), _REFRESH_BYTES)
    kept = batch.kept.numpy()
    made = _search(
        batch.x.numpy(),
        batch.gram.numpy(),
        kept,
        batch.c.numpy(),
        batch.group,
        candidates,
        batch.threshold().numpy(),
        _MOVES_A_ROUND,
    )
    return torch.from_numpy(kept), torch.from_numpy(made)


@numba.njit(parallel=True, cache=True)
def _search(x, gram, kept, c, group, candidates, threshold, most):  # type: ignore[no-untyped-def]
    rows = x.shape[0]
    made = np.zeros(rows, dtype=np.int64)
    for row in numba.prange(rows):
        made[row] = _search_row(
            x[row], gram, kept[row], c[row], group, candidates, threshold[row], most
        )
    return made


@numba.njit(cache=True)
def _search_row(x, gram, kept, c, group, candidates, threshold, most):  # type: ignore[no-untyped-def]
    limit = candidates * candidates
    us = np.empty(limit, dtype=np.int64)
    qs = np.empty(limit, dtype=np.int64)
    deltas = np.empty(limit)
    for move in range(most):
        if group == x.shape[0]:
            count = _exchanges(x, gram, kept, c, candidates, us, qs, deltas)
        else:
            count = _group_steps(x, gram, kept, c, group, us, qs, deltas)
        first, second = _best_compound(x, gram, us, qs, deltas, count, threshold)
        if first < 0:
            return move
        for step in (first, second):
            u, q = us[step], qs[step]
            kept[u], kept[q] = False, True
            for j in range(x.shape[0]):
                c[j] += x[u] * gram[u, j] - x[q] * gram[q, j]
    return most


@numba.njit(cache=True)
def _price(x, gram, c, j, kept):  # type: ignore[no-untyped-def]
    """a of a kept input, b of a pruned one."""
    own = x[j] * x[j] * gram[j, j]
    return own + 2 * x[j] * c[j] if kept else own - 2 * x[j] * c[j]


@numba.njit(cache=True)
def _least(x, gram, kept, c, side, chosen, values):  # type: ignore[no-untyped-def]
    """The inputs of one side with the least price, ascending, ties by index; how many."""
    count = 0
    for j in range(x.shape[0]):
        if kept[j] != side:
            continue
        value = _price(x, gram, c, j, side)
        if count == len(chosen) and value >= values[count - 1]:
            continue
        at = count if count < len(chosen) else count - 1
        while at > 0 and values[at - 1] > value:
            chosen[at], values[at] = chosen[at - 1], values[at - 1]
            at -= 1
        chosen[at], values[at] = j, value
        count = min(count + 1, len(chosen))
    return count


@numba.njit(cache=True)
def _exchanges(x, gram, kept, c, candidates, us, qs, deltas):  # type: ignore[no-untyped-def]
    """All exchanges of the kept of least a with the pruned of least b."""
    chosen = np.empty((2, candidates), dtype=np.int64)
    values = np.empty((2, candidates))
    keep = _least(x, gram, kept, c, True, chosen[0], values[0])
    drop = _least(x, gram, kept, c, False, chosen[1], values[1])
    count = 0
    for i in range(keep):
        for k in range(drop):
            u, q = chosen[0, i], chosen[1, k]
            us[count], qs[count] = u, q
            deltas[count] = values[0, i] + values[1, k] - 2 * x[u] * x[q] * gram[u, q]
            count += 1
    return count


@numba.njit(cache=True)
def _group_steps(x, gram, kept, c, group, us, qs, deltas):  # type: ignore[no-untyped-def]
    """The legal steps of least Δ over all groups, ascending."""
    count = 0
    for first in range(0, x.shape[0], group):
        for u in range(first, first + group):
            if not kept[u]:
                continue
            a = _price(x, gram, c, u, True)
            for q in range(first, first + group):
                if kept[q]:
                    continue
                delta = a + _price(x, gram, c, q, False) - 2 * x[u] * x[q] * gram[u, q]
                if count == len(us) and delta >= deltas[count - 1]:
                    continue
                at = count if count < len(us) else count - 1
                while at > 0 and deltas[at - 1] > delta:
                    us[at], qs[at], deltas[at] = us[at - 1], qs[at - 1], deltas[at - 1]
                    at -= 1
                us[at], qs[at], deltas[at] = u, q, delta
                count = min(count + 1, len(us))
    return count


@numba.njit(cache=True)
def _best_compound(x, gram, us, qs, deltas, count, threshold):  # type: ignore[no-untyped-def]
    """The pair of steps on four different inputs that lowers f most, or (−1, −1)."""
    best = -threshold
    first = second = -1
    for i in range(count):
        u, q = us[i], qs[i]
        for k in range(i):
            v, r = us[k], qs[k]
            if u == v or q == r:
                continue
            cross = x[u] * (x[v] * gram[u, v] - x[r] * gram[u, r])
            cross -= x[q] * (x[v] * gram[q, v] - x[r] * gram[q, r])
            delta = deltas[i] + deltas[k] + 2 * cross
            if delta < best:
                best, first, second = delta, i, k
    return first, second
