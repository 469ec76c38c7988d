"""No bound is ever above the optimum: against enumeration, with crude, random and forged duals."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import problems, random_gram, random_weight

from maskopt import (
    NM,
    Certificate,
    LayerProblem,
    Solution,
    Unstructured,
    lower_bound,
    solve,
    verify,
)
from maskopt.bounds import ENTRY_POINT_GROUP, available_bounds
from maskopt.certificate import Cuts
from maskopt.errors import OptionError, SolverError, UnknownSolverError, VerificationError

METHODS = ("box", "shift", "sdp")


def assert_below(value, problem):
    exact = solve(problem, "exhaustive").objective
    # what float64 can tell of the enumerated objective itself
    noise = 1e-13 * problem.diagonal_mass()
    assert bool((value <= exact + noise).all()), (value - exact).max()
    assert bool((value >= 0).all())
    return exact


@pytest.mark.parametrize("method", METHODS)
@given(problems(max_n=10, max_rows=6))
@settings(max_examples=60)
def test_no_bound_is_above_the_optimum(method, problem):
    bound = lower_bound(problem, method)
    assert_below(bound.value, problem)


@given(problems(max_n=9, max_rows=8), st.integers(0, 2**31), st.floats(-6, 6))
@settings(max_examples=300)
def test_random_duals_and_points_are_valid(problem, seed, size):
    """A certificate out of thin air proves little, and never too much."""
    generator = torch.Generator().manual_seed(seed)
    rows, n = problem.weight.shape
    groups = n // problem.group_size
    unit = problem.diagonal_mass()[:, None] * 10**size / n

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    cuts = None
    if n >= 3 and seed % 2:
        index = [torch.randperm(n + 1, generator=generator)[:3] - 1 for _ in range(5)]
        sign = 2 * torch.randint(0, 2, (5, 2), generator=generator, dtype=torch.int8) - 1
        tau = noise(rows, 5).abs() * unit
        cuts = [Cuts(torch.stack(index), sign, tau[r]) for r in range(rows)]
    certificate = Certificate(
        noise(rows, n) * unit,
        noise(rows, groups) * unit,
        noise(rows, n),
        noise(rows, groups, n) * unit[..., None] if seed % 3 == 0 else None,
        cuts,
    )
    assert_below(certificate.check(problem), problem)


@given(problems(max_n=10, max_rows=4), st.integers(1, 3), st.integers(0, 100))
@settings(max_examples=100)
def test_a_deliberately_crude_solve_is_valid(problem, sweeps, seed):
    bound = lower_bound(problem, "sdp", sweeps=sweeps, rank=2, seed=seed)
    assert_below(bound.value, problem)


def test_hundreds_of_small_rows():
    """500 rows, both patterns, every kind of Gram matrix; and the bounds are worth something."""
    tight = []
    for seed, kind in enumerate(("full", "low-rank", "zero-columns", "duplicates", "outliers") * 2):
        for pattern in (Unstructured(sparsity=0.6), NM(keep=2, of=4)):
            problem = LayerProblem(
                random_weight(25, 8, seed + 1), random_gram(8, kind, seed), pattern
            )
            bound = lower_bound(problem, "sdp")
            exact = assert_below(bound.value, problem)
            assert_below(lower_bound(problem, "box").value, problem)
            good = exact > 1e-9 * problem.diagonal_mass()
            tight.append((bound.value / exact)[good])
    ratio = torch.cat(tight)
    assert float(ratio.median()) > 0.8


def test_bounds_of_singular_and_badly_scaled_rows_are_positive_where_they_can_be():
    gram = random_gram(16, "full", 3) * torch.logspace(-1.5, 1.5, 16, dtype=torch.float64).outer(
        torch.logspace(-1.5, 1.5, 16, dtype=torch.float64)
    )
    problem = LayerProblem(random_weight(4, 16, 7), gram, Unstructured(0.6))
    exact = assert_below(lower_bound(problem, "sdp").value, problem)
    assert bool((lower_bound(problem, "sdp").value > 0.02 * exact).all())
    zero = LayerProblem(torch.zeros(2, 8), torch.zeros(8, 8), Unstructured(0.5))
    for method in METHODS:
        assert lower_bound(zero, method).value.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4)], ids=str)
@pytest.mark.parametrize("kind", ["full", "low-rank", "outliers"])
def test_the_default_sweeps_settle(kind, pattern):
    """Near what far more reach, whatever the layer: the penalty must not make them crawl."""
    problem = LayerProblem(random_weight(1, 256, 1), random_gram(256, kind, 2), pattern)
    bound, limit = lower_bound(problem, "sdp"), lower_bound(problem, "sdp", sweeps=10_000)
    assert float(bound.value) >= 0.985 * float(limit.value)
    assert max(bound.trace.correction.tolist()) <= 0.02


@pytest.mark.parametrize("kind", ["full", "outliers"])
def test_an_outlier_input_does_not_slow_the_rest(kind):
    """An input that no good mask prunes may weigh anything: the bound hardly moves."""
    problem = LayerProblem(random_weight(1, 128, 1), random_gram(128, kind, 2), Unstructured(0.6))
    best = solve(problem, "swap").mask[0]
    heavy = problem.weight.clone()
    heavy[0, int(best.nonzero()[0])] = 100 * float(heavy.abs().max())
    bound = lower_bound(LayerProblem(heavy, problem.gram, problem.pattern), "sdp")
    assert float(bound.value) >= 0.95 * float(lower_bound(problem, "sdp").value)


@pytest.mark.parametrize("size", [1e6, 1e20, 1e100])
@pytest.mark.parametrize("n", [24, 260])
def test_a_weight_of_any_size_leaves_a_bound(n, size):
    problem = LayerProblem(random_weight(1, n, 1), random_gram(n, "full", 2), Unstructured(0.6))
    best = solve(problem, "swap")
    weight = problem.weight.clone()
    weight[0, int(best.mask[0].nonzero()[0])] = size
    heavy = LayerProblem(weight, problem.gram, problem.pattern)
    for method in METHODS:
        value = float(lower_bound(heavy, method).value)
        assert 0 <= value <= float(best.objective) * (1 + 1e-9)


def test_duals_worth_nothing_leave_the_relaxation(monkeypatch):
    from maskopt.solvers.bounds import sdp

    problem = LayerProblem(random_weight(2, 24, 1), random_gram(24, "full", 2), Unstructured(0.6))
    original = sdp.certify_row

    def spoilt(row, y, inner, rho):
        return original(row, 0.02 * y, inner, rho)

    box = lower_bound(problem, "box", steps=2000).value
    monkeypatch.setattr(sdp, "certify_row", spoilt)
    assert bool((lower_bound(problem, "sdp").value >= box * 0.999).all())


def test_sdp_beats_box_and_both_patterns_agree_with_batches():
    for pattern in (Unstructured(0.6), NM(2, 4)):
        problem = LayerProblem(random_weight(4, 32, 1), random_gram(32, "full", 2), pattern)
        box, sdp = lower_bound(problem, "box"), lower_bound(problem, "sdp")
        assert bool((sdp.value >= box.value).all())
        alone = torch.cat([lower_bound(problem.row(i), "sdp").value for i in range(4)])
        torch.testing.assert_close(sdp.value, alone, rtol=1e-3, atol=0)


def test_the_torch_sweep_reaches_the_bound_of_the_compiled_one():
    from maskopt.solvers.convex.duals import ScaledRow, certify_row
    from maskopt.solvers.convex.mixing import Mixing

    problem = LayerProblem(random_weight(2, 48, 1), random_gram(48, "full", 2), Unstructured(0.6))
    values = []
    for torch_sweeps in (False, True):
        state, rho = Mixing(problem, 10, 0), 0.2
        if torch_sweeps:
            for _ in range(600):
                state.sweep_torch(rho)
        else:
            state.sweep(600, rho)
        values.append(
            certify_row(
                ScaledRow.of(problem, problem.gram.numpy(), 0, float(state.scale[0])),
                state.duals[0].double().numpy(),
                state.inner()[0],
                rho,
            ).value
        )
    assert values[1] == pytest.approx(values[0], rel=0.02)


@pytest.fixture
def problem():
    return LayerProblem(random_weight(2, 12, 1), random_gram(12, "full", 2), Unstructured(0.5))


def test_verify_takes_a_certificate_and_rejects_forgeries(problem):
    bound = lower_bound(problem, "sdp")
    mask = solve(problem, "elimination").mask
    honest = Solution.of(problem, mask, lower_bound=bound.value, certificate=bound.certificate)
    verify(problem, honest)
    c = bound.certificate
    forged_bound = replace(honest, lower_bound=honest.lower_bound * 1.001)
    with pytest.raises(VerificationError, match="its certificate proves"):
        verify(problem, forged_bound)
    # duals that promise more than they are worth: A is no longer semidefinite
    forgeries = {
        "its certificate proves": replace(c, diagonal=c.diagonal * 1.2),
        "float64": replace(c, point=c.point.float()),
        "NaN": replace(c, point=c.point * torch.nan),
        "penalty must": replace(c, penalty=c.penalty[:, :0]),
    }
    cut = Cuts(torch.tensor([[0, 1, 2]]), torch.tensor([[1, 1]]), torch.tensor([1.0]).double())
    for reason, bad in {
        "negative multiplier": replace(cut, multiplier=-cut.multiplier),
        "twice": replace(cut, index=torch.tensor([[0, 1, 1]])),
        "outside": replace(cut, index=torch.tensor([[0, 1, 12]])),
        "not ±1": replace(cut, sign=torch.tensor([[1, 2]])),
        "inputs or signs that are not whole": replace(cut, sign=torch.tensor([[1.9, 1.0]])),
    }.items():
        forgeries[reason] = replace(c, cuts=[bad, None])
    for reason, forged in forgeries.items():
        with pytest.raises(VerificationError, match=reason):
            verify(problem, replace(honest, certificate=forged))


def test_no_fraction_of_a_sign_or_an_input_is_cut_off(problem):
    """A cut of 1.9·z_i z_j is no triangle inequality, and proves whatever one likes."""
    c = lower_bound(problem, "sdp").certificate
    index = torch.tensor([[-1, 0, 1], [-1, 2, 3]])
    tau = torch.ones(2, dtype=torch.float64)
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


def test_a_shift_out_of_time_tells_its_steps_once(problem):
    plain, shifted = (lower_bound(problem, m, time_limit=0) for m in ("box", "shift"))
    assert shifted.trace.iterations.tolist() == plain.trace.iterations.tolist()
    assert shifted.trace.shifted == ("no", "no")
    assert shifted.value.tolist() == plain.value.tolist()


def test_an_indefinite_gram_that_was_never_checked_is_still_bounded_validly():
    gram = random_gram(8, "full", 1) - 0.8 * torch.eye(8, dtype=torch.float64)
    problem = LayerProblem(random_weight(3, 8, 1), gram, Unstructured(0.5), assume_psd=True)
    q = torch.stack([problem.row(i).q() for i in range(3)])
    import itertools

    sets = torch.zeros(70, 8, dtype=torch.float64)
    for row, chosen in enumerate(itertools.combinations(range(8), 4)):
        sets[row, list(chosen)] = 1
    true = torch.einsum("si,rij,sj->rs", sets, q, sets).min(1).values
    for method in METHODS[::2]:
        value = lower_bound(problem, method).value
        assert bool((value <= true.clamp(min=0) + 1e-12).all())


def test_a_shift_of_a_singular_gram_in_float32():
    """It is semidefinite up to its rounding only, and still can be shifted (by nothing)."""
    problem = LayerProblem(
        random_weight(4, 128, 1, torch.float32),
        random_gram(128, "low-rank", 2, torch.float32),
        Unstructured(0.6),
    )
    box, shift = lower_bound(problem, "box").value, lower_bound(problem, "shift").value
    assert bool((shift >= 0.99 * box).all())
    assert bool((shift <= solve(problem, "swap").objective).all())


def test_time_limit_zero_still_bounds(problem):
    for method in METHODS:
        assert_below(lower_bound(problem, method, time_limit=0).value, problem)


def test_rows_that_no_time_is_left_for_are_relaxed(monkeypatch):
    """One chunk of sweeps for a few rows, one certification, and the box relaxation for the others."""
    from maskopt.solvers.bounds import sdp

    problem = LayerProblem(random_weight(60, 24, 1), random_gram(24, "full", 2), Unstructured(0.5))
    certified = []
    original = sdp.certify_row

    def counting(*arguments):
        certified.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(sdp, "certify_row", counting)
    bound = lower_bound(problem, "sdp", time_limit=0)
    assert len(certified) == 1
    assert set(bound.trace.iterations.tolist()) == {0, 20}
    assert int((bound.trace.iterations > 0).sum()) <= 4 * torch.get_num_threads()
    assert bool((bound.value <= solve(problem, "swap").objective).all())
    assert bool(bound.trace.correction.isnan().any())


def test_bad_input_is_named(problem):
    with pytest.raises(UnknownSolverError, match="did you mean 'box'"):
        lower_bound(problem, "bx")
    with pytest.raises(OptionError, match="did you mean 'sweeps'"):
        lower_bound(problem, "sdp", sweps=3)
    with pytest.raises(OptionError, match="sweeps"):
        lower_bound(problem, "sdp", sweeps=0)
    with pytest.raises(OptionError, match="time_limit"):
        lower_bound(problem, "box", time_limit=-1)
    with pytest.raises(OptionError, match="kind"):
        lower_bound(problem, "shift", kind="odd")
    assert set(METHODS) <= set(available_bounds())
    assert ENTRY_POINT_GROUP == "maskopt.bounds"


def test_the_conic_solver_and_the_low_rank_method_agree():
    pytest.importorskip("scs")
    for pattern in (Unstructured(0.6), NM(2, 4)):
        problem = LayerProblem(random_weight(2, 24, 1), random_gram(24, "full", 2), pattern)
        conic, sdp = (
            lower_bound(problem, "sdp-conic"),
            lower_bound(problem, "sdp", sweeps=3000),
        )
        torch.testing.assert_close(conic.value, sdp.value, rtol=0.005, atol=0)
        best = solve(problem, "branch", workers=0).objective
        assert bool((conic.value <= best).all())
        crude = lower_bound(problem, "sdp-conic", tolerance=0.1, max_iterations=3)
        assert bool((crude.value <= best).all())
    big = LayerProblem(torch.ones(1, 300), torch.eye(300), Unstructured(0.5))
    with pytest.raises(SolverError, match="at most 200"):
        lower_bound(big, "sdp-conic")


@pytest.mark.parametrize("kind", ["diagonal", "uniform"])
@pytest.mark.parametrize("seed", range(4))
def test_no_row_is_bounded_worse_with_the_shift(kind, seed):
    """Some entries of the best shift are negative here."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(100, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    problem = LayerProblem(
        torch.randn(6, 24, generator=generator), inputs.T @ inputs / 100, Unstructured(0.5)
    )
    box, shift = lower_bound(problem, "box"), lower_bound(problem, "shift", kind=kind)
    assert bool((shift.value >= box.value * (1 - 1e-9)).all())
