"""What every search from a start promises: one table of solvers, and what each must hold."""

import pytest
import torch
from forging import fails
from hypothesis import given, settings, strategies as st
from strategies import HALF, ONE_PERCENT, alone, drawn, floor, problems, refit_layer, slow, verified

from maskopt import NM, LayerProblem, LeastSquaresUpdate, Progress, Status, Unstructured, solve
from maskopt.errors import OptionError, WarmStartError
from maskopt.protocol.solver import make_start

KERNELS = {f"swap-{k}": ("swap", {"kernel": k}) for k in ("literal", "torch", "numba")}
MEMETIC = {"generations": 6, "children": 3, "pool": 4, "moves": 40}
OPTIONS = {"tabu": {"moves": 60}, "memetic": MEMETIC, "relax": {}}
OPTIONS |= {"sdp": {"sweeps": 60}, "frank_wolfe": {"iterations": 30}}
SEARCHES = KERNELS | {name: (name, how) for name, how in OPTIONS.items()}
COSTLY = ("memetic", "memetic, updated", "sdp")


def posed(name):
    """The solver of a name, its options, and what it is asked to update."""
    return *SEARCHES[name.split(",")[0]], ONE_PERCENT if name.endswith("updated") else None


@pytest.mark.parametrize("name", [*SEARCHES, "memetic, updated"])
@settings(max_examples=settings.default.max_examples // 2)
@given(data=st.data())
def test_contract(name, data):
    """Legal, verified, between the optimum and the start, repeatable, and each row by itself."""
    solver, options, update = posed(name)
    sizes = {"max_n": 11, "max_rows": 3} if name in COSTLY else {"max_n": 12}
    dtype = data.draw(st.sampled_from((torch.float64, torch.float32)))
    problem = data.draw(problems(**sizes, dtype=dtype))
    if update:
        damping = data.draw(st.sampled_from((0.0, 0.01, 0.3)))
        problem = problem.with_update(LeastSquaresUpdate(damping))
    begun = solve(problem, data.draw(st.sampled_from(["wanda", "random", "worst"])))
    solution = verified(problem, solver, start=begun.mask, **options)
    proves = solver != "frank_wolfe"
    assert not proves or set(solution.status) == {Status.SWAP_OPTIMAL}
    assert bool((solution.objective <= begun.objective + floor(problem)).all())
    best, slack = solve(problem, "exhaustive").objective, floor(problem)
    assert bool((solution.objective >= best - slack).all())
    assert bool((solution.lower_bound <= best + slack).all())
    assert torch.equal(solve(problem, solver, start=begun.mask, **options).mask, solution.mask)
    if solver == "swap":  # which stops where nothing is left to gain
        ended = solve(problem, solver, start=solution.mask, **options)
        assert torch.equal(ended.mask, solution.mask)
        assert int(ended.trace.swaps.sum()) == 0
    for row, off in enumerate(slack.tolist()):
        own = solve(problem.row(row), solver, start=begun.mask[row], **options)
        assert solver != "swap" or torch.equal(own.mask[0], solution.mask[row])
        torch.testing.assert_close(own.objective[0], solution.objective[row], rtol=1e-6, atol=off)


@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)], ids=str)
@pytest.mark.parametrize("name", [*SEARCHES, "memetic, updated"])
def test_permutations_scales_and_rows_by_themselves(name, pattern):
    solver, options, update = posed(name)

    def solved(weight, gram):
        layer = LayerProblem(weight, gram, pattern, update=update)
        return solve(layer, solver, start="wanda", **options)

    kind = "outliers" if isinstance(pattern, NM) else "full"
    for seed in range(3 if name in ("swap-torch", "swap-numba") else 1):
        problem = drawn(4, 24, kind, pattern, (seed + 1, seed + 2), update=update)
        w, gram = problem.weight, problem.gram
        plain = solved(w, gram)
        for factor, by in ((2.0**20, 1), (1, 2.0**-30), (1e-20, 0.25), (3e15, 1e-20)):
            scaled = solved(w * factor, gram * by)
            torch.testing.assert_close(scaled.objective / factor**2 / by, plain.objective)
            if "swap" in name or name == "frank_wolfe":
                assert torch.equal(scaled.mask, plain.mask)
        if isinstance(pattern, Unstructured) and name != "sdp":
            order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
            turned = solved(w[:, order], gram[order][:, order])
            torch.testing.assert_close(turned.objective, plain.objective)
        assert torch.equal(alone(problem, solver, start="wanda", **options), plain.mask)


@pytest.mark.parametrize("name", [*KERNELS, "tabu", "memetic", "memetic, updated"])
def test_without_time_the_start_comes_back(name):
    solver, options, update = posed(name)
    problem = drawn(4, 32, update=update)
    start = solve(problem, "worst").mask
    stopped = verified(problem, solver, start=start, time_limit=0.0, **options)
    assert torch.equal(stopped.mask, start)
    assert set(stopped.status) == {Status.FEASIBLE}
    assert solver == "swap" or set(stopped.trace.stopped) == {"yes"}


@pytest.mark.parametrize("pattern", [HALF, *map(slow, (NM(2, 4), NM(3, 8)))], ids=str)
def test_optimum_of_small_rows(pattern):
    problem = drawn(40, 16, "low-rank", pattern, (3, 4))
    best = solve(problem, "exhaustive").objective
    found = (solve(problem, name, start="wanda").objective for name in ("swap", "tabu"))
    swap, tabu = (int((x <= best * (1 + 1e-6) + 1e-12).sum()) for x in found)
    assert swap < tabu >= 38
    refitted = refit_layer(pattern, rows=12, kind="low-rank", seed=3)
    plans = {"generations": 30, "pool": 8, "moves": 100}, {"generations": 10, "pool": 32}
    for layer, plan in zip((problem.take(slice(12)), refitted), plans, strict=True):
        found = verified(layer, "memetic", start="worst", children=4, **plan)
        best = solve(layer, "exhaustive").objective
        torch.testing.assert_close(found.objective, best, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["relax", "sdp"])
def test_a_relaxation_starts_every_local_search(name):
    problem = drawn(3, 24)
    start = make_start(problem, name)
    if name == "relax":
        assert torch.equal(start.mask, solve(problem, "relax", max_iterations=0, refine=False).mask)
        assert bool((start.lower_bound == 0).all())
        assert torch.equal(solve(problem, "tabu").mask, solve(problem, "tabu", start=name).mask)
    for solver in ("swap", "tabu"):
        solution = solve(problem, solver, start=name)
        assert bool((solution.objective <= start.objective + floor(problem)).all())
        assert torch.equal(solution.mask, solve(problem, solver, start=start.mask).mask)


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.6), NM(2, 4)], ids=str)
@pytest.mark.parametrize("name", [*KERNELS, "tabu", "relax"])
def test_neither_threads_nor_memory_change_a_bit(name, pattern, monkeypatch):
    solver, options = SEARCHES[name]
    rows, n = (40, 64) if name in ("swap-numba", "tabu") else (7, 40)
    problem = drawn(rows, n, "low-rank", pattern, (3, 4), torch.float32)
    plain = solve(problem, solver, start="wanda", **options)
    monkeypatch.setattr("maskopt.solvers.search.tabu._TILE", 2)
    for threads, memory in ((3, None), (1, 1), (3, 10_000)):
        limits = {"threads": threads, "memory_limit": memory}
        other = solve(problem, solver, start="wanda", **limits, **options)
        assert torch.equal(other.mask, plain.mask)
        assert solver != "swap" or torch.equal(other.trace.swaps, plain.trace.swaps)


@pytest.mark.parametrize("name", KERNELS)
def test_the_trace_says_what_was_done(name):
    solver, options = SEARCHES[name]
    problem = drawn(4, 40, "low-rank", seeds=(6, 1))
    solution = solve(problem, solver, start="wanda", **options)
    trace = solution.trace
    begun = solve(problem, "wanda").objective
    torch.testing.assert_close(trace.history[:, -1], solution.objective, rtol=1e-9, atol=0)
    assert bool((trace.history.diff(dim=1) <= 1e-12 * trace.history[:, :1]).all())
    assert int(trace.swaps.sum()) > 0
    torch.testing.assert_close(trace.history[:, 0], begun, rtol=1e-9, atol=0)
    assert (trace.kernel, int(trace.scans.min()) >= 1) == (options["kernel"], True)


BAD_OPTIONS = [
    ("swap", {"kernel": "fast", "max_swaps": -1, "time_limit": float("nan"), "memory_limit": 0}),
    ("tabu", {"moves": -1, "tenure": 0, "patience": -1, "time_limit": -1.0}),
    ("memetic", {"generations": -1, "children": 0, "pool": 1, "moves": 0}), ("sparsegpt", {"damping": 0.0}),
    ("relax", {"hardness": 1.0, "harden": -1, "tolerance": -1.0, "max_iterations": -1, "time_limit": -1.0}),
    ("frank_wolfe", {"alpha": 1.5, "iterations": -1}), ("ria", {"a": -1.0}), ("dsnot", {"cycles": -1}),
]  # fmt: skip
BAD_CALLS = [
    (name, {option: value}, OptionError, option if "limit" in option else f"{name}.*{option}")
    for name, options in BAD_OPTIONS
    for option, value in options.items()
]
BAD_CALLS += [
    ("swap", {"start": torch.zeros(2, 8) > 0}, WarmStartError, "row 0 prunes 8 of 8"),
    ("swap", {"start": torch.ones(2, 7) > 0}, WarmStartError, "shape"),
    ("relax", {"max_iterations": 0, "harden": 0}, OptionError, "relax"),
    ("random", {"sed": 1}, OptionError, "no option 'sed'; did you mean 'seed'"),
]


@pytest.mark.parametrize(("solver", "options", "error", "message"), BAD_CALLS)
def test_what_is_bad_is_named(solver, options, error, message):
    problem = LayerProblem(torch.ones(2, 8), torch.eye(8), NM(2, 4), moments=torch.ones(8))
    fails(error, message, solve, problem, solver, **options)


def test_progress_is_reported():
    steps = [Progress(0, 4, "Frank–Wolfe steps", done, 100) for done in (50, 100)]
    for solver, options, expected in (
        ("swap", {}, [Progress(4, 4)]),
        ("frank_wolfe", {"iterations": 100}, steps),
    ):
        seen = []
        solve(drawn(4, 24, pattern=NM(2, 4)), solver, on_progress=seen.append, **options)
        assert seen[-len(expected) :] == expected
