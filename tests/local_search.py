"""What every local search must hold, shared by the tests of the backends."""

from __future__ import annotations

import torch

from maskopt import LayerProblem, solve, verify
from maskopt.solution import Status


def floor(problem: LayerProblem) -> torch.Tensor:
    return 1e-9 * problem.diagonal_mass() + 1e-30


def check_contract(problem: LayerProblem, solver: str, start: str = "wanda", **options) -> None:
    """Legal, verified, never above the start, never below the exhaustive optimum, repeatable."""
    begun = solve(problem, start)
    solution = solve(problem, solver, warm_start=begun.mask, **options)
    verify(problem, solution)
    assert all(status is Status.SWAP_OPTIMAL for status in solution.status)
    assert bool((solution.objective <= begun.objective + floor(problem)).all())
    best = solve(problem, "exhaustive").objective
    assert bool((solution.objective >= best - floor(problem)).all())
    assert bool((solution.lower_bound <= best + floor(problem)).all())
    again = solve(problem, solver, warm_start=begun.mask, **options)
    assert torch.equal(again.mask, solution.mask)
    for row in range(problem.rows):
        alone = solve(problem.row(row), solver, warm_start=begun.mask[row], **options)
        torch.testing.assert_close(
            alone.objective[0], solution.objective[row], rtol=1e-6, atol=float(floor(problem)[row])
        )
