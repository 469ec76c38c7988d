"""Rows of a layer that share one count: 1-swap optima across rows, bounds of their sum, false claims."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from certificates import claimed, stating
from commands import run
from forging import fails
from hypothesis import given, settings, strategies as st
from pooled_layers import layer, pool, shared_budget, slack, total
from scipy.optimize import LinearConstraint, minimize
from strategies import ONE_PERCENT, WHOLE, drawn, slow, swap_optimal, verified

from maskopt import NM, LayerProblem, Limits, RowProblem, Unstructured, errors, lower_bound, verify
from maskopt.certificates.certificate import Certificate
from maskopt.checks.swap_check import improving_swap
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.errors import PatternError, ProblemError, SolverError, VerificationError
from maskopt.instances.formats import load_problem
from maskopt.protocol.solution import Solution, Status, relative_gap
from maskopt.protocol.solver import available_solvers, solve
from maskopt.solvers.greedy.scores import keep_highest

AVAILABLE = {name: info for name, info in available_solvers().items() if info.available}
EQUAL = sorted(x for x, info in AVAILABLE.items() if not info.capabilities.shared_budget)
BOTH = pytest.mark.parametrize("update", [None, ONE_PERCENT])


def scaled(problem, w, g, omega=None):
    weight, gram = w * problem.weight, g * problem.gram
    return LayerProblem(weight, gram, problem.pattern, update=problem.update).with_omega(omega)


def test_the_count_is_that_of_the_layer():
    for rows, n, sparsity in ((3, 7, 0.5), (1, 5, 0.29), (100, 1, 0.29)):
        pattern, count = pool(sparsity), int(round(sparsity * 100) * rows * n / 100)
        assert (pattern.pruned_in(rows, n), pattern.group_size(n)) == (count, n)
        fails(PatternError, "no count of its own", pattern.pruned_per_group, n)
        assert pattern.uniform() == Unstructured(sparsity=sparsity)
    assert (NM(2, 4).uniform(), NM(1, 4).pruned_in(3, 8)) == (NM(2, 4), 18)
    kept = Unstructured(keep=3, per="layer")
    known = kept.pruned_in(4, 10), kept.uniform(), str(kept)
    assert known == (28, Unstructured(keep=3), "keep 3 per layer")
    assert kept.is_legal(torch.arange(40).view(4, 10) < 12).tolist() == [True] * 4
    problem = layer(rows=3, n=8)
    for row in (problem.row(1), RowProblem(problem.weight[0], problem.gram, pool())):
        assert row.pattern == Unstructured(sparsity=0.5)


@pytest.mark.parametrize(
    ("pattern", "limits"),
    [
        (pool(0.5, 0.1), (4, 6)), (pool(0.5, 0.0), (5, 5)), (pool(0.45, 0.0), (4, 5)),
        (pool(0.45, 0.29), (2, 7)),  # 1.6 and 7.4
        (pool(0.9, 0.3), (6, 10)), (pool(0.1, 0.3), (0, 4)), (pool(0.5), (0, 10)),
        (Unstructured(keep=3, per="layer", max_deviation=0.2), (5, 9)), (Unstructured(keep=3), (7, 7)),
        (NM(1, 5), (8, 8)),
    ],
)  # fmt: skip
def test_a_row_is_no_further_from_the_layer_than_max_deviation(pattern, limits):
    assert pattern.row_limits(2, 10) == limits


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6), st.booleans())
def test_the_highest_within_limits_have_the_least_sum_pruned(rows, n, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(rows, n, generator=generator, dtype=torch.float64)
    score = (3 * score).floor() if ties else score
    share, apart = torch.rand(2, generator=generator).tolist()
    pattern = pool(round(0.99 * share, 2), round(apart, 2))
    problem = LayerProblem(torch.ones(rows, n), torch.eye(n), pattern)
    mask = keep_highest(problem, score)
    assert bool(pattern.is_legal(mask).all())
    sums = torch.cat([torch.zeros(rows, 1), score.sort(1).values.cumsum(1)], 1)
    least, most = problem.row_limits
    every = itertools.product(range(least, most + 1), repeat=rows)
    legal = torch.tensor([counts for counts in every if sum(counts) == problem.pruned])
    best = float(sums[torch.arange(rows), legal].sum(1).min())
    assert float(score[~mask].sum()) == pytest.approx(best)


@BOTH
def test_limits_are_felt_and_optima_within_them_proven(update):
    near, free = (layer(update=update, sparsity=0.4, max_deviation=d, rows=8) for d in (0.1, None))
    found, other = verified(near, "swap"), solve(free, "swap")
    counts, wide = (sorted((~x.mask).sum(1).tolist()) for x in (found, other))
    assert near.row_limits == (counts[0], counts[-1]) == (8, 11)  # of 24, 9.5 ± 2.4
    assert wide[0] < 8 < 11 < wide[-1]
    assert total(free, other) < total(near, found)
    message = r"row \d prunes \d+ of 24; .* allows 8 to 11"
    fails(errors.WarmStartError, message, near.check_mask, other.mask)
    assert improving_swap(free, found.mask) is not None
    message = "'sparsegpt' holds no limits on what a row prunes"
    fails(SolverError, message, solve, near, "sparsegpt")
    verify(near, solve(near, "swap", start="sparsegpt"))


@BOTH
@pytest.mark.parametrize("start", ["relax", "wanda"])
def test_a_start_within_limits_is_no_worse_than_equal_counts(start, update):
    """Where rows count for very different amounts, limits bind on most of them."""
    omega = torch.linspace(0, 6, 16, dtype=torch.float64).exp()
    sums = []
    for most in (0.0, 0.05, 0.1, 0.2, None):
        problem = layer(rows=16, n=32, update=update, omega=omega, max_deviation=most)
        sums.append(total(problem, solve(problem, "swap", start=start)))
    equal = problem.under(Unstructured(sparsity=0.5))
    assert sums[0] <= 1.02 * float(omega @ solve(equal, "swap", start=start).objective)
    assert sums == sorted(sums, reverse=True)


def test_what_a_pattern_and_its_masks_and_shares_cannot_be():
    problem = layer(rows=2, n=4)
    uneven = torch.tensor([[True] * 4, [False] * 4])
    assert problem.pattern.is_legal(uneven).tolist() == [True, True]
    assert torch.equal(problem.check_mask(uneven), uneven)
    message, fewer = r"prunes 3 of 8; the pattern .* asks for exactly 4", uneven.clone()
    fewer[1, 0] = True
    fails(errors.WarmStartError, message, problem.check_mask, fewer)
    for more, message in (
        ({"max_deviation": 0.1}, "needs per='layer'"),
        ({"per": "block"}, "per must be"),
        *(({"per": "layer", "max_deviation": bad}, r"max_deviation .* is outside")
          for bad in (-0.1, 1, float("nan"), "0.1")),
    ):  # fmt: skip
        fails(PatternError, message, Unstructured, sparsity=0.5, **more)
    for omega, message in (
        ([1.0, 0.0], "omega must be more than 0"),
        ([1.0, 1.0, 1.0], r"omega must be \[2\]"),
        ([1.0, torch.nan], "omega holds 1 NaN"),
    ):
        fails(ProblemError, message, layer, rows=2, omega=torch.tensor(omega))


def test_an_instance_on_disk_keeps_its_count_and_its_rows_their_weights(tmp_path):
    problem = layer(omega=torch.arange(1.0, 7.0), update=LeastSquaresUpdate(0.02))
    problem.save(tmp_path / "layer.npz")
    loaded = load_problem(tmp_path / "layer.npz")
    assert (loaded.pattern, loaded.shared_budget) == (problem.pattern, True)
    assert torch.equal(loaded.shares, problem.shares)
    found = solve(problem)
    assert total(loaded, solve(loaded)) == total(problem, found)
    weights = problem.weights(found.mask)
    torch.testing.assert_close(weights, found.weight, rtol=1e-8, atol=1e-10)
    for row, mask in enumerate(found.mask):
        alone = problem.take([row]).under(Unstructured(keep=int(mask.sum())))
        torch.testing.assert_close(alone.weights(mask)[0], weights[row])


@pytest.mark.parametrize("omega", [None, torch.tensor([4.0, 1.0, 0.25])])
def test_scores_rank_the_layer_and_what_prunes_rows_equally_says_so(omega):
    problem = layer(rows=3, n=8, omega=omega)
    for name in ("magnitude", "wanda", "ria", "random", "worst"):
        found = solve(problem, name, seed=3)
        assert int((~found.mask).sum()) == problem.pruned, name
        if name == "wanda":
            score = problem.weight.abs() * problem.gram.diagonal().sqrt()
            score = score * problem.shares.sqrt()[:, None]
            assert float(score[found.mask].min()) > float(score[~found.mask].max())
    for name in EQUAL:
        fails(SolverError, "needs an equal count in every row", solve, problem, name)


@settings(max_examples=40)
@given(shared_budget(), st.sampled_from(("wanda", "random", "relax", "admm")))
def test_a_search_ends_at_a_proven_optimum_across_rows(problem, start):
    found = swap_optimal(problem, start=start)
    if start != "relax":
        assert total(problem, found) <= total(problem, solve(problem, start)) + slack(problem)
    history = problem.shares @ found.trace.history
    assert bool((history[1:] <= history[:-1] + slack(problem)).all())
    assert abs(float(history[-1]) - total(problem, found)) <= slack(problem)
    again = solve(problem, "swap", start=found.mask)
    assert torch.equal(again.mask, found.mask)
    assert not int(again.trace.transfers.sum())


@settings(max_examples=settings.default.max_examples // 2)
@given(shared_budget(max_n=8, max_rows=4))
def test_enumeration_is_the_optimum_and_swaps_never_below(problem):
    best = solve(problem, "exhaustive")
    assert set(best.status) == {Status.OPTIMAL}
    assert verify(problem, best).checked
    least = total(problem, best)
    assert least <= total(problem, solve(problem, "swap")) + slack(problem)
    left = solve(problem, "swap", start=best.mask)
    assert total(problem, left) >= least - 1e-6 * least - slack(problem)


@BOTH
def test_counts_of_their_own_gain_over_equal_ones(update):
    for omega in (None, torch.tensor([1.0, 9.0, 0.1, 1.0, 2.0, 0.5])):
        problem = layer(update=update, omega=omega)
        equal = solve(problem.under(problem.pattern.uniform()), "swap")
        found = solve(problem, "swap", start=equal.mask)
        assert int(found.trace.transfers.sum()) > 0
        assert total(problem, found) < 0.95 * total(problem, equal)
        assert len(set(found.mask.sum(1).tolist())) > 1
    # what a row counts decides what it keeps
    shares = (torch.tensor([share] + [1.0] * 5) for share in (0.01, 1.0, 100.0))
    kept = [int(solve(layer(update=update, omega=x)).mask[0].sum()) for x in shares]
    assert kept[0] < kept[1] < kept[2]


@BOTH
def test_order_units_threads_and_memory_change_nothing(update):
    problem = layer(rows=5, n=16, update=update)

    def found(one):
        return solve(one, "swap", start="wanda").mask

    mask, generator = found(problem), torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(size, generator=generator) for size in (5, 16))
    weight, gram = problem.weight[rows][:, columns], problem.gram[columns][:, columns]
    moved = LayerProblem(weight, gram, problem.pattern, update=update)
    assert torch.equal(found(moved), mask[rows][:, columns])
    for w, g, omega in ((2.0**20, 1, 1), (2.0**-30, 2.0**10, 1), (-1, 1, 1), (1, 1, 8)):
        assert torch.equal(found(scaled(problem, w, g, torch.full((5,), float(omega)))), mask)
    problem, one = layer(rows=40, n=12, update=update), layer(rows=1, n=20, update=update)
    for solver in ("wanda", "admm", "swap"):
        mask = solve(problem, solver, threads=1).mask
        for limits in ({"threads": 2}, {"threads": 2, "memory_limit": 2**15}):
            assert torch.equal(solve(problem, solver, **limits).mask, mask)
        assert torch.equal(*(solve(p, solver).mask for p in (one, one.row(0))))


@BOTH
def test_rows_that_keep_all_or_nothing_dead_and_float32_layers_come_to_a_proof(update):
    for sparsity in (0.0, 0.03, 0.97):
        problem = layer(rows=4, n=8, update=update, sparsity=sparsity)
        swap_optimal(problem, start="random")
    for weight, gram in ((0.0, 1.0), (1.0, 0.0)):
        problem = scaled(layer(rows=3, n=6, update=update), weight, gram)
        assert not int(swap_optimal(problem, start="random").trace.transfers.sum())
    wide = layer(rows=40, n=64)
    problem = LayerProblem(wide.weight.float(), wide.gram.float(), wide.pattern, update=update)
    swap_optimal(problem, start="wanda")
    for kernel, seed in itertools.product(("torch", "literal"), range(0 if update else 3)):
        problem = drawn(4, 20, pattern=pool(), seeds=(seed, seed))
        swap_optimal(problem, start="wanda", kernel=kernel)


@BOTH
def test_a_limit_leaves_a_legal_mask_and_claims_nothing(update):
    problem = layer(rows=5, n=16, update=update)
    start = solve(problem, "random", seed=2)
    for more in ({"limits": Limits(seconds=0)}, {"max_swaps": 1}):
        found = verified(problem, "swap", start=start.mask, **more)
        assert set(found.status) == {Status.FEASIBLE}
        assert total(problem, found) <= total(problem, start) + slack(problem)
    # a start of equal rows has the count of the layer: 10 of 21
    found = solve(layer(rows=3, n=7, update=update), "swap", start="elimination", max_swaps=0)
    assert (~found.mask).sum(1).tolist() == [4, 3, 3]


@pytest.mark.parametrize("seeds", [range(8), slow(range(8, 20))])
@pytest.mark.parametrize("method", ["box", "shift"])
def test_a_bound_of_whole_numbers_bounds_the_layer(method, seeds):
    """Of what each row has a part, no row's next value is one."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        rows, n = (int(size) for size in rng.integers(2, 5, size=2))
        inputs = rng.integers(-2, 3, size=(n + 1, n)).astype(float)
        weight = rng.integers(-3, 4, size=(rows, n)).astype(float)
        problem = LayerProblem(weight, inputs.T @ inputs, pool()).with_units(WHOLE)
        best, bound = solve(problem, "exhaustive"), lower_bound(problem, method)
        assert float(bound.value.sum()) <= float(best.objective.sum()) * (1 + 1e-9) + 1e-9, seed
        verify(problem, stating(problem, best.mask, bound))


def test_what_is_said_of_all_rows_counts_each_as_it_is_minimised(tmp_path):
    """Σ ω f: a sum of f alone is below the bound of another mask's."""
    problem = layer(rows=3, n=6, omega=[100.0, 1.0, 0.01])
    best, bound = solve(problem, "exhaustive"), lower_bound(problem, "box")
    least = total(problem, best)
    assert float(bound.value.sum()) > least
    said = float(re.search(r"value=(\S+) in all", repr(bound))[1])
    assert least >= said == pytest.approx(float(problem.shares @ bound.value), rel=1e-5)
    problem.save(path := tmp_path / "layer.npz")
    more = ["--solver", "exhaustive"]
    assert f"{least:.6g}" in run("solve", path, *more, "--output", tmp_path / "s.npz")
    said = " ".join(run("compare", path, "--solvers", "swap").split())
    assert "each row is solved alone, at the sparsity of its layer: no budget is shared" in said
    table = " ".join(run("bound", path, "--method", "box", *more).split())
    assert "rows of a shared budget: the bound is of their sum" in table


# --- the relaxation of a layer, and what it proves
@pytest.mark.parametrize("update", [False, True])
@settings(max_examples=min(20, settings().max_examples // 2))
@given(data=st.data())
def test_bounds_are_below_the_optimum(update, data):
    problem = data.draw(shared_budget(max_n=6 if update else 8, max_rows=3 if update else 4))
    if update:
        problem = problem.with_update(LeastSquaresUpdate(data.draw(st.sampled_from((0.01, 0.3)))))
        bound = lower_bound(problem, "perspective", turns=10, splits=data.draw(st.integers(0, 3)))
    else:
        problem = problem.with_update(None)
        bound = lower_bound(problem, data.draw(st.sampled_from(("box", "shift"))))
    best = solve(problem, "exhaustive")
    assert float(problem.shares @ bound.value) <= total(problem, best) + slack(problem)
    gaps = bound.gap(best.objective)
    assert update or (bool((gaps == gaps[0]).all()) and bool((gaps >= -1e-9).all()))
    verify(problem, stating(problem, best.mask, bound))


@pytest.mark.parametrize("omega", [None, torch.tensor([1.0, 9.0, 0.1, 1.0])])
def test_any_point_and_split_of_refitted_rows_prove_what_the_formula_says(omega):
    problem = layer(rows=4, n=6, update=LeastSquaresUpdate(0.1), omega=omega)
    a, share = problem.least_squares.damped, problem.shares
    best = total(problem, solve(problem, "exhaustive"))
    room = float(torch.linalg.eigvalsh(a)[0])
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        d = room * torch.rand(4, 6, generator=generator, dtype=torch.float64).clamp(min=0.2)
        v = problem.weight * torch.rand(4, 6, generator=generator, dtype=torch.float64)
        proven = float(share @ Certificate(d, d[:, :0], v).check(problem))
        true, prices = 0.0, []
        for row in range(4):
            w, b = problem.weight[row], a - torch.diag(d[row])
            true += float(share[row] * (w @ a @ w - v[row] @ b @ v[row]))
            prices += (share[row] * (a @ w - b @ v[row]).square() / d[row]).tolist()
        true -= sum(sorted(prices)[problem.pruned :])
        assert proven == pytest.approx(max(true, 0.0), rel=1e-9, abs=1e-9 * best)
        assert proven <= best + slack(problem)


@pytest.mark.slow
def test_bounds_are_worth_something():
    omega = torch.tensor([1.0, 3.0, 0.5, 2.0])
    problem = layer(rows=4, n=12, update=LeastSquaresUpdate(0.1), omega=omega)
    found = total(problem, solve(problem, "swap"))
    how = {}, {"splits": 0}, {"threads": 2}
    bounds = (lower_bound(problem, "perspective", **options).value for options in how)
    proven, unsplit, other = (float(problem.shares @ value) for value in bounds)
    assert 0.6 * found <= proven <= found * (1 + 1e-9)
    assert unsplit < proven == other
    alone = layer(rows=1, n=16, update=LeastSquaresUpdate(0.1))
    counted = lower_bound(alone.under(alone.pattern.uniform()), "perspective").value
    torch.testing.assert_close(lower_bound(alone, "perspective").value, counted, rtol=0.05, atol=0)
    problem = layer(rows=4, n=9, kind="diagonal", omega=torch.tensor([1.0, 3.0, 0.5, 1.0]))
    best = total(problem, solve(problem, "swap"))
    proven = float(problem.shares @ lower_bound(problem, "shift").value)
    assert 0.99 * best <= proven <= best * (1 + 1e-9)


@pytest.mark.parametrize("max_deviation", [None, 0.25, 0.0])
@pytest.mark.parametrize("omega", [None, torch.tensor([1.0, 9.0, 0.1, 1.0, 2.0, 0.5])])
def test_the_relaxation_of_a_layer_is_what_a_general_solver_finds(omega, max_deviation):
    """min Σ ωᵣ fᵣ(xᵣ) over the box, one count, and what a row may take of it, by SLSQP."""
    problem = layer(rows=6, n=8, omega=omega, max_deviation=max_deviation)
    share, w, gram = problem.shares[:, None].numpy(), problem.weight.numpy(), problem.gram.numpy()

    def value(x):
        dropped = w * x.reshape(w.shape)
        product = share * (dropped @ gram)
        return float((product * dropped).sum()), (2 * product * w).ravel()

    size, (least, most), pruned = w.size, problem.row_limits, problem.pruned
    counts = (np.ones(size), pruned, pruned), (np.kron(np.eye(6), np.ones(8)), least, most)
    # equal counts of rows say what the count of all is, and SLSQP takes nothing twice
    limits = [LinearConstraint(*parts) for parts in counts[int(least == most) :]]
    how = {"method": "SLSQP", "options": {"ftol": 1e-12, "maxiter": 500}}
    start, bounds = [pruned / size] * size, [(0, 1)] * size
    found = minimize(value, start, jac=True, bounds=bounds, constraints=limits, **how)
    assert found.success
    bound = lower_bound(problem, "box", steps=2000, tolerance=1e-6)
    assert float(problem.shares @ bound.value) == pytest.approx(found.fun, rel=1e-4)
    sums = bound.certificate.point.sum(1)
    assert float(sums.sum()) == pytest.approx(problem.pruned, abs=1e-3)
    assert least - 1e-3 <= float(sums.min()) <= float(sums.max()) <= most + 1e-3


@pytest.mark.parametrize(("most", "part"), [(None, 0.9), (0.0, 1.001), (0.1, 0.801), (0.2, 0.601)])
def test_a_relaxed_start_counts_for_the_layer(most, part):
    omega = torch.linspace(0, 6, 12, dtype=torch.float64).exp()
    more = {"omega": omega, "max_deviation": most}
    if most is None:
        more = {"sparsity": 0.6, "seed": 5}
    problem = layer(rows=12, n=32, **more)
    equal = problem.under(problem.pattern.uniform())
    begun, start = (solve(p, "relax", refine=False, max_iterations=0) for p in (equal, problem))
    assert total(problem, start) <= part * total(problem, begun)
    whole = swap_optimal(problem, "relax")
    gaps = relative_gap(whole.objective, whole.lower_bound)
    assert float(gaps[0]) == pytest.approx(float(gaps[-1])) == whole.gap
    assert 0 < float(problem.shares @ whole.lower_bound) < total(problem, whole)


def test_certificates_of_a_layer_are_checked():
    problem = layer(rows=3, n=8)
    bound, found = lower_bound(problem, "box"), solve(problem, "swap")
    assert claimed(problem, found, bound).checked
    fails(VerificationError, "its certificate proves", claimed, problem, found, bound, 1.01)
    own_counts = replace(bound.certificate, penalty=torch.ones(3, 1, dtype=torch.float64))
    with pytest.raises(VerificationError, match="need a count of each row"):
        claimed(problem, found, bound, certificate=own_counts)
    moved = replace(bound.certificate, point=torch.full((3, 8), 0.3, dtype=torch.float64))
    assert float(moved.check(problem).sum()) <= float(bound.value.sum())
    # of rows with equal counts the same point proves another thing
    equal = problem.under(problem.pattern.uniform())
    assert float(bound.certificate.check(equal).sum()) >= float(bound.value.sum()) * (1 - 1e-12)
    # of other rows they are refused
    for method, update, message in (
        ("sdp", None, "'sdp' needs an equal count in every row; take method 'box'"),
        ("box", ONE_PERCENT, r"'box' is for unchanged weights; .* 'perspective'"),
    ):
        fails(SolverError, message, lower_bound, layer(rows=2, n=4, update=update), method)


# --- what is claimed falsely
def exchanged(mask, i, u, j, p):
    return mask.index_put((torch.tensor([i, j]), torch.tensor([u, p])), torch.tensor([False, True]))


@BOTH
def test_a_swap_between_rows_that_improves_is_found(update):
    problem = layer(update=update)
    mask = solve(problem.under(problem.pattern.uniform()), "swap").mask
    swap = improving_swap(problem, mask)
    assert swap.row != swap.other
    better = problem.objective(exchanged(mask, swap.row, swap.kept, swap.other, swap.pruned))
    change = problem.shares @ (better - problem.objective(mask))
    assert float(change) == pytest.approx(swap.delta, rel=1e-9)
    best = min(
        float(problem.objective(exchanged(mask, i, u, j, p)).sum())
        for i, j in itertools.permutations(range(problem.rows), 2)
        for u in [*mask[i].nonzero()[:2, 0].tolist(), swap.kept]
        for p in [*(~mask[j]).nonzero()[:2, 0].tolist(), swap.pruned]
        if mask[i, u] and not mask[j, p]
    )
    assert best == pytest.approx(float(better.sum()))
    claim = replace(Solution.of(problem, mask), status=(Status.SWAP_OPTIMAL,) * problem.rows)
    fails(VerificationError, r"of row \d instead of \d+ of row", verify, problem, claim)
    mask = solve(problem, "swap").mask  # and inside of a row
    row = int(((mask.sum(1) > 0) & (mask.sum(1) < problem.n)).nonzero()[0])
    u, p = mask[row].nonzero()[0, 0], (~mask[row]).nonzero()[0, 0]
    assert improving_swap(problem, exchanged(mask, row, u, row, p)) is not None


def test_claims_that_do_not_hold_are_refused():
    problem = layer(rows=3, n=6)
    best, worse = solve(problem, "exhaustive"), solve(problem, "random")
    optimal, fewer = (Status.OPTIMAL,) * 3, best.mask.clone()
    mixed = (Status.OPTIMAL, Status.SWAP_OPTIMAL, Status.OPTIMAL)
    fewer[0, int(fewer[0].nonzero()[0])] = False
    high = {"lower_bound": worse.objective, "trusted": ("SCIP 10.0",) * 3}
    for message, base, changes in (
        ("proven together", best, {"status": mixed}),
        ("changes the sum", worse, {"status": optimal, **high}),
        ("without proof", best, {"lower_bound": 0 * best.objective}),
        ("a mask of sum", worse, high),
        ("asks for exactly", best, {"mask": fewer}),
        ("no exact solver is trusted with it", best, {"trusted": ()}),
    ):
        fails(VerificationError, message, verify, problem, replace(base, **changes))
    for refine in (True, False):
        found = solve(problem, "relax", start=best.mask, refine=refine)
        assert total(problem, found) == pytest.approx(total(problem, best))
