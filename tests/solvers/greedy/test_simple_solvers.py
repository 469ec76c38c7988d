"""The solvers without a search: scores, elimination, exhaustive."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_search import drawn
from strategies import patterns, problems

from maskopt import NM, LayerProblem, Unstructured, solve, verify
from maskopt.errors import SolverError
from maskopt.solvers.greedy.select import keep_highest

SCORES = ("magnitude", "wanda", "ria", "random", "worst")


@given(problems())
def test_every_mask_is_legal_verified_and_the_one_of_each_row_by_itself(problem):
    for name in (*SCORES, "elimination", "sparsegpt"):
        solution = solve(problem, name)
        assert bool(problem.pattern.is_legal(solution.mask).all())
        verify(problem, solution)
        if name not in (
            "ria",
            "random",
            "sparsegpt",
        ):  # which look at the whole layer, or draw for it
            for i in range(problem.rows):
                assert torch.equal(solve(problem.row(i), name).mask[0], solution.mask[i])


@given(problems(kinds=("diagonal",), max_n=10, linear=False))
def test_wanda_and_elimination_are_optimal_on_a_diagonal_gram(problem):
    exact = solve(problem, "exhaustive").objective
    for name in ("wanda", "elimination"):
        found = solve(problem, name).objective
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


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


@pytest.mark.parametrize(
    ("gram", "found", "cost"),
    [
        # inputs 0 and 1 nearly cancel: with 0 gone, pruning 1 as well wins something back, whatever its
        # own size; no score can see that
        ([[1.0, -1.2, 0.0], [-1.2, 1.5, 0.0], [0.0, 0.0, 1.2]], [False, False, True], 0.1),
        # 0 and 1 cancel, but 2 alone is cheaper than either: elimination has no way back from it
        ([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.9]], [False, True, False], 1.9),
    ],
)
def test_what_elimination_sees_and_what_it_misses(gram, found, cost):
    problem = LayerProblem(torch.ones(1, 3), torch.tensor(gram), Unstructured(keep=1))
    solution = solve(problem, "elimination")
    assert solution.mask[0].tolist() == found
    assert solution.objective.item() == pytest.approx(cost)
    assert solve(problem, "wanda").mask[0].tolist() == [False, True, False]
    assert solve(problem, "exhaustive").mask[0].tolist() == [False, False, True]


def test_elimination_in_tiles(monkeypatch):
    problem = drawn(7, 12, pattern=NM(keep=2, of=4))
    whole = solve(problem, "elimination").mask
    monkeypatch.setattr("maskopt.solvers.greedy.elimination._TILE_BYTES", 1)
    assert torch.equal(solve(problem, "elimination").mask, whole)


def test_exhaustive_refuses_what_is_too_large():
    problem = LayerProblem(torch.ones(1, 60), torch.eye(60), Unstructured(sparsity=0.5))
    with pytest.raises(SolverError, match="more than 3,000,000"):
        solve(problem, "exhaustive")


def test_seeds_repeat():
    problem = LayerProblem(torch.ones(2, 8), torch.eye(8), Unstructured(sparsity=0.5))
    one, two, other = (solve(problem, "random", seed=seed).mask for seed in (4, 4, 5))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_pattern_strategy_reaches_both_kinds():
    kinds = set()

    @given(patterns(8))
    def collect(pattern):
        kinds.add(type(pattern))

    collect()
    assert kinds == {NM, Unstructured}
