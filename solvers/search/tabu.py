"""Tabu search: the best swap is made even where it costs, so that the search leaves 1-swap optima.

A move exchanges one kept and one pruned input, the best pair that is not tabu (`tabu_kernel`). Both then stay
for `tenure` to 3/2·`tenure` moves, so that the search climbs out of its optimum (Glover, 1989). After
`patience` moves without a new best mask a row returns to its best one and holds random inputs for a while.
The search is float32 with c from scratch every SCRATCH moves. Results are compared and reported in float64.
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
from maskopt.solvers.search.tabu_kernel import MovePlan, make_moves
from maskopt.solvers.swap import Swap

#: moves between two entries of the history, and of a row between two looks at the clock
ROUND = 256
#: moves between two computations of c from scratch, a multiple of ROUND
SCRATCH = 4 * ROUND
#: rows between two looks at the clock
_TILE = 128
#: default tenure for N:M; for a single group its least value, and inputs per move more: best of 5 … 20 on
#: real layers
_TENURE_NM = 15
_TENURE_LEAST, _INPUTS_PER_TENURE = 3, 160
#: a default tenure holds at most one input in 4, a restart one in 10
_TENURE_SHARE, _HELD = 4, 10
#: share of a time limit that the search may use; `swap` has the rest
SEARCH_SHARE = 0.9
#: the search's clock counts moves in 32 bits, and it holds one list per move of the longest tenure
_MOST_MOVES, _MOST_TENURE = 10**9, 10**6
#: largest entries of G between which float32 has room for products of three factors
_ORDINARY = 1e-9, 1e9


@dataclass(frozen=True)
class Tabu(Solver):
    """Tabu search by pair exchange, then 1-swap search to a proven 1-swap optimum.

    The result never costs more than the start. The search runs on the CPU, also for a problem on another
    device. Tenures and restarts of every row have the same seed, so that a row's result does not depend on
    its batch.
    """

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

    def plan(self, problem: LayerProblem) -> MovePlan:
        """Return the rules of tenures and restarts for this problem."""
        n, group = problem.n, problem.group_size
        tenure = self.tenure
        if tenure is None:
            tenure = _TENURE_NM if group < n else _TENURE_LEAST + n // _INPUTS_PER_TENURE
            tenure = max(1, min(tenure, n // _TENURE_SHARE))
        return MovePlan(
            group=group,
            moves=ROUND,
            scratch=True,
            tenure=tenure,
            spread=tenure // 2,
            patience=self.patience,
            held=max(1, n // _HELD),
        )


def then_swapped(
    problem: LayerProblem,
    mask: Tensor,
    start: Tensor,
    limits: Limits,
    trace: Trace,
    watch: Stopwatch,
) -> Solution:
    """Refine the masks of a search, or the start where that costs no more, to 1-swap optima."""
    better = problem.objective(mask) < problem.objective(start)
    mask = torch.where(better[:, None], mask, start)
    trace = replace(trace, search_seconds=watch.lap())
    refined = Swap().run(problem, mask, limits)
    trace = replace(trace, swaps=refined.trace.swaps, swap_seconds=watch.lap())
    return replace(refined, trace=trace)


class _State(NamedTuple):
    """The state of all rows of a search.

    Attributes:
        square, slope: float32 [rows, n], x²G_jj, and 2xc (+ linear).
        pruned, best: uint8 [rows, n], the current and the best mask, 1 = pruned.
        expiry: int32 [rows, n], the move at which an input may be moved again.
        random: uint64 [rows, 1], the state of the generator.
        clock: int64 [rows, 3]: all moves, those up to the best mask, and whether the first descent is over.
        values: float64 [rows, 2], the current and the best objective.
        moves: int64 [rows], the moves after the first descent.
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
    def of(cls, scaled: ScaledRows, pruned: Tensor, seed: int) -> _State:
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
    problem: LayerProblem,
    start: Tensor,
    tabu: Tabu,
    limits: Limits,
    scaled: ScaledRows | None = None,
) -> tuple[Bool[Tensor, "rows n"], Trace]:
    """Move inputs until every row made `tabu.moves` moves, or until the time limit.

    Returns the best masks and their trace. `scaled`: the rows of the problem, where they are at hand.
    """
    scaled = ScaledRows.of(problem) if scaled is None else scaled
    state = _State.of(scaled, ~start, limits.seed)
    plan, threads = tabu.plan(problem), RowThreads()
    start_objective = problem.objective(start)
    best = start_objective.cpu().clone()
    rounds = torch.zeros(problem.rows, dtype=torch.int64)
    history: list[Tensor] = []
    for done in range(0, tabu.moves, ROUND):
        if limits.expired:
            break
        moves = min(ROUND, tabu.moves - done)
        plan = plan._replace(moves=moves, scratch=done % SCRATCH == 0)
        for tile in torch.arange(problem.rows).split(_TILE):
            if limits.expired:
                break
            rows = tile.numpy()
            threads.run(make_moves, rows, scaled, state, plan)
            rounds[tile] += 1
            best[tile] = torch.from_numpy(state.values[rows, 1] * scaled.scale[rows])
        history.append(best.clone())
        limits.report(0, problem.rows, "moves", done + moves, tabu.moves)
    late = (rounds * ROUND < tabu.moves).tolist()
    trace = Trace(
        moves=torch.from_numpy(state.moves),
        rounds=rounds,
        start_objective=start_objective,
        history=torch.stack(history, 1) if history else best[:, None][:, :0],
        stopped=tuple("yes" if row else "no" for row in late),
    )
    return torch.from_numpy(state.best == 0).to(problem.device), trace


class ScaledRows(NamedTuple):
    """The rows of a problem in units that suit float32: Σ x²G_jj = 1 in every row.

    Attributes:
        x, gram: float32 [rows, n] and [n, n].
        linear, constant: float32 [rows, n] and float64 [rows], 2x⊙g and c of the linear part, or 0.
        scale: float64 [rows], the objective per unit.
    """

    x: np.ndarray
    gram: np.ndarray
    linear: np.ndarray
    constant: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, problem: LayerProblem) -> ScaledRows:
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

    def repeated(self, count: int) -> ScaledRows:
        """Repeat every row `count` times, one after the other."""
        names = ("x", "linear", "constant", "scale")
        return self._replace(**{name: getattr(self, name).repeat(count, 0) for name in names})
