"""What 1-swap search promises, for every kernel that runs here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import problems, random_gram, random_weight

from maskopt import (
    NM,
    LayerProblem,
    Progress,
    Solution,
    Status,
    Unstructured,
    improving_swap,
    solve,
    verify,
)
from maskopt.errors import OptionError, WarmStartError
from maskopt.solvers.swap.batch import Batch
from maskopt.solvers.swap.engine import refine
from maskopt.solvers.swap.numba_kernel import NumbaKernel
from maskopt.solvers.swap.triton import unavailable as triton_unavailable

KERNELS = ("literal", "torch", "numba")
DTYPES = (torch.float32, torch.float64)


def start_of(problem: LayerProblem, start: str) -> torch.Tensor:
    return solve(problem, start).mask


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=20)
@given(data=st.data())
def test_ends_at_a_one_swap_optimum(kernel: str, dtype: torch.dtype, data: st.DataObject) -> None:
    problem = data.draw(problems(dtype=dtype))
    start = start_of(problem, data.draw(st.sampled_from(["wanda", "random", "worst"])))
    solution = solve(problem, "swap", warm_start=start, kernel=kernel)
    verify(problem, solution)
    assert solution.status == (Status.SWAP_OPTIMAL,) * problem.rows
    slack = 1e-12 * problem.diagonal_mass()
    assert bool((solution.objective <= problem.objective(start) + slack).all())
    for i in range(problem.rows):
        assert improving_swap(problem.row(i), solution.mask[i]) is None
    again = solve(problem, "swap", warm_start=solution.mask, kernel=kernel)
    assert torch.equal(again.mask, solution.mask)
    assert int(again.trace.swaps.sum()) == 0


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=20)
@given(problem=problems(max_rows=4))
def test_row_by_row_equals_batched(kernel: str, problem: LayerProblem) -> None:
    batched = solve(problem, "swap", kernel=kernel)
    for i in range(problem.rows):
        alone = solve(problem.row(i), "swap", kernel=kernel)
        assert torch.equal(alone.mask[0], batched.mask[i])


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    power=st.integers(-20, 20),
    pattern=st.sampled_from([Unstructured(sparsity=0.5), NM(2, 4)]),
)
def test_scales_change_nothing(kernel: str, seed: int, power: int, pattern: Unstructured) -> None:
    n = 16
    weight, gram = random_weight(3, n, seed), random_gram(n, "full", seed)
    plain = solve(LayerProblem(weight, gram, pattern), "swap", kernel=kernel)
    factor = 2.0**power
    for w, g in ((weight * factor, gram), (weight, gram * factor)):
        scaled = solve(LayerProblem(w, g, pattern), "swap", kernel=kernel)
        assert torch.equal(scaled.mask, plain.mask)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_equivariant_under_permutations(kernel: str, seed: int) -> None:
    n, pattern = 16, Unstructured(sparsity=0.5)
    weight = torch.randn(3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = random_gram(n, "full", seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    plain = solve(LayerProblem(weight, gram, pattern), "swap", kernel=kernel)
    moved = LayerProblem(weight[:, order], gram[order][:, order], pattern)
    assert torch.equal(solve(moved, "swap", kernel=kernel).mask, plain.mask[:, order])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.5), NM(2, 4)], ids=str)
def test_stopped_by_max_swaps_goes_on_from_there(kernel: str, pattern: Unstructured) -> None:
    problem = LayerProblem(random_weight(4, 32, 1), random_gram(32, "full", 2), pattern)
    full = solve(problem, "swap", warm_start="worst", kernel=kernel)
    assert int(full.trace.swaps.min()) > 2 or problem.weight[0].eq(0).all()
    nothing = solve(problem, "swap", warm_start="worst", kernel=kernel, max_swaps=0)
    assert torch.equal(nothing.mask, start_of(problem, "worst"))
    assert set(nothing.status) == {Status.FEASIBLE}
    two = solve(problem, "swap", warm_start="worst", kernel=kernel, max_swaps=2)
    assert int(two.trace.swaps.max()) == 2
    verify(problem, two)
    assert bool((two.objective <= nothing.objective).all())
    rest: Solution = solve(problem, "swap", warm_start=two.mask, kernel=kernel)
    assert set(rest.status) == {Status.SWAP_OPTIMAL}
    verify(problem, rest)


@pytest.mark.parametrize("kernel", KERNELS)
def test_time_limit_leaves_a_feasible_mask(kernel: str) -> None:
    problem = LayerProblem(
        random_weight(4, 32, 1), random_gram(32, "full", 2), Unstructured(sparsity=0.5)
    )
    solution = solve(problem, "swap", warm_start="worst", kernel=kernel, time_limit=0.0)
    assert set(solution.status) == {Status.FEASIBLE}
    verify(problem, solution)


def test_a_finished_tile_lets_its_arrays_go() -> None:
    problem = LayerProblem(random_weight(6, 20, 3), random_gram(20, "full", 4), NM(2, 4))
    batch = Batch.of(problem, solve(problem, "wanda").mask)
    rest = batch.result()
    for tensor in (rest.x, rest.c, rest.cross, rest.partner):
        assert tensor.untyped_storage().nbytes() == 0
    assert torch.equal(rest.kept, batch.kept)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("memory_limit", [1, 10_000, 2**30])
def test_tiles_change_nothing(kernel: str, memory_limit: int) -> None:
    for pattern in (Unstructured(sparsity=0.6), NM(2, 4)):
        problem = LayerProblem(
            random_weight(7, 40, 3, torch.float32), random_gram(40, "full", 4).float(), pattern
        )
        tiled = solve(problem, "swap", kernel=kernel, memory_limit=memory_limit)
        assert torch.equal(tiled.mask, solve(problem, "swap", kernel=kernel).mask)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weight_scale", [1e-44, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("gram_scale", [1e-30, 1.0, 1e30])
def test_extreme_scales(kernel: str, weight_scale: float, gram_scale: float) -> None:
    weight = (random_weight(3, 24, 7) * weight_scale).float()
    gram = (random_gram(24, "outliers", 8) * gram_scale).float()
    problem = LayerProblem(weight, gram, Unstructured(sparsity=0.5))
    solution = solve(problem, "swap", kernel=kernel)
    verify(problem, solution)
    assert set(solution.status) == {Status.SWAP_OPTIMAL}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(kernel: str, dtype: torch.dtype) -> None:
    weight = random_weight(3, 24, 7).to(dtype)
    problem = LayerProblem(weight, random_gram(24, "full", 8).float(), NM(2, 4))
    solution = solve(problem, "swap", kernel=kernel)
    verify(problem, solution)
    assert set(solution.status) == {Status.SWAP_OPTIMAL}


def test_bad_input_has_a_clear_error() -> None:
    problem = LayerProblem(random_weight(2, 8, 1), random_gram(8, "full", 1), NM(2, 4))
    with pytest.raises(WarmStartError, match="row 0 prunes 8 of 8"):
        solve(problem, "swap", warm_start=torch.zeros(2, 8, dtype=torch.bool))
    with pytest.raises(WarmStartError, match="shape"):
        solve(problem, "swap", warm_start=torch.ones(2, 7, dtype=torch.bool))
    for option, value in {
        "kernel": "fast",
        "max_swaps": -1,
        "time_limit": float("nan"),
        "memory_limit": 0,
    }.items():
        with pytest.raises(OptionError, match=option):
            solve(problem, "swap", **{option: value})


def test_progress_is_reported() -> None:
    seen: list[Progress] = []
    problem = LayerProblem(random_weight(5, 16, 1), random_gram(16, "full", 1), NM(2, 4))
    solve(problem, "swap", on_progress=seen.append)
    assert seen[-1] == Progress(5, 5)


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.5), NM(2, 4)], ids=str)
def test_the_triton_kernel_serves_the_engine(pattern: Unstructured) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    problem = LayerProblem(
        random_weight(3, 24, 3, torch.float32), random_gram(24, "full", 4).float(), pattern
    )
    if triton_unavailable(problem.device):
        pytest.skip("neither CUDA nor Triton's interpreter")
    solution = solve(problem, "swap", kernel="triton")
    verify(problem, solution)
    assert solution.trace.kernel == "triton"
    assert set(solution.status) == {Status.SWAP_OPTIMAL}


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_trace_tells_what_was_done(kernel: str) -> None:
    problem = LayerProblem(
        random_weight(3, 24, 3), random_gram(24, "low-rank", 4), Unstructured(sparsity=0.5)
    )
    solution = solve(problem, "swap", warm_start="random", kernel=kernel)
    trace = solution.trace
    assert trace.kernel == kernel
    assert int(trace.scans.min()) >= 1
    history = trace.history
    assert history.shape[0] == problem.rows
    assert bool((history[:, 1:] <= history[:, :-1] * (1 + 1e-12)).all())
    assert torch.allclose(history[:, -1], solution.objective, rtol=1e-9)
    start = problem.objective(solve(problem, "random").mask)
    assert torch.allclose(history[:, 0], start, rtol=1e-9)


def test_what_memory_held_before_changes_nothing() -> None:
    """Workspaces are not cleared: whatever a row reads of them it must have written."""
    problem = LayerProblem(
        random_weight(40, 64, 3, torch.float32),
        random_gram(64, "low-rank", 4).float(),
        Unstructured(sparsity=0.6),
    )
    masks = []
    for dirt in (0.0, -1e38, float("nan")):
        for width in range(8, 200, 4):  # freed at once: workspaces are made of these
            arrays = [np.full((width, width), dirt, np.float32) for _ in range(4)]
            del arrays
        masks.append(solve(problem, "swap", kernel="numba").mask)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_thread_counts_change_nothing() -> None:
    problem = LayerProblem(
        random_weight(40, 64, 3, torch.float32),
        random_gram(64, "low-rank", 4).float(),
        Unstructured(sparsity=0.6),
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = solve(problem, "swap", kernel="numba")
        torch.set_num_threads(3)
        three = solve(problem, "swap", kernel="numba")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.mask, three.mask)
    assert torch.equal(one.trace.swaps, three.trace.swaps)


@pytest.mark.parametrize("kernel", ["numba", "torch"])
def test_kernels_end_near_each_other_on_a_layer(kernel: str) -> None:
    """Different proposals, hence different optima; the same quality and the same promise."""
    problem = LayerProblem(
        random_weight(8, 160, 11, torch.float32),
        random_gram(160, "low-rank", 12).float(),
        Unstructured(sparsity=0.6),
    )
    literal = solve(problem, "swap", kernel="literal")
    other = solve(problem, "swap", kernel=kernel)
    verify(problem, other)
    assert float(other.objective.sum()) < 1.1 * float(literal.objective.sum())


def test_running_out_of_memory_halves_the_tile_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    problem = LayerProblem(random_weight(8, 24, 3), random_gram(24, "full", 4), NM(2, 4))
    plain = solve(problem, "swap")
    whole = Batch.of.__func__

    def small_only(cls: type[Batch], layer: LayerProblem, kept: torch.Tensor) -> Batch:
        if layer.rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(cls, layer, kept)

    monkeypatch.setattr(Batch, "of", classmethod(small_only))
    halved = solve(problem, "swap")
    assert torch.equal(halved.mask, plain.mask)
    assert halved.trace.swaps.tolist() == plain.trace.swaps.tolist()
    assert [outcome.message for outcome in caplog.records] == [
        "swap: out of memory on the device; going on with 4 rows"
    ]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("keep", [0, 1, 2, 39, 40])
def test_fewer_entries_than_candidates(kernel: str, keep: int) -> None:
    gram = random_gram(40, "zero-columns", 4).float()
    weight = random_weight(5, 40, 5, torch.float32)
    problem = LayerProblem(weight, gram, Unstructured(keep=keep))
    solution = solve(problem, "swap", warm_start="random", kernel=kernel)
    verify(problem, solution)
    assert set(solution.status) == {Status.SWAP_OPTIMAL}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("of", [2, 4, 8, 20, 80])
def test_all_group_sizes(kernel: str, of: int) -> None:
    gram = random_gram(160, "low-rank", 4).float()
    problem = LayerProblem(random_weight(3, 160, 7, torch.float32), gram, NM(of // 2, of))
    solution = solve(problem, "swap", warm_start="random", kernel=kernel)
    verify(problem, solution)
    assert set(solution.status) == {Status.SWAP_OPTIMAL}


@pytest.mark.parametrize("kernel", KERNELS)
def test_outliers_of_a_million_times_the_median(kernel: str) -> None:
    gram = random_gram(48, "full", 4)
    size = torch.ones(48, dtype=torch.float64)
    size[::7] = 1e6
    gram = (size[:, None] * gram * size).float()
    problem = LayerProblem(random_weight(4, 48, 7, torch.float32), gram, Unstructured(sparsity=0.6))
    for start in ("wanda", "worst"):
        solution = solve(problem, "swap", warm_start=start, kernel=kernel)
        verify(problem, solution)
        assert set(solution.status) == {Status.SWAP_OPTIMAL}


def one_direction() -> LayerProblem:
    """f is far below the mass of a row: float32 cannot tell the pair that improves it."""
    rng = np.random.default_rng(130)
    n = int(rng.choice([500, 1000, 2000]))
    weight = rng.normal(size=(8, n)).astype(np.float32)
    return LayerProblem(weight, np.ones((n, n), np.float32), Unstructured(0.5))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gram_matrix_of_one_direction_is_proven(kernel: str) -> None:
    problem = one_direction()
    solution = solve(problem, "swap", kernel=kernel, time_limit=300)
    verify(problem, solution)
    assert solution.status == (Status.SWAP_OPTIMAL,) * problem.rows


def test_a_pair_that_the_search_does_not_make_ends_without_a_proof() -> None:
    """A kernel whose scan and whose search disagree by rounding would go on for ever."""

    class Undecided(NumbaKernel):
        def price(self, batch: Batch, rows: torch.Tensor) -> torch.Tensor:
            return super().price(batch, rows) | (rows == 1)

    problem = LayerProblem(random_weight(3, 16, 1), random_gram(16, "full", 2), Unstructured(0.5))
    batch = Batch.of(problem, start_of(problem, "wanda"))
    outcome = refine(batch, Undecided(batch, 1))
    assert outcome.proven.tolist() == [True, False, True]
