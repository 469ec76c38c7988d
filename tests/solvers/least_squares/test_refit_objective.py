"""F, the objective of updated weights, against its definition; its files; its certified lower bounds."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import refit_layers
import torch
from certificates import claimed, stating
from forging import fails, rewrite
from hypothesis import given, strategies as st
from refit_layers import (
    PATTERNS,
    REFITS,
    changed,
    dense,
    layer,
    metric,
    random_mask,
    residual,
    shuffled,
)
from strategies import HALF, KINDS, ONE_PERCENT, floor, problems, random_weight, refit_layer, slow

from maskopt import NM, LayerProblem, LeastSquaresUpdate, RowProblem, Unstructured, errors, verify
from maskopt.certificates.certificate import Certificate
from maskopt.core.least_squares import LeastSquares
from maskopt.core.limits import Limits
from maskopt.core.units import ObjectiveTransform
from maskopt.errors import OptionError, ProblemError, SolverError, VerificationError
from maskopt.experiments.compare import compare
from maskopt.instances.formats import load_problem
from maskopt.protocol.bounds import available_bounds, lower_bound
from maskopt.protocol.solution import Solution, Status
from maskopt.protocol.solver import available_solvers, make_start, solve

ROOT, ALL, F32, F64 = REFITS[3], Unstructured(keep=16), torch.float32, torch.float64
CASES = [*itertools.product(KINDS, PATTERNS), ("full", Unstructured(keep=0)), ("full", ALL)]
KEEPING = [name for name, info in available_solvers().items() if not info.capabilities.update]
BOUNDS = sorted({*available_bounds()} - {"perspective"})
LINEAR = pytest.mark.parametrize(**refit_layers.LINEAR)
#: a message of less than 250 characters
IN_ONE_LINE = r"\A(?=.{,249}\Z).*"
close, same = torch.testing.assert_close, refit_layers.assert_equal_but_for_rounding


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
    assert float(residual(squares, weight, target, mask).max()) < 1e-10
    if kind == "full":
        close(weight, dense(problem, mask)[1], rtol=1e-7, atol=1e-9)
    price = problem.error(weight) + (problem.weight - weight).square() @ squares.ridge
    atol = 0 if pattern != ALL else refit_layers.rounding(problem)
    close(problem.objective(mask), price, rtol=1e-9, atol=atol)


@LINEAR
@pytest.mark.parametrize("how", REFITS, ids=repr)
def test_other_orders_scales_and_batches_give_the_same_and_float32_does(how, linear):
    problem = layer(linear=linear, how=how)
    mask, order = random_mask(problem), shuffled(problem)
    whole, weights = problem.objective(mask), problem.weights(mask)
    moved = changed(problem, 8, 4, order)
    close(moved.objective(mask[:, order]), whole * 256, rtol=1e-9, atol=0)
    found = moved.weights(mask[:, order])
    close(found, weights[:, order] * 8, rtol=1e-9, atol=1e-11)
    close(moved.error(found), problem.error(weights) * 256, rtol=1e-9, atol=1e-14)
    for i in range(problem.rows):
        assert problem.row(i).objective(mask[i]) == pytest.approx(float(whole[i]), rel=1e-12)
        alone = problem.take([i]).weights(mask[i])[0]
        close(alone, weights[i], rtol=1e-9, atol=1e-12)
    for kind in () if linear else KINDS:
        narrow = layer(n=64, kind=kind, how=how, dtype=torch.float32)
        exact, found = refit_layers.wide(narrow), solve(narrow, "random")
        verify(narrow, found)
        same(exact, narrow.objective(found.mask), exact.objective(found.mask))
        one, other = narrow.weights(found.mask), exact.weights(found.mask)
        if how.damping:
            close(narrow.error(one), exact.error(other), rtol=1e-6, atol=1e-12)
        target = narrow.least_squares.target(narrow.weight, narrow.correlation)
        assert float(residual(narrow.least_squares, one, target, found.mask).max()) < 1e-7


# --- hard inputs
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
    assert float(residual(squares, found, target, mask).max()) < 1e-8
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
    assert float(residual(squares, found, target, mask).max()) < 1e-10
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
    """A float32 factor leaves a small residual there, and an error that is not the least."""
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(k, n, generator=generator, dtype=dtype) for k in (1, 4))
    problem = LayerProblem(weight, x.T @ x, Unstructured(0.6), update=LeastSquaresUpdate(damping))
    found = solve(problem, solver)
    verify(problem, found)
    close(found.objective, refit_layers.wide(problem).objective(found.mask), rtol=rtol, atol=0)


def test_inputs_that_are_indefinite_by_rounding_count_as_they_are_and_worse_ones_are_refused():
    """G of float32 has negative eigenvalues of 1e-7 of its trace; A has not, and F is a form of A alone."""
    x = torch.randn(4, 12, dtype=torch.float64)
    gram = x.T @ x / 4
    gram -= 0.4e-6 * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    problem = LayerProblem(random_weight(6, 12, 1), gram, HALF, update=LeastSquaresUpdate(0))
    mask = random_mask(problem)
    value, best = dense(problem, mask)
    lost = problem.weight - best
    assert bool(((lost @ gram * lost).sum(1) < 0).any())
    close(problem.objective(mask), value, rtol=1e-6, atol=0)
    verify(problem, solve(problem, "swap", start=mask))
    # an eigenvalue that takes away half of the damping: what F is would be rounding, too
    checks = []
    for least in (-0.4, -0.6):
        gram = torch.eye(40, dtype=torch.float64)
        gram[0, 0] = least * 0.01 * (39 / (40 - least * 0.01))
        squares = LeastSquares.of(gram, ONE_PERCENT)
        assert least * float(squares.ridge[0]) == pytest.approx(float(gram[0, 0]), rel=1e-3)
        checks.append(squares.check)
    checks[0]("")
    fails(ProblemError, "take a larger damping", checks[1], "")
    # a float32 G of few tokens, whose rounding is above 1e-6 of the mean of its diagonal
    x = torch.randn(8, 64, dtype=torch.float64)
    gram = x.T @ x / 8
    gram -= 3e-6 * gram.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    given = random_weight(2, 64, 1, F32), gram.float(), HALF
    for make in (
        lambda how: LayerProblem(*given, name="q", update=how),
        lambda how: LayerProblem(*given, name="q").with_update(how),
    ):
        message = IN_ONE_LINE + "layer 'q': .* take a larger damping"
        fails(ProblemError, message, make, LeastSquaresUpdate(0.0))
        problem = make(ONE_PERCENT)
        verify(problem, solve(problem, "swap"))
    given = given[0][1], *given[1:]
    assert RowProblem(*given, update=ONE_PERCENT).update == ONE_PERCENT
    fails(ProblemError, "damping", RowProblem, *given, update=LeastSquaresUpdate(0))


# --- the problem object
@LINEAR
@pytest.mark.parametrize("how", [LeastSquaresUpdate(0.03), ROOT], ids=repr)
def test_a_file_holds_it_and_one_that_says_it_wrongly_is_refused(tmp_path, how, linear):
    problem = layer(PATTERNS[linear], how=how, linear=linear)
    mask = random_mask(problem)
    problem.save(tmp_path / "layer.npz")
    problem.row(2).save(tmp_path / "row.npz")
    whole = load_problem(tmp_path / "layer.npz")
    assert whole.update == how
    assert torch.equal(whole.objective(mask), problem.objective(mask))
    row = load_problem(tmp_path / "row.npz")
    assert (row.update, row.objective(mask[2])) == (how, problem.row(2).objective(mask[2]))
    problem.with_update(None).save(kept := tmp_path / "kept.npz")
    assert load_problem(kept).update is None
    assert all(repr(how) in repr(x) for x in (problem, problem.row(0)))
    assert "LeastSquaresUpdate" not in repr(problem.with_update(None))
    bad = ({"damping": value, "power": 0.0} for value in (-1.0, "x"))
    bad = *bad, {"damping": 0.1, "power": 0.0, "more": 1}, {}, 0.01, [0.01]
    units = 3, {"sign": 1}, {**vars(ObjectiveTransform()), "sign": 2}
    updates = (("update", x, errors.MaskoptError, r"damping|kept weights are updated") for x in bad)
    for name, value, *refused in (*updates, *(("units", x, ProblemError, "units") for x in units)):
        rewrite(kept, {"update": None, "units": None, name: value}, kind="layer")
        fails(*refused, load_problem, kept)


def test_rows_parts_other_patterns_and_the_other_objective():
    problem = layer(linear=True, how=LeastSquaresUpdate(0.1))
    mask = random_mask(problem)
    some, other = problem.take([0, 2]), problem.under(NM(keep=1, of=2))
    assert {p.update for p in (problem.row(1), some, other)} == {LeastSquaresUpdate(0.1)}
    close(some.objective(mask[[0, 2]]), problem.objective(mask)[[0, 2]])
    assert torch.equal(other.objective(mask), problem.objective(mask))
    problem = layer()
    kept = problem.with_update(None)
    f = ((problem.weight * ~mask) @ problem.gram * (problem.weight * ~mask)).sum(1)
    close(kept.objective(mask), f, rtol=1e-12, atol=0)
    assert torch.equal(kept.weights(mask), problem.weight * mask)
    assert kept.gram.data_ptr() == problem.gram.data_ptr()
    more = problem.with_update(LeastSquaresUpdate(0.3))
    same(more, more.objective(mask), dense(more, mask)[0])
    assert problem.update == ONE_PERCENT
    same(problem, problem.objective(mask), dense(problem, mask)[0])
    fails(ProblemError, r"update=LeastSquaresUpdate\(damping\)", getattr, kept, "least_squares")
    row = problem.row(0)
    bare = row.with_update(None)
    assert (bare.update, bare.with_update(ROOT).update) == (None, ROOT)
    one, other = solve(kept, "random"), solve(problem, "random")
    assert torch.equal(one.mask, other.mask)
    verify(problem, other)
    verify(kept, one)
    for wrong, solution in ((problem, one), (kept, other)):
        fails(VerificationError, "objective: row 0", verify, wrong, solution)
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
    fails(ProblemError, "damping", row.restrict, [1, 2, 3, 4])


def test_what_knows_kept_weights_alone_refuses_but_makes_a_start():
    assert {"tabu", "scip", "highs", "relax"} <= set(KEEPING)
    assert {"swap", "admm", "obs", "branch", "exhaustive", "wanda"}.isdisjoint(KEEPING)
    problem = layer(Unstructured(keep=4), rows=1, n=8)
    kept = problem.with_update(None)
    certificate = Certificate.box(kept, torch.zeros(1, 8))
    assert bool((certificate.check(kept) >= 0).all())
    own = bound_of(problem).certificate
    for call, kind, message in (
        (lambda: certificate.check(problem), VerificationError, "proves nothing of updated ones"),
        (lambda: own.check(kept), VerificationError, "proves nothing of unchanged ones"),
        (lambda: bound_of(kept), SolverError, "'perspective' is for updated weights"),
        (lambda: bound_of(problem, splits=-1), OptionError, "splits"),
        (lambda: problem.row(0).q(), ProblemError, "no quadratic form of the mask"),
        *((lambda x=x: lower_bound(problem, x), SolverError, f"'{x}' is for unchanged .*'perspective'")
          for x in BOUNDS),
        *((lambda x=x: solve(problem, x), SolverError, f"'{x}' chooses for unchanged weights")
          for x in KEEPING),
        *((lambda x=x: solve(problem, "swap", kernel=x), SolverError, f"kernel '{x}' is for")
          for x in ("literal", "torch", "numba", "triton")),
    ):  # fmt: skip
        fails(kind, IN_ONE_LINE + message, call)
    assert solve(problem, "swap", kernel="auto").trace.kernel == "least squares"
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
    fails(OptionError, "`damping` must be at least 0", LeastSquaresUpdate, bad)
    for power in (bad, 1.1):
        fails(OptionError, "`power` must be 0 to 1", LeastSquaresUpdate, 0.1, power)
    for number in (np.float32(0.25), np.float64(0.25), np.int64(1), 1):
        taken = LeastSquaresUpdate(number).damping
        assert (type(taken), taken) == (float, number)


# --- lower bounds
BOUNDED = (*PATTERNS, NM(keep=1, of=4))


def bound_of(problem, **options):
    return lower_bound(problem, "perspective", **options)


def anything(problem, seed):
    """However bad: random v, and d of which much is missing to B ⪰ 0."""
    generator, shape = torch.Generator().manual_seed(seed), problem.weight.shape
    d = problem.least_squares.damped.diagonal()
    d = d * torch.rand(shape, generator=generator, dtype=torch.float64)
    d *= 10.0 ** -torch.randint(0, 4, (problem.rows, 1), generator=generator)
    v = torch.randn(shape, generator=generator, dtype=torch.float64) / 10
    return Certificate(d, d[:, :0], problem.weight + v)


@pytest.mark.slow
@given(
    st.one_of(problems(max_n=8, max_rows=10), st.sampled_from(BOUNDED)),
    st.sampled_from((LeastSquaresUpdate(0.001), *REFITS)), st.integers(0, 4), st.integers(0, 10**6),
)  # fmt: skip
def test_no_mask_costs_less_than_what_any_certificate_proves(problem, how, splits, seed):
    if not isinstance(problem, LayerProblem):
        problem = refit_layer(problem, rows=8, n=8, seed=seed)
    problem = problem.with_update(how)
    bound, best = bound_of(problem, splits=splits, turns=20), solve(problem, "exhaustive")
    most = best.objective + floor(problem)
    assert bool(((bound.value >= 0) & (bound.value <= most)).all())
    assert verify(problem, stating(problem, best.mask, bound)).checked
    for other in range(seed, seed + 3):
        assert bool((anything(problem, other).check(problem) <= most).all())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *map(slow, range(1, 12))])
@pytest.mark.parametrize("per", ["row", "layer"])
def test_inputs_that_say_the_same_are_bounded_too(per, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1 + seed % 3, 4, generator=generator, dtype=torch.float64)
    x = x * 10.0 ** torch.empty(4, dtype=torch.float64).uniform_(-3, 3, generator=generator)
    x[:, 1] = -x[:, 0]
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    weight[torch.rand(3, 4, generator=generator) < 0.3] = 0
    for damping in (0.0, 1e-6, 0.01):
        pattern = Unstructured(sparsity=0.5, per=per)
        problem = LayerProblem(weight, x.T @ x, pattern, update=LeastSquaresUpdate(damping))
        best, bound = solve(problem, "exhaustive"), bound_of(problem, splits=2, turns=20)
        room = 1e-9 * problem.diagonal_mass().sum()
        assert float(bound.value.sum()) <= float(best.objective.sum() + room)
        if per == "row":
            one = problem.take([seed % 3])
            verify(one, solve(one, "branch"))


@pytest.mark.parametrize("pattern", BOUNDED, ids=str)
def test_the_value_is_the_formulas(pattern):
    problem = refit_layer(pattern, rows=2, n=8, seed=4)
    a = problem.least_squares.damped
    d = torch.full((2, 8), 0.5 * float(torch.linalg.eigvalsh(a)[0]), dtype=torch.float64)
    v = solve(problem, "exhaustive").mask * problem.weight
    proven = Certificate(d, d[:, :0], v).check(problem)
    kept = problem.group_size - problem.pruned_per_group
    for row in range(2):
        w, b = problem.weight[row], a - torch.diag(d[row])
        price = (a @ w - b @ v[row]).square() / d[row]
        groups = price.view(-1, problem.group_size).sort(dim=1).values[:, -kept:]
        true = float(w @ a @ w - v[row] @ b @ v[row] - groups.sum())
        assert float(proven[row]) == pytest.approx(max(true, 0.0), rel=1e-9, abs=1e-12)
    if kept > 1:  # better splits and turns only help
        problem = refit_layer(pattern, rows=2, n=16, damping=0.05)
        found = solve(problem, "swap").objective
        gaps = [float(bound_of(problem, splits=s).gap(found).mean()) for s in (0, 1, 4, 20)]
        assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(gaps))
        assert gaps[-1] < 0.97 * gaps[0]


@pytest.mark.parametrize(("part", "options", "layer"), [
    # tight where inputs are not correlated, or there is hardly a choice
    (0.995, {}, {"kind": "diagonal", "n": 8}), (0.995, {}, {"kind": "diagonal", "n": 8, "damping": 1.0}),
    *((0.9, {}, {"pattern": Unstructured(keep=keep), "n": 5}) for keep in (0, 5)),
    (0.2, {}, {"n": 12, "dtype": torch.float32}), (0.0, {"limits": Limits(seconds=0)}, {"n": 12}),
])  # fmt: skip
def test_a_bound_is_worth_something(part, options, layer):
    problem = refit_layer(**layer)
    bound, best = bound_of(problem, **options), solve(problem, "exhaustive").objective
    assert bool((bound.value <= best + floor(problem)).all())
    assert bool((bound.value >= part * best - floor(problem)).all())
    assert bound.trace.iterations.tolist() == [0] * 3 or not options
    for w, g in ((0.0, 1.0), (1.0, 0.0)):
        assert bound_of(changed(problem, w, g), **options).value.tolist() == [0.0] * 3


def test_order_units_threads_and_a_row_alone_change_nothing():
    problem = refit_layer(rows=3, n=8)
    bound = bound_of(problem, threads=1, splits=3).value
    assert torch.equal(bound_of(problem, threads=2, splits=3).value, bound)
    for row in range(3):
        assert float(bound_of(problem.row(row), splits=3).value) == float(bound[row])
    moved = bound_of(changed(problem, columns=shuffled(problem)), splits=3).value
    torch.testing.assert_close(moved, bound, rtol=1e-3, atol=1e-12)
    scaled = bound_of(changed(problem, 2.0**10, 2.0**-6), splits=3).value
    torch.testing.assert_close(scaled, bound * 2.0**14)


def test_a_claim_goes_to_disk_and_back_and_none_beyond_its_certificate_is_accepted(tmp_path):
    problem = refit_layer(rows=2, n=24)
    bound, found = bound_of(problem), solve(problem, "swap")
    assert claimed(problem, found, bound).checked
    good, path = bound.certificate, tmp_path / "solution.npz"
    stating(problem, found.mask, bound, status=Status.SWAP_OPTIMAL).save(path)
    loaded = Solution.load(path)
    assert torch.equal(loaded.certificate.check(problem), bound.value)
    assert verify(problem, loaded, require="checked").checked
    for certificate, message in (
        (replace(good, diagonal=-good.diagonal), "split of the diagonal is negative"),
        (replace(good, diagonal=good.diagonal * torch.nan), "diagonal holds NaN or infinite"),
        (replace(good, diagonal=good.diagonal[:, :5]), r"diagonal must be float64 \[2, 24\]"),
        (replace(good, point=good.point.float()), r"point must be float64 \[2, 24\]"),
        (replace(good, diagonal=torch.zeros_like(good.diagonal)), "its certificate proves 0"),
        (replace(good, diagonal=1e6 * good.diagonal), "its certificate proves 0"),
        (replace(good, point=2 * good.point), "its certificate proves"),
    ):
        fails(VerificationError, message, claimed, problem, found, bound, certificate=certificate)
    fails(VerificationError, "its certificate proves", claimed, problem, found, bound, 1.001)
    assert float(good.check(refit_layer(rows=2, n=24, seed=9)).sum()) < float(bound.value.sum())
