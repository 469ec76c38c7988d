"""F, the objective of refitted weights: what it is, against its definition, in every kind of problem."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import KINDS, problems, random_gram, random_linear, random_weight

from maskopt import (
    NM,
    LayerProblem,
    Refit,
    Solution,
    Unstructured,
    improving_swap,
    refit,
    solve,
    verify,
)

PATTERNS = (Unstructured(keep=9), NM(keep=2, of=4))
REFITS = (Refit(0.0), Refit(0.01), Refit(0.3), Refit(0.1, power=0.5), Refit(0.1, power=1))


def layer(
    pattern=PATTERNS[0],
    rows=4,
    n=16,
    kind="full",
    damping=0.01,
    power=0.0,
    linear=False,
    seed=1,
):
    weight, gram = random_weight(rows, n, seed), random_gram(n, kind, seed + 1)
    part = random_linear(weight, gram, seed + 2) if linear else None
    return LayerProblem(weight, gram, pattern, linear=part, refit=Refit(damping, power))


def metric(problem):
    """A in float64, from its definition."""
    gram, refit = problem.gram.double(), problem.refit
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    own = mean ** (1 - refit.power) * diagonal.clamp(min=0.0) ** refit.power
    return gram + torch.diag((refit.damping * own).clamp(min=1e-6 * mean))


def dense(problem, mask):
    """F and v of every row by the eigenvectors of A_SS."""
    a, weight = metric(problem), problem.weight.double()
    value, best = torch.zeros(problem.rows, dtype=torch.float64), torch.zeros_like(weight)
    for row, w in enumerate(weight):
        g, c = torch.zeros_like(w), 0.0
        if problem.linear is not None:
            g, c = problem.linear.correlation[row], problem.linear.constant[row]
        kept = mask[row].nonzero()[:, 0]
        values, vectors = torch.linalg.eigh(a[kept][:, kept])
        # 0/0 where G is 0
        parts = (vectors.T @ (a[kept] @ w + g[kept]) / values).nan_to_num(nan=0.0)
        best[row, kept] = vectors @ parts
        lost = w - best[row]
        value[row] = lost @ a @ lost + 2 * g @ lost + c
    return value, best


def assert_equal_but_for_rounding(problem, found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=rounding(problem))


def rounding(problem):
    return 1e-12 * float(problem.diagonal_mass().max()) + 1e-300


def random_mask(problem, seed=0):
    return solve(problem.refitting(None), "random", seed=seed).mask


def permuted(problem, order):
    """The same rows with their inputs in another order."""
    linear = problem.linear
    if linear is not None:
        linear = replace(linear, correlation=linear.correlation[:, order])
    gram = problem.gram[order][:, order]
    weight = problem.weight[:, order]
    return LayerProblem(weight, gram, problem.pattern, linear=linear, refit=problem.refit)


@given(problems(), st.sampled_from(REFITS))
def test_it_is_the_least_over_all_weights_on_what_is_kept(problem, refit):
    problem = problem.refitting(refit)
    mask = random_mask(problem)
    value, _ = dense(problem, mask)
    assert_equal_but_for_rounding(problem, problem.objective(mask), value.clamp(min=0.0))
    best = problem.weights(mask)
    for size in (1e-3, 1.0):
        other = best + size * torch.where(mask, torch.randn_like(best), 0.0)
        assert bool((problem.damped_error(other) >= value - rounding(problem)).all())


@given(problems(linear=False), st.sampled_from(REFITS))
def test_it_is_the_optimal_brain_surgeons_price_of_the_pruned_set(problem, refit):
    if not bool(problem.gram.any()):
        return
    problem = problem.refitting(refit)
    mask = random_mask(problem)
    values, vectors = torch.linalg.eigh(metric(problem))
    inverse = vectors / values @ vectors.T
    for row in range(problem.rows):
        pruned = ~mask[row]
        w = problem.weight[row, pruned]
        price = w @ torch.linalg.solve(inverse[pruned][:, pruned], w)
        # H has the condition of A: 1e-16 · 1e6 · n of the price
        slack = 1e-8 * float(price) + rounding(problem)
        assert abs(float(problem.objective(mask)[row] - price)) <= slack


@given(problems(), st.sampled_from(REFITS))
def test_it_is_at_most_f_in_the_same_metric(problem, refit):
    mask = random_mask(problem.refitting(refit))
    lost, refitted = torch.where(mask, 0.0, problem.weight), problem.refitting(refit)
    f = problem.objective(mask) + lost.square() @ (metric(refitted) - problem.gram).diagonal()
    assert bool((refitted.objective(mask) <= f * (1 + 1e-12)).all())


@given(problems(), st.sampled_from(REFITS))
def test_more_kept_never_costs_more(problem, refit):
    """F of a set is at least F of any part of it: both are least over weights, and here over more."""
    problem = problem.under(Unstructured(keep=problem.n)).refitting(refit)
    mask = torch.ones(problem.rows, problem.n, dtype=torch.bool)
    before = problem.objective(mask)
    for column in torch.randperm(problem.n).tolist():
        mask[:, column] = False
        now = problem.objective(mask)
        assert bool((now >= before * (1 - 1e-9) - rounding(problem)).all())
        before = now


@pytest.mark.parametrize("linear", [False, True], ids=["plain", "linear"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("refit", REFITS, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_solve_the_normal_equations_and_cost_what_is_said(kind, refit, pattern, linear):
    problem = layer(pattern, kind=kind, linear=linear, **vars(refit))
    mask = random_mask(problem)
    weight = problem.weights(mask)
    assert weight.dtype == torch.float64
    assert bool((weight[~mask] == 0).all())
    assert torch.equal(problem.damped_error(weight), problem.objective(mask))
    g = 0.0 if problem.linear is None else problem.linear.correlation
    target = problem.weight @ metric(problem) + g
    rest = torch.where(mask, target - weight @ metric(problem), 0.0)
    assert bool((rest.norm(dim=1) <= 1e-9 * target.norm(dim=1)).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_float32_inputs_are_refitted_in_float64(kind, damping):
    weight, gram = random_weight(4, 64, 1).float(), random_gram(64, kind, 2, torch.float32)
    narrow = LayerProblem(weight, gram, Unstructured(0.5), refit=Refit(damping))
    wide = LayerProblem(weight.double(), gram.double(), Unstructured(0.5), refit=Refit(damping))
    mask = random_mask(wide)
    assert_equal_but_for_rounding(wide, narrow.objective(mask), wide.objective(mask))
    verify(narrow, solve(narrow, "random"))


def test_an_input_that_is_indefinite_by_rounding_counts_as_it_is():
    """G of float32 has negative eigenvalues of 1e-7 of its trace; A has not, and F is a form of A alone."""
    x = torch.randn(4, 12, dtype=torch.float64)
    gram = x.T @ x / 4
    gram -= 0.4e-6 * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    problem = LayerProblem(random_weight(6, 12, 1), gram, Unstructured(keep=6), refit=Refit(0))
    mask = random_mask(problem)
    value, best = dense(problem, mask)
    lost = problem.weight - best
    below = (lost @ gram * lost).sum(1) < 0
    assert bool(below.any())
    torch.testing.assert_close(problem.objective(mask), value, rtol=1e-6, atol=0)
    verify(problem, solve(problem, "swap", start=mask))


@pytest.mark.parametrize("refit", REFITS, ids=repr)
@pytest.mark.parametrize("linear", [False, True], ids=["plain", "linear"])
def test_nothing_kept_and_everything(refit, linear):
    nothing = layer(Unstructured(keep=0), linear=linear, **vars(refit))
    mask = torch.zeros(4, 16, dtype=torch.bool)
    expected = (nothing.weight @ metric(nothing) * nothing.weight).sum(1)
    if linear:
        expected += 2 * (nothing.weight * nothing.linear.correlation).sum(1)
        expected += nothing.linear.constant
    assert_equal_but_for_rounding(nothing, nothing.objective(mask), expected)
    assert not nothing.weights(mask).any()
    everything = layer(Unstructured(keep=16), linear=linear, **vars(refit))
    objective, weights = everything.objective(~mask), everything.weights(~mask)
    if linear:
        g, inverse = everything.linear.correlation, torch.linalg.inv(metric(everything))
        torch.testing.assert_close(weights, everything.weight + g @ inverse, rtol=1e-7, atol=1e-9)
        rest = everything.linear.constant - (g @ inverse * g).sum(1)
        assert_equal_but_for_rounding(everything, objective, rest)
    else:
        torch.testing.assert_close(weights, everything.weight, rtol=1e-9, atol=1e-11)
        assert bool((objective <= rounding(everything)).all())


@pytest.mark.parametrize("linear", [False, True], ids=["plain", "linear"])
@pytest.mark.parametrize("refit", REFITS, ids=repr)
def test_other_orders_scales_and_batches_give_the_same(refit, linear):
    problem = layer(linear=linear, **vars(refit))
    mask = random_mask(problem)
    whole = problem.objective(mask)
    order = torch.randperm(16)
    moved = permuted(problem, order)
    torch.testing.assert_close(moved.objective(mask[:, order]), whole, rtol=1e-9, atol=0)
    for i in range(problem.rows):
        assert problem.row(i).objective(mask[i]) == pytest.approx(float(whole[i]), rel=1e-12)
        alone = problem.row(i).weights(mask[i])
        torch.testing.assert_close(alone, problem.weights(mask)[i], rtol=1e-9, atol=1e-12)
    part = problem.linear
    if linear:
        part = replace(part, correlation=part.correlation * 32, constant=part.constant * 256)
    scaled = LayerProblem(
        problem.weight * 8, problem.gram * 4, problem.pattern, linear=part, refit=refit
    )
    torch.testing.assert_close(scaled.objective(mask), whole * 256, rtol=1e-9, atol=0)


@pytest.mark.parametrize("weight_scale", [1e-40, 1e-20, 1e20])
@pytest.mark.parametrize("gram_scale", [1e-30, 1e30])
def test_extreme_scales(weight_scale, gram_scale):
    plain = layer(Unstructured(keep=12), n=24, kind="outliers")
    mask = random_mask(plain)
    weight, gram = (plain.weight * weight_scale).float(), (plain.gram * gram_scale).float()
    problem = LayerProblem(weight, gram, plain.pattern, refit=Refit(0.01))
    wide = LayerProblem(weight.double(), gram.double(), plain.pattern, refit=Refit(0.01))
    value, _ = dense(wide, mask)
    torch.testing.assert_close(problem.objective(mask), value, rtol=1e-7, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_inputs_without_anything_make_every_mask_as_good_as_any(pattern):
    gram = torch.zeros(16, 16, dtype=torch.float64)
    problem = LayerProblem(random_weight(3, 16, 1), gram, pattern, refit=Refit(0.01))
    for solver in ("worst", "swap", "exhaustive" if isinstance(pattern, NM) else "admm"):
        solution = solve(problem, solver)
        assert solution.objective.tolist() == [0.0, 0.0, 0.0]
        verify(problem, solution)
        for row in range(3):
            assert improving_swap(problem.row(row), solution.mask[row]) is None
    history = solve(problem, "swap", start="worst").trace.history
    assert not history.any()
    assert bool(torch.isfinite(problem.weights(solution.mask)).all())


def test_rows_without_weights_cost_nothing():
    problem = layer()
    problem = LayerProblem(
        problem.weight * torch.tensor([[1.0], [0.0], [1.0], [0.0]]),
        problem.gram,
        problem.pattern,
        refit=problem.refit,
    )
    objective = solve(problem, "swap", start="random").objective
    assert (objective == 0).tolist() == [False, True, False, True]


def test_refitting_any_mask_gives_the_weights_that_it_is_the_price_of():
    problem = layer(damping=0.05, linear=True)
    mask = random_mask(problem)
    found = refit(problem, mask)
    torch.testing.assert_close(found.weight, problem.weights(mask), rtol=1e-9, atol=1e-12)
    moved = (problem.weight - found.weight).square().sum(1)
    price = found.error + 0.05 * problem.gram.diagonal().mean() * moved
    torch.testing.assert_close(problem.objective(mask), price, rtol=1e-9, atol=0)


def test_dampings_below_the_least_are_the_least():
    problem = layer(kind="low-rank", damping=0)
    mask = random_mask(problem)
    least = problem.refitting(Refit(1e-6))
    assert torch.equal(problem.objective(mask), least.objective(mask))
    assert bool((problem.refitting(Refit(2e-6)).objective(mask) > least.objective(mask)).any())


@settings(max_examples=20)
@given(problems(max_n=10, max_rows=2), st.sampled_from(REFITS))
def test_enumeration_finds_the_least(problem, refit):
    problem = problem.refitting(refit)
    best = solve(problem, "exhaustive")
    verify(problem, best, require="checked")
    for seed in range(5):
        other = problem.objective(random_mask(problem, seed))
        assert bool((best.objective <= other * (1 + 1e-9) + rounding(problem)).all())


def test_masks_that_are_dear_to_judge_are_not_enumerated():
    """2 of 160 kept: 12,720 masks, each a system of 158 pruned inputs."""
    weight, gram = random_weight(1, 160, 1), random_gram(160, "full", 2)
    problem = LayerProblem(weight, gram, Unstructured(keep=2), refit=Refit(0.01))
    found = solve(problem, "swap")
    assert verify(problem, found).checked
    word = Solution.of(problem, found.mask, lower_bound=found.objective / 2, trusted=["SCIP 10.0"])
    assert "SCIP 10.0" in str(verify(problem, word))
