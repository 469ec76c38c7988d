"""What every search must hold, and random layers for the tests of them."""

import torch
from strategies import HALF, random_gram, random_weight
from torch import Tensor

from maskopt import LayerProblem, solve, verify
from maskopt.core.pattern import Pattern
from maskopt.protocol.solution import Status


def floor(problem: LayerProblem) -> Tensor:
    return 1e-9 * problem.diagonal_mass() + 1e-30


def drawn(
    rows: int, n: int, kind: str = "full", pattern: Pattern = HALF, seeds: tuple[int, int] = (1, 2),
    dtype: torch.dtype = torch.float64,
) -> LayerProblem:  # fmt: skip
    """A layer of random weights and a Gram matrix of that kind, with a seed each."""
    weight, gram = random_weight(rows, n, seeds[0], dtype), random_gram(n, kind, seeds[1], dtype)
    return LayerProblem(weight, gram, pattern)


def check_contract(
    problem: LayerProblem, solver: str, start: str = "wanda", proves: bool = True, **options: object
) -> None:
    """Legal, verified, never above the start, never below the exhaustive optimum, repeatable, and each row
    by itself."""
    begun = solve(problem, start)
    solution = solve(problem, solver, start=begun.mask, **options)
    verify(problem, solution)
    assert not proves or set(solution.status) == {Status.SWAP_OPTIMAL}
    assert bool((solution.objective <= begun.objective + floor(problem)).all())
    best = solve(problem, "exhaustive").objective
    assert bool((solution.objective >= best - floor(problem)).all())
    assert bool((solution.lower_bound <= best + floor(problem)).all())
    again = solve(problem, solver, start=begun.mask, **options)
    assert torch.equal(again.mask, solution.mask)
    if solver in ("swap", "kswap"):  # which stop where nothing is left to gain
        ended = solve(problem, solver, start=solution.mask, **options)
        assert torch.equal(ended.mask, solution.mask)
        assert int(ended.trace.swaps.sum()) == 0
    for row in range(problem.rows):
        alone = solve(problem.row(row), solver, start=begun.mask[row], **options)
        assert solver != "swap" or torch.equal(alone.mask[0], solution.mask[row])
        torch.testing.assert_close(
            alone.objective[0], solution.objective[row], rtol=1e-6, atol=float(floor(problem)[row])
        )
