"""Tabu search."""

import pytest
import torch
from local_search import drawn
from strategies import HALF

from maskopt import NM, LayerProblem, Limits, Unstructured, solve, verify
from maskopt.solvers.search.tabu import SCRATCH, Tabu, search
from maskopt.solvers.search.tabu_kernel import SMALL


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.6), NM(keep=2, of=4)])
def test_beats_one_swap_on_larger_rows(pattern):
    problem = drawn(16, 256, "low-rank", pattern, dtype=torch.float32)
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


def test_the_search_keeps_count_of_its_objective():
    """Beyond the moves after which everything is computed anew, restarts included."""
    problem = drawn(5, 48, "outliers", dtype=torch.float32)
    start = solve(problem, "swap", warm_start="wanda").mask
    found = search(problem, start, Tabu(moves=SCRATCH + 300, tenure=4, patience=50), Limits())
    assert found.moves.tolist() == [SCRATCH + 300] * 5
    torch.testing.assert_close(
        found.history[:, -1], problem.objective(found.mask), rtol=5e-4, atol=1e-9
    )


@pytest.mark.parametrize("pattern", [HALF, NM(keep=12, of=24), NM(keep=2, of=4)])
def test_a_move_is_the_best_of_those_it_looks_at(pattern):
    """All pairs in small groups; else the least a and the least b of each group with all partners."""
    problem = drawn(6, 48, pattern=pattern, dtype=torch.float32)
    start = solve(problem, "wanda")
    still = search(problem, start.mask, Tabu(moves=0, tenure=4, patience=0), Limits())
    assert torch.equal(still.mask, start.mask)
    assert still.history.shape == (6, 0)
    descended = search(problem, start.mask, Tabu(moves=1, tenure=4, patience=0), Limits()).mask
    for row in range(problem.rows):
        best = _descend(problem.row(row).q(), ~start.mask[row], problem.group_size)
        assert torch.equal(~descended[row], best)


def _descend(q, pruned, group):
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


@pytest.mark.parametrize("big", [1e4, 1e6, 1e8])
@pytest.mark.parametrize("start", ["magnitude", "worst"])
def test_a_descent_past_an_outlier_ends(start, big):
    """Once an input is kept that was nearly all of the cost, what is left is rounding of float32."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(256, 64, generator=generator)
        x[:, 0] *= big
        weight = torch.randn(4, 64, generator=generator)
        problem = LayerProblem(weight, x.T @ x / 256, HALF)
        solution = solve(problem, "tabu", start=start, moves=100)
        assert bool((solution.objective <= solve(problem, start).objective * (1 + 1e-9)).all())
        verify(problem, solution)
