"""What a certificate proves is the formula's value less a margin for rounding."""

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from certificates import PATTERNS, certificate, exact, formula, layer, triangles, unclamped
from strategies import random_gram, random_weight

from maskopt import (
    Certificate,
    LayerProblem,
    Linear,
    Status,
    Unstructured,
    lower_bound,
    solve,
)
from maskopt.certificate import _check_row, _shared_slacks, missing

#: signs under which sums cancel
ALTERNATING = 1 - 2.0 * (torch.arange(8) % 2)
U = 2.0**-53


def least_eigenvalue(certificate, problem, row):
    """Of the matrix of g's quadratic form."""
    g, n = formula(certificate, problem, row), problem.n

    def at(*chosen):
        return g([Fraction(chosen.count(i)) for i in range(n)])

    single = [at(i) - at() for i in range(n)]
    a = [[float(at(i, j) - at() - single[i] - single[j]) / 2 for j in range(n)] for i in range(n)]
    return float(np.linalg.eigvalsh(np.array(a))[0])


def sizes(certificate, problem, row):
    """Σ|term| of each part of g(p̂), every product written out: what float64 sums may lose a part of."""
    w, point = problem.weight[row].double().abs(), certificate.point[row].abs()
    reach = point.view(-1, problem.group_size).sum(1) + problem.pruned_per_group
    wide = problem.gram.double().abs()
    parts = {
        "weight": (w * point) @ wide @ (w * point),
        "diagonal": certificate.diagonal[row].abs() @ (point.square() + point),
        "penalty": certificate.penalty[row].abs() @ reach.square(),
        "linear": torch.zeros(()),
        "product": (certificate.product[row].abs() @ point) @ reach,
        "cuts": certificate.cuts[row].multiplier.sum() * (3 * (2 * point.max() + 1) ** 2 + 1),
    }
    if problem.linear is not None:
        slope = problem.linear.correlation[row].abs() * w
        parts["linear"] = 2 * slope @ point + problem.linear.constant[row]
    return {name: float(size) for name, size in parts.items()}


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("cuts", [False, True])
@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_the_value_is_the_formulas(pattern, product, cuts, linear):
    problem = layer(pattern, linear=linear)
    given = certificate(problem, product=product, cuts=cuts)
    for row in range(problem.rows):
        true = float(exact(given, problem, row))
        found = unclamped(given, problem, row)
        assert found == pytest.approx(true, rel=1e-11)
        assert found <= true


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("far", [0.5, 30.0])
@pytest.mark.parametrize(
    "part", ["weight", "gram", "small gram", "linear", "diagonal", "penalty", "product", "cuts"]
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
    elif part == "linear":
        slope = large * (1 + torch.rand(1, 8).double()) * ALTERNATING
        linear = Linear(slope, large * torch.ones(1).double())
        problem = LayerProblem(weight, gram, pattern, linear=linear, assume_psd=True)
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
@pytest.mark.parametrize("cuts", [False, True])
def test_a_certificate_of_a_rows_own_form_proves_as_much_of_the_row(pattern, cuts):
    """Where the linear part is within Q, and where it stands beside it, by the formula of each."""
    problem = layer(pattern, rows=1, linear=True)
    form = LayerProblem(torch.ones(1, 8).double(), problem.row(0).q(), pattern, assume_psd=True)
    given = certificate(form, cuts=cuts)
    beside = given.of_linear(problem)
    within = float(exact(given, form, 0))
    assert float(exact(beside, problem, 0)) == pytest.approx(within, rel=1e-10)
    assert unclamped(beside, problem, 0) == pytest.approx(within, rel=1e-9)
    plain = layer(pattern)
    assert given.of_linear(plain) is given


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
    added = missing(a)
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
    shared = _shared_slacks(given, problem)[0]
    assert shared is not None
    together = given.check(problem)
    for row in range(4):
        value = float(_check_row(given, problem, problem.gram, row, shared))
        true = float(exact(given, problem, row))
        assert value == pytest.approx(true, rel=1e-9)
        assert value <= true
        assert float(together[row]) == max(0.0, value)


@pytest.mark.parametrize("beside", [{}, {"product": True, "cuts": True}], ids=["plain", "all"])
def test_rows_that_add_nothing_negative_share_a_factorisation_beside_others(beside, monkeypatch):
    problem = layer(rows=6)
    own = certificate(problem, **beside)
    negative = replace(own, diagonal=own.diagonal - 0.1 * problem.weight.square())
    box = lower_bound(problem, "box").certificate
    given = Certificate.choose(torch.arange(6) < 2, box, negative)
    slacks = _shared_slacks(given, problem)
    assert [slack is None for slack in slacks] == [True] * 2 + [False] * 4
    counted = []
    monkeypatch.setattr("maskopt.certificate.missing", lambda a: counted.append(a) or missing(a))
    found = given.check(problem)
    assert len(counted) <= 4  # two rows of their own, the others, and perhaps a try with all
    for row in range(6):
        true = max(0.0, float(exact(given, problem, row)))
        assert float(found[row]) <= true
        alone = float(given.take([row]).check(problem.take([row]))[0])
        assert float(found[row]) == pytest.approx(alone, rel=1e-9, abs=1e-12)


def test_what_all_rows_lack_is_paid_for_by_their_weights():
    """A Gram matrix that is semidefinite up to its rounding only; rows of any scale."""
    gram = random_gram(8, "low-rank", 2)
    gram = gram - 1e-9 * torch.eye(8, dtype=torch.float64)
    weight = random_weight(3, 8, 1) * torch.tensor([[1e-2], [1.0], [1e2]])
    problem = LayerProblem(weight, gram, PATTERNS[2])
    none = torch.zeros(3, 8, dtype=torch.float64)
    given = Certificate(none, none[:, :2], none + 0.5)
    shared = _shared_slacks(given, problem)[0]
    assert 1e-9 <= shared <= 1e-7
    for row in range(3):
        value = float(_check_row(given, problem, problem.gram, row, shared))
        paid = float(exact(given, problem, row) - Fraction(value))
        assert paid == pytest.approx(shared * float(weight[row].square().sum()) / 4, rel=1e-3)


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


def test_rows_that_lack_more_together_are_checked_one_by_one():
    """The least λ/w² of an input is of another row for each: A of them all is further from semidefinite than
    any row's own, and an optimum would be none beside other rows."""
    gram = 4.742686817773039 * np.ones((3, 3))
    weight = np.array([[2.0, 2, -1], [1, 2, 2], [-1, -1, 0]])
    problem = LayerProblem(weight, gram, Unstructured(keep=1))
    found = solve(problem, "branch")
    assert found.status == (Status.OPTIMAL,) * 3
    for row in range(3):
        one, alone = found.certificate.take([row]), problem.take([row])
        assert float(found.certificate.check(problem)[row]) == pytest.approx(
            float(one.check(alone)[0]), rel=1e-9
        )
