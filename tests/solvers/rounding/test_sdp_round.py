"""The rounded semidefinite relaxation."""

import pytest
import torch
from hypothesis import given, settings
from local_search import check_contract, floor
from strategies import problems, random_gram, random_weight

from maskopt import NM, LayerProblem, Unstructured, solve, verify
from maskopt.solution import Status


@given(problems(max_n=10, max_rows=3))
@settings(max_examples=10)
def test_contract(problem):
    check_contract(problem, "sdp", sweeps=60)


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.6), NM(keep=2, of=4)])
def test_mask_and_certificate_in_one(pattern):
    problem = LayerProblem(
        random_weight(6, 64, 1, torch.float32), random_gram(64, "full", 2, torch.float32), pattern
    )
    solution = solve(problem, "sdp")
    verify(problem, solution)
    assert bool((solution.gap < 0.3).all())
    assert bool((solution.lower_bound >= solve(problem, "relax").lower_bound).all())
    rounded = solve(problem, "sdp", refine=False)
    assert set(rounded.status) == {Status.FEASIBLE}
    torch.testing.assert_close(rounded.objective, solution.trace.rounded_objective)


def test_sdp_starts_every_local_search():
    problem = LayerProblem(random_weight(3, 16, 1), random_gram(16, "full", 2), Unstructured(0.5))
    start = solve(problem, "sdp")
    for name in ("swap", "kswap", "tabu"):
        solution = solve(problem, name, warm_start="sdp")
        assert bool((solution.objective <= start.objective + floor(problem)).all())
