"""Memetic search: good masks of a row are crossed, and every child is searched.

A child keeps what both parents keep and prunes what both prune, and keeps random others up to its pattern's
count; then follows tabu search for unchanged weights, 1-swap search on F for updated ones. A pool holds the
best masks that differ enough from each other (Moscato 1989; for the choice of a set of given size Wu and Hao,
"A hybrid metaheuristic approach to solving the maximum diversity problem", 2013).

Rows share the random numbers alone. With a shared budget each is searched at its count in the start, and
`swap` moves counts between rows at the end. The pool is ordered by the objectives of the searches, for tabu
search of float32 accuracy; the answer is compared in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskopt.core.fields import option
from maskopt.core.files import join_rows, take_rows
from maskopt.core.limits import Limits
from maskopt.core.pattern import Unstructured
from maskopt.core.problem import LayerProblem
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities, Solver
from maskopt.protocol.trace import Stopwatch, Trace
from maskopt.solvers.greedy.scores import highest
from maskopt.solvers.search.tabu import SEARCH_SHARE, Scaled, Tabu, search, then_swapped
from maskopt.solvers.shared_budget import by_count
from maskopt.solvers.swap import Swap

#: rows at a time: with their children enough for many threads
_TILE = 16
#: bytes of an entry of a mask of a pool, or of a searched child; for all, unless the caller sets a limit
_ENTRY_BYTES, _MEMORY = 64, 2**30
#: shares of the inputs that may change places, in the first masks of a pool
_SHAKEN = 0.05, 1.0
#: and, whatever the parents have, in a child
_CHANCE = 0.01
#: masks of a pool differ in one exchange for so many inputs
_INPUTS_APART = 50
#: of tabu search of a child
_PATIENCE = 300


@dataclass(frozen=True)
class Memetic(Solver):
    """Crossing of masks, a search of every child, then 1-swap search to a proven 1-swap optimum, never above
    the start. Tabu search of children runs on the CPU, 1-swap search on F on the problem's device. The
    history of the `Trace` has the best of the first pool and of every generation."""

    name: ClassVar[str] = "memetic"
    capabilities: ClassVar[Capabilities] = Capabilities(
        start="needed",
        default_start="relax",
        proves="1-swap",
        update=True,
        shared_budget=True,
        note="masks are crossed, each child searched (tabu; refitted: 1-swap), then swap: the best masks",
    )

    generations: int = option(100, "of children", least=0, most=10**6)
    children: int = option(8, "of a generation", least=1, most=1000)
    pool: int = option(12, "masks that are kept to be crossed", least=2, most=1000)
    moves: int = option(
        1000, "of tabu search, or swaps of updated weights, of every child", least=1, most=10**9
    )

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        assert start is not None
        watch = Stopwatch(problem.rows)
        masks = 2 * self.pool + max(self.children, self.pool)
        fit = limits.bytes(_MEMORY) // (_ENTRY_BYTES * problem.n * masks)
        most = max(1, min(_TILE, fit))
        tiles = [tile for rows in by_count(start.cpu()) for tile in rows.split(most)]
        share, pools, rows_done = limits.share(SEARCH_SHARE).quiet(), [], 0
        for done, tile in enumerate(tiles):
            own = share.share(1 / (len(tiles) - done))
            # rows of a shared budget prune as many here as in the start
            alone = Unstructured(keep=int(start[tile[0]].sum()))
            pattern = alone if problem.shared_budget else problem.pattern
            pool = _Pool(problem.take(tile).under(pattern), start[tile].cpu(), self, own)
            for generation in self._evolve(pool, own.seed):
                step = "generations", generation, self.generations
                limits.report(rows_done, problem.rows, *step)
            rows_done += len(tile)
            pools.append(pool)
        limits.report(problem.rows, problem.rows)
        order = torch.cat(tiles).argsort()
        found = torch.cat([pool.masks[:, 0] for pool in pools])[order].to(problem.device)
        trace = take_rows(join_rows([pool.trace() for pool in pools]), order)
        return then_swapped(problem, found, start, limits, trace, watch)

    def _evolve(self, pool: _Pool, seed: int) -> Iterator[int]:
        """The main loop, of the rows of a tile at once; reports every generation, 0 being the first pool."""
        generator = torch.Generator().manual_seed(seed)
        n = pool.masks.shape[-1]
        share = torch.linspace(*_SHAKEN, self.pool - 1)[:, None]
        shaken = torch.rand(self.pool - 1, n, generator=generator) < share
        keys = torch.rand(self.pool - 1, n, generator=generator)
        others = pool.completed(pool.masks[:, 1:] & ~shaken, shaken, keys)
        masks = torch.cat([pool.masks[:, :1], others], 1)
        for generation in range(self.generations + 1):
            if pool.limits.expired:
                break
            pool.grow(masks)
            yield generation
            first = torch.randint(self.pool, (self.children,), generator=generator)
            apart = torch.randint(1, self.pool, (self.children,), generator=generator)
            keys = torch.rand(self.children, n, generator=generator)
            one, two = pool.masks[:, first], pool.masks[:, (first + apart) % self.pool]
            chance = torch.rand(self.children, n, generator=generator) < _CHANCE
            masks = pool.completed(one & two & ~chance, (one ^ two) | chance, keys)


class _Pool:
    """The best masks of the rows of a tile, unlike each other: bool [rows, pool, n], the best first."""

    def __init__(self, problem: LayerProblem, start: Tensor, plan: Memetic, limits: Limits) -> None:
        self._problem, self._plan, self.limits = problem, plan, limits
        self._scaled = None if problem.update else Scaled.of(problem)
        self.masks = start[:, None].expand(-1, plan.pool, -1)
        self._start_objective = problem.objective(start.to(problem.device)).cpu()
        self._values = self._start_objective[:, None].expand(-1, plan.pool)
        self._moves = torch.zeros(problem.rows, dtype=torch.int64)
        self._history = [self._start_objective]

    def completed(
        self,
        kept: Bool[Tensor, "rows count n"],
        free: Bool[Tensor, "*rows count n"],
        keys: Float[Tensor, "count n"],
    ) -> Bool[Tensor, "rows count n"]:
        """Masks that keep what is kept and, of what is free, the greatest keys, as many as the pattern asks
        for."""
        group = self._problem.group_size
        score = (2 * kept + free * keys).unflatten(-1, (-1, group))
        return highest(score, group - self._problem.pruned_per_group).flatten(-2)

    def grow(self, masks: Bool[Tensor, "rows count n"]) -> None:
        """Search from these masks, and keep what is best of them and the pool."""
        (rows, count, n), generation = masks.shape, len(self._history)
        problem = self._problem.take(torch.arange(rows).repeat_interleave(count))
        limits = replace(self.limits, seed=(self.limits.seed + generation - 1) % 2**63)
        start = masks.reshape(-1, n).to(problem.device)
        masks, values, moves = self._searched(problem, start, count, limits)
        masks, values = masks.view(rows, count, n), values.view(rows, count)
        self._moves += moves.view(rows, count).sum(1)
        self._keep_best(torch.cat([self.masks, masks], 1), torch.cat([self._values, values], 1))
        self._history.append(self._values[:, 0].clone())

    def _searched(
        self, problem: LayerProblem, start: Tensor, count: int, limits: Limits
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masks, objectives and moves of `count` children of every row, which lie together; on the CPU."""
        if self._scaled is None:
            swapped = Swap(max_swaps=self._plan.moves).run(problem, start, limits)
            return swapped.mask.cpu(), swapped.objective.cpu(), swapped.trace.swaps
        tabu = Tabu(moves=self._plan.moves, patience=_PATIENCE)
        found, trace = search(problem, start, tabu, limits, self._scaled.repeated(count))
        history = trace.history
        values = history[:, -1] if history.shape[1] else trace.start_objective.cpu()
        return found.cpu(), values, trace.moves

    def _keep_best(
        self, masks: Bool[Tensor, "rows count n"], values: Float[Tensor, "rows count"]
    ) -> None:
        """The best that are far enough from each better one; where they are too few, the best of the rest."""
        count, size = values.shape[1], self._plan.pool
        order = values.argsort(dim=1, stable=True)
        values, masks = values.gather(1, order), masks.take_along_dim(order[..., None], 1)
        each = masks.float()
        # inputs that the one keeps and the other does not
        apart = each.sum(-1)[..., None] - each @ each.transpose(1, 2)
        near = apart < max(1, self._problem.n // _INPUTS_APART)
        chosen = torch.zeros_like(values, dtype=torch.bool)
        for place in range(count):
            room = chosen.sum(1) < size
            chosen[:, place] = room & ~(near[:, place] & chosen).any(1)
        best = (count * ~chosen + torch.arange(count)).argsort(dim=1)[:, :size].sort(1).values
        self.masks = masks.take_along_dim(best[..., None], 1)
        self._values = values.gather(1, best)

    def trace(self) -> Trace:
        rows, generations = len(self.masks), max(0, len(self._history) - 2)
        late = "yes" if len(self._history) < self._plan.generations + 2 else "no"
        return Trace(
            moves=self._moves,
            rounds=torch.full((rows,), generations),
            start_objective=self._start_objective,
            history=torch.stack(self._history, 1),
            stopped=(late,) * rows,
        )
