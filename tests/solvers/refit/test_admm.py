"""ADMM on refitted weights: legal, the same in every setting, and better than a score."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import KINDS, problems, random_gram, random_linear, random_weight

from maskopt import NM, LayerProblem, Linear, Refit, Status, Unstructured, solve, verify
from maskopt.errors import MaskoptError, OptionError

PATTERNS = (Unstructured(sparsity=0.5), NM(keep=2, of=4))


def layer(pattern=PATTERNS[0], rows=6, n=32, kind="full", damping=0.01, linear=False, seed=1):
    weight, gram = random_weight(rows, n, seed), random_gram(n, kind, seed + 1)
    part = random_linear(weight, gram, seed + 2) if linear else None
    return LayerProblem(weight, gram, pattern, linear=part, refit=Refit(damping))


def largest(problem):
    """The mask of the largest |w_j|·√A_jj of every group."""
    scale = problem.least_squares.damped.diagonal().sqrt()
    score = (problem.weight.double() * scale).abs().reshape(problem.rows, -1, problem.group_size)
    kept = score.topk(problem.group_size - problem.pruned_per_group).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(2, kept, True).view(problem.rows, -1)


@settings(max_examples=30)
@given(problems(), st.sampled_from([0.0, 0.01, 0.3]))
def test_masks_are_legal_and_cost_what_is_said(problem, damping):
    problem = problem.refitting(Refit(damping))
    solution = solve(problem, "admm")
    assert bool(problem.pattern.is_legal(solution.mask).all())
    verify(problem, solution)
    assert set(solution.status) == {Status.FEASIBLE}
    assert solution.lower_bound.tolist() == [0.0] * problem.rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_narrow_weights_and_inputs(pattern, dtype):
    weight, gram = random_weight(4, 32, 1, dtype), random_gram(32, "outliers", 2, torch.float32)
    problem = LayerProblem(weight, gram, pattern, refit=Refit(0.01))
    solution = solve(problem, "admm")
    verify(problem, solution)
    wide = LayerProblem(weight.double(), gram.double(), pattern, refit=Refit(0.01))
    assert torch.equal(solve(wide, "admm").mask, solution.mask)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_threads_change_nothing(pattern):
    problem = layer(pattern, rows=150, kind="low-rank")
    before = torch.get_num_threads()
    one, three = (solve(problem, "admm", threads=k).mask for k in (1, 3))
    assert torch.equal(one, three)
    assert torch.equal(solve(problem, "admm").mask, one)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("linear", [False, True], ids=["plain", "linear"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", ["full", "low-rank", "outliers"])
def test_a_row_alone_is_what_it_is_in_its_layer(kind, pattern, linear):
    problem = layer(pattern, kind=kind, linear=linear)
    whole = solve(problem, "admm").mask
    for i in range(problem.rows):
        assert torch.equal(solve(problem.row(i), "admm").mask[0], whole[i])
    many = problem.take(list(range(6)) * 12)
    assert torch.equal(solve(many, "admm").mask, whole.repeat(12, 1))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_rows_without_weights_and_inputs_without_anything(pattern):
    problem = layer(pattern, kind="zero-columns")
    weight = problem.weight.clone()
    weight[[0, 3]] = 0
    problem = LayerProblem(weight, problem.gram, pattern, refit=Refit(0.01))
    assert bool((problem.gram.diagonal() == 0).any())
    solution = solve(problem, "admm")
    verify(problem, solution)
    assert (solution.objective == 0).tolist() == [True, False, False, True, False, False]
    nothing = LayerProblem(weight, torch.zeros_like(problem.gram), pattern, refit=Refit(0.01))
    verify(nothing, solve(nothing, "admm"))


@pytest.mark.parametrize("power", [0, 9, 30])
def test_a_row_of_no_weights_may_have_much_to_take_over(power):
    problem = layer(linear=True)
    weight, scale = 10.0**power * problem.weight, 10.0**power
    weight[2] = 0
    linear = Linear(scale * problem.linear.correlation, scale**2 * problem.linear.constant)
    problem = LayerProblem(weight, problem.gram, PATTERNS[0], linear=linear, refit=Refit(0.01))
    verify(problem, solve(problem, "admm"))


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    weight_power=st.integers(-20, 20),
    gram_power=st.integers(-20, 20),
    pattern=st.sampled_from(PATTERNS),
)
def test_scales_change_nothing(seed, weight_power, gram_power, pattern):
    """Powers of two: what is scaled to 1 is the same to the last bit."""
    plain = layer(pattern, rows=2, n=16, seed=seed)
    weight, gram = plain.weight * 2.0**weight_power, plain.gram * 4.0**gram_power
    scaled = LayerProblem(weight, gram, pattern, refit=plain.refit)
    assert torch.equal(solve(scaled, "admm").mask, solve(plain, "admm").mask)


@pytest.mark.parametrize("kind", ["full", "outliers", "diagonal"])
def test_the_order_of_the_inputs_matters_no_more_than_rounding(kind):
    """Iterations are in float32, in eigenvectors of another order: entries that change places near the end
    may stop elsewhere."""
    problem = layer(rows=40, n=48, kind=kind)
    order = torch.randperm(48)
    gram = problem.gram[order][:, order]
    moved = LayerProblem(problem.weight[:, order], gram, problem.pattern, refit=problem.refit)
    plain, found = solve(problem, "admm"), solve(moved, "admm")
    assert float((found.mask != plain.mask[:, order]).double().mean()) < 0.01
    total = float(plain.objective.sum())
    assert float(found.objective.sum()) == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("linear", [False, True], ids=["plain", "linear"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", ["full", "low-rank", "outliers"])
def test_it_is_better_than_scores_after_the_same_refit(kind, pattern, linear):
    problem = layer(pattern, rows=16, n=64, kind=kind, linear=linear)
    wanda, sparsegpt, admm = (
        float(solve(problem, solver).objective.sum()) for solver in ("wanda", "sparsegpt", "admm")
    )
    assert admm < 0.98 * wanda
    assert admm < sparsegpt


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_kept_get_the_mask_of_one_percent(kind):
    problem = layer(kind=kind)
    kept = problem.refitting(None)
    solution = solve(kept, "admm")
    assert torch.equal(solution.mask, solve(problem, "admm").mask)
    verify(kept, solution)
    assert torch.equal(solution.objective, kept.objective(solution.mask))


def test_the_damping_and_the_linear_part_have_their_say():
    problem = layer(rows=16, kind="low-rank")
    mask = solve(problem, "admm").mask
    assert not torch.equal(solve(problem.refitting(Refit(10.0)), "admm").mask, mask)
    linear = random_linear(problem.weight, problem.gram, 4)
    other = LayerProblem(
        problem.weight, problem.gram, problem.pattern, linear=linear, refit=problem.refit
    )
    found = solve(other, "admm")
    assert not torch.equal(found.mask, mask)
    assert float(found.objective.sum()) < float(other.objective(mask).sum())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_without_time_it_is_the_largest_weights_in_the_metric(pattern):
    problem = layer(pattern)
    weight = torch.randn(6, 32, dtype=torch.float64)
    problem = LayerProblem(weight, problem.gram, pattern, refit=problem.refit)
    hurried = solve(problem, "admm", time_limit=0.0)
    verify(problem, hurried)
    assert torch.equal(hurried.mask, largest(problem))


def test_iterations_stop_it_and_more_of_them_are_better():
    problem = layer(rows=16, n=64, kind="low-rank")
    cost = {}
    for iterations in (1, 2, 3, 300):
        solution = solve(problem, "admm", iterations=iterations)
        verify(problem, solution)
        cost[iterations] = float(solution.objective.sum())
    assert cost[300] < cost[1]
    assert not torch.equal(solve(problem, "admm", iterations=1).mask, solve(problem, "admm").mask)


@pytest.mark.parametrize("keep", [0, 1, 31, 32])
@pytest.mark.parametrize("linear", [False, True], ids=["plain", "linear"])
def test_nothing_kept_and_everything(keep, linear):
    problem = layer(Unstructured(keep=keep), linear=linear)
    solution = solve(problem, "admm")
    assert solution.mask.sum(1).tolist() == [keep] * 6
    verify(problem, solution)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_it_starts_a_swap_search_close_to_its_end(pattern):
    problem = layer(pattern, rows=40, n=64)
    start = solve(problem, "admm")
    swapped = solve(problem, "swap", start="admm")
    assert float(start.objective.sum()) < 1.15 * float(swapped.objective.sum())
    assert torch.equal(swapped.mask, solve(problem, "swap", start=start.mask).mask)
    verify(problem, swapped)
    assert bool((swapped.objective <= start.objective * (1 + 1e-9)).all())


@pytest.mark.parametrize(
    "bad",
    [
        {"iterations": 0},
        {"iterations": 1.5},
        {"rho": 0.0},
        {"rho": -1.0},
        {"rho": float("nan")},
        {"damping": -0.1},
    ],
    ids=str,
)
def test_bad_options_are_refused(bad):
    with pytest.raises(OptionError, match=next(iter(bad))):
        solve(layer(), "admm", **bad)


def test_inputs_that_one_percent_leaves_indefinite_are_refused_in_one_line():
    """Of a G that was taken on trust, and for weights that are kept."""
    gram = torch.eye(64)
    gram[1, 2] = gram[2, 1] = 1.005
    slightly = LayerProblem(torch.ones(1, 64), gram, Unstructured(0.5), assume_psd=True)
    assert int(solve(slightly, "admm").mask.sum()) == 32
    gram[1, 2] = gram[2, 1] = 1.02
    worse = LayerProblem(torch.ones(1, 64), gram, Unstructured(0.5), assume_psd=True)
    with pytest.raises(MaskoptError, match="larger damping"):
        solve(worse, "admm")
