"""F, the objective of refitted weights: what it is, where it goes along, and who refuses it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import KINDS, problems, random_gram, random_linear, random_weight

from maskopt import (
    NM,
    Certificate,
    LayerProblem,
    Refit,
    RowProblem,
    Solution,
    Unstructured,
    available_bounds,
    available_solvers,
    improving_swap,
    load_problem,
    lower_bound,
    refit,
    solve,
    verify,
)
from maskopt.compare import compare
from maskopt.errors import (
    MaskoptError,
    OptionError,
    ProblemError,
    SolverError,
    VerificationError,
)
from maskopt.files import read_arrays, write_arrays
from maskopt.solver import make_start

PATTERNS = (Unstructured(keep=9), NM(keep=2, of=4))
DAMPINGS = (0.0, 0.01, 0.3)
KEEPING = [name for name, info in available_solvers().items() if not info.capabilities.refit]


def layer(pattern=PATTERNS[0], rows=4, n=16, kind="full", damping=0.01, linear=False, seed=1):
    weight, gram = random_weight(rows, n, seed), random_gram(n, kind, seed + 1)
    part = random_linear(weight, gram, seed + 2) if linear else None
    return LayerProblem(weight, gram, pattern, linear=part, refit=Refit(damping))


def metric(problem):
    """A in float64, from its definition."""
    gram = problem.gram.double()
    ridge = max(problem.refit.damping, 1e-6) * gram.diagonal().mean()
    return gram + ridge * torch.eye(len(gram), dtype=torch.float64)


def dense(problem, mask):
    """F and v of every row by the eigenvectors of A_SS."""
    a, weight = metric(problem), problem.weight.double()
    value, best = torch.zeros(problem.rows, dtype=torch.float64), torch.zeros_like(weight)
    for row, w in enumerate(weight):
        g, c = torch.zeros_like(w), 0.0
        if problem.linear is not None:
            g, c = problem.linear.correlation[row], problem.linear.constant[row]
        kept = mask[row].nonzero()[:, 0]
        values, vectors = torch.linalg.eigh(a[kept][:, kept])
        best[row, kept] = vectors @ (vectors.T @ (a[kept] @ w + g[kept]) / values)
        lost = w - best[row]
        value[row] = lost @ a @ lost + 2 * g @ lost + c
    return value, best


def assert_equal_but_for_rounding(problem, found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=rounding(problem))


def rounding(problem):
    return 1e-12 * float(problem.diagonal_mass().max()) + 1e-300


def random_mask(problem, seed=0):
    return solve(problem.refitting(None), "random", seed=seed).mask


def permuted(problem, order):
    """The same rows with their inputs in another order."""
    linear = problem.linear
    if linear is not None:
        linear = replace(linear, correlation=linear.correlation[:, order])
    gram = problem.gram[order][:, order]
    weight = problem.weight[:, order]
    return LayerProblem(weight, gram, problem.pattern, linear=linear, refit=problem.refit)


@given(problems(), st.sampled_from(DAMPINGS))
def test_it_is_the_least_over_all_weights_on_what_is_kept(problem, damping):
    problem = problem.refitting(Refit(damping))
    mask = random_mask(problem)
    value, _ = dense(problem, mask)
    assert_equal_but_for_rounding(problem, problem.objective(mask), value.clamp(min=0.0))
    best = problem.weights(mask)
    for size in (1e-3, 1.0):
        other = best + size * torch.where(mask, torch.randn_like(best), 0.0)
        assert bool((problem.damped_error(other) >= value - rounding(problem)).all())


@given(problems(linear=False), st.sampled_from(DAMPINGS))
def test_it_is_the_optimal_brain_surgeons_price_of_the_pruned_set(problem, damping):
    if not bool(problem.gram.any()):
        return
    problem = problem.refitting(Refit(damping))
    mask = random_mask(problem)
    values, vectors = torch.linalg.eigh(metric(problem))
    inverse = vectors / values @ vectors.T
    for row in range(problem.rows):
        pruned = ~mask[row]
        w = problem.weight[row, pruned]
        price = w @ torch.linalg.solve(inverse[pruned][:, pruned], w)
        # H has the condition of A: 1e-16 · 1e6 · n of the price
        slack = 1e-8 * float(price) + rounding(problem)
        assert abs(float(problem.objective(mask)[row] - price)) <= slack


@given(problems(), st.sampled_from(DAMPINGS))
def test_it_is_at_most_f_in_the_same_metric(problem, damping):
    mask = random_mask(problem.refitting(Refit(damping)))
    lost = torch.where(mask, 0.0, problem.weight).square().sum(1)
    ridge = max(damping, 1e-6) * problem.gram.diagonal().mean()
    f = problem.objective(mask) + ridge * lost
    refitted = problem.refitting(Refit(damping)).objective(mask)
    assert bool((refitted <= f * (1 + 1e-12)).all())


@given(problems(), st.sampled_from(DAMPINGS))
def test_more_kept_never_costs_more(problem, damping):
    """F of a set is at least F of any part of it: both are least over weights, and here over more."""
    problem = problem.under(Unstructured(keep=problem.n)).refitting(Refit(damping))
    mask = torch.ones(problem.rows, problem.n, dtype=torch.bool)
    before = problem.objective(mask)
    for column in torch.randperm(problem.n).tolist():
        mask[:, column] = False
        now = problem.objective(mask)
        assert bool((now >= before * (1 - 1e-9) - rounding(problem)).all())
        before = now


@pytest.mark.parametrize("linear", [False, True], ids=["plain", "linear"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_solve_the_normal_equations_and_cost_what_is_said(
    kind, damping, pattern, linear
):
    problem = layer(pattern, kind=kind, damping=damping, linear=linear)
    mask = random_mask(problem)
    weight = problem.weights(mask)
    assert weight.dtype == torch.float64
    assert bool((weight[~mask] == 0).all())
    assert torch.equal(problem.damped_error(weight), problem.objective(mask))
    g = 0.0 if problem.linear is None else problem.linear.correlation
    target = problem.weight @ metric(problem) + g
    rest = torch.where(mask, target - weight @ metric(problem), 0.0)
    assert bool((rest.norm(dim=1) <= 1e-9 * target.norm(dim=1)).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_float32_inputs_are_refitted_in_float64(kind, damping):
    weight, gram = random_weight(4, 64, 1).float(), random_gram(64, kind, 2, torch.float32)
    narrow = LayerProblem(weight, gram, Unstructured(0.5), refit=Refit(damping))
    wide = LayerProblem(weight.double(), gram.double(), Unstructured(0.5), refit=Refit(damping))
    mask = random_mask(wide)
    assert_equal_but_for_rounding(wide, narrow.objective(mask), wide.objective(mask))
    verify(narrow, solve(narrow, "random"))


def test_an_input_that_is_indefinite_by_rounding_counts_as_it_is():
    """G of float32 has negative eigenvalues of 1e-7 of its trace; A has not, and F is a form of A alone."""
    x = torch.randn(4, 12, dtype=torch.float64)
    gram = x.T @ x / 4
    gram -= 0.5e-6 * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    problem = LayerProblem(random_weight(6, 12, 1), gram, Unstructured(keep=6), refit=Refit(0))
    mask = random_mask(problem)
    value, best = dense(problem, mask)
    lost = problem.weight - best
    below = (lost @ gram * lost).sum(1) < 0
    assert bool(below.any())
    torch.testing.assert_close(problem.objective(mask), value, rtol=1e-6, atol=0)
    verify(problem, solve(problem, "swap", start=mask))


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("linear", [False, True], ids=["plain", "linear"])
def test_nothing_kept_and_everything(damping, linear):
    nothing = layer(Unstructured(keep=0), damping=damping, linear=linear)
    mask = torch.zeros(4, 16, dtype=torch.bool)
    expected = (nothing.weight @ metric(nothing) * nothing.weight).sum(1)
    if linear:
        expected += 2 * (nothing.weight * nothing.linear.correlation).sum(1)
        expected += nothing.linear.constant
    assert_equal_but_for_rounding(nothing, nothing.objective(mask), expected)
    assert not nothing.weights(mask).any()
    everything = layer(Unstructured(keep=16), damping=damping, linear=linear)
    objective, weights = everything.objective(~mask), everything.weights(~mask)
    if linear:
        g, inverse = everything.linear.correlation, torch.linalg.inv(metric(everything))
        torch.testing.assert_close(weights, everything.weight + g @ inverse, rtol=1e-7, atol=1e-9)
        rest = everything.linear.constant - (g @ inverse * g).sum(1)
        assert_equal_but_for_rounding(everything, objective, rest)
    else:
        torch.testing.assert_close(weights, everything.weight, rtol=1e-9, atol=1e-11)
        assert bool((objective <= rounding(everything)).all())


@pytest.mark.parametrize("linear", [False, True], ids=["plain", "linear"])
@pytest.mark.parametrize("damping", DAMPINGS)
def test_other_orders_scales_and_batches_give_the_same(damping, linear):
    problem = layer(damping=damping, linear=linear)
    mask = random_mask(problem)
    whole = problem.objective(mask)
    order = torch.randperm(16)
    moved = permuted(problem, order)
    torch.testing.assert_close(moved.objective(mask[:, order]), whole, rtol=1e-9, atol=0)
    for i in range(problem.rows):
        assert problem.row(i).objective(mask[i]) == pytest.approx(float(whole[i]), rel=1e-12)
        alone = problem.row(i).weights(mask[i])
        torch.testing.assert_close(alone, problem.weights(mask)[i], rtol=1e-9, atol=1e-12)
    part = problem.linear
    if linear:
        part = replace(part, correlation=part.correlation * 32, constant=part.constant * 256)
    scaled = LayerProblem(
        problem.weight * 8, problem.gram * 4, problem.pattern, linear=part, refit=Refit(damping)
    )
    torch.testing.assert_close(scaled.objective(mask), whole * 256, rtol=1e-9, atol=0)


@pytest.mark.parametrize("weight_scale", [1e-40, 1e-20, 1e20])
@pytest.mark.parametrize("gram_scale", [1e-30, 1e30])
def test_extreme_scales(weight_scale, gram_scale):
    plain = layer(Unstructured(keep=12), n=24, kind="outliers")
    mask = random_mask(plain)
    weight, gram = (plain.weight * weight_scale).float(), (plain.gram * gram_scale).float()
    problem = LayerProblem(weight, gram, plain.pattern, refit=Refit(0.01))
    wide = LayerProblem(weight.double(), gram.double(), plain.pattern, refit=Refit(0.01))
    value, _ = dense(wide, mask)
    torch.testing.assert_close(problem.objective(mask), value, rtol=1e-7, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_inputs_without_anything_make_every_mask_as_good_as_any(pattern):
    gram = torch.zeros(16, 16, dtype=torch.float64)
    problem = LayerProblem(random_weight(3, 16, 1), gram, pattern, refit=Refit(0.01))
    for solver in ("worst", "swap", "exhaustive" if isinstance(pattern, NM) else "admm"):
        solution = solve(problem, solver)
        assert solution.objective.tolist() == [0.0, 0.0, 0.0]
        verify(problem, solution)
        for row in range(3):
            assert improving_swap(problem.row(row), solution.mask[row]) is None
    history = solve(problem, "swap", start="worst").trace.history
    assert not history.any()
    assert bool(torch.isfinite(problem.weights(solution.mask)).all())


def test_rows_without_weights_cost_nothing():
    problem = layer()
    problem = LayerProblem(
        problem.weight * torch.tensor([[1.0], [0.0], [1.0], [0.0]]),
        problem.gram,
        problem.pattern,
        refit=problem.refit,
    )
    objective = solve(problem, "swap", start="random").objective
    assert (objective == 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize("linear", [False, True], ids=["plain", "linear"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_file_holds_it(tmp_path, pattern, linear):
    problem = layer(pattern, damping=0.03, linear=linear)
    mask = random_mask(problem)
    problem.save(tmp_path / "layer.npz")
    problem.row(2).save(tmp_path / "row.npz")
    for read in (LayerProblem.load, load_problem):
        whole = read(tmp_path / "layer.npz")
        assert whole.refit == Refit(0.03)
        assert torch.equal(whole.objective(mask), problem.objective(mask))
    for read in (RowProblem.load, load_problem):
        row = read(tmp_path / "row.npz")
        assert row.refit == Refit(0.03)
        assert row.objective(mask[2]) == problem.row(2).objective(mask[2])
    problem.refitting(None).save(tmp_path / "kept.npz")
    assert LayerProblem.load(tmp_path / "kept.npz").refit is None


@pytest.mark.parametrize(
    "words", [{"damping": -1.0}, {"damping": "x"}, {}, {"damping": 0.1, "more": 1}, 0.01, [0.01]]
)
def test_a_file_that_tells_it_wrongly_is_refused(tmp_path, words):
    layer().save(tmp_path / "layer.npz")
    header, arrays = read_arrays(tmp_path / "layer.npz", "layer")
    rest = {k: v for k, v in header.items() if k not in ("format", "kind", "refit")}
    arrays = {k: v for k, v in arrays.items() if k != "header"}
    write_arrays(tmp_path / "forged.npz", "layer", {**rest, "refit": words}, arrays)
    with pytest.raises(MaskoptError, match=r"damping|kept weights are refitted"):
        load_problem(tmp_path / "forged.npz")


def test_a_file_from_before_there_was_a_refit_keeps_its_weights(tmp_path):
    layer().save(tmp_path / "layer.npz")
    header, arrays = read_arrays(tmp_path / "layer.npz", "layer")
    rest = {k: v for k, v in header.items() if k not in ("format", "kind", "refit")}
    arrays = {k: v for k, v in arrays.items() if k != "header"}
    write_arrays(tmp_path / "old.npz", "layer", rest, arrays)
    assert load_problem(tmp_path / "old.npz").refit is None


def test_rows_parts_and_other_patterns_keep_it():
    problem = layer(linear=True, damping=0.1)
    mask = random_mask(problem)
    assert problem.row(1).refit == problem.take([0, 2]).refit == Refit(0.1)
    some = problem.take([0, 2])
    torch.testing.assert_close(some.objective(mask[[0, 2]]), problem.objective(mask)[[0, 2]])
    other = problem.under(NM(keep=1, of=2))
    assert other.refit == Refit(0.1)
    assert torch.equal(other.objective(mask), problem.objective(mask))


def test_a_restricted_row_is_damped_by_the_inputs_that_are_left():
    problem = layer(kind="outliers", linear=True)
    columns = [14, 3, 0, 7, 8, 1]
    row = problem.row(1).restrict(columns, Unstructured(keep=3))
    assert row.refit == problem.refit
    alone = row.as_layer()
    mask = random_mask(alone)
    expected, _ = dense(alone, mask)
    assert row.objective(mask[0]) == pytest.approx(float(expected), rel=1e-9)
    verify(row, solve(row, "exhaustive"))


def test_a_restricted_row_that_the_damping_leaves_indefinite_is_refused_like_any():
    """What is rounding beside a large input can be too much where that one is gone."""
    gram = torch.eye(6)
    gram[0, 0] = 1e6
    gram[1, 2] = gram[2, 1] = 1.01
    row = LayerProblem(torch.ones(1, 6), gram, Unstructured(0.5), refit=Refit(0)).row(0)
    with pytest.raises(ProblemError, match="damping"):
        row.restrict([1, 2, 3, 4])


def test_the_other_objective_of_the_same_rows():
    problem = layer(damping=0.01)
    mask = random_mask(problem)
    kept = problem.refitting(None)
    f = ((problem.weight * ~mask) @ problem.gram * (problem.weight * ~mask)).sum(1)
    torch.testing.assert_close(kept.objective(mask), f, rtol=1e-12, atol=0)
    assert torch.equal(kept.weights(mask), problem.weight * mask)
    assert kept.gram.data_ptr() == problem.gram.data_ptr()
    more = problem.refitting(Refit(0.3))
    assert_equal_but_for_rounding(more, more.objective(mask), dense(more, mask)[0])
    assert problem.refit == Refit(0.01)
    assert_equal_but_for_rounding(problem, problem.objective(mask), dense(problem, mask)[0])
    with pytest.raises(ProblemError, match=r"refit=Refit\(damping\)"):
        _ = kept.least_squares


def test_refitting_any_mask_gives_the_weights_that_it_is_the_price_of():
    problem = layer(damping=0.05, linear=True)
    mask = random_mask(problem)
    found = refit(problem, mask)
    torch.testing.assert_close(found.weight, problem.weights(mask), rtol=1e-9, atol=1e-12)
    moved = (problem.weight - found.weight).square().sum(1)
    price = found.error + 0.05 * problem.gram.diagonal().mean() * moved
    torch.testing.assert_close(problem.objective(mask), price, rtol=1e-9, atol=0)


def test_the_two_objectives_are_not_taken_for_each_other():
    problem = layer()
    kept, refitted = solve(problem.refitting(None), "random"), solve(problem, "random")
    assert torch.equal(kept.mask, refitted.mask)
    verify(problem, refitted)
    verify(problem.refitting(None), kept)
    for one, other in ((problem, kept), (problem.refitting(None), refitted)):
        with pytest.raises(VerificationError, match="objective: row 0"):
            verify(one, other)


def one_line(error):
    text = str(error.value)
    return len(text) < 250 and "\n" not in text


@pytest.mark.parametrize("solver", KEEPING)
def test_solvers_that_know_f_alone_refuse(solver):
    problem = layer(Unstructured(keep=4), rows=1, n=8)
    with pytest.raises(SolverError, match=f"'{solver}' chooses for weights as they are") as error:
        solve(problem, solver)
    assert one_line(error)


def test_there_are_such_solvers_and_others():
    assert {"tabu", "scip", "branch", "relax"} <= set(KEEPING)
    assert {"swap", "admm", "exhaustive", "wanda"}.isdisjoint(KEEPING)


@pytest.mark.parametrize("method", list(available_bounds()))
def test_bounds_refuse(method):
    problem = layer(Unstructured(keep=4), rows=1, n=8)
    with pytest.raises(SolverError, match="bounds are of weights as they are") as error:
        lower_bound(problem, method)
    assert one_line(error)


def test_a_certificate_and_a_quadratic_form_refuse():
    problem = layer()
    kept = problem.refitting(None)
    certificate = Certificate.box(kept, torch.zeros(4, 16))
    assert bool((certificate.check(kept) >= 0).all())
    with pytest.raises(VerificationError, match="proves nothing of refitted weights") as error:
        certificate.check(problem)
    assert one_line(error)
    with pytest.raises(ProblemError, match="no quadratic form of the mask") as error:
        problem.row(0).q()
    assert one_line(error)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("maker", ["relax", "elimination"])
def test_a_solver_that_knows_f_alone_makes_a_start_all_the_same(pattern, maker):
    problem = layer(pattern)
    start = make_start(problem.refitting(None), maker).mask
    stopped = solve(problem, "swap", start=maker, max_swaps=0)
    assert torch.equal(stopped.mask, start)
    assert torch.equal(solve(problem, "swap", start=maker).mask, solve(problem, start=start).mask)


def test_a_damping_that_leaves_the_inputs_indefinite_is_refused():
    """A float32 G of few tokens, whose rounding is above 1e-6 of the mean of its diagonal."""
    x = torch.randn(8, 64, dtype=torch.float64)
    gram = x.T @ x / 8
    gram -= 3e-6 * gram.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    weight = random_weight(2, 64, 1, torch.float32)
    for make in (
        lambda how: LayerProblem(weight, gram.float(), Unstructured(0.5), name="q", refit=how),
        lambda how: LayerProblem(weight, gram.float(), Unstructured(0.5), name="q").refitting(how),
    ):
        with pytest.raises(ProblemError, match=r"layer 'q': .* take a larger damping") as error:
            make(Refit(0.0))
        assert one_line(error)
        problem = make(Refit(0.01))
        verify(problem, solve(problem, "swap"))
    row = RowProblem(weight[1], gram.float(), Unstructured(0.5), refit=Refit(0.01))
    assert row.refit == Refit(0.01)
    with pytest.raises(ProblemError, match="damping"):
        RowProblem(weight[1], gram.float(), Unstructured(0.5), refit=Refit(0))


@pytest.mark.parametrize(
    "damping", [-1, -1e-9, float("nan"), float("inf"), True, "x", None, [0.01]], ids=repr
)
def test_bad_dampings_are_refused(damping):
    with pytest.raises(OptionError, match="`damping` must be at least 0"):
        Refit(damping)


def test_dampings_below_the_least_are_the_least():
    problem = layer(kind="low-rank", damping=0)
    mask = random_mask(problem)
    least = problem.refitting(Refit(1e-6))
    assert torch.equal(problem.objective(mask), least.objective(mask))
    assert bool((problem.refitting(Refit(2e-6)).objective(mask) > least.objective(mask)).any())


@settings(max_examples=20)
@given(problems(max_n=10, max_rows=2), st.sampled_from(DAMPINGS))
def test_enumeration_finds_the_least(problem, damping):
    problem = problem.refitting(Refit(damping))
    best = solve(problem, "exhaustive")
    verify(problem, best, require="checked")
    for seed in range(5):
        other = problem.objective(random_mask(problem, seed))
        assert bool((best.objective <= other * (1 + 1e-9) + rounding(problem)).all())


def test_a_comparison_knows_its_objective():
    problem = layer(rows=1)
    rows = [p.row(0) for p in (problem, problem.refitting(Refit(0.3)), problem.refitting(None))]
    records = compare(rows, ["wanda"])
    assert len({record.key for record in records}) == 3
    mask = solve(problem, "wanda").mask[0]
    assert [r.objective for r in records] == [row.objective(mask) for row in rows]


def test_what_it_is_can_be_read():
    problem = layer(rows=2, damping=0.03)
    assert "Refit(damping=0.03)" in repr(problem)
    assert "Refit(damping=0.03)" in repr(problem.row(0))
    assert "Refit" not in repr(problem.refitting(None))


def test_rows_change_their_objective_as_layers_do():
    weight, gram = random_weight(1, 8, 1), random_gram(8, "full", 2)
    row = RowProblem(weight[0], gram, Unstructured(0.5), refit=Refit(0))
    assert row.refitting(None).refit is None
    assert row.refitting(None).refitting(Refit(0.1)).refit == Refit(0.1)
    assert repr(row.refit) == repr(Refit(0.0))  # what records of comparisons are known by


def test_masks_that_are_dear_to_judge_are_not_enumerated():
    """2 of 160 kept: 12,720 masks, each a system of 158 pruned inputs."""
    weight, gram = random_weight(1, 160, 1), random_gram(160, "full", 2)
    problem = LayerProblem(weight, gram, Unstructured(keep=2), refit=Refit(0.01))
    found = solve(problem, "swap")
    assert verify(problem, found).checked
    word = Solution.of(problem, found.mask, lower_bound=found.objective / 2, vouched=["someone"])
    assert "someone" in str(verify(problem, word))
