"""Certificates prove a formula's value less a margin for rounding; forged ones, and files."""

import itertools
import sys
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from certificates import PATTERNS, certificate, exact, layer, triangles, unclamped
from forging import edit, fails, rewrite
from strategies import TWO_FOUR, drawn, random_gram, random_weight

from maskopt import LayerProblem, Solution, Status, Unstructured, lower_bound, solve, verify
from maskopt.certificates.certificate import Certificate, _shared_slacks, missing
from maskopt.certificates.cuts import Cuts
from maskopt.certificates.exact_check import _form, exact_bounds, rational
from maskopt.core.objective import LinearTerm
from maskopt.core.units import exactly_semidefinite
from maskopt.errors import OptionError, ProblemError, VerificationError

U = 2.0**-53
#: signs under which sums cancel
ALTERNATING = 1 - 2.0 * (torch.arange(8) % 2)
EYE = torch.eye(8, dtype=torch.float64)
GROUPS = pytest.mark.parametrize("pattern", PATTERNS[:3], ids=str)


ones, rand = (partial(make, dtype=torch.float64) for make in (torch.ones, torch.rand))
PARTS = ("weight", "gram", "small gram", "linear", "diagonal", "penalty", "product", "cuts")
TAU = ones(2)
GOOD = Cuts(torch.tensor([[-1, 0, 7], [3, 2, 1]]), torch.tensor([[1, -1], [-1, -1]]), TAU)
NO_CUTS = Cuts(GOOD.index[:0], GOOD.sign[:0], TAU[:0])
#: too many masks to enumerate
LAYER = drawn(3, 40, pattern=TWO_FOUR, seeds=(1, 7))


def own_values(certificate, problem):
    rows = range(problem.rows)
    return [float(certificate.take([row]).check(problem.take([row]))) for row in rows]


def lost(certificate, problem):
    """Of the first row's bound, by margins and by what its matrix lacks."""
    return float(exact(certificate, problem, 0) - Fraction(unclamped(certificate, problem, 0)))


def margin(certificate, problem):
    """What is lost, by 2n + 8 units in the last place of Σ|term| of g(p̂), in full."""
    w, point = problem.weight[0].double().abs(), certificate.point[0].abs()
    reach = point.view(-1, problem.group_size).sum(1) + problem.pruned_per_group
    size = (w * point) @ problem.gram.double().abs() @ (w * point)
    size += certificate.diagonal[0].abs() @ (point.square() + point)
    size += certificate.penalty[0].abs() @ reach.square()
    size += (certificate.product[0].abs() @ point) @ reach
    size += certificate.cuts[0].multiplier.sum() * (3 * (2 * point.max() + 1) ** 2 + 1)
    if problem.linear is not None:
        size += 2 * (problem.linear.correlation[0].abs() * w) @ point + problem.linear.constant[0]
    return lost(certificate, problem) / ((2 * problem.n + 8) * U * float(size))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_value_is_the_formulas(pattern):
    """In float64 less a margin, and in rational arithmetic but for a θ that is rounding alone."""
    for product, cuts, linear in itertools.product((False, True), repeat=3):
        problem = layer(pattern, linear=linear)
        given = certificate(problem, product=product, cuts=cuts)
        for row, decided in enumerate(exact_bounds(problem, given)):
            true, found = exact(given, problem, row), unclamped(given, problem, row)
            assert true >= found == pytest.approx(float(true), rel=1e-11)
            assert 0 <= max(true, 0) - decided <= max(true, 1) / 10**9


@pytest.mark.parametrize("part", PARTS)
def test_the_margin_covers_the_rounding_of_every_part(part):
    for pattern, far in itertools.product(PATTERNS, (0.5, 30.0)):
        problem, large = layer(pattern, rows=1), 1e6
        given = certificate(problem, product=True, cuts=True)
        own = {"diagonal": ones(1, 8), "point": far * rand(1, 8), "penalty": given.penalty.abs()}
        given = replace(given, **own)
        weight, gram = problem.weight, problem.gram
        linear = LinearTerm(large * (1 + rand(1, 8)) * ALTERNATING, large * ones(1))
        scaled = {
            "weight": {"weight": large * weight.abs() * ALTERNATING},
            "linear": {"linear": linear},
        }
        scaled |= {"small gram": {"weight": large * weight, "gram": gram / large}}
        scaled |= {"gram": {"gram": large * gram}}
        if part not in scaled:
            many = [triangles(large)] if part == "cuts" else large * getattr(given, part)
            given = replace(given, **{part: many})
        if part in ("cuts", "product"):  # the matrix of such a part is indefinite
            given = replace(given, diagonal=given.diagonal * 20 * large)
        parts = {"weight": weight, "gram": gram} | scaled.get(part, {})
        problem = LayerProblem(**parts, pattern=pattern, assume_psd=part == "linear")
        assert 1 <= margin(given, problem) <= 500


@GROUPS
def test_a_certificate_of_a_rows_own_form_proves_as_much_of_the_row(pattern):
    """Where the linear part is within Q, and where it is apart from it, by the formula of each."""
    problem = layer(pattern, rows=1, linear=True)
    form = LayerProblem(ones(1, 8), problem.row(0).q(), pattern, assume_psd=True)
    for cuts in (False, True):
        given = certificate(form, cuts=cuts)
        apart, within = given.of_linear(problem), float(exact(given, form, 0))
        assert float(exact(apart, problem, 0)) == pytest.approx(within, rel=1e-10)
        assert unclamped(apart, problem, 0) == pytest.approx(within, rel=1e-9)
        assert given.of_linear(layer(pattern)) is given


@GROUPS
def test_the_margin_stands_alone_where_p_is_the_best_mask(pattern):
    """There more of every λ costs nothing, so that nothing but the margin is lost."""
    size, pruned = pattern.group_size(8), pattern.pruned_per_group(8)
    point = (torch.arange(8) % size < pruned).double()[None]
    zero = 0 * ones(1, 8 // size, 8)
    for large_weight, large_penalty in ((1e6, 0.0), (1.0, 1e6)):
        weight = (10.0 - 9.0 * point) * large_weight
        problem, penalty = LayerProblem(weight, EYE, pattern), zero[..., 0] + large_penalty
        given = Certificate(-0.5 * weight.square(), penalty, point, zero, [triangles(0.0)])
        assert exact(given, problem, 0) == Fraction(float(problem.objective(point == 0)))
        assert 1 <= margin(given, problem) <= 5000


@pytest.mark.parametrize("part", ["gram", "diagonal", "penalty", "product", "cuts"])
def test_what_a_matrix_lacks_is_paid_for(part):
    """At p̂ = ½ a θ more of every λ costs θ·n/4; whichever part makes A indefinite."""
    for pattern in PATTERNS[:3]:
        problem = layer(pattern, rows=1)
        if part == "gram":
            problem = LayerProblem(problem.weight, problem.gram - 3 * EYE, pattern, assume_psd=True)
        groups = 8 // problem.group_size
        shapes = {"diagonal": (1, 8), "penalty": (1, groups), "product": (1, groups, 8)}
        parts = {name: 0 * ones(*shape) for name, shape in shapes.items()}
        if part == "product":
            parts[part] += 1 + rand(1, groups, 8)
        elif part in parts:
            parts[part] = 30 * (rand(*parts[part].shape) - 1)
        cuts = [triangles(30.0) if part == "cuts" else triangles()]
        given = Certificate(point=0.5 * ones(1, 8), cuts=cuts, **parts)
        matrix, paid = _form(given, problem, 0).matrix, lost(given, problem) / (8 / 4)
        lacks = -float(np.linalg.eigvalsh(matrix.astype(float))[0])
        assert 0.01 < lacks == pytest.approx(paid, rel=1e-9)
        assert lacks * (1 - 1e-12) <= paid


@pytest.mark.parametrize("kind", ["zero", "singular", "barely", "indefinite", "negative"])
@pytest.mark.parametrize("n", [1, 6, 40])
def test_what_is_missing_to_semidefinite_is_added_with_its_margin(n, kind):
    """The Cholesky factorisation of Rump, or the least eigenvalue; and hardly more than is needed."""
    x, eye = torch.randn(n, max(1, n // 2), dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    less = {"zero": 0.0, "singular": 0.0, "barely": 1e-10, "indefinite": 1.0, "negative": 1.0}[kind]
    a = (0 if kind in ("zero", "negative") else x @ x.T) - less * eye
    a = (a + a.T) / 2
    added, least = missing(a), float(torch.linalg.eigvalsh(a)[0])
    trace, gamma = float(a.diagonal().abs().sum()), (n + 2) * U
    # a completed factorisation of the shifted matrix proves no more than −γ/(1−γ)·tr
    assert added >= max(0.0, -least) + gamma / (1 - gamma) * trace
    norm = float(torch.linalg.matrix_norm(a))
    # the shifts that are tried lie a factor of 100 apart, up to where an eigenvalue takes over
    often = 100 if kind == "barely" else 1.01
    assert added <= often * max(0.0, -least) + 50 * n * U * (trace + norm) + 1e-250
    assert n > 6 or exactly_semidefinite(rational(a + added * eye))


@GROUPS
def test_one_factorisation_for_all_rows_proves_what_one_for_each_does(pattern):
    problem = layer(pattern, rows=4)
    weight = problem.weight.clone()
    weight[0, 0], weight[1] = 1e-3, weight[1] + 2
    zero = weight.clone()
    zero[:, 3] = zero[2, 5] = 0
    for some in (weight, zero):
        problem = LayerProblem(some, problem.gram, pattern)
        diagonal, penalty = some.square() * rand(4, 8), rand(4, 8 // problem.group_size)
        point = lower_bound(problem, "box").certificate.point
        given = Certificate(0.2 * diagonal, 0.1 * penalty, point)
        shared = _shared_slacks(given, problem)[0]
        assert shared is not None
        together = given.check(problem)
        for row in range(4):
            value = unclamped(given, problem, row, shared)
            true = float(exact(given, problem, row))
            assert true >= value == pytest.approx(true, rel=1e-9)
            assert float(together[row]) == max(0.0, value)


@pytest.mark.parametrize("parts", [{}, {"product": True, "cuts": True}], ids=["plain", "all"])
def test_rows_that_add_nothing_negative_share_a_factorisation(parts, monkeypatch):
    problem = layer(rows=6)
    own = certificate(problem, **parts)
    negative = replace(own, diagonal=own.diagonal - 0.1 * problem.weight.square())
    box = lower_bound(problem, "box").certificate
    given = Certificate.stack([negative.take([0, 1]), box.take([2, 3, 4, 5])])
    assert [slack is None for slack in _shared_slacks(given, problem)] == [True] * 2 + [False] * 4
    counted = []
    name = "maskopt.certificates.certificate.missing"
    monkeypatch.setattr(name, lambda a: counted.append(a) or missing(a))
    found = given.check(problem).tolist()
    assert len(counted) <= 4  # two rows of their own, the others, and perhaps a try with all
    assert found == pytest.approx(own_values(given, problem), rel=1e-9, abs=1e-12)
    for row in range(6):
        assert found[row] <= max(0.0, float(exact(given, problem, row)))


def test_what_all_rows_lack_is_paid_for_by_their_weights():
    """A Gram matrix that is semidefinite up to its rounding only; rows of any scale."""
    gram = random_gram(8, "low-rank", 2) - 1e-9 * EYE
    weight = random_weight(3, 8, 1) * torch.tensor([[1e-2], [1.0], [1e2]])
    problem = LayerProblem(weight, gram, PATTERNS[2])
    given = Certificate(0 * ones(3, 8), 0 * ones(3, 2), 0.5 * ones(3, 8))
    shared = _shared_slacks(given, problem)[0]
    assert 1e-9 <= shared <= 1e-7
    for row in range(3):
        value = unclamped(given, problem, row, shared)
        paid = float(exact(given, problem, row) - Fraction(value))
        assert paid == pytest.approx(shared * float(weight[row].square().sum()) / 4, rel=1e-3)
    nothing = LayerProblem(weight, torch.zeros(8, 8), PATTERNS[2])
    assert given.check(nothing).tolist() == [0.0] * 3


@pytest.mark.parametrize("part", ["one row's diagonal", "a penalty", "no weight", "a product"])
def test_duals_that_lift_the_bound_above_the_optimum_pay_for_it(part):
    """Each would prove too much if its matrix were taken for semidefinite."""
    weight = ones(2, 8) * (torch.arange(8) != (5 if part == "no weight" else -1))
    problem = LayerProblem(weight, random_gram(8, "full", 2), PATTERNS[2])
    given = Certificate(0 * ones(2, 8), 0 * ones(2, 2), 0.5 * ones(2, 8))
    if part == "one row's diagonal":
        given.diagonal[1] = -50.0
    elif part == "no weight":
        given.diagonal[:, 5] = -50.0
    else:
        given.point[:, :4] = 0.9
        more = {"penalty": -50 * ones(2, 2)} if part == "a penalty" else {}
        given = replace(given, product=None if more else 50 * ones(2, 2, 8), **more)
    assert bool((given.check(problem) <= solve(problem, "exhaustive").objective).all())


def same(a, b):
    for what in ("diagonal", "penalty", "point"):
        assert torch.equal(getattr(a, what), getattr(b, what))
    one, two = (0 * ones(3, 2, 8) if c.product is None else c.product for c in (a, b))
    assert torch.equal(one, two)
    assert list(a.cuts or [None] * 3) == list(b.cuts or [None] * 3)


def test_rows_are_taken_stacked_and_widened():
    problem = layer(rows=3)
    narrow = LayerProblem(problem.weight.float(), problem.gram.float(), problem.pattern)
    problem = LayerProblem(narrow.weight.double(), narrow.gram.double(), problem.pattern)
    full, plain = certificate(problem, product=True, cuts=True), certificate(problem)
    cut, point = replace(full, product=None), lower_bound(problem, "box").certificate.point
    near = Certificate(0.01 * full.diagonal, full.penalty.abs(), point)
    assert bool((near.check(problem) > 0).any())
    for whole, shared in ((full, False), (plain, True), (cut, False), (near, True)):
        same(Certificate.stack([whole.take([0]), whole.take([1, 2])]), whole)
        assert torch.equal(whole.take([2, 0]).point, whole.point[[2, 0]])
        found, every = whole.take([2, 0]).check(problem.take([2, 0])), whole.check(problem)
        assert shared or torch.equal(found, every[[2, 0]])  # else by another factorisation
        assert torch.equal(whole.check(narrow), every)
        for row in range(3):
            assert unclamped(whole, narrow, row) == unclamped(whole, problem, row)
            one = whole.take([row])
            assert torch.equal(one.check(problem.row(row)), one.check(problem.take([row])))
    mixed = Certificate.stack([plain.take([1, 2]), full.take([0])])
    assert mixed.cuts[:2] == [None, None]
    assert mixed.cuts[2] is full.cuts[0]
    twice = Certificate.stack([plain, plain])
    assert (twice.product, twice.cuts) == (None, None)
    for one, two in itertools.permutations((full, plain, cut), 2):
        mixed = Certificate.stack([two.take([0]), one.take([1]), two.take([2])])
        for row, source in enumerate((two, one, two)):
            assert torch.equal(mixed.point[row], source.point[row])
            known = unclamped(source, problem, row)
            assert unclamped(mixed, problem, row) == pytest.approx(known, rel=1e-12)
    zero, point = 0 * ones(3, 8), point.float()
    same(Certificate.box(problem, point), Certificate(zero, zero[:, :2], point.double()))


def test_rows_that_lack_more_together_are_checked_one_by_one():
    """The least λ/w² of an input is of another row for each: A of all rows is further from semidefinite."""
    weight = np.array([[2.0, 2, -1], [1, 2, 2], [-1, -1, 0]])
    problem = LayerProblem(weight, 4.742686817773039 * np.ones((3, 3)), Unstructured(keep=1))
    found = solve(problem, "branch")
    assert found.status == (Status.OPTIMAL,) * 3
    alone = own_values(found.certificate, problem)
    assert found.certificate.check(problem).tolist() == pytest.approx(alone, rel=1e-9)


# --- forgeries


def index(*first, then=(3, 2, 1)):
    return {"index": torch.tensor([first, then])}


def five(*then, sign=(1, 1, 1, -1)):
    cut = torch.tensor([[0, 1, 2, 3, 4], then])
    return {"index": cut, "sign": torch.tensor([[1, -1, 1, 1], sign])}


FORGED_CUTS = {
    "wrong shape or type": [
        {"multiplier": TAU.float()}, {"multiplier": TAU[:1]}, {"multiplier": TAU[:, None]},
        {"multiplier": TAU[0]}, {"index": GOOD.index[:, :2]}, {"index": GOOD.index.flatten()},
        {"sign": GOOD.sign[:, :1]}, {"sign": GOOD.sign[:1]},
    ],
    "not whole numbers": [{"index": GOOD.index.float()}, {"sign": GOOD.sign.float()}],
    "outside the row": [index(-3, 0, 7), index(-1, 0, 7, then=(3, 2, 8))],
    "no odd number of inputs, or one": [
        index(-2, 0, 7), index(-2, -2, 7), index(-2, -2, -2),
        {**index(0, 1, 2, 3, then=(3, 2, 1, 0)), "sign": GOOD.sign[:, [0, 1, 1]]},
        {**index(0, 1, 2, 0, then=(3, 2, 1, -2)), "sign": GOOD.sign[:, [0, 1, 1]]},
    ],
    "twice": [
        {**five(3, 2, 1, 0, -1), **index(0, 1, 2, 3, 0, then=(3, 2, 1, 0, -1))},
        index(1, 1, 7), index(7, 1, 7), index(-1, 1, 7, then=(3, 2, 2)), index(-1, -1, 7),
    ],
    "not ±1": [
        five(3, 2, 1, 0, -1, sign=(1, 1, 1, 0)), five(3, 2, 1, 0, -1, sign=(1, 1, 1, 3)),
        {"sign": torch.tensor([[1, 0], [1, 1]])}, {"sign": torch.tensor([[1, -1], [-2, 1]])},
    ],
    "negative multiplier": [
        {"multiplier": TAU * torch.tensor([1.0, -1e-9])}, {"multiplier": TAU * torch.nan},
        {"multiplier": TAU * torch.tensor([1.0, torch.inf])},
    ],
}  # fmt: skip


def test_tensors_and_cuts_that_do_not_fit_are_named():
    problem = layer()
    given = certificate(problem)
    d, mu, p = given.diagonal, given.penalty, given.point
    bad = {
        "diagonal must be float64": [{"diagonal": x} for x in (d.float(), d[:1], d[:, :7])],
        "penalty must be float64": [{"penalty": x} for x in (mu.float(), mu[:, :1])],
        "point must be float64": [{"point": p[:, :1]}],
        "point holds NaN or infinite": [{"point": p / (torch.arange(8) != 3)}],
        "penalty holds NaN or inf": [{"penalty": mu / torch.tensor([0.0, 1.0])}],
        "product must be float64": [
            {"product": x} for x in (0 * ones(2, 8, 2), torch.zeros(2, 2, 8))
        ],
        "product holds NaN": [{"product": torch.nan * ones(2, 2, 8)}],
        "1 cut lists for 2 rows": [{"cuts": [GOOD]}],
        "3 cut lists for 2 rows": [{"cuts": [None, GOOD, GOOD]}],
    }
    refused = [(changes, message) for message, every in bad.items() for changes in every]
    for message, every in FORGED_CUTS.items():
        for cuts in (replace(GOOD, **changes) for changes in every):
            refused.append(({"cuts": [cuts, None]}, f"row 0 .*{message}"))
            refused.append(({"cuts": [None, cuts]}, f"row 1 .*{message}"))
    for changes, message in refused:
        fails(VerificationError, message, replace(given, **changes).check, problem)
    # every whole number and a multiplier of 0 make a cut
    lists = [[NO_CUTS] * 2]
    for kind in (torch.int8, torch.int16, torch.int32, torch.int64):
        lists.append([Cuts(GOOD.index.to(kind), GOOD.sign.to(kind), 0 * TAU), None])
    for cuts in lists:
        torch.testing.assert_close(replace(given, cuts=cuts).check(problem), given.check(problem))


def test_numbers_near_the_end_of_float64_prove_nothing_and_break_nothing():
    problem = layer()
    given, best = certificate(problem, product=True), solve(problem, "exhaustive").objective
    for size, sign in itertools.product((1e100, 1e160, 1e300), (1.0, -1.0)):
        parts = ("diagonal", "penalty", "point", "product")
        huge = {part: torch.full_like(getattr(given, part), sign * size) for part in parts}
        huge["cuts"] = [replace(GOOD, multiplier=TAU * size), None]
        for part, array in huge.items():
            value = replace(given, **{part: array}).check(problem)
            assert bool(((value >= 0) & (value <= best)).all()), (part, size, sign)


# --- files


@pytest.fixture(scope="module")
def relaxed():
    return solve(LAYER, "relax")


@pytest.mark.parametrize("kind", ["swap", "relax", "branch", "cuts"])
def test_a_solution_and_its_certificate_are_read_as_written(kind, tmp_path):
    problem, path = LAYER.take([0]) if kind == "branch" else LAYER, tmp_path / "s.npz"
    if kind == "cuts":
        cuts, mask = lower_bound(problem, "sdp", cuts=1), solve(problem, "wanda").mask
        more = {"lower_bound": cuts.value, "certificate": cuts.certificate}
        solution = Solution.of(problem, mask, **more)
    else:
        solution = solve(problem, kind, **({"node_limit": 1} if kind == "branch" else {}))
    solution.save(path)
    read = Solution.load(path)
    for what in ("mask", "objective", "lower_bound"):
        assert torch.equal(getattr(read, what), getattr(solution, what)), what
    for what in ("status", "solver", "trusted"):
        assert getattr(read, what) == getattr(solution, what), what
    assert read.seconds == pytest.approx(solution.seconds, nan_ok=True)
    assert type(read.trace) is type(solution.trace)
    assert str(read.columns()) == str(solution.columns())  # NaN is not equal to itself
    assert verify(problem, read).basis == verify(problem, solution).basis


def test_files_that_are_damaged_or_lack_a_part_are_named(relaxed, tmp_path):
    path = tmp_path / "s.npz"
    relaxed.save(path)
    LAYER.save(tmp_path / "other.npz")
    data = path.read_bytes()
    flipped = bytes([*data[:-200], *(byte ^ 255 for byte in data[-200:])])
    damaged = {"cut": data[: len(data) // 2], "empty": b"", "text": b"text", "flipped": flipped}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        fails(ProblemError, name, Solution.load, tmp_path / name)
    fails(ProblemError, "no such file", Solution.load, tmp_path / "nowhere.npz")
    fails(ProblemError, "not a solution", Solution.load, tmp_path / "other.npz")
    for part in ("mask", "lower_bound", "certificate.point"):
        relaxed.save(path)
        rewrite(path, arrays=lambda arrays, part=part: arrays.pop(part))
        fails(ProblemError, "not a sound", Solution.load, path)
    replace(relaxed, lower_bound=relaxed.objective).save(path)  # sound, and not true
    fails(VerificationError, "its certificate proves", verify, LAYER, Solution.load(path))


def test_columns_and_frames_have_a_line_a_row(monkeypatch):
    solution = solve(LAYER, "swap")
    columns = solution.columns()
    assert {len(column) for column in columns.values()} == {3}
    assert columns["status"] == ["swap-optimal"] * 3
    assert columns["swaps"] == solution.trace.swaps.tolist()
    monkeypatch.setitem(sys.modules, "pandas", None)
    fails(OptionError, "pandas", solution.to_frame)
    monkeypatch.undo()
    pandas = pytest.importorskip("pandas")
    frame = solution.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == list(columns)
    assert frame["objective"].tolist() == solution.objective.tolist()


def test_a_certificate_comes_back_from_disk_and_proves_the_same(tmp_path):
    problem, path = layer(rows=3), tmp_path / "c.npz"
    solution = solve(problem, "wanda")
    for cuts in (None, [None] * 3, [None, triangles(), GOOD], [NO_CUTS] * 3):
        given = replace(certificate(problem, product=True), cuts=cuts)
        replace(solution, certificate=given).save(path)
        read = Solution.load(path).certificate
        assert torch.equal(read.product, given.product)
        for row in range(3):
            assert unclamped(read, problem, row) == unclamped(given, problem, row)
        assert torch.equal(read.check(problem), given.check(problem))
    # and a file of another making is named
    for name, array in (
        *(("diagonal", x) for x in (np.array(["a"]), np.zeros((2, 8), ">f8"), np.array(1.0))),
        ("cuts.0.index", np.zeros((1, 3), int)),
    ):
        replace(solution, certificate=certificate(problem)).save(path)
        rewrite(path, arrays=edit(f"certificate.{name}", to=array))
        fails(ProblemError, r"c\.npz: not a sound (solution|file)", Solution.load, path)
