"""Maximum diversity: what enumeration finds, and bounds in the units of the distances."""

import itertools

import numpy as np
import pytest
from diversity import RECIPES, diversity

from maskopt import Status, load_problem, lower_bound, save_problem, solve, verify


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_farthest_elements_are_found_and_bounded_from_above(recipe):
    problem = diversity(recipe, 12, 4, 1)
    distance = RECIPES[recipe](12, np.random.default_rng([1, 12]))
    assert (distance == distance.T).all()
    assert not np.diagonal(distance).any()
    best = max(
        sum(distance[i, j] for i, j in itertools.combinations(chosen, 2))
        for chosen in itertools.combinations(range(12), 4)
    )
    for name in ("branch", "scip", "tabu", "portfolio"):
        solution = solve(problem, name)
        assert problem.value(float(solution.objective[0])) == pytest.approx(best), name
        verify(problem, solution)
    assert solve(problem, "branch").status == (Status.OPTIMAL,)
    for cuts in (0, 2):
        bound = problem.value(float(lower_bound(problem, "sdp", cuts=cuts).value[0]))
        assert bound >= best * (1 - 1e-9)


@pytest.mark.parametrize("recipe", RECIPES)
def test_instances_are_written_and_read_in_the_library_s_format(recipe, tmp_path):
    problem = diversity(recipe, 20, 5, 2)
    save_problem(problem, tmp_path / "some.mdp")
    again = load_problem(tmp_path / "some.mdp")
    one, other = (solve(p, "tabu") for p in (problem, again))
    value = problem.value(float(one.objective[0]))
    assert again.value(float(other.objective[0])) == pytest.approx(value, rel=1e-9)
