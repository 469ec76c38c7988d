"""The layers of a block solved, by one process or several.

Where rows are independent (`Capabilities.apart`) each rank solves tiles of every layer; else each solves
whole layers, the largest first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskopt.core.limits import clock
from maskopt.core.problem import LayerProblem
from maskopt.models.architecture.blocks import Layer, matrix
from maskopt.models.architecture.source import as_stored
from maskopt.models.blockwise.collect import Grams
from maskopt.models.blockwise.distributed import Ranks
from maskopt.models.blockwise.gradients import counting
from maskopt.models.blockwise.job import Job
from maskopt.models.checkpoints.report import LayerReport
from maskopt.models.options.prune import AUTO, PruneOptions
from maskopt.models.pruning.problems import held_problem, layer_problem
from maskopt.models.pruning.solving import (
    Solved,
    damping_by_held_error,
    layer_limits,
    solve_by_held_error,
    solve_by_magnitude,
    solve_layer,
)
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import make_solver, make_start

#: of the rows' improvements
_QUANTILES = (0, 0.1, 0.5, 0.9, 1)


@dataclass(frozen=True)
class SolvedRows:
    """Consecutive rows of a layer, in memory of the host.

    Attributes:
        mask: bool [rows, n], True = kept.
        weight: [rows, n] in the stored dtype, where weights were updated.
        columns: float64 [rows] each: `error` and the other sums of a `LayerReport`; empty where not known.
        statuses: a word a row.
        facts: of the layer, the same for all of its rows.
    """

    mask: Tensor
    weight: Tensor | None
    columns: dict[str, Tensor]
    statuses: tuple[str, ...]
    facts: dict[str, Any]
    seconds: float

    @classmethod
    def joined(cls, parts: Sequence[SolvedRows]) -> SolvedRows:
        """All rows of a layer, from parts in their order."""
        first = parts[0]
        weights = [part.weight for part in parts if part.weight is not None]
        return cls(
            torch.cat([part.mask for part in parts]),
            torch.cat(weights) if weights else None,
            {name: torch.cat([part.columns[name] for part in parts]) for name in first.columns},
            tuple(status for part in parts for status in part.statuses),
            first.facts,
            max(part.seconds for part in parts),
        )


def prune_layers(
    job: Job, layers: Sequence[Layer], grams: Grams, options: PruneOptions
) -> Iterator[tuple[Layer, LayerReport, Tensor, Tensor | None]]:
    """Solve layers, and change their weights in the model accordingly.

    Yields:
        (layer, report, mask, new weights float64 [rows, n] where they were updated).
    """

    def solved(layer: Layer, rows: slice) -> SolvedRows:
        return solve_rows(job, layer, grams, options, rows)

    for layer, rows in _by_all(job.ranks, layers, options, solved):
        weight = matrix(job.source.model, layer)
        new = None if rows.weight is None else rows.weight.double()
        if new is None:
            weight.masked_fill_(~rows.mask.to(weight.device), 0)
        else:
            weight.copy_(new.to(weight.dtype))
        yield layer, _report(layer, rows), rows.mask, new


def _by_all(
    ranks: Ranks,
    layers: Sequence[Layer],
    options: PruneOptions,
    solved: Callable[[Layer, slice], SolvedRows],
) -> Iterator[tuple[Layer, SolvedRows]]:
    """Every layer, its rows solved by the ranks that they are dealt to."""
    if ranks.size == 1:
        for layer in layers:
            yield layer, solved(layer, slice(0, layer.rows))
        return
    dealt = _deal(ranks, layers, apart=_apart(options))
    mine = {
        layer.name: solved(layer, parts[ranks.rank])
        for layer, parts in zip(layers, dealt, strict=True)
        if parts[ranks.rank].stop > parts[ranks.rank].start
    }
    for layer in layers:
        parts = [part for part in ranks.gathered(mine.pop(layer.name, None)) if part is not None]
        yield layer, SolvedRows.joined(parts)


def _deal(ranks: Ranks, layers: Sequence[Layer], *, apart: bool) -> list[list[slice]]:
    """The rows of every layer that each rank solves, the costliest layers first."""
    load = [0] * ranks.size
    dealt: dict[str, list[slice]] = {}
    for layer in sorted(layers, key=lambda layer: -(layer.n**2) * (1 if apart else layer.rows)):
        order = sorted(range(ranks.size), key=load.__getitem__)
        if apart:
            parts = ranks.parts(layer.rows, order)
        else:
            parts = [slice(0, layer.rows if rank == order[0] else 0) for rank in range(ranks.size)]
        for rank, part in enumerate(parts):
            load[rank] += (part.stop - part.start) * layer.n**2
        dealt[layer.name] = parts
    return [dealt[layer.name] for layer in layers]


def _apart(options: PruneOptions) -> bool:
    """Whether a part of a layer, from a multiple of 128 rows on, gets the result of the whole layer."""
    makers = [name for name in (options.solver, options.start_solver) if name is not None]
    by_all_rows = AUTO in (options.gram_shrinkage, options.damping) or options.rows_differ
    timed = "time_limit" in options.solver_options
    return not (by_all_rows or timed) and all(make_solver(m).capabilities.apart for m in makers)


def solve_rows(
    job: Job, layer: Layer, grams: Grams, options: PruneOptions, rows: slice
) -> SolvedRows:
    """Solve some rows of a layer, all of them where rows are not independent; the model is not changed."""
    gram = grams.of(layer.name)
    tokens = 0 if gram is None else gram.tokens
    fallback = tokens < options.min_tokens
    dense = matrix(job.source.model, layer).detach().float()
    used = None if fallback else gram
    least_squares = None if fallback else options.least_squares
    pattern = options.pattern_of(layer)

    def at(alpha: float) -> LayerProblem:
        problem = layer_problem(layer, dense, used, pattern, alpha, least_squares)
        if not fallback:
            problem = counting(problem, options.sensitivity, job.gradients)
        return problem.take(rows)

    judge = held_problem(layer, dense, grams, pattern)
    judge = None if judge is None else judge.take(rows)
    began, limits = clock(), layer_limits(options)
    if least_squares is not None and options.damping == AUTO and judge is not None:
        least_squares = damping_by_held_error(
            at(_fixed(options.gram_shrinkage)), judge, options, limits
        )
    if options.gram_shrinkage == AUTO and judge is not None and not fallback:
        solved, gram_shrinkage = solve_by_held_error(at, judge, options, limits)
        fitted = at(gram_shrinkage)
    else:
        gram_shrinkage = 0.0 if fallback else _fixed(options.gram_shrinkage)
        fitted = at(gram_shrinkage)
        solved = solve_by_magnitude(fitted) if fallback else solve_layer(fitted, options, limits)
    new = None
    if least_squares is not None:
        found = solved.solution.weight
        found = fitted.weights(solved.solution.mask) if found is None else found
        new = as_stored(job.source, layer, found)
    seconds = clock() - began
    facts: dict[str, Any] = {
        "tokens": tokens,
        "fallback": fallback,
        "gram_shrinkage": gram_shrinkage,
        "pattern": str(fitted.pattern),
        "objective": _chosen_for(solved, new, options),
        "damping": None if fitted.update is None else fitted.update.damping,
    }
    return SolvedRows(
        solved.solution.mask.cpu(),
        None if new is None else new.to("cpu", job.source.stored_dtype(layer)),
        _columns(fitted, judge, solved, new, options),
        tuple(map(str, solved.solution.status)),
        facts,
        seconds,
    )


def _fixed(gram_shrinkage: float | str) -> float:
    """α where it is a number, else 0."""
    return 0.0 if gram_shrinkage == AUTO else float(gram_shrinkage)


def _chosen_for(solved: Solved, new: Tensor | None, options: PruneOptions) -> str:
    if new is None or not make_solver(options.solver).capabilities.update:
        return "kept"
    return "updated" if solved.solution.own else "least-squares"


def _columns(
    fitted: LayerProblem,
    judge: LayerProblem | None,
    solved: Solved,
    new: Tensor | None,
    options: PruneOptions,
) -> dict[str, Tensor]:
    """The columns of `SolvedRows`: `fitted` was solved, `judge` is the same layer on held-out windows."""
    solution, start, kept = solved.solution, solved.start, fitted.with_update(None)
    wanda = make_start(kept.under(kept.pattern.uniform()), "wanda")
    if new is None:
        error, error_kept = solution.objective, None
        held = None if judge is None else judge.objective(solution.mask)
    else:
        error, error_kept = fitted.error(new), kept.objective(solution.mask)
        held = None if judge is None else judge.error(new)
    bound = solution.lower_bound
    if _chosen_for(solved, new, options) != "kept":
        # the bound includes the penalty of the damping, which is not part of the error
        bound = torch.zeros_like(bound)
    known = {
        "error_wanda": kept.objective(wanda.mask),
        "error": error,
        "lower_bound": bound,
        "energy": fitted.output_energy(),
        "error_held": held,
        "energy_held": None if judge is None else judge.output_energy(),
        "error_kept": error_kept,
        "swaps": _traced(solution, "swaps"),
        "scans": _traced(solution, "scans"),
        "improvement_quantiles": None
        if fitted.shared_budget
        else _gained(solution, start, new is not None),
    }
    nothing = torch.empty(0, dtype=torch.float64)
    return {name: nothing if rows is None else rows.double().cpu() for name, rows in known.items()}


def _traced(solution: Solution, what: str) -> Tensor | None:
    """A column of its trace; None where there is none."""
    found = getattr(solution.trace, what, None)
    return found if isinstance(found, Tensor) else None


def _gained(solution: Solution, start: Solution | None, updated: bool) -> Tensor | None:
    """1 − objective / start by row; 0 of rows whose start is 0."""
    if start is None:
        return None
    before, after = start.objective.double(), solution.objective.double()
    if updated:  # the start's objective is of unchanged weights
        history = _traced(solution, "history")
        if history is None:
            return None
        before, after = history[:, 0], history[:, -1]
    return torch.where(before > 0, 1 - after / before.clamp(min=1e-300), 0.0)


def _report(layer: Layer, solved: SolvedRows) -> LayerReport:
    columns = {name: rows for name, rows in solved.columns.items() if len(rows)}
    sums: dict[str, Any] = {name: float(rows.sum()) for name, rows in columns.items()}
    sums |= {name: int(sums[name]) for name in ("swaps", "scans") if name in sums}
    quantiles = None
    if sums.pop("improvement_quantiles", None) is not None:
        found = torch.quantile(
            columns["improvement_quantiles"], torch.tensor(_QUANTILES).double()
        ).tolist()
        quantiles = [round(value, 9) + 0.0 for value in found]  # no -0.0
    return LayerReport(
        name=layer.name,
        block=layer.block,
        kind=layer.kind,
        rows=layer.rows,
        n=layer.n,
        pruned=int((~solved.mask).sum()),
        statuses={s: solved.statuses.count(s) for s in sorted(set(solved.statuses))},
        seconds=solved.seconds,
        improvement_quantiles=quantiles,
        **sums,
        **solved.facts,
    )
