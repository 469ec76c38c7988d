"""Gurobi and HiGHS: optional exact backends that must agree with enumeration, and with their limits."""

import sys

import pytest
import torch
from hypothesis import given, settings
from strategies import problems, random_gram, random_weight

from maskopt import NM, LayerProblem, Status, Unstructured, available_solvers, solve, verify
from maskopt.errors import OptionError, SolverError, SolverUnavailableError
from maskopt.solver import make_solver
from maskopt.solvers.exact import gurobi

NAMES = ("gurobi", "highs")


@pytest.fixture(params=NAMES)
def name(request):
    info = available_solvers()[request.param]
    if not info.available:
        pytest.skip(info.unavailable)
    return request.param


@settings(max_examples=40)
@given(problem=problems(max_n=12, max_rows=2))
def test_they_agree_with_exhaustive(problem):
    best = solve(problem, "exhaustive").objective
    floor = 1e-9 * problem.diagonal_mass()
    for name in NAMES:
        if available_solvers()[name].available:
            solution = solve(problem, name, workers=0)
            verify(problem, solution)
            assert bool((solution.objective <= best * (1 + 1e-6) + floor).all()), name
            assert bool((solution.lower_bound <= best * (1 + 1e-6) + floor).all()), name


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.6), NM(keep=2, of=4)], ids=str)
def test_real_sized_rows_in_worker_processes(name, pattern):
    problem = LayerProblem(random_weight(2, 20, 1), random_gram(20, "low-rank", 3), pattern)
    solution = solve(problem, name)
    assert set(solution.status) == {Status.OPTIMAL}
    verify(problem, solution)


def test_limits_are_kept_and_honest(name):
    problem = LayerProblem(
        random_weight(1, 24, 1), random_gram(24, "low-rank", 3), Unstructured(sparsity=0.5)
    )
    none = solve(problem, name, time_limit=0.0)
    assert none.status == (Status.FEASIBLE,)
    assert torch.equal(none.mask, solve(problem, "wanda").mask)
    loose = solve(problem, name, gap_limit=0.5, time_limit=10.0)
    assert bool((loose.objective <= none.objective).all())
    verify(problem, loose)
    for bad in ({"time_limit": -1.0}, {"gap_limit": 1.0}, {"row_seconds": -1.0}):
        with pytest.raises(OptionError):
            solve(problem, name, **bad)


def test_too_large_is_refused_with_the_remedy(name):
    problem = LayerProblem(torch.ones(1, 600), torch.eye(600), Unstructured(sparsity=0.5))
    with pytest.raises(SolverError, match="lower_bound"):
        solve(problem, name)


@pytest.mark.parametrize(("solver", "package"), [("gurobi", "gurobipy"), ("highs", "highspy")])
def test_a_missing_package_is_listed_with_the_reason(solver, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    info = available_solvers()[solver]
    assert not info.available
    assert f"pip install 'maskopt[{solver}]'" in info.unavailable
    with pytest.raises(SolverUnavailableError, match=package):
        make_solver(solver)


def test_a_row_beyond_gurobis_licence_names_the_remedy(monkeypatch):
    gurobipy = pytest.importorskip("gurobipy")
    if not available_solvers()["gurobi"].available:
        pytest.skip(available_solvers()["gurobi"].unavailable)
    size = gurobipy.GRB.Error.SIZE_LIMIT_EXCEEDED
    problem = LayerProblem(
        random_weight(1, 12, 1), random_gram(12, "full", 3), Unstructured(sparsity=0.5)
    )
    for errno, reason in ((size, "beyond this licence; use 'branch'"), (size + 1, "gurobi: ")):

        def refused(task, model, errno=errno):
            raise gurobipy.GurobiError(errno, "no")

        monkeypatch.setattr(gurobi, "_optimized", refused)
        with pytest.raises(SolverError, match=reason):
            solve(problem, "gurobi", workers=0)


@pytest.mark.parametrize("name", ["gurobi", "highs"])
def test_a_poor_start_costs_no_proof(name):
    """Where it costs 1e8 times the optimum, that is below tolerances in its units."""
    if not available_solvers()[name].available:
        pytest.skip(f"{name} is not installed")
    for seed in range(4):
        weight = random_weight(1, 10, seed)
        weight[0, 0] = 1e4
        problem = LayerProblem(weight, random_gram(10, "full", seed), Unstructured(0.5))
        best = solve(problem, "exhaustive").objective
        found = solve(problem, name, start="worst", workers=0)
        verify(problem, found)
        torch.testing.assert_close(found.objective, best)
