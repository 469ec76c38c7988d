"""F, the objective of refitted weights: against its definition, in every kind of problem; how it is kept on
disk, and who refuses it."""

import itertools

import numpy as np
import pytest
import refit_layers
import torch
from hypothesis import given
from hypothesis import strategies as st
from refit_layers import PATTERNS, REFITS, changed, dense, layer, metric, random_mask, shuffled
from strategies import HALF, KINDS, problems, random_weight

from maskopt import (
    NM,
    LayerProblem,
    LeastSquaresUpdate,
    RowProblem,
    Unstructured,
    errors,
    solve,
    update_weights,
    verify,
)
from maskopt.certificates.certificate import Certificate
from maskopt.checks.swap_check import improving_swap
from maskopt.core.files import read_arrays, write_arrays
from maskopt.core.least_squares import LeastSquares
from maskopt.core.limits import Limits
from maskopt.errors import OptionError, ProblemError, SolverError, VerificationError
from maskopt.experiments.compare import compare
from maskopt.instances.formats import load_problem
from maskopt.protocol.bounds import available_bounds, lower_bound
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import available_solvers, make_start

ROOT, ALL, F32, F64 = REFITS[3], Unstructured(keep=16), torch.float32, torch.float64
CASES = [*itertools.product(KINDS, PATTERNS), ("full", Unstructured(keep=0)), ("full", ALL)]
KEEPING = [name for name, info in available_solvers().items() if not info.capabilities.update]
BOUNDS = sorted({*available_bounds()} - {"perspective"})
LINEAR = pytest.mark.parametrize(**refit_layers.LINEAR)
close, same = torch.testing.assert_close, refit_layers.assert_equal_but_for_rounding


def in_one_line(error):
    text = str(error.value)
    return len(text) < 250 and "\n" not in text


# --- what it is
@given(problems(), st.sampled_from(REFITS))
def test_it_is_the_least_over_all_weights_on_what_is_kept(problem, how):
    kept, problem = problem, problem.with_update(how)
    mask, a = random_mask(problem), metric(problem)
    value, _ = dense(problem, mask)
    same(problem, problem.objective(mask), value.clamp(min=0.0))
    best = problem.weights(mask)
    assert best.dtype == torch.float64
    assert bool((best[~mask] == 0).all())
    for size in (1e-3, 1.0):
        other = best + size * torch.where(mask, torch.randn_like(best), 0.0)
        least = value - refit_layers.rounding(problem)
        assert bool((problem.cost(other) >= least).all())
    # and so at most f in the same metric
    f = kept.objective(mask) + (problem.weight * ~mask).square() @ (a - problem.gram).diagonal()
    assert bool((problem.objective(mask) <= f * (1 + 1e-12)).all())
    # no row gets worse without the damping, and none better than by least squares
    found, (least, _) = update_weights(problem, mask), dense(problem, mask, problem.gram)
    assert bool((found.error <= kept.objective(mask)).all())
    assert bool((found.error >= least - refit_layers.slack(problem)).all())
    assert bool((found.weight[~mask] == 0).all())
    assert torch.equal(kept.error(problem.weight * mask), kept.objective(mask))


@pytest.mark.parametrize("how", REFITS, ids=repr)
@pytest.mark.parametrize(("kind", "pattern"), CASES, ids=str)
def test_the_weights_solve_the_normal_equations_and_cost_what_is_said(kind, how, pattern):
    linear = (KINDS.index(kind) + REFITS.index(how)) % 2 == 0
    problem = layer(pattern, kind=kind, how=how, linear=linear)
    squares, mask, a = problem.least_squares, random_mask(problem), metric(problem)
    close(squares.damped, a)
    weight = problem.weights(mask)
    assert torch.equal(problem.cost(weight), problem.objective(mask))
    target = problem.weight @ a + (problem.linear.correlation if linear else 0.0)

    def rest(weight):
        off = torch.where(mask, target - weight @ a, 0.0)
        return off.norm(dim=1) / torch.where(mask, target, 0.0).norm(dim=1).clamp(min=1e-300)

    assert float(rest(weight).max()) <= 1e-9
    # refitted whatever the mask was chosen for
    found = update_weights(problem.with_update(None), mask, **vars(how))
    for other in (found, update_weights(problem, mask)):
        close(other.weight, weight, rtol=1e-9, atol=1e-12)
    if kind == "full":
        close(weight, dense(problem, mask)[1], rtol=1e-7, atol=1e-9)
    price = found.error + (problem.weight - weight).square() @ squares.ridge
    atol = 0 if pattern != ALL else refit_layers.rounding(problem)
    close(problem.objective(mask), price, rtol=1e-9, atol=atol)
    assert float(found.residual.max()) < 1e-10
    close(squares.residual(problem.weight * mask, target, mask), rest(problem.weight * mask))


@LINEAR
@pytest.mark.parametrize("how", REFITS, ids=repr)
def test_other_orders_scales_and_batches_give_the_same_and_float32_does(how, linear):
    problem = layer(linear=linear, how=how)
    mask, order = random_mask(problem), shuffled(problem)
    whole, weights = problem.objective(mask), problem.weights(mask)
    moved = changed(problem, 8, 4, order)
    close(moved.objective(mask[:, order]), whole * 256, rtol=1e-9, atol=0)
    found = update_weights(moved, mask[:, order])
    close(found.weight, weights[:, order] * 8, rtol=1e-9, atol=1e-11)
    close(found.error, update_weights(problem, mask).error * 256, rtol=1e-9, atol=1e-14)
    for i in range(problem.rows):
        assert problem.row(i).objective(mask[i]) == pytest.approx(float(whole[i]), rel=1e-12)
        alone = problem.row(i).weights(mask[i])
        close(alone, weights[i], rtol=1e-9, atol=1e-12)
        assert torch.equal(update_weights(problem.row(i), mask[i]).weight[0], alone)
    for kind in () if linear else KINDS:
        narrow = layer(n=64, kind=kind, how=how, dtype=torch.float32)
        exact, found = refit_layers.wide(narrow), solve(narrow, "random")
        verify(narrow, found)
        same(exact, narrow.objective(found.mask), exact.objective(found.mask))
        one, other = update_weights(narrow, found.mask), update_weights(exact, found.mask)
        if how.damping:
            close(one.error, other.error, rtol=1e-6, atol=1e-12)
        assert float(one.residual.max()) < 1e-7


# --- hard inputs
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_inputs_without_anything_make_every_mask_as_good_as_any(pattern):
    gram = torch.zeros(16, 16, dtype=torch.float64)
    problem = LayerProblem(random_weight(3, 16, 1), gram, pattern, update=LeastSquaresUpdate(0.01))
    for solver in ("worst", "swap", "exhaustive" if isinstance(pattern, NM) else "admm"):
        solution = solve(problem, solver)
        assert solution.objective.tolist() == [0.0, 0.0, 0.0]
        verify(problem, solution)
        for row in range(3):
            assert improving_swap(problem.row(row), solution.mask[row]) is None
    assert not solve(problem, "swap", start="worst").trace.history.any()
    assert bool(torch.isfinite(problem.weights(solution.mask)).all())
    assert update_weights(problem, solution.mask).error.tolist() == [0.0, 0.0, 0.0]


def test_a_row_that_float32_cannot_solve_does_not_spoil_the_others(monkeypatch):
    """Two large inputs that are the same up to the damping, which float32 does not see."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 160, generator=generator)
    x[:, 1] = x[:, 0]
    x[:, :2] *= 1e3
    mask = torch.ones(6, 160, dtype=torch.bool)
    mask[:, 2:60] = False
    mask[1:, 0], mask[1:, 5] = False, True
    weight, pattern = torch.randn(6, 160, generator=generator), Unstructured(keep=102)
    problem = LayerProblem(weight, x.T @ x / 400, pattern, update=LeastSquaresUpdate(0.0))
    squares, again = problem.least_squares, []
    target = squares.target(problem.weight, problem.correlation)
    refined = LeastSquares._refined

    def counted(self, target, kept, dtype, pages):
        if dtype == torch.float64:
            again.extend(i[real].tolist() for i, real in zip(kept.index, kept.real, strict=True))
        return refined(self, target, kept, dtype, pages)

    monkeypatch.setattr(LeastSquares, "_refined", counted)
    found = squares.solve(target, mask)
    assert again == [mask[0].nonzero()[:, 0].tolist()]
    assert float(squares.residual(found, target, mask).max()) < 1e-8
    alone = torch.cat([squares.solve(target[i : i + 1], mask[i : i + 1]) for i in range(6)])
    close(found, alone, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_every_count_in_one_layer(dtype):
    """Rows of like counts are factorised together, and no row depends on the others or on threads."""
    n, threads = 70, torch.get_num_threads()
    problem = layer(rows=n + 1, n=n, dtype=dtype)
    score = torch.rand(n + 1, n, generator=torch.Generator().manual_seed(3))
    mask = score.argsort(1).argsort(1) < torch.arange(n + 1)[:, None]
    assert mask.sum(1).tolist() == list(range(n + 1))
    squares = problem.least_squares
    target = squares.target(problem.weight, problem.correlation)
    found = squares.solve(target, mask)
    close(found, dense(refit_layers.wide(problem), mask)[1], rtol=1e-6, atol=1e-8)
    assert float(squares.residual(found, target, mask).max()) < 1e-10
    assert bool((found[~mask] == 0).all())
    order = torch.randperm(n + 1, generator=torch.Generator().manual_seed(4))
    for limits in (Limits(threads=1, memory=2**16), Limits(threads=3, memory=3 * 2**18)):
        assert torch.equal(squares.solve(target[order], mask[order], limits), found[order])
    assert torch.get_num_threads() == threads
    alone = torch.cat([squares.solve(target[i : i + 1], mask[i : i + 1]) for i in range(n + 1)])
    close(alone, found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "damping", "dtype", "solver", "rtol"),
    [
        *((*case, F32, "wanda", 1e-6) for case in ((128, 3e-6), (256, 1e-5), (512, 1e-4))),
        *((*case, F64, "swap", 1e-8) for case in ((128, 0.0), (400, 2e-6), (640, 0.0))),
    ],
)
def test_a_gram_matrix_with_one_large_direction(n, damping, dtype, solver, rtol):
    """By it a float32 factor leaves a small residual, and an error that is not the least; inverting by halves
    loses it, and swaps leave weights that are not quite those of their mask."""
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(k, n, generator=generator, dtype=dtype) for k in (1, 4))
    problem = LayerProblem(weight, x.T @ x, Unstructured(0.6), update=LeastSquaresUpdate(damping))
    found = solve(problem, solver)
    best = refit_layers.wide(problem).objective(found.mask)
    close(found.objective, best, rtol=rtol, atol=0)
    verify(problem, found)


def test_inputs_that_are_indefinite_by_rounding_count_as_they_are_and_worse_ones_are_refused():
    """G of float32 has negative eigenvalues of 1e-7 of its trace; A has not, and F is a form of A alone."""
    x = torch.randn(4, 12, dtype=torch.float64)
    gram = x.T @ x / 4
    gram -= 0.4e-6 * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    problem = LayerProblem(
        random_weight(6, 12, 1), gram, Unstructured(keep=6), update=LeastSquaresUpdate(0)
    )
    mask = random_mask(problem)
    value, best = dense(problem, mask)
    lost = problem.weight - best
    assert bool(((lost @ gram * lost).sum(1) < 0).any())
    close(problem.objective(mask), value, rtol=1e-6, atol=0)
    verify(problem, solve(problem, "swap", start=mask))
    # an eigenvalue that takes away half of the damping: what F is would be rounding, too
    for least in (-0.4, -0.6):
        gram = torch.eye(40, dtype=torch.float64)
        gram[0, 0] = least * 0.01 * (39 / (40 - least * 0.01))
        squares = LeastSquares.of(gram, LeastSquaresUpdate(0.01))
        assert least * float(squares.ridge[0]) == pytest.approx(float(gram[0, 0]), rel=1e-3)
        if least == -0.4:
            squares.check("")
    with pytest.raises(ProblemError, match="take a larger damping"):
        squares.check("")
    # a float32 G of few tokens, whose rounding is above 1e-6 of the mean of its diagonal
    x = torch.randn(8, 64, dtype=torch.float64)
    gram = x.T @ x / 8
    gram -= 3e-6 * gram.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    weight, gram = random_weight(2, 64, 1, torch.float32), gram.float()
    for make in (
        lambda how: LayerProblem(weight, gram, HALF, name="q", update=how),
        lambda how: LayerProblem(weight, gram, HALF, name="q").with_update(how),
    ):
        with pytest.raises(ProblemError, match=r"layer 'q': .* take a larger damping") as error:
            make(LeastSquaresUpdate(0.0))
        assert in_one_line(error)
        problem = make(LeastSquaresUpdate(0.01))
        verify(problem, solve(problem, "swap"))
    assert RowProblem(
        weight[1], gram, HALF, update=LeastSquaresUpdate(0.01)
    ).update == LeastSquaresUpdate(0.01)
    with pytest.raises(ProblemError, match="damping"):
        RowProblem(weight[1], gram, HALF, update=LeastSquaresUpdate(0))


# --- the problem object
@LINEAR
@pytest.mark.parametrize("how", [LeastSquaresUpdate(0.03), ROOT], ids=repr)
def test_a_file_holds_it_and_one_that_says_it_wrongly_is_refused(tmp_path, how, linear):
    problem = layer(PATTERNS[linear], how=how, linear=linear)
    mask = random_mask(problem)
    problem.save(tmp_path / "layer.npz")
    problem.row(2).save(tmp_path / "row.npz")
    for load in (LayerProblem.load, load_problem):
        whole = load(tmp_path / "layer.npz")
        assert whole.update == how
        assert torch.equal(whole.objective(mask), problem.objective(mask))
    for load in (RowProblem.load, load_problem):
        row = load(tmp_path / "row.npz")
        assert (row.update, row.objective(mask[2])) == (how, problem.row(2).objective(mask[2]))
    problem.with_update(None).save(tmp_path / "kept.npz")
    assert LayerProblem.load(tmp_path / "kept.npz").update is None
    header, arrays = read_arrays(tmp_path / "layer.npz", "layer")
    assert repr(how) in repr(problem)
    assert repr(how) in repr(problem.row(0))
    assert "LeastSquaresUpdate" not in repr(problem.with_update(None))
    header = {k: v for k, v in header.items() if k not in ("format", "kind", "update")}
    arrays.pop("header", None)
    bad = ({"damping": value, "power": 0.0} for value in (-1.0, "x"))
    for words in (*bad, {"damping": 0.1, "power": 0.0, "more": 1}, {}, 0.01, [0.01]):
        write_arrays(tmp_path / "forged.npz", "layer", {**header, "update": words}, arrays)
        with pytest.raises(errors.MaskoptError, match=r"damping|kept weights are refitted"):
            load_problem(tmp_path / "forged.npz")
    for units in (3, {"sign": 1}, {"sign": 2, "shift": 0, "constant": 0}):
        write_arrays(tmp_path / "forged.npz", "layer", {**header, "units": units}, arrays)
        with pytest.raises(ProblemError, match="units"):
            load_problem(tmp_path / "forged.npz")


def test_rows_parts_other_patterns_and_the_other_objective():
    problem = layer(linear=True, how=LeastSquaresUpdate(0.1))
    mask = random_mask(problem)
    some = problem.take([0, 2])
    assert problem.row(1).update == some.update == LeastSquaresUpdate(0.1)
    close(some.objective(mask[[0, 2]]), problem.objective(mask)[[0, 2]])
    other = problem.under(NM(keep=1, of=2))
    assert other.update == LeastSquaresUpdate(0.1)
    assert torch.equal(other.objective(mask), problem.objective(mask))
    problem = layer()
    kept = problem.with_update(None)
    f = ((problem.weight * ~mask) @ problem.gram * (problem.weight * ~mask)).sum(1)
    close(kept.objective(mask), f, rtol=1e-12, atol=0)
    assert torch.equal(kept.weights(mask), problem.weight * mask)
    assert kept.gram.data_ptr() == problem.gram.data_ptr()
    more = problem.with_update(LeastSquaresUpdate(0.3))
    same(more, more.objective(mask), dense(more, mask)[0])
    assert problem.update == LeastSquaresUpdate(0.01)
    same(problem, problem.objective(mask), dense(problem, mask)[0])
    with pytest.raises(ProblemError, match=r"update=LeastSquaresUpdate\(damping\)"):
        _ = kept.least_squares
    row = problem.row(0)
    assert row.with_update(None).update is None
    assert row.with_update(None).with_update(LeastSquaresUpdate(0.1)).update == LeastSquaresUpdate(
        0.1
    )
    # the two objectives are not taken for each other
    one, other = solve(kept, "random"), solve(problem, "random")
    assert torch.equal(one.mask, other.mask)
    verify(problem, other)
    verify(kept, one)
    for wrong, solution in ((problem, one), (kept, other)):
        with pytest.raises(VerificationError, match="objective: row 0"):
            verify(wrong, solution)
    # and a comparison knows its own
    rows = [p.row(0) for p in (problem, more, kept)]
    records = compare(rows, ["wanda"])
    assert len({record.key for record in records}) == 3
    mask = solve(row, "wanda").mask[0]
    assert [r.objective for r in records] == [row.objective(mask) for row in rows]


def test_a_restricted_row_is_damped_by_the_inputs_that_are_left():
    problem = layer(kind="outliers", linear=True)
    row = problem.row(1).restrict([14, 3, 0, 7, 8, 1], Unstructured(keep=3))
    assert row.update == problem.update
    alone = row.as_layer()
    mask = random_mask(alone)
    expected, _ = dense(alone, mask)
    assert row.objective(mask[0]) == pytest.approx(float(expected), rel=1e-9)
    verify(row, solve(row, "exhaustive"))
    # what is rounding next to a large input can be too much where that one is gone
    gram = torch.eye(6)
    gram[0, 0] = 1e6
    gram[1, 2] = gram[2, 1] = 1.01
    row = LayerProblem(torch.ones(1, 6), gram, HALF, update=LeastSquaresUpdate(0)).row(0)
    with pytest.raises(ProblemError, match="damping"):
        row.restrict([1, 2, 3, 4])


def test_what_knows_kept_weights_alone_refuses_but_makes_a_start():
    assert {"tabu", "highs", "relax"} <= set(KEEPING)
    assert {"swap", "admm", "obs", "branch", "scip", "exhaustive", "wanda"}.isdisjoint(KEEPING)
    problem = layer(Unstructured(keep=4), rows=1, n=8)
    kept = problem.with_update(None)
    certificate = Certificate.box(kept, torch.zeros(1, 8))
    assert bool((certificate.check(kept) >= 0).all())
    for call, kind, message in (
        (lambda: certificate.check(problem), VerificationError, "proves nothing of updated"),
        (lambda: problem.row(0).q(), ProblemError, "no quadratic form of the mask"),
        *((lambda x=x: lower_bound(problem, x), SolverError, f"'{x}' is for unchanged weights")
          for x in BOUNDS),
        *((lambda x=x: solve(problem, x), SolverError, f"'{x}' chooses for unchanged weights")
          for x in KEEPING),
        *((lambda x=x: solve(problem, "swap", kernel=x), SolverError, f"kernel '{x}' is for")
          for x in ("literal", "torch", "numba", "triton")),
    ):  # fmt: skip
        with pytest.raises(kind, match=message) as error:
            call()
        assert in_one_line(error)
    assert solve(problem, "swap", kernel="auto").trace.kernel == "least squares"
    # but makes a start all the same
    for maker, problem in itertools.product(("relax", "elimination"), map(layer, PATTERNS)):
        start = make_start(problem.with_update(None), maker).mask
        stopped, swapped = (solve(problem, "swap", start=maker, max_swaps=k) for k in (0, 999))
        assert torch.equal(stopped.mask, start)
        assert torch.equal(swapped.mask, solve(problem, start=start).mask)
    # and 2 of 160 kept are 12,720 masks, each a system of 158 pruned inputs: too dear to be enumerated
    problem = layer(Unstructured(keep=2), rows=1, n=160)
    found = solve(problem, "swap")
    assert verify(problem, found).checked
    word = Solution.of(problem, found.mask, lower_bound=found.objective / 2, trusted=["SCIP 10.0"])
    assert "SCIP 10.0" in str(verify(problem, word))


@pytest.mark.parametrize("bad", [-1, -1e-9, np.nan, np.inf, True, "x", None, [1]], ids=repr)
def test_bad_dampings_and_powers_are_refused(bad):
    problem, message = layer(), "`damping` must be at least 0"
    with pytest.raises(OptionError, match=message):
        LeastSquaresUpdate(bad)
    for power in (bad, 1.1):
        with pytest.raises(OptionError, match="`power` must be 0 to 1"):
            LeastSquaresUpdate(0.1, power)
    if bad is not None:
        with pytest.raises(OptionError, match=message):
            update_weights(problem, random_mask(problem), damping=bad)
    with pytest.raises(errors.WarmStartError, match="row 0 prunes"):
        update_weights(problem, torch.ones(4, 16, dtype=torch.bool))
    for number in (np.float32(0.25), np.float64(0.25), np.int64(1), 1):
        assert type(LeastSquaresUpdate(number).damping) is float
        assert LeastSquaresUpdate(number).damping == number
