"""Relax (box or semidefinite), harden, round, swap: beyond the contract of every search."""

import time

import pytest
import scipy.optimize
import torch
from hypothesis import given
from local_search import drawn, floor
from strategies import problems, random_gram, random_weight

from maskopt import NM, LayerProblem, Unstructured, solve, verify
from maskopt.limits import Limits
from maskopt.solution import Status
from maskopt.solvers.convex.box import BoxPlan, relax_box
from maskopt.solvers.convex.box_step import CompiledStep, TorchStep
from maskopt.solvers.convex.projection import project
from maskopt.solvers.rounding import relax as module
from maskopt.solvers.rounding.frank_wolfe import FrankWolfe

SINGLE = torch.float32
PATTERNS = pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.6), NM(keep=2, of=4)])


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
    groups = 20 // problem.group_size
    for row in range(3):
        q = problem.row(row).q().numpy()
        inside = torch.eye(groups).repeat_interleave(problem.group_size, 1).numpy()
        answer = scipy.optimize.minimize(
            lambda p, q=q: p @ q @ p,
            torch.full((20,), problem.pruned_per_group / problem.group_size).numpy(),
            jac=lambda p, q=q: 2 * q @ p,
            bounds=[(0, 1)] * 20,
            constraints={
                "type": "eq",
                "fun": lambda p, a=inside: a @ p - problem.pruned_per_group,
                "jac": lambda p, a=inside: a,
            },
            method="SLSQP",
            options={"maxiter": 1000, "ftol": 1e-12},
        )
        assert float(box.bound[row]) <= answer.fun * (1 + 1e-6)
        assert float(box.value[row]) == pytest.approx(answer.fun, rel=1e-3)


@pytest.mark.parametrize(("group", "pruned"), [(24, 10), (4, 2), (8, 0), (8, 8), (1, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_compiled_step_is_the_torch_step(group, pruned, dtype):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
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


def test_projection():
    generator = torch.Generator().manual_seed(0)
    start = 3 * torch.randn(50, 12, generator=generator, dtype=torch.float64)
    inverse = torch.rand(50, 12, generator=generator, dtype=torch.float64) + 1e-6
    x, tau = project(start, inverse, 5, torch.zeros(50, 1, dtype=torch.float64))
    assert float((x.sum(1) - 5).abs().max()) < 1e-3
    # optimality: (x − start)/inverse + τ is 0 inside, ≥ 0 at 0, ≤ 0 at 1
    slope = (x - start) / inverse + tau
    assert bool((slope[(x > 0) & (x < 1)].abs() < 1e-6).all())
    assert bool((slope[x == 0] >= -1e-9).all())
    assert bool((slope[x == 1] <= 1e-9).all())


@PATTERNS
def test_hardening_rounds_better_and_swap_ends_better_than_from_wanda(pattern):
    problem = drawn(32, 256, "full", pattern, dtype=SINGLE)
    soft = solve(problem, "relax", harden=0, refine=False)
    hard = solve(problem, "relax", refine=False)
    assert float(hard.objective.sum()) < float(soft.objective.sum())
    assert set(hard.status) == {Status.FEASIBLE}
    done = solve(problem, "relax")
    verify(problem, done)
    assert float(done.objective.sum()) < float(
        solve(problem, "swap", warm_start="wanda").objective.sum()
    )
    assert bool((done.lower_bound > 0).all())


@pytest.mark.parametrize("options", [{}, {"max_iterations": 0}])
def test_no_bit_depends_on_threads_or_memory(options):
    # three tiles; n is large enough for bfloat16 products where the CPU has them
    problem = drawn(300, 272, "full", NM(keep=2, of=4), dtype=SINGLE)
    before = torch.get_num_threads()
    try:
        answers = []
        for threads, memory in ((1, None), (2, None), (3, 1)):
            torch.set_num_threads(threads)
            answers.append(solve(problem, "relax", refine=False, memory_limit=memory, **options))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a.mask, answers[0].mask) for a in answers)
    assert all(torch.equal(a.lower_bound, answers[0].lower_bound) for a in answers)
    assert bool((answers[0].lower_bound > 0).all()) != bool(options)


def test_hardening_at_once_ends_as_low_as_after_the_relaxation():
    problem = drawn(64, 256, "outliers", Unstructured(sparsity=0.6), dtype=SINGLE)
    first = solve(problem, "relax")
    at_once = solve(problem, "relax", max_iterations=0)
    verify(problem, at_once)
    assert at_once.certificate is None
    wanda = solve(problem, "swap", warm_start="wanda").objective.sum()
    assert float(at_once.objective.sum()) < float(wanda)
    assert float(at_once.objective.sum()) < 1.01 * float(first.objective.sum())


@pytest.mark.parametrize("limit", [0.0, 1e-4])
@pytest.mark.parametrize("start", [None, "wanda"])
def test_a_limit_is_passed_by_no_more_than_a_step(limit, start, clock):
    # three tiles, each of which makes its one step
    problem = drawn(300, 24)
    hurried = solve(problem, "relax", start=start, time_limit=limit)
    verify(problem, hurried)
    assert hurried.trace.iterations.tolist() == [1] * 300
    assert int(hurried.trace.swaps.sum()) == 0
    at_once = solve(problem, "relax", start=start, time_limit=limit, max_iterations=0)
    assert at_once.trace.iterations.tolist() == [0] * 300
    assert int(at_once.trace.swaps.sum()) == 0
    one_step = solve(problem, "relax", max_iterations=0, harden=1, hardness=0.85 / 20, refine=False)
    assert torch.equal(keep_of(at_once, start, problem), keep_of(one_step, start, problem))


def keep_of(solution, start, problem):
    """The mask, or the start's where that costs less."""
    if start is None:
        return solution.mask
    other = solve(problem, start)
    better = other.objective < solution.objective
    return torch.where(better[:, None], other.mask, solution.mask)


def test_the_swaps_have_what_the_relaxation_leaves(monkeypatch):
    """One deadline: however much the relaxation takes, the end does not move."""
    problem = drawn(3, 24)
    seen = []

    class Spy(module.Swap):
        def run(self, problem, start, limits):
            seen.append(limits.deadline)
            return super().run(problem, start, limits)

    original = module.relax_box

    def relax_box(problem, plan, limits):
        seen.append(limits.deadline)
        return original(problem, plan, limits)

    monkeypatch.setattr(module, "Swap", Spy)
    monkeypatch.setattr(module, "relax_box", relax_box)
    began = time.monotonic()
    solve(problem, "relax", start="wanda", time_limit=50)
    assert len(seen) >= 2
    assert len(set(seen)) == 1
    assert began + 50 <= seen[0] <= time.monotonic() + 50


def test_the_trace_is_per_row_and_nan_where_nothing_was_relaxed():
    problem = drawn(3, 24)
    at_once = solve(problem, "relax", max_iterations=0).trace
    assert bool(at_once.relaxed_objective.isnan().all())
    assert bool(at_once.relaxed_gap.isnan().all())
    whole = solve(problem, "relax")
    trace = whole.trace
    torch.testing.assert_close(
        trace.relaxed_gap, 1 - whole.lower_bound / trace.relaxed_objective, rtol=0, atol=1e-6
    )
    assert trace.iterations.shape == trace.relax_seconds.shape == trace.swap_seconds.shape == (3,)
    assert float(trace.relax_seconds.sum() + trace.swap_seconds.sum()) <= whole.seconds


@pytest.mark.parametrize("solver", ["relax", FrankWolfe(iterations=500)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_no_claim_on_a_float32_gram_is_above_its_certificate(solver, scale):
    """Low rank in float32: G is semidefinite only up to its rounding; and one weight may dominate."""
    for rows, n in ((3, 48), (1, 48), (1, 400)):
        gram = random_gram(n, "low-rank", 3, torch.float32)
        weight = random_weight(rows, n, 4, torch.float32)
        weight[:, :2] *= scale
        gram[1], gram[:, 1] = gram[0].clone(), gram[:, 0].clone()  # twins of large weight
        gram[1, 1] = gram[0, 0] * (1 - 1e-7)
        for pattern in (Unstructured(0.5), NM(keep=2, of=4)):
            problem = LayerProblem(weight, gram, pattern)
            solution = solve(problem, solver)
            verify(problem, solution)
            proven = solution.certificate.check(problem)
            assert bool((solution.lower_bound <= proven).all())


@pytest.mark.parametrize("solver", ["relax", "frank_wolfe"])
def test_inputs_without_any_weight_cost_no_proof(solver):
    """What pruned heads and dead channels look like."""
    weight = random_weight(4, 256, 1)
    weight[:, [3, 100]] = 0
    problem = LayerProblem(weight, random_gram(256, "low-rank", 2), Unstructured(0.5))
    verify(problem, solve(problem, solver), require="checked")


def test_rows_whose_start_is_better_are_swapped_from_there():
    problem = drawn(6, 32)
    rounded, best = solve(problem, "relax", refine=False), solve(problem, "tabu")
    start = rounded.mask.clone()
    start[[1, 4]] = best.mask[[1, 4]]
    worst = solve(problem, "worst").mask
    mask, status, swaps = module.swapped(problem, worst, start, Limits())
    alone = solve(problem, "swap", start=start)
    from_worst = solve(problem, "swap", start=worst)
    taken = (problem.objective(start) < from_worst.objective).tolist()
    assert taken[1]
    assert taken[4]
    for row, other in enumerate(taken):
        source = alone if other else from_worst
        assert bool((mask[row] == source.mask[row]).all())
        assert (status[row], int(swaps[row])) == (source.status[row], int(source.trace.swaps[row]))


def test_an_indefinite_gram_that_was_never_checked_is_relaxed_all_the_same():
    gram = random_gram(16, "full", 1) - 0.9 * torch.eye(16, dtype=torch.float64)
    assert float(torch.linalg.eigvalsh(gram)[0]) < -0.8
    problem = LayerProblem(random_weight(3, 16, 1), gram, Unstructured(0.5), assume_psd=True)
    solution = solve(problem, "relax")
    assert bool((solution.lower_bound <= solution.certificate.check(problem)).all())


@PATTERNS
def test_semidefinite_mask_and_certificate_in_one(pattern):
    problem = drawn(6, 64, "full", pattern, dtype=SINGLE)
    solution = solve(problem, "sdp")
    verify(problem, solution)
    assert bool((solution.gap < 0.3).all())
    assert bool((solution.lower_bound >= solve(problem, "relax").lower_bound).all())
    rounded = solve(problem, "sdp", refine=False)
    assert set(rounded.status) == {Status.FEASIBLE}
    torch.testing.assert_close(rounded.objective, solution.trace.rounded_objective)
