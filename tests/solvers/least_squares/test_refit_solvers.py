"""Solvers of updated weights: all of them, 1-swap search, ADMM and greedy elimination."""

from dataclasses import replace

import pytest
import refit_layers
import torch
from forging import copied, fails, forge_manifest
from hypothesis import given, settings, strategies as st
from pooled_layers import layer as pooled_layer
from refit_layers import LARGE, PATTERNS, REFITS, changed, layer, shuffled
from strategies import HALF, KINDS, ONE_PERCENT, drawn, floor, problems, swap_optimal, verified
from tiny_models import tiny, tokens

from maskopt import NM, LayerProblem, LeastSquaresUpdate, Unstructured, prune_model, solve, verify
from maskopt.checks.swap_check import improving_swap
from maskopt.core.limits import Limits, Progress
from maskopt.core.objective import LinearTerm
from maskopt.errors import MaskoptError, OptionError, VerificationError
from maskopt.instances.formats import load_problem
from maskopt.models.checkpoints.schema import MANIFEST, read_manifest
from maskopt.models.verification.verify import verify_model
from maskopt.protocol.solution import Solution, Status
from maskopt.protocol.solver import make_solver
from maskopt.solvers.least_squares.search import CANDIDATES, OF_GROUPS

ROOT = REFITS[3]
SOLVERS, STARTS, F32 = ("swap", "admm", "obs"), ("wanda", "random", "worst"), torch.float32
BOTH = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
LINEAR = pytest.mark.parametrize(**refit_layers.LINEAR)
EVERY = pytest.mark.parametrize("solver", SOLVERS)
close = torch.testing.assert_close


def total(problem, solver, **options):
    return float(solve(problem, solver, **options).objective.sum())


# --- all of them
@pytest.mark.slow
@settings(max_examples=min(40, settings().max_examples))  # a tenth of a second each
@given(
    problems(max_n=11, max_rows=3), st.sampled_from(REFITS), st.sampled_from((1, 2, 64)),
    st.sampled_from(STARTS),
)  # fmt: skip
def test_never_below_the_optimum_which_is_left_alone(problem, how, panel, start):
    problem = problem.with_update(how)
    best = solve(problem, "exhaustive")
    verify(problem, best, require="checked")
    assert set(best.status) == {Status.OPTIMAL}
    for solver in ("random", "admm", make_solver("obs", panel=panel)):
        found = verified(problem, solver)
        assert bool((found.objective >= best.objective - floor(problem)).all())
        claims = set(zip(found.status, found.lower_bound.tolist(), strict=True))
        assert claims == {(Status.FEASIBLE, 0.0)}
    evolved = swap_optimal(problem, "memetic", generations=2, children=2, pool=4)
    for found in (evolved, solve(problem, "swap", start=start)):
        assert bool((found.objective >= best.objective - floor(problem)).all())
    left = swap_optimal(problem, start=best.mask)
    # of equals it may go to another, by less than what counts
    changed = left.trace.swaps > 0
    assert bool((left.objective - best.objective).abs().le(1e-6 * best.objective)[changed].all())
    assert int(changed.sum()) <= int((best.objective <= floor(problem)).sum())


@EVERY
@pytest.mark.parametrize("pattern", LARGE, ids=str)
@pytest.mark.parametrize("kind", ["full", "low-rank", "outliers"])
def test_threads_and_the_other_rows_change_nothing(solver, kind, pattern):
    problem = layer(pattern, n=80, kind=kind, linear=kind == "full")
    before = torch.get_num_threads()
    whole, three = (solve(problem, solver, threads=threads) for threads in (1, 3))
    assert torch.equal(three.mask, whole.mask)
    assert torch.equal(three.objective, whole.objective)
    assert torch.equal(solve(problem, solver).mask, whole.mask)
    assert torch.get_num_threads() == before
    for i in range(problem.rows):
        alone = solve(problem.row(i), solver)
        assert torch.equal(alone.mask[0], whole.mask[i])
        assert float(alone.objective) == pytest.approx(float(whole.objective[i]), rel=1e-9)
    # rows work in the memory of those before them, and in more than one tile
    many = [3, 1, 2, 0, *list(range(4)) * 24] if solver == "admm" else [3, 2, 1, 0]
    assert torch.equal(solve(problem.take(many), solver, threads=3).mask, whole.mask[many])
    if solver == "admm" and kind == "full" and pattern is LARGE[0]:  # also of a shared budget
        problem = pooled_layer(rows=70, n=16, update=ONE_PERCENT)
        one, three = (solve(problem, "admm", threads=threads) for threads in (1, 3))
        assert torch.equal(one.mask, three.mask)
        verify(problem, three)


@EVERY
@given(
    st.integers(0, 1000), st.integers(-20, 20), st.integers(-20, 20), st.sampled_from(PATTERNS),
    st.sampled_from(REFITS[1:]), st.booleans(),
)  # fmt: skip
def test_scales_and_orders_change_nothing(solver, seed, of_weight, of_gram, pattern, how, linear):
    """Powers of two: what is scaled to 1 is the same to the last bit."""
    problem = layer(pattern, rows=2, n=24, seed=seed, linear=linear, how=how)
    plain = solve(problem, solver)
    scaled = changed(problem, 2.0**of_weight, 4.0**of_gram)
    assert torch.equal(solve(scaled, solver).mask, plain.mask)
    if solver == "admm":  # its iterations are in float32, in eigenvectors of another order
        return
    order = shuffled(problem, seed)
    found = solve(changed(problem, columns=order), solver)
    assert torch.equal(found.mask, plain.mask[:, order])
    close(found.objective, plain.objective, rtol=1e-9, atol=0)


@EVERY
@BOTH
def test_narrow_numbers_and_rows_without_anything_or_a_choice(pattern, solver):
    plain = layer(pattern, n=32, kind="outliers", how=ROOT)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight, gram = plain.weight.to(dtype), plain.gram.float()
        problem = LayerProblem(weight, gram, pattern, update=ROOT)
        solution, exact = verified(problem, solver), refit_layers.wide(problem)
        assert torch.equal(solve(exact, solver).mask, solution.mask)
        close(solution.objective, exact.objective(solution.mask), rtol=1e-9, atol=0)
    problem = layer(pattern, rows=6, n=32, kind="zero-columns")
    weight = problem.weight.clone()
    weight[[0, 3]] = 0
    problem = LayerProblem(weight, problem.gram, pattern, update=problem.update)
    assert bool((problem.gram.diagonal() == 0).any())
    solution = verified(problem, solver)
    assert (solution.objective == 0).tolist() == [True, False, False, True, False, False]
    nothing = changed(problem, g=0.0)
    solution = verified(nothing, solver)
    weight = nothing.weights(solution.mask)
    assert not torch.stack([solution.objective, nothing.error(weight)]).any()
    assert bool(weight.isfinite().all())
    assert solver != "swap" or not solution.trace.history.any()
    for keep in (0, 1, 31, 32):
        problem = layer(Unstructured(keep=keep), n=32, linear=pattern is HALF)
        solution = verified(problem, solver)
        assert solution.mask.sum(1).tolist() == [keep] * 4


@pytest.mark.parametrize("solver", ["admm", "obs"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [LeastSquaresUpdate(), ROOT], ids=repr)
def test_weights_that_are_kept_get_a_mask_of_refitted_ones(kind, solver, how):
    """With one percent of damping unless another is named; so does a start for updated weights."""
    problem = layer(n=32, kind=kind, how=how)
    kept, mask = problem.with_update(None), solve(problem, solver).mask
    named = {} if how == LeastSquaresUpdate() else vars(how)
    solution = verified(kept, make_solver(solver, **named))
    assert torch.equal(solution.mask, mask)
    assert torch.equal(solution.objective, kept.objective(mask))
    assert torch.equal(solve(problem, make_solver("swap", max_swaps=0), start=solver).mask, mask)
    if kind == "outliers" and how == ROOT:
        assert not torch.equal(solve(kept, make_solver(solver, damping=0.1)).mask, mask)


@LINEAR
@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_better_than_scores_and_close_to_a_one_swap_optimum(kind, pattern, linear):
    problem = layer(pattern, rows=16, n=64, kind=kind, linear=linear)
    names = ("admm", "obs", "wanda", "sparsegpt")
    found = [solve(problem, name) for name in names]
    admm, obs, wanda, sparsegpt = (float(x.objective.sum()) for x in found)
    if pattern == HALF and not linear:
        assert obs <= wanda * (1 + 1e-9)
    if kind in ("full", "low-rank", "outliers"):
        assert admm < min(0.98 * wanda, sparsegpt)
    if kind == "full" and not linear:
        for most, name, start in zip((1.15, 2), names, found, strict=False):
            swapped = verified(problem, "swap", start=name)
            assert float(start.objective.sum()) < most * float(swapped.objective.sum())
            assert torch.equal(swapped.mask, solve(problem, "swap", start=start.mask).mask)
            assert bool((swapped.objective <= start.objective * (1 + 1e-9)).all())
    # a refitted optimum beats the refitted optimum of kept weights
    part = 5 if linear else None
    problem = drawn(6, 48, kind, LARGE[0], (3, 4), linear=part, update=ONE_PERCENT)
    kept = solve(problem.with_update(None), "swap")
    better, before = solve(problem, "swap", start=kept.mask), problem.objective(kept.mask)
    assert bool((better.objective <= before + floor(problem)).all())
    assert kind == "diagonal" or float(better.objective.sum()) < 0.98 * float(before.sum())


@EVERY
def test_a_power_of_one_does_not_see_the_size_of_inputs(solver):
    """Inputs times s and weights by s are the same layer; powers of two, for rounding."""
    size = 2.0 ** torch.randint(-3, 4, (24,), generator=torch.Generator().manual_seed(3)).double()
    problem = layer(n=24, rows=3, how=REFITS[4])
    gram = problem.gram * size * size[:, None]
    scaled = LayerProblem(problem.weight / size, gram, problem.pattern, update=problem.update)
    one, other = solve(problem, solver), solve(scaled, solver)
    assert torch.equal(one.mask, other.mask)
    close(one.objective, other.objective, rtol=1e-9, atol=0)
    plain = LeastSquaresUpdate(0.1)
    far, near = (x.with_update(plain).objective(one.mask) for x in (scaled, problem))
    assert bool((far / near - 1).abs().gt(0.01).all())


# --- 1-swap search
def assert_history(problem, start, solution):
    """From the objective of the start, never up, to that of the solution."""
    history = solution.trace.history
    off = 1e-6 * start + floor(problem)
    ends = torch.stack([start, solution.objective], 1)
    assert history.shape[0] == problem.rows
    assert bool(((history[:, [0, -1]] - ends).abs() <= off[:, None]).all())
    assert bool((history.diff(dim=1) <= 1e-12 * off[:, None]).all())


@given(problems(), st.sampled_from(REFITS), st.sampled_from(STARTS))
def test_every_row_ends_at_a_proven_one_swap_optimum(problem, how, start):
    problem = problem.with_update(how)
    before = solve(problem, start)
    solution = swap_optimal(problem, start=start)
    assert bool((solution.objective <= before.objective + floor(problem)).all())
    assert_history(problem, before.objective, solution)
    again = solve(problem, "swap", start=solution.mask)
    assert torch.equal(again.mask, solution.mask)
    assert not again.trace.swaps.any()
    # no time leaves the start and claims nothing
    none = verified(problem, "swap", start=start, time_limit=0.0)
    assert torch.equal(none.mask, before.mask)
    assert set(none.status) == {Status.FEASIBLE}


def test_the_swaps_of_all_rounds_are_counted():
    problem = layer(rows=2, n=160, kind="outliers")
    whole = solve(problem, "swap", start="worst")
    assert int(whole.trace.rounds.min()) > 1
    most = int(whole.trace.swaps.min()) - 1
    stopped = solve(problem, "swap", start="worst", max_swaps=most)
    assert (stopped.trace.swaps.tolist(), set(stopped.status)) == ([most, most], {Status.FEASIBLE})
    assert bool((stopped.objective >= whole.objective).all())


def test_a_limit_on_the_way_keeps_what_was_reached(clock):
    problem = layer(n=64, rows=6)
    start = solve(problem, "worst")
    began = clock.now
    whole = solve(problem, "swap", start=start.mask, limits=Limits(seconds=1e9, threads=1))
    looks = clock.now - began
    assert looks > 12
    part = verified(problem, "swap", start=start.mask, limits=Limits(seconds=looks / 2, threads=1))
    assert set(part.status) == {Status.SWAP_OPTIMAL, Status.FEASIBLE}
    assert bool((part.objective <= start.objective + floor(problem)).all())
    done = torch.tensor([status is Status.SWAP_OPTIMAL for status in part.status])
    assert torch.equal(part.mask[done], whole.mask[done])
    assert torch.equal(part.mask[-1], start.mask[-1])


@pytest.mark.parametrize("start", ["wanda", "worst"])
@pytest.mark.parametrize(("n", "at"), [(96, 0), (160, 0), (96, 1), (320, 1), (320, 2)])
@pytest.mark.parametrize("kind", ["outliers", "low-rank"])
def test_rows_of_more_inputs_than_candidates(kind, n, at, start):
    pattern = LARGE[at]
    problem = layer(pattern, rows=2, n=n, kind=kind, dtype=F32)
    before = solve(problem, start)
    solution = swap_optimal(problem, start=start)
    assert_history(problem, before.objective, solution)
    assert bool((solution.objective < before.objective).all())
    # candidates once are not enough where they are few of all
    most = 2 * CANDIDATES if pattern is LARGE[0] else OF_GROUPS
    assert int(solution.trace.rounds.min()) > 1 or n <= most or start != "worst"


@LINEAR
@pytest.mark.parametrize("pattern", LARGE, ids=str)
def test_exchanges_that_do_not_pay_do_not_follow_each_other_for_ever(pattern, linear):
    """Inverses of condition 1e8 drift with every exchange, and would promise gains without end."""
    problems = [layer(pattern, 3, 96, "low-rank", REFITS[0], linear, seed) for seed in range(3)]
    seeds = 314524203, 314524202
    drifting = drawn(2, 128, "low-rank", Unstructured(keep=52), seeds, update=REFITS[0])
    problems.append(drifting.take([1]))
    for problem in problems:
        before = solve(problem, "worst")
        solution = swap_optimal(problem, start="worst", max_swaps=2000)
        assert_history(problem, before.objective, solution)
        assert int(solution.trace.swaps.max()) < 500


@BOTH
def test_a_claim_that_does_not_hold_is_caught(pattern):
    problem = layer(pattern, n=32)
    whole = solve(problem, "swap", start="worst")
    one = int(whole.trace.swaps[2]) - 1
    stopped = solve(problem, "swap", start="worst", max_swaps=one).mask[2]
    assert not torch.equal(stopped, whole.mask[2])
    mask = whole.mask.clone()
    mask[2] = stopped
    forged = Solution.of(problem, mask, status=Status.SWAP_OPTIMAL)
    message = "row 2 claims swap-optimal, yet keeping input"
    fails(VerificationError, message, verify, problem, forged)
    swap = improving_swap(problem.row(2), mask[2])
    pair = [swap.kept, swap.pruned]
    assert mask[2, pair].tolist() == [True, False]
    mended = mask[2].clone()
    mended[pair] = ~mended[pair]
    change = problem.row(2).objective(mended) - problem.row(2).objective(mask[2])
    assert change == pytest.approx(swap.delta, rel=1e-6)
    honest = replace(forged, status=(Status.SWAP_OPTIMAL,) * 2 + (Status.FEASIBLE,) * 2)
    verify(problem, honest)
    # nor does one of a better objective or bound
    off, bound = whole.objective.clone(), torch.zeros(4, dtype=torch.float64)
    off[3] *= 1 - 3e-9
    bound[1] = 0.1 * off[1]
    lies = {"objective: row 3": {"objective": off}, "lower bound: row 1": {"lower_bound": bound}}
    for message, wrong in lies.items():
        fails(VerificationError, message, verify, problem, replace(whole, **wrong))


def test_one_kept_input_of_many_is_enumerated():
    """LAPACK's LU of batches of 160 inputs and more never returned with two threads."""
    problem = layer(Unstructured(keep=1), n=190, rows=1)
    best = solve(problem, "exhaustive", threads=2)
    verify(problem, best, require="checked")
    found = solve(problem, "swap", start="worst")
    assert float(found.objective) == pytest.approx(float(best.objective), rel=1e-9)


def test_the_trace_and_the_progress_say_what_was_done(tmp_path):
    problem, seen = layer(rows=5, n=32), []
    solution = solve(problem, "swap", start="random", on_progress=seen.append)
    assert (sorted(p.done for p in seen), seen[-1]) == ([1, 2, 3, 4, 5], Progress(5, 5))
    trace = solution.trace
    assert int(trace.scans.min()) >= 1
    assert bool((trace.pairs <= 2 * trace.scans * 16 * 16).all())
    start = solve(problem, "random").mask
    assert bool((trace.swaps >= (solution.mask & ~start).sum(1)).all())
    assert_history(problem, problem.objective(start), solution)
    solution.save(tmp_path / "solution.npz")
    problem.save(tmp_path / "problem.npz")
    read = Solution.load(tmp_path / "solution.npz")
    verify(load_problem(tmp_path / "problem.npz"), read)
    assert torch.equal(read.trace.history, trace.history)


# --- ADMM
def test_damping_linear_part_and_iterations_have_their_say_and_the_order_has_none():
    problem, other = (layer(rows=16, n=32, kind="low-rank", linear=x) for x in (False, True))
    mask = solve(problem, "admm").mask
    assert not torch.equal(solve(problem.with_update(LeastSquaresUpdate(10.0)), "admm").mask, mask)
    found = solve(other, "admm")
    assert not torch.equal(found.mask, mask)
    assert float(found.objective.sum()) < float(other.objective(mask).sum())
    for kind in ("full", "outliers", "diagonal"):
        problem = layer(rows=40, n=48, kind=kind)
        order = shuffled(problem)
        plain, found = solve(problem, "admm"), solve(changed(problem, columns=order), "admm")
        # entries that change places near the end may stop elsewhere
        assert float((found.mask != plain.mask[:, order]).double().mean()) < 0.01
        assert float(found.objective.sum()) == pytest.approx(float(plain.objective.sum()), rel=1e-3)
    problem = layer(rows=16, n=64, kind="low-rank")
    one, many = (solve(problem, "admm", iterations=most) for most in (1, 300))
    verify(problem, one)
    assert float(many.objective.sum()) < float(one.objective.sum())
    assert not torch.equal(one.mask, many.mask)
    bad = [("iterations", 0), ("iterations", 1.5), ("damping", -0.1)]
    for name, value in (*bad, ("rho", 0.0), ("rho", -1.0), ("rho", float("nan"))):
        fails(OptionError, name, solve, problem, "admm", **{name: value})


def test_no_time_rows_of_no_weights_and_inputs_that_one_percent_leaves_indefinite():
    for problem in (layer(pattern, rows=6, n=32) for pattern in PATTERNS):
        hurried = verified(problem, "admm", time_limit=0.0)
        # the largest weights in the metric
        score = (problem.weight * problem.least_squares.damped.diagonal().sqrt()).abs()
        score = score.reshape(6, -1, problem.group_size)
        kept = score.topk(problem.group_size - problem.pruned_per_group).indices
        largest = torch.zeros_like(score, dtype=torch.bool).scatter_(2, kept, True).view(6, -1)
        assert torch.equal(hurried.mask, largest)
    for scale in (1.0, 1e9, 1e30):  # such a row may have much to take over
        problem = layer(rows=6, n=32, linear=True)
        weight = scale * problem.weight
        weight[2] = 0
        linear = LinearTerm(scale * problem.linear.correlation, scale**2 * problem.linear.constant)
        problem = LayerProblem(weight, problem.gram, HALF, linear=linear, update=problem.update)
        verify(problem, solve(problem, "admm"))

    # of a G that was never checked, and for weights that are kept
    def twins(off):
        gram = torch.eye(64)
        gram[1, 2] = gram[2, 1] = off
        return LayerProblem(torch.ones(1, 64), gram, HALF, assume_psd=True)

    assert int(solve(twins(1.005), "admm").mask.sum()) == 32
    fails(MaskoptError, r"\A.*larger damping.*\Z", solve, twins(1.02), "admm")


# --- greedy elimination
def one_by_one(problem, row):
    """By F itself: the removal after which least squares cost least, again and again."""
    alone, group, quota = problem.row(row).as_layer(), problem.group_size, problem.pruned_per_group
    mask, every = torch.ones(problem.n, dtype=torch.bool), torch.eye(problem.n, dtype=torch.bool)
    while True:
        done = (~mask).view(-1, group).sum(1) == quota
        left = mask & ~done.repeat_interleave(group)
        if not left.any():
            return mask
        others = mask & ~every[left]
        fewer = alone.take([0] * len(others)).under(Unstructured(keep=int(mask.sum()) - 1))
        mask = others[int(fewer.objective(others).argmin())]


@pytest.mark.parametrize("pattern", [*PATTERNS, NM(keep=1, of=4)], ids=str)
@LINEAR
def test_it_removes_what_costs_least_one_by_one(pattern, linear):
    """With all inputs among the candidates of a panel, panels change nothing either."""
    problem = layer(pattern, rows=3, n=12, linear=linear, how=LeastSquaresUpdate(0.02))
    expected = torch.stack([one_by_one(problem, row) for row in range(3)])
    for panel in (1, 3, 64):
        assert torch.equal(solve(problem, "obs", panel=panel).mask, expected)
    if linear or pattern is not HALF:
        return
    problem = layer(rows=6, n=96, how=LeastSquaresUpdate(0.02))
    assert total(problem, "obs", panel=8) <= 1.02 * total(problem, "obs", panel=1)
    assert float(verified(problem, "obs", time_limit=0.0).objective.sum()) > total(problem, "obs")


# --- whole models
OPTIONS = {"sparsity": 0.5, "min_tokens": 1, "update": "least-squares", "damping": 0.1}


@pytest.mark.slow
def test_models_are_refitted_and_checked_so(tmp_path, dense_folder):
    out, plain, given = tmp_path / "out", tmp_path / "plain", tokens()
    report = prune_model(dense_folder, given, output=out, damping_exponent=0.5, **OPTIONS)
    other = prune_model(dense_folder, given, output=plain, **OPTIONS)
    assert [x.error for x in report.layers] != [x.error for x in other.layers]
    assert read_manifest(out / MANIFEST)["fingerprint"]["options"]["damping_exponent"] == 0.5
    assert verify_model(out, dense_folder, calibration=given).checked_layers
    # a manifest of before there was a choice means none
    forged = copied(plain, tmp_path / "older")
    forge_manifest(forged, lambda m: m["fingerprint"]["options"].pop("damping_exponent"))
    assert verify_model(forged, dense_folder, calibration=given).checked_layers
    # and one that says another is found out
    forged = copied(out, tmp_path / "forged")
    forge_manifest(forged, lambda m: m["fingerprint"]["options"].update(damping_exponent=0.0))
    fails(VerificationError, None, verify_model, forged, dense_folder, calibration=given)
    # what no run has is no manifest, text or not
    forge_manifest(forged, lambda m: m["fingerprint"]["options"].update(damping_exponent=1.5))
    fails(VerificationError, "damaged or was changed", verify_model, forged)
    kept = {"update": "none", "damping": 0.01}
    for how, message in (
        ({"damping_exponent": 2.0}, r"`damping_exponent` must be a number \[0, 1\], not 2.0"),
        ({**kept, "damping_exponent": 0.5}, "needs `update` least-squares"),
    ):
        fails(MaskoptError, message, prune_model, tiny("llama"), given, **{**OPTIONS, **how})
