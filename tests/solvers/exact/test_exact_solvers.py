"""Exact backends, of kept and of refitted weights, agree with enumeration and are honest at every limit; no
bound of thousands of rows passes their optimum."""

import sys
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_search import floor
from strategies import KINDS, problems, random_gram, random_linear, random_weight, refit_layer

from maskopt import (
    NM,
    LayerProblem,
    LeastSquaresUpdate,
    Limits,
    Status,
    Unstructured,
    solve,
    verify,
)
from maskopt.errors import SolverError, SolverUnavailableError
from maskopt.protocol.bounds import lower_bound
from maskopt.protocol.solver import available_solvers, make_solver
from maskopt.solvers.exact import gurobi

HALF, SIXTY, TWO_FOUR = Unstructured(sparsity=0.5), Unstructured(sparsity=0.6), NM(keep=2, of=4)
OPTIMAL = {Status.OPTIMAL}
#: solver and whether kept weights are refitted, with the largest n and rows that are drawn, and the part of
#: its diagonal that an objective may be off
CASES = {
    ("branch", False): (10, 1, 1e-10), ("scip", False): (14, 1, 1e-10),
    ("highs", False): (12, 2, 1e-9), ("gurobi", False): (12, 2, 1e-9),
    ("branch", True): (10, 3, 1e-9), ("scip", True): (7, 2, 1e-9), ("gurobi", True): (7, 2, 1e-9),
}  # fmt: skip


def case_id(case):
    return f"{case[0]}-{'refitted' if case[1] else 'kept'}"


@pytest.fixture(params=CASES, ids=case_id, scope="module")
def case(request):
    info = available_solvers()[request.param[0]]
    if not info.available:
        pytest.skip(info.unavailable)
    return request.param


def slow_where(cases, late):
    """The cases, those in `late` for the slow tier alone."""
    return [pytest.param(c, marks=pytest.mark.slow) if late(c) else c for c in cases]


def layer(n=64, rows=1, kind="full", pattern=SIXTY, seed=1):
    return LayerProblem(random_weight(rows, n, seed), random_gram(n, kind, seed + 1), pattern)


def options_of(case):
    """A search of refitted weights by a general solver ends some time."""
    return {"workers": 0, **({"node_limit": 2000} if case[1] and case[0] != "branch" else {})}


@settings(max_examples=settings().max_examples // 2)  # 0.1 s each, of seven cases
@given(data=st.data())
def test_they_find_what_enumeration_finds(case, data):
    max_n, max_rows, off = CASES[case]
    problem = data.draw(problems(max_n=max_n, max_rows=max_rows))
    if case[1]:
        dampings = (0.001, 0.01, 0.3) if case[0] == "branch" else (0.01, 0.3)
        problem = problem.with_update(LeastSquaresUpdate(data.draw(st.sampled_from(dampings))))
    best = solve(problem, "exhaustive").objective
    found = solve(problem, case[0], **options_of(case))
    slack = 1e-6 * best + off * problem.diagonal_mass() + 1e-30
    assert bool(((found.objective - best).abs() <= slack).all())
    assert bool((found.lower_bound <= best + slack).all())
    checked = verify(problem, found).checked
    if case == ("branch", True):
        assert set(found.status) == OPTIMAL
        assert checked  # since so few masks are enumerated


def rows_of(case, kind):
    """Layers of every pattern and their starts; of kept weights, with rows of very different scales."""
    (name, refitted), update = case, LeastSquaresUpdate(0.01) if case[1] else None
    if kind == "degenerate":
        ones, gram = torch.ones(2, 8, dtype=torch.float64), random_gram(8, "full", 1)
        yield LayerProblem(0 * ones, gram, HALF, update=update), None
        if name == "branch":
            yield LayerProblem(ones, 0 * gram, HALF, update=update), None
        for keep in (0, 1, 5):
            yield refit_layer(Unstructured(keep=keep), n=5).with_update(update), None
    elif not refitted:
        for pattern in (Unstructured(keep=7), TWO_FOUR):
            problem = layer(16, 3, kind, pattern, 7 * KINDS.index(kind) + 1)
            spread = torch.randn(16, dtype=torch.float64).exp().square()
            scale = torch.stack([spread**0, spread, 1e-6 * spread])
            yield LayerProblem(problem.weight * scale, problem.gram, pattern), None
        for seed in range(4 if kind == "full" and name in ("gurobi", "highs") else 0):
            # the start costs 1e8 times the optimum, which is below tolerances in its units
            weight, gram = random_weight(1, 10, seed), random_gram(10, "full", seed)
            weight[0, 0] = 1e4
            yield LayerProblem(weight, gram, HALF), "worst"
    else:
        damping, patterns = 0.1, (TWO_FOUR if kind == "duplicates" else HALF,)
        if name == "branch":
            damping = 0.03
            patterns = (TWO_FOUR if kind in ("full", "low-rank") else HALF, NM(keep=1, of=4))
        for pattern in patterns:
            weight, gram = random_weight(2, 12, 1), random_gram(12, kind, 2)
            linear = random_linear(weight, gram, 3) if kind == "full" else None
            power = 0.5 if pattern == TWO_FOUR or kind == "zero-columns" else 0.0
            how = {"linear": linear, "update": LeastSquaresUpdate(damping, power)}
            yield LayerProblem(weight, gram, pattern, **how), None


FIRST = ("full", "outliers")


@pytest.mark.parametrize("kind", slow_where([*KINDS, "degenerate"], lambda k: k not in FIRST))
def test_rows_of_every_kind_are_proven(case, kind):
    for problem, start in rows_of(case, kind):
        best = solve(problem, "exhaustive")
        found = solve(problem, case[0], start=start, **options_of(case))
        off = floor(problem) if case[1] else 1e-10 * problem.diagonal_mass()
        slack = (1e-6 if case[1] else 2e-6) * best.objective + off
        if start is not None:
            slack = 1e-7 * best.objective
        assert bool(((found.objective - best.objective).abs() <= slack).all())
        assert bool((found.lower_bound <= best.objective + slack).all())
        # far below the mass of Q, SCIP's tolerances leave a relative gap: no OPTIMAL
        clear = torch.ones(problem.rows, dtype=torch.bool)
        if kind != "degenerate" and not case[1]:
            clear = best.objective > 1e-4 * problem.diagonal_mass()
        elif (case[0], kind) == ("scip", "outliers"):
            clear = ~clear
        proven = torch.tensor([status == Status.OPTIMAL for status in found.status])
        assert bool((proven | ~clear).all())
        verify(problem, found)


BEYOND = [
    *(("scip", {}, layer(24, 1, kind, pattern, 3)) for pattern in (SIXTY, TWO_FOUR)
      for kind in ("full", "low-rank", "duplicates", "outliers")),
    *(("scip", {"presolve": False}, layer(22, 1, "full", pattern)) for pattern in (HALF, NM(1, 2))),
    *((name, {}, layer(20, 2, "low-rank", pattern, 2)) for pattern in (SIXTY, TWO_FOUR)
      for name in ("highs", "gurobi")),
    *((name, {}, refit_layer(rows=1, n=22, damping=0.3)) for name in ("scip", "gurobi")),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "problem"), BEYOND, ids=str)
def test_they_agree_with_branch_where_enumeration_ends(name, options, problem):
    if not available_solvers()[name].available:
        pytest.skip(available_solvers()[name].unavailable)
    found, ours = solve(problem, name, **options), solve(problem, "branch")
    assert set(found.status) == set(ours.status) == OPTIMAL
    torch.testing.assert_close(found.objective, ours.objective, rtol=2e-6, atol=1e-9)
    for solution in (found, ours):
        verify(problem, solution)


LIMITED = {
    ("branch", False): (layer(64), 3, 0.5), ("scip", False): (layer(48), 1, 0.9),
    ("highs", False): (layer(24, kind="low-rank"), None, 0.5),
    ("gurobi", False): (layer(24, kind="low-rank"), None, 0.5),
    ("branch", True): (refit_layer(rows=2, n=20, damping=0.03), 3, 0.6),
    ("scip", True): (refit_layer(rows=2, n=20, damping=0.3), 1, 0.6),
    ("gurobi", True): (refit_layer(rows=2, n=20, damping=0.3), 1, 0.6),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", slow_where(CASES, lambda case: case[1]), ids=case_id, indirect=True
)
def test_limits_leave_an_incumbent_and_a_bound_that_holds(case):
    (name, refitted), (problem, nodes, gap) = case, LIMITED[case]
    limited = [(problem, {"limits": Limits(seconds=0)}), (problem, {"gap_limit": gap})]
    if nodes is not None:
        limited.append((problem, {"node_limit": nodes}))
    if not refitted:
        limited.append((layer(16, 2, pattern=TWO_FOUR, seed=2), {"gap_limit": 0.02}))
        limited.append((layer(16, 2, pattern=Unstructured(keep=6), seed=2), {"gap_limit": 0.3}))
    proven = {id(p): solve(p, "branch", workers=0).objective for p, _ in limited}
    for one, options in limited:
        best, off, (limit,) = proven[id(one)], floor(one), options
        found = solve(one, name, workers=0, **options)
        assert Status.FEASIBLE in found.status or limit == "gap_limit"
        most = best * (1 + (1e-9 if name == "branch" else 1e-6)) + off
        assert bool((found.lower_bound <= most).all())
        assert bool((found.objective >= best * (1 - 1e-6) - off).all())
        if not refitted:
            start = solve(one, "wanda")
            assert bool((found.objective <= start.objective).all())
            assert limit != "limits" or torch.equal(found.mask, start.mask)
        if limit == "limits":
            assert set(found.status) == {Status.FEASIBLE}
        elif one is problem and name in ("branch", "scip"):
            assert limit.replace("_", "") in found.trace.ended
        assert bool((found.gap <= options.get("gap_limit", 1.0) + 1e-9).all())
        verify(one, found)


PROCESSES = [("scip", False), ("branch", True), ("scip", True), ("gurobi", True)]


@pytest.mark.parametrize("case", slow_where(PROCESSES, lambda c: c[1]), ids=case_id, indirect=True)
def test_workers_threads_and_a_row_alone_change_nothing(case):
    (name, update), seen = case, []
    problem = refit_layer(rows=3, n=8, damping=0.1) if update else layer(12, 3, pattern=TWO_FOUR)
    more = {"on_progress": lambda progress: seen.append((progress.done, progress.total))}
    two = 1 if update else 2
    found, *others = (solve(problem, name, workers=workers, **more) for workers in (0, two))
    if name == "branch":
        others.append(solve(problem, name, threads=2))
    for other in others:
        assert torch.equal(other.mask, found.mask)
        assert torch.equal(other.lower_bound, found.lower_bound)
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2
    for row in range(3):
        assert torch.equal(solve(problem.row(row), name, workers=0).mask[0], found.mask[row])


def test_missing_packages_and_licences_name_the_remedy(monkeypatch):
    gurobipy = pytest.importorskip("gurobipy")
    for more, reason in ((0, "beyond this licence; use 'branch'"), (1, "gurobi: ")):
        refused = gurobipy.GurobiError(gurobipy.GRB.Error.SIZE_LIMIT_EXCEEDED + more, "no")
        monkeypatch.setattr(gurobi, "_solved", Mock(side_effect=refused))
        with pytest.raises(SolverError, match=reason):
            solve(layer(12), "gurobi", workers=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for solver, package in (("gurobi", "gurobipy"), ("highs", "highspy")):
        monkeypatch.setitem(sys.modules, package, None)
        info = available_solvers()[solver]
        assert not info.available
        assert f"pip install 'maskopt[{solver}]'" in info.unavailable
        with pytest.raises(SolverUnavailableError, match=package):
            make_solver(solver)


PATTERNS = {
    12: (Unstructured(keep=5), TWO_FOUR, NM(keep=1, of=4)),
    16: (Unstructured(keep=8), NM(keep=4, of=8), Unstructured(0.25)),
}


@pytest.mark.parametrize("n", slow_where(PATTERNS, lambda n: n > 12))
@pytest.mark.parametrize("kind", slow_where(KINDS, lambda kind: kind not in FIRST))
def test_no_bound_passes_the_optimum_of_rows_of_very_different_scales(kind, n):
    for pattern in PATTERNS[n]:
        seed = 7 * KINDS.index(kind) + 1000 * n
        weight = random_weight(36, n, seed + 1)
        weight[0] = 0
        weight[10:] *= torch.randn(26, n, dtype=torch.float64).mul(2).exp()
        weight[20:30] *= 1e-6
        problem = LayerProblem(weight, random_gram(n, kind, seed), pattern)
        exact = solve(problem, "exhaustive").objective
        bounds = {name: lower_bound(problem, name).value for name in ("box", "shift", "sdp")}
        bounds["crude"] = lower_bound(problem, "sdp", sweeps=1, rank=2, seed=3).value
        for name, value in bounds.items():
            assert bool((value <= exact + 1e-13 * problem.diagonal_mass()).all()), name
            assert bool((value >= 0).all()), name
        if kind in ("full", "diagonal"):  # and no idle zeros where the relaxation is any good
            assert float(bounds["sdp"].sum()) >= 0.5 * float(exact.sum())
