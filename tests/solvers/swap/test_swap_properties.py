"""What 1-swap search promises beyond the contract of every search, with every kernel."""

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from strategies import HALF, ONE_PERCENT, TWO_FOUR, drawn, floor, slow, swap_optimal, verified

from maskopt import NM, LayerProblem, LeastSquaresUpdate, Status, Unstructured, solve
from maskopt.solvers.swap.engine import Batch, refine
from maskopt.solvers.swap.numba_kernel import NumbaKernel

#: one search of updated weights has no kernels
NAMES = ("literal", "torch", "numba", "updated")
UPDATES = {"updated": ONE_PERCENT, "undamped": LeastSquaresUpdate(0.0)}
UPDATES["by the root"] = LeastSquaresUpdate(0.1, power=0.5)
SINGLE = torch.float32
SIXTY = Unstructured(sparsity=0.6)


def scaled(weight_scale, gram_scale, dtype=SINGLE, kind="outliers", pattern=HALF):
    plain = drawn(3, 24, kind, pattern, (7, 8))
    weight, gram = (plain.weight * weight_scale).to(dtype), (plain.gram * gram_scale).float()
    return LayerProblem(weight, gram, pattern)


def outliers_of_a_million_times_the_median():
    plain, size = drawn(4, 48, seeds=(7, 4)), torch.ones(48, dtype=torch.float64)
    size[::7] = 1e6
    return LayerProblem(plain.weight.float(), (size[:, None] * plain.gram * size).float(), SIXTY)


def one_direction():
    """f is far below the mass of a row: float32 cannot see the pair that improves it."""
    rng = np.random.default_rng(130)
    n = int(rng.choice([500, 1000, 2000]))
    weight = rng.normal(size=(8, n)).astype(np.float32)
    return LayerProblem(weight, np.ones((n, n), np.float32), HALF)


SCALES = product((1e-44, 1e-30, 1.0, 1e30), (1e-30, 1.0, 1e30))
LAYERS = {f"scales {w}, {g}": partial(scaled, w, g) for w, g in SCALES}
HALVES = (torch.bfloat16, torch.float16)
LAYERS |= {str(dtype): partial(scaled, 1, 1, dtype, "full", TWO_FOUR) for dtype in HALVES}
LAYERS |= {  # fewer entries than candidates
    f"keep {k}": partial(drawn, 5, 40, "zero-columns", Unstructured(keep=k), (5, 4), SINGLE)
    for k in (0, 1, 2, 37, 38, 39, 40)
}
LAYERS |= {
    f"groups of {of}": partial(drawn, 3, 160, "low-rank", NM(of // 2, of), (7, 4), SINGLE)
    for of in (2, 4, 8, 20, 80)
}
LAYERS["outliers"] = outliers_of_a_million_times_the_median
LAYERS["one direction"] = one_direction
#: a float32 G beyond float32's range has loops of its own, which take long to compile
SLOW = [(layer, "numba") for layer in LAYERS if layer.endswith("1e+30")]
SLOW += [("one direction", "literal")]


def posed(problem, kernel):
    """The problem of a kernel, or of updated weights, and how it is chosen."""
    update = UPDATES.get(kernel)
    return problem.with_update(update), {"kernel": "auto" if update else kernel}


@pytest.mark.parametrize(
    ("layer", "kernel"),
    [
        slow(*case) if case in SLOW else case
        for case in (*product(LAYERS, NAMES), *product(["outliers"], ["undamped", "by the root"]))
        if case != ("one direction", "updated")  # of which test_refit_objective has its own
    ],
)
def test_every_row_of_any_layer_is_proven(layer, kernel):
    problem, how = posed(LAYERS[layer](), kernel)
    # where a search once went on for ever
    wide = problem.n > 400
    for start in ("wanda", "random", "worst")[: 1 if wide else 3]:
        solution = swap_optimal(problem, start=start, time_limit=300 if wide else None, **how)
        nothing = problem.pruned_per_group in (0, problem.n)
        assert (int(solution.trace.scans.sum()) == 0) == nothing or kernel not in UPDATES


@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=str)
def test_stopped_by_max_swaps_goes_on_from_there(kernel, pattern):
    problem, how = posed(drawn(4, 32, pattern=pattern), kernel)
    start = solve(problem, "worst")
    whole = solve(problem, "swap", start="worst", **how)
    off = floor(problem) if kernel == "updated" else 0.0
    least = start.objective + floor(problem)
    assert int(whole.trace.swaps.min()) > 2
    for most in (0, 1, 2, 5, 1000):
        stopped = verified(problem, "swap", start="worst", max_swaps=most, **how)
        assert torch.equal(stopped.trace.swaps, whole.trace.swaps.clamp(max=most))
        assert bool((stopped.objective <= least).all())
        least = stopped.objective + off
        if most < int(whole.trace.swaps.min()):
            assert set(stopped.status) == {Status.FEASIBLE}
        assert bool(((stopped.mask & ~start.mask).sum(1) <= stopped.trace.swaps).all())
        assert most > 0 or torch.equal(stopped.mask, start.mask)
        swap_optimal(problem, start=stopped.mask, **how)
    assert set(stopped.status) == {Status.SWAP_OPTIMAL}
    mask = start.mask.clone()
    mask[0] = whole.mask[0]
    stopped = solve(problem, "swap", start=mask, max_swaps=0, **how)
    assert torch.equal(stopped.mask, mask)
    known = Status.SWAP_OPTIMAL if kernel == "updated" else Status.FEASIBLE
    assert stopped.status == (known,) + (Status.FEASIBLE,) * 3


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
        assert float(verified(problem, "swap", kernel=kernel).objective.sum()) < most


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
    assert torch.equal(halved.trace.swaps, plain.trace.swaps)
    assert caplog.messages == ["swap: out of memory on the device; going on with 4 rows"]


class Undecided(NumbaKernel):
    """Its scan and its search disagree by rounding."""

    def price(self, batch, rows):
        return super().price(batch, rows) | (rows == 1)


def test_a_pair_that_the_search_does_not_make_ends_without_a_proof():
    problem = drawn(3, 16)
    batch = Batch.of(problem, solve(problem, "wanda").mask)
    refine(batch, Undecided(batch, 1))
    assert batch.proven.tolist() == [True, False, True]
