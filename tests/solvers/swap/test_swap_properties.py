"""What 1-swap search promises beyond the contract of every search, with every kernel."""

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from local_search import drawn
from strategies import HALF, random_gram, random_weight

from maskopt import NM, LayerProblem, Status, Unstructured, solve, verify
from maskopt.solvers.swap.batch import Batch
from maskopt.solvers.swap.engine import refine
from maskopt.solvers.swap.numba_kernel import NumbaKernel

NAMES = ("literal", "torch", "numba")
SINGLE = torch.float32
SIXTY = Unstructured(sparsity=0.6)


def scaled(weight_scale, gram_scale, dtype=SINGLE, kind="outliers", pattern=HALF):
    weight = (random_weight(3, 24, 7) * weight_scale).to(dtype)
    return LayerProblem(weight, (random_gram(24, kind, 8) * gram_scale).float(), pattern)


def outliers_of_a_million_times_the_median():
    size = torch.ones(48, dtype=torch.float64)
    size[::7] = 1e6
    gram = (size[:, None] * random_gram(48, "full", 4) * size).float()
    return LayerProblem(random_weight(4, 48, 7, SINGLE), gram, SIXTY)


def one_direction():
    """f is far below the mass of a row: float32 cannot see the pair that improves it."""
    rng = np.random.default_rng(130)
    n = int(rng.choice([500, 1000, 2000]))
    weight = rng.normal(size=(8, n)).astype(np.float32)
    return LayerProblem(weight, np.ones((n, n), np.float32), HALF)


LAYERS = {
    **{
        f"scales {w}, {g}": partial(scaled, w, g)
        for w in (1e-44, 1e-30, 1.0, 1e30)
        for g in (1e-30, 1.0, 1e30)
    },
    **{
        str(dtype): partial(scaled, 1, 1, dtype, "full", NM(2, 4))
        for dtype in (torch.bfloat16, torch.float16)
    },
    **{  # fewer entries than candidates
        f"keep {k}": partial(drawn, 5, 40, "zero-columns", Unstructured(keep=k), (5, 4), SINGLE)
        for k in (0, 1, 2, 39, 40)
    },
    **{
        f"groups of {of}": partial(drawn, 3, 160, "low-rank", NM(of // 2, of), (7, 4), SINGLE)
        for of in (2, 4, 8, 20, 80)
    },
    "outliers": outliers_of_a_million_times_the_median,
    "one direction": one_direction,
}


#: a float32 G beyond float32's range has loops of its own, which take long to compile
SLOW = [(layer, "numba") for layer in LAYERS if layer.endswith("1e+30")]
SLOW += [("one direction", "literal")]


@pytest.mark.parametrize(
    ("layer", "kernel"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case in SLOW else ())
        for case in product(LAYERS, NAMES)
    ],
)
def test_every_row_of_any_layer_is_proven(layer, kernel):
    problem = LAYERS[layer]()
    # where a search once went on for ever
    wide = problem.n > 400
    for start in ("wanda", "random", "worst")[: 1 if wide else 3]:
        limit = 300 if wide else None
        solution = solve(problem, "swap", start=start, kernel=kernel, time_limit=limit)
        verify(problem, solution)
        assert set(solution.status) == {Status.SWAP_OPTIMAL}


@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)], ids=str)
def test_stopped_by_max_swaps_goes_on_from_there(kernel, pattern):
    problem = drawn(4, 32, pattern=pattern)
    options = {"start": "worst", "kernel": kernel}
    assert int(solve(problem, "swap", **options).trace.swaps.min()) > 2
    nothing = solve(problem, "swap", max_swaps=0, **options)
    assert torch.equal(nothing.mask, solve(problem, "worst").mask)
    assert set(nothing.status) == {Status.FEASIBLE}
    two = solve(problem, "swap", max_swaps=2, **options)
    assert int(two.trace.swaps.max()) == 2
    verify(problem, two)
    assert bool((two.objective <= nothing.objective).all())
    rest = solve(problem, "swap", start=two.mask, kernel=kernel)
    assert set(rest.status) == {Status.SWAP_OPTIMAL}
    verify(problem, rest)


def test_what_memory_held_before_changes_nothing_and_kernels_end_near_each_other():
    """Workspaces are not cleared: whatever a row reads of them it must have written."""
    problem = drawn(40, 64, "low-rank", SIXTY, (3, 4), SINGLE)
    masks = []
    for dirt in (0.0, -1e38, float("nan")):
        for width in range(8, 200, 4):  # freed at once: workspaces are made of these
            arrays = [np.full((width, width), dirt, np.float32) for _ in range(4)]
            del arrays
        masks.append(solve(problem, "swap", kernel="numba").mask)
        assert torch.equal(masks[0], masks[-1])
    problem = drawn(8, 160, "low-rank", SIXTY, (11, 12), SINGLE)
    most = 1.1 * float(solve(problem, "swap", kernel="literal").objective.sum())
    for kernel in ("numba", "torch"):
        other = solve(problem, "swap", kernel=kernel)
        verify(problem, other)
        assert float(other.objective.sum()) < most


def test_running_out_of_memory_halves_the_tile_and_goes_on(monkeypatch, caplog):
    problem = drawn(8, 24, pattern=NM(2, 4), seeds=(3, 4))
    plain = solve(problem, "swap")
    whole = Batch.of.__func__

    def small_only(cls, layer, kept):
        if layer.rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(cls, layer, kept)

    monkeypatch.setattr(Batch, "of", classmethod(small_only))
    halved = solve(problem, "swap")
    assert torch.equal(halved.mask, plain.mask)
    assert halved.trace.swaps.tolist() == plain.trace.swaps.tolist()
    said = "swap: out of memory on the device; going on with 4 rows"
    assert [outcome.message for outcome in caplog.records] == [said]


class Undecided(NumbaKernel):
    """Its scan and its search disagree by rounding."""

    def price(self, batch, rows):
        return super().price(batch, rows) | (rows == 1)


def test_a_pair_that_the_search_does_not_make_ends_without_a_proof():
    """It would go on for ever; and a finished tile lets its arrays go."""
    problem = drawn(3, 16)
    batch = Batch.of(problem, solve(problem, "wanda").mask)
    assert refine(batch, Undecided(batch, 1)).proven.tolist() == [True, False, True]
    rest = batch.result()
    for tensor in (rest.x, rest.c, rest.cross, rest.partner):
        assert tensor.untyped_storage().nbytes() == 0
    assert torch.equal(rest.kept, batch.kept)
