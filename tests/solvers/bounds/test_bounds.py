"""No bound is above the optimum; the sweep of the mixing method is the plain Gauss–Seidel sweep."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from certificates import claimed
from forging import fails
from hypothesis import given, settings, strategies as st
from scipy.sparse import csc_matrix
from strategies import HALF, KINDS, TWO_FOUR, drawn, problems, random_gram, random_weight, slow

from maskopt import NM, Certificate, LayerProblem, Unstructured, lower_bound, solve
from maskopt.certificates.cuts import Cuts
from maskopt.core.threads import torch_threads
from maskopt.errors import OptionError, SolverError, VerificationError
from maskopt.protocol.bounds import ENTRY_POINT_GROUP, available_bounds
from maskopt.solvers.bounds import sdp
from maskopt.solvers.convex.mixing import Extra, Mixing, ScaledRow, certify_row

METHODS = ("box", "shift", "sdp")
SPARSE = Unstructured(0.6)
PATTERNS = (SPARSE, TWO_FOUR)
SETTLING = list(itertools.product(["full", "low-rank", "outliers"], PATTERNS))


def layer(rows, n, pattern=SPARSE, kind="full", dtype=torch.float64):
    return drawn(rows, n, kind, pattern, dtype=dtype)


def assert_below(value, problem):
    exact = solve(problem, "exhaustive").objective
    # what float64 can say of the enumerated objective itself
    assert bool((value <= exact + 1e-13 * problem.diagonal_mass()).all()), (value - exact).max()
    assert bool((value >= 0).all())
    return exact


@settings(max_examples=settings.default.max_examples // 2)
@given(problems(max_n=10, max_rows=6), st.integers(1, 3), st.integers(0, 100), st.integers(0, 1))
def test_no_bound_is_above_the_optimum(problem, sweeps, seed, cuts):
    """However crude the solve; and none with cuts is below the plain one."""
    bounds = [lower_bound(problem, method) for method in METHODS]
    cut = lower_bound(problem, "sdp", cuts=2)
    crude = lower_bound(problem, "sdp", sweeps=sweeps, rank=2, seed=seed, cuts=cuts)
    assert_below(torch.stack([bound.value for bound in (*bounds, cut, crude)]), problem)
    assert bool((cut.value >= bounds[-1].value * (1 - 1e-9)).all())
    claimed(problem, solve(problem, "wanda"), cut)


@given(problems(max_n=9, max_rows=8), st.integers(0, 2**31), st.floats(-6, 6))
def test_random_duals_and_points_are_valid(problem, seed, size):
    generator = torch.Generator().manual_seed(seed)
    rows, n = problem.weight.shape
    groups = n // problem.group_size
    unit = problem.diagonal_mass()[:, None] * 10**size / n

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found, cuts, product = [], None, None
    for _ in range(2):
        if n >= 3:
            index = [torch.randperm(n + 1, generator=generator)[:3] - 1 for _ in range(5)]
            sign = 2 * torch.randint(0, 2, (5, 2), generator=generator, dtype=torch.int8) - 1
            tau = noise(rows, 5).abs() * unit
            cuts = [Cuts(torch.stack(index), sign, tau[r]) for r in range(rows)]
        if seed % 3 == 0:
            product = noise(rows, groups, n) * unit[..., None]
        duals = noise(rows, n) * unit, noise(rows, groups) * unit, noise(rows, n)
        found += [Certificate(*duals, product, some).check(problem) for some in (None, cuts)]
    assert_below(torch.stack(found), problem)


@pytest.mark.slow
def test_bounds_are_worth_something_and_cuts_more():
    tight = []
    for (seed, kind), pattern in itertools.product(enumerate(KINDS), PATTERNS):
        problem = drawn(5, 8 + seed % 2 * 4, kind, pattern, (seed + 1, seed))
        bound, cut = (lower_bound(problem, "sdp", cuts=cuts) for cuts in (0, 3))
        exact = assert_below(cut.value, problem)
        assert bool((cut.gap(exact) <= bound.gap(exact) + 1e-9).all())
        tight.append((bound.value / exact)[exact > 1e-9 * problem.diagonal_mass()])
    assert float(torch.cat(tight).median()) > 0.8


def test_bounds_of_singular_indefinite_and_badly_scaled_rows():
    scale, weight = torch.logspace(-1.5, 1.5, 16, dtype=torch.float64), random_weight(4, 16, 7)
    problem = LayerProblem(weight, random_gram(16, "full", 3) * scale.outer(scale), SPARSE)
    value = lower_bound(problem, "sdp").value
    assert bool((value > 0.02 * assert_below(value, problem)).all())
    zero = LayerProblem(torch.zeros(2, 8), torch.zeros(8, 8), HALF)
    for method in METHODS:
        assert lower_bound(zero, method).value.tolist() == [0.0, 0.0]
    # an indefinite G that was never checked
    gram = random_gram(8, "full", 1) - 0.8 * torch.eye(8, dtype=torch.float64)
    problem = LayerProblem(random_weight(3, 8, 1), gram, HALF, assume_psd=True)
    true = solve(problem, "exhaustive").objective
    assert bool((true == 0).any())
    for method in METHODS[::2]:
        assert bool((lower_bound(problem, method).value <= true + 1e-12).all())
    # semidefinite up to the rounding of float32 only, G can still be shifted (by nothing)
    problem = layer(4, 128, kind="low-rank", dtype=torch.float32)
    box, shift = lower_bound(problem, "box").value, lower_bound(problem, "shift").value
    assert bool(((shift >= 0.99 * box) & (shift <= solve(problem, "swap").objective)).all())


@pytest.mark.parametrize(("kind", "pattern"), [
    SETTLING[4], *(slow(*SETTLING[i]) for i in (0, 1, 2, 3, 5)),
], ids=str)  # fmt: skip
def test_the_default_sweeps_settle(kind, pattern):
    """Near what far more reach, whatever the layer: the penalty must not make them crawl."""
    problem = layer(1, 256, pattern, kind)
    bound, limit = lower_bound(problem, "sdp"), lower_bound(problem, "sdp", sweeps=5_000)
    assert float(bound.value) >= 0.985 * float(limit.value)
    assert max(bound.trace.correction.tolist()) <= 0.02


def heavy(problem, size):
    """An input that a good mask keeps, and its weight, so large; and that mask."""
    best = solve(problem, "swap")
    weight = problem.weight.clone()
    weight[0, int(best.mask[0].nonzero()[0])] = size
    return LayerProblem(weight, problem.gram, problem.pattern), best


@pytest.mark.parametrize("n", [24, slow(260)])
@pytest.mark.parametrize("size", [1e6, 1e20, 1e100])
def test_a_weight_of_any_size_leaves_a_bound(n, size):
    other, best = heavy(layer(1, n), size)
    for method in METHODS:
        assert 0 <= float(lower_bound(other, method).value) <= float(best.objective) * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["full", "outliers"])
def test_an_outlier_input_does_not_slow_the_rest(kind):
    problem = layer(1, 64, kind=kind)
    other, _ = heavy(problem, 100 * float(problem.weight.abs().max()))
    plain, bound = (float(lower_bound(x, "sdp").value) for x in (problem, other))
    assert bound >= 0.95 * plain


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_relaxation_beats_the_box(pattern, monkeypatch):
    problem = layer(4, 32, pattern)
    box, found = (lower_bound(problem, method).value for method in ("box", "sdp"))
    assert bool((found >= box).all())
    alone = torch.cat([lower_bound(problem.row(row), "sdp").value for row in range(4)])
    torch.testing.assert_close(found, alone, rtol=1e-3, atol=0)
    # duals that are worth nothing leave the relaxation
    problem = layer(2, 24)
    box = lower_bound(problem, "box", steps=2000).value
    monkeypatch.setattr(sdp, "certify_row", lambda row, y, *more: certify_row(row, 0.02 * y, *more))
    assert bool((lower_bound(problem, "sdp").value >= box * 0.999).all())


@pytest.mark.parametrize("kind", ["diagonal", "uniform"])
def test_no_row_is_bounded_worse_with_the_shift(kind):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        inputs, more, weight = (torch.randn(m, 24, generator=generator) for m in (100, 24, 6))
        inputs = inputs @ more
        problem = LayerProblem(weight, inputs.T @ inputs / 100, HALF)
        box, shift = lower_bound(problem, "box"), lower_bound(problem, "shift", kind=kind)
        assert bool((shift.value >= box.value * (1 - 1e-9)).all()), seed


def test_verify_takes_a_certificate_and_refuses_more_than_it_proves():
    problem = layer(2, 12, HALF)
    found, bound = solve(problem, "elimination"), lower_bound(problem, "sdp")
    claimed(problem, found, bound)
    c = bound.certificate
    # duals that promise more than they are worth: A is no longer semidefinite
    for more in ((1.001,), (1.0, replace(c, diagonal=c.diagonal * 1.2))):
        fails(VerificationError, "its certificate proves", claimed, problem, found, bound, *more)
    # a cut of 1.9·z_i z_j is no triangle inequality, and proves whatever one likes
    index, tau = torch.tensor([[-1, 0, 1], [-1, 2, 3]]), torch.ones(2, dtype=torch.float64)
    whole = Cuts(index, torch.tensor([[1, -1], [-1, -1]]), tau)
    assert bool((replace(c, cuts=[whole, None]).check(problem) >= 0).all())
    bad = [{"sign": sign} for sign in (whole.sign * 1.9, whole.sign.double(), whole.sign * 1j)]
    for wrong in (*bad, {"index": whole.index + 0.5}):
        forged = replace(c, cuts=[replace(whole, **wrong), None])
        fails(VerificationError, "not whole numbers", forged.check, problem)


def test_out_of_time(monkeypatch):
    """A shift counts its steps once; a chunk of sweeps for a few rows, and the box for the others."""
    problem = layer(2, 12, HALF)
    box, shifted, semidefinite = (lower_bound(problem, m, time_limit=0) for m in METHODS)
    assert torch.equal(shifted.trace.iterations, box.trace.iterations)
    assert (shifted.trace.shifted, shifted.value.tolist()) == (("no", "no"), box.value.tolist())
    assert_below(torch.stack([box.value, semidefinite.value]), problem)
    problem, certified = layer(60, 24, HALF), []
    monkeypatch.setattr(sdp, "certify_row", lambda *x: certified.append(x) or certify_row(*x))
    bound = lower_bound(problem, "sdp", time_limit=0)
    assert len(certified) == 1
    assert set(bound.trace.iterations.tolist()) == {0, 20}
    assert int((bound.trace.iterations > 0).sum()) <= 4 * torch.get_num_threads()
    assert bool((bound.value <= solve(problem, "swap").objective).all())
    assert bool(bound.trace.correction.isnan().any())


def test_bad_input_is_named():
    for method, options, kind, message in (
        ("bx", {}, SolverError, "did you mean 'box'"),
        ("sdp", {"sweps": 3}, OptionError, "did you mean 'sweeps'"),
        ("sdp", {"sweeps": 0}, OptionError, "sweeps"),
        ("sdp", {"cuts": -1}, OptionError, "cuts must be a whole number ≥ 0"),
        ("box", {"time_limit": -1}, OptionError, "time_limit"),
        ("shift", {"kind": "odd"}, OptionError, "kind"),
    ):
        fails(kind, message, lower_bound, layer(2, 12, HALF), method, **options)
    assert set(METHODS) <= set(available_bounds())
    assert ENTRY_POINT_GROUP == "maskopt.bounds"


@pytest.mark.parametrize("pattern", [SPARSE, slow(TWO_FOUR)], ids=str)
def test_the_bound_is_that_of_a_conic_solver(pattern):
    """min ⟨Q, P⟩ over [[1, pᵀ], [p, P]] ⪰ 0 with diag(P) = p, and 1ᵀp = s and 1ᵀP1 = s² in every group."""
    scs, problem = pytest.importorskip("scs"), layer(2, 16, pattern)
    column, row = np.triu_indices(problem.n + 1)
    twice = np.where(row == column, 1.0, np.sqrt(2))
    first, *inputs = np.eye(problem.n + 1)
    equations = [(np.outer(first, first), 1)] + [(np.outer(e, e - first), 0) for e in inputs]
    for group in np.split(np.array(inputs), problem.n // problem.group_size):
        ones, pruned = group.sum(0), problem.pruned_per_group
        equations += [(np.outer(ones, first), pruned), (np.outer(ones, ones), pruned**2)]
    sums = np.array([((m + m.T) / 2)[row, column] * twice for m, _ in equations])
    a = csc_matrix(np.concatenate([sums, -np.eye(len(row))]))
    b = np.concatenate([[value for _, value in equations], np.zeros(len(row))])
    cone, exact = {"z": len(equations), "s": [problem.n + 1]}, {"eps_abs": 1e-7, "eps_rel": 1e-7}
    for number, bound in enumerate(lower_bound(problem, "sdp", sweeps=3000).value.tolist()):
        cost = np.pad(problem.row(number).q().numpy(), (1, 0))[row, column] * twice
        found = scs.SCS({"A": a, "b": b, "c": cost}, cone, verbose=False, **exact).solve()
        assert found["info"]["pobj"] == pytest.approx(bound, rel=0.005)


def plain_sweep(state, row, rho, extra):
    """One pass over one row, coordinate by coordinate, from the definition."""
    n, group = len(state.w[row]), state.group
    w, v = state.w[row].double().numpy(), state.v[row].double().numpy().copy()
    label, y = np.arange(n) // group, np.zeros(n)
    c = w[:, None] * state.gram.double().numpy() * w[None, :] / 4 + extra[:, :n]
    c += rho / 4 * (label[:, None] == label[None, :])
    fixed = state.linear[row].double().numpy() + rho * (group - 2 * state.pruned) / 4 + extra[:, n]
    np.fill_diagonal(c, 0)
    for i in range(n):
        g = c[i] @ v
        g[0] += fixed[i]
        y[i] = np.linalg.norm(g)
        v[i] = -g / y[i]
    return v, y


def random_extra(n, rows, seed):
    """Dense [rows, n, n + 1]."""
    random = np.random.default_rng(seed)
    dense = np.zeros((rows, n, n + 1))
    for row in range(rows):
        full = random.normal(size=(n + 1, n + 1))
        full *= random.random((n + 1, n + 1)) < 0.1 + 0.1 * row
        np.fill_diagonal(full, 0)
        dense[row] = (full + full.T)[:n]
    return dense


def sparse(dense):
    rows, n, _ = dense.shape
    counts = (dense != 0).sum(2)
    ends = np.cumsum(counts).reshape(rows, n)
    starts = np.concatenate([ends[:, :1] - counts[:, :1], ends], axis=1)
    return Extra(starts, np.nonzero(dense)[2].astype(np.int32), dense[dense != 0])


@pytest.mark.parametrize(("n", "pattern", "rank"), [
    (1, Unstructured(0.0), 2), (5, SPARSE, 3), (8, TWO_FOUR, 16), (37, SPARSE, 9),
    (40, TWO_FOUR, 17), (60, NM(5, 20), 48),
    (30, SPARSE, 80),  # more accumulators than are summed together
    # in float32
    *(slow(*case) for case in ((259, HALF, 23), (264, NM(4, 8), 16), (264, SPARSE, 130))),
])  # fmt: skip
@pytest.mark.parametrize("with_extra", [False, True])
def test_the_sweep_is_plain_gauss_seidel(n, pattern, rank, with_extra):
    state = Mixing(drawn(3, n, pattern=pattern, seeds=(1, 0)), rank, 0)
    assert state.v.shape[2] % 16 == 0
    dense = random_extra(n, 3, 5)
    if with_extra:
        state.extra = sparse(dense)
    state.sweep(2, 0.3)  # away from the start
    expected = [plain_sweep(state, r, 0.7, with_extra * dense[r]) for r in range(3)]
    state.sweep(1, 0.7)
    tolerance = 1e-10 if n <= 256 else 2e-4
    for row, (v, y) in enumerate(expected):
        np.testing.assert_allclose(state.v[row].numpy(), v, atol=tolerance)
        np.testing.assert_allclose(state.duals[row].numpy(), y, rtol=tolerance, atol=tolerance)
    assert not state.v[:, :, rank:].any()


@pytest.mark.parametrize("n", [48, slow(264)])
def test_no_bit_depends_on_threads_or_on_the_rows_beside(n):
    problem = drawn(4, n, pattern=SPARSE, seeds=(1, 0))
    extra = random_extra(n, 4, 3)

    def run(rows, threads):
        with torch_threads(threads):
            state = Mixing(problem.take(rows), 16, 0)
            state.extra = sparse(extra[rows])
            state.sweep(30, 0.5)
        return state.v, state.duals

    v, duals = run([0, 1, 2, 3], 4)
    for rows, threads in (([0, 1, 2, 3], 1), ([2], 1), ([3, 1], 2)):
        again, again_duals = run(rows, threads)
        assert torch.equal(again, v[rows])
        assert torch.equal(again_duals, duals[rows])
    whole, some = Mixing(problem, 8, 0), Mixing(problem, 8, 0)
    for state in (whole, some):
        state.sweep(3, 0.2)
    some.keep([2, 0])
    for state, rows in ((whole, [0, 1, 2, 3]), (some, [2, 0])):
        state.extra = sparse(extra[rows])
        state.sweep(4, 0.2)
    assert torch.equal(some.v, whole.v[[2, 0]])
    np.testing.assert_array_equal(some.inner(), whole.inner()[[2, 0]])


@pytest.mark.slow
def test_the_torch_sweep_is_the_compiled_one():
    """At the fixed point of one the other stays, with extra terms; and they reach one bound."""
    state = Mixing(drawn(2, 24, pattern=SPARSE, seeds=(1, 0)), 12, 0)
    state.extra = sparse(0.05 * random_extra(24, 2, 2))
    state.sweep(5000, 1.0)
    v, duals = state.v.clone(), state.duals.clone()
    state.sweep_torch(1.0)
    torch.testing.assert_close(state.v, v, atol=1e-5, rtol=0)
    torch.testing.assert_close(state.duals, duals, atol=1e-5, rtol=1e-5)
    problem, rho = layer(1, 32), 0.2
    one, other = Mixing(problem, 10, 0), Mixing(problem, 10, 0)
    one.sweep(600, rho)
    for _ in range(300):
        other.sweep_torch(rho)
    row = ScaledRow.of(problem, problem.gram.numpy(), 0, float(one.scale[0]))
    duals = [(x.duals[0].double().numpy(), x.inner()[0]) for x in (one, other)]
    values = [certify_row(row, y, inner, rho).value for y, inner in duals]
    assert values[1] == pytest.approx(values[0], rel=0.02)


def test_bounds_do_not_depend_on_the_tile(monkeypatch):
    problem = drawn(5, 40, pattern=SPARSE, seeds=(1, 0))
    whole = lower_bound(problem, "sdp", sweeps=50)
    monkeypatch.setattr("maskopt.solvers.bounds.sdp._TILE_ENTRIES", 2 * 40 * 16)
    tiles = lower_bound(problem, "sdp", sweeps=50)
    alone = [lower_bound(problem.row(r), "sdp", sweeps=50) for r in range(5)]
    assert bool((whole.value > 0).all())
    joined = Certificate.stack([bound.certificate for bound in alone])
    for other, name in itertools.product(
        (tiles.certificate, joined), ("diagonal", "penalty", "point")
    ):
        assert torch.equal(getattr(whole.certificate, name), getattr(other, name))
