"""Greedy elimination for refitted weights: what the Optimal Brain Surgeon would remove, one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import KINDS, problems, random_gram, random_linear

from maskopt import NM, LayerProblem, Limits, Refit, Unstructured, solve, verify

PATTERNS = (Unstructured(sparsity=0.5), NM(keep=2, of=4), NM(keep=1, of=4))


def layer(pattern=PATTERNS[0], rows=3, n=16, kind="full", seed=1, linear=False, damping=0.02):
    """No weight is 0, so that nothing ties."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    gram = random_gram(n, kind, seed + 1)
    part = random_linear(weight, gram, seed + 2) if linear else None
    return LayerProblem(weight, gram, pattern, linear=part, refit=Refit(damping))


def one_by_one(problem, row):
    """By F itself: the removal after which least squares cost least, again and again."""
    alone = problem.row(row).as_layer()
    group, quota = problem.group_size, problem.pruned_per_group
    mask = torch.ones(1, problem.n, dtype=torch.bool)
    while int((~mask).sum()) < quota * (problem.n // group):
        best = None
        for u in mask[0].nonzero()[:, 0].tolist():
            inside = slice(u // group * group, u // group * group + group)
            if int((~mask[0, inside]).sum()) == quota:
                continue
            other = mask.clone()
            other[0, u] = False
            cost = float(alone.under(Unstructured(keep=int(other.sum()))).objective(other)[0])
            if best is None or cost < best[0]:
                best = cost, other
        mask = best[1]
    return mask[0]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("panel", [1, 3, 64])
def test_it_removes_what_costs_least_one_by_one(pattern, linear, panel):
    """With all inputs among the candidates of a panel, panels change nothing either."""
    problem = layer(pattern, n=12, linear=linear)
    found = solve(problem, "obs", panel=panel)
    for row in range(problem.rows):
        assert torch.equal(found.mask[row], one_by_one(problem, row))


@settings(max_examples=40)
@given(problems(max_n=12, max_rows=3), st.sampled_from((0.01, 0.3)), st.sampled_from((1, 2, 64)))
def test_masks_are_legal_and_never_below_the_optimum(problem, damping, panel):
    problem = problem.refitting(Refit(damping))
    found = solve(problem, "obs", panel=panel)
    assert bool(problem.pattern.is_legal(found.mask).all())
    verify(problem, found)
    best = solve(problem, "exhaustive").objective
    assert bool((found.objective >= best - 1e-9 * problem.diagonal_mass() - 1e-300).all())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_better_than_a_score(kind):
    problem = layer(rows=8, n=48, kind=kind)
    totals = [float(solve(problem, name).objective.sum()) for name in ("obs", "wanda")]
    assert totals[0] <= totals[1] * (1 + 1e-9)


def test_panels_are_nearly_the_recursion():
    problem = layer(rows=6, n=96)
    exact, panels = (solve(problem, "obs", panel=panel) for panel in (1, 8))
    assert float(panels.objective.sum()) <= 1.02 * float(exact.objective.sum())


@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=str)
def test_order_units_threads_and_a_row_alone_change_nothing(pattern):
    problem = layer(pattern, rows=5, n=16)
    found = solve(problem, "obs").mask
    assert torch.equal(solve(problem, "obs", threads=2).mask, found)
    assert torch.equal(solve(problem.row(3), "obs").mask[0], found[3])
    scaled = LayerProblem(
        2.0**9 * problem.weight, 2.0**-7 * problem.gram, pattern, refit=problem.refit
    )
    assert torch.equal(solve(scaled, "obs").mask, found)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0))
    columns = (order[:, None] * 4 + torch.arange(4)).flatten()  # groups stay together
    moved = LayerProblem(
        problem.weight[:, columns],
        problem.gram[columns][:, columns],
        pattern,
        refit=problem.refit,
    )
    assert torch.equal(solve(moved, "obs").mask, found[:, columns])


def test_degenerate_rows():
    for weight, gram in ((0.0, 1.0), (1.0, 0.0)):
        problem = LayerProblem(
            weight * torch.ones(2, 8), gram * random_gram(8, "full", 1), PATTERNS[0], refit=Refit()
        )
        verify(problem, solve(problem, "obs"))
    for keep in (0, 1, 5):
        problem = layer(Unstructured(keep=keep), n=5)
        assert solve(problem, "obs").mask.sum(1).tolist() == [keep] * 3


def test_of_kept_weights_it_is_the_mask_with_one_percent_damping():
    problem = layer(damping=0.01)
    kept = solve(problem.refitting(None), "obs")
    assert torch.equal(kept.mask, solve(problem, "obs").mask)
    torch.testing.assert_close(kept.objective, problem.refitting(None).objective(kept.mask))


def test_no_time_leaves_a_legal_mask():
    problem = layer(rows=3, n=20)
    hurried = solve(problem, "obs", limits=Limits(seconds=0))
    verify(problem, hurried)
    whole = solve(problem, "obs")
    assert float(hurried.objective.sum()) > float(whole.objective.sum())


def test_it_is_a_start_of_swap():
    problem = layer(rows=4, n=24)
    before, after = solve(problem, "obs"), solve(problem, "swap", start="obs")
    assert bool((after.objective <= before.objective * (1 + 1e-9)).all())
