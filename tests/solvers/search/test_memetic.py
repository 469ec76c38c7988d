"""Memetic search: a contract as every local search's, better masks than tabu, and a pool of masks unlike
each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_search import check_contract
from pooled_layers import layer as pooled_layer
from pooled_layers import pooled, slack, total
from strategies import problems, random_gram, random_weight, refit_layer

from maskopt import NM, LayerProblem, Limits, Progress, Refit, Unstructured, solve, verify
from maskopt.errors import OptionError
from maskopt.least_squares import LEAST_DAMPING
from maskopt.pattern import Pattern
from maskopt.solution import Status
from maskopt.solvers.search import memetic as module
from maskopt.solvers.search.memetic import Memetic

SMALL = {"generations": 6, "children": 3, "pool": 4, "moves": 40}
PATTERNS = [Unstructured(sparsity=0.6), NM(keep=2, of=4), NM(keep=12, of=32)]


def layer(rows: int = 6, n: int = 96, pattern: Pattern = PATTERNS[0]) -> LayerProblem:
    weight = random_weight(rows, n, 1, torch.float32)
    return LayerProblem(weight, random_gram(n, "low-rank", 2, torch.float32), pattern)


@given(problems(max_n=12))
@settings(max_examples=12)
def test_contract_in_float64(problem: LayerProblem) -> None:
    check_contract(problem, "memetic", **SMALL)


@given(problems(max_n=12, dtype=torch.float32))
@settings(max_examples=8)
def test_contract_in_float32_from_the_worst_start(problem: LayerProblem) -> None:
    check_contract(problem, "memetic", start="worst", **SMALL)


@given(problems(max_n=11, max_rows=3), st.sampled_from((0.0, 0.01, 0.3)))
@settings(max_examples=12)
def test_contract_of_refitted_weights(problem: LayerProblem, damping: float) -> None:
    check_contract(problem.refitting(Refit(damping)), "memetic", start="worst", **SMALL)


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.5), NM(keep=2, of=4), NM(3, 8)])
def test_finds_the_optimum_of_small_rows(pattern: Pattern) -> None:
    problem = LayerProblem(random_weight(40, 16, 3), random_gram(16, "low-rank", 4), pattern)
    best = solve(problem, "exhaustive").objective
    plan = Memetic(generations=30, children=4, pool=8, moves=100)
    found = solve(problem, plan, start="worst")
    verify(problem, found)
    torch.testing.assert_close(found.objective, best, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.5), NM(keep=2, of=4), NM(3, 8)])
def test_finds_the_optimum_of_small_refitted_rows(pattern: Pattern) -> None:
    problem = refit_layer(pattern, rows=40, kind="low-rank", seed=3)
    best = solve(problem, "exhaustive").objective
    found = solve(problem, Memetic(generations=10, children=4, pool=32), start="worst")
    verify(problem, found)
    torch.testing.assert_close(found.objective, best, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_finds_better_masks_for_refitted_weights_than_1_swap_search(pattern: Pattern) -> None:
    problem = refit_layer(pattern, rows=8, n=96, seed=3)
    start = solve(problem, "swap", start="admm")
    found = solve(problem, "memetic", start=start.mask, generations=8, children=4, pool=6)
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
    few = solve(problem, "memetic", start=start.mask, generations=8, children=4, pool=6, moves=1)
    # every child of 8 generations, and the 6 masks of the first pool
    assert bool((few.trace.moves <= 8 * 4 + 6).all())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_finds_better_masks_than_as_many_moves_of_tabu(pattern: Pattern) -> None:
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
    longer = solve(problem, replace(plan, generations=40), start=start)
    # the same generations, and more of them
    torch.testing.assert_close(longer.trace.history[:, :22], trace.history, rtol=0, atol=0)


@pytest.mark.parametrize("refit", [None, Refit(0.01)])
def test_a_row_does_not_depend_on_the_others_nor_on_threads(refit: Refit | None) -> None:
    problem = layer(module._TILE + 3).refitting(refit)
    start = solve(problem, "wanda").mask
    whole = solve(problem, "memetic", start=start, threads=3, **SMALL)
    one = solve(problem, "memetic", start=start, threads=1, **SMALL)
    assert torch.equal(whole.mask, one.mask)
    told: list[Progress] = []
    # of the bytes of two rows
    limits = Limits(memory=2 * 64 * problem.n * 12, on_progress=told.append)
    little = solve(problem, Memetic(**SMALL), start=start, limits=limits)
    assert torch.equal(little.mask, one.mask)
    assert {2, 4, 6} < {now.done for now in told}
    torch.testing.assert_close(whole.trace.history, one.trace.history, rtol=0, atol=0)
    for row in (0, module._TILE - 1, module._TILE):
        alone = solve(problem.row(row), "memetic", start=start[row], **SMALL)
        assert torch.equal(alone.mask[0], whole.mask[row])


@pytest.mark.parametrize("refit", [None, Refit(0.01)])
def test_permutation_and_scaling(refit: Refit | None) -> None:
    weight, gram = random_weight(4, 24, 1), random_gram(24, "full", 2)
    pattern = Unstructured(sparsity=0.5)
    problem = LayerProblem(weight, gram, pattern, refit=refit)
    plain = solve(problem, "memetic", start="wanda", **SMALL)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    turned = LayerProblem(weight[:, order], gram[order][:, order], pattern, refit=refit)
    torch.testing.assert_close(
        solve(turned, "memetic", start="wanda", **SMALL).objective, plain.objective
    )
    for factor in (1e-20, 0.25, 3e15):
        other = solve(
            LayerProblem(weight * factor, gram, pattern, refit=refit),
            "memetic",
            start="wanda",
            **SMALL,
        )
        torch.testing.assert_close(other.objective / factor**2, plain.objective)
        other = solve(
            LayerProblem(weight, gram * factor, pattern, refit=refit),
            "memetic",
            start="wanda",
            **SMALL,
        )
        torch.testing.assert_close(other.objective / factor, plain.objective)


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("refit", [None, Refit(0.0)])
def test_rows_with_nothing_to_choose(n: int, kept: int, refit: Refit | None) -> None:
    if kept > n:
        return
    problem = LayerProblem(torch.ones(2, n), torch.eye(n), Unstructured(keep=kept), refit=refit)
    found = solve(problem, "memetic", start="wanda", **SMALL)
    verify(problem, found)
    # with G + λI in place of G
    ridge = 0.0 if refit is None else LEAST_DAMPING
    expected = torch.full((2,), (n - kept) * (1.0 + ridge), dtype=torch.float64)
    torch.testing.assert_close(found.objective, expected)


@pytest.mark.parametrize("refit", [None, Refit(0.0)])
def test_zero_rows_and_dead_inputs(refit: Refit | None) -> None:
    gram = random_gram(16, "full", 2)
    gram[:4] = gram[:, :4] = 0
    weight = random_weight(3, 16, 1)
    weight[1] = 0
    problem = LayerProblem(weight, gram, Unstructured(keep=12), refit=refit)
    found = solve(problem, "memetic", **SMALL)
    verify(problem, found)
    # λI costs what is pruned of dead inputs, too
    ridge = 0.0 if refit is None else LEAST_DAMPING * float(gram.diagonal().mean())
    assert bool((found.objective <= ridge * weight.square().sum(1)).all())
    nothing = LayerProblem(weight, torch.zeros(16, 16), Unstructured(keep=12), refit=refit)
    found = solve(nothing, "memetic", **SMALL)
    verify(nothing, found)
    assert found.objective.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("refit", [None, Refit(0.01)])
def test_time_limits(refit: Refit | None) -> None:
    problem = layer().refitting(refit)
    start = solve(problem, "wanda")
    none = solve(problem, "memetic", start=start.mask, time_limit=0)
    assert torch.equal(none.mask, start.mask)
    assert set(none.status) == {Status.FEASIBLE}
    assert set(none.trace.stopped) == {"yes"}
    told = []
    endless = replace(Memetic(**SMALL), generations=10**6)
    limits = Limits(seconds=1, on_progress=told.append)
    some = solve(problem, endless, start=start.mask, limits=limits)
    verify(problem, some)
    assert bool((some.objective <= start.objective).all())
    assert float(some.objective.sum()) < float(start.objective.sum())
    assert set(some.trace.stopped) == {"yes"}
    assert (told[-1].done, told[-1].total) == (6, 6)


@pytest.mark.parametrize("refit", [None, Refit(0.01)])
def test_seeds(refit: Refit | None) -> None:
    problem = layer(4, 128).refitting(refit)
    masks = [solve(problem, "memetic", seed=seed, **SMALL).mask for seed in (1, 1, 2, 2**63 - 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@given(pooled(max_n=8, max_rows=4))
@settings(max_examples=12)
def test_contract_of_rows_that_trade(problem: LayerProblem) -> None:
    before = solve(problem, "worst")
    found = solve(problem, "memetic", start=before.mask, **SMALL)
    verify(problem, found)
    assert set(found.status) == {Status.SWAP_OPTIMAL}
    best = total(problem, solve(problem, "exhaustive"))
    assert best - slack(problem) <= total(problem, found)
    assert total(problem, found) <= total(problem, before) + slack(problem)
    again = solve(problem, "memetic", start=before.mask, threads=1, **SMALL)
    assert torch.equal(again.mask, found.mask)


@pytest.mark.parametrize("refit", [None, Refit(0.01)])
def test_rows_that_trade_are_searched_at_counts_of_their_own(refit: Refit | None) -> None:
    problem = pooled_layer(rows=2 * module._TILE, n=64, refit=refit)
    start = solve(problem, "swap")
    assert len(set(start.mask.sum(1).tolist())) > 3
    found = solve(problem, "memetic", start=start.mask, **SMALL)
    verify(problem, found)
    assert set(found.status) == {Status.SWAP_OPTIMAL}
    assert total(problem, found) < 0.999 * total(problem, start)
    # what is told of a row is of that row, in whichever order they were searched
    torch.testing.assert_close(found.trace.start_objective, start.objective)
    first = start.mask.sum(1) == start.mask[0].sum()
    alike = problem.take(first).under(Unstructured(keep=int(start.mask[0].sum())))
    alone = solve(alike, "memetic", start=start.mask[first], **SMALL)
    assert torch.equal(alone.trace.moves, found.trace.moves[first])
    torch.testing.assert_close(alone.trace.history, found.trace.history[first])


def test_bad_options() -> None:
    problem = layer(4, 128)
    for name, value in {"generations": -1, "children": 0, "pool": 1, "moves": 0}.items():
        with pytest.raises(OptionError, match=name):
            solve(problem, "memetic", **{name: value})


@pytest.mark.parametrize("pattern", PATTERNS)
def test_children_keep_what_both_parents_keep(pattern: Pattern) -> None:
    problem = layer(3, 96, pattern)
    start = solve(problem, "wanda").mask
    pool = module._Pool(problem, start, Memetic(pool=4), Limits())
    generator = torch.Generator().manual_seed(0)
    other = solve(problem, "random", seed=3).mask
    one, two = start[:, None].expand(-1, 5, -1), other[:, None].expand(-1, 5, -1)
    keys = torch.rand(5, problem.n, generator=generator)
    children = pool.completed(one & two, one ^ two, keys)
    for child in children.unbind(1):
        problem.check_mask(child, "child")
        assert bool((child >= (start & other)).all())
        assert bool((child <= (start | other)).all())
    assert not torch.equal(children[:, 0], children[:, 1])


def test_a_pool_holds_the_best_that_are_unlike_each_other() -> None:
    problem = layer(2, 100, Unstructured(keep=50))
    pool = module._Pool(problem, solve(problem, "wanda").mask, Memetic(pool=3), Limits())
    near = 100 // module._INPUTS_APART - 1
    base = torch.zeros(100, dtype=torch.bool)
    base[:50] = True

    def moved(by: int) -> torch.Tensor:
        """So many inputs kept in place of others."""
        mask = base.clone()
        mask[:by], mask[50 : 50 + by] = False, True
        return mask

    masks = torch.stack([moved(by) for by in (0, near, 20, 21, 40)])[None].expand(2, -1, -1)
    values = torch.tensor(
        [[1.0, 1.1, 1.3, 1.2, 2.0], [5.0, 1.0, 2.0, 4.0, 3.0]], dtype=torch.float64
    )
    pool._keep_best(masks, values)
    assert pool._values.tolist() == [[1.0, 1.2, 2.0], [1.0, 2.0, 3.0]]
    assert torch.equal(pool.masks[0], torch.stack([moved(by) for by in (0, 21, 40)]))
    assert torch.equal(pool.masks[1], torch.stack([moved(by) for by in (near, 20, 40)]))
    # where too few are, the best of the rest
    pool._keep_best(masks[:, :3], values[:, :3])
    assert pool._values.tolist() == [[1.0, 1.1, 1.3], [1.0, 2.0, 5.0]]
