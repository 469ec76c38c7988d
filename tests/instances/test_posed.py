"""Anybody's quadratic objective: what is solved, proven and refused of it, in its own units."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskopt import RowProblem, Solution, Status, solve, verify
from maskopt.errors import ProblemError, VerificationError


def values_of(u, count):
    """Of every set of so many elements."""
    sets = itertools.combinations(range(len(u)), count)
    return [u[np.ix_(chosen, chosen)].sum() for chosen in sets]


@given(st.integers(0, 10**9), st.booleans(), st.booleans())
def test_any_quadratic_objective_is_solved_in_its_own_units(seed, maximise, whole):
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 8))
    u = random.normal(size=(n, n)) * 10.0 ** random.integers(-3, 4)
    if whole:
        u = random.integers(-9, 10, (n, n)).astype(float)
    count, constant = int(random.integers(0, n + 1)), float(random.normal())
    problem = RowProblem.from_quadratic(u, select=count, maximise=maximise, constant=constant)
    best = (max if maximise else min)(values_of(u, count)) + constant
    solution = solve(problem, "branch", workers=0, proof=True)
    found = problem.value(float(solution.objective[0]))
    scale = np.abs(u).sum() + 1
    assert found == pytest.approx(best, abs=1e-6 * scale)
    assert problem.integral or not whole
    bound = problem.value(float(solution.lower_bound[0]))
    assert bound >= found - 1e-9 * scale if maximise else bound <= found + 1e-9 * scale
    own, same = problem.quadratic()
    np.testing.assert_allclose(own, (u + u.T) / 2, atol=1e-9 * scale)
    assert same == constant


@pytest.mark.parametrize(
    ("bad", "more", "message"),
    [
        *(
            (u, {}, "quadratic objective")
            for u in (
                np.eye(3) * 1j, torch.eye(3) * 1j, np.eye(3) * 1e308, [[1, 2], [3]], "x", [["a"]],
                [[10**400]], [[None]], [], np.ones((2, 3)), [[float("nan")]],
            )
        ),
        (np.eye(3), {"constant": None}, None), (np.eye(3), {"constant": [1.0, 2.0]}, None),
        (np.eye(3), {"select": "1"}, None), (np.eye(3), {"select": 1.5}, None),
        (np.eye(3), {"select": 4}, r"select must be 0 … 3, .* not 4"),
    ],
    ids=repr,
)  # fmt: skip
def test_quadratics_of_other_numbers_are_refused(bad, more, message):
    with pytest.raises(ProblemError, match=message):
        RowProblem.from_quadratic(bad, **{"select": 1, **more})


def test_a_quadratic_is_given_back_with_its_sense():
    u = np.array([[0.0, 2.0, 1.0], [2.0, 0.0, 3.0], [1.0, 3.0, 0.0]])
    problem = RowProblem.from_quadratic(u, select=2, maximise=True, constant=1.0)
    assert problem.maximised
    back, constant = problem.quadratic()
    assert np.allclose(back, u)
    assert constant == 1.0
    posed = problem.posed(problem.objective(np.array([True, False, False])), 0.0)
    assert posed.value == pytest.approx(7.0)
    assert posed.gap == pytest.approx((posed.bound - 7.0) / 7.0)
    assert not RowProblem.from_quadratic(u, select=2).maximised
    eye = torch.eye(3)
    for u in (eye.bfloat16(), eye.clone().requires_grad_(), np.eye(3, dtype=bool)):
        assert RowProblem.from_quadratic(u, select=1).value(1.0) == 1.0


def penalised(penalty):
    """Choose three of ten without a conflict: the penalties make f millions of times the value."""
    rng = np.random.default_rng(0)
    u = np.diag(rng.random(10))
    pairs = np.tril(rng.random((10, 10)) < 0.3, -1)
    return RowProblem.from_quadratic(u + penalty * pairs, select=3)


@pytest.mark.parametrize("penalty", [1.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("name", ["exhaustive", "branch", "scip", "highs", "portfolio"])
def test_what_is_called_optimal_is_so_in_the_units_of_the_problem(name, penalty):
    problem, known = penalised(penalty), penalised(1e3)
    best = known.value(float(solve(known, "exhaustive").objective[0]))
    found = solve(problem, name)
    posed = problem.posed(float(found.objective[0]), float(found.lower_bound[0]))
    verify(problem, found)
    assert posed.value == pytest.approx(best, rel=1e-6 + 1e-15 * penalty)
    if found.status[0] is Status.OPTIMAL:
        assert posed.gap <= 1e-6


def test_one_element_that_must_not_be_chosen_hides_nothing():
    """Of f, which has the penalty's rounding in it, every choice costs nothing to speak of."""
    u = np.random.default_rng(3).normal(size=(12, 12))
    u = u @ u.T
    u[0, 0] = 1e15
    row = RowProblem.from_quadratic(u, select=4)
    found = solve(row, "branch")
    assert found.status == (Status.OPTIMAL,)
    verify(row, found)
    assert row.value(float(found.objective)) == pytest.approx(min(values_of(u, 4)), rel=1e-6)


def test_what_penalties_round_off_is_refused():
    with pytest.raises(ProblemError, match="scale penalties down to what they need"):
        penalised(1e11)
    whole = np.diag([1.0, 2, 3, 4])
    whole[1, 2] = 2e12  # whole numbers are exact however far apart
    problem = RowProblem.from_quadratic(whole, select=2)
    assert problem.value(float(solve(problem, "exhaustive").objective)) == 3


def test_a_worse_mask_is_not_optimal_however_large_the_penalties_are():
    problem = penalised(1e6)
    layer, best = problem.as_layer(), solve(problem, "exhaustive")
    masks = torch.tensor(
        [[j not in chosen for j in range(10)] for chosen in itertools.combinations(range(10), 3)]
    )
    costs = {float(layer.objective(mask[None])): mask[None] for mask in masks}
    worse = sorted(costs)[1]
    assert 1e-3 < worse - float(best.objective[0]) < 1e-6 * worse  # part of f it is nothing
    claim = Solution.of(layer, costs[worse], status=Status.OPTIMAL, lower_bound=best.lower_bound)
    word = replace(claim, lower_bound=claim.objective, trusted=("SCIP 10.0",))
    low = replace(best, objective=best.objective - 1e-3, status=(Status.FEASIBLE,))
    for solution, message in (
        (claim, "claims optimal without proof"),
        (word, "a mask of objective"),
        (low, "objective: row 0 states"),
    ):
        with pytest.raises(VerificationError, match=message):
            verify(problem, solution)
