"""What holds of every solver of refitted weights; and what ADMM and greedy elimination promise alone."""

import pooled_layers
import pytest
import torch
from forging import copied, forge_manifest
from hypothesis import given
from hypothesis import strategies as st
from refit_layers import (
    LARGE,
    LINEAR,
    PATTERNS,
    REFITS,
    assert_proven,
    changed,
    layer,
    shuffled,
    slack,
    wide,
)
from strategies import HALF, KINDS, problems
from tiny_models import save, tiny, tokens

from maskopt import (
    NM,
    LayerProblem,
    Limits,
    Linear,
    Refit,
    Status,
    Unstructured,
    make_solver,
    prune_model,
    solve,
    verify,
)
from maskopt.errors import MaskoptError, OptionError, VerificationError
from maskopt.model.report import read_manifest
from maskopt.model.verify import verify_output
from maskopt.model.workspace import MANIFEST

ROOT = REFITS[3]
SOLVERS = ("swap", "admm", "obs")


# --- all of them -------------------------------------------------------------------------------------


@given(problems(max_n=11, max_rows=3), st.sampled_from(REFITS), st.sampled_from((1, 2, 64)))
def test_masks_are_legal_and_never_below_the_optimum(problem, how, panel):
    problem = problem.refitting(how)
    best = solve(problem, "exhaustive")
    verify(problem, best, require="checked")
    for solver in ("random", "admm", make_solver("obs", panel=panel)):
        found = solve(problem, solver)
        verify(problem, found)
        assert bool(problem.pattern.is_legal(found.mask).all())
        assert bool((found.objective >= best.objective - slack(problem)).all())
        assert set(found.status) == {Status.FEASIBLE}
        assert found.lower_bound.tolist() == [0.0] * problem.rows
    found = solve(problem, "memetic", generations=2, children=2, pool=4)
    assert_proven(problem, found)
    assert bool((found.objective >= best.objective - slack(problem)).all())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("pattern", LARGE, ids=str)
@pytest.mark.parametrize(
    ("kind", "linear"), [("full", True), ("low-rank", False), ("outliers", False)]
)
def test_threads_and_the_other_rows_change_nothing(solver, kind, linear, pattern):
    problem = layer(pattern, n=80, kind=kind, linear=linear)
    before = torch.get_num_threads()
    whole, three = (solve(problem, solver, threads=threads) for threads in (1, 3))
    assert torch.equal(three.mask, whole.mask)
    assert torch.equal(three.objective, whole.objective)
    assert torch.equal(solve(problem, solver).mask, whole.mask)
    assert torch.get_num_threads() == before
    for i in range(problem.rows):
        alone = solve(problem.row(i), solver)
        assert torch.equal(alone.mask[0], whole.mask[i])
        assert float(alone.objective) == pytest.approx(float(whole.objective[i]), rel=1e-9)
    # rows work in the memory of those before them, and in more than one tile
    many = [3, 1, 2, 0, *list(range(4)) * 24] if solver == "admm" else [3, 2, 1, 0]
    found = solve(problem.take(many), solver, threads=3)
    assert torch.equal(found.mask, whole.mask[many])


def test_rows_of_one_budget_in_several_tiles():
    problem = pooled_layers.layer(rows=70, n=16, refit=REFITS[1])
    one, three = (solve(problem, "admm", threads=threads) for threads in (1, 3))
    assert torch.equal(one.mask, three.mask)
    verify(problem, three)


@pytest.mark.parametrize("solver", SOLVERS)
@given(
    seed=st.integers(0, 1000),
    weight_power=st.integers(-20, 20),
    gram_power=st.integers(-20, 20),
    pattern=st.sampled_from(PATTERNS),
    how=st.sampled_from(REFITS[1:]),
    linear=st.booleans(),
)
def test_scales_and_orders_change_nothing(
    solver, seed, weight_power, gram_power, pattern, how, linear
):
    """Powers of two: what is scaled to 1 is the same to the last bit."""
    problem = layer(pattern, rows=2, n=24, seed=seed, linear=linear, how=how)
    plain = solve(problem, solver)
    scaled = changed(problem, 2.0**weight_power, 4.0**gram_power)
    assert torch.equal(solve(scaled, solver).mask, plain.mask)
    if solver == "admm":  # its iterations are in float32, in eigenvectors of another order
        return
    order = shuffled(problem, seed)
    found = solve(changed(problem, columns=order), solver)
    assert torch.equal(found.mask, plain.mask[:, order])
    torch.testing.assert_close(found.objective, plain.objective, rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_narrow_weights_and_inputs(pattern, dtype, solver):
    plain = layer(pattern, n=32, kind="outliers", how=ROOT)
    weight, gram = plain.weight.to(dtype), plain.gram.float()
    problem = LayerProblem(weight, gram, pattern, refit=ROOT)
    solution = solve(problem, solver)
    verify(problem, solution)
    exact = wide(problem)
    assert torch.equal(solve(exact, solver).mask, solution.mask)
    expected = exact.objective(solution.mask)
    torch.testing.assert_close(solution.objective, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_rows_without_weights_and_inputs_without_anything(pattern, solver):
    problem = layer(pattern, rows=6, n=32, kind="zero-columns")
    weight = problem.weight.clone()
    weight[[0, 3]] = 0
    problem = LayerProblem(weight, problem.gram, pattern, refit=problem.refit)
    assert bool((problem.gram.diagonal() == 0).any())
    solution = solve(problem, solver)
    verify(problem, solution)
    assert (solution.objective == 0).tolist() == [True, False, False, True, False, False]
    nothing = changed(problem, g=0.0)
    verify(nothing, solve(nothing, solver))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("keep", [0, 1, 31, 32])
@pytest.mark.parametrize(**LINEAR)
def test_nothing_kept_and_everything(keep, linear, solver):
    problem = layer(Unstructured(keep=keep), n=32, linear=linear)
    solution = solve(problem, solver)
    assert solution.mask.sum(1).tolist() == [keep] * 4
    verify(problem, solution)


@pytest.mark.parametrize("solver", ["admm", "obs"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [Refit(), ROOT], ids=repr)
def test_weights_that_are_kept_get_a_mask_of_refitted_ones(kind, solver, how):
    """With one percent of damping unless another is named; so does a start for refitted weights."""
    problem = layer(n=32, kind=kind, how=how)
    kept, mask = problem.refitting(None), solve(problem, solver).mask
    solution = solve(kept, make_solver(solver, **({} if how == Refit() else vars(how))))
    assert torch.equal(solution.mask, mask)
    verify(kept, solution)
    assert torch.equal(solution.objective, kept.objective(mask))
    start = solve(problem, make_solver("swap", max_swaps=0), start=solver)
    assert torch.equal(start.mask, mask)
    if kind == "outliers" and how == ROOT:
        assert not torch.equal(solve(kept, make_solver(solver, damping=0.1)).mask, mask)


@pytest.mark.parametrize(**LINEAR)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_better_than_scores_after_the_same_refit(kind, pattern, linear):
    problem = layer(pattern, rows=16, n=64, kind=kind, linear=linear)
    admm, obs, wanda, sparsegpt = (
        float(solve(problem, name).objective.sum())
        for name in ("admm", "obs", "wanda", "sparsegpt")
    )
    if pattern == HALF and not linear:
        assert obs <= wanda * (1 + 1e-9)
    if kind in ("full", "low-rank", "outliers"):
        assert admm < 0.98 * wanda
        assert admm < sparsegpt


@pytest.mark.parametrize("solver", ["admm", "obs"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_it_starts_a_swap_search_close_to_its_end(pattern, solver):
    problem = layer(pattern, rows=40, n=64)
    start = solve(problem, solver)
    swapped = solve(problem, "swap", start=solver)
    most = 1.15 if solver == "admm" else 2
    assert float(start.objective.sum()) < most * float(swapped.objective.sum())
    assert torch.equal(swapped.mask, solve(problem, "swap", start=start.mask).mask)
    verify(problem, swapped)
    assert bool((swapped.objective <= start.objective * (1 + 1e-9)).all())


@pytest.mark.parametrize(
    ("solver", "pattern", "kind"),
    [
        ("branch", PATTERNS[0], "full"),
        ("branch", PATTERNS[1], "zero-columns"),
        ("scip", PATTERNS[1], "full"),
        pytest.param("branch", PATTERNS[1], "full", marks=pytest.mark.slow),
        pytest.param("branch", PATTERNS[0], "zero-columns", marks=pytest.mark.slow),
        pytest.param("scip", PATTERNS[1], "zero-columns", marks=pytest.mark.slow),
        pytest.param("scip", PATTERNS[0], "full", marks=pytest.mark.slow),
        pytest.param("scip", PATTERNS[0], "zero-columns", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_exact_solvers_prove_the_optimum_under_a_power(solver, pattern, kind):
    problem = layer(pattern, rows=2, n=12, kind=kind, how=ROOT)
    found = solve(problem, solver)
    assert set(found.status) == {Status.OPTIMAL}
    verify(problem, found)
    best = solve(problem, "exhaustive").objective
    torch.testing.assert_close(found.objective, best, rtol=1e-6, atol=float(slack(problem).max()))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_power_of_one_does_not_see_the_size_of_inputs(solver):
    """Inputs times s and weights by s are the same layer; powers of two, for rounding."""
    size = 2.0 ** torch.randint(-3, 4, (24,), generator=torch.Generator().manual_seed(3)).double()
    problem = layer(n=24, rows=3, how=REFITS[4])
    gram = problem.gram * size * size[:, None]
    scaled = LayerProblem(problem.weight / size, gram, problem.pattern, refit=problem.refit)
    one, other = solve(problem, solver), solve(scaled, solver)
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.objective, other.objective, rtol=1e-9, atol=0)
    plain = scaled.refitting(Refit(0.1))
    apart = plain.objective(one.mask) / problem.refitting(Refit(0.1)).objective(one.mask)
    assert bool((apart - 1).abs().gt(0.01).all())


# --- ADMM --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0, 9, 30])
def test_a_row_of_no_weights_may_have_much_to_take_over(power):
    problem = layer(rows=6, n=32, linear=True)
    weight, scale = 10.0**power * problem.weight, 10.0**power
    weight[2] = 0
    linear = Linear(scale * problem.linear.correlation, scale**2 * problem.linear.constant)
    problem = LayerProblem(weight, problem.gram, HALF, linear=linear, refit=problem.refit)
    verify(problem, solve(problem, "admm"))


@pytest.mark.parametrize("kind", ["full", "outliers", "diagonal"])
def test_the_order_of_the_inputs_matters_no_more_than_rounding(kind):
    """Entries that change places near the end may stop elsewhere."""
    problem = layer(rows=40, n=48, kind=kind)
    order = shuffled(problem)
    plain, found = solve(problem, "admm"), solve(changed(problem, columns=order), "admm")
    assert float((found.mask != plain.mask[:, order]).double().mean()) < 0.01
    total = float(plain.objective.sum())
    assert float(found.objective.sum()) == pytest.approx(total, rel=1e-3)


def test_the_damping_and_the_linear_part_have_their_say():
    problem, other = (
        layer(rows=16, n=32, kind="low-rank", linear=linear) for linear in (False, True)
    )
    mask = solve(problem, "admm").mask
    assert not torch.equal(solve(problem.refitting(Refit(10.0)), "admm").mask, mask)
    found = solve(other, "admm")
    assert not torch.equal(found.mask, mask)
    assert float(found.objective.sum()) < float(other.objective(mask).sum())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_without_time_it_is_the_largest_weights_in_the_metric(pattern):
    problem = layer(pattern, rows=6, n=32)
    hurried = solve(problem, "admm", time_limit=0.0)
    verify(problem, hurried)
    scale = problem.least_squares.damped.diagonal().sqrt()
    score = (problem.weight * scale).abs().reshape(6, -1, problem.group_size)
    kept = score.topk(problem.group_size - problem.pruned_per_group).indices
    largest = torch.zeros_like(score, dtype=torch.bool).scatter_(2, kept, True).view(6, -1)
    assert torch.equal(hurried.mask, largest)


def test_iterations_stop_it_and_more_of_them_are_better():
    problem = layer(rows=16, n=64, kind="low-rank")
    one, many = (solve(problem, "admm", iterations=most) for most in (1, 300))
    verify(problem, one)
    assert float(many.objective.sum()) < float(one.objective.sum())
    assert not torch.equal(one.mask, many.mask)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iterations", 0),
        ("iterations", 1.5),
        ("rho", 0.0),
        ("rho", -1.0),
        ("rho", float("nan")),
        ("damping", -0.1),
    ],
)
def test_bad_options_are_refused(name, value):
    with pytest.raises(OptionError, match=name):
        solve(layer(), "admm", **{name: value})


def test_inputs_that_one_percent_leaves_indefinite_are_refused_in_one_line():
    """Of a G that was never checked, and for weights that are kept."""
    gram = torch.eye(64)
    gram[1, 2] = gram[2, 1] = 1.005
    slightly = LayerProblem(torch.ones(1, 64), gram, HALF, assume_psd=True)
    assert int(solve(slightly, "admm").mask.sum()) == 32
    gram[1, 2] = gram[2, 1] = 1.02
    worse = LayerProblem(torch.ones(1, 64), gram, HALF, assume_psd=True)
    with pytest.raises(MaskoptError, match="larger damping") as error:
        solve(worse, "admm")
    assert "\n" not in str(error.value)


# --- greedy elimination ------------------------------------------------------------------------------


def one_by_one(problem, row):
    """By F itself: the removal after which least squares cost least, again and again."""
    alone = problem.row(row).as_layer()
    group, quota = problem.group_size, problem.pruned_per_group
    mask = torch.ones(1, problem.n, dtype=torch.bool)
    while int((~mask).sum()) < quota * (problem.n // group):
        best = None
        for u in mask[0].nonzero()[:, 0].tolist():
            inside = slice(u // group * group, u // group * group + group)
            if int((~mask[0, inside]).sum()) == quota:
                continue
            other = mask.clone()
            other[0, u] = False
            cost = float(alone.under(Unstructured(keep=int(other.sum()))).objective(other)[0])
            if best is None or cost < best[0]:
                best = cost, other
        mask = best[1]
    return mask[0]


@pytest.mark.parametrize("pattern", [*PATTERNS, NM(keep=1, of=4)], ids=str)
@pytest.mark.parametrize(**LINEAR)
def test_it_removes_what_costs_least_one_by_one(pattern, linear):
    """With all inputs among the candidates of a panel, panels change nothing either."""
    problem = layer(pattern, rows=3, n=12, linear=linear, how=Refit(0.02))
    expected = torch.stack([one_by_one(problem, row) for row in range(3)])
    for panel in (1, 3, 64):
        assert torch.equal(solve(problem, "obs", panel=panel).mask, expected)


def test_panels_are_nearly_the_recursion():
    problem = layer(rows=6, n=96, how=Refit(0.02))
    exact, panels = (solve(problem, "obs", panel=panel) for panel in (1, 8))
    assert float(panels.objective.sum()) <= 1.02 * float(exact.objective.sum())


def test_no_time_leaves_a_legal_mask():
    problem = layer(rows=3, n=20)
    hurried = solve(problem, "obs", limits=Limits(seconds=0))
    verify(problem, hurried)
    assert float(hurried.objective.sum()) > float(solve(problem, "obs").objective.sum())


# --- whole models ------------------------------------------------------------------------------------

OPTIONS = {"sparsity": 0.5, "min_tokens": 1, "weights": "refit", "damping": 0.1}


def test_models_are_refitted_and_checked_so(tmp_path):
    dense, out = save(tiny("llama"), tmp_path / "dense"), tmp_path / "out"
    report = prune_model(dense, tokens(), output=out, damping_power=0.5, **OPTIONS)
    plain = prune_model(dense, tokens(), output=tmp_path / "plain", **OPTIONS)
    assert [x.error for x in report.layers] != [x.error for x in plain.layers]
    assert read_manifest(out / MANIFEST)["fingerprint"]["options"]["damping_power"] == 0.5
    assert verify_output(out, dense, calibration=tokens()).checked_layers
    # a manifest of before there was a choice means none
    forged = copied(tmp_path / "plain", tmp_path / "older")
    forge_manifest(forged, lambda m: m["fingerprint"]["options"].pop("damping_power"))
    assert verify_output(forged, dense, calibration=tokens()).checked_layers
    # and one that says another is found out
    forged = copied(out, tmp_path / "forged")
    forge_manifest(forged, lambda m: m["fingerprint"]["options"].update(damping_power=0.0))
    with pytest.raises(VerificationError):
        verify_output(forged, dense, calibration=tokens())
    # what no run has is no manifest, text or not
    forge_manifest(forged, lambda m: m["fingerprint"]["options"].update(damping_power=1.5))
    with pytest.raises(VerificationError, match="damaged or was changed"):
        verify_output(forged)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"damping_power": 2.0}, r"`damping_power` must be a number \[0, 1\], not 2.0"),
        ({"weights": "keep", "damping": 0.01, "damping_power": 0.5}, "is of refitted weights"),
    ],
)
def test_bad_options_of_models_get_one_line(how, message):
    with pytest.raises(MaskoptError, match=message):
        prune_model(tiny("llama"), tokens(), **{**OPTIONS, **how})
