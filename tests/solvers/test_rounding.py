"""Relax (box, semidefinite, Frank–Wolfe), harden, round, swap: beyond the contract of searches."""

import pytest
import torch
from hypothesis import given, strategies as st
from scipy.optimize import minimize
from strategies import HALF, TWO_FOUR, drawn, floor, problems, random_gram, random_weight, verified

from maskopt import LayerProblem, Limits, Status, Unstructured, solve, verify
from maskopt.core.clock import clock
from maskopt.core.threads import torch_threads
from maskopt.protocol.solution import relative_gap
from maskopt.solvers import rounding as module
from maskopt.solvers.convex.box import BoxPlan, linear_bound, relax_box
from maskopt.solvers.convex.box_step import CompiledStep, TorchStep

SINGLE = torch.float32
SIXTY = Unstructured(sparsity=0.6)
PATTERNS = pytest.mark.parametrize("pattern", [SIXTY, TWO_FOUR])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def summed(solution):
    return float(solution.objective.sum())


@given(problems(max_n=10, kinds=("full", "low-rank", "duplicates", "zero-columns")))
def test_the_relaxation_converges_to_a_bound_below_the_optimum(problem):
    box = relax_box(problem, BoxPlan(1e-4, 3000), Limits())
    best = solve(problem, "exhaustive").objective
    assert bool((box.bound <= best + floor(problem)).all())
    # the gap is an average: a cheap row may be as far off as the others allow
    off = 1e-4 * float(box.value.sum()) + 1e-6 * problem.diagonal_mass()
    assert bool((box.value <= best * (1 + 1e-3) + off).all())
    grouped = box.point.view(problem.rows, -1, problem.group_size).sum(-1)
    assert float((grouped - problem.pruned_per_group).abs().max()) < 1e-2


@PATTERNS
def test_the_relaxed_value_is_the_one_of_a_general_solver(pattern):
    problem = drawn(3, 20, pattern=pattern)
    box = relax_box(problem, BoxPlan(1e-5, 3000), Limits())
    group, pruned = problem.group_size, problem.pruned_per_group
    inside = torch.eye(20 // group).repeat_interleave(group, 1).numpy()
    sums = {"type": "eq", "fun": lambda p: inside @ p - pruned, "jac": lambda p: inside}
    for row in range(3):
        q = problem.row(row).q().numpy()
        how = {"method": "SLSQP", "options": {"maxiter": 1000, "ftol": 1e-12}}
        how |= {"jac": True, "bounds": [(0, 1)] * 20, "constraints": sums}
        answer = minimize(lambda p, q=q: (p @ q @ p, 2 * q @ p), [pruned / group] * 20, **how)
        assert float(box.bound[row]) <= answer.fun * (1 + 1e-6)
        assert float(box.value[row]) == pytest.approx(answer.fun, rel=1e-3)


@DTYPES
def test_the_compiled_step_is_the_torch_step(dtype):
    for group, pruned in ((24, 10), (4, 2), (8, 0), (8, 8), (1, 0)):
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(5, 24, generator=generator, dtype=dtype)
        inverse = 1 / (q.square() + 1e-3)
        steps = [kind(q, inverse, group, pruned) for kind in (TorchStep, CompiledStep)]
        for theta in (0.0, 0.0, 0.3, 0.6):
            product = torch.randn(5, 24, generator=generator, dtype=dtype)
            for step in steps:
                step.advance(product, 1.6, theta)
            torch.testing.assert_close(steps[0].x, steps[1].x, rtol=1e-2, atol=3e-3)
            torch.testing.assert_close(steps[0].target, steps[1].target, rtol=1e-2, atol=1e-2)


@DTYPES
def test_sums_hold_where_all_inputs_of_a_group_sit_at_their_bounds(dtype):
    """Hardened to the end, with weights that barely count: no slope leads τ on."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(20, 64, generator=generator, dtype=dtype)
    q[torch.rand(20, 64, generator=generator) < 0.2] *= 1e-2
    step = CompiledStep(q, 1 / (q.square() + 1e-3), 4, 2)
    for k in range(20):
        product = step.target + torch.randn(20, 64, generator=generator, dtype=dtype) / 4
        step.advance(product, 1.0, 0.95 * (k + 1) / 20)
        assert float((step.x.view(20, 16, 4).sum(-1) - 2).abs().max()) < 2e-3
        assert bool(((step.x >= 0) & (step.x <= 1)).all())
    assert float(((step.x > 0) & (step.x < 1)).double().mean()) < 0.2


@PATTERNS
def test_hardening_rounds_better_and_swap_ends_better_than_from_wanda(pattern):
    problem = drawn(32, 256, "full", pattern, dtype=SINGLE)
    soft, hard = (solve(problem, "relax", refine=False, **how) for how in ({"harden": 0}, {}))
    assert summed(hard) < summed(soft)
    assert set(hard.status) == {Status.FEASIBLE}
    done = verified(problem, "relax")
    assert summed(done) < summed(solve(problem, "swap", start="wanda"))
    assert bool((done.lower_bound > 0).all())


@pytest.mark.parametrize("options", [{}, {"max_iterations": 0}])
def test_no_bit_depends_on_threads_or_memory(options):
    # three tiles; n is large enough for bfloat16 products where the CPU has them
    problem = drawn(300, 272, "full", TWO_FOUR, dtype=SINGLE)
    answers = []
    for threads, memory in ((1, None), (2, None), (3, 1)):
        with torch_threads(threads):
            answers.append(solve(problem, "relax", refine=False, memory_limit=memory, **options))
            assert torch.get_num_threads() == threads
    for answer in answers:
        assert torch.equal(answer.mask, answers[0].mask)
        assert torch.equal(answer.lower_bound, answers[0].lower_bound)
    assert bool((answers[0].lower_bound > 0).all()) != bool(options)


def test_hardening_at_once_ends_as_low_as_after_the_relaxation():
    problem = drawn(64, 256, "outliers", SIXTY, dtype=SINGLE)
    first, at_once = solve(problem, "relax"), verified(problem, "relax", max_iterations=0)
    assert at_once.certificate is None
    relaxed = torch.stack([at_once.trace.relaxed_objective, at_once.trace.relaxed_gap])
    assert bool(relaxed.isnan().all())
    assert summed(at_once) < summed(solve(problem, "swap", start="wanda"))
    assert summed(at_once) < 1.01 * summed(first)
    trace = first.trace
    gap = 1 - first.lower_bound / trace.relaxed_objective
    torch.testing.assert_close(trace.relaxed_gap, gap, rtol=0, atol=1e-6)
    assert trace.iterations.shape == trace.relax_seconds.shape == trace.swap_seconds.shape == (64,)
    assert float(trace.relax_seconds.sum() + trace.swap_seconds.sum()) <= first.seconds


@pytest.mark.parametrize("limit", [0.0, 1e-4])
@pytest.mark.parametrize("start", [None, "wanda"])
def test_a_limit_is_passed_by_no_more_than_a_step(limit, start, clock):
    # three tiles, each of which makes its one step
    problem = drawn(300, 24)
    hurried = verified(problem, "relax", start=start, time_limit=limit)
    at_once = solve(problem, "relax", start=start, time_limit=limit, max_iterations=0)
    for solution, steps in ((hurried, 1), (at_once, 0)):
        assert solution.trace.iterations.tolist() == [steps] * 300
        assert not solution.trace.swaps.any()
    one_step = solve(problem, "relax", max_iterations=0, harden=1, hardness=0.85 / 20, refine=False)

    # the mask, or the start's where that costs less
    def better(found):
        other = solve(problem, start or "worst")
        less = (other.objective < found.objective) & (start is not None)
        return torch.where(less[:, None], other.mask, found.mask)

    assert torch.equal(better(at_once), better(one_step))


def test_the_swaps_have_what_the_relaxation_leaves(monkeypatch):
    """One deadline: however much the relaxation takes, the end does not move."""
    seen = []

    def watch(owner, name):
        def watched(*given):
            seen.append(given[-1].deadline)
            return original(*given)

        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, watched)

    watch(module, "relax_box")
    watch(module.Swap, "run")
    began = clock()
    solve(drawn(3, 24), "relax", start="wanda", time_limit=50)
    assert (len(seen) >= 2, len(set(seen))) == (True, 1)
    assert began + 50 <= seen[0] <= clock() + 50


@pytest.mark.parametrize("solver", ["relax", module.FrankWolfe(iterations=500)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_no_claim_on_a_float32_gram_is_above_its_certificate(solver, scale):
    """Low rank in float32: G is semidefinite only up to its rounding; and one weight may dominate."""
    for rows, n in ((3, 48), (1, 48), (1, 400)):
        gram = random_gram(n, "low-rank", 3, torch.float32)
        weight = random_weight(rows, n, 4, torch.float32)
        weight[:, :2] *= scale
        gram[1], gram[:, 1] = gram[0].clone(), gram[:, 0].clone()  # twins of large weight
        gram[1, 1] = gram[0, 0] * (1 - 1e-7)
        for pattern in (HALF, TWO_FOUR):
            problem = LayerProblem(weight, gram, pattern)
            solution = verified(problem, solver)
            assert bool((solution.lower_bound <= solution.certificate.check(problem)).all())
    # an indefinite G that was never checked is relaxed all the same
    gram = random_gram(16, "full", 1) - 0.9 * torch.eye(16, dtype=torch.float64)
    assert float(torch.linalg.eigvalsh(gram)[0]) < -0.8
    problem = LayerProblem(random_weight(3, 16, 1), gram, HALF, assume_psd=True)
    solution = solve(problem, solver)
    assert bool((solution.lower_bound <= solution.certificate.check(problem)).all())
    # inputs without any weight, as in pruned heads and dead channels, cost no proof
    weight = random_weight(4, 256, 1)
    weight[:, [3, 100]] = 0
    problem = LayerProblem(weight * scale, random_gram(256, "low-rank", 2), HALF)
    verify(problem, solve(problem, solver), require="checked")


def test_rows_whose_start_is_better_are_swapped_from_there():
    problem = drawn(6, 32)
    rounded, best = solve(problem, "relax", refine=False), solve(problem, "tabu")
    start = rounded.mask.clone()
    start[[1, 4]] = best.mask[[1, 4]]
    worst = solve(problem, "worst").mask
    swapped = module.swapped(problem, worst, start, Limits())
    alone, from_worst = (solve(problem, "swap", start=x) for x in (start, worst))
    taken = problem.objective(start) < from_worst.objective
    assert taken[[1, 4]].tolist() == [True, True]
    assert torch.equal(swapped.mask, torch.where(taken[:, None], alone.mask, from_worst.mask))
    swaps = torch.where(taken, alone.trace.swaps, from_worst.trace.swaps)
    assert torch.equal(swapped.trace.swaps, swaps)
    sources = (alone if other else from_worst for other in taken)
    assert [*swapped.status] == [source.status[row] for row, source in enumerate(sources)]


@PATTERNS
def test_semidefinite_mask_and_certificate_in_one(pattern):
    problem = drawn(6, 64, "full", pattern, dtype=SINGLE)
    solution = verified(problem, "sdp")
    assert bool((relative_gap(solution.objective, solution.lower_bound) < 0.3).all())
    assert bool((solution.lower_bound >= solve(problem, "relax").lower_bound).all())
    rounded = solve(problem, "sdp", refine=False)
    assert set(rounded.status) == {Status.FEASIBLE}
    swapped = solve(problem, "swap", start=rounded.mask)
    assert torch.equal(swapped.mask, solution.mask)


@given(problems(max_n=9, max_rows=2), st.floats(0, 1))
def test_the_bound_holds_at_any_point_and_under_any_shift_of_the_diagonal(problem, part):
    """λ = −d⊙w² with d up to λ_min(G): on masks the value is the same."""
    least = float(torch.linalg.eigvalsh(problem.gram.double())[0].clamp(min=0.0))
    lam = -part * least * problem.weight.double().square()
    best, slack = solve(problem, "exhaustive"), floor(problem)
    pruned, random = (~best.mask).double(), torch.rand(2, problem.rows, problem.n)
    value, _ = linear_bound(problem, pruned, lam)
    assert bool(((value - best.objective).abs() <= slack).all())
    for x in (pruned, random[0], -3 * random[1]):
        for shift in ((), (lam,)):
            assert bool((linear_bound(problem, x, *shift)[1] <= best.objective + slack).all())


@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=str)
def test_it_converges_to_the_relaxations_optimum(pattern):
    problem = drawn(4, 32, pattern=pattern)
    solution = solve(problem, "frank_wolfe", iterations=3000)
    relaxed = solution.trace.relaxed_objective
    assert bool((relaxed <= solution.objective * (1 + 1e-9)).all())
    # gap ≤ 2·curvature/(T + 2): after 3000 steps the bound is close below the relaxed value
    assert bool((solution.lower_bound >= 0.95 * relaxed).all())
    worse = solve(problem, "frank_wolfe", iterations=3).trace.relaxed_objective
    assert bool((relaxed < worse).all())
    assert solve(problem, "frank_wolfe", time_limit=0.0).trace.iterations.tolist() == [0] * 4


def test_alpha_keeps_the_top_wanda_weights():
    problem = drawn(3, 20, seeds=(1, 4))
    score = problem.weight.abs() * problem.gram.diagonal().sqrt()
    plans = (module.FrankWolfe(alpha=alpha, iterations=50) for alpha in (0.5, 1.0))
    half, whole = (solve(problem, plan, start="worst") for plan in plans)
    verify(problem, half)
    assert bool((half.objective < solve(problem, "worst").objective).all())
    assert bool(half.mask.gather(1, score.argsort(1, descending=True)[:, :5]).all())
    assert torch.equal(whole.mask, solve(problem, "wanda").mask)
