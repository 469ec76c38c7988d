"""Refitted weights through general solvers: they agree with enumeration, and claim what they have shown."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_search import floor
from strategies import KINDS, problems, random_linear, refit_layer

from maskopt import NM, LayerProblem, Limits, Refit, Status, Unstructured, solve, verify

SOLVERS = ("scip", "gurobi")


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=15)
@given(problem=problems(max_n=7, max_rows=2), damping=st.sampled_from((0.01, 0.3)))
def test_they_find_what_enumeration_finds(solver, problem, damping):
    problem = problem.refitting(Refit(damping))
    found = solve(problem, solver, workers=0, node_limit=2000)
    best = solve(problem, "exhaustive")
    assert bool((found.objective <= best.objective * (1 + 1e-6) + floor(problem)).all())
    assert bool((found.lower_bound <= best.objective * (1 + 1e-6) + floor(problem)).all())
    verify(problem, found)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind_are_proven(solver, kind):
    pattern = NM(keep=2, of=4) if kind == "duplicates" else Unstructured(sparsity=0.5)
    problem = refit_layer(pattern, rows=2, n=12, kind=kind, damping=0.1)
    if kind == "full":
        part = random_linear(problem.weight, problem.gram, 3)
        problem = LayerProblem(
            problem.weight, problem.gram, pattern, linear=part, refit=problem.refit
        )
    found = solve(problem, solver, workers=0, node_limit=2000)
    best = solve(problem, "exhaustive")
    if (solver, kind) != ("scip", "outliers"):  # there its tolerances end it
        assert set(found.status) == {Status.OPTIMAL}
    assert bool((found.objective <= best.objective * (1 + 1e-6) + floor(problem)).all())
    verify(problem, found)


@pytest.mark.parametrize("solver", SOLVERS)
def test_they_agree_with_the_tree_where_enumeration_ends(solver):
    problem = refit_layer(rows=2, n=24, damping=0.3)
    found, tree = solve(problem, solver, workers=0), solve(problem, "branch", workers=0)
    assert set(found.status) == set(tree.status) == {Status.OPTIMAL}
    torch.testing.assert_close(found.objective, tree.objective, rtol=1e-6, atol=1e-12)
    verify(problem, found)


@pytest.mark.parametrize("solver", SOLVERS)
def test_limits_leave_a_bound_that_holds(solver):
    problem = refit_layer(rows=2, n=24, damping=0.3)
    best = solve(problem, "branch", workers=0)
    for more in ({"node_limit": 1}, {"gap_limit": 0.6}, {"limits": Limits(seconds=0)}):
        found = solve(problem, solver, workers=0, **more)
        assert set(found.status) == {Status.FEASIBLE}
        assert bool((found.lower_bound <= best.objective * (1 + 1e-6) + floor(problem)).all())
        assert bool((found.objective >= best.objective * (1 - 1e-6) - floor(problem)).all())
        verify(problem, found)


@pytest.mark.parametrize("solver", SOLVERS)
def test_worker_processes_and_a_row_alone_change_nothing(solver):
    problem = refit_layer(rows=3, n=10, damping=0.1)
    found, other = solve(problem, solver, workers=0), solve(problem, solver, workers=2)
    assert torch.equal(other.mask, found.mask)
    assert torch.equal(other.lower_bound, found.lower_bound)
    assert torch.equal(solve(problem.row(1), solver).mask[0], found.mask[1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_degenerate_rows_are_optimal_at_once(solver):
    for keep in (0, 1, 5):
        problem = refit_layer(Unstructured(keep=keep), n=5)
        found = solve(problem, solver, workers=0)
        assert set(found.status) == {Status.OPTIMAL}
        verify(problem, found)
    zero = LayerProblem(
        torch.zeros(2, 8), torch.eye(8), Unstructured(sparsity=0.5), refit=Refit(0.01)
    )
    assert set(solve(zero, solver, workers=0).status) == {Status.OPTIMAL}
