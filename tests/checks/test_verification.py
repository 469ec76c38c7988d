"""How far a claim may be off, in any unit: what is within rounding passes, three times as much does not."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from strategies import random_gram, random_weight

from maskopt import (
    NM,
    LayerProblem,
    Refit,
    RowProblem,
    Solution,
    Status,
    Unstructured,
    checks,
    lower_bound,
    solve,
    verification,
    verify,
)
from maskopt.errors import VerificationError

#: claims off by less than their tolerance, and by more
WITHIN, BEYOND = 0.5, 3.0
WORDS = ("SCIP 10.0",) * 2
UNITS = pytest.mark.parametrize("unit", [1e-5, 1.0, 1e5])


def large(unit, dtype=torch.float64):
    """Too many masks to enumerate."""
    weight = random_weight(2, 40, 3, dtype) * unit
    return LayerProblem(weight, random_gram(40, "full", 7, dtype), NM(keep=2, of=4))


def cancelling(unit, n=40):
    """Of every four inputs the first two are opposite and weigh the same: pruning both costs nothing, as a
    sum of terms that are not 0. And the mask that does."""
    turn = torch.eye(n, dtype=torch.float64)
    turn[1::4] = -turn[::4]
    weight = random_weight(2, n, 3, torch.float64) * unit
    weight[:, 1::4] = weight[:, ::4]
    gram = turn @ random_gram(n, "full", 7, torch.float64) @ turn.T
    problem = LayerProblem(weight, gram, NM(keep=2, of=4))
    return problem, Solution.of(problem, (torch.arange(n) % 4 > 1).expand(2, n))


def rounding(problem, mask):
    return problem.rounding(problem.weights(mask))


def small(unit):
    """35 masks a row."""
    return LayerProblem(
        random_weight(2, 8, 3) * unit, random_gram(8, "full", 7), Unstructured(keep=3)
    )


def assert_refused(problem, solution, message):
    with pytest.raises(VerificationError, match=message):
        verify(problem, solution)


@UNITS
@pytest.mark.parametrize("sign", [1, -1])
def test_an_objective_may_be_off_by_1e_9_of_itself(unit, sign):
    problem = large(unit)
    honest = solve(problem, "worst")
    for factor, passes in ((WITHIN, True), (BEYOND, False)):
        off = honest.objective.clone()
        off[1] *= 1 + sign * factor * 1e-9
        if passes:
            verify(problem, replace(honest, objective=off))
        else:
            assert_refused(problem, replace(honest, objective=off), "objective: row 1")


@UNITS
def test_or_by_what_float64_can_lose_of_its_sum(unit):
    problem, honest = cancelling(unit)
    off = rounding(problem, honest.mask)
    assert bool((off < 1e-12 * problem.diagonal_mass()).all())
    assert bool((honest.objective < WITHIN * off).all())
    verify(problem, replace(honest, objective=WITHIN * off))
    assert_refused(problem, replace(honest, objective=BEYOND * off), "objective: row 0")


@pytest.mark.parametrize("large", [1e3, 1e8])
def test_weights_that_are_kept_excuse_no_objective_and_no_optimum(large):
    """Large weights that every good mask keeps are no terms of its sum."""
    weight = random_weight(1, 24, 3, torch.float64) * 1e-3
    weight[0, :4] = large
    problem = LayerProblem(weight, random_gram(24, "full", 7), Unstructured(keep=12))
    best = solve(problem, "swap")
    assert bool(best.mask[0, :4].all())
    assert float(best.objective) < 1e-9 * float(problem.diagonal_mass())
    assert_refused(problem, replace(best, objective=best.objective * 1.01), "objective: row 0")
    for bound in (0.0, 0.9):
        claimed = replace(best, status=(Status.OPTIMAL,), lower_bound=bound * best.objective)
        assert_refused(problem, replace(claimed, trusted=WORDS[:1]), "optimal without proof")


def test_weights_that_nearly_cancel_are_not_optimal_without_a_bound():
    """What is left of the sum is small, and far above what float64 can lose of it."""
    problem, _ = cancelling(1.0)
    weight = problem.weight.clone()
    weight[:, 1::4] *= 1 + 1e-6
    problem = LayerProblem(weight, problem.gram, problem.pattern)
    best = solve(problem, "swap", start=(torch.arange(40) % 4 > 1).expand(2, 40))
    assert bool((best.objective < 1e-12 * problem.diagonal_mass()).all())
    assert bool((best.objective > 2 * rounding(problem, best.mask)).all())
    claimed = replace(best, status=(Status.OPTIMAL,) * 2)
    assert_refused(problem, claimed, "claims optimal without proof")


def test_costs_below_the_normal_numbers_are_not_zero():
    weight = random_weight(1, 24, 3, torch.float64) * 1e-156
    problem = LayerProblem(weight, random_gram(24, "full", 7), Unstructured(keep=12))
    honest = solve(problem, "worst")
    assert 0 < float(honest.objective) < 1e-307
    zero = torch.zeros(1, dtype=torch.float64)
    forged = replace(honest, objective=zero, status=(Status.OPTIMAL,))
    assert_refused(problem, forged, "objective: row 0")


def test_a_weight_of_a_row_that_prunes_nothing_excuses_no_sum_of_rows():
    weight, gram = random_weight(3, 12, 6, torch.float64), random_gram(12, "full", 7)
    weight[weight == 0] = 0.1
    problem = LayerProblem(weight, gram, Unstructured(0.3, per="layer"))
    problem = problem.counting(torch.tensor([1e12, 1.0, 1.0], dtype=torch.float64))
    best = solve(problem, "exhaustive")
    assert bool(best.mask[0].all())
    verify(problem, best)
    claimed = replace(best, lower_bound=0.9 * best.objective)
    assert_refused(problem, claimed, "rows claim optimal without proof")


@UNITS
def test_a_bound_may_be_above_the_objective_by_what_float64_can_lose(unit):
    problem = large(unit)
    honest = replace(solve(problem, "swap"), trusted=WORDS)
    off = rounding(problem, honest.mask)
    verify(problem, replace(honest, lower_bound=honest.objective))
    verify(problem, replace(honest, lower_bound=honest.objective + WITHIN * off))
    assert_refused(
        problem,
        replace(honest, lower_bound=honest.objective + BEYOND * off),
        "row 0 .* above the objective",
    )
    for bad in (torch.nan, torch.inf, -1e-300):
        wrong = torch.tensor([0.0, bad], dtype=torch.float64)
        assert_refused(
            problem, replace(honest, lower_bound=wrong), "lower bound: row 1 .* f ≥ 0 always"
        )


@UNITS
def test_a_bound_may_be_above_what_its_certificate_proves_by_1e_9(unit):
    problem = large(unit)
    bound = lower_bound(problem, "box")
    solution = Solution.of(
        problem,
        solve(problem, "worst").mask,
        lower_bound=bound.value,
        certificate=bound.certificate,
    )
    assert bool((bound.value > 1e-3 * problem.diagonal_mass()).all())
    near = replace(solution, lower_bound=bound.value * (1 + WITHIN * 1e-9))
    assert verify(problem, near).checked
    far = replace(solution, lower_bound=bound.value * (1 + BEYOND * 1e-9))
    assert_refused(problem, far, "row 0 .* its certificate proves")


@UNITS
def test_a_bound_that_nothing_proves_may_be_rounding(unit):
    problem = large(unit)
    honest = solve(problem, "worst")
    off = rounding(problem, honest.mask)
    assert verify(problem, replace(honest, lower_bound=WITHIN * off)).checked
    assert_refused(
        problem, replace(honest, lower_bound=BEYOND * off), "row 0 .* without a certificate"
    )


@UNITS
def test_optimal_needs_a_gap_closed_to_1e_6_of_the_objective(unit):
    problem = large(unit)
    best = solve(problem, "swap")
    optimal = replace(best, status=(Status.FEASIBLE, Status.OPTIMAL), trusted=WORDS)
    off = torch.tensor([0.5, WITHIN * 1e-6], dtype=torch.float64)
    verify(problem, replace(optimal, lower_bound=best.objective * (1 - off)))
    off[1] = BEYOND * 1e-6
    assert_refused(
        problem,
        replace(optimal, lower_bound=best.objective * (1 - off)),
        "row 1 claims optimal without proof",
    )
    # an objective of nothing but rounding
    problem, nothing = cancelling(unit)
    off = WITHIN * rounding(problem, nothing.mask)
    verify(problem, replace(nothing, objective=off, status=(Status.OPTIMAL,) * 2))


@UNITS
def test_swap_optimal_leaves_no_swap_above_1e_6_of_the_objective(unit):
    for off, passes in ((WITHIN, True), (BEYOND, False)):
        weight = torch.ones(1, 40, dtype=torch.float64) * unit
        weight[0, 0] *= (1 + 20 * off * 1e-6) ** 0.5
        problem = LayerProblem(weight, torch.eye(40).double(), Unstructured(keep=20))
        mask = (torch.arange(40) >= 20)[None]
        claimed = Solution.of(problem, mask, status=Status.SWAP_OPTIMAL)
        if passes:
            verify(problem, claimed)
        else:
            assert_refused(
                problem, claimed, "row 0 claims swap-optimal, yet keeping input 0 instead of"
            )


def test_optimal_implies_swap_optimal():
    """Whoever is trusted with the bound: where a swap improves, the claim is refuted."""
    problem = large(1.0)
    start = solve(problem, "worst")
    forged = replace(
        start, lower_bound=start.objective, status=(Status.OPTIMAL,) * 2, trusted=WORDS
    )
    assert_refused(problem, forged, "row 0 claims optimal, yet keeping input")


@UNITS
def test_a_bound_may_be_above_the_best_of_all_masks_by_1e_6_of_it(unit):
    problem = small(unit)
    optimum = solve(problem, "exhaustive").objective
    worst = replace(solve(problem, "worst"), trusted=WORDS)
    verify(problem, replace(worst, lower_bound=optimum * (1 + WITHIN * 1e-6)))
    assert_refused(
        problem,
        replace(worst, lower_bound=optimum * (1 + BEYOND * 1e-6)),
        "row 0 .* a mask of objective",
    )


@UNITS
def test_a_second_best_mask_that_no_swap_leaves_is_not_optimal(unit):
    """Pairs that cancel: between them lie masks ten times as bad."""
    gram = torch.eye(4, dtype=torch.float64)
    gram[0, 1] = gram[1, 0] = gram[2, 3] = gram[3, 2] = -0.9
    for off, passes in ((WITHIN, True), (1.6, False)):
        weight = torch.ones(1, 4, dtype=torch.float64) * unit
        weight[0, :2] *= (1 + off * 1e-6) ** 0.5
        problem = LayerProblem(weight, gram, NM(keep=2, of=4))
        mask = torch.tensor([[False, False, True, True]])
        best = problem.objective(~mask)
        claimed = Solution.of(
            problem,
            mask,
            status=Status.OPTIMAL,
            lower_bound=best * (1 + min(off, 0.9) * 1e-6),
            trusted=("SCIP 10.0",),
        )
        if passes:
            verify(problem, claimed)
        else:
            assert_refused(problem, claimed, "row 0 claims optimal, but a mask of objective")


@UNITS
def test_enumeration_allows_for_rounding_where_the_best_mask_costs_nothing(unit):
    problem, best = cancelling(unit, 8)
    off = WITHIN * rounding(problem, best.mask)
    claimed = replace(best, status=(Status.OPTIMAL,) * 2)
    verify(problem, replace(claimed, objective=off, lower_bound=off))
    other = Solution.of(problem, best.mask.flip(1))
    off = 10 * (rounding(problem, best.mask) + rounding(problem, other.mask))
    worse = replace(other, lower_bound=off, trusted=WORDS)
    assert_refused(problem, worse, "row 0 .* a mask of objective")


@pytest.mark.parametrize("pattern", [Unstructured(keep=0), Unstructured(keep=8)], ids=str)
def test_rows_of_one_mask_are_optimal(pattern):
    problem = LayerProblem(random_weight(2, 8, 3), random_gram(8, "full", 7), pattern)
    mask = torch.full((2, 8), pattern.keep > 0)
    only = Solution.of(
        problem,
        mask,
        status=Status.OPTIMAL,
        lower_bound=problem.objective(mask),
        trusted=WORDS,
    )
    assert verify(problem, only, require="checked").checked


def test_a_row_is_verified_as_a_layer_of_one():
    row = small(1.0).row(1)
    assert verify(row, solve(row, "exhaustive"), require="checked").basis == ("checked",)


def test_weights_and_gram_of_float32_are_widened():
    problem = large(1.0, torch.float32)
    for solver in ("swap", "relax"):
        assert verify(problem, solve(problem, solver)).checked


@pytest.mark.parametrize("what", ["objective", "lower_bound"])
@pytest.mark.parametrize(
    "bad",
    [lambda x: x.float(), lambda x: x[:1], lambda x: x[:, None], lambda x: x.sum()],
    ids=["float32", "short", "column", "scalar"],
)
def test_values_of_another_shape_or_type_are_named(what, bad):
    problem = small(1.0)
    honest = solve(problem, "wanda")
    forged = replace(honest, **{what: bad(getattr(honest, what))})
    assert_refused(problem, forged, rf"{what} must be float64 \[2\]")


def test_a_status_that_does_not_exist_is_named():
    problem = small(1.0)
    honest = solve(problem, "wanda")
    assert_refused(
        problem, replace(honest, status=("feasible", "perfect")), "row 1 claims 'perfect'"
    )
    verify(problem, replace(honest, status=("feasible", "feasible")))


def test_blocks_of_any_size_verify_the_same(monkeypatch):
    problem = large(1.0)
    solution, start = solve(problem, "swap"), solve(problem, "worst")
    swap = checks.improving_swap(problem.row(0), start.mask[0])
    for module, pairs in itertools.product((verification, checks), (1, 7, 100)):
        monkeypatch.setattr(module, "PAIRS_AT_ONCE", pairs)
        assert verify(problem, solution).checked
        found = checks.improving_swap(problem.row(0), start.mask[0])
        assert found[:2] == swap[:2]
        assert found.delta == pytest.approx(swap.delta, rel=1e-12)


def test_weights_that_meet_no_input_are_refitted_without_a_claim_on_rounding():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    x[:, 0] = 0
    weight = torch.zeros(2, 6, dtype=torch.float64)
    weight[:, 0] = 1e6
    weight[1] = torch.randn(6, generator=generator, dtype=torch.float64)
    problem = LayerProblem(weight, x.T @ x / 40, Unstructured(0.5), refit=Refit(0.01))
    for solver in ("exhaustive", "branch", "admm", "obs", "swap"):
        verify(problem, solve(problem, solver))
    off = solve(problem, "exhaustive").objective + 1.0
    assert_refused(
        problem, replace(solve(problem, "exhaustive"), objective=off), "objective: row 0"
    )


def test_rows_that_weigh_nothing_leave_no_room_and_need_none():
    problem = LayerProblem(torch.zeros(2, 40), torch.eye(40), NM(keep=2, of=4))
    solution = solve(problem, "swap")
    assert verify(problem, replace(solution, status=(Status.OPTIMAL,) * 2)).checked
    off = torch.tensor([0.0, 1e-300], dtype=torch.float64)
    assert_refused(problem, replace(solution, objective=off), "objective: row 1")
    assert_refused(problem, replace(solution, lower_bound=off), "row 1 .* above the objective")


@pytest.mark.parametrize("penalty", [1e8, 1e12, 1e14])
def test_a_penalty_on_what_is_not_chosen_hides_nothing(penalty):
    rng = np.random.default_rng(0)
    u = np.triu(rng.integers(0, 2, (12, 12)), 1).astype(float)
    u += u.T
    u[0, 0] = penalty
    problem = RowProblem.from_quadratic(u, select=4)
    honest = solve(problem, "branch", proof=True, time_limit=20)
    assert verify(problem, honest).checked
    for chosen in list(itertools.combinations(range(1, 12), 4))[::30]:
        mask = torch.ones(1, 12, dtype=torch.bool)
        mask[0, list(chosen)] = False
        cost = problem.as_layer().objective(mask)
        if float(cost) == float(honest.objective):
            continue
        forged = replace(
            honest, mask=mask, objective=cost, lower_bound=cost, status=(Status.OPTIMAL,)
        )
        with pytest.raises(VerificationError):
            verify(problem, forged, require="checked")


@pytest.mark.parametrize(
    "given",
    [("branch", {}), ("branch", {"proof": True}), ("scip", {}), ("scip", {"presolve": False})],
)
def test_whole_numbers_are_proven_where_the_best_is_nothing(given):
    star = np.zeros((4, 4))
    star[0, 1:] = 1
    problem = RowProblem.from_quadratic(star, select=2)
    solution = solve(problem, given[0], **given[1])
    verify(problem, solution)
    assert solution.status == (Status.OPTIMAL,)
    assert problem.posed(float(solution.objective), float(solution.lower_bound))[:2] == (0.0, 0.0)


def test_whole_numbers_are_optimal_where_the_next_value_is_proven_and_not_before():
    """Within 1e-6 of 420 million there are a hundred values."""
    u = np.triu(np.random.default_rng(1).integers(0, 2, (14, 14)), 1) * 2.0
    problem = RowProblem.from_quadratic(u + u.T + np.diag(np.full(14, 6e7)), select=7)
    best, other = solve(problem, "branch", proof=True), solve(problem, "swap")
    assert best.status == (Status.OPTIMAL,)
    assert float(best.objective) == float(solve(problem, "exhaustive").objective)
    assert 0 < float(other.objective - best.objective) < 1e-7 * float(best.objective)
    assert verify(problem, best, require="exact").checked
    forged = replace(best, mask=other.mask, objective=other.objective)
    assert_refused(problem, forged, "row 0 claims optimal without proof")
    forged = replace(forged, lower_bound=other.objective)
    assert_refused(problem, forged, "row 0 .* a mask of objective")
    low = replace(best, objective=best.objective - 4, lower_bound=best.objective - 4)
    assert_refused(problem, low, "objective: row 0")
    short = replace(best, lower_bound=best.objective - 4, trusted=("SCIP 10.0.0",), proof=None)
    assert_refused(problem, short, "row 0 claims optimal without proof")
    for solver in ("scip", "gurobi", "highs"):  # their tolerances are many values wide
        solution = solve(problem, solver)
        verify(problem, solution)
        assert solution.status == (Status.FEASIBLE,)


@pytest.mark.parametrize("power", [-290, 160, 290])
def test_bounds_at_the_ends_of_float64(power):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(50, 12))
    gram, weight = x.T @ x / 50, rng.normal(size=(3, 12))
    usual = LayerProblem(weight, gram, Unstructured(keep=6))
    scaled = LayerProblem(weight, gram * 10.0**power, Unstructured(keep=6))
    for solver in ("relax", "frank_wolfe", "portfolio", "branch"):
        solution = solve(scaled, solver)
        verify(scaled, solution)
        assert solution.status == solve(usual, solver).status


def test_a_solution_is_a_start_and_a_mask_is_no_solution():
    problem = LayerProblem(random_weight(3, 12, 1), random_gram(12, "full", 2), Unstructured(0.5))
    start = solve(problem, "random")
    found = solve(problem, "swap", start=start)
    assert torch.equal(found.mask, solve(problem, "swap", start=start.mask).mask)
    with pytest.raises(VerificationError, match=r"not a Tensor; of a mask alone make Solution\.of"):
        verify(problem, found.mask)
