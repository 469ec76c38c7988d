"""The solvers without a search: scores, elimination, exhaustive."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import patterns, problems, random_gram, random_weight

from maskopt import NM, LayerProblem, Unstructured, solve, verify
from maskopt.errors import OptionError, SolverError
from maskopt.solvers.greedy.select import keep_highest

SCORES = ("magnitude", "wanda", "ria", "random", "worst")


@given(problems())
def test_every_solver_returns_a_legal_verified_mask(problem):
    for name in (*SCORES, "elimination"):
        solution = solve(problem, name)
        assert bool(problem.pattern.is_legal(solution.mask).all())
        verify(problem, solution)


@given(problems(kinds=("diagonal",), max_n=10, linear=False))
def test_wanda_is_optimal_on_diagonal_gram(problem):
    exact = solve(problem, "exhaustive").objective
    torch.testing.assert_close(solve(problem, "wanda").objective, exact, rtol=1e-9, atol=1e-12)
    greedy = solve(problem, "elimination").objective
    torch.testing.assert_close(greedy, exact, rtol=1e-9, atol=1e-12)


@given(problems(max_n=10))
def test_nothing_beats_exhaustive(problem):
    best = solve(problem, "exhaustive").objective
    slack = 1e-9 * problem.diagonal_mass() + 1e-12
    for name in (*SCORES, "elimination"):
        assert bool((solve(problem, name).objective >= best - slack).all())


@given(st.data(), st.integers(1, 9), st.integers(1, 24), st.integers(0, 10**6))
def test_of_equal_scores_the_lowest_index_goes(data, rows, n, seed):
    """As by a stable sort, with ties and infinities, on few threads (numpy) and on many (torch)."""
    pattern = data.draw(patterns(n))
    if data.draw(st.booleans()):
        pattern = Unstructured(sparsity=data.draw(st.floats(0, 0.99)), per="layer")
    problem = LayerProblem(torch.ones(rows, n), torch.eye(n), pattern)
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(-2, 3, (rows, n), generator=generator).double()
    score[score == 2] = torch.inf
    if problem.pooled:
        grouped, pruned = score.reshape(1, -1), problem.pruned
    else:
        grouped, pruned = score.reshape(-1, problem.group_size), problem.pruned_per_group
    order = grouped.argsort(dim=1, stable=True)[:, :pruned]
    expected = torch.ones_like(grouped, dtype=torch.bool).scatter_(1, order, False)
    for threads in (1, 64):
        with patch.object(torch, "get_num_threads", return_value=threads):
            assert torch.equal(keep_highest(problem, score), expected.view(rows, n))


@given(problems())
def test_batched_equals_row_by_row(problem):
    for name in ("magnitude", "wanda", "worst", "elimination"):
        whole = solve(problem, name).mask
        for i in range(problem.rows):
            assert torch.equal(solve(problem.row(i), name).mask[0], whole[i])


def test_formulas_by_hand():
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5], [1.0, 1.0, 1.0, 1.0]])
    gram = torch.diag(torch.tensor([0.01, 4.0, 1.0, 100.0]))
    problem = LayerProblem(weight, gram, Unstructured(keep=2))
    assert solve(problem, "magnitude").mask[0].tolist() == [True, False, True, False]
    # |w|·‖x‖ = 0.3, 2, 2, 5: the tie keeps the higher index
    assert solve(problem, "wanda").mask[0].tolist() == [False, False, True, True]
    # RIA, a = 0.5: (|w|/column sum + |w|/row sum)·‖x‖^0.5
    columns, rows = weight.abs().sum(0), weight.abs().sum(1, keepdim=True)
    score = (weight.abs() / columns + weight.abs() / rows) * gram.diagonal().sqrt() ** 0.5
    expected = score >= score.sort(1).values[:, 2:3]
    assert torch.equal(solve(problem, "ria").mask, expected)


def test_ties_are_broken_by_exact_counts():
    problem = LayerProblem(torch.ones(3, 10), torch.eye(10), Unstructured(sparsity=0.3))
    assert solve(problem, "wanda").mask.tolist() == [[False] * 3 + [True] * 7] * 3
    grouped = LayerProblem(torch.ones(1, 8), torch.eye(8), NM(keep=1, of=4))
    assert solve(grouped, "wanda").mask[0].tolist() == [False, False, False, True] * 2


def test_elimination_sees_what_cancels_with_the_inputs_that_it_pruned():
    """Inputs 0 and 1 nearly cancel. With 0 gone, pruning 1 as well wins something back, whatever its
    own size; no score can see that."""
    gram = torch.tensor([[1.0, -1.2, 0.0], [-1.2, 1.5, 0.0], [0.0, 0.0, 1.2]])
    problem = LayerProblem(torch.ones(1, 3), gram, Unstructured(keep=1))
    found = solve(problem, "elimination")
    assert found.mask[0].tolist() == [False, False, True]
    assert found.objective.item() == pytest.approx(0.1)
    assert solve(problem, "wanda").mask[0].tolist() == [False, True, False]


def test_elimination_misses_a_pair_that_costs_nothing_together_only():
    """0 and 1 cancel, but 2 alone is cheaper than either alone: elimination takes it first, and has no
    way back."""
    gram = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.9]])
    problem = LayerProblem(torch.ones(1, 3), gram, Unstructured(keep=1))
    best, found = solve(problem, "exhaustive"), solve(problem, "elimination")
    assert best.mask[0].tolist() == [False, False, True]
    assert best.objective.item() == 0.0
    assert found.mask[0].tolist() == [False, True, False]
    assert found.objective.item() == pytest.approx(1.9)


def test_elimination_in_tiles(monkeypatch):
    problem = LayerProblem(random_weight(7, 12, 1), random_gram(12, "full", 0), NM(keep=2, of=4))
    whole = solve(problem, "elimination").mask
    monkeypatch.setattr("maskopt.solvers.greedy.elimination._TILE_BYTES", 1)
    assert torch.equal(solve(problem, "elimination").mask, whole)


def test_exhaustive_refuses_what_is_too_large():
    problem = LayerProblem(torch.ones(1, 60), torch.eye(60), Unstructured(sparsity=0.5))
    with pytest.raises(SolverError, match="more than 3,000,000"):
        solve(problem, "exhaustive")


def test_options_are_checked_and_seeds_repeat():
    problem = LayerProblem(torch.ones(2, 8), torch.eye(8), Unstructured(sparsity=0.5))
    with pytest.raises(OptionError, match="no option 'sed'; did you mean 'seed'"):
        solve(problem, "random", sed=1)
    with pytest.raises(OptionError, match="a must be"):
        solve(problem, "ria", a=-1.0)
    first, second = solve(problem, "random", seed=4), solve(problem, "random", seed=4)
    assert torch.equal(first.mask, second.mask)
    assert not torch.equal(first.mask, solve(problem, "random", seed=5).mask)


def test_pattern_strategy_reaches_both_kinds():
    kinds = set()

    @given(patterns(8))
    def collect(pattern):
        kinds.add(type(pattern))

    collect()
    assert kinds == {NM, Unstructured}
