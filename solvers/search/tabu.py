"""Tabu search: best swaps that are made even when they cost, out of 1-swap optima.

A move exchanges one kept and one pruned input, the best pair that is not tabu (`tabu_kernel`). Both then stay
for `tenure` to 3/2·`tenure` moves, so that the search climbs out of its optimum (Glover, 1989). After
`patience` moves without a new best mask a row returns to its best one and holds random inputs for a while.
The search is float32 with c from scratch every SCRATCH moves; results are compared and reported in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities, Solver
from maskopt.protocol.trace import Stopwatch, Trace
from maskopt.solvers.kernels import RowThreads
from maskopt.solvers.search.tabu_kernel import Plan, search_rows
from maskopt.solvers.swap import Swap

#: moves between two entries of the history, and of a row between two looks at the clock
ROUND = 256
#: moves between two computations of c from scratch, a multiple of ROUND
SCRATCH = 4 * ROUND
#: rows between two looks at the clock
_TILE = 128
#: tenure of many groups; least one of a single group, and its growth in n: best of 5 … 20 on real layers
_TENURE_NM = 15
_TENURE_LEAST, _INPUTS_PER_TENURE = 3, 160
#: a tenure by default holds at most one in so many of the inputs
_TENURE_SHARE = 4
#: a restart holds one input in so many
_HELD = 10
#: share of a time limit that the search may use; `swap` has the rest
SEARCH_SHARE = 0.9
#: the search's clock counts moves in 32 bits, and it holds one list per move of the longest tenure
_MOST_MOVES, _MOST_TENURE = 10**9, 10**6
#: largest entries of G between which float32 has room for products of three factors
_ORDINARY = 1e-9, 1e9


@dataclass(frozen=True)
class Tabu(Solver):
    """Tabu search by pair exchange, then 1-swap search to a proven 1-swap optimum, never above the start.
    Runs on the CPU, also for a problem on another device. Tenures and restarts of every row have the same
    seed, so that a row's result does not depend on its batch."""

    name: ClassVar[str] = "tabu"
    capabilities: ClassVar[Capabilities] = Capabilities(
        start="needed",
        default_start="relax",
        proves="1-swap",
        note="tabu search by pair exchange, on the CPU, then swap",
    )

    moves: int = option(
        1000, "moves beyond the first local optimum", unit="moves a row", least=0, most=_MOST_MOVES
    )
    tenure: int | None = option(
        None,
        "least number of moves that an input stays put; None: 3 + n/160, or 15 for N:M",
        unit="moves",
        least=1,
        most=_MOST_TENURE,
    )
    patience: int = option(
        300,
        "moves without a new best mask after which a row restarts from it; 0: never",
        unit="moves",
        least=0,
    )

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        assert start is not None
        watch = Stopwatch(problem.rows)
        mask, trace = search(problem, start, self, limits.share(SEARCH_SHARE))
        refined = then_swapped(problem, mask, start, limits, trace, watch)
        return Solution.of(problem, refined.mask, status=refined.status, trace=refined.trace)


def then_swapped(
    problem: LayerProblem,
    mask: Tensor,
    start: Tensor,
    limits: Limits,
    trace: Trace,
    watch: Stopwatch,
) -> Solution:
    """1-swap optima from the masks that a search found, or from the start where that costs no more."""
    better = problem.objective(mask) < problem.objective(start)
    mask = torch.where(better[:, None], mask, start)
    trace = replace(trace, search_seconds=watch.lap())
    refined = Swap().run(problem, mask, limits)
    trace = replace(trace, swaps=refined.trace.swaps, swap_seconds=watch.lap())
    return replace(refined, trace=trace)


class _State(NamedTuple):
    """Where the rows of a search stand.

    Attributes:
        square, slope: float32 [rows, n], x²G_jj, and 2xc (+ linear).
        pruned, best: uint8 [rows, n], now and at the best, 1 = pruned.
        expiry: int32 [rows, n], the move at which an input may be moved again.
        random: uint64 [rows, 1].
        clock: int64 [rows, 3]: moves so far, of these at the best mask, whether the first descent is over.
        values: float64 [rows, 2], the objective now and the best.
        moves: int64 [rows], the counted moves.
    """

    square: np.ndarray
    pruned: np.ndarray
    best: np.ndarray
    expiry: np.ndarray
    random: np.ndarray
    clock: np.ndarray
    slope: np.ndarray
    values: np.ndarray
    moves: np.ndarray

    @classmethod
    def of(cls, scaled: Scaled, pruned: Tensor, seed: int) -> _State:
        x, (rows, n) = scaled.x, scaled.x.shape
        flags = pruned.cpu().numpy().astype(np.uint8)
        return cls(
            square=np.square(x) * np.diagonal(scaled.gram),
            pruned=flags,
            best=flags.copy(),
            expiry=np.zeros((rows, n), np.int32),
            random=np.full((rows, 1), seed, np.uint64),
            clock=np.zeros((rows, 3), np.int64),
            slope=np.empty((rows, n), np.float32),
            values=np.zeros((rows, 2)),
            moves=np.zeros(rows, np.int64),
        )


def search(
    problem: LayerProblem, start: Tensor, plan: Tabu, limits: Limits, scaled: Scaled | None = None
) -> tuple[Bool[Tensor, "rows n"], Trace]:
    """The best masks after `plan.moves` moves of every row, or the time limit, and their trace."""
    rows, grouped, tenure = problem.rows, problem.group_size < problem.n, plan.tenure
    if tenure is None:
        tenure = _TENURE_NM if grouped else _TENURE_LEAST + problem.n // _INPUTS_PER_TENURE
        tenure = max(1, min(tenure, problem.n // _TENURE_SHARE))
    scaled = Scaled.of(problem) if scaled is None else scaled
    state = _State.of(scaled, ~start, limits.seed)
    threads = RowThreads()
    start_objective = problem.objective(start)
    best = start_objective.cpu().clone()
    rounds = torch.zeros(rows, dtype=torch.int64)
    history: list[Tensor] = []
    planned = 0
    while planned < plan.moves and not limits.expired:
        step = min(ROUND, plan.moves - planned)
        scratch, held = planned % SCRATCH == 0, max(1, problem.n // _HELD)
        spread = tenure // 2
        moves = Plan(problem.group_size, step, scratch, tenure, spread, plan.patience, held)
        for tile in torch.arange(rows).split(_TILE):
            if limits.expired:
                break
            some = tile.numpy()
            threads.run(search_rows, some, scaled, state, moves)
            rounds[tile] += 1
            best[tile] = torch.from_numpy(state.values[some, 1] * scaled.scale[some])
        planned += step
        history.append(best.clone())
        limits.report(0, rows, "moves", planned, plan.moves)
    late = (rounds * ROUND < plan.moves).tolist()
    trace = Trace(
        moves=torch.from_numpy(state.moves),
        rounds=rounds,
        start_objective=start_objective,
        history=torch.stack(history, 1) if history else best[:, None][:, :0],
        stopped=tuple("yes" if row else "no" for row in late),
    )
    return torch.from_numpy(state.best == 0).to(problem.device), trace


class Scaled(NamedTuple):
    """A problem in units in which float32 does: Σ x²G_jj = 1 in every row. `linear` and `constant`, float32
    [rows, n] and float64 [rows]: 2x⊙g and the constant of the linear part, or 0; `scale`, float64 [rows],
    leads back to objectives."""

    x: np.ndarray
    gram: np.ndarray
    linear: np.ndarray
    constant: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, problem: LayerProblem) -> Scaled:
        gram = problem.gram.cpu()
        peak = float(gram.diagonal().max())
        if peak <= 0 or _ORDINARY[0] < peak < _ORDINARY[1]:
            peak = 1.0
        else:
            gram = gram.double() / peak
        weight = problem.weight.cpu().double()
        size = weight.abs().amax(1, keepdim=True)
        weight = weight / size.where(size > 0, 1.0)
        mass = weight.square() @ gram.diagonal().double()
        root = mass.where(mass > 0, 1.0).sqrt()
        factor = (root * size[:, 0]).square() * peak
        x = weight / root[:, None]
        unit = (root * size.where(size > 0, 1.0)[:, 0] * peak)[:, None]
        linear = 2 * x * (problem.correlation.cpu() / unit)
        constant = problem.constant.cpu() / factor.where(factor > 0, 1.0)
        return cls(
            x.float().contiguous().numpy(),
            gram.float().contiguous().numpy(),
            linear.float().numpy(),
            constant.numpy(),
            factor.numpy(),
        )

    def repeated(self, count: int) -> Scaled:
        """Every row so many times, one after the other."""
        x, linear = (np.repeat(part, count, 0) for part in (self.x, self.linear))
        return Scaled(x, self.gram, linear, self.constant.repeat(count), self.scale.repeat(count))
