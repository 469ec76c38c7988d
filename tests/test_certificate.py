"""What a certificate proves is the formula's value less a margin for rounding, and no forgery gets past."""

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from strategies import random_gram, random_weight

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
from maskopt.certificate import Cuts, _check_row, _missing, _shared_slack
from maskopt.errors import ProblemError, VerificationError
from maskopt.files import write_arrays

#: signs under which sums cancel
ALTERNATING = 1 - 2.0 * (torch.arange(8) % 2)
PATTERNS = (Unstructured(keep=4), NM(keep=1, of=4), NM(keep=2, of=4), Unstructured(keep=8))
U = 2.0**-53


def layer(pattern=PATTERNS[2], rows=2, kind="full"):
    return LayerProblem(random_weight(rows, 8, 1), random_gram(8, kind, 2), pattern)


def triangles(size=0.05):
    """Every kind of index: inputs alone, z_0 first, z_0 last; every sign."""
    index = torch.tensor([[0, 1, 2], [-1, 3, 5], [4, 7, -1], [6, 2, 3], [5, -1, 6]])
    sign = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1], [-1, 1]], dtype=torch.int8)
    return Cuts(index, sign, size * torch.arange(1, 6, dtype=torch.float64))


def certificate(problem, *, product=False, cuts=False):
    """Duals of both signs under which every A is positive definite by far, and no special point."""
    rows, n, groups = problem.rows, problem.n, problem.n // problem.group_size

    def noise(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    return Certificate(
        2 + noise(rows, n).abs(),
        0.1 * noise(rows, groups),
        noise(rows, n),
        0.1 * noise(rows, groups, n) if product else None,
        [triangles(), *[None] * (rows - 1)] if cuts else None,
    )


def formula(certificate, problem, row):
    """g of one row as it is defined, in rational numbers."""
    w = [Fraction(float(x)) for x in problem.weight[row]]
    gram = [[Fraction(float(x)) for x in line] for line in problem.gram]
    lam = [Fraction(float(x)) for x in certificate.diagonal[row]]
    mu = [Fraction(float(x)) for x in certificate.penalty[row]]
    n, size, s = problem.n, problem.group_size, problem.pruned_per_group
    groups = [range(first, first + size) for first in range(0, n, size)]
    cuts = certificate.cuts[row] if certificate.cuts else None

    def g(p):
        value = sum(
            w[i] * gram[i][j] * w[j] * p[i] * p[j] for i, j in itertools.product(range(n), repeat=2)
        )
        value += sum(lam[i] * (p[i] ** 2 - p[i]) for i in range(n))
        for group, members in enumerate(groups):
            excess = sum(p[i] for i in members) - s
            value += mu[group] * excess**2
            if certificate.product is not None:
                nu = [Fraction(float(x)) for x in certificate.product[row, group]]
                value += sum(nu[i] * p[i] for i in range(n)) * excess
        if cuts is not None:
            z = [*(2 * x - 1 for x in p), Fraction(1)]  # index −1 is z_0
            for (i, j, k), (a, b), tau in zip(
                cuts.index.tolist(), cuts.sign.tolist(), cuts.multiplier.tolist(), strict=True
            ):
                cut = a * z[i] * z[j] + b * z[i] * z[k] + a * b * z[j] * z[k] + 1
                value -= Fraction(tau) * cut
        return value

    return g


def exact(certificate, problem, row):
    """The bound as it is defined: g at p̂, and its slope over all legal masks."""
    g = formula(certificate, problem, row)
    n, size, s = problem.n, problem.group_size, problem.pruned_per_group
    point = [Fraction(float(x)) for x in certificate.point[row]]
    # g is a quadratic: central differences are its gradient exactly
    half = Fraction(1, 2)
    gradient = []
    for i in range(n):
        up, down = list(point), list(point)
        up[i], down[i] = up[i] + half, down[i] - half
        gradient.append(g(up) - g(down))
    least = sum(sum(sorted(gradient[first : first + size])[:s]) for first in range(0, n, size))
    slope = least - sum(x * y for x, y in zip(gradient, point, strict=True))
    return g(point) + slope


def least_eigenvalue(certificate, problem, row):
    """Of the matrix of g's quadratic form."""
    g, n = formula(certificate, problem, row), problem.n

    def at(*chosen):
        return g([Fraction(chosen.count(i)) for i in range(n)])

    single = [at(i) - at() for i in range(n)]
    a = [[float(at(i, j) - at() - single[i] - single[j]) / 2 for j in range(n)] for i in range(n)]
    return float(np.linalg.eigvalsh(np.array(a))[0])


def unclamped(certificate, problem, row):
    """What `check` computes of one row before it says 0 of all that is below."""
    return float(_check_row(certificate, problem, problem.gram.double(), row, None))


def sizes(certificate, problem, row):
    """Σ|term| of each part of g(p̂), every product written out: what float64 sums may lose a part of."""
    w, point = problem.weight[row].double().abs(), certificate.point[row].abs()
    reach = point.view(-1, problem.group_size).sum(1) + problem.pruned_per_group
    wide = problem.gram.double().abs()
    parts = {
        "weight": (w * point) @ wide @ (w * point),
        "diagonal": certificate.diagonal[row].abs() @ (point.square() + point),
        "penalty": certificate.penalty[row].abs() @ reach.square(),
        "product": (certificate.product[row].abs() @ point) @ reach,
        "cuts": certificate.cuts[row].multiplier.sum() * (3 * (2 * point.max() + 1) ** 2 + 1),
    }
    return {name: float(size) for name, size in parts.items()}


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("cuts", [False, True])
@pytest.mark.parametrize("product", [False, True])
def test_the_value_is_the_formulas(pattern, product, cuts):
    problem = layer(pattern)
    given = certificate(problem, product=product, cuts=cuts)
    for row in range(problem.rows):
        true = float(exact(given, problem, row))
        found = unclamped(given, problem, row)
        assert found == pytest.approx(true, rel=1e-11)
        assert found <= true


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("far", [0.5, 30.0])
@pytest.mark.parametrize(
    "part", ["weight", "gram", "small gram", "diagonal", "penalty", "product", "cuts"]
)
def test_the_margin_covers_the_rounding_of_every_part(part, far, pattern):
    """n + n terms in a row lose up to 2n·u of their sizes, whichever part is the large one."""
    problem = layer(pattern, rows=1)
    given = replace(
        certificate(problem, product=True, cuts=True), diagonal=torch.ones(1, 8).double()
    )
    given = replace(
        given, point=far * torch.rand(1, 8, dtype=torch.float64), penalty=given.penalty.abs()
    )
    large = 1e6
    weight, gram = problem.weight, problem.gram
    if part == "weight":
        problem = LayerProblem(large * weight.abs() * ALTERNATING, gram, pattern)
    elif part == "gram":
        problem = LayerProblem(weight, large * gram, pattern)
    elif part == "small gram":
        problem = LayerProblem(large * weight, gram / large, pattern)
    elif part == "cuts":
        given = replace(given, cuts=[triangles(large)], diagonal=given.diagonal * 20 * large)
    else:
        given = replace(given, **{part: large * getattr(given, part)})
        if part == "product":  # the matrix of such a product is indefinite
            given = replace(given, diagonal=given.diagonal * 20 * large)
    size = sum(sizes(given, problem, 0).values())
    lost = float(exact(given, problem, 0) - Fraction(unclamped(given, problem, 0)))
    terms = 2 * problem.n + 8
    assert terms * U * size <= lost <= 500 * terms * U * size


@pytest.mark.parametrize("pattern", PATTERNS[:3], ids=str)
@pytest.mark.parametrize("part", ["weight", "penalty"])
def test_the_margin_stands_alone_where_p_is_the_best_mask(part, pattern):
    """There more of every λ costs nothing, so that nothing but the margin is lost."""
    point = torch.zeros(1, 8, dtype=torch.float64)
    point.view(-1, 8 // pattern.group_size(8), pattern.group_size(8))[
        ..., : pattern.pruned_per_group(8)
    ] = 1.0
    weight = (10.0 - 9.0 * point) * (1e6 if part == "weight" else 1.0)
    problem = LayerProblem(weight, torch.eye(8, dtype=torch.float64), pattern)
    zero = torch.zeros(1, 8 // problem.group_size, 8, dtype=torch.float64)
    given = Certificate(
        -0.5 * weight.square(),
        zero[..., 0] + (1e6 if part == "penalty" else 0.0),
        point,
        zero,
        [triangles(0.0)],
    )
    best = Fraction(float(problem.objective(point == 0)))
    assert exact(given, problem, 0) == best
    lost = float(best - Fraction(unclamped(given, problem, 0)))
    size, terms = sum(sizes(given, problem, 0).values()), 2 * problem.n + 8
    assert terms * U * size <= lost <= 5000 * terms * U * size


@pytest.mark.parametrize("pattern", PATTERNS[:3], ids=str)
@pytest.mark.parametrize("part", ["gram", "diagonal", "penalty", "product", "cuts"])
def test_what_a_matrix_lacks_is_paid_for(part, pattern):
    """At p̂ = ½ a θ more of every λ costs θ·n/4; whichever part makes A indefinite."""
    problem = layer(pattern, rows=1)
    size = {"diagonal": -1.0, "penalty": -1.0}.get(part, 1.0)
    if part == "gram":
        lower = problem.gram - 3 * torch.eye(8, dtype=torch.float64)
        problem = LayerProblem(problem.weight, lower, pattern, assume_psd=True)
    zeros = {"diagonal": (1, 8), "penalty": (1, 8 // problem.group_size)}
    zeros["product"] = (1, 8 // problem.group_size, 8)
    parts = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in zeros.items()}
    if part in parts:
        parts[part] += size + torch.rand(parts[part].shape, dtype=torch.float64)
        if size < 0:
            parts[part] *= 30
    given = Certificate(
        point=torch.full((1, 8), 0.5, dtype=torch.float64),
        cuts=[triangles()] if part != "cuts" else [triangles(30.0)],
        **parts,
    )
    lacks = -least_eigenvalue(given, problem, 0)
    assert lacks > 0.01
    paid = float(exact(given, problem, 0) - Fraction(unclamped(given, problem, 0))) / (8 / 4)
    assert lacks * (1 - 1e-12) <= paid
    assert paid == pytest.approx(lacks, rel=1e-9)


@pytest.mark.parametrize("kind", ["zero", "singular", "barely", "indefinite", "negative"])
@pytest.mark.parametrize("n", [1, 6, 40])
def test_what_is_missing_to_semidefinite_is_added_with_its_margin(n, kind):
    """The Cholesky factorisation of Rump, or the least eigenvalue; and hardly more than is needed."""
    x = torch.randn(n, max(1, n // 2), dtype=torch.float64)
    eye = torch.eye(n, dtype=torch.float64)
    a = {
        "zero": 0 * eye,
        "singular": x @ x.T,
        "barely": x @ x.T - 1e-10 * eye,
        "indefinite": x @ x.T - eye,
        "negative": -eye,
    }[kind]
    a = (a + a.T) / 2
    added = _missing(a)
    least = float(torch.linalg.eigvalsh(a)[0])
    trace, gamma = float(a.diagonal().abs().sum()), (n + 2) * U
    # a completed factorisation of the shifted matrix proves no more than −γ/(1−γ)·tr
    assert added >= max(0.0, -least) + gamma / (1 - gamma) * trace
    norm = float(torch.linalg.matrix_norm(a))
    # the shifts that are tried lie a factor of 100 apart, up to where an eigenvalue takes over
    often = 100 if kind == "barely" else 1.01
    assert added <= often * max(0.0, -least) + 50 * n * U * (trace + norm) + 1e-250
    shifted = a + added * eye
    assert positive_definite([[Fraction(float(v)) for v in line] for line in shifted]) or n > 6


def positive_definite(a):
    """LDLᵀ in rational numbers (semidefinite where a pivot and its column are 0)."""
    while a:
        pivot, *rest = a[0]
        if pivot < 0 or (pivot == 0 and any(rest)):
            return False
        if pivot == 0:
            a = [line[1:] for line in a[1:]]
            continue
        a = [
            [v - line[0] * head / pivot for v, head in zip(line[1:], rest, strict=True)]
            for line in a[1:]
        ]
    return True


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS[:3], ids=str)
def test_one_factorisation_for_all_rows_proves_what_one_for_each_does(pattern, zero):
    problem = layer(pattern, rows=4)
    weight = problem.weight.clone()
    weight[0, 0], weight[1] = 1e-3, weight[1] + 2
    if zero:
        weight[:, 3] = 0
        weight[2, 5] = 0
    problem = LayerProblem(weight, problem.gram, pattern)
    given = Certificate(
        0.2 * weight.square() * torch.rand(4, 8, dtype=torch.float64),
        0.1 * torch.rand(4, 8 // problem.group_size, dtype=torch.float64),
        lower_bound(problem, "box").certificate.point,
    )
    shared = _shared_slack(given, problem)
    assert shared is not None
    together = given.check(problem)
    for row in range(4):
        value = float(_check_row(given, problem, problem.gram, row, shared))
        true = float(exact(given, problem, row))
        assert value == pytest.approx(true, rel=1e-9)
        assert value <= true
        assert float(together[row]) == max(0.0, value)


def test_what_all_rows_lack_is_paid_for_by_their_weights():
    """A Gram matrix that is semidefinite up to its rounding only; rows of any scale."""
    gram = random_gram(8, "low-rank", 2)
    gram = gram - 1e-9 * torch.eye(8, dtype=torch.float64)
    weight = random_weight(3, 8, 1) * torch.tensor([[1e-2], [1.0], [1e2]])
    problem = LayerProblem(weight, gram, PATTERNS[2])
    none = torch.zeros(3, 8, dtype=torch.float64)
    given = Certificate(none, none[:, :2], none + 0.5)
    shared = _shared_slack(given, problem)
    assert 1e-9 <= shared.slack <= 1e-7
    for row in range(3):
        value = float(_check_row(given, problem, problem.gram, row, shared))
        paid = float(exact(given, problem, row) - Fraction(value))
        assert paid == pytest.approx(shared.slack * float(weight[row].square().sum()) / 4, rel=1e-3)


def test_weights_and_gram_of_float32_are_widened():
    wide = layer(rows=2)
    narrow = LayerProblem(wide.weight.float(), wide.gram.float(), wide.pattern)
    wide = LayerProblem(narrow.weight.double(), narrow.gram.double(), wide.pattern)
    for options in ({}, {"product": True, "cuts": True}):
        given = certificate(wide, **options)
        assert torch.equal(given.check(narrow), given.check(wide))
        for row in range(2):
            assert unclamped(given, narrow, row) == unclamped(given, wide, row)
    shared = replace(given, product=None, cuts=None, penalty=given.penalty.abs())
    near = replace(
        shared, point=lower_bound(wide, "box").certificate.point, diagonal=0.01 * shared.diagonal
    )
    assert bool((near.check(wide) > 0).any())
    assert torch.equal(near.check(narrow), near.check(wide))
    for row in range(2):
        assert torch.equal(
            near.take([row]).check(wide.row(row)), near.take([row]).check(wide.take([row]))
        )


def lopsided():
    """Two rows at the same point whose certificates one factorisation must not speak for."""
    problem = LayerProblem(
        torch.ones(2, 8, dtype=torch.float64), random_gram(8, "full", 2), PATTERNS[2]
    )
    point = torch.full((2, 8), 0.5, dtype=torch.float64)
    none = Certificate(torch.zeros(2, 8).double(), torch.zeros(2, 2).double(), point)
    return problem, none


def test_duals_that_lift_the_bound_above_the_optimum_pay_for_it():
    """Each would prove too much if its matrix were taken for semidefinite."""
    problem, none = lopsided()
    best = solve(problem, "exhaustive").objective
    down = torch.zeros(2, 8, dtype=torch.float64)
    down[1] = -50.0
    fifth = torch.zeros(2, 8, dtype=torch.float64)
    fifth[:, 5] = -50.0
    off = none.point.clone()
    off[:, :4] = 0.9
    weightless = LayerProblem(
        problem.weight * (torch.arange(8) != 5), problem.gram, problem.pattern
    )
    cases = {
        "one row's diagonal": (problem, replace(none, diagonal=down)),
        "a penalty": (problem, replace(none, penalty=-50 * torch.ones(2, 2).double(), point=off)),
        "no weight": (weightless, replace(none, diagonal=fifth)),
        "a product": (problem, replace(none, product=50 * torch.ones(2, 2, 8).double(), point=off)),
    }  # fmt: skip
    for name, (of, given) in cases.items():
        optimum = best if of is problem else solve(of, "exhaustive").objective
        assert bool((given.check(of) <= optimum).all()), name


def test_the_rows_of_a_certificate_are_taken_stacked_and_chosen():
    problem = layer(rows=3)
    full = certificate(problem, product=True, cuts=True)
    plain = certificate(problem)
    cut = replace(full, product=None)

    def same(a, b):
        for what in ("diagonal", "penalty", "point"):
            assert torch.equal(getattr(a, what), getattr(b, what))
        none = torch.zeros(3, 2, 8, dtype=torch.float64)
        one, two = (none if c.product is None else c.product for c in (a, b))
        assert torch.equal(one, two)
        assert list(a.cuts or [None] * 3) == list(b.cuts or [None] * 3)

    for whole in (full, plain, cut):
        same(Certificate.stack([whole.take([0]), whole.take([1, 2])]), whole)
        reordered = whole.take([2, 0])
        assert torch.equal(reordered.point, whole.point[[2, 0]])
        assert (
            torch.equal(reordered.check(problem.take([2, 0])), whole.check(problem)[[2, 0]])
            or whole is plain
        )
    mixed = Certificate.stack([plain.take([1, 2]), full.take([0])])
    assert mixed.cuts[:2] == [None, None]
    assert mixed.cuts[2] is full.cuts[0]
    assert Certificate.stack([plain, plain]).product is None
    assert Certificate.stack([plain, plain]).cuts is None
    for one, two in itertools.permutations((full, plain, cut), 2):
        mixed = Certificate.choose(torch.tensor([True, False, True]), one, two)
        for row, source in enumerate((two, one, two)):
            assert torch.equal(mixed.point[row], source.point[row])
            assert unclamped(mixed, problem, row) == pytest.approx(
                unclamped(source, problem, row), rel=1e-12
            )
    box = Certificate.box(problem, plain.point.float())
    assert box.point.dtype == torch.float64
    same(
        box,
        Certificate(*(torch.zeros(3, k).double() for k in (8, 2)), plain.point.float().double()),
    )


TAU = torch.ones(2, dtype=torch.float64)
GOOD = Cuts(torch.tensor([[-1, 0, 7], [3, 2, 1]]), torch.tensor([[1, -1], [-1, -1]]), TAU)


@pytest.mark.parametrize(
    ("part", "bad", "message"),
    [
        ("diagonal", lambda c: c.diagonal.float(), "diagonal must be float64"),
        ("diagonal", lambda c: c.diagonal[:1], "diagonal must be float64"),
        ("diagonal", lambda c: c.diagonal[:, :7], "diagonal must be float64"),
        ("penalty", lambda c: c.penalty.float(), "penalty must be float64"),
        ("penalty", lambda c: c.penalty[:, :1], "penalty must be float64"),
        ("point", lambda c: c.point[:, :1], "point must be float64"),
        ("point", lambda c: c.point / (torch.arange(8) != 3), "point holds NaN or infinite"),
        ("penalty", lambda c: c.penalty / torch.tensor([0.0, 1.0]), "penalty holds NaN or inf"),
        ("product", lambda c: torch.zeros(2, 8, 2).double(), "product must be float64"),
        ("product", lambda c: torch.zeros(2, 2, 8), "product must be float64"),
        ("product", lambda c: torch.full((2, 2, 8), torch.nan).double(), "product holds NaN"),
        ("cuts", lambda c: [GOOD], "1 cut lists for 2 rows"),
        ("cuts", lambda c: [None, GOOD, GOOD], "3 cut lists for 2 rows"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(part, bad, message):
    problem = layer()
    given = certificate(problem)
    with pytest.raises(VerificationError, match=message):
        replace(given, **{part: bad(given)}).check(problem)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multiplier": TAU.float()}, "wrong shape or type"),
        ({"multiplier": TAU[:1]}, "wrong shape or type"),
        ({"multiplier": TAU[:, None]}, "wrong shape or type"),
        ({"multiplier": TAU[0]}, "wrong shape or type"),
        ({"index": GOOD.index[:, :2]}, "wrong shape or type"),
        ({"index": GOOD.index.flatten()}, "wrong shape or type"),
        ({"sign": GOOD.sign[:, :1]}, "wrong shape or type"),
        ({"sign": GOOD.sign[:1]}, "wrong shape or type"),
        ({"index": GOOD.index.float()}, "not whole numbers"),
        ({"sign": GOOD.sign.float()}, "not whole numbers"),
        ({"index": torch.tensor([[-2, 0, 7], [3, 2, 1]])}, "outside the row"),
        ({"index": torch.tensor([[-1, 0, 7], [3, 2, 8]])}, "outside the row"),
        ({"index": torch.tensor([[1, 1, 7], [3, 2, 1]])}, "twice"),
        ({"index": torch.tensor([[7, 1, 7], [3, 2, 1]])}, "twice"),
        ({"index": torch.tensor([[-1, 1, 7], [3, 2, 2]])}, "twice"),
        ({"index": torch.tensor([[-1, -1, 7], [3, 2, 1]])}, "twice"),
        ({"sign": torch.tensor([[1, 0], [1, 1]])}, "not ±1"),
        ({"sign": torch.tensor([[1, -1], [-2, 1]])}, "not ±1"),
        ({"multiplier": TAU * torch.tensor([1.0, -1e-9]).double()}, "negative multiplier"),
        ({"multiplier": TAU * torch.tensor([1.0, torch.inf]).double()}, "negative multiplier"),
        ({"multiplier": TAU * torch.nan}, "negative multiplier"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("row", [0, 1])
def test_cuts_that_are_no_triangle_inequalities_are_refused(changes, message, row):
    problem = layer()
    cuts = [None, None]
    cuts[row] = replace(GOOD, **changes)
    given = replace(certificate(problem), cuts=cuts)
    with pytest.raises(VerificationError, match=rf"row {row} .*{message}"):
        given.check(problem)


def test_every_whole_number_and_a_multiplier_of_zero_make_a_cut():
    problem = layer()
    given = certificate(problem)
    for kind in (torch.int8, torch.int16, torch.int32, torch.int64):
        cuts = Cuts(GOOD.index.to(kind), GOOD.sign.to(kind), 0 * TAU)
        value = replace(given, cuts=[cuts, None]).check(problem)
        torch.testing.assert_close(value, given.check(problem))
    none = Cuts(GOOD.index[:0], GOOD.sign[:0], TAU[:0])
    torch.testing.assert_close(
        replace(given, cuts=[none, none]).check(problem), given.check(problem)
    )


@pytest.mark.parametrize("size", [1e100, 1e160, 1e300])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("part", ["diagonal", "penalty", "point", "product", "cuts"])
def test_numbers_near_the_end_of_float64_prove_nothing_and_break_nothing(part, sign, size):
    problem = layer()
    given = certificate(problem, product=True)
    huge = (
        [Cuts(GOOD.index, GOOD.sign, TAU * size), None]
        if part == "cuts"
        else torch.full_like(getattr(given, part), sign * size)
    )
    value = replace(given, **{part: huge}).check(problem)
    assert bool((value <= solve(problem, "exhaustive").objective).all())
    assert bool((value >= 0).all())


@pytest.mark.parametrize("cuts", ["none", "absent", "some", "empty"])
def test_a_certificate_comes_back_from_disk_and_proves_the_same(cuts, tmp_path):
    problem = layer(rows=3)
    given = certificate(problem, product=True)
    nothing = Cuts(GOOD.index[:0], GOOD.sign[:0], TAU[:0])
    lists = {
        "none": None,
        "absent": [None] * 3,
        "some": [None, triangles(), GOOD],
        "empty": [nothing] * 3,
    }
    given = replace(given, cuts=lists[cuts])
    given.save(tmp_path / "c.npz")
    read = Certificate.load(tmp_path / "c.npz")
    assert torch.equal(read.product, given.product)
    for row in range(3):
        assert unclamped(read, problem, row) == unclamped(given, problem, row)
    assert torch.equal(read.check(problem), given.check(problem))


@pytest.mark.parametrize(
    "changes",
    [
        {"diagonal": np.array(["a"])},
        {"diagonal": np.zeros((2, 8), ">f8")},
        {"cut_count": np.array([1, 1])},
        {"cut_count": np.array(["1", "1"])},
        {"cut_count": np.array([3, -1])},
        {"cut_count": np.array([[1], [1]])},
        {"cut_count": np.array([1.0, 1.0])},
        {"cut_count": np.array([1, 7])},
    ],
    ids=str,
)
def test_a_file_of_another_making_is_named(changes, tmp_path):
    arrays = {
        "diagonal": np.zeros((2, 8)), "penalty": np.zeros((2, 2)), "point": np.zeros((2, 8)),
    }  # fmt: skip
    if "cut_count" in changes and len(changes) == 1 and changes["cut_count"].tolist() != [1, 1]:
        changes = {
            **changes,
            "cut_index": GOOD.index.numpy(),
            "cut_sign": GOOD.sign.numpy(),
            "cut_multiplier": TAU.numpy(),
        }
    write_arrays(tmp_path / "c.npz", "certificate", {}, {**arrays, **changes})
    with pytest.raises(ProblemError, match=r"c\.npz: not a sound certificate"):
        Certificate.load(tmp_path / "c.npz")


def test_verify_names_a_forged_cut_from_disk(tmp_path):
    problem = layer()
    given = replace(certificate(problem), cuts=[replace(GOOD, multiplier=TAU[:, None]), None])
    mask = solve(problem, "wanda").mask
    bound = 0.5 * problem.objective(mask)
    Solution.of(problem, mask, lower_bound=bound, certificate=given).save(tmp_path / "s.npz")
    with pytest.raises(VerificationError, match="wrong shape or type"):
        verify(problem, Solution.load(tmp_path / "s.npz"))
