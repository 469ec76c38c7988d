"""What verify refuses, which swaps improve, what answers rest on, how far claims may be off."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from certificates import claimed, stating
from forging import fails
from hypothesis import given
from prunes import slow
from strategies import ONE_PERCENT, TWO_FOUR, drawn, problems, random_gram, random_weight, verified

from maskopt import LayerProblem, RowProblem, Solution, Unstructured, lower_bound, solve, verify
from maskopt.checks.swap_check import improving_swap
from maskopt.errors import VerificationError
from maskopt.protocol.solution import SWAP_FLOOR, SWAP_TOLERANCE, Status
from maskopt.protocol.solver import available_solvers, is_trusted

TWO, THREE, SIX = (Unstructured(keep=keep) for keep in (2, 3, 6))
WORDS = ("SCIP 10.0",) * 2
OPTIMAL = (Status.OPTIMAL,) * 2
#: claims off by less than their tolerance, and by more
WITHIN, BEYOND = 0.5, 3.0


def large(unit=1.0, dtype=torch.float64, rows=2):
    weight = random_weight(rows, 40, 3, dtype) * unit
    return LayerProblem(weight, random_gram(40, "full", 7, dtype), TWO_FOUR)


def small(unit=1.0, pattern=THREE):
    return LayerProblem(random_weight(2, 8, 3) * unit, random_gram(8, "full", 7), pattern)


def cancelling(unit, n=40):
    """Of every four inputs two cancel, as large terms of the objective; and the mask without these."""
    turn = torch.eye(n, dtype=torch.float64)
    turn[1::4] = -turn[::4]
    weight = random_weight(2, n, 3, torch.float64) * unit
    weight[:, 1::4] = weight[:, ::4]
    gram = turn @ random_gram(n, "full", 7, torch.float64) @ turn.T
    problem = LayerProblem(weight, gram, TWO_FOUR)
    return problem, Solution.of(problem, (torch.arange(n) % 4 > 1).expand(2, n))


def rounding(problem, mask):
    return problem.rounding(problem.weights(mask))


def second(value, of):
    return torch.stack([of[0], torch.as_tensor(value, dtype=of.dtype)])


def assert_refused(problem, solution, message, **options):
    fails(VerificationError, message, verify, problem, solution, **options)


def forgeries(w, o):
    """What is refused, and what is changed of a poor solution w where the optimum is o."""
    zero, high = 0 * w.objective, {"lower_bound": w.objective, "trusted": WORDS}
    low, between = {"lower_bound": o.objective * 0.1}, (w.objective + o.objective) / 2
    values = {name: getattr(w, name) for name in ("objective", "lower_bound")}
    bad = [(k, y) for k, x in values.items() for y in (x.float(), x[:1], x[:, None], x.sum())]
    return [
        ("pattern: mask: row 1", {"mask": second(w.mask[1] ^ (torch.arange(8) < 1), w.mask)}),
        ("pattern: mask has shape", {"mask": w.mask[:1]}),
        ("objective: row 0", {"objective": w.objective * 0.99}),
        ("above the objective", {**high, "lower_bound": w.objective * 1.01}),
        ("row 0 .* f ≥ 0", {"lower_bound": w.lower_bound - 1}),
        *(("lower bound: row 1 .* f ≥ 0 always", {"lower_bound": second(odd, zero)})
          for odd in (torch.nan, torch.inf, -1e-300)),
        ("without a certificate", low),
        ("no exact solver is trusted with it", {**low, "trusted": ("", "")}),
        ("trusted: 1 names for 2 rows", {"trusted": WORDS[:1]}),
        ("statuses for", {"status": (Status.SWAP_OPTIMAL,)}),
        ("row 1 claims 'perfect'", {"status": ("feasible", "perfect")}),
        ("claims swap-optimal, yet", {"status": (Status.SWAP_OPTIMAL,) * 2}),
        ("claims optimal", {"status": OPTIMAL}),
        # whoever is trusted with the bound: a swap improves
        ("row 0 claims optimal, yet keeping input", {**high, "status": OPTIMAL}),
        ("claims optimal without proof", {**vars(o), "lower_bound": o.objective * 0.9}),
        ("a mask of objective", {**high, "lower_bound": between}),
        ("a mask of objective", high),
        *((rf"{name} must be float64 \[2\]", {name: value}) for name, value in bad),
    ]  # fmt: skip


@pytest.mark.parametrize("update", [None, ONE_PERCENT], ids=repr)
@pytest.mark.parametrize("pattern", [THREE, TWO_FOUR], ids=str)
def test_forgeries_are_refused(pattern, update):
    problem = small(pattern=pattern).with_update(update)
    worst, optimum = verified(problem, "worst"), solve(problem, "exhaustive")
    for message, changes in forgeries(worst, optimum):
        assert_refused(problem, replace(worst, **changes), message)
    assert_refused(problem, worst.mask, r"not a Tensor; make one of a mask by Solution\.of")


def test_what_enumeration_confirms_is_checked():
    problem = small()
    worst, optimum = solve(problem, "worst"), solve(problem, "exhaustive")
    assert verify(problem, optimum, require="checked").basis == ("checked",) * 2
    # a true bound under a forged word costs nothing: it was checked
    true = replace(worst, lower_bound=optimum.objective, trusted=WORDS)
    assert verify(problem, true, require="checked").checked
    verify(problem, replace(worst, status=("feasible", "feasible")))
    row = problem.row(1)
    assert verify(row, solve(row, "exhaustive"), require="checked").basis == ("checked",)
    for keep in (0, 8):
        problem = small(pattern=Unstructured(keep=keep))
        mask = torch.full((2, 8), keep > 0)
        claim = {"status": Status.OPTIMAL, "lower_bound": problem.objective(mask), "trusted": WORDS}
        assert verify(problem, Solution.of(problem, mask, **claim), require="checked").checked


def test_a_bound_is_checked_or_rests_on_a_solver_that_is_named():
    problem = large(rows=3)
    start, bound = solve(problem, "wanda"), lower_bound(problem, "sdp")
    proven = stating(problem, start.mask, bound)
    assert verify(problem, proven).basis == ("checked",) * 3
    assert verify(problem, start, require="checked").checked  # no bound, nothing to take on trust
    # row 1 claims more than its certificate proves
    higher = bound.value.clone()
    higher[1] = (higher[1] + start.objective[1]) / 2
    trusted = replace(proven, lower_bound=higher, trusted=("", "SCIP 10.0", ""))
    found = verify(problem, trusted)
    assert (found.basis, found.checked) == (("checked", "trusted: SCIP 10.0", "checked"), False)
    assert str(found) == "2 rows checked, 1 row trusted: SCIP 10.0"
    assert_refused(problem, trusted, r"row 1 is trusted \(SCIP 10\.0\)", require="checked")
    assert_refused(problem, replace(trusted, trusted=()), r"row 1 .* its certificate proves")
    assert_refused(problem, proven, "require", require="proven")
    other = LayerProblem(0.5 * problem.weight, problem.gram, problem.pattern)
    found = solve(other, "wanda")
    wrong = stating(other, found.mask, bound, lower_bound=bound.value.minimum(found.objective))
    assert_refused(other, wrong, "its certificate proves")


def test_only_registered_exact_solvers_with_a_version_are_trusted(tmp_path):
    problem, path = large(), tmp_path / "s.npz"
    start = solve(problem, "wanda")
    for name in (
        "SCIP", "SCIP ten", "scip 10.0", "a forger 1.0", "SCIP 10.0\nspoof: holds: 1 row checked",
        "SCIP 10.0 spoof: 1 row checked", "SCIP \x1b[2J10.0", "SCIP\n 10.0", "SCIP 10.0\n", " 10.0",
    ):  # fmt: skip
        replace(start, lower_bound=start.objective / 2, trusted=(name,) * 2).save(path)
        for forged in (Solution.load(path), replace(start, trusted=(name, ""))):
            with pytest.raises(VerificationError) as caught:  # whatever rests on it
                verify(problem, forged)
            assert "is no registered exact solver with its version" in str(caught.value)
            assert str(caught.value).isprintable()
    exact = [i.capabilities for i in available_solvers().values() if i.capabilities.trusted]
    assert [capabilities.proves for capabilities in exact] == ["optimality"] * 5
    assert all(is_trusted(f"{name} 1.0.1") for can in exact for name in can.trusted)


# --- how far a claim may be off
def claims(unit, off):
    """Claims that are off by so much of their tolerance: what is refused, and the problem."""
    problem, nothing = large(unit), cancelling(unit)
    worst, best = solve(problem, "worst"), solve(problem, "swap")
    lost = [rounding(problem, s.mask) for s in (worst, best)]
    for sign in (1, -1):
        value = second(worst.objective[1] * (1 + sign * off * 1e-9), worst.objective)
        yield "objective: row 1", problem, replace(worst, objective=value)
    rounded, most = rounding(nothing[0], nothing[1].mask), 1e-12 * nothing[0].diagonal_mass()
    assert bool(((rounded < most) & (nothing[1].objective < WITHIN * rounded)).all())
    yield "objective: row 0", nothing[0], replace(nothing[1], objective=off * rounded)
    above = replace(best, lower_bound=best.objective + off * lost[1], trusted=WORDS)
    yield "row 0 .* above the objective", problem, above
    yield "row 0 .* without a certificate", problem, replace(worst, lower_bound=off * lost[0])
    box = lower_bound(problem, "box")
    assert bool((box.value > 1e-3 * problem.diagonal_mass()).all())
    higher = stating(problem, worst.mask, box, lower_bound=box.value * (1 + off * 1e-9))
    yield "row 0 .* its certificate proves", problem, higher
    gap = best.objective * (1 - torch.tensor([0.5, off * 1e-6], dtype=torch.float64))
    more = {"status": (Status.FEASIBLE, Status.OPTIMAL), "lower_bound": gap, "trusted": WORDS}
    yield "row 1 claims optimal without proof", problem, replace(best, **more)
    weight = torch.ones(1, 40, dtype=torch.float64) * unit
    weight[0, 0] *= (1 + 20 * off * 1e-6) ** 0.5
    problem = LayerProblem(weight, torch.eye(40).double(), Unstructured(keep=20))
    swap = Solution.of(problem, (torch.arange(40) >= 20)[None], status=Status.SWAP_OPTIMAL)
    yield "row 0 claims swap-optimal, yet keeping input 0 instead of", problem, swap
    problem = small(unit)
    bound = solve(problem, "exhaustive").objective * (1 + off * 1e-6)
    above = replace(solve(problem, "worst"), lower_bound=bound, trusted=WORDS)
    yield "row 0 .* a mask of objective", problem, above
    # a second best that no swap leaves: between pairs that cancel lie masks ten times as bad
    off = min(off, 1.6)
    gram = torch.eye(4, dtype=torch.float64)
    gram[0, 1] = gram[1, 0] = gram[2, 3] = gram[3, 2] = -0.9
    weight = torch.ones(1, 4, dtype=torch.float64) * unit
    weight[0, :2] *= (1 + off * 1e-6) ** 0.5
    problem, mask = LayerProblem(weight, gram, TWO_FOUR), torch.tensor([[False, False, True, True]])
    bound = problem.objective(~mask) * (1 + min(off, 0.9) * 1e-6)
    more = {"status": Status.OPTIMAL, "lower_bound": bound, "trusted": WORDS[:1]}
    message = "row 0 claims optimal, but a mask of objective"
    yield message, problem, Solution.of(problem, mask, **more)


@pytest.mark.parametrize("unit", [1e-5, 1.0, 1e5])
def test_what_is_within_a_tolerance_passes_and_three_times_as_much_does_not(unit):
    for _, problem, near in claims(unit, WITHIN):
        assert verify(problem, near).checked or near.trusted
    for message, problem, far in claims(unit, BEYOND):
        assert_refused(problem, far, message)


@pytest.mark.parametrize("unit", [1e-5, 1.0, 1e5])
def test_an_optimum_of_nothing_may_be_rounding_and_no_more(unit):
    problem, nothing = cancelling(unit)
    off = WITHIN * rounding(problem, nothing.mask)
    verify(problem, replace(nothing, objective=off, status=OPTIMAL))
    # weights that nearly cancel: what is left is small, and far above what float64 can lose of it
    weight = problem.weight.clone()
    weight[:, 1::4] *= 1 + 1e-6
    nearly = LayerProblem(weight, problem.gram, TWO_FOUR)
    best = solve(nearly, "swap", start=nothing.mask)
    least, most = 2 * rounding(nearly, best.mask), 1e-12 * nearly.diagonal_mass()
    assert bool(((least < best.objective) & (best.objective < most)).all())
    assert_refused(nearly, replace(best, status=OPTIMAL), "claims optimal without proof")
    problem, best = cancelling(unit, 8)
    off = WITHIN * rounding(problem, best.mask)
    verify(problem, replace(best, status=OPTIMAL, objective=off, lower_bound=off))
    other = Solution.of(problem, best.mask.flip(1))
    off = 10 * (rounding(problem, best.mask) + rounding(problem, other.mask))
    worse = replace(other, lower_bound=off, trusted=WORDS)
    assert_refused(problem, worse, "row 0 .* a mask of objective")


@pytest.mark.parametrize("size", [1e3, 1e8])
def test_weights_that_are_kept_excuse_no_objective_and_no_optimum(size):
    """Large weights that every good mask keeps are no terms of its sum."""
    weight = random_weight(1, 24, 3) * 1e-3
    weight[0, :4] = size
    problem = LayerProblem(weight, random_gram(24, "full", 7), Unstructured(keep=12))
    best = solve(problem, "swap")
    assert bool(best.mask[0, :4].all())
    assert float(best.objective) < 1e-9 * float(problem.diagonal_mass())
    assert_refused(problem, replace(best, objective=best.objective * 1.01), "objective: row 0")
    for bound in (0.0, 0.9):
        claimed = replace(best, status=OPTIMAL[:1], lower_bound=bound * best.objective)
        assert_refused(problem, replace(claimed, trusted=WORDS[:1]), "optimal without proof")


def test_rows_that_weigh_nothing_or_hardly_anything_excuse_nothing():
    problem = LayerProblem(torch.zeros(2, 40), torch.eye(40), TWO_FOUR)
    solution = solve(problem, "wanda")
    assert verify(problem, replace(solution, status=OPTIMAL)).checked
    off = torch.tensor([0.0, 1e-300], dtype=torch.float64)
    assert_refused(problem, replace(solution, objective=off), "objective: row 1")
    assert_refused(problem, replace(solution, lower_bound=off), "row 1 .* above the objective")
    # costs below the normal numbers are not zero
    weight = random_weight(1, 24, 3, torch.float64) * 1e-156
    problem = LayerProblem(weight, random_gram(24, "full", 7), Unstructured(keep=12))
    honest = solve(problem, "worst")
    assert 0 < float(honest.objective) < 1e-307
    forged = replace(honest, objective=0 * honest.objective, status=OPTIMAL[:1])
    assert_refused(problem, forged, "objective: row 0")
    # nor does a weight of a row that prunes nothing excuse a sum of rows
    weight = random_weight(3, 12, 6)
    weight[weight == 0] = 0.1
    problem = LayerProblem(weight, random_gram(12, "full", 7), Unstructured(0.3, per="layer"))
    problem = problem.with_omega(torch.tensor([1e12, 1.0, 1.0], dtype=torch.float64))
    best = verified(problem, "exhaustive")
    assert bool(best.mask[0].all())
    claimed = replace(best, lower_bound=0.9 * best.objective)
    assert_refused(problem, claimed, "rows claim optimal without proof")


def test_float32_is_widened_and_blocks_of_any_size_verify_the_same(monkeypatch):
    narrow = large(dtype=torch.float32)
    problem = LayerProblem(narrow.weight.double(), narrow.gram.double(), TWO_FOUR)
    box, solution = lower_bound(problem, "box"), solve(problem, "swap")
    assert claimed(narrow, solution, box).checked
    worst = solve(problem, "worst")
    by_mask, by_solution = (solve(problem, "swap", start=x).mask for x in (worst.mask, worst))
    assert torch.equal(by_mask, by_solution)
    row, mask = problem.row(0), worst.mask[0]
    swap = improving_swap(row, mask)
    for numbers in (1, 7, 100):
        monkeypatch.setattr("maskopt.checks.swap_check.AT_ONCE", numbers)
        assert verify(problem, solution).checked
        found = improving_swap(row, mask)
        assert (found[:2], found.delta) == (swap[:2], pytest.approx(swap.delta, rel=1e-12))


def test_weights_that_meet_no_input_are_refitted_without_a_claim_on_rounding():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    x[:, 0] = 0
    weight = torch.zeros(2, 6, dtype=torch.float64)
    weight[0, 0] = 1e6
    weight[1] = torch.randn(6, generator=generator, dtype=torch.float64)
    problem = LayerProblem(weight, x.T @ x / 40, Unstructured(0.5), update=ONE_PERCENT)
    for solver in ("exhaustive", "branch", "admm", "obs", "swap"):
        verified(problem, solver)
    best = solve(problem, "exhaustive")
    assert_refused(problem, replace(best, objective=best.objective + 1.0), "objective: row 0")


# --- whole numbers, and the ends of float64
@pytest.mark.parametrize("penalty", [1e14, slow(1e8), slow(1e12)])
def test_a_penalty_on_what_is_not_chosen_hides_nothing(penalty):
    u = np.triu(np.random.default_rng(0).integers(0, 2, (12, 12)), 1).astype(float)
    u += u.T
    u[0, 0] = penalty
    problem = RowProblem.from_quadratic(u, cardinality=4)
    honest = solve(problem, "branch", proof=True, time_limit=20)
    assert verify(problem, honest).checked
    for chosen in list(itertools.combinations(range(1, 12), 4))[::30]:
        mask = ~kept(12, *chosen)[None]
        cost = problem.as_layer().objective(mask)
        if float(cost) != float(honest.objective):
            more = {"objective": cost, "lower_bound": cost, "status": OPTIMAL[:1]}
            assert_refused(problem, replace(honest, mask=mask, **more), "row 0", require="checked")


def test_whole_numbers_are_optimal_where_the_next_value_is_proven_and_not_before():
    """Where the best is nothing; and within 1e-6 of 420 million, where a hundred values are."""
    star = np.zeros((4, 4))
    star[0, 1:] = 1
    problem = RowProblem.from_quadratic(star, cardinality=2)
    for name, options in (
        *(("branch", {"proof": proof}) for proof in (False, True)),
        *(("scip", {"presolve": presolve}) for presolve in (True, False)),
    ):
        found = verified(problem, name, **options)
        assert found.status == (Status.OPTIMAL,)
        posed = problem.to_original_units(float(found.objective), float(found.lower_bound))
        assert posed[:2] == (0.0, 0.0)
    u = np.triu(np.random.default_rng(1).integers(0, 2, (14, 14)), 1) * 2.0
    problem = RowProblem.from_quadratic(u + u.T + np.diag(np.full(14, 6e7)), cardinality=7)
    best, other = solve(problem, "branch", proof=True), solve(problem, "swap")
    assert best.status == (Status.OPTIMAL,)
    assert float(best.objective) == float(solve(problem, "exhaustive").objective)
    assert 0 < float(other.objective - best.objective) < 1e-7 * float(best.objective)
    assert verify(problem, best, require="exact").checked
    forged, less = replace(best, mask=other.mask, objective=other.objective), best.objective - 4
    short = replace(best, lower_bound=less, trusted=("SCIP 10.0.0",), proof=None)
    for wrong, message in (
        (forged, "row 0 claims optimal without proof"),
        (replace(forged, lower_bound=other.objective), "row 0 .* a mask of objective"),
        (replace(best, objective=less, lower_bound=less), "objective: row 0"),
        (short, "row 0 claims optimal without proof"),
    ):
        assert_refused(problem, wrong, message)
    for solver in ("scip", "gurobi", "highs"):  # their tolerances are many values wide
        assert verified(problem, solver).status == (Status.FEASIBLE,)


def test_bounds_at_the_ends_of_float64():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(50, 12))
    gram, weight, pattern = x.T @ x / 50, rng.normal(size=(3, 12)), Unstructured(keep=6)
    for solver in ("relax", "frank_wolfe", "branch"):
        usual = solve(LayerProblem(weight, gram, pattern), solver).status
        for power in (-290, 160, 290):
            scaled = LayerProblem(weight, gram * 10.0**power, pattern)
            assert verified(scaled, solver).status == usual


# --- what counts as an improving swap: how much, which of several, and in whatever unit
def diagonal(*squares, pattern=TWO, gram=1.0):
    """A row whose objective is `gram` times the sum of what is pruned of `squares`."""
    weight = torch.tensor([squares], dtype=torch.float64).sqrt()
    return LayerProblem(weight, gram * torch.eye(len(squares), dtype=torch.float64), pattern)


def kept(n, *inputs):
    return torch.tensor([i in inputs for i in range(n)])


def swapped(mask, u, p):
    places = torch.arange(len(mask))
    return mask & (places != u) | (places == p)


@given(problems(max_n=9, max_rows=2))
def test_it_is_the_best_pair_of_brute_force(problem):
    solution, group = solve(problem, "random"), problem.group_size
    for i in range(problem.rows):
        row, mask = problem.row(i), solution.mask[i]
        q = row.q()
        mass = float(q.diagonal().sum())

        def cost(m, q=q):
            return float((~m).double() @ q @ (~m).double())

        pairs = itertools.product(mask.nonzero()[:, 0].tolist(), (~mask).nonzero()[:, 0].tolist())
        every = (swapped(mask, u, p) for u, p in pairs if u // group == p // group)
        best = min((cost(other) - cost(mask) for other in every), default=0.0)
        swap = improving_swap(row, mask)
        if swap is None:
            slack = SWAP_TOLERANCE * cost(mask) + SWAP_FLOOR * mass
            assert best >= -slack * (1 + 1e-6) - 1e-13 * mass
        else:
            assert mask[[swap.kept, swap.pruned]].tolist() == [True, False]
            assert swap.delta == pytest.approx(best, rel=1e-6, abs=1e-9 * mass)
            assert cost(swapped(mask, swap.kept, swap.pruned)) < cost(mask)


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("gram", [1e-9, 1.0, 1e9])
def test_a_swap_counts_above_1e_6_of_the_objective_and_1e_13_of_the_diagonal(gram, unit):
    mask = kept(4, 2, 3)
    for off, counts in ((0.5e-6, False), (3e-6, True)):
        problem = diagonal(unit * (1 + 2 * off), unit, unit, 2 * unit, gram=gram)
        swap = improving_swap(problem, mask)
        assert (swap is not None) == counts
        if swap:
            assert swap[:3] == (2, 0, pytest.approx(-2 * off * unit * gram, rel=1e-6))
        assert improving_swap(problem, mask, tolerance=0) is not None
        off *= 1e-7
        problem = diagonal(unit * (1 + 1e6 * off), unit, unit, (1e6 - 3) * unit, gram=gram)
        assert (improving_swap(problem, mask, tolerance=0) is not None) == counts


def test_the_best_swap_of_all_groups_is_named_and_the_first_of_equals():
    squares = [2.0, 1.0, 1.0, 3.0, 5.0, 1.0, 1.0, 6.0, 3.0, 1.0, 1.0, 4.0]
    problem, mask = diagonal(*squares, pattern=TWO_FOUR), kept(12, 2, 3, 6, 7, 10, 11)
    assert improving_swap(problem, mask) == pytest.approx((6, 4, -4.0, 0, 0))
    equal = diagonal(*[2.0, 2.0, 1.0, 1.0] * 3, pattern=TWO_FOUR)
    assert improving_swap(equal, mask) == pytest.approx((2, 0, -1.0, 0, 0))
    problem, message = drawn(2, 8, pattern=TWO_FOUR), r"takes one row; use problem\.row\(i\)"
    fails(VerificationError, message, improving_swap, problem, solve(problem, "wanda").mask)
    row = problem.row(0)
    mask = solve(row, "worst").mask
    assert improving_swap(row.as_layer(), mask) == improving_swap(row, mask[0])


def test_weights_of_any_size_are_brought_within_range():
    """Squares of small ones end at 2⁻⁵¹² or so, sums of large ones before 2⁵¹² (as do problems)."""
    weight, gram = random_weight(1, 12, 1), random_gram(12, "full", 2)
    mask = solve(LayerProblem(weight, gram, SIX), "worst").mask[0]
    expected = improving_swap(LayerProblem(weight, gram, SIX), mask)
    for exponent in (-900, -540, -150, 150, 500):
        found = improving_swap(LayerProblem(weight * 2.0**exponent, gram, SIX), mask)
        assert found[:2] == expected[:2]
        if abs(exponent) < 500:
            assert found.delta == pytest.approx(expected.delta * 4.0**exponent)
    mixed, outlier, first = weight.clone(), weight.abs(), int((~mask).nonzero()[0])
    mixed[0, 0], mixed[0, int(mask.nonzero()[0])] = 0.0, -(2.0**-300)
    assert improving_swap(LayerProblem(mixed, gram, SIX), mask) is not None
    outlier[0, first] = -(2.0**500)
    assert improving_swap(LayerProblem(outlier, gram, SIX), mask).pruned == first
    assert improving_swap(LayerProblem(0 * weight, gram, SIX), mask) is None
    for dtype in (torch.float32, torch.bfloat16):
        narrow = LayerProblem(weight.to(dtype), gram.float(), SIX)
        wide = LayerProblem(narrow.weight.double(), narrow.gram.double(), SIX)
        mask = solve(wide, "worst").mask[0]
        assert improving_swap(narrow, mask) == improving_swap(wide, mask)
