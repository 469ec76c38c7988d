"""Proven optima of refitted weights: the tree agrees with enumeration, and claims what it has shown."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_search import floor
from strategies import KINDS, problems, random_gram, random_linear, refit_layer

from maskopt import NM, LayerProblem, Limits, Refit, Status, Unstructured, solve, verify

PATTERNS = (Unstructured(sparsity=0.5), NM(keep=2, of=4), NM(keep=1, of=4))


@settings(max_examples=40)
@given(problems(max_n=10, max_rows=3), st.sampled_from((0.001, 0.01, 0.3)))
def test_it_finds_what_enumeration_finds(problem, damping):
    problem = problem.refitting(Refit(damping))
    found = solve(problem, "branch", workers=0)
    best = solve(problem, "exhaustive")
    assert set(found.status) == {Status.OPTIMAL}
    assert bool((found.objective <= best.objective * (1 + 1e-6) + floor(problem)).all())
    assert verify(problem, found).checked  # since so few masks are enumerated


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_larger_rows_of_every_kind(kind, pattern):
    problem = refit_layer(pattern, rows=2, n=16, kind=kind, damping=0.03)
    if kind == "full":
        part = random_linear(problem.weight, problem.gram, 3)
        problem = LayerProblem(
            problem.weight, problem.gram, pattern, linear=part, refit=problem.refit
        )
    found, best = solve(problem, "branch", workers=0), solve(problem, "exhaustive")
    assert set(found.status) == {Status.OPTIMAL}
    assert bool((found.objective <= best.objective * (1 + 1e-6) + floor(problem)).all())
    assert bool((found.lower_bound <= best.objective + floor(problem)).all())
    verify(problem, found)


def test_beyond_enumeration_it_rests_on_its_word_and_is_never_above_swap():
    problem = refit_layer(rows=2, n=32, damping=0.1)
    swapped = solve(problem, "swap", start="admm")
    found = solve(problem, "branch", start="admm", workers=0)
    assert set(found.status) == {Status.OPTIMAL}
    assert bool((found.objective <= swapped.objective + floor(problem)).all())
    assert "branch of maskopt" in str(verify(problem, found))


def test_workers_threads_and_a_row_alone_change_nothing():
    problem = refit_layer(rows=3, n=12)
    found = solve(problem, "branch", workers=0)
    for other in (solve(problem, "branch", workers=2), solve(problem, "branch", threads=2)):
        assert torch.equal(other.mask, found.mask)
        assert torch.equal(other.lower_bound, found.lower_bound)
    for row in range(3):
        alone = solve(problem.row(row), "branch")
        assert torch.equal(alone.mask[0], found.mask[row])


def test_limits_leave_a_bound_that_holds():
    problem = refit_layer(rows=2, n=28, damping=0.01)
    best = solve(problem, "branch", workers=0)
    for more, ended in (({"node_limit": 3}, "nodelimit"), ({"gap_limit": 0.6}, "gaplimit")):
        found = solve(problem, "branch", workers=0, **more)
        assert ended in found.trace.ended
        assert bool((found.lower_bound <= best.objective + floor(problem)).all())
        assert bool((found.objective >= best.objective - floor(problem)).all())
        verify(problem, found)
    found = solve(problem, "branch", workers=0, limits=Limits(seconds=0))
    assert set(found.status) == {Status.FEASIBLE}


def test_degenerate_rows_are_optimal_at_once():
    for weight, gram in ((0.0, 1.0), (1.0, 0.0)):
        problem = LayerProblem(
            weight * torch.ones(2, 8, dtype=torch.float64),
            gram * random_gram(8, "full", 1),
            PATTERNS[0],
            refit=Refit(0.01),
        )
        found = solve(problem, "branch", workers=0)
        assert set(found.status) == {Status.OPTIMAL}
        verify(problem, found)
    for keep in (0, 1, 5):
        problem = refit_layer(Unstructured(keep=keep), n=5)
        found = solve(problem, "branch", workers=0)
        assert set(found.status) == {Status.OPTIMAL}
        verify(problem, found)


def test_float32_rows_are_proven_too():
    problem = refit_layer(rows=2, n=14, dtype=torch.float32)
    found, best = solve(problem, "branch", workers=0), solve(problem, "exhaustive")
    assert set(found.status) == {Status.OPTIMAL}
    torch.testing.assert_close(found.objective, best.objective, rtol=1e-6, atol=1e-12)


def test_what_is_fixed_at_a_node_does_not_depend_on_its_parents_bound(monkeypatch):
    """Its prices speak of its own bound, which may lie below that of its parent."""
    from maskopt.solvers.exact import refit_rows, refit_tree

    tasks = []
    monkeypatch.setattr(refit_rows, "run_rows", lambda search, given, *rest: tasks.extend(given))
    monkeypatch.setattr(refit_rows, "assemble", lambda *rest: solve(rest[0], "wanda"))
    problem = refit_layer(rows=4, n=20, damping=0.3)
    solve(problem, "branch")
    for task in tasks:
        tree, fixed = refit_tree._Tree(task), []
        for least in (0.0, tree.aim * (1 - 1e-6)):
            tree.open.clear()
            tree._add(np.zeros(20, dtype=np.int8), np.full(20, 0.5), least)
            fixed.append(tree.open[0][2].tolist() if tree.open else [])
        assert fixed[0] == fixed[1]


def test_turns_that_end_early_cost_nodes_and_no_proof(monkeypatch):
    from maskopt.solvers.exact import refit_tree

    monkeypatch.setattr(refit_tree, "_TURNS", 1)
    problem = refit_layer(rows=3, n=14, damping=0.03)
    found, best = solve(problem, "branch", workers=0), solve(problem, "exhaustive")
    assert set(found.status) == {Status.OPTIMAL}
    assert bool((found.objective <= best.objective * (1 + 1e-6) + floor(problem)).all())
