"""Proofs of optimality: complete, checked against all masks, and not to be forged; they and certificates with
many, repeated and tiny cuts are also judged in exact rational arithmetic."""

import functools
import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from certificates import layer as eight, single
from commands import ended, run
from forging import edit, fails
from hypothesis import given, strategies as st
from strategies import HALF, TWO_FOUR, drawn, graph, legal_masks, problems, random_gram

from maskopt import NM, LayerProblem, RowProblem, Solution, Status, Unstructured, solve, verify
from maskopt.certificates.certificate import Certificate
from maskopt.certificates.cuts import NO_INPUT, Cuts
from maskopt.certificates.exact_check import exact_bounds, exact_cost, rational, semidefinite
from maskopt.certificates.proof import AGAIN, KINDS, LEAF, NO_FORM, Proof, RowProof
from maskopt.certificates.proof_check import TreeCheck, check_proof
from maskopt.core.files import read_arrays, write_arrays
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.limits import Limits
from maskopt.core.linear_term import LinearTerm
from maskopt.core.units import values_of
from maskopt.errors import OptionError, ProblemError, VerificationError
from maskopt.protocol.bounds import lower_bound
from maskopt.protocol.solution import relative_gap
from maskopt.solvers.bounds.cuts import cut_certificate

FOUR = Unstructured(keep=4)
LINEAR = pytest.mark.parametrize("linear", [None, 3], ids=["plain", "linear"])


def layer(n=16, pattern=HALF, kind="full", rows=1, linear=None, seed=1):
    return drawn(rows, n, kind, pattern, (seed, seed + 1), linear=linear)


def costs(problem):
    """The legal masks of a row, and their objectives."""
    masks = legal_masks(problem)
    return masks, problem.take([0] * len(masks)).objective(masks)


def proven(problem, **options):
    """What `branch` proves, and the check of it."""
    solution = solve(problem, "branch", proof=True, workers=0, **options)
    verify(problem, solution, require="checked")
    return solution


def bound_of(problem, tree):
    return float(check_proof(problem, Proof([tree])))


@given(problems(max_n=10, max_rows=2))
def test_what_branch_proves_is_checked_and_the_optimum(problem):
    solution, mass = proven(problem), problem.diagonal_mass()
    exact = solve(problem, "exhaustive").objective
    # far below the mass of Q, the rounding of a tree's bounds leaves a relative gap
    gaps = relative_gap(solution.objective, solution.lower_bound)
    for status, cost, size, gap in zip(solution.status, exact, mass, gaps, strict=True):
        assert status is Status.OPTIMAL or (0 < cost < 1e-7 * size and gap < 1e-5)
    assert bool((check_proof(problem, solution.proof) <= exact + 1e-12 * mass).all())
    assert bool(((solution.objective - exact).abs() <= 1e-6 * exact + 1e-10 * mass).all())


@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=str)
@LINEAR
def test_trees_beyond_enumeration_are_checked(pattern, linear):
    problem = layer(32, pattern, rows=2, linear=linear)
    solution = proven(problem)
    assert solution.status == (Status.OPTIMAL,) * 2
    assert solution.trusted == ("", "")
    assert verify(problem, solution, require="checked").basis == ("checked",) * 2
    plain = solve(problem, "branch", workers=0)
    assert torch.equal(plain.mask, solution.mask)
    with pytest.raises(VerificationError, match=r"is trusted \(branch of maskopt"):
        verify(problem, plain, require="checked")


def test_an_open_tree_proves_the_bound_of_its_leaves():
    problem = layer(48)
    best = float(solve(problem, "branch", workers=0).objective)
    for options in ({"node_limit": 3}, {"node_limit": 40}, {"gap_limit": 0.1}):
        solution = proven(problem, **options)
        assert solution.status == (Status.FEASIBLE,)
        assert 0 < float(solution.lower_bound) < best
        assert float(check_proof(problem, solution.proof)) == float(solution.lower_bound)


@pytest.mark.parametrize("keep", [0, 8])
def test_rows_without_a_choice_have_a_tree_of_one_leaf(keep):
    plain = layer(8, Unstructured(keep=keep), rows=2, seed=3)
    constant = LinearTerm(torch.full((2, 8), 0.1).double(), torch.full((2,), 50.0).double())
    for linear, proof in itertools.product((None, constant), (False, True)):
        problem = LayerProblem(plain.weight, plain.gram, plain.pattern, linear=linear)
        found = solve(problem, "branch", proof=proof)
        assert found.status == (Status.OPTIMAL,) * 2
        assert torch.equal(found.lower_bound, found.objective)
        assert verify(problem, found, require="checked").checked
        assert not proof or [len(tree.form) for tree in found.proof.rows] == [1, 1]
    dead = LayerProblem(torch.zeros(1, 16), random_gram(16, "low-rank", 2), Unstructured(keep=15))
    assert proven(dead).status == (Status.OPTIMAL,)
    # of twins, which all inputs are here, the first is pruned
    check = TreeCheck(dead.under(Unstructured(keep=14)), 0, single(np.zeros(16), 0.0, np.zeros(16)))
    assert [check._settle(but_for(16, i, 1)) for i in (1, 5)] == [True, False]


def test_a_tree_is_the_same_every_time_and_survives_a_file(tmp_path):
    problem, path = layer(28), tmp_path / "proof.npz"
    theirs = solve(problem, "scip")
    assert verify(problem, theirs).basis != ("checked",)
    solution = proven(problem, start=theirs.mask)
    assert torch.equal(solution.mask, theirs.mask)
    solution.save(path)
    loaded, again = Solution.load(path), proven(problem, start=theirs.mask)
    for other, name in itertools.product((again, loaded), KINDS):
        one, two = getattr(solution.proof.rows[0], name), getattr(other.proof.rows[0], name)
        assert one.dtype == two.dtype
        assert np.array_equal(one, two)
    assert verify(problem, loaded, require="checked").checked
    header, arrays = read_arrays(path, "solution")
    del arrays["proof.rows.0.points"]
    header = {k: v for k, v in header.items() if k not in ("format", "kind")}
    write_arrays(path, "solution", header, arrays)
    fails(ProblemError, "not a sound solution", Solution.load, path)


# --- what a step proves, without any search
def every_mask_below(check, state):
    """The `branch` of steps without forms that split a node down to single masks."""
    if not check._settle(state) or (state >= 0).all():
        return [LEAF]
    first, found = int(np.flatnonzero(state < 0)[0]), []
    for side in (1, 0):
        below = state.copy()
        below[first] = side
        found += every_mask_below(check, below)
    return [first, *found]


def but_for(n, i, side):
    state = np.full(n, -1, dtype=np.int8)
    state[i] = side
    return state


def tree_with(tree, form, branch, **more):
    steps = {"form": form, "branch": branch, "fixes": np.zeros(len(form)), **more}
    return replace(tree, **{k: np.asarray(v, dtype=KINDS[k]) for k, v in steps.items()})


@pytest.mark.parametrize("pattern", [Unstructured(keep=5), NM(keep=1, of=3)], ids=str)
@pytest.mark.parametrize(
    "kind", ["full", "outliers", pytest.param("low-rank", marks=pytest.mark.slow)]
)
def test_any_form_at_any_point_is_below_all_masks(pattern, kind):
    """λ and μ of both signs, at the root and at a node: valid, and often worth something."""
    random = np.random.default_rng(4)
    positive = 0
    for trial in range(30):
        problem = layer(9, pattern, kind, linear=3 if trial % 2 else None, seed=trial)
        masks, every = costs(problem)
        share = problem.pruned_per_group / problem.group_size
        unit, rounding = float(problem.row(0).q().trace()) / 9, 1e-12 * float(every.max())
        lam, mu = unit * random.normal(size=9) * trial / 30, unit * random.normal() / 9
        tree = single(lam, mu, np.full(9, share) if trial % 3 else random.random(9))
        bound = bound_of(problem, tree)
        assert bound <= float(every.min()) + rounding
        positive += bound > 0
        # an input pruned: bounded; kept: all masks looked at
        i, check = int(random.integers(9)), TreeCheck(problem, 0, tree)
        rest, node = every_mask_below(check, but_for(9, i, 0)), but_for(9, i, 1)
        points = random.random((node < 0).sum() if check._settle(node) else 0)
        steps = [NO_FORM, 0, *[NO_FORM] * len(rest)], [i, LEAF, *rest]
        bound = bound_of(problem, tree_with(tree, *steps, points=points))
        assert bound <= float(every.min()) + rounding
        assert bound <= float(every[masks[:, i]].min()) + rounding
    assert positive >= 3


def test_fixings_are_held_to_their_other_side():
    """All masks on the side that is fixed are looked at: what is left is the other side's bound. (With λ = −Q
    of a diagonal Q the form is linear, and every bound the truth.)"""
    problem = layer(7, FOUR, kind="diagonal")
    masks, every = costs(problem)
    lam = -problem.row(0).q().diagonal().numpy() * (1 - 1e-9)
    root, decisive = single(lam, 0.0, np.full(7, 0.5)), 0
    for i, side in itertools.product(range(7), (0, 1)):
        rest = every_mask_below(TreeCheck(problem, 0, root), but_for(7, i, side))
        steps = [0, *[NO_FORM] * len(rest)], [AGAIN, *rest]
        fixing = {"fixes": [1, *[0] * len(rest)], "fixed": [i], "side": [side]}
        tree = tree_with(root, *steps, **fixing)
        own, other = (float(every[masks[:, i] == (s == 0)].min()) for s in (side, 1 - side))
        assert bound_of(problem, tree) == pytest.approx(min(own, other), rel=1e-6)
        decisive += other < 0.99 * own
    assert decisive == 7


@pytest.mark.parametrize("kind", ["full", "outliers"])
def test_cuts_of_a_form_are_counted_as_in_a_certificate(kind):
    problem = layer(24, Unstructured(keep=12), kind)
    certificate, _ = cut_certificate(problem, 8, 3, Limits().begin())
    # a certificate may be checked at a point outside of the box
    certificate = replace(certificate, point=certificate.point.clamp(0, 1))
    assert len(certificate.cuts[0].multiplier) > 10
    lam, mu = certificate.diagonal[0].numpy(), float(certificate.penalty[0, 0])
    plain, cut = (single(lam, mu, certificate.point[0].numpy(), cuts)
                  for cuts in (None, certificate.cuts[0]))  # fmt: skip
    bound = bound_of(problem, cut)
    assert bound == pytest.approx(float(certificate.check(problem)), rel=1e-6)
    assert bound > 1.001 * bound_of(problem, plain)


@LINEAR
def test_cuts_never_pass_the_best_mask(linear):
    random = np.random.default_rng(1)
    for trial in range(20):
        problem = layer(9, FOUR, linear=linear, seed=trial)
        best = float(costs(problem)[1].min())
        index = np.array([random.permutation(np.arange(-1, 9))[:5] for _ in range(12)])
        index[:: 1 + trial % 3, 3:] = NO_INPUT  # all of them triangles, a half, a third
        sign = random.choice([-1, 1], (12, 4)).astype(np.int8)
        tau = random.random(12) * best
        cuts = Cuts(torch.tensor(index), torch.tensor(sign), torch.tensor(tau))
        tree = single(np.full(9, 40 * best), best, random.random(9), cuts)
        assert bound_of(problem, tree) <= best * (1 + 1e-12)


# --- forgeries
FORGED = layer(14, seed=3)
DAMAGED = layer(12), layer(12, TWO_FOUR), layer(12, kind="outliers"), graph(12, keep=6)


@functools.cache
def sound(problem):
    solution = proven(problem)
    return float(solution.objective), solution.proof.rows[0]


def parts_of(tree):
    return {name: getattr(tree, name).copy() for name in KINDS} | {"penalty": tree.penalty}


def steps(*branch, **more):
    more = {"points": [], "fixed": [], "side": [], **more}
    return lambda parts: parts.update(
        vars(tree_with(RowProof(**parts), [NO_FORM] * len(branch), branch, **more))
    )


REFUSED = {
    "a leaf is left out": (steps(3, LEAF), "left out"),
    "a leaf too many": (steps(LEAF, LEAF), "belongs to no node"),
    "an input that is fixed is branched on": (steps(3, 3, LEAF, LEAF, LEAF), "not free"),
    "a step where no mask is left": (
        steps(AGAIN, 9, fixes=[8, 0], fixed=range(8), side=[1] * 8), "goes on where no mask",
    ),
    "an input outside the row": (edit("branch", 0, to=14), "not free"),
    "no such sign for what follows": (edit("branch", 0, to=-3), "not free"),
    "fixed to both sides": (
        steps(LEAF, fixes=[2], fixed=[0, 0], side=[0, 1]), "not free, or to no side",
    ),
    "fixed outside the row": (edit("fixed", 0, to=99), "not free, or to no side"),
    "fixed to no side": (edit("side", 0, to=2), "not free, or to no side"),
    "another form": (edit("form", 0, to=10_000), "a form that is not there"),
    "NaN in λ": (edit("forms", (0, 0), to=np.nan), "NaN or infinite"),
    "NaN in a point": (edit("points", 0, to=np.nan), "not one of its step's"),
    "a point outside the box": (edit("points", 0, to=1.5), "not one of its step's"),
    "points left over": (edit("points", to=lambda x: np.append(x, 0.5)), "no step"),
    "points missing": (edit("points", to=lambda x: x[:-1]), "not one of its step's"),
    "infinite μ": (edit("penalty", to=lambda _: np.inf), "NaN or infinite"),
    "half the precision": (edit("points", to=lambda x: x.astype(np.float32)), "float64"),
    "fewer inputs": (edit("forms", to=lambda x: x[:, 1:]), "fit"),
    "no step": (edit("form", to=lambda x: x[:0]), "fit"),
    "less than no fixing": (edit("fixes", 0, to=-1), "less than no entry|as many"),
    "cuts from nowhere": (edit("cuts", 0, to=1), "as many cuts"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_forged_tree_is_refused(name):
    change, reason = REFUSED[name]
    parts = parts_of(sound(FORGED)[1])
    change(parts)
    with pytest.raises(VerificationError, match=f"the tree of row 0: .*({reason})"):
        check_proof(FORGED, Proof([RowProof(**parts)]))


def proves_nothing_false(problem, best, tree):
    try:
        bound = bound_of(problem, tree)
    except VerificationError:
        return True
    return bound <= best * (1 + 1e-12)


def test_arrays_of_any_shape_are_refused_or_prove_nothing_false():
    best, tree = sound(FORGED)
    shapes = ((), (0,), (1,), (0, 0), (2, 2), (1, 14), (1, 1, 1))
    for name, kind in KINDS.items():
        good, odd = getattr(tree, name), [np.zeros(shape, kind) for shape in shapes]
        odd += [good.astype(np.float16), good[..., :-1], np.concatenate([good, good])]
        for array in odd:
            assert proves_nothing_false(FORGED, best, replace(tree, **{name: array})), name


@given(st.integers(0, 10**9))
def test_whatever_is_changed_nothing_false_is_proven(seed):
    random = np.random.default_rng(seed)
    problem = DAMAGED[seed % 4]
    best, tree = sound(problem)
    parts = parts_of(tree)
    for _ in range(random.integers(1, 4)):
        name = random.choice([k for k in KINDS if parts[k].size] + ["penalty"])
        if name == "penalty":
            mu = parts[name]
            parts[name] = random.choice([-mu, 0, 0.5 * mu, 2 * mu, 1e9, -1e300])
            continue
        array = parts[name]
        at = tuple(random.integers(0, size) for size in array.shape)
        if array.dtype == np.float64:
            values = [0, 1, array[at] * 2, -array[at], 1e300, -1e12, random.random()]
            array[at] = random.choice(values)
        else:
            array[at] = random.integers(-3, 15)
    assert proves_nothing_false(problem, best, RowProof(**parts))


def test_trees_of_other_rows_prove_less_and_the_claim_is_refused():
    problem, harder = layer(24, seed=1), layer(24, seed=6)
    solution = proven(problem)
    other = replace(proven(harder), proof=solution.proof)
    assert float(check_proof(harder, solution.proof)) < 0.999 * float(other.objective)
    fails(VerificationError, "its proof proves", verify, harder, other)
    fails(VerificationError, "1 trees for 2 rows", check_proof, layer(24, rows=2), solution.proof)
    fails(VerificationError, None, verify, problem, replace(solution, mask=~solution.mask))
    cuts = Cuts(torch.tensor([[0, 1, 2]]), torch.tensor([[1, 1]]), torch.tensor([-0.1]))
    with pytest.raises(VerificationError, match="negative multiplier"):
        bound_of(layer(9, FOUR), single(np.ones(9), 0.0, np.full(9, 0.5), cuts))
    # updated weights and rows of a shared budget have none
    refitted = problem.with_update(LeastSquaresUpdate(0.1))
    fails(OptionError, "updated weights is not kept", proven, refitted)
    for one in (refitted, problem.under(Unstructured(sparsity=0.5, per="layer"))):
        with pytest.raises(VerificationError, match="a count of their own and unchanged weights"):
            check_proof(one, solution.proof)


# --- whole numbers
@pytest.mark.parametrize("chance", [0.25, 0.75])
def test_graphs_are_proven_with_fewer_nodes_where_they_are_whole(chance):
    problem = graph(20, chance, keep=13)
    solution = proven(problem)
    assert solution.status == (Status.OPTIMAL,)
    assert float(solution.lower_bound) == float(solution.objective)
    plain = proven(graph(20, chance, keep=13, integral=False))
    assert float(plain.objective) == float(solution.objective)
    assert int(solution.trace.nodes[0]) < int(plain.trace.nodes[0])


@given(st.integers(0, 10**6))
def test_every_mask_has_one_of_the_values(seed):
    random = np.random.default_rng(seed)
    root = random.integers(-3, 4, (3, 8)) * random.choice([1, 2, 3])
    gram = (root.T @ root).astype(float) + np.diag(random.integers(0, 2, 8) * 6.0)
    weight = random.integers(-2, 3, 8).astype(float)
    problem = RowProblem(weight, gram, Unstructured(keep=3), integral=True)
    values = problem.values()
    _, every = costs(problem.as_layer())
    for cost in every.tolist():
        assert values.at_least(cost) == cost
        assert values.at_least(cost - 1e-9) == cost
        below = values.at_least(cost - values.step - 1e-9)
        assert below == (cost - values.step if values.step else cost - 1e-9)
    if values.step:  # and no coarser ones hold them all
        apart = np.unique((every.numpy() - values.offset) / values.step)
        assert (apart.astype(int) == apart).all()
    solution = proven(problem)
    assert float(solution.objective) == float(every.min())


def test_values_of_a_graph_are_two_apart_and_what_is_not_whole_is_refused(tmp_path):
    values = graph().row(0).values()
    assert values.step == 2
    assert values.at_least(values.offset - 3.5) == values.offset - 2
    assert values_of(torch.full((4, 4), 3.0), 2).step == 6
    assert values_of(torch.eye(4) * 3, 2).at_least(1.5) == 6  # f is 6 throughout
    problem = graph(8)
    weight, gram, quarter = problem.weight, problem.gram, problem.gram.clone()
    quarter[0, 1] = quarter[1, 0] = 0.25
    linear = drawn(1, 8, linear=1).linear
    for arguments, more, message in (
        ((0.5 * torch.ones(1, 8), gram), {}, r"integral: weight holds 0\.5"),
        ((weight, quarter), {}, r"integral: twice gram holds 0\.5"),
        ((1e9 * weight, gram), {}, "not whole in float64"),
        ((weight, gram), {"linear": linear}, "linear part"),
        ((weight, gram), {"update": LeastSquaresUpdate()}, "updated weights"),
    ):
        fails(ProblemError, message, LayerProblem, *arguments, HALF, integral=True, **more)
    with pytest.raises(ProblemError, match=r"integral: weight holds 0\.5"):
        RowProblem(torch.full((8,), 0.5), gram, HALF, integral=True)
    fails(ProblemError, "updated weights", problem.with_update, LeastSquaresUpdate())
    problem.save(tmp_path / "graph.npz")
    assert LayerProblem.load(tmp_path / "graph.npz").integral
    assert problem.take([0]).integral
    assert problem.row(0).integral
    assert not layer().integral
    assert layer().row(0).values() is None


# --- in exact rational arithmetic
def many_cuts(groups, size, copies, part=0.99):
    """Of every pair (2g, 2g + 1) the cut 4pᵢpⱼ ≥ 0, which 1:2 masks meet with equality: once with the
    multiplier `size`, then many times with less than half a unit in its last place.

    Added one after the other to 2·size, the linear terms of the copies are lost, and the terms that cancel
    them are not: by rounding alone Σ τ c(p) is 2·copies·τ too small wherever pᵢ + pⱼ = 1.
    """
    pairs = torch.tensor([[-1, 2 * group, 2 * group + 1] for group in groups], dtype=torch.int32)
    tau = torch.full((len(pairs), copies + 1), part * size * 2.0**-53, dtype=torch.float64)
    tau[:, 0] = size
    sign = torch.ones(tau.numel(), 2, dtype=torch.int8)
    return Cuts(pairs.repeat_interleave(copies + 1, 0), sign, tau.flatten())


def forged_certificate(problem, honest, groups, size, copies, part=0.99):
    """An honest certificate, and cuts that μ and λ cancel: μ = 2τ takes the products, λ = −2τ the squares."""
    diagonal, penalty = honest.diagonal.clone(), honest.penalty.clone()
    for group in groups:
        penalty[:, group] += 2 * size
        diagonal[:, 2 * group : 2 * group + 2] -= 2 * size
    cuts = [many_cuts(groups, size, copies, part)] * problem.rows
    return Certificate(diagonal, penalty, honest.point, cuts=cuts)


def forged_tree(problem, honest, size, copies, part=0.99):
    """The same as a tree of one leaf, whose μ holds for all groups."""
    cuts = many_cuts(range(problem.n // 2), size, copies, part)
    return single(np.full(problem.n, -2 * size), 2 * size, honest.point[0].numpy(), cuts)


def one_of_two(n, seed):
    return layer(n, NM(keep=1, of=2), seed=seed)


@functools.cache
def toy(n, seed):
    """A 1:2 row, its box certificate, its exact optimum and the worst of its masks."""
    problem = one_of_two(n, seed)
    costs = {exact_cost(problem, mask, 0): mask for mask in legal_masks(problem)}
    assert max(costs) > 1.001 * float(min(costs)) > 0
    honest = lower_bound(problem, "box").certificate
    return problem, honest, min(costs), Solution.of(problem, costs[max(costs)])


def test_rounding_of_many_cuts_proves_nothing(tmp_path):
    problem, honest, optimum, _ = toy(8, 4)
    tree = forged_tree(problem, honest, 2.0**41, 40_000)
    assert Fraction(float(check_proof(problem, Proof([tree])))) <= optimum
    problem, instance = one_of_two(32, seed=4), tmp_path / "row.npz"
    problem.save(instance)
    best = solve(problem, "branch", proof=True, workers=0)
    starts = (solve(problem, "random", seed=seed).mask for seed in range(12))
    found = (solve(problem, "swap", start=start) for start in starts)
    other = next(s for s in found if float(s.objective) > 1.01 * float(best.objective))
    honest = lower_bound(problem, "box").certificate
    forged = forged_certificate(problem, honest, [0], 2.0**37, 500_000)
    more = {"lower_bound": other.objective, "certificate": forged}
    claim = Solution.of(problem, other.mask, status=Status.OPTIMAL, **more)
    for require in ("claims", "exact"):
        with pytest.raises(VerificationError, match="lower bound: row 0 states"):
            verify(problem, claim, require=require)
    assert bool((forged.check(problem) <= best.objective).all())
    best.save(tmp_path / "best.npz")
    said = run("verify", instance, tmp_path / "best.npz", "--exact")
    assert "holds: 1 row checked" in said
    assert "checked in exact arithmetic in" in said
    # a bound above what the tree proves
    off = replace(best, status=(Status.FEASIBLE,), lower_bound=best.lower_bound * (1 + 1e-8))
    off.save(tmp_path / "off.npz")
    run("verify", instance, tmp_path / "off.npz", "--exact", fails=VerificationError)
    run("verify", tmp_path, "--exact", fails=OptionError)


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (50, 100, 150, 200))]
)
def test_forged_certificates_and_trees_are_refused(first, monkeypatch):
    """250 of them: none proves more than the optimum, or than it does in exact arithmetic."""
    # else verify tries all masks of a toy
    monkeypatch.setattr("maskopt.checks.verification.ENUMERATION_LIMIT", 0)
    for seed in range(first, first + 50):
        generator = np.random.default_rng(seed)
        problem, honest, optimum, poor = toy(int(generator.choice([4, 6, 8])), 1 + seed % 4)
        size = 2.0 ** generator.integers(0, 60)
        copies = int(generator.choice([3, 40, 500] if seed % 50 else [30_000]))
        part = float(generator.choice([0.99, 0.5, 1.01, 1e-3]))
        groups = generator.permutation(problem.n // 2)[: generator.integers(1, problem.n // 2 + 1)]
        bad = forged_certificate(problem, honest, groups.tolist(), size, copies, part)
        tree = forged_tree(problem, honest, size, copies, part)
        claim = replace(poor, lower_bound=poor.objective)
        for forged, judge in (
            (replace(claim, certificate=bad), exact_bounds(problem, bad)),
            (replace(claim, proof=Proof([tree])), exact_bounds(problem, trees=[tree])),
        ):
            with pytest.raises(VerificationError, match="lower bound: row 0 states"):
                verify(problem, forged, require="checked")
            proof = forged.proof
            found = bad.check(problem) if proof is None else check_proof(problem, proof)
            assert Fraction(float(found)) <= judge[0] + optimum / 10**6, seed
            assert judge[0] <= optimum, seed


@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=str)
@pytest.mark.parametrize("linear", [None, 7], ids=["plain", "linear"])
def test_trees_and_certificates_of_searches_hold_exactly(pattern, linear):
    problem = layer(12, pattern, rows=2, linear=linear, seed=5)
    optimum = solve(problem, "branch", proof=True, workers=0)
    assert verify(problem, optimum, require="exact").checked
    bound = lower_bound(problem, "sdp")
    more = {"lower_bound": bound.value, "certificate": bound.certificate}
    claim = Solution.of(problem, optimum.mask, **more)
    assert verify(problem, claim, require="exact").checked
    higher = replace(claim, lower_bound=1.001 * claim.lower_bound)
    for wrong in (higher, replace(optimum, proof=None, trusted=("SCIP 10.0.0",) * 2)):
        fails(VerificationError, None, verify, problem, wrong, require="exact")


def test_a_shared_budget_has_one_exact_bound():
    problem = layer(8, Unstructured(0.5, per="layer"), rows=3, seed=5)
    problem = problem.counting(torch.tensor([1.0, 2.0, 0.5]))
    bound, mask = lower_bound(problem, "box"), solve(problem, "exhaustive").mask
    more = {"lower_bound": bound.value, "certificate": bound.certificate}
    verify(problem, Solution.of(problem, mask, **more), require="exact")
    (exactly,) = exact_bounds(problem, bound.certificate)
    assert float(exactly) == pytest.approx(float(problem.shares @ bound.value), rel=1e-9)
    assert float(exactly) <= float(problem.shares @ problem.objective(mask))
    # and what has none is refused by name
    with pytest.raises(VerificationError, match="weights are kept unchanged"):
        exact_bounds(eight().with_update(LeastSquaresUpdate(0.1)))
    wide = LayerProblem(torch.ones(1, 256), torch.eye(256), Unstructured(0.5))
    with pytest.raises(VerificationError, match="at most 200 inputs, not 256"):
        verify(wide, solve(wide, "wanda"), require="exact")


def test_semidefinite_is_decided_without_rounding():
    tiny = Fraction(1, 2**200)
    one = np.array([[Fraction(1)] * 3] * 3)
    assert semidefinite(one)
    for i in range(3):
        less, more = one.copy(), one.copy()
        less[i, i] -= tiny
        more[i, i] += tiny
        assert semidefinite(more)
        assert not semidefinite(less)
    assert semidefinite(rational(np.zeros((2, 2))))
    assert not semidefinite(rational(np.array([[0.0, 1.0], [1.0, 5.0]])))
    for seed in range(20):
        x = np.random.default_rng(seed).integers(-3, 4, (6, 4)).astype(float)
        assert semidefinite(rational(x @ x.T))
        assert not semidefinite(rational(x @ x.T - 2.0**-40 * np.eye(6)))


# --- on the command line
def test_solve_with_proof_and_verify(tmp_path):
    instance, out, again = (tmp_path / name for name in ("row.npz", "proof.npz", "again.npz"))
    layer(24, rows=2).save(instance)
    words = ("solve", "--prove", instance, "--jobs", 1, "--output")
    assert "2 of 2 rows proven optimal" in run(*words, out)
    text = run("verify", instance, out)
    assert "holds: 2 rows checked" in text
    assert "2 of 2 rows proven optimal; 2 trees" in text
    assert "leaves" in text
    assert "pass --overwrite" in run(*words, out, fails=OptionError)
    run(*words, again, "--start", out)
    assert torch.equal(Solution.load(again).mask, Solution.load(out).mask)
    # what is left open has a status of its own
    done = ended(*words, tmp_path / "open.npz", "--solver-options", "node_limit=3")
    assert done.returncode == 1
    assert "0 of 2 rows proven optimal" in done.stdout
    assert "holds: 2 rows checked" in run("verify", instance, tmp_path / "open.npz")
    run("solve", instance, "--output", tmp_path / "plain.npz", "--solver", "wanda")
    assert "trees" not in run("verify", instance, tmp_path / "plain.npz")
