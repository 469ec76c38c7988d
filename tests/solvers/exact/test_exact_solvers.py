"""Exact backends, of kept and of refitted weights, agree with enumeration and are honest at every limit."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_search import floor
from strategies import KINDS, problems, random_gram, random_linear, random_weight, refit_layer

from maskopt import NM, LayerProblem, Limits, Refit, Status, Unstructured, solve, verify
from maskopt.errors import SolverError, SolverUnavailableError
from maskopt.solver import available_solvers, make_solver
from maskopt.solvers.exact import gurobi

HALF, SIXTY = Unstructured(sparsity=0.5), Unstructured(sparsity=0.6)
TWO_FOUR = NM(keep=2, of=4)
#: solver and whether kept weights are refitted, with the largest n and rows that are drawn, and the part of
#: its diagonal that an objective may be off
CASES = {
    ("branch", False): (10, 1, 1e-10),
    ("scip", False): (14, 1, 1e-10),
    ("highs", False): (12, 2, 1e-9),
    ("gurobi", False): (12, 2, 1e-9),
    ("branch", True): (10, 3, 1e-9),
    ("scip", True): (7, 2, 1e-9),
    ("gurobi", True): (7, 2, 1e-9),
}


def case_id(case):
    return f"{case[0]}-{'refitted' if case[1] else 'kept'}"


@pytest.fixture(params=CASES, ids=case_id, scope="module")
def case(request):
    info = available_solvers()[request.param[0]]
    if not info.available:
        pytest.skip(info.unavailable)
    return request.param


def layer(n=64, rows=1, kind="full", pattern=SIXTY, seed=1):
    return LayerProblem(random_weight(rows, n, seed), random_gram(n, kind, seed + 1), pattern)


def options_of(case):
    """A search of refitted weights by a general solver ends some time."""
    return {"workers": 0, **({"node_limit": 2000} if case[1] and case[0] != "branch" else {})}


@given(data=st.data())
def test_they_find_what_enumeration_finds(case, data):
    max_n, max_rows, off = CASES[case]
    problem = data.draw(problems(max_n=max_n, max_rows=max_rows))
    if case[1]:
        dampings = (0.001, 0.01, 0.3) if case[0] == "branch" else (0.01, 0.3)
        problem = problem.refitting(Refit(data.draw(st.sampled_from(dampings))))
    found, best = (
        solve(problem, case[0], **options_of(case)),
        solve(problem, "exhaustive").objective,
    )
    slack = 1e-6 * best + off * problem.diagonal_mass() + 1e-30
    assert bool(((found.objective - best).abs() <= slack).all())
    assert bool((found.lower_bound <= best + slack).all())
    checked = verify(problem, found).checked
    if case == ("branch", True):
        assert set(found.status) == {Status.OPTIMAL}
        assert checked  # since so few masks are enumerated


def rows_of(case, kind):
    """Layers of every pattern; of kept weights, with rows of very different scales."""
    name, refit = case
    if not refit:
        for pattern in (Unstructured(keep=7), TWO_FOUR):
            problem = layer(16, 3, kind, pattern, 7 * KINDS.index(kind) + 1)
            spread = torch.randn(16, dtype=torch.float64).exp().square()
            scale = torch.stack([spread**0, spread, 1e-6 * spread])
            yield LayerProblem(problem.weight * scale, problem.gram, pattern)
        return
    if name == "branch":
        n, damping, patterns = 16, 0.03, (HALF, TWO_FOUR, NM(keep=1, of=4))
    else:
        n, damping, patterns = 12, 0.1, (TWO_FOUR if kind == "duplicates" else HALF,)
    for pattern in patterns:
        weight, gram = random_weight(2, n, 1), random_gram(n, kind, 2)
        linear = random_linear(weight, gram, 3) if kind == "full" else None
        yield LayerProblem(weight, gram, pattern, linear=linear, refit=Refit(damping))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind_are_proven(case, kind):
    for problem in rows_of(case, kind):
        found, best = solve(problem, case[0], **options_of(case)), solve(problem, "exhaustive")
        off = floor(problem) if case[1] else 1e-10 * problem.diagonal_mass()
        slack = (1e-6 if case[1] else 2e-6) * best.objective + off
        assert bool(((found.objective - best.objective).abs() <= slack).all())
        assert bool((found.lower_bound <= best.objective + slack).all())
        # far below the mass of Q, SCIP's tolerances leave a relative gap: no OPTIMAL
        clear = torch.ones(problem.rows, dtype=torch.bool)
        if not case[1]:
            clear = best.objective > 1e-4 * problem.diagonal_mass()
        elif (case[0], kind) == ("scip", "outliers"):
            clear = ~clear
        proven = torch.tensor([status == Status.OPTIMAL for status in found.status])
        assert bool((proven | ~clear).all())
        verify(problem, found)


BEYOND = [
    *(("scip", layer(24, 1, kind, pattern, 3)) for pattern in (SIXTY, TWO_FOUR)
      for kind in ("full", "low-rank", "duplicates", "outliers")),
    *((name, layer(20, 2, "low-rank", pattern, 2)) for pattern in (SIXTY, TWO_FOUR)
      for name in ("highs", "gurobi")),
    *((name, refit_layer(rows=2, n=24, damping=0.3)) for name in ("scip", "gurobi")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "problem"), BEYOND, ids=str)
def test_they_agree_with_branch_where_enumeration_ends(name, problem):
    if not available_solvers()[name].available:
        pytest.skip(available_solvers()[name].unavailable)
    found, ours = solve(problem, name), solve(problem, "branch")
    assert set(found.status) == set(ours.status) == {Status.OPTIMAL}
    torch.testing.assert_close(found.objective, ours.objective, rtol=2e-6, atol=1e-9)
    for solution in (found, ours):
        verify(problem, solution)


LIMITED = {
    ("branch", False): ("full", 64, {"node_limit": 3}, {"gap_limit": 0.5}),
    ("scip", False): ("full", 60, {"node_limit": 1}, {"gap_limit": 0.9}),
    ("highs", False): ("low-rank", 24, {"gap_limit": 0.5}),
    ("gurobi", False): ("low-rank", 24, {"gap_limit": 0.5}),
    ("branch", True): ("full", 28, {"node_limit": 3}, {"gap_limit": 0.6}),
    ("scip", True): ("full", 24, {"node_limit": 1}, {"gap_limit": 0.6}),
    ("gurobi", True): ("full", 24, {"node_limit": 1}, {"gap_limit": 0.6}),
}


def test_limits_leave_an_incumbent_and_a_bound_that_holds(case):
    kind, n, *limits = LIMITED[case]
    if case[1]:
        damping = 0.01 if case[0] == "branch" else 0.3
        problem, start = refit_layer(rows=2, n=n, damping=damping), None
    else:
        problem = layer(n, kind=kind)
        start = solve(problem, "wanda")
    best, off = solve(problem, "branch", workers=0).objective, floor(problem)
    holds = best * (1 + (1e-9 if case == ("branch", False) else 1e-6)) + off
    for options in ({"limits": Limits(seconds=0)}, *limits):
        found = solve(problem, case[0], workers=0, **options)
        assert Status.FEASIBLE in found.status or "gap_limit" in options
        assert bool((found.lower_bound <= holds).all())
        assert bool((found.objective >= best * (1 - 1e-6) - off).all())
        assert start is None or bool((found.objective <= start.objective).all())
        if "limits" in options:
            assert set(found.status) == {Status.FEASIBLE}
            assert start is None or torch.equal(found.mask, start.mask)
        elif case[0] in ("branch", "scip"):
            ended = {"node_limit": "nodelimit", "gap_limit": "gaplimit"}[next(iter(options))]
            assert ended in found.trace.ended
        assert bool((found.gap <= options.get("gap_limit", 1.0) + 1e-9).all())
        verify(problem, found)


@pytest.mark.parametrize("limit", [0.02, 0.3])
@pytest.mark.parametrize("case", [case for case in CASES if not case[1]], indirect=True)
def test_gap_limits_are_kept(case, limit):
    for pattern in (Unstructured(keep=6), TWO_FOUR):
        problem = layer(16, 2, pattern=pattern, seed=2)
        exact = solve(problem, "exhaustive").objective
        solution = solve(problem, case[0], gap_limit=limit, workers=0)
        assert bool((solution.gap <= limit + 1e-9).all())
        assert bool((solution.objective <= exact / (1 - limit) * (1 + 1e-9)).all())
        assert bool((solution.lower_bound <= exact * (1 + 2e-6)).all())
        verify(problem, solution)


PROCESSES = [("scip", False)]
PROCESSES += [
    pytest.param((name, True), marks=pytest.mark.slow) for name in ("branch", "scip", "gurobi")
]


@pytest.mark.parametrize("case", PROCESSES, ids=case_id, indirect=True)
def test_workers_threads_and_a_row_alone_change_nothing(case):
    name, seen = case[0], []
    problem = refit_layer(rows=3, n=10, damping=0.1) if case[1] else layer(12, 3, pattern=TWO_FOUR)
    more = {"on_progress": lambda progress: seen.append((progress.done, progress.total))}
    found, *others = (solve(problem, name, workers=workers, **more) for workers in (0, 2))
    if name == "branch":
        others.append(solve(problem, name, threads=2))
    for other in others:
        assert torch.equal(other.mask, found.mask)
        assert torch.equal(other.lower_bound, found.lower_bound)
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2
    for row in range(3):
        assert torch.equal(solve(problem.row(row), name, workers=0).mask[0], found.mask[row])


def test_degenerate_rows_are_optimal_at_once(case):
    refit = Refit(0.01) if case[1] else None
    ones, gram = torch.ones(2, 8, dtype=torch.float64), random_gram(8, "full", 1)
    made = [LayerProblem(0 * ones, gram, HALF, refit=refit)]
    made += [refit_layer(Unstructured(keep=keep), n=5).refitting(refit) for keep in (0, 1, 5)]
    if case[0] == "branch":
        made.append(LayerProblem(ones, 0 * gram, HALF, refit=refit))
    for problem in made:
        found = solve(problem, case[0], workers=0)
        assert set(found.status) == {Status.OPTIMAL}
        verify(problem, found)


@pytest.mark.parametrize(("solver", "package"), [("gurobi", "gurobipy"), ("highs", "highspy")])
def test_a_missing_package_is_listed_with_the_reason(solver, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    info = available_solvers()[solver]
    assert not info.available
    assert f"pip install 'maskopt[{solver}]'" in info.unavailable
    with pytest.raises(SolverUnavailableError, match=package):
        make_solver(solver)


@pytest.mark.parametrize("case", [("gurobi", False)], ids=case_id, indirect=True)
@pytest.mark.parametrize(
    ("more", "reason"), [(0, "beyond this licence; use 'branch'"), (1, "gurobi: ")]
)
def test_a_row_beyond_gurobis_licence_names_the_remedy(case, more, reason, monkeypatch):
    gurobipy = pytest.importorskip("gurobipy")

    def refused(task, model):
        raise gurobipy.GurobiError(gurobipy.GRB.Error.SIZE_LIMIT_EXCEEDED + more, "no")

    monkeypatch.setattr(gurobi, "_optimized", refused)
    with pytest.raises(SolverError, match=reason):
        solve(layer(12), "gurobi", workers=0)


@pytest.mark.parametrize("case", [("gurobi", False), ("highs", False)], ids=case_id, indirect=True)
def test_a_poor_start_costs_no_proof(case):
    """Where it costs 1e8 times the optimum, that is below tolerances in its units."""
    for seed in range(4):
        weight = random_weight(1, 10, seed)
        weight[0, 0] = 1e4
        problem = LayerProblem(weight, random_gram(10, "full", seed), HALF)
        found = solve(problem, case[0], start="worst", workers=0)
        verify(problem, found)
        torch.testing.assert_close(found.objective, solve(problem, "exhaustive").objective)
