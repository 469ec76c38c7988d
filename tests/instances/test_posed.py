"""Anybody's quadratic objective: what is solved, proven and refused of it, in its own units."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskopt import (
    RowProblem,
    Solution,
    Status,
    solve,
    verify,
)
from maskopt.errors import ProblemError, VerificationError


@given(st.integers(0, 10**9), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_quadratic_objective_is_solved_in_its_own_units(seed, maximise, whole):
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 8))
    quadratic = random.normal(size=(n, n)) * 10.0 ** random.integers(-3, 4)
    if whole:
        quadratic = random.integers(-9, 10, (n, n)).astype(float)
    count, constant = int(random.integers(0, n + 1)), float(random.normal())
    problem = RowProblem.from_quadratic(
        quadratic, select=count, maximise=maximise, constant=constant
    )
    values = [
        quadratic[np.ix_(c, c)].sum() + constant for c in itertools.combinations(range(n), count)
    ]
    solution = solve(problem, "branch", workers=0, proof=True)
    found = problem.value(float(solution.objective[0]))
    scale = np.abs(quadratic).sum() + 1
    assert found == pytest.approx(max(values) if maximise else min(values), abs=1e-6 * scale)
    assert problem.integral or not whole
    bound = problem.value(float(solution.lower_bound[0]))
    assert bound >= found - 1e-9 * scale if maximise else bound <= found + 1e-9 * scale
    own, same = problem.quadratic()
    np.testing.assert_allclose(own, (quadratic + quadratic.T) / 2, atol=1e-9 * scale)
    assert same == constant


@pytest.mark.parametrize(
    "bad",
    [
        np.eye(3) * 1j, torch.eye(3) * 1j, np.eye(3) * 1e308, [[1, 2], [3]], "x", [["a"]],
        [[10**400]], [[None]], [], np.ones((2, 3)), [[float("nan")]],
    ],
    ids=repr,
)  # fmt: skip
def test_quadratics_of_other_numbers_are_refused(bad):
    with pytest.raises(ProblemError, match="quadratic objective"):
        RowProblem.from_quadratic(bad, select=1)


@pytest.mark.parametrize(
    "u",
    [torch.eye(3, dtype=torch.bfloat16), torch.eye(3, requires_grad=True), np.eye(3, dtype=bool)],
)
def test_quadratics_of_any_real_kind(u):
    assert RowProblem.from_quadratic(u, select=1).value(1.0) == 1.0
    for more in ({"constant": None}, {"constant": [1.0, 2.0]}, {"select": "1"}, {"select": 1.5}):
        with pytest.raises(ProblemError):
            RowProblem.from_quadratic(u, **{"select": 1, **more})


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
    with pytest.raises(ProblemError, match=r"select must be 0 … 3, .* not 4"):
        RowProblem.from_quadratic(u, select=4)


def penalised(penalty):
    """Choose three of ten without a conflict: the penalties make f millions of times the value."""
    rng = np.random.default_rng(0)
    u = np.diag(rng.random(10))
    pairs = np.tril(rng.random((10, 10)) < 0.3, -1)
    return RowProblem.from_quadratic(u + penalty * pairs, select=3)


@pytest.mark.parametrize("penalty", [1.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("name", ["exhaustive", "branch", "scip", "highs", "portfolio"])
def test_what_is_called_optimal_is_so_in_the_units_of_the_problem(name, penalty):
    problem = penalised(penalty)
    best = float(solve(penalised(1e3), "exhaustive").objective[0])
    best = penalised(1e3).value(best)
    found = solve(problem, name)
    posed = problem.posed(float(found.objective[0]), float(found.lower_bound[0]))
    verify(problem, found)
    assert posed.value == pytest.approx(best, rel=1e-6 + 1e-15 * penalty)
    if found.status[0] is Status.OPTIMAL:
        assert posed.gap <= 1e-6


def test_one_element_that_must_not_be_chosen_hides_nothing():
    """Of f, which has the penalty's rounding in it, every choice costs nothing to speak of."""
    generator = np.random.default_rng(3)
    u = generator.normal(size=(12, 12))
    u = u @ u.T
    u[0, 0] = 1e15
    row = RowProblem.from_quadratic(u, select=4)
    found = solve(row, "branch")
    assert found.status == (Status.OPTIMAL,)
    verify(row, found)
    best = min(u[np.ix_(chosen, chosen)].sum() for chosen in itertools.combinations(range(12), 4))
    assert row.value(float(found.objective)) == pytest.approx(best, rel=1e-6)


def test_what_penalties_round_off_is_refused():
    with pytest.raises(ProblemError, match="scale penalties down to what they need"):
        penalised(1e11)
    whole = np.diag([1.0, 2, 3, 4])
    whole[1, 2] = 2e12  # whole numbers are exact beside each other
    problem = RowProblem.from_quadratic(whole, select=2)
    assert problem.value(float(solve(problem, "exhaustive").objective)) == 3


def test_a_worse_mask_is_not_optimal_however_large_the_penalties_are():
    problem = penalised(1e6)
    layer = problem.as_layer()
    best = solve(problem, "exhaustive")
    costs = {}
    for chosen in itertools.combinations(range(10), 3):
        mask = torch.ones(1, 10, dtype=torch.bool)
        mask[0, list(chosen)] = False
        costs[float(layer.objective(mask)[0])] = mask
    worse = sorted(costs)[1]
    assert 1e-3 < worse - float(best.objective[0]) < 1e-6 * worse  # part of f it is nothing
    claim = Solution.of(layer, costs[worse], status=Status.OPTIMAL, lower_bound=best.lower_bound)
    with pytest.raises(VerificationError, match="claims optimal without proof"):
        verify(problem, claim)
    word = replace(claim, lower_bound=claim.objective, trusted=("SCIP 10.0",))
    with pytest.raises(VerificationError, match="a mask of objective"):
        verify(problem, word)
    low = replace(best, objective=best.objective - 1e-3, status=(Status.FEASIBLE,))
    with pytest.raises(VerificationError, match="objective: row 0 states"):
        verify(problem, low)
