"""What 1-swap search promises of refitted weights."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refit_layers import LARGE, LINEAR, PATTERNS, REFITS, assert_proven, layer, slack
from strategies import HALF, KINDS, problems, random_gram, random_linear, random_weight, refit_layer

from maskopt import (
    NM,
    LayerProblem,
    Limits,
    Progress,
    Refit,
    Solution,
    Status,
    Unstructured,
    improving_swap,
    solve,
    verify,
)
from maskopt.errors import SolverError, VerificationError
from maskopt.solvers.refit.search import CANDIDATES, OF_GROUPS

STARTS = ("wanda", "random", "worst")


def assert_history(problem, start, solution):
    """From the objective of the start, never up, to that of the solution."""
    history = solution.trace.history
    off = 1e-6 * start + slack(problem)
    assert history.shape[0] == problem.rows
    assert bool(((history[:, 0] - start).abs() <= off).all())
    assert bool((history[:, 1:] <= history[:, :-1] + 1e-12 * off[:, None]).all())
    assert bool(((history[:, -1] - solution.objective).abs() <= off).all())


@given(problems(), st.sampled_from(REFITS), st.sampled_from(STARTS))
def test_every_row_ends_at_a_proven_one_swap_optimum(problem, how, start):
    problem = problem.refitting(how)
    before = solve(problem, start)
    solution = solve(problem, "swap", start=start)
    assert bool(problem.pattern.is_legal(solution.mask).all())
    assert_proven(problem, solution)
    assert bool((solution.objective <= before.objective + slack(problem)).all())
    assert_history(problem, before.objective, solution)
    again = solve(problem, "swap", start=solution.mask)
    assert torch.equal(again.mask, solution.mask)
    assert again.trace.swaps.tolist() == [0] * problem.rows
    # no time leaves the start and claims nothing
    none = solve(problem, "swap", start=start, time_limit=0.0)
    verify(problem, none)
    assert torch.equal(none.mask, before.mask)
    assert set(none.status) == {Status.FEASIBLE}


@given(problems(max_n=11, max_rows=3), st.sampled_from(REFITS), st.sampled_from(STARTS))
def test_never_below_the_optimum_which_is_left_alone(problem, how, start):
    problem = problem.refitting(how)
    best = solve(problem, "exhaustive")
    verify(problem, best, require="checked")
    assert set(best.status) == {Status.OPTIMAL}
    found = solve(problem, "swap", start=start)
    assert bool((found.objective >= best.objective - slack(problem)).all())
    left = solve(problem, "swap", start=best.mask)
    assert_proven(problem, left)
    # of equals it may go to another, by less than what counts
    changed = left.trace.swaps > 0
    assert bool((left.objective - best.objective).abs().le(1e-6 * best.objective)[changed].all())
    assert int(changed.sum()) <= int((best.objective <= slack(problem)).sum())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_stopped_by_max_swaps_goes_on_from_there(pattern):
    problem = layer(pattern, n=32)
    start = solve(problem, "worst")
    for most in (0, 1, 2, 5, 1000):
        stopped = solve(problem, "swap", start="worst", max_swaps=most)
        verify(problem, stopped)
        assert stopped.trace.swaps.tolist() == [most] * 4 or most == 1000
        assert bool((stopped.objective <= start.objective + slack(problem)).all())
        assert set(stopped.status) == {Status.SWAP_OPTIMAL if most == 1000 else Status.FEASIBLE}
        moved = (stopped.mask & ~start.mask).sum(1)
        assert bool((moved <= stopped.trace.swaps).all())
        if most == 0:
            assert torch.equal(stopped.mask, start.mask)
        assert_proven(problem, solve(problem, "swap", start=stopped.mask))
    # a row that needs no swap is proven without any
    mask = start.mask.clone()
    mask[0] = solve(problem, "swap").mask[0]
    stopped = solve(problem, "swap", start=mask, max_swaps=0)
    assert stopped.status == (Status.SWAP_OPTIMAL,) + (Status.FEASIBLE,) * 3
    assert torch.equal(stopped.mask, mask)


def test_the_swaps_of_all_rounds_are_counted():
    problem = layer(rows=2, n=160, kind="outliers")
    whole = solve(problem, "swap", start="worst")
    assert int(whole.trace.rounds.min()) > 1
    most = int(whole.trace.swaps.min()) - 1
    stopped = solve(problem, "swap", start="worst", max_swaps=most)
    assert stopped.trace.swaps.tolist() == [most, most]
    assert set(stopped.status) == {Status.FEASIBLE}
    assert bool((stopped.objective >= whole.objective).all())


def test_a_limit_on_the_way_keeps_what_was_reached(clock):
    problem = layer(n=64, rows=6)
    start = solve(problem, "worst")
    began = clock.now
    whole = solve(problem, "swap", start=start.mask, limits=Limits(seconds=1e9, threads=1))
    looks = clock.now - began
    assert looks > 12
    part = solve(problem, "swap", start=start.mask, limits=Limits(seconds=looks / 2, threads=1))
    verify(problem, part)
    assert set(part.status) == {Status.SWAP_OPTIMAL, Status.FEASIBLE}
    assert bool((part.objective <= start.objective + slack(problem)).all())
    done = torch.tensor([status is Status.SWAP_OPTIMAL for status in part.status])
    assert torch.equal(part.mask[done], whole.mask[done])
    assert torch.equal(part.mask[-1], start.mask[-1])


@pytest.mark.parametrize("start", ["wanda", "worst"])
@pytest.mark.parametrize(
    ("n", "pattern"),
    [(96, LARGE[0]), (160, LARGE[0]), (96, LARGE[1]), (320, LARGE[1]), (320, LARGE[2])],
    ids=str,
)
@pytest.mark.parametrize("kind", ["outliers", "low-rank"])
def test_rows_of_more_inputs_than_candidates(kind, n, pattern, start):
    problem = layer(pattern, rows=2, n=n, kind=kind, dtype=torch.float32)
    before = solve(problem, start)
    solution = solve(problem, "swap", start=start)
    assert_proven(problem, solution)
    assert_history(problem, before.objective, solution)
    assert bool((solution.objective < before.objective).all())
    # candidates once are not enough where they are few of all
    most = 2 * CANDIDATES if pattern is LARGE[0] else OF_GROUPS
    assert int(solution.trace.rounds.min()) > 1 or n <= most or start != "worst"


@pytest.mark.parametrize("pattern", LARGE, ids=str)
@pytest.mark.parametrize(**LINEAR)
def test_where_the_inputs_say_nearly_nothing(pattern, linear):
    """Inverses of condition 1e8 drift with every exchange, and would promise gains without end."""
    for seed in range(3):
        problem = layer(pattern, 3, 96, "low-rank", REFITS[0], linear, seed)
        before = solve(problem, "worst")
        solution = solve(problem, "swap", start="worst", max_swaps=5000)
        assert_proven(problem, solution)
        assert_history(problem, before.objective, solution)
        assert int(solution.trace.swaps.max()) < 500


def test_exchanges_that_do_not_pay_do_not_follow_each_other_for_ever():
    """What a drifted inverse promised here was made, undone, and promised again."""
    seed = 314524202
    weight, gram = random_weight(2, 128, seed + 1)[1:], random_gram(128, "low-rank", seed)
    problem = LayerProblem(weight, gram, Unstructured(keep=52), refit=Refit(0.0))
    solution = solve(problem, "swap", start="worst", max_swaps=2000)
    assert_proven(problem, solution)
    assert int(solution.trace.swaps) < 500


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_claim_that_does_not_hold_is_caught(pattern):
    problem = layer(pattern, n=32)
    whole = solve(problem, "swap", start="worst")
    one = int(whole.trace.swaps[2]) - 1
    stopped = solve(problem, "swap", start="worst", max_swaps=one).mask[2]
    assert not torch.equal(stopped, whole.mask[2])
    mask = whole.mask.clone()
    mask[2] = stopped
    forged = Solution.of(problem, mask, status=Status.SWAP_OPTIMAL)
    with pytest.raises(VerificationError, match="row 2 claims swap-optimal, yet keeping input"):
        verify(problem, forged)
    swap = improving_swap(problem.row(2), mask[2])
    assert not mask[2, swap.pruned]
    assert mask[2, swap.kept]
    mended = mask[2].clone()
    mended[swap.pruned], mended[swap.kept] = True, False
    change = problem.row(2).objective(mended) - problem.row(2).objective(mask[2])
    assert change == pytest.approx(swap.delta, rel=1e-6)
    honest = replace(forged, status=(Status.SWAP_OPTIMAL,) * 2 + (Status.FEASIBLE,) * 2)
    verify(problem, honest)


def test_a_claim_of_a_better_objective_is_caught():
    problem = layer(n=32)
    solution = solve(problem, "swap")
    off = solution.objective.clone()
    off[3] *= 1 - 3e-9
    with pytest.raises(VerificationError, match="objective: row 3"):
        verify(problem, replace(solution, objective=off))
    bound = torch.zeros_like(off)
    bound[1] = 0.1 * off[1]
    with pytest.raises(VerificationError, match="lower bound: row 1"):
        verify(problem, replace(solution, lower_bound=bound))


def test_enumeration_catches_what_exact_solvers_claim_wrongly():
    problem = layer(Unstructured(keep=4), n=9, rows=2)
    best, poor = solve(problem, "exhaustive"), solve(problem, "random")
    word = ("enumeration of maskopt 0.2.0",) * 2
    bound = best.objective + 0.5 * (poor.objective - best.objective)
    optimal = {"lower_bound": poor.objective, "status": (Status.OPTIMAL,) * 2}
    for forged in ({"lower_bound": bound}, optimal):
        with pytest.raises(
            VerificationError, match=r"a mask of objective|claims optimal, yet keeping"
        ):
            verify(problem, replace(poor, trusted=word, **forged))


def test_one_kept_input_of_many_is_enumerated_without_waiting():
    """Batches of systems of 160 inputs and more: LAPACK's LU of them never returned with two threads."""
    problem = layer(Unstructured(keep=1), n=190, rows=1)
    best = solve(problem, "exhaustive", threads=2)
    verify(problem, best, require="checked")
    found = solve(problem, "swap", start="worst")
    assert float(found.objective) == pytest.approx(float(best.objective), rel=1e-9)


@pytest.mark.parametrize("kernel", ["literal", "torch", "numba", "triton"])
def test_kernels_for_kept_weights_are_refused(kernel):
    with pytest.raises(SolverError, match=f"kernel '{kernel}' is for weights as they are"):
        solve(layer(), "swap", kernel=kernel)
    assert solve(layer(), "swap", kernel="auto").trace.kernel == "least squares"


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("keep", [0, 1, 57, 58, 59, 60])
def test_fewer_entries_than_candidates(keep, start):
    pattern = Unstructured(keep=keep)
    problem = refit_layer(pattern, rows=4, n=60, kind="zero-columns", dtype=torch.float32)
    solution = solve(problem, "swap", start=start)
    assert_proven(problem, solution)
    assert (int(solution.trace.scans.sum()) == 0) == (keep in (0, 60))


@pytest.mark.parametrize("of", [2, 4, 8, 20, 80])
def test_all_group_sizes(of):
    problem = layer(NM(of // 2, of), rows=2, n=160, kind="low-rank", dtype=torch.float32)
    assert_proven(problem, solve(problem, "swap", start="random"))


@pytest.mark.parametrize("weight_scale", [1e-44, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("gram_scale", [1e-30, 1.0, 1e30])
def test_extreme_scales(weight_scale, gram_scale):
    weight = (random_weight(3, 24, 7) * weight_scale).float()
    gram = (random_gram(24, "outliers", 8) * gram_scale).float()
    problem = LayerProblem(weight, gram, HALF, refit=Refit(0.01))
    assert_proven(problem, solve(problem, "swap"))


def test_outliers_of_a_million_times_the_median():
    gram, size = random_gram(48, "full", 4), torch.ones(48, dtype=torch.float64)
    size[::7] = 1e6
    gram = (size[:, None] * gram * size).float()
    weight = random_weight(4, 48, 7, torch.float32)
    for how in (*REFITS[:2], REFITS[3]):
        problem = LayerProblem(weight, gram, Unstructured(0.6), refit=how)
        for start in ("wanda", "worst"):
            assert_proven(problem, solve(problem, "swap", start=start))


def test_the_trace_and_the_progress_say_what_was_done(tmp_path):
    problem, seen = layer(rows=5, n=32), []
    solution = solve(problem, "swap", start="random", on_progress=seen.append)
    assert sorted(p.done for p in seen) == [1, 2, 3, 4, 5]
    assert seen[-1] == Progress(5, 5)
    trace = solution.trace
    assert int(trace.scans.min()) >= 1
    assert bool((trace.pairs <= 2 * trace.scans * 16 * 16).all())
    start = solve(problem, "random").mask
    assert bool((trace.swaps >= (solution.mask & ~start).sum(1)).all())
    assert_history(problem, problem.objective(start), solution)
    # and are read as they were written
    solution.save(tmp_path / "solution.npz")
    problem.save(tmp_path / "problem.npz")
    read = Solution.load(tmp_path / "solution.npz")
    verify(LayerProblem.load(tmp_path / "problem.npz"), read)
    assert torch.equal(read.trace.history, trace.history)


@pytest.mark.parametrize(("n", "damping"), [(128, 0.0), (400, 2e-6), (640, 0.0)])
def test_a_gram_matrix_that_is_all_but_singular(n, damping):
    """Inverting by halves loses it, and swaps leave weights that are not quite those of their mask."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, n, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, n, generator=generator, dtype=torch.float64)
    problem = LayerProblem(weight, x.T @ x, Unstructured(sparsity=0.6), refit=Refit(damping))
    found = solve(problem, "swap")
    verify(problem, found)
    _, best = problem.refitted(found.mask)
    torch.testing.assert_close(found.objective, best, rtol=1e-8, atol=0)


@pytest.mark.parametrize(**LINEAR)
@pytest.mark.parametrize("kind", KINDS)
def test_a_refitted_optimum_beats_the_refitted_optimum_of_kept_weights(kind, linear):
    weight, gram = random_weight(6, 48, 3), random_gram(48, kind, 4)
    part = random_linear(weight, gram, 5) if linear else None
    problem = LayerProblem(weight, gram, Unstructured(0.6), linear=part, refit=Refit(0.01))
    kept = solve(problem.refitting(None), "swap")
    found = solve(problem, "swap", start=kept.mask)
    before = problem.objective(kept.mask)
    assert bool((found.objective <= before + slack(problem)).all())
    if kind != "diagonal":
        assert float(found.objective.sum()) < 0.98 * float(before.sum())
