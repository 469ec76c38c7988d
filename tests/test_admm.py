"""ADMM's masks for refitted weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import problems, random_gram, random_weight

from maskopt import NM, LayerProblem, Limits, Refit, Unstructured, make_solver, solve, verify
from maskopt.errors import OptionError

PATTERNS = (Unstructured(0.5), NM(keep=2, of=4))


def layer(pattern, rows=70, n=64, seed=1, dtype=torch.float64):
    weight, gram = random_weight(rows, n, seed, dtype), random_gram(n, "full", seed + 1, dtype)
    return LayerProblem(weight, gram, pattern, refit=Refit(0.01))


@given(problems(), st.sampled_from((0.0, 0.01, 0.3)))
def test_masks_are_legal_and_cost_what_they_say(problem, damping):
    for one in (problem, problem.refitting(Refit(damping))):
        found = solve(one, "admm")
        assert bool(one.pattern.is_legal(found.mask).all())
        verify(one, found)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_better_than_scores_and_close_to_where_swaps_end(pattern, dtype):
    problem = layer(pattern, dtype=dtype)
    costs = {
        name: float(solve(problem, name).objective.sum()) for name in ("admm", "wanda", "sparsegpt")
    }
    end = float(solve(problem, "swap", start="admm").objective.sum())
    assert costs["admm"] < 0.9 * min(costs["wanda"], costs["sparsegpt"])
    assert end <= costs["admm"] < 1.15 * end


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_threads_companions_and_units_change_nothing(pattern):
    problem = layer(pattern)
    found = solve(problem, "admm").mask
    assert torch.equal(solve(problem, "admm", threads=3).mask, found)
    some = solve(problem.take(slice(10, 40)), "admm").mask
    assert torch.equal(some, found[10:40])
    scaled = LayerProblem(problem.weight * 8, problem.gram * 4, pattern, refit=problem.refit)
    assert torch.equal(solve(scaled, "admm").mask, found)


def test_a_problem_that_keeps_its_weights_gets_the_same_mask():
    problem = layer(PATTERNS[0])
    assert torch.equal(solve(problem.refitting(None), "admm").mask, solve(problem, "admm").mask)


def test_limits_end_it_with_a_legal_mask():
    problem = layer(PATTERNS[1])
    for found in (
        solve(problem, "admm", limits=Limits(seconds=0)),
        solve(problem, "admm", iterations=1),
    ):
        assert bool(problem.pattern.is_legal(found.mask).all())


@pytest.mark.parametrize("options", [{"iterations": 0}, {"rho": 0.0}, {"rho": float("nan")}])
def test_bad_options_are_refused(options):
    with pytest.raises(OptionError):
        make_solver("admm", **options)
