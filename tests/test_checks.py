"""improving_swap against brute force, and verify against every kind of forgery."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from strategies import problems, random_gram, random_weight

from maskopt import (
    NM,
    LayerProblem,
    Solution,
    Status,
    Unstructured,
    improving_swap,
    solve,
    verify,
)
from maskopt.errors import VerificationError
from maskopt.solution import SWAP_FLOOR, SWAP_TOLERANCE


@given(problems(max_n=9, max_rows=2))
def test_improving_swap_is_the_best_pair_of_brute_force(problem):
    solution = solve(problem, "random")
    for i in range(problem.rows):
        row, mask = problem.row(i), solution.mask[i]
        q = row.q()
        group = problem.group_size

        def cost(m, q=q):
            p = (~m).double()
            return float(p @ q @ p)

        best = 0.0
        for u in range(row.n):
            for p in range(row.n):
                if mask[u] and not mask[p] and u // group == p // group:
                    other = mask.clone()
                    other[u], other[p] = False, True
                    best = min(best, cost(other) - cost(mask))
        swap = improving_swap(row, mask)
        slack = SWAP_TOLERANCE * cost(mask) + SWAP_FLOOR * float(q.diagonal().sum())
        if swap is None:
            assert best >= -slack * (1 + 1e-6) - 1e-13 * float(q.diagonal().sum())
        else:
            other = mask.clone()
            assert bool(mask[swap.kept])
            assert not bool(mask[swap.pruned])
            other[swap.kept], other[swap.pruned] = False, True
            assert swap.delta == pytest.approx(best, rel=1e-6, abs=1e-9 * float(q.diagonal().sum()))
            assert cost(other) < cost(mask)


@given(problems(max_n=10))
def test_verify_accepts_honest_solutions(problem):
    for name in ("wanda", "elimination", "exhaustive"):
        verify(problem, solve(problem, name))


@pytest.fixture(params=[Unstructured(sparsity=0.5), NM(keep=2, of=4)], ids=str)
def problem(request):
    gram = random_gram(16, "full", 7)
    return LayerProblem(random_weight(3, 16, 1), gram, request.param)


def test_verify_catches_every_forgery(problem):
    honest = solve(problem, "magnitude")
    optimum = solve(problem, "exhaustive")
    flipped = honest.mask.clone()
    flipped[1, 0] = ~flipped[1, 0]
    proof = {"proof": "none"}
    swap_optimal = (Status.SWAP_OPTIMAL,) * 3
    optimal = (Status.OPTIMAL,) * 3
    forgeries = {
        "pattern: mask: row 1": replace(honest, mask=flipped),
        "pattern: mask has shape": replace(honest, mask=honest.mask[:2]),
        "objective: row 0": replace(honest, objective=honest.objective * 0.99),
        "objective must be float64": replace(honest, objective=honest.objective.float()),
        "f ≥ 0": replace(honest, lower_bound=honest.lower_bound - 1),
        "above the objective": replace(honest, lower_bound=honest.objective * 1.01, trace=proof),
        "without a certificate": replace(honest, lower_bound=honest.objective * 0.1),
        "statuses for": replace(honest, status=swap_optimal[:1]),
        "claims swap-optimal, yet": replace(honest, status=swap_optimal),
        "claims optimal": replace(honest, status=optimal),
        "claims optimal without proof": replace(optimum, lower_bound=optimum.objective * 0.9),
        "a mask of objective": replace(
            honest,
            lower_bound=(honest.objective + optimum.objective) / 2,
            trace=proof,
        ),
    }
    for reason, forged in forgeries.items():
        with pytest.raises(VerificationError, match=reason):
            verify(problem, forged)


def test_a_swap_optimum_forged_into_an_optimum_is_caught():
    """Enumeration finds what no swap does."""
    for seed in range(200):
        problem = LayerProblem(
            random_weight(1, 12, seed * 5 + 1),
            random_gram(12, "low-rank", seed),
            Unstructured(keep=6),
        )
        mask = solve(problem, "wanda").mask[0]
        while swap := improving_swap(problem.row(0), mask):
            mask = mask.clone()
            mask[swap.kept], mask[swap.pruned] = False, True
        best = float(solve(problem, "exhaustive").objective)
        if float(problem.objective(mask[None])) > best * 1.01 + 1e-9:
            forged = Solution.of(
                problem,
                mask[None],
                status=Status.OPTIMAL,
                lower_bound=problem.objective(mask[None]),
                trace={"proof": "none"},
            )
            with pytest.raises(VerificationError, match="exists"):
                verify(problem, forged)
            return
    pytest.fail("no instance separates swap optima from optima")


def test_gap_and_repr():
    problem = LayerProblem(torch.zeros(1, 4), torch.eye(4), Unstructured(sparsity=0.5))
    solution = solve(problem, "exhaustive")
    assert solution.gap.tolist() == [0.0]
    assert "1 optimal" in repr(solution)
    half = replace(solution, objective=torch.tensor([4.0]), lower_bound=torch.tensor([1.0]))
    assert half.gap.tolist() == [0.75]
