"""Tabu and memetic search, beyond the contract of every search."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from pooled_layers import layer as pooled_layer, shared_budget, slack, total
from strategies import HALF, ONE_PERCENT, TWO_FOUR, drawn, slow, swap_optimal, verified

from maskopt import NM, LayerProblem, LeastSquaresUpdate, Limits, Unstructured, solve
from maskopt.core.least_squares import LEAST_DAMPING
from maskopt.solvers.search import memetic as module
from maskopt.solvers.search.memetic import Memetic
from maskopt.solvers.search.tabu import SCRATCH, Tabu, search
from maskopt.solvers.search.tabu_kernel import SMALL

SINGLE = torch.float32
SIXTY = Unstructured(sparsity=0.6)
PATTERNS = [SIXTY, TWO_FOUR, NM(keep=12, of=32)]
ONE_AND_SLOW = [SIXTY, *map(slow, PATTERNS[1:])]
OPTIONS = {"generations": 6, "children": 3, "pool": 4, "moves": 40}
REFITS_SLOW = pytest.mark.parametrize("update", [None, slow(ONE_PERCENT)])


@pytest.mark.parametrize("pattern", [SIXTY, TWO_FOUR])
def test_tabu_beats_one_swap_on_larger_rows(pattern):
    problem = drawn(16, 256, "low-rank", pattern, dtype=SINGLE)
    swap = solve(problem, "swap", start="wanda")
    tabu = verified(problem, "tabu", start=swap.mask, moves=500)
    assert bool((tabu.objective <= swap.objective * (1 + 1e-9)).all())
    assert float(tabu.objective.sum()) < 0.99 * float(swap.objective.sum())
    longer = solve(problem, "tabu", start=swap.mask, moves=1500)
    assert float(longer.objective.sum()) <= 1.001 * float(tabu.objective.sum())
    trace = longer.trace
    # computed from scratch now and then, a best objective may move in its last float32 digits
    assert bool((trace.history.diff(dim=1) <= 1e-6 * trace.history[:, :1]).all())
    torch.testing.assert_close(trace.start_objective, swap.objective)
    assert trace.history.shape == (16, 6)
    counts = trace.rounds.tolist(), trace.moves.tolist(), set(trace.stopped)
    assert counts == ([6] * 16, [1500] * 16, {"no"})
    assert float(trace.search_seconds.sum() + trace.swap_seconds.sum()) <= longer.seconds


def test_tabu_keeps_count_of_its_objective():
    """Beyond the moves after which everything is computed anew, restarts included."""
    problem = drawn(5, 48, "outliers", dtype=SINGLE)
    start = solve(problem, "swap", start="wanda").mask
    plan = Tabu(moves=SCRATCH + 300, tenure=4, patience=50)
    mask, trace = search(problem, start, plan, Limits())
    assert trace.moves.tolist() == [SCRATCH + 300] * 5
    value = problem.objective(mask)
    torch.testing.assert_close(trace.history[:, -1], value, rtol=5e-4, atol=1e-9)


@pytest.mark.parametrize("pattern", [HALF, NM(keep=12, of=24), TWO_FOUR])
def test_a_move_is_the_best_of_those_it_looks_at(pattern):
    """All pairs in small groups; else the least a and the least b of each group with all partners."""
    problem = drawn(6, 48, pattern=pattern, dtype=SINGLE)
    start = solve(problem, "wanda").mask
    plans = (Tabu(moves=moves, tenure=4, patience=0) for moves in (0, 1))
    still, descended = (search(problem, start, plan, Limits()) for plan in plans)
    assert torch.equal(still[0], start)
    assert still[1].history.shape == (6, 0)
    for row in range(problem.rows):
        best = _descend(problem.row(row).q(), ~start[row], problem.group_size)
        assert torch.equal(~descended[0][row], best)


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
            for u, p in itertools.product(a, b):
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
        x, weight = (torch.randn(size, 64, generator=generator) for size in (256, 4))
        x[:, 0] *= big
        problem = LayerProblem(weight, x.T @ x / 256, HALF)
        solution = verified(problem, "tabu", start=start, moves=100)
        assert bool((solution.objective <= solve(problem, start).objective * (1 + 1e-9)).all())


def layer(rows=6, n=96, pattern=SIXTY):
    return drawn(rows, n, "low-rank", pattern, dtype=SINGLE)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ONE_AND_SLOW)
def test_memetic_finds_better_masks_for_refitted_weights_than_1_swap_search(pattern):
    problem = drawn(8, 96, pattern=pattern, seeds=(3, 4), update=ONE_PERCENT)
    start = solve(problem, "swap", start="admm")
    plan = Memetic(generations=8, children=4, pool=6)
    found = swap_optimal(problem, plan, start=start.mask)
    assert float(found.objective.sum()) < 0.995 * float(start.objective.sum())
    history = found.trace.history
    assert history.shape == (8, 10)
    assert bool((history.diff(dim=1) <= 0).all())
    # swaps on F are float64 from the start to the end
    ends = torch.stack([start.objective, found.objective], 1)
    torch.testing.assert_close(history[:, [0, -1]], ends, rtol=1e-9, atol=0)
    assert bool((found.trace.moves > 0).all())
    few = solve(problem, replace(plan, moves=1), start=start.mask)
    # every child of 8 generations, and the 6 masks of the first pool
    assert bool((few.trace.moves <= 8 * 4 + 6).all())


@pytest.mark.parametrize("pattern", ONE_AND_SLOW)
def test_memetic_finds_better_masks_than_as_many_moves_of_tabu(pattern):
    problem = layer(4, 256 if isinstance(pattern, Unstructured) else 128, pattern)
    start = solve(problem, "relax").mask
    plan = Memetic(generations=20, children=4, pool=12, moves=500)
    found = verified(problem, plan, start=start)
    moves = 500 * (12 + 20 * 4)
    tabu = solve(problem, "tabu", start=start, moves=moves)
    assert float(found.objective.sum()) < 0.99 * float(tabu.objective.sum())
    trace = found.trace
    counts = trace.moves.tolist(), trace.rounds.tolist(), set(trace.stopped)
    assert counts == ([moves] * 4, [20] * 4, {"no"})
    assert trace.history.shape == (4, 22)
    assert bool((trace.history.diff(dim=1) <= 0).all())
    torch.testing.assert_close(trace.start_objective, problem.objective(start))
    torch.testing.assert_close(trace.history[:, 0], trace.start_objective)
    # the search's own count, and the swaps at the end
    assert bool((found.objective <= trace.history[:, -1] * (1 + 1e-5)).all())
    shorter = solve(problem, replace(plan, generations=10), start=start)
    # the same generations, and fewer of them
    torch.testing.assert_close(shorter.trace.history, trace.history[:, :12], rtol=0, atol=0)


@REFITS_SLOW
def test_a_row_does_not_depend_on_the_others_threads_or_memory_but_on_the_seed(update):
    problem = layer(module._TILE + 3, 96 if update is None else 32).with_update(update)
    start = solve(problem, "wanda").mask
    one, whole = (solve(problem, "memetic", start=start, threads=t, **OPTIONS) for t in (1, 3))
    assert torch.equal(whole.mask, one.mask)
    torch.testing.assert_close(whole.trace.history, one.trace.history, rtol=0, atol=0)
    seen = []
    # of the bytes of two rows
    limits = Limits(memory=2 * 64 * problem.n * 12, on_progress=seen.append)
    little = solve(problem, Memetic(**OPTIONS), start=start, limits=limits)
    assert torch.equal(little.mask, one.mask)
    assert {2, 4, 6} < {now.done for now in seen}
    for row in (0, module._TILE - 1, module._TILE):
        alone = solve(problem.row(row), "memetic", start=start[row], **OPTIONS)
        assert torch.equal(alone.mask[0], whole.mask[row])
    problem = layer(4, 128 if update is None else 48).with_update(update)
    masks = [solve(problem, "memetic", seed=seed, **OPTIONS).mask for seed in (1, 1, 2, 2**63 - 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("update", [None, LeastSquaresUpdate(0.0)])
def test_rows_with_nothing_to_choose_zero_rows_and_dead_inputs(update):
    # with G + λI in place of G; λI costs what is pruned of dead inputs, too
    ridge = 0.0 if update is None else LEAST_DAMPING
    for n, kept in ((1, 0), (1, 1), (2, 0), (2, 1), (2, 2)):
        pattern = Unstructured(keep=kept)
        problem = LayerProblem(torch.ones(2, n), torch.eye(n), pattern, update=update)
        found = verified(problem, "memetic", start="wanda", **OPTIONS)
        expected = torch.full((2,), (n - kept) * (1.0 + ridge), dtype=torch.float64)
        torch.testing.assert_close(found.objective, expected)
    plain = drawn(3, 16)
    weight, gram = plain.weight.clone(), plain.gram.clone()
    weight[1] = gram[:4] = gram[:, :4] = 0
    for g in (gram, torch.zeros(16, 16)):
        problem = LayerProblem(weight, g, Unstructured(keep=12), update=update)
        found = verified(problem, "memetic", **OPTIONS)
        most = ridge * float(g.diagonal().mean()) * weight.square().sum(1)
        assert bool((found.objective <= most).all())


@pytest.mark.parametrize("update", [None, ONE_PERCENT])
def test_memetic_under_time_limits(update, clock):
    problem = layer().with_update(update)
    start, seen = solve(problem, "wanda"), []
    limits = Limits(seconds=40, on_progress=seen.append)
    plan = Memetic(**OPTIONS | {"generations": 10**6})
    some = verified(problem, plan, start=start.mask, limits=limits)
    assert bool((some.objective <= start.objective).all())
    assert float(some.objective.sum()) < float(start.objective.sum())
    assert (set(some.trace.stopped), seen[-1].done, seen[-1].total) == ({"yes"}, 6, 6)


@pytest.mark.slow
@given(shared_budget(max_n=8, max_rows=4))
@settings(max_examples=8)
def test_contract_of_rows_that_share_a_count(problem):
    before = solve(problem, "worst")
    found = swap_optimal(problem, "memetic", start=before.mask, **OPTIONS)
    best, most = (total(problem, x) for x in (solve(problem, "exhaustive"), before))
    assert best - slack(problem) <= total(problem, found) <= most + slack(problem)
    again = solve(problem, "memetic", start=before.mask, threads=1, **OPTIONS)
    assert torch.equal(again.mask, found.mask)


@REFITS_SLOW
def test_rows_that_share_a_count_are_searched_at_counts_of_their_own(update):
    problem = pooled_layer(rows=2 * module._TILE, n=64 if update is None else 32, update=update)
    start = solve(problem, "swap")
    assert len(set(start.mask.sum(1).tolist())) > 3
    found = swap_optimal(problem, "memetic", start=start.mask, **OPTIONS)
    assert total(problem, found) < 0.999 * total(problem, start)
    # the trace of a row is of that row, in whichever order they were searched
    torch.testing.assert_close(found.trace.start_objective, start.objective)
    first = start.mask.sum(1) == start.mask[0].sum()
    equal = problem.take(first).under(Unstructured(keep=int(start.mask[0].sum())))
    alone = solve(equal, "memetic", start=start.mask[first], **OPTIONS)
    assert torch.equal(alone.trace.moves, found.trace.moves[first])
    torch.testing.assert_close(alone.trace.history, found.trace.history[first])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_children_keep_what_both_parents_keep(pattern):
    problem = layer(3, 96, pattern)
    start, other = solve(problem, "wanda").mask, solve(problem, "random", seed=3).mask
    pool = module._Pool(problem, start, Memetic(pool=4), Limits())
    one, two = start[:, None].expand(-1, 5, -1), other[:, None].expand(-1, 5, -1)
    keys = torch.rand(5, problem.n, generator=torch.Generator().manual_seed(0))
    children = pool.completed(one & two, one ^ two, keys)
    for child in children.unbind(1):
        problem.check_mask(child, "child")
        assert bool(((child >= (start & other)) & (child <= (start | other))).all())
    assert not torch.equal(children[:, 0], children[:, 1])


def test_a_pool_holds_the_best_that_are_unlike_each_other():
    problem = layer(2, 100, Unstructured(keep=50))
    pool = module._Pool(problem, solve(problem, "wanda").mask, Memetic(pool=3), Limits())
    near = 100 // module._INPUTS_APART - 1

    def moved(*counts):
        masks = (torch.arange(100) < 50).repeat(len(counts), 1)
        for mask, by in zip(masks, counts, strict=True):
            mask[:by], mask[50 : 50 + by] = False, True
        return masks

    masks = moved(0, near, 20, 21, 40)[None].expand(2, -1, -1)
    values = [[1.0, 1.1, 1.3, 1.2, 2.0], [5.0, 1.0, 2.0, 4.0, 3.0]]
    values = torch.tensor(values, dtype=torch.float64)
    pool._keep_best(masks, values)
    assert pool._values.tolist() == [[1.0, 1.2, 2.0], [1.0, 2.0, 3.0]]
    assert torch.equal(pool.masks[0], moved(0, 21, 40))
    assert torch.equal(pool.masks[1], moved(near, 20, 40))
    # where too few are, the best of the rest
    pool._keep_best(masks[:, :3], values[:, :3])
    assert pool._values.tolist() == [[1.0, 1.1, 1.3], [1.0, 2.0, 5.0]]


@pytest.mark.parametrize("member", ["relax", "sdp"])
def test_a_start_does_not_keep_a_relaxation_from_its_own_mask(member):
    """Its rounded mask costs more than a 1-swap optimum, and may still lead to a better one."""
    better = 0
    for seed in range(6 if member == "relax" else 3):
        problem = drawn(4, 40, "low-rank", HALF, (seed * 5 + 1, seed))
        swap, alone = solve(problem, "swap"), solve(problem, member)
        together = solve(problem, member, start=swap.mask)
        best = swap.objective.minimum(alone.objective)
        assert bool((together.objective <= best * (1 + 1e-9)).all())
        better += int((alone.objective < swap.objective * (1 - 1e-6)).sum())
    assert better > 0
