"""The layers of a block solved, by one process or several.

Where rows are independent (`Capabilities.apart`) each rank solves tiles of every layer; else each solves
whole layers, the largest first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskopt.core.clock import clock
from maskopt.core.gram import Gram
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.limits import Limits
from maskopt.core.pattern import Pattern
from maskopt.core.problem import LayerProblem
from maskopt.models.architecture.blocks import Layer, matrix
from maskopt.models.architecture.source import as_stored
from maskopt.models.blockwise.collect import Grams
from maskopt.models.blockwise.distributed import ROWS, Ranks
from maskopt.models.blockwise.gradients import LEAST, Gradients, row_sensitivity
from maskopt.models.blockwise.job import Job
from maskopt.models.checkpoints.report import LayerReport
from maskopt.models.options.prune import AUTO, PruneOptions
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import limits_of, make_solver, make_start, solve

#: a layer's solution, and its start
Solved = tuple[Solution, Solution | None]
#: of the rows' improvements
_QUANTILES = (0, 0.1, 0.5, 0.9, 1)
#: λ of `damping` auto
DAMPING_GRID = (0.003, 0.01, 0.03, 0.1, 0.3)
#: α of `gram_shrinkage` auto
SHRINK_GRID = (0.0, 0.05, 0.1, 0.2, 0.3)
#: the greatest α whose held-out error is within this part of the least
SHRINK_TOLERANCE = 0.05


@dataclass(frozen=True)
class SolvedRows:
    """Consecutive rows of a layer, in memory of the host.

    Attributes:
        mask: bool [rows, n], True = kept.
        weight: [rows, n] in the stored dtype, where weights were updated.
        columns: float64 [rows] each: `error` and the other sums of a `LayerReport`, as far as known.
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


def layer_problem(
    name: str,
    weight: Tensor,
    gram: Gram | None,
    pattern: Pattern,
    gram_shrinkage: float = 0.0,
    least_squares: LeastSquaresUpdate | None = None,
) -> LayerProblem:
    """The problem of a layer with `weight` [rows, n] and the Gram matrix of its inputs, shrunk by α; without
    one, or without tokens, G is the identity. ProblemError for a damping that leaves it indefinite."""
    how: dict[str, Any] = {"name": name, "assume_psd": True, "update": least_squares}
    if gram is None or not gram.tokens:
        return LayerProblem(weight, torch.eye(weight.shape[1]).to(weight.device), pattern, **how)
    values = gram.value(shrinkage=gram_shrinkage)
    return LayerProblem(weight, values, pattern, moments=gram.moments(), **how)


def counting(problem: LayerProblem, sensitivity: str, gradients: Gradients | None) -> LayerProblem:
    """The same problem, with weights of its rows, 1 on average, where they share a budget."""
    if not problem.shared_budget:
        return problem
    omega = row_sensitivity(problem, sensitivity, gradients, of_layer=False)
    mean = float(omega.mean())
    return problem.with_omega((omega / mean).clamp(min=LEAST) if mean > 0 else None)


def held_problem(
    layer: Layer, weight: Tensor, grams: Grams, pattern: Pattern
) -> LayerProblem | None:
    """The layer's problem on the held-out windows; None where it saw no token of them."""
    gram = None if grams.held is None else grams.held.of(layer.name)
    return None if gram is None else layer_problem(layer.name, weight, gram, pattern)


def prune_layers(
    job: Job, layers: Sequence[Layer], grams: Grams, options: PruneOptions
) -> Iterator[tuple[Layer, LayerReport, Tensor, Tensor | None]]:
    """Solve layers, and change their weights in the model accordingly.

    Yields:
        (layer, report, mask, new weights float64 [rows, n] where they were updated).
    """
    # layers with the same inputs follow each other
    layers = sorted(layers, key=lambda layer: grams.leader(layer.name))
    for layer, rows in _by_all(job, layers, grams, options):
        weight = matrix(job.source.model, layer)
        new = None if rows.weight is None else rows.weight.double()
        if new is None:
            weight.masked_fill_(~rows.mask.to(weight.device), 0)
        else:
            weight.copy_(new.to(weight.dtype))
        yield layer, _report(layer, rows), rows.mask, new


def _by_all(
    job: Job, layers: Sequence[Layer], grams: Grams, options: PruneOptions
) -> Iterator[tuple[Layer, SolvedRows]]:
    """Every layer, its rows solved by the ranks that they are dealt to."""
    ranks = job.ranks
    if ranks.size == 1:
        for layer in layers:
            yield layer, solve_rows(job, layer, grams, options, slice(0, layer.rows))
        return
    dealt = _deal(ranks, layers, apart=_apart(options))
    mine = {
        layer.name: solve_rows(job, layer, grams, options, parts[ranks.rank])
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
        parts = ranks.parts(layer.rows, order, ROWS if apart else layer.rows)
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
    pattern = options.pattern_of(layer.name, layer.n)

    def at(alpha: float) -> LayerProblem:
        problem = layer_problem(layer.name, dense, used, pattern, alpha, least_squares)
        if not fallback:
            problem = counting(problem, options.sensitivity, job.gradients)
        return problem.take(rows)

    judge = held_problem(layer, dense, grams, pattern)
    judge = None if judge is None else judge.take(rows)
    began, limits = clock(), layer_limits(options)
    fixed = 0.0 if options.gram_shrinkage == AUTO else float(options.gram_shrinkage)
    if least_squares is not None and options.damping == AUTO and judge is not None:
        least_squares = damping_by_held_error(at(fixed), judge, options, limits)
    if options.gram_shrinkage == AUTO and judge is not None and not fallback:
        solved, gram_shrinkage = solve_by_held_error(at, judge, options, limits)
        fitted = at(gram_shrinkage)
    else:
        gram_shrinkage = 0.0 if fallback else fixed
        fitted = at(gram_shrinkage)
        solved = (
            (solve(fitted, "magnitude"), None) if fallback else solve_layer(fitted, options, limits)
        )
    solution, start = solved
    new = None
    if least_squares is not None:
        found = fitted.weights(solution.mask) if solution.weight is None else solution.weight
        new = as_stored(job.source, layer, found)
    seconds, objective = clock() - began, "kept"
    if new is not None and make_solver(options.solver).capabilities.update:
        objective = "updated" if solution.own_weight else "least-squares"
    facts: dict[str, Any] = {
        "tokens": tokens,
        "fallback": fallback,
        "gram_shrinkage": gram_shrinkage,
        "pattern": str(fitted.pattern),
        "objective": objective,
        "damping": None if fitted.update is None else fitted.update.damping,
    }
    return SolvedRows(
        solution.mask.cpu(),
        None if new is None else new.to("cpu", job.source.parameter_dtype(layer.parameter)),
        _columns(fitted, judge, solution, start, new, objective),
        tuple(map(str, solution.status)),
        facts,
        seconds,
    )


def _columns(
    fitted: LayerProblem,
    judge: LayerProblem | None,
    solution: Solution,
    start: Solution | None,
    new: Tensor | None,
    objective: str,
) -> dict[str, Tensor]:
    """The columns of `SolvedRows`: `fitted` was solved for this `objective`, `judge` is the same layer on
    held-out windows."""
    kept = fitted.with_update(None)
    made = [] if kept.shared_budget or fitted.update else [start, solution]
    wanda = next((x for x in made if x is not None and x.solver == "wanda"), None)
    wanda = wanda or make_start(kept.under(kept.pattern.uniform()), "wanda")
    if new is None:
        error, error_kept = solution.objective, None
        held = None if judge is None else judge.objective(solution.mask)
    else:
        error, error_kept = fitted.error(new), kept.objective(solution.mask)
        held = None if judge is None else judge.error(new)
    bound = solution.lower_bound
    if objective != "kept":
        # the bound includes the penalty of the damping, which is not part of the error
        bound = torch.zeros_like(bound)
    known = {
        "error_wanda": wanda.objective,
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
    return {name: rows.double().cpu() for name, rows in known.items() if rows is not None}


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
    columns = dict(solved.columns)
    gained, quantiles = columns.pop("improvement_quantiles", None), None
    sums: dict[str, Any] = {name: float(rows.sum()) for name, rows in columns.items()}
    sums |= {name: int(sums[name]) for name in ("swaps", "scans") if name in sums}
    if gained is not None:
        found = torch.quantile(gained, torch.tensor(_QUANTILES).double()).tolist()
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


def layer_limits(options: PruneOptions) -> Limits:
    """The limits of all solves of a layer, with the clock running."""
    return limits_of(None, {"seed": options.seed, **options.solver_options})[0].begin()


def solve_layer(
    problem: LayerProblem, options: PruneOptions, limits: Limits | None = None
) -> Solved:
    """Run the options' start and solver on one layer, within the same limits."""
    limits = layer_limits(options) if limits is None else limits
    if not make_solver(options.solver).capabilities.update:
        problem = problem.with_update(None)
    start = None
    if options.start_solver is not None:
        start = make_start(problem, options.start_solver, limits)
    solution = solve(
        problem,
        options.solver,
        start=None if start is None else start.mask,
        limits=limits,
        **limits_of(None, options.solver_options)[1],
    )
    return solution.raise_if_interrupted(), start


def solve_by_held_error(
    at: Callable[[float], LayerProblem], judge: LayerProblem, options: PruneOptions, limits: Limits
) -> tuple[Solved, float]:
    """The greatest α of SHRINK_GRID whose error on held-out windows is within SHRINK_TOLERANCE of the least,
    and its solution.

    The least error is a bad judge: on Gemma, masks of a lower held-out error than those of any fixed α made a
    worse model. Each α starts afresh, since masks carried along the grid stay near the first ones.

    Args:
        at: the layer's problem with G shrunk by α.
        judge: the same layer with the Gram matrix of the held-out windows.
        limits: of all α together; each has its share of the time.
    """
    least, best = math.inf, None
    for position, alpha in enumerate(SHRINK_GRID):
        share = limits.share(1 / (len(SHRINK_GRID) - position))
        solved = solve_layer(at(alpha), options, share)
        error = float(judge.error(at(alpha).weights(solved[0].mask)).sum())
        least = min(least, error)
        if best is None or error <= least * (1 + SHRINK_TOLERANCE):
            best = solved, alpha
    assert best is not None
    return best


def damping_by_held_error(
    problem: LayerProblem, judge: LayerProblem, options: PruneOptions, limits: Limits
) -> LeastSquaresUpdate:
    """The best of DAMPING_GRID by the error on held-out windows, for the mask of the start."""
    maker = options.start_solver or options.solver
    mask = make_start(problem, maker, limits.share(0.5)).mask

    def held_error(least_squares: LeastSquaresUpdate) -> float:
        return float(judge.error(problem.with_update(least_squares).weights(mask)).sum())

    power = options.damping_exponent
    return min((LeastSquaresUpdate(x, power) for x in DAMPING_GRID), key=held_error)
