"""Tabu search."""

import pytest
import torch
from hypothesis import given, settings
from local_search import check_contract
from strategies import problems, random_gram, random_weight

from maskopt import NM, LayerProblem, Limits, Unstructured, solve, verify
from maskopt.errors import OptionError
from maskopt.solution import Status
from maskopt.solvers.search.tabu import SCRATCH, Tabu, search
from maskopt.solvers.search.tabu_kernel import SMALL


@given(problems(max_n=12))
@settings(max_examples=15)
def test_contract_in_float64(problem):
    check_contract(problem, "tabu", moves=60)


@given(problems(max_n=12, dtype=torch.float32))
@settings(max_examples=10)
def test_contract_in_float32_from_the_worst_start(problem):
    check_contract(problem, "tabu", start="worst", moves=60)


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.5), NM(keep=2, of=4), NM(3, 8)])
def test_finds_the_optimum_of_small_rows(pattern):
    """Where 1-swap search alone does not."""
    problem = LayerProblem(random_weight(40, 16, 3), random_gram(16, "low-rank", 4), pattern)
    best = solve(problem, "exhaustive").objective
    reached = {}
    for name in ("swap", "tabu"):
        found = solve(problem, name, warm_start="wanda").objective
        reached[name] = int((found <= best * (1 + 1e-6) + 1e-12).sum())
    assert reached["tabu"] >= 38
    assert reached["tabu"] > reached["swap"]


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.6), NM(keep=2, of=4)])
def test_beats_one_swap_on_larger_rows(pattern):
    problem = LayerProblem(
        random_weight(16, 256, 1, torch.float32),
        random_gram(256, "low-rank", 2, torch.float32),
        pattern,
    )
    swap = solve(problem, "swap", warm_start="wanda")
    tabu = solve(problem, "tabu", warm_start=swap.mask, moves=500)
    verify(problem, tabu)
    assert bool((tabu.objective <= swap.objective * (1 + 1e-9)).all())
    assert float(tabu.objective.sum()) < 0.99 * float(swap.objective.sum())
    longer = solve(problem, "tabu", warm_start=swap.mask, moves=1500)
    assert float(longer.objective.sum()) <= 1.001 * float(tabu.objective.sum())
    trace = longer.trace
    assert trace.history.shape == (16, 6)
    # computed from scratch now and then, a best objective may move in its last float32 digits
    assert bool((trace.history.diff(dim=1) <= 1e-6 * trace.history[:, :1]).all())
    torch.testing.assert_close(trace.start_objective, swap.objective)
    assert trace.rounds.tolist() == [6] * 16
    assert trace.moves.tolist() == [1500] * 16
    assert set(trace.stopped) == {"no"}
    assert float(trace.search_seconds.sum() + trace.swap_seconds.sum()) <= longer.seconds


def test_permutation_and_scaling():
    weight, gram = random_weight(4, 24, 1), random_gram(24, "full", 2)
    pattern = Unstructured(sparsity=0.5)
    problem = LayerProblem(weight, gram, pattern)
    plain = solve(problem, "tabu", warm_start="wanda")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    turned = LayerProblem(weight[:, order], gram[order][:, order], pattern)
    torch.testing.assert_close(
        solve(turned, "tabu", warm_start="wanda").objective, plain.objective, rtol=1e-9, atol=1e-12
    )
    for factor in (1e-20, 0.25, 3e15):
        other = solve(LayerProblem(weight * factor, gram, pattern), "tabu", warm_start="wanda")
        torch.testing.assert_close(other.objective / factor**2, plain.objective)
        other = solve(LayerProblem(weight, gram * factor, pattern), "tabu", warm_start="wanda")
        torch.testing.assert_close(other.objective / factor, plain.objective)


def test_time_limit_zero_returns_the_start():
    problem = LayerProblem(random_weight(3, 32, 1), random_gram(32, "full", 2), Unstructured(0.5))
    start = solve(problem, "wanda")
    solution = solve(problem, "tabu", warm_start=start.mask, time_limit=0)
    assert torch.equal(solution.mask, start.mask)
    assert set(solution.status) == {Status.FEASIBLE}


def test_seeds_and_bad_options():
    problem = LayerProblem(random_weight(4, 96, 1), random_gram(96, "full", 2), Unstructured(0.5))
    one = solve(problem, "tabu", warm_start="wanda", seed=1)
    assert torch.equal(one.mask, solve(problem, "tabu", warm_start="wanda", seed=1).mask)
    for option, value in {"moves": -1, "tenure": 0, "patience": -1, "time_limit": -1.0}.items():
        with pytest.raises(OptionError, match=option):
            solve(problem, "tabu", warm_start="wanda", **{option: value})


def test_the_search_keeps_count_of_its_objective():
    """Beyond the moves after which everything is computed anew, restarts included."""
    problem = LayerProblem(
        random_weight(5, 48, 1, torch.float32),
        random_gram(48, "outliers", 2, torch.float32),
        Unstructured(0.5),
    )
    start = solve(problem, "swap", warm_start="wanda").mask
    found = search(problem, start, Tabu(moves=SCRATCH + 300, tenure=4, patience=50), Limits())
    assert found.moves.tolist() == [SCRATCH + 300] * 5
    torch.testing.assert_close(
        found.history[:, -1], problem.objective(found.mask), rtol=5e-4, atol=1e-9
    )


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(keep=12, of=24), NM(keep=2, of=4)])
def test_a_move_is_the_best_of_those_it_looks_at(pattern):
    """All pairs in small groups; else the least a and the least b of each group with all partners."""
    problem = LayerProblem(
        random_weight(6, 48, 1, torch.float32), random_gram(48, "full", 2, torch.float32), pattern
    )
    start = solve(problem, "wanda")
    still = search(problem, start.mask, Tabu(moves=0, tenure=4, patience=0), Limits())
    assert torch.equal(still.mask, start.mask)
    assert still.history.shape == (6, 0)
    descended = search(problem, start.mask, Tabu(moves=1, tenure=4, patience=0), Limits()).mask
    for row in range(problem.rows):
        best = _descend(problem.row(row).q(), ~start.mask[row], problem.group_size)
        assert torch.equal(~descended[row], best)


def _descend(q: torch.Tensor, pruned: torch.Tensor, group: int) -> torch.Tensor:
    """Where the moves that a search looks at end improving, by the definition."""
    pruned = pruned.clone()
    while True:
        c, moves = q @ pruned.double(), []
        for first in range(0, len(q), group):
            inside = range(first, first + group)
            a = {u: float(q[u, u] + 2 * c[u]) for u in inside if not pruned[u]}
            b = {p: float(q[p, p] - 2 * c[p]) for p in inside if pruned[p]}
            few = group <= SMALL
            for u in a:
                for p in b:
                    if few or u == min(a, key=a.__getitem__) or p == min(b, key=b.__getitem__):
                        moves.append((a[u] + b[p] - 2 * float(q[u, p]), u, p))
        delta, u, p = min(moves)
        if delta >= -1e-6 * float(pruned.double() @ c):
            return pruned
        pruned[u], pruned[p] = True, False


def test_no_bit_depends_on_threads_or_tiles(monkeypatch):
    problem = LayerProblem(
        random_weight(9, 64, 1, torch.float32),
        random_gram(64, "full", 2, torch.float32),
        Unstructured(0.5),
    )
    plain = solve(problem, "tabu", warm_start="wanda", moves=400).mask
    monkeypatch.setattr("maskopt.solvers.search.tabu._TILE", 2)
    for threads in (1, 3):
        other = solve(problem, "tabu", warm_start="wanda", moves=400, threads=threads).mask
        assert torch.equal(plain, other)


def test_relax_is_the_default_start():
    problem = LayerProblem(random_weight(4, 32, 1), random_gram(32, "full", 2), Unstructured(0.5))
    named = solve(problem, "tabu", warm_start="relax")
    assert torch.equal(solve(problem, "tabu").mask, named.mask)


@pytest.mark.parametrize("big", [1e4, 1e6, 1e8])
@pytest.mark.parametrize("start", ["magnitude", "worst"])
def test_a_descent_past_an_outlier_ends(start, big):
    """Once an input is kept that was nearly all of the cost, what is left is rounding of float32."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(256, 64, generator=generator)
        x[:, 0] *= big
        weight = torch.randn(4, 64, generator=generator)
        problem = LayerProblem(weight, x.T @ x / 256, Unstructured(sparsity=0.5))
        solution = solve(problem, "tabu", start=start, moves=100)
        assert bool((solution.objective <= solve(problem, start).objective * (1 + 1e-9)).all())
        verify(problem, solution)
