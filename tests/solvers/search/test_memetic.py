"""Memetic search beyond the contract of every search: better masks than tabu, and a pool of masks that
differ from each other."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from local_search import drawn
from pooled_layers import layer as pooled_layer
from pooled_layers import pooled, slack, total
from strategies import random_gram, random_weight, refit_layer

from maskopt import NM, LayerProblem, Limits, Refit, Unstructured, solve, verify
from maskopt.least_squares import LEAST_DAMPING
from maskopt.solution import Status
from maskopt.solvers.search import memetic as module
from maskopt.solvers.search.memetic import Memetic

OPTIONS = {"generations": 6, "children": 3, "pool": 4, "moves": 40}
PATTERNS = [Unstructured(sparsity=0.6), NM(keep=2, of=4), NM(keep=12, of=32)]
ONE_AND_SLOW = [PATTERNS[0], *(pytest.param(p, marks=pytest.mark.slow) for p in PATTERNS[1:])]
REFITS = pytest.mark.parametrize("refit", [None, Refit(0.01)])


def layer(rows=6, n=96, pattern=PATTERNS[0]):
    return drawn(rows, n, "low-rank", pattern, dtype=torch.float32)


@pytest.mark.parametrize("pattern", ONE_AND_SLOW)
def test_finds_better_masks_for_refitted_weights_than_1_swap_search(pattern):
    problem = refit_layer(pattern, rows=8, n=96, seed=3)
    start = solve(problem, "swap", start="admm")
    plan = Memetic(generations=8, children=4, pool=6)
    found = solve(problem, plan, start=start.mask)
    verify(problem, found)
    assert set(found.status) == {Status.SWAP_OPTIMAL}
    assert float(found.objective.sum()) < 0.995 * float(start.objective.sum())
    trace = found.trace
    assert trace.history.shape == (8, 10)
    assert bool((trace.history.diff(dim=1) <= 0).all())
    # swaps on F are float64 from the start to the end
    torch.testing.assert_close(trace.history[:, 0], start.objective, rtol=1e-9, atol=0)
    torch.testing.assert_close(trace.history[:, -1], found.objective, rtol=1e-9, atol=0)
    assert bool((trace.moves > 0).all())
    few = solve(problem, replace(plan, moves=1), start=start.mask)
    # every child of 8 generations, and the 6 masks of the first pool
    assert bool((few.trace.moves <= 8 * 4 + 6).all())


@pytest.mark.parametrize("pattern", ONE_AND_SLOW)
def test_finds_better_masks_than_as_many_moves_of_tabu(pattern):
    problem = layer(8, 256 if isinstance(pattern, Unstructured) else 128, pattern)
    start = solve(problem, "relax").mask
    plan = Memetic(generations=20, children=4, pool=12, moves=500)
    found = solve(problem, plan, start=start)
    verify(problem, found)
    moves = 500 * (12 + 20 * 4)
    tabu = solve(problem, "tabu", start=start, moves=moves)
    assert float(found.objective.sum()) < 0.99 * float(tabu.objective.sum())
    trace = found.trace
    assert trace.moves.tolist() == [moves] * 8
    assert trace.rounds.tolist() == [20] * 8
    assert trace.history.shape == (8, 22)
    assert bool((trace.history.diff(dim=1) <= 0).all())
    torch.testing.assert_close(trace.start_objective, problem.objective(start))
    torch.testing.assert_close(trace.history[:, 0], trace.start_objective)
    # the search's own count, and the swaps at the end
    assert bool((found.objective <= trace.history[:, -1] * (1 + 1e-5)).all())
    assert set(trace.stopped) == {"no"}
    shorter = solve(problem, replace(plan, generations=10), start=start)
    # the same generations, and fewer of them
    torch.testing.assert_close(shorter.trace.history, trace.history[:, :12], rtol=0, atol=0)


@REFITS
def test_a_row_does_not_depend_on_the_others_nor_on_threads(refit):
    problem = layer(module._TILE + 3, 96 if refit is None else 32).refitting(refit)
    start = solve(problem, "wanda").mask
    whole = solve(problem, "memetic", start=start, threads=3, **OPTIONS)
    one = solve(problem, "memetic", start=start, threads=1, **OPTIONS)
    assert torch.equal(whole.mask, one.mask)
    seen = []
    # of the bytes of two rows
    limits = Limits(memory=2 * 64 * problem.n * 12, on_progress=seen.append)
    little = solve(problem, Memetic(**OPTIONS), start=start, limits=limits)
    assert torch.equal(little.mask, one.mask)
    assert {2, 4, 6} < {now.done for now in seen}
    torch.testing.assert_close(whole.trace.history, one.trace.history, rtol=0, atol=0)
    for row in (0, module._TILE - 1, module._TILE):
        alone = solve(problem.row(row), "memetic", start=start[row], **OPTIONS)
        assert torch.equal(alone.mask[0], whole.mask[row])


@pytest.mark.parametrize(("n", "kept"), [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2)])
@pytest.mark.parametrize("refit", [None, Refit(0.0)])
def test_rows_with_nothing_to_choose(n, kept, refit):
    problem = LayerProblem(torch.ones(2, n), torch.eye(n), Unstructured(keep=kept), refit=refit)
    found = solve(problem, "memetic", start="wanda", **OPTIONS)
    verify(problem, found)
    # with G + λI in place of G
    ridge = 0.0 if refit is None else LEAST_DAMPING
    expected = torch.full((2,), (n - kept) * (1.0 + ridge), dtype=torch.float64)
    torch.testing.assert_close(found.objective, expected)


@pytest.mark.parametrize("refit", [None, Refit(0.0)])
def test_zero_rows_and_dead_inputs(refit):
    gram = random_gram(16, "full", 2)
    gram[:4] = gram[:, :4] = 0
    weight = random_weight(3, 16, 1)
    weight[1] = 0
    for g in (gram, torch.zeros(16, 16)):
        problem = LayerProblem(weight, g, Unstructured(keep=12), refit=refit)
        found = solve(problem, "memetic", **OPTIONS)
        verify(problem, found)
        # λI costs what is pruned of dead inputs, too
        ridge = 0.0 if refit is None else LEAST_DAMPING * float(g.diagonal().mean())
        assert bool((found.objective <= ridge * weight.square().sum(1)).all())


@REFITS
def test_time_limits(refit, clock):
    problem = layer().refitting(refit)
    start = solve(problem, "wanda")
    seen = []
    limits = Limits(seconds=40, on_progress=seen.append)
    some = solve(
        problem, Memetic(**OPTIONS | {"generations": 10**6}), start=start.mask, limits=limits
    )
    verify(problem, some)
    assert bool((some.objective <= start.objective).all())
    assert float(some.objective.sum()) < float(start.objective.sum())
    assert set(some.trace.stopped) == {"yes"}
    assert (seen[-1].done, seen[-1].total) == (6, 6)


@REFITS
def test_seeds(refit):
    problem = layer(4, 128 if refit is None else 64).refitting(refit)
    masks = [solve(problem, "memetic", seed=seed, **OPTIONS).mask for seed in (1, 1, 2, 2**63 - 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@given(pooled(max_n=8, max_rows=4))
@settings(max_examples=8)
def test_contract_of_rows_that_share_a_count(problem):
    before = solve(problem, "worst")
    found = solve(problem, "memetic", start=before.mask, **OPTIONS)
    verify(problem, found)
    assert set(found.status) == {Status.SWAP_OPTIMAL}
    best = total(problem, solve(problem, "exhaustive"))
    assert best - slack(problem) <= total(problem, found)
    assert total(problem, found) <= total(problem, before) + slack(problem)
    again = solve(problem, "memetic", start=before.mask, threads=1, **OPTIONS)
    assert torch.equal(again.mask, found.mask)


@REFITS
def test_rows_that_share_a_count_are_searched_at_counts_of_their_own(refit):
    n = 64 if refit is None else 32
    problem = pooled_layer(rows=2 * module._TILE, n=n, refit=refit)
    start = solve(problem, "swap")
    assert len(set(start.mask.sum(1).tolist())) > 3
    found = solve(problem, "memetic", start=start.mask, **OPTIONS)
    verify(problem, found)
    assert set(found.status) == {Status.SWAP_OPTIMAL}
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
        assert bool((child >= (start & other)).all())
        assert bool((child <= (start | other)).all())
    assert not torch.equal(children[:, 0], children[:, 1])


def test_a_pool_holds_the_best_that_are_unlike_each_other():
    problem = layer(2, 100, Unstructured(keep=50))
    pool = module._Pool(problem, solve(problem, "wanda").mask, Memetic(pool=3), Limits())
    near = 100 // module._INPUTS_APART - 1
    base = torch.arange(100) < 50

    def moved(*counts):
        """So many inputs kept in place of others."""
        masks = base.repeat(len(counts), 1)
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
