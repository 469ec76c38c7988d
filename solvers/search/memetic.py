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

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
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
from maskopt.solvers.greedy.scores import lowest
from maskopt.solvers.search.tabu import SEARCH_SHARE, ScaledRows, Tabu, search, then_swapped
from maskopt.solvers.shared_budget import by_count
from maskopt.solvers.swap import Swap

#: rows at a time: with their children enough for many threads
_TILE = 16
#: bytes of an entry of a mask of a pool, or of a searched child; for all, unless the caller sets a limit
_ENTRY_BYTES, _MEMORY = 64, 2**30
#: least and largest share of the inputs that may change places, in the first masks of a pool
_SHAKEN = 0.05, 1.0
#: probability that an input may change places in a child, whatever its parents have
_MUTATION = 0.01
#: masks of a pool differ in one exchange for every so many inputs
_INPUTS_APART = 50
#: patience of the tabu search of a child
_PATIENCE = 300


@dataclass(frozen=True)
class Memetic(Solver):
    """Crossing of masks and a search of every child, then 1-swap search to a proven 1-swap optimum.

    The result never costs more than the start. Tabu search of children runs on the CPU, 1-swap search on F on
    the problem's device. The history of the `Trace` has the best of the first pool and of every generation.
    """

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
        rows_in_memory = limits.bytes(_MEMORY) // (_ENTRY_BYTES * problem.n * masks)
        tile_rows = max(1, min(_TILE, rows_in_memory))
        tiles = [tile for rows in by_count(start.cpu()) for tile in rows.split(tile_rows)]
        search_limits, pools, rows_done = limits.share(SEARCH_SHARE).quiet(), [], 0
        for number, tile in enumerate(tiles):
            tile_limits = search_limits.share(1 / (len(tiles) - number))
            pattern = problem.pattern
            if problem.shared_budget:  # its rows prune as many as in the start
                pattern = Unstructured(keep=int(start[tile[0]].sum()))
            pool = _Pool(problem.take(tile).under(pattern), start[tile].cpu(), self, tile_limits)
            pool.evolve(partial(limits.report, rows_done, problem.rows, "generations"))
            rows_done += len(tile)
            pools.append(pool)
        limits.report(problem.rows, problem.rows)
        order = torch.cat(tiles).argsort()
        best = torch.cat([pool.masks[:, 0] for pool in pools])[order].to(problem.device)
        trace = take_rows(join_rows([pool.trace() for pool in pools]), order)
        return then_swapped(problem, best, start, limits, trace, watch)


class _Pool:
    """The best masks of the rows of a tile, unlike each other: bool [rows, pool, n], the best first."""

    def __init__(self, problem: LayerProblem, start: Tensor, plan: Memetic, limits: Limits) -> None:
        self._problem, self._plan, self._limits = problem, plan, limits
        self._scaled = None if problem.update else ScaledRows.of(problem)
        self.masks = start[:, None].expand(-1, plan.pool, -1)
        self._start_objective = problem.objective(start.to(problem.device)).cpu()
        self._values = self._start_objective[:, None].expand(-1, plan.pool)
        self._moves = torch.zeros(problem.rows, dtype=torch.int64)
        self._history = [self._start_objective]

    def evolve(self, report: Callable[[int, int], None]) -> None:
        """Search a first pool, then every generation of children, until the time limit."""
        generator = torch.Generator().manual_seed(self._limits.seed)
        masks = self._shaken(generator)
        for generation in range(self._plan.generations + 1):
            if self._limits.expired:
                break
            self._grow(masks, generation)
            report(generation, self._plan.generations)
            masks = self._children(generator)

    def _shaken(self, generator: torch.Generator) -> Bool[Tensor, "rows pool n"]:
        """Return the start, and masks in which more and more of its inputs have changed places."""
        shape = self._plan.pool - 1, self._problem.n
        share = torch.linspace(*_SHAKEN, shape[0])[:, None]
        shaken = torch.rand(shape, generator=generator) < share
        keys = torch.rand(shape, generator=generator)
        others = self.completed(self.masks[:, 1:] & ~shaken, shaken, keys)
        return torch.cat([self.masks[:, :1], others], 1)

    def _children(self, generator: torch.Generator) -> Bool[Tensor, "rows children n"]:
        """Cross random pairs of masks of the pool."""
        size, count, n = self._plan.pool, self._plan.children, self._problem.n
        first = torch.randint(size, (count,), generator=generator)
        apart = torch.randint(1, size, (count,), generator=generator)
        keys = torch.rand(count, n, generator=generator)
        mutated = torch.rand(count, n, generator=generator) < _MUTATION
        mother, father = self.masks[:, first], self.masks[:, (first + apart) % size]
        return self.completed(mother & father & ~mutated, (mother ^ father) | mutated, keys)

    def completed(
        self,
        kept: Bool[Tensor, "rows count n"],
        free: Bool[Tensor, "*rows count n"],
        keys: Float[Tensor, "count n"],
    ) -> Bool[Tensor, "rows count n"]:
        """Keep also the free inputs of greatest keys, up to the count that the pattern asks for."""
        group = self._problem.group_size
        score = 2 * kept + free * keys
        highest = lowest(-score.reshape(-1, group), group - self._problem.pruned_per_group)
        return highest.view(score.shape)

    def _grow(self, masks: Bool[Tensor, "rows count n"], generation: int) -> None:
        """Search from these masks, and keep the best of the results and the pool."""
        rows, count, n = masks.shape
        problem = self._problem.take(torch.arange(rows).repeat_interleave(count))
        limits = replace(self._limits, seed=(self._limits.seed + generation) % 2**63)
        start = masks.reshape(-1, n).to(problem.device)
        if self._scaled is None:
            swapped = Swap(max_swaps=self._plan.moves).run(problem, start, limits)
            masks, values, moves = swapped.mask, swapped.objective.cpu(), swapped.trace.swaps
        else:
            tabu = Tabu(moves=self._plan.moves, patience=_PATIENCE)
            masks, trace = search(problem, start, tabu, limits, self._scaled.repeated(count))
            values, moves = trace.start_objective.cpu(), trace.moves
            if trace.history.shape[1]:
                values = trace.history[:, -1]
        self._moves += moves.view(rows, count).sum(1)
        self._keep_best(
            torch.cat([self.masks, masks.cpu().view(rows, count, n)], 1),
            torch.cat([self._values, values.view(rows, count)], 1),
        )
        self._history.append(self._values[:, 0].clone())

    def _keep_best(
        self, masks: Bool[Tensor, "rows count n"], values: Float[Tensor, "rows count"]
    ) -> None:
        """Keep the best that are far enough from each better one, and if too few the best of the others."""
        count, size = values.shape[1], self._plan.pool
        order = values.argsort(dim=1, stable=True)
        values, masks = values.gather(1, order), masks.take_along_dim(order[..., None], 1)
        numbers = masks.float()
        # inputs that the one keeps and the other does not
        apart = numbers.sum(-1)[..., None] - numbers @ numbers.transpose(1, 2)
        near = apart < max(1, self._problem.n // _INPUTS_APART)
        chosen = torch.zeros_like(values, dtype=torch.bool)
        for place in range(count):
            room = chosen.sum(1) < size
            chosen[:, place] = room & ~(near[:, place] & chosen).any(1)
        chosen_first = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)
        best = chosen_first[:, :size].sort(1).values
        self.masks = masks.take_along_dim(best[..., None], 1)
        self._values = values.gather(1, best)

    def trace(self) -> Trace:
        """Return the counts and the history of the search."""
        rows, generations = len(self.masks), max(0, len(self._history) - 2)
        late = "yes" if len(self._history) < self._plan.generations + 2 else "no"
        return Trace(
            moves=self._moves,
            rounds=torch.full((rows,), generations),
            start_objective=self._start_objective,
            history=torch.stack(self._history, 1),
            stopped=(late,) * rows,
        )
