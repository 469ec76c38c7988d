"""Rows that share a budget: what bounds prove of their sum, and claims that do not hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from certificates import claimed
from hypothesis import given, settings
from hypothesis import strategies as st
from pooled_layers import layer, shared_budget, slack, total
from scipy.optimize import LinearConstraint, minimize

from maskopt import LeastSquaresUpdate, Solution, Status, improving_swap, lower_bound, solve, verify
from maskopt.certificates.certificate import Certificate
from maskopt.errors import SolverError, VerificationError

# --- the relaxation of a layer, and what it proves ---------------------------------------------------


@pytest.mark.parametrize("update", [False, True])
@settings(max_examples=min(20, settings().max_examples // 2))
@given(data=st.data())
def test_bounds_are_below_the_optimum(update, data):
    problem = data.draw(shared_budget(max_n=6 if update else 8, max_rows=3 if update else 4))
    if update:
        problem = problem.with_update(LeastSquaresUpdate(data.draw(st.sampled_from((0.01, 0.3)))))
        splits = data.draw(st.integers(0, 3))
        bound = lower_bound(problem, "perspective", turns=10, splits=splits)
    else:
        problem = problem.with_update(None)
        bound = lower_bound(problem, data.draw(st.sampled_from(("box", "shift"))))
    best = solve(problem, "exhaustive")
    assert float(problem.shares @ bound.value) <= total(problem, best) + slack(problem)
    gaps = bound.gap(best.objective)
    assert update or (bool((gaps == gaps[0]).all()) and bool((gaps >= -1e-9).all()))
    more = {"lower_bound": bound.value, "certificate": bound.certificate}
    verify(problem, Solution.of(problem, best.mask, **more))


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


def test_bounds_are_worth_something():
    problem = layer(
        rows=4, n=12, update=LeastSquaresUpdate(0.1), omega=torch.tensor([1.0, 3.0, 0.5, 2.0])
    )
    found = total(problem, solve(problem, "swap"))
    proven, unsplit, other = (
        float(problem.shares @ lower_bound(problem, "perspective", **options).value)
        for options in ({}, {"splits": 0}, {"threads": 2})
    )
    assert 0.6 * found <= proven <= found * (1 + 1e-9)
    assert unsplit < proven
    assert other == proven
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
    assert least - 1e-3 <= float(sums.min())
    assert float(sums.max()) <= most + 1e-3


@pytest.mark.parametrize(
    ("max_deviation", "part"), [(None, 0.9), (0.0, 1.001), (0.1, 0.801), (0.2, 0.601)]
)
def test_a_relaxed_start_counts_for_the_layer(max_deviation, part):
    """Where rows differ much, equal counts are far from any good mask of the layer; where they count for very
    different amounts, limits hold most of them."""
    omega = torch.linspace(0, 6, 12, dtype=torch.float64).exp()
    more = {"omega": omega, "max_deviation": max_deviation}
    if max_deviation is None:
        more = {"sparsity": 0.6, "seed": 5}
    problem = layer(rows=12, n=32, **more)
    equal = problem.under(problem.pattern.uniform())
    begun, start = (solve(p, "relax", refine=False, max_iterations=0) for p in (equal, problem))
    assert total(problem, start) <= part * total(problem, begun)
    whole = solve(problem, "relax")
    verify(problem, whole)
    assert set(whole.status) == {Status.SWAP_OPTIMAL}
    assert float(whole.gap[0]) == pytest.approx(float(whole.gap[-1]))
    assert 0 < float(problem.shares @ whole.lower_bound) < total(problem, whole)


def test_certificates_of_a_layer_are_checked():
    problem = layer(rows=3, n=8)
    bound, found = lower_bound(problem, "box"), solve(problem, "swap")
    assert claimed(problem, found, bound).checked
    with pytest.raises(VerificationError, match="its certificate proves"):
        claimed(problem, found, bound, 1.01)
    own_counts = replace(bound.certificate, penalty=torch.ones(3, 1, dtype=torch.float64))
    with pytest.raises(VerificationError, match="need a count of each row"):
        claimed(problem, found, bound, certificate=own_counts)
    moved = replace(bound.certificate, point=torch.full((3, 8), 0.3, dtype=torch.float64))
    assert float(moved.check(problem).sum()) <= float(bound.value.sum())
    # of rows with equal counts the same point proves another thing
    equal = problem.under(problem.pattern.uniform())
    assert float(bound.certificate.check(equal).sum()) >= float(bound.value.sum()) * (1 - 1e-12)
    # of other rows they are refused
    with pytest.raises(
        SolverError, match="'sdp' needs an equal count in every row; take method 'box'"
    ):
        lower_bound(layer(rows=2, n=4), "sdp")
    with pytest.raises(SolverError, match=r"'box' is for unchanged weights; .* 'perspective'"):
        lower_bound(layer(rows=2, n=4, update=LeastSquaresUpdate(0.01)), "box")


# --- what is claimed falsely -------------------------------------------------------------------------


def exchanged(mask, i, u, j, p):
    other = mask.clone()
    other[i, u], other[j, p] = False, True
    return other


@pytest.mark.parametrize("update", [None, LeastSquaresUpdate(0.01)])
def test_a_swap_between_rows_that_improves_is_found(update):
    problem = layer(update=update)
    mask = solve(problem.under(problem.pattern.uniform()), "swap").mask
    swap = improving_swap(problem, mask)
    assert swap is not None
    assert swap.row != swap.other
    better = problem.objective(exchanged(mask, swap.row, swap.kept, swap.other, swap.pruned))
    change = problem.shares @ (better - problem.objective(mask))
    assert float(change) == pytest.approx(swap.delta, rel=1e-9)
    best = min(
        float(problem.objective(exchanged(mask, i, u, j, p)).sum())
        for i in range(problem.rows)
        for j in range(problem.rows)
        if i != j
        for u in [*mask[i].nonzero()[:2, 0].tolist(), swap.kept]
        for p in [*(~mask[j]).nonzero()[:2, 0].tolist(), swap.pruned]
        if mask[i, u] and not mask[j, p]
    )
    assert best == pytest.approx(float(better.sum()))
    claim = replace(Solution.of(problem, mask), status=(Status.SWAP_OPTIMAL,) * problem.rows)
    with pytest.raises(VerificationError, match=r"of row \d instead of \d+ of row"):
        verify(problem, claim)
    mask = solve(problem, "swap").mask  # and inside of a row
    row = int(((mask.sum(1) > 0) & (mask.sum(1) < problem.n)).nonzero()[0])
    u, p = mask[row].nonzero()[0, 0], (~mask[row]).nonzero()[0, 0]
    assert improving_swap(problem, exchanged(mask, row, u, row, p)) is not None


def test_claims_that_do_not_hold_are_refused():
    problem = layer(rows=3, n=6)
    best, worse = solve(problem, "exhaustive"), solve(problem, "random")
    words, optimal = ("SCIP 10.0",) * 3, (Status.OPTIMAL,) * 3
    mixed = (Status.OPTIMAL, Status.SWAP_OPTIMAL, Status.OPTIMAL)
    fewer = best.mask.clone()
    fewer[0, int(fewer[0].nonzero()[0])] = False
    high = {"lower_bound": worse.objective, "trusted": words}
    for message, base, changes in (
        ("proven together", best, {"status": mixed}),
        ("changes the sum", worse, {"status": optimal, **high}),
        ("without proof", best, {"lower_bound": 0 * best.objective}),
        ("a mask of sum", worse, high),
        ("asks for exactly", best, {"mask": fewer}),
        ("no exact solver is trusted with it", best, {"trusted": ()}),
    ):
        with pytest.raises(VerificationError, match=message):
            verify(problem, replace(base, **changes))
    # and relaxing is never worse than its start
    for refine in (True, False):
        found = solve(problem, "relax", start=best.mask, refine=refine)
        assert total(problem, found) == pytest.approx(total(problem, best))
