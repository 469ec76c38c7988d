"""No bound is ever above the optimum: against enumeration, with crude, random and forged duals."""

import itertools
from dataclasses import replace

import pytest
import torch
from certificates import claimed
from hypothesis import given
from hypothesis import strategies as st
from strategies import HALF, KINDS, problems, random_gram, random_weight

from maskopt import NM, Certificate, LayerProblem, Unstructured, lower_bound, solve
from maskopt.bounds import ENTRY_POINT_GROUP, available_bounds
from maskopt.certificate import Cuts
from maskopt.errors import OptionError, SolverError, UnknownSolverError, VerificationError
from maskopt.solvers.bounds import sdp
from maskopt.solvers.convex.duals import ScaledRow, certify_row
from maskopt.solvers.convex.mixing import Mixing

METHODS = ("box", "shift", "sdp")
SPARSE, PATTERNS = Unstructured(0.6), (Unstructured(0.6), NM(2, 4))


def layer(rows, n, pattern=SPARSE, kind="full", dtype=torch.float64):
    return LayerProblem(random_weight(rows, n, 1, dtype), random_gram(n, kind, 2, dtype), pattern)


@pytest.fixture
def problem():
    return layer(2, 12, HALF)


def assert_below(value, problem):
    exact = solve(problem, "exhaustive").objective
    # what float64 can say of the enumerated objective itself
    noise = 1e-13 * problem.diagonal_mass()
    assert bool((value <= exact + noise).all()), (value - exact).max()
    assert bool((value >= 0).all())
    return exact


@pytest.mark.parametrize("method", METHODS)
@given(problems(max_n=10, max_rows=6))
def test_no_bound_is_above_the_optimum(method, problem):
    assert_below(lower_bound(problem, method).value, problem)


@given(problems(max_n=9, max_rows=8), st.integers(0, 2**31), st.floats(-6, 6))
def test_random_duals_and_points_are_valid(problem, seed, size):
    """A certificate out of thin air proves little, and never too much."""
    generator = torch.Generator().manual_seed(seed)
    rows, n = problem.weight.shape
    groups = n // problem.group_size
    unit = problem.diagonal_mass()[:, None] * 10**size / n

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for _ in range(2):
        cuts, product = None, None
        if n >= 3:
            index = [torch.randperm(n + 1, generator=generator)[:3] - 1 for _ in range(5)]
            sign = 2 * torch.randint(0, 2, (5, 2), generator=generator, dtype=torch.int8) - 1
            tau = noise(rows, 5).abs() * unit
            cuts = [Cuts(torch.stack(index), sign, tau[r]) for r in range(rows)]
        if seed % 3 == 0:
            product = noise(rows, groups, n) * unit[..., None]
        duals = noise(rows, n) * unit, noise(rows, groups) * unit, noise(rows, n)
        for some in (None, cuts):
            assert_below(Certificate(*duals, product, some).check(problem), problem)


@given(
    problems(max_n=10, max_rows=4),
    st.integers(1, 3),
    st.integers(0, 100),
    st.sampled_from([{}, {"cuts": 1}]),
)
def test_a_deliberately_crude_solve_is_valid(problem, sweeps, seed, more):
    bound = lower_bound(problem, "sdp", sweeps=sweeps, rank=2, seed=seed, **more)
    assert_below(bound.value, problem)


@pytest.mark.parametrize(
    ("times", "rows", "n"), [(1, 3, 8), pytest.param(2, 25, 12, marks=pytest.mark.slow)]
)
def test_hundreds_of_small_rows(times, rows, n):
    """Both patterns, every kind of Gram matrix; the bounds are worth something, and cuts more."""
    tight = []
    for (seed, kind), pattern in itertools.product(enumerate(KINDS * times), PATTERNS):
        weight, gram = random_weight(rows, n, seed + 1), random_gram(n, kind, seed)
        problem = LayerProblem(weight, gram, pattern)
        bound = lower_bound(problem, "sdp")
        exact = assert_below(bound.value, problem)
        assert_below(lower_bound(problem, "box").value, problem)
        cut = lower_bound(problem, "sdp", cuts=3)
        assert_below(cut.value, problem)
        assert bool((cut.gap(exact) <= bound.gap(exact) + 1e-9).all())
        good = exact > 1e-9 * problem.diagonal_mass()
        tight.append((bound.value / exact)[good])
    assert float(torch.cat(tight).median()) > 0.8


def test_bounds_of_singular_and_badly_scaled_rows_are_positive_where_they_can_be():
    scale = torch.logspace(-1.5, 1.5, 16, dtype=torch.float64)
    gram = random_gram(16, "full", 3) * scale.outer(scale)
    problem = LayerProblem(random_weight(4, 16, 7), gram, SPARSE)
    value = lower_bound(problem, "sdp").value
    assert bool((value > 0.02 * assert_below(value, problem)).all())
    zero = LayerProblem(torch.zeros(2, 8), torch.zeros(8, 8), HALF)
    for method in METHODS:
        assert lower_bound(zero, method).value.tolist() == [0.0, 0.0]


SETTLING = list(itertools.product(["full", "low-rank", "outliers"], PATTERNS))


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [SETTLING[4], *(pytest.param(*SETTLING[i], marks=pytest.mark.slow) for i in (0, 1, 2, 3, 5))],
    ids=str,
)
def test_the_default_sweeps_settle(kind, pattern):
    """Near what far more reach, whatever the layer: the penalty must not make them crawl."""
    problem = layer(1, 256, pattern, kind)
    bound, limit = lower_bound(problem, "sdp"), lower_bound(problem, "sdp", sweeps=10_000)
    assert float(bound.value) >= 0.985 * float(limit.value)
    assert max(bound.trace.correction.tolist()) <= 0.02


@pytest.mark.parametrize("kind", ["full", "outliers"])
def test_an_outlier_input_does_not_slow_the_rest(kind):
    """An input that no good mask prunes may weigh anything: the bound hardly moves."""
    problem = layer(1, 64, kind=kind)
    best = solve(problem, "swap").mask[0]
    heavy = problem.weight.clone()
    heavy[0, int(best.nonzero()[0])] = 100 * float(heavy.abs().max())
    bound = lower_bound(LayerProblem(heavy, problem.gram, problem.pattern), "sdp")
    assert float(bound.value) >= 0.95 * float(lower_bound(problem, "sdp").value)


@pytest.mark.parametrize(
    ("n", "size"),
    [
        *((24, size) for size in (1e6, 1e20, 1e100)),
        (260, 1e20),
        *(pytest.param(260, size, marks=pytest.mark.slow) for size in (1e6, 1e100)),
    ],
)
def test_a_weight_of_any_size_leaves_a_bound(n, size):
    problem = layer(1, n)
    best = solve(problem, "swap")
    weight = problem.weight.clone()
    weight[0, int(best.mask[0].nonzero()[0])] = size
    heavy = LayerProblem(weight, problem.gram, problem.pattern)
    for method in METHODS:
        value = float(lower_bound(heavy, method).value)
        assert 0 <= value <= float(best.objective) * (1 + 1e-9)


def test_duals_worth_nothing_leave_the_relaxation(monkeypatch):
    problem = layer(2, 24)
    box = lower_bound(problem, "box", steps=2000).value
    monkeypatch.setattr(sdp, "certify_row", lambda row, y, *more: certify_row(row, 0.02 * y, *more))
    assert bool((lower_bound(problem, "sdp").value >= box * 0.999).all())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_relaxation_beats_the_box(pattern):
    problem = layer(4, 32, pattern)
    box, found = lower_bound(problem, "box"), lower_bound(problem, "sdp")
    assert bool((found.value >= box.value).all())
    alone = torch.cat([lower_bound(problem.row(row), "sdp").value for row in range(4)])
    torch.testing.assert_close(found.value, alone, rtol=1e-3, atol=0)


def test_the_torch_sweep_reaches_the_bound_of_the_compiled_one():
    problem = layer(1, 32)
    row = ScaledRow.of(problem, problem.gram.numpy(), 0, float(Mixing(problem, 10, 0).scale[0]))
    values = []
    for sweeps, name in ((1, "sweep"), (600, "sweep_torch")):
        state, rho = Mixing(problem, 10, 0), 0.2
        for _ in range(sweeps):
            getattr(state, name)(*((600, rho) if sweeps == 1 else (rho,)))
        values.append(
            certify_row(row, state.duals[0].double().numpy(), state.inner()[0], rho).value
        )
    assert values[1] == pytest.approx(values[0], rel=0.02)


def test_verify_takes_a_certificate_and_refuses_more_than_it_proves(problem):
    found, bound = solve(problem, "elimination"), lower_bound(problem, "sdp")
    claimed(problem, found, bound)
    c = bound.certificate
    with pytest.raises(VerificationError, match="its certificate proves"):
        claimed(problem, found, bound, 1.001)
    # duals that promise more than they are worth: A is no longer semidefinite
    with pytest.raises(VerificationError, match="its certificate proves"):
        claimed(problem, found, bound, certificate=replace(c, diagonal=c.diagonal * 1.2))


def test_no_fraction_of_a_sign_or_an_input_is_cut_off(problem):
    """A cut of 1.9·z_i z_j is no triangle inequality, and proves whatever one likes."""
    c = lower_bound(problem, "sdp").certificate
    index, tau = torch.tensor([[-1, 0, 1], [-1, 2, 3]]), torch.ones(2, dtype=torch.float64)
    whole = Cuts(index, torch.tensor([[1, -1], [-1, -1]]), tau)
    assert bool((replace(c, cuts=[whole, None]).check(problem) >= 0).all())
    for bad in (
        replace(whole, sign=whole.sign * 1.9),
        replace(whole, sign=whole.sign.double()),
        replace(whole, index=whole.index + 0.5),
        replace(whole, sign=whole.sign * 1j),
    ):
        with pytest.raises(VerificationError, match="not whole numbers"):
            replace(c, cuts=[bad, None]).check(problem)


def test_a_shift_out_of_time_counts_its_steps_once(problem):
    plain, shifted = (lower_bound(problem, m, time_limit=0) for m in ("box", "shift"))
    assert shifted.trace.iterations.tolist() == plain.trace.iterations.tolist()
    assert shifted.trace.shifted == ("no", "no")
    assert shifted.value.tolist() == plain.value.tolist()
    for method in METHODS:
        assert_below(lower_bound(problem, method, time_limit=0).value, problem)


def test_an_indefinite_gram_that_was_never_checked_is_still_bounded_validly():
    gram = random_gram(8, "full", 1) - 0.8 * torch.eye(8, dtype=torch.float64)
    problem = LayerProblem(random_weight(3, 8, 1), gram, HALF, assume_psd=True)
    q = torch.stack([problem.row(i).q() for i in range(3)])
    sets = torch.zeros(70, 8, dtype=torch.float64)
    for row, chosen in enumerate(itertools.combinations(range(8), 4)):
        sets[row, list(chosen)] = 1
    true = torch.einsum("si,rij,sj->rs", sets, q, sets).min(1).values
    for method in METHODS[::2]:
        value = lower_bound(problem, method).value
        assert bool((value <= true.clamp(min=0) + 1e-12).all())


def test_a_shift_of_a_singular_gram_in_float32():
    """It is semidefinite up to its rounding only, and still can be shifted (by nothing)."""
    problem = layer(4, 128, kind="low-rank", dtype=torch.float32)
    box, shift = lower_bound(problem, "box").value, lower_bound(problem, "shift").value
    assert bool((shift >= 0.99 * box).all())
    assert bool((shift <= solve(problem, "swap").objective).all())


def test_rows_that_no_time_is_left_for_are_relaxed(monkeypatch):
    """One chunk of sweeps for a few rows, one certification, and the box relaxation for the others."""
    problem, certified = layer(60, 24, HALF), []
    monkeypatch.setattr(sdp, "certify_row", lambda *x: certified.append(x) or certify_row(*x))
    bound = lower_bound(problem, "sdp", time_limit=0)
    assert len(certified) == 1
    assert set(bound.trace.iterations.tolist()) == {0, 20}
    assert int((bound.trace.iterations > 0).sum()) <= 4 * torch.get_num_threads()
    assert bool((bound.value <= solve(problem, "swap").objective).all())
    assert bool(bound.trace.correction.isnan().any())


@pytest.mark.parametrize(
    ("method", "options", "kind", "message"),
    [
        ("bx", {}, UnknownSolverError, "did you mean 'box'"),
        ("sdp", {"sweps": 3}, OptionError, "did you mean 'sweeps'"),
        ("sdp", {"sweeps": 0}, OptionError, "sweeps"),
        ("sdp", {"cuts": -1}, OptionError, "cuts must be a whole number ≥ 0"),
        ("box", {"time_limit": -1}, OptionError, "time_limit"),
        ("shift", {"kind": "odd"}, OptionError, "kind"),
    ],
)
def test_bad_input_is_named(problem, method, options, kind, message):
    with pytest.raises(kind, match=message):
        lower_bound(problem, method, **options)
    assert set(METHODS) <= set(available_bounds())
    assert ENTRY_POINT_GROUP == "maskopt.bounds"


@pytest.mark.parametrize(
    "pattern", [SPARSE, pytest.param(NM(2, 4), marks=pytest.mark.slow)], ids=str
)
def test_the_conic_solver_and_the_low_rank_method_agree(pattern):
    pytest.importorskip("scs")
    problem = layer(2, 16, pattern)
    conic, low_rank = lower_bound(problem, "sdp-conic"), lower_bound(problem, "sdp", sweeps=3000)
    torch.testing.assert_close(conic.value, low_rank.value, rtol=0.005, atol=0)
    best = solve(problem, "branch", workers=0).objective
    assert bool((conic.value <= best).all())
    crude = lower_bound(problem, "sdp-conic", tolerance=0.1, max_iterations=3)
    assert bool((crude.value <= best).all())
    big = LayerProblem(torch.ones(1, 300), torch.eye(300), HALF)
    with pytest.raises(SolverError, match="at most 200"):
        lower_bound(big, "sdp-conic")


@pytest.mark.parametrize("kind", ["diagonal", "uniform"])
@pytest.mark.parametrize("seed", range(4))
def test_no_row_is_bounded_worse_with_the_shift(kind, seed):
    """Some entries of the best shift are negative here."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(100, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    weight = torch.randn(6, 24, generator=generator)
    problem = LayerProblem(weight, inputs.T @ inputs / 100, HALF)
    box, shift = lower_bound(problem, "box"), lower_bound(problem, "shift", kind=kind)
    assert bool((shift.value >= box.value * (1 - 1e-9)).all())
