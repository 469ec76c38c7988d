"""Rows of a layer that trade: one count for the layer, 1-swap optima across rows, and their checks."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from strategies import KINDS, random_gram, random_linear, random_weight

from maskopt import (
    NM,
    LayerProblem,
    Limits,
    Refit,
    RowProblem,
    Solution,
    Status,
    Unstructured,
    improving_swap,
    lower_bound,
    solve,
    verify,
)
from maskopt.errors import (
    PatternError,
    ProblemError,
    SolverError,
    VerificationError,
    WarmStartError,
)
from maskopt.solver import available_solvers

STARTS = ("wanda", "random", "relax", "admm")
SCORES = ("magnitude", "wanda", "ria", "random", "worst")


def pool(sparsity=0.5):
    return Unstructured(sparsity=sparsity, per="layer")


def layer(rows=6, n=24, kind="full", sparsity=0.5, refit=None, seed=1, omega=None, **more):
    """Rows of very different size, so that much is to be traded; no weight is 0, so that nothing ties."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    weight *= torch.rand(rows, 1, generator=generator, dtype=torch.float64) + 0.2
    gram = random_gram(n, kind, seed + 1)
    return LayerProblem(weight, gram, pool(sparsity), refit=refit, omega=omega, **more)


@st.composite
def pooled(draw, max_n=12, max_rows=5):
    """Any kind of layer, of weights kept or refitted, counted equally or not."""
    n, rows = draw(st.integers(1, max_n)), draw(st.integers(1, max_rows))
    seed = draw(st.integers(0, 2**31 - 1))
    gram = random_gram(n, draw(st.sampled_from(KINDS)), seed)
    weight = random_weight(rows, n, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1
    return LayerProblem(
        weight,
        gram,
        pool(draw(st.sampled_from((0.0, 0.1, 0.37, 0.5, 0.8, 0.99)))),
        linear=random_linear(weight, gram, seed + 2) if draw(st.booleans()) else None,
        refit=draw(st.sampled_from((None, Refit(0.01), Refit(0.3)))),
        omega=shares if draw(st.booleans()) else None,
    )


def total(problem, solution):
    return float(problem.shares @ solution.objective)


def slack(problem):
    return 1e-9 * float(problem.shares @ problem.diagonal_mass()) + 1e-300


# --- the pattern and the problem ---------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "n", "sparsity"), [(3, 7, 0.5), (1, 5, 0.29), (100, 1, 0.29)])
def test_the_count_is_that_of_the_layer(rows, n, sparsity):
    pattern = pool(sparsity)
    assert pattern.pruned_in(rows, n) == int(round(sparsity * 100) * rows * n / 100)
    assert pattern.group_size(n) == n
    with pytest.raises(PatternError, match="no count of its own"):
        pattern.pruned_per_group(n)
    assert pattern.alike() == Unstructured(sparsity=sparsity)
    assert NM(2, 4).alike() == NM(2, 4)
    assert NM(1, 4).pruned_in(3, 8) == 18


def test_what_a_pooled_pattern_cannot_be():
    with pytest.raises(PatternError, match="keep=… is of a row"):
        Unstructured(keep=3, per="layer")
    with pytest.raises(PatternError, match="per must be"):
        Unstructured(sparsity=0.5, per="block")


def test_a_mask_is_legal_by_its_count_in_all():
    problem = layer(rows=2, n=4)
    uneven = torch.tensor([[True, True, True, True], [False, False, False, False]])
    assert problem.pattern.is_legal(uneven).tolist() == [True, True]
    assert torch.equal(problem.check_mask(uneven), uneven)
    with pytest.raises(WarmStartError, match=r"prunes 3 of 8; the pattern .* asks for exactly 4"):
        problem.check_mask(~torch.tensor([[True, True, True, False], [False] * 4]))


def test_omega_is_checked():
    with pytest.raises(ProblemError, match="omega must be more than 0"):
        layer(rows=2, omega=torch.tensor([1.0, 0.0]))
    with pytest.raises(ProblemError, match=r"omega must be \[2\]"):
        layer(rows=2, omega=torch.ones(3))
    with pytest.raises(ProblemError, match="omega holds 1 NaN"):
        layer(rows=2, omega=torch.tensor([1.0, torch.nan]))


def test_an_instance_on_disk_trades_too(tmp_path):
    problem = layer(omega=torch.arange(1.0, 7.0), refit=Refit(0.02))
    problem.save(tmp_path / "layer.npz")
    loaded = LayerProblem.load(tmp_path / "layer.npz")
    assert loaded.pattern == problem.pattern
    assert loaded.pooled
    assert torch.equal(loaded.shares, problem.shares)
    assert total(loaded, solve(loaded)) == total(problem, solve(problem))


def test_a_row_alone_has_a_count_of_its_own():
    problem = layer(rows=3, n=8)
    assert problem.row(1).pattern == Unstructured(sparsity=0.5)
    assert RowProblem(problem.weight[0], problem.gram, pool()).pattern == Unstructured(sparsity=0.5)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, :5] = False
    assert problem.at_count_of(mask, 1).pattern == Unstructured(keep=3)


# --- solvers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(available_solvers()))
def test_what_prunes_rows_alike_says_so(name):
    info = available_solvers()[name]
    if not info.available or info.capabilities.pooled:
        return
    with pytest.raises(SolverError, match="prunes as much of every row"):
        solve(layer(rows=2, n=4), name)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("omega", [None, torch.tensor([4.0, 1.0, 0.25])])
def test_scores_rank_the_layer(name, omega):
    problem = layer(rows=3, n=8, omega=omega)
    found = solve(problem, name, seed=3)
    assert int((~found.mask).sum()) == problem.pruned
    if name == "wanda":
        score = problem.weight.abs() * problem.gram.diagonal().sqrt()
        score = score * problem.shares.sqrt()[:, None]
        assert float(score[found.mask].min()) > float(score[~found.mask].max())


@settings(max_examples=40)
@given(pooled(), st.sampled_from(STARTS))
def test_trading_ends_at_a_proven_optimum_of_swaps_and_trades(problem, start):
    before = solve(problem, start) if start in ("wanda", "random", "admm") else None
    found = solve(problem, "swap", start=start)
    assert int((~found.mask).sum()) == problem.pruned
    assert set(found.status) == {Status.SWAP_OPTIMAL}
    assert verify(problem, found).checked
    assert improving_swap(problem, found.mask) is None
    if before is not None:
        assert total(problem, found) <= total(problem, before) + slack(problem)
    history = problem.shares @ found.trace.history
    assert bool((history[1:] <= history[:-1] + slack(problem)).all())
    assert abs(float(history[-1]) - total(problem, found)) <= slack(problem)
    again = solve(problem, "swap", start=found.mask)
    assert torch.equal(again.mask, found.mask)
    assert not int(again.trace.trades.sum())


@settings(max_examples=30)
@given(pooled(max_n=8, max_rows=4))
def test_enumeration_is_the_optimum_and_trading_never_below(problem):
    best = solve(problem, "exhaustive")
    assert set(best.status) == {Status.OPTIMAL}
    assert verify(problem, best).checked
    found = solve(problem, "swap")
    assert total(problem, best) <= total(problem, found) + slack(problem)
    left = solve(problem, "swap", start=best.mask)
    assert total(problem, left) >= total(problem, best) - 1e-6 * total(problem, best) - slack(
        problem
    )


def test_on_a_diagonal_gram_trading_is_optimal():
    problem = layer(rows=4, n=9, kind="diagonal", omega=torch.tensor([1.0, 3.0, 0.5, 1.0]))
    cost = problem.shares[:, None] * problem.weight.square() * problem.gram.diagonal()
    least = cost.flatten().sort().values[: problem.pruned].sum()
    for start in ("random", "wanda", "worst"):
        assert total(problem, solve(problem, "swap", start=start)) == pytest.approx(float(least))


@pytest.mark.parametrize("refit", [None, Refit(0.01)])
@pytest.mark.parametrize("omega", [None, torch.tensor([1.0, 9.0, 0.1, 1.0, 2.0, 0.5])])
def test_trading_gains_over_rows_that_prune_alike(refit, omega):
    problem = layer(refit=refit, omega=omega)
    alike = solve(problem.under(problem.pattern.alike()), "swap")
    traded = solve(problem, "swap", start=alike.mask)
    assert int(traded.trace.trades.sum()) > 0
    assert total(problem, traded) < 0.95 * total(problem, alike)
    assert len(set(traded.mask.sum(1).tolist())) > 1


@pytest.mark.parametrize("refit", [None, Refit(0.01)])
def test_what_a_row_counts_decides_what_it_keeps(refit):
    kept = [
        int(solve(layer(refit=refit, omega=torch.tensor([share] + [1.0] * 5))).mask[0].sum())
        for share in (0.01, 1.0, 100.0)
    ]
    assert kept[0] < kept[1] < kept[2]


@pytest.mark.parametrize("refit", [None, Refit(0.01)])
def test_trading_does_not_depend_on_order_or_units(refit):
    problem = layer(rows=5, n=16, refit=refit)
    found = solve(problem, "swap", start="wanda")
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(size, generator=generator) for size in (5, 16))
    moved = LayerProblem(
        problem.weight[rows][:, columns],
        problem.gram[columns][:, columns],
        problem.pattern,
        refit=refit,
    )
    assert torch.equal(solve(moved, "swap", start="wanda").mask, found.mask[rows][:, columns])
    for w, g in ((2.0**20, 1.0), (2.0**-30, 2.0**10), (-1.0, 1.0)):
        scaled = LayerProblem(w * problem.weight, g * problem.gram, problem.pattern, refit=refit)
        assert torch.equal(solve(scaled, "swap", start="wanda").mask, found.mask)
    counted = LayerProblem(
        problem.weight, problem.gram, problem.pattern, refit=refit, omega=torch.full((5,), 8.0)
    )
    assert torch.equal(solve(counted, "swap", start="wanda").mask, found.mask)


@pytest.mark.parametrize("refit", [None, Refit(0.01)])
def test_a_layer_of_one_row_is_that_row(refit):
    problem = layer(rows=1, n=20, refit=refit)
    for solver in ("wanda", "admm", "swap"):
        both = [solve(p, solver).mask for p in (problem, problem.row(0))]
        assert torch.equal(*both)


@pytest.mark.parametrize("refit", [None, Refit(0.01)])
def test_threads_and_memory_change_nothing(refit):
    problem = layer(rows=80, n=16, refit=refit)
    for solver in ("admm", "swap"):
        found = [
            solve(problem, solver, threads=threads, memory_limit=memory).mask
            for threads, memory in ((1, None), (2, None), (2, 2**15))
        ]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("refit", [None, Refit(0.01)])
@pytest.mark.parametrize("sparsity", [0.0, 0.03, 0.97])
def test_rows_may_keep_all_or_nothing(refit, sparsity):
    problem = layer(rows=4, n=8, refit=refit, sparsity=sparsity)
    found = solve(problem, "swap", start="random")
    assert set(found.status) == {Status.SWAP_OPTIMAL}
    verify(problem, found)


@pytest.mark.parametrize("refit", [None, Refit(0.01)])
def test_dead_layers_are_proven_at_once(refit):
    for weight, gram in ((0.0, 1.0), (1.0, 0.0)):
        problem = LayerProblem(
            weight * torch.ones(3, 6), gram * random_gram(6, "full", 1), pool(), refit=refit
        )
        found = solve(problem, "swap", start="random")
        assert set(found.status) == {Status.SWAP_OPTIMAL}
        assert not int(found.trace.trades.sum())
        verify(problem, found)


def test_float32_layers_trade_to_a_proof():
    problem = layer(rows=40, n=64)
    single = LayerProblem(problem.weight.float(), problem.gram.float(), problem.pattern)
    for refit in (None, Refit(0.01)):
        one = single.refitting(refit)
        found = solve(one, "swap", start="wanda")
        assert set(found.status) == {Status.SWAP_OPTIMAL}
        verify(one, found)


@pytest.mark.parametrize("refit", [None, Refit(0.01)])
def test_a_limit_leaves_a_legal_mask_and_claims_nothing(refit):
    problem = layer(rows=5, n=16, refit=refit)
    start = solve(problem, "random", seed=2)
    for more in ({"limits": Limits(seconds=0)}, {"max_swaps": 1}):
        found = solve(problem, "swap", start=start.mask, **more)
        assert set(found.status) == {Status.FEASIBLE}
        assert total(problem, found) <= total(problem, start) + slack(problem)
        verify(problem, found)


def test_a_start_of_rows_that_prune_alike_has_the_layers_count():
    problem = layer(rows=3, n=7, sparsity=0.5)  # 10 of 21: 4, 3 and 3
    found = solve(problem, "swap", start="sparsegpt", max_swaps=0)
    assert (~found.mask).sum(1).tolist() == [4, 3, 3]


def test_refitted_weights_of_rows_with_counts_of_their_own():
    problem = layer(rows=5, n=12, refit=Refit(0.05))
    found = solve(problem, "swap")
    weights = problem.weights(found.mask)
    torch.testing.assert_close(weights, found.weight, rtol=1e-8, atol=1e-10)
    for row in range(problem.rows):
        alone = problem.at_count_of(found.mask, row)
        torch.testing.assert_close(alone.weights(found.mask[row]), weights[row])


# --- the relaxation of a layer, and what it proves -----------------------------------------------------


@settings(max_examples=30)
@given(pooled(max_n=8, max_rows=4), st.sampled_from(("box", "shift")))
def test_bounds_are_below_the_optimum(problem, method):
    problem = problem.refitting(None)
    bound = lower_bound(problem, method)
    best = solve(problem, "exhaustive")
    assert float(problem.shares @ bound.value) <= total(problem, best) + slack(problem)
    gaps = bound.gap(best.objective)
    assert bool((gaps == gaps[0]).all())
    assert bool((gaps >= -1e-9).all())


def test_the_bound_of_a_diagonal_gram_is_tight():
    problem = layer(rows=4, n=9, kind="diagonal", omega=torch.tensor([1.0, 3.0, 0.5, 1.0]))
    best = total(problem, solve(problem, "swap"))
    proven = float(problem.shares @ lower_bound(problem, "shift").value)
    assert 0.99 * best <= proven <= best * (1 + 1e-9)


@pytest.mark.parametrize("omega", [None, torch.tensor([1.0, 9.0, 0.1, 1.0, 2.0, 0.5])])
def test_the_relaxation_of_a_layer_is_what_a_general_solver_finds(omega):
    """min Σ ωᵣ fᵣ(xᵣ) over the box and one count, by SLSQP."""
    problem = layer(rows=6, n=8, omega=omega)
    shape, share = problem.weight.shape, problem.shares[:, None].numpy()
    w, gram = problem.weight.numpy(), problem.gram.numpy()

    def value(x):
        dropped = w * x.reshape(shape)
        return float((share * dropped * (dropped @ gram)).sum())

    def slope(x):
        return (2 * share * w * (w * x.reshape(shape) @ gram)).ravel()

    count = {"type": "eq", "fun": lambda x: x.sum() - problem.pruned, "jac": lambda x: x * 0 + 1}
    size = w.size
    found = minimize(
        value,
        [problem.pruned / size] * size,
        jac=slope,
        bounds=[(0, 1)] * size,
        constraints=[count],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert found.success
    bound = lower_bound(problem, "box", steps=2000, tolerance=1e-6)
    assert float(problem.shares @ bound.value) == pytest.approx(found.fun, rel=1e-4)


def test_a_relaxed_start_counts_for_the_layer():
    """Where rows differ much, equal counts are far from any good mask of the layer."""
    problem = layer(rows=12, n=32, sparsity=0.6, seed=5)
    alike = solve(problem.under(problem.pattern.alike()), "relax", refine=False, max_iterations=0)
    start = solve(problem, "relax", refine=False, max_iterations=0)
    assert total(problem, start) < 0.9 * total(problem, alike)
    whole = solve(problem, "relax")
    verify(problem, whole)
    assert set(whole.status) == {Status.SWAP_OPTIMAL}
    assert float(whole.gap[0]) == pytest.approx(float(whole.gap[-1]))
    assert 0 < float(whole.lower_bound.sum()) < total(problem, whole)


@pytest.mark.parametrize("refine", [True, False])
def test_relaxing_is_never_worse_than_its_start(refine):
    problem = layer(rows=4, n=10)
    best = solve(problem, "exhaustive")
    found = solve(problem, "relax", start=best.mask, refine=refine)
    assert total(problem, found) == pytest.approx(total(problem, best))


def test_certificates_of_a_layer_are_checked():
    problem = layer(rows=3, n=8)
    bound = lower_bound(problem, "box")
    found = solve(problem, "swap")

    def claim(factor, certificate):
        claimed = Solution.of(
            problem,
            found.mask,
            lower_bound=factor * bound.value,
            certificate=certificate,
            status=Status.SWAP_OPTIMAL,
        )
        return verify(problem, claimed)

    assert claim(1.0, bound.certificate).checked
    with pytest.raises(VerificationError, match="its certificate proves"):
        claim(1.01, bound.certificate)
    own_counts = replace(bound.certificate, penalty=torch.ones(3, 1, dtype=torch.float64))
    with pytest.raises(VerificationError, match="speak of a row's own count"):
        claim(1.0, own_counts)
    moved = replace(bound.certificate, point=torch.full((3, 8), 0.3, dtype=torch.float64))
    assert float(moved.check(problem).sum()) <= float(bound.value.sum())
    # of rows that prune alike the same point proves another thing
    alike = problem.under(problem.pattern.alike())
    assert float(bound.certificate.check(alike).sum()) >= float(bound.value.sum()) * (1 - 1e-12)


def test_bounds_of_rows_that_prune_alike_are_refused():
    with pytest.raises(
        SolverError, match="whose rows trade and keep their weights take method 'box'"
    ):
        lower_bound(layer(rows=2, n=4), "sdp")
    with pytest.raises(SolverError, match="'box' is of weights as they are"):
        lower_bound(layer(rows=2, n=4, refit=Refit(0.01)), "box")


# --- what is claimed falsely -------------------------------------------------------------------------


@pytest.mark.parametrize("refit", [None, Refit(0.01)])
def test_a_trade_that_improves_is_found(refit):
    problem = layer(refit=refit)
    alike = problem.under(problem.pattern.alike())
    mask = solve(alike, "swap").mask
    trade = improving_swap(problem, mask)
    assert trade is not None
    assert trade.row != trade.other
    better = mask.clone()
    better[trade.row, trade.kept] = False
    better[trade.other, trade.pruned] = True
    change = problem.shares @ (problem.objective(better) - problem.objective(mask))
    assert float(change) == pytest.approx(trade.delta, rel=1e-9)
    best = min(
        float(problem.objective(_traded(mask, i, u, j, p)).sum())
        for i in range(problem.rows)
        for j in range(problem.rows)
        if i != j
        for u in [*mask[i].nonzero()[:3, 0].tolist(), trade.kept]
        for p in [*(~mask[j]).nonzero()[:3, 0].tolist(), trade.pruned]
        if mask[i, u] and not mask[j, p]
    )
    assert best == pytest.approx(float(problem.objective(better).sum()))
    claimed = replace(Solution.of(problem, mask), status=(Status.SWAP_OPTIMAL,) * problem.rows)
    with pytest.raises(VerificationError, match=r"of row \d instead of \d+ of row"):
        verify(problem, claimed)


def _traded(mask, i, u, j, p):
    other = mask.clone()
    other[i, u], other[j, p] = False, True
    return other


def test_a_swap_inside_a_row_is_found():
    problem = layer()
    found = solve(problem, "swap")
    mask = found.mask.clone()
    row = int(((mask.sum(1) > 0) & (mask.sum(1) < problem.n)).nonzero()[0])
    u, p = mask[row].nonzero()[0, 0], (~mask[row]).nonzero()[0, 0]
    mask[row, u], mask[row, p] = False, True
    assert improving_swap(problem, mask) is not None


def test_claims_that_do_not_hold_are_refused():
    problem = layer(rows=3, n=6)
    best = solve(problem, "exhaustive")
    worse = solve(problem, "random")

    def claim(base, **changes):
        with pytest.raises(VerificationError) as caught:
            verify(problem, replace(base, **changes))
        return str(caught.value)

    mixed = (Status.OPTIMAL, Status.SWAP_OPTIMAL, Status.OPTIMAL)
    assert "proven together" in claim(best, status=mixed)
    optimal = (Status.OPTIMAL,) * 3
    assert "changes the sum" in claim(
        worse, status=optimal, lower_bound=worse.objective, vouched=("me",) * 3
    )
    assert "without proof" in claim(best, lower_bound=torch.zeros(3, dtype=torch.float64))
    assert "a mask of sum" in claim(worse, lower_bound=worse.objective, vouched=("me",) * 3)
    swapped = best.mask.clone()
    swapped[0, int(swapped[0].nonzero()[0])] = False
    assert "asks for exactly" in claim(best, mask=swapped)
    assert "no exact backend vouches" in claim(best, vouched=())
