"""Maximum diversity: what enumeration finds, bounds in the units of the distances, the library's format."""

import itertools

import numpy as np
import pytest
from diversity import RECIPES, diversity

from maskopt import Status, load_problem, lower_bound, save_problem, solve, verify


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_farthest_elements_are_found_bounded_from_above_written_and_read(recipe, tmp_path):
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
    save_problem(problem, tmp_path / "some.mdp")
    again = load_problem(tmp_path / "some.mdp")
    value = again.value(float(solve(again, "tabu").objective[0]))
    assert value == pytest.approx(best, rel=1e-9)
