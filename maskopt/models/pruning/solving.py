"""All that the model side asks of solvers: which start, which options, one layer solved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.models.options.prune import PruneOptions
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import limits_of, make_solver, make_start, solve

#: λ of `damping` auto
DAMPING_GRID = (0.003, 0.01, 0.03, 0.1, 0.3)
#: α of `gram_shrinkage` auto
SHRINK_GRID = (0.0, 0.05, 0.1, 0.2, 0.3)
#: the greatest α whose held-out error is within this part of the least
SHRINK_TOLERANCE = 0.05


@dataclass(frozen=True)
class Solved:
    """A layer's solution and its start."""

    solution: Solution
    start: Solution | None = None

    @property
    def seconds(self) -> float:
        """Of the start and of the solver."""
        return self.solution.seconds + (0.0 if self.start is None else self.start.seconds)


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
    return Solved(solution.raise_if_interrupted(), start)


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
        error = float(judge.error(at(alpha).weights(solved.solution.mask)).sum())
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


def solve_by_magnitude(problem: LayerProblem) -> Solved:
    """The solution of a layer whose inputs are not known."""
    return Solved(solve(problem, "magnitude"))
