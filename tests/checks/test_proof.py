"""Proofs of optimality: complete, checked against all masks, and in exact arithmetic; forgeries."""

import functools
import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from certificates import layer as eight, proven, single, stating
from commands import ended, run, shows
from forging import edit, fails, rewrite
from hypothesis import given, strategies as st
from strategies import HALF, TWO_FOUR, WHOLE, drawn, graph, legal_masks, problems, random_gram, slow

import maskopt
from maskopt import NM, LayerProblem, Solution, Status, Unstructured, load_problem, solve, verify
from maskopt.certificates.cuts import NO_INPUT, Cuts
from maskopt.certificates.exact_check import exact_bounds, exact_cost, rational
from maskopt.certificates.proof import (
    AGAIN,
    KINDS,
    LEAF,
    NO_FORM,
    RowProof,
    TreeCheck,
    check_proof,
)
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.units import exactly_semidefinite, values_of
from maskopt.errors import OptionError, ProblemError, VerificationError
from maskopt.protocol.bounds import lower_bound
from maskopt.protocol.solution import relative_gap
from maskopt.solvers.bounds.sdp import cut_certificate

FOUR, STATES = Unstructured(keep=4), "lower bound: row 0 states"
LINEAR = pytest.mark.parametrize("linear", [None, 3], ids=["plain", "linear"])


def layer(n=16, pattern=HALF, kind="full", rows=1, linear=None, seed=1):
    return drawn(rows, n, kind, pattern, (seed, seed + 1), linear=linear)


def costs(problem):
    masks = legal_masks(problem)
    return masks, problem.take([0] * len(masks)).objective(masks)


def bound_of(problem, tree):
    return float(check_proof(problem, [tree]))


@given(problems(max_n=10, max_rows=2))
def test_what_branch_proves_is_checked_and_the_optimum(problem):
    solution, mass = proven(problem), problem.diagonal_mass()
    exact = solve(problem, "exhaustive").objective
    # far below the mass of Q the rounding of a tree's bounds, in proportion to the mass, leaves a gap
    gaps = relative_gap(solution.objective, solution.lower_bound)
    for status, cost, size, gap in zip(solution.status, exact, mass, gaps, strict=True):
        assert status is Status.OPTIMAL or (0 < cost < 1e-7 * size and gap * cost < 1e-13 * size)
    assert bool((check_proof(problem, solution.proof) <= exact + 1e-12 * mass).all())
    assert bool(((solution.objective - exact).abs() <= 1e-6 * exact + 1e-10 * mass).all())


@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=str)
@LINEAR
def test_trees_beyond_enumeration_are_checked(pattern, linear):
    problem = layer(32, pattern, rows=2, linear=linear)
    solution = proven(problem)
    assert (solution.status, solution.trusted) == ((Status.OPTIMAL,) * 2, ("", ""))
    assert verify(problem, solution).basis == ("checked",) * 2
    plain = solve(problem, "branch", workers=0)
    assert torch.equal(plain.mask, solution.mask)
    word = r"is trusted \(branch of maskopt"
    fails(VerificationError, word, verify, problem, plain, require="checked")


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
    constant = maskopt.LinearTerm(torch.full((2, 8), 0.1).double(), torch.full((2,), 50.0).double())
    for linear, proof in itertools.product((None, constant), (False, True)):
        problem = LayerProblem(plain.weight, plain.gram, plain.pattern, linear=linear)
        found = solve(problem, "branch", proof=proof)
        assert found.status == (Status.OPTIMAL,) * 2
        assert torch.equal(found.lower_bound, found.objective)
        assert verify(problem, found, require="checked").checked
        assert not proof or [len(tree.form) for tree in found.proof] == [1, 1]
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
        one, two = getattr(solution.proof[0], name), getattr(other.proof[0], name)
        assert one.dtype == two.dtype
        assert np.array_equal(one, two)
    assert verify(problem, loaded, require="checked").checked
    rewrite(path, arrays=lambda arrays: arrays.pop("proof.0.points"))
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
    return np.where(np.arange(n) == i, side, -1).astype(np.int8)


def tree_with(tree, form, branch, **more):
    steps = {"form": form, "branch": branch, "fixes": np.zeros(len(form)), **more}
    return replace(tree, **{k: np.asarray(v, dtype=KINDS[k]) for k, v in steps.items()})


@pytest.mark.parametrize("pattern", [Unstructured(keep=5), NM(keep=1, of=3)], ids=str)
@pytest.mark.parametrize("kind", ["full", "outliers", slow("low-rank")])
def test_any_form_at_any_point_is_below_all_masks(pattern, kind):
    """λ and μ of both signs, at the root and at a node: valid, and often worth something."""
    random = np.random.default_rng(4)
    positive = 0
    for trial in range(30):
        problem = layer(9, pattern, kind, linear=3 if trial % 2 else None, seed=trial)
        _, every = costs(problem)
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
    assert positive >= 3


def test_fixings_are_held_to_their_other_side():
    """With λ = −Q of a diagonal Q the form is linear: the bound is that of the best mask of both sides."""
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
    certificate = cut_certificate(problem, 8, 3, maskopt.Limits().begin())
    # a certificate may be checked at a point outside of the box
    point, (cuts,) = certificate.point.clamp(0, 1), certificate.cuts
    assert len(cuts.multiplier) > 10
    form = certificate.diagonal[0].numpy(), float(certificate.penalty[0, 0]), point[0].numpy()
    bound, plain = (bound_of(problem, single(*form, some)) for some in (cuts, None))
    exact = float(replace(certificate, point=point).check(problem))
    assert 1.001 * plain < bound == pytest.approx(exact, rel=1e-6)


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
    return float(solution.objective), solution.proof[0]


def parts_of(tree):
    return {name: getattr(tree, name).copy() for name in KINDS} | {"penalty": tree.penalty}


def steps(*branch, **more):
    more = {"points": [], "fixed": [], "side": [], **more}
    forms = [NO_FORM] * len(branch)
    return lambda parts: parts.update(vars(tree_with(RowProof(**parts), forms, branch, **more)))


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
    **{
        f"fixed again: {side}": (
            steps(AGAIN, LEAF, fixes=[1, 1], fixed=[0, 0], side=[side, 1 - side]), "not free, or to no side",
        ) for side in (0, 1)
    },
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
    message = f"the tree of row 0: .*({reason})"
    fails(VerificationError, message, bound_of, FORGED, RowProof(**parts))


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
        array = parts[name]
        if name == "penalty":
            parts[name] = random.choice([-array, 0, 0.5 * array, 2 * array, 1e9, -1e300])
            continue
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
    tree = single(np.ones(9), 0.0, np.full(9, 0.5), cuts)
    fails(VerificationError, "negative multiplier", bound_of, layer(9, FOUR), tree)
    # updated weights and rows of a shared budget have none
    refitted = problem.with_update(LeastSquaresUpdate(0.1))
    fails(OptionError, "updated weights is not kept", proven, refitted)
    message = "a count of their own and unchanged weights"
    for one in (refitted, problem.under(Unstructured(sparsity=0.5, per="layer"))):
        fails(VerificationError, message, check_proof, one, solution.proof)


# --- whole numbers
@pytest.mark.slow
@pytest.mark.parametrize("chance", [0.25, 0.75])
def test_graphs_are_proven_with_fewer_nodes_where_they_are_whole(chance):
    solution = proven(graph(20, chance, keep=13))
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
    problem = LayerProblem(weight[None], gram, Unstructured(keep=3)).with_units(WHOLE).row(0)
    values = problem.values()
    _, every = costs(problem.as_layer())
    for cost in every.tolist():
        assert (values.at_least(cost), values.at_least(cost - 1e-9)) == (cost, cost)
        below = values.at_least(cost - values.step - 1e-9)
        assert below == (cost - values.step if values.step else cost - 1e-9)
    if values.step:  # and no coarser ones hold them all
        apart = np.unique((every.numpy() - values.offset) / values.step)
        assert (apart.astype(int) == apart).all()
    assert float(proven(problem).objective) == float(every.min())


def test_values_of_a_graph_are_two_apart_and_what_is_not_whole_is_refused(tmp_path):
    values = graph().row(0).values()
    assert (values.step, values.at_least(values.offset - 3.5)) == (2, values.offset - 2)
    assert values_of(torch.full((4, 4), 3.0), 2).step == 6
    assert values_of(torch.eye(4) * 3, 2).at_least(1.5) == 6  # f is 6 throughout
    problem = graph(8)
    weight, gram, quarter = problem.weight, problem.gram, problem.gram.clone()
    quarter[0, 1] = quarter[1, 0] = 0.25
    for arguments, more, message in (
        ((0.5 * torch.ones(1, 8), gram), {}, r"integral: weight holds 0\.5"),
        ((weight, quarter), {}, r"integral: twice gram holds 0\.5"),
        ((1e9 * weight, gram), {}, "not whole in float64"),
        (
            (weight, gram),
            {"linear": drawn(1, 8, linear=1).linear, "assume_psd": True},
            "linear part",
        ),
        ((weight, gram), {"update": LeastSquaresUpdate()}, "no weights to update"),
    ):
        fails(ProblemError, message, LayerProblem(*arguments, HALF, **more).with_units, WHOLE)
    fails(ProblemError, "no weights to update", problem.with_update, LeastSquaresUpdate())
    problem.save(tmp_path / "graph.npz")
    read = load_problem(tmp_path / "graph.npz")
    assert all(p.integral for p in (read, problem.take([0]), problem.row(0)))
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
    return maskopt.Certificate(diagonal, penalty, honest.point, cuts=cuts)


def forged_tree(problem, honest, size, copies, part=0.99):
    """The same as a tree of one leaf, whose μ holds for all groups."""
    cuts = many_cuts(range(problem.n // 2), size, copies, part)
    return single(np.full(problem.n, -2 * size), 2 * size, honest.point[0].numpy(), cuts)


one_of_two = functools.partial(layer, pattern=NM(keep=1, of=2))


@functools.cache
def toy(n, seed):
    """A 1:2 row, its box certificate, its exact optimum and the worst of its masks."""
    problem = one_of_two(n, seed=seed)
    costs = {exact_cost(problem, mask, 0): mask for mask in legal_masks(problem)}
    assert max(costs) > 1.001 * float(min(costs)) > 0
    honest = lower_bound(problem, "box").certificate
    return problem, honest, min(costs), Solution.of(problem, costs[max(costs)])


def test_rounding_of_many_cuts_proves_nothing(tmp_path):
    problem, honest, optimum, _ = toy(8, 4)
    tree = forged_tree(problem, honest, 2.0**41, 40_000)
    assert Fraction(float(check_proof(problem, [tree]))) <= optimum
    problem, instance = one_of_two(32, seed=4), tmp_path / "row.npz"
    problem.save(instance)
    best = proven(problem)
    starts = (solve(problem, "random", seed=seed).mask for seed in range(12))
    found = (solve(problem, "swap", start=start) for start in starts)
    other = next(s for s in found if float(s.objective) > 1.01 * float(best.objective))
    honest = lower_bound(problem, "box").certificate
    forged = forged_certificate(problem, honest, [0], 2.0**37, 500_000)
    more = {"lower_bound": other.objective, "certificate": forged}
    claim = Solution.of(problem, other.mask, status=Status.OPTIMAL, **more)
    for require in ("claims", "exact"):
        fails(VerificationError, STATES, verify, problem, claim, require=require)
    assert bool((forged.check(problem) <= best.objective).all())
    best.save(tmp_path / "best.npz")
    said = run("verify", instance, tmp_path / "best.npz", "--exact")
    shows(said, "holds: 1 row checked", "checked in exact arithmetic in")
    # a bound above what the tree proves
    off = replace(best, status=(Status.FEASIBLE,), lower_bound=best.lower_bound * (1 + 1e-8))
    off.save(tmp_path / "off.npz")
    run("verify", instance, tmp_path / "off.npz", "--exact", fails=VerificationError)
    run("verify", tmp_path, "--exact", fails=OptionError)


@pytest.mark.parametrize("first", [0, *map(slow, (50, 100, 150, 200))])
def test_forged_certificates_and_trees_are_refused(first, monkeypatch):
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
            (replace(claim, proof=[tree]), exact_bounds(problem, trees=[tree])),
        ):
            fails(VerificationError, STATES, verify, problem, forged, require="checked")
            proof = forged.proof
            found = bad.check(problem) if proof is None else check_proof(problem, proof)
            assert Fraction(float(found)) <= judge[0] + optimum / 10**6, seed
            assert judge[0] <= optimum, seed


@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=str)
@pytest.mark.parametrize("linear", [None, 7], ids=["plain", "linear"])
def test_trees_and_certificates_of_searches_hold_exactly(pattern, linear):
    problem = layer(12, pattern, rows=2, linear=linear, seed=5)
    optimum = proven(problem)
    assert verify(problem, optimum, require="exact").checked
    claim = stating(problem, optimum.mask, lower_bound(problem, "sdp"))
    assert verify(problem, claim, require="exact").checked
    higher = replace(claim, lower_bound=1.001 * claim.lower_bound)
    for wrong in (higher, replace(optimum, proof=None, trusted=("SCIP 10.0.0",) * 2)):
        fails(VerificationError, None, verify, problem, wrong, require="exact")


def test_a_shared_budget_has_one_exact_bound():
    problem = layer(8, Unstructured(0.5, per="layer"), rows=3, seed=5)
    problem = problem.with_omega(torch.tensor([1.0, 2.0, 0.5]))
    bound, mask = lower_bound(problem, "box"), solve(problem, "exhaustive").mask
    verify(problem, stating(problem, mask, bound), require="exact")
    (exactly,) = exact_bounds(problem, bound.certificate)
    assert float(exactly) == pytest.approx(float(problem.shares @ bound.value), rel=1e-9)
    assert float(exactly) <= float(problem.shares @ problem.objective(mask))
    updated, message = eight().with_update(LeastSquaresUpdate(0.1)), "weights are kept unchanged"
    fails(VerificationError, message, exact_bounds, updated)
    wide = LayerProblem(torch.ones(1, 256), torch.eye(256), Unstructured(0.5))
    found, message = solve(wide, "wanda"), "at most 200 inputs, not 256"
    fails(VerificationError, message, verify, wide, found, require="exact")


def test_semidefinite_is_decided_without_rounding():
    tiny, one = Fraction(1, 2**200), np.array([[Fraction(1)] * 3] * 3)
    assert exactly_semidefinite(one)
    for i, by in itertools.product(range(3), (tiny, -tiny)):
        other = one.copy()
        other[i, i] += by
        assert exactly_semidefinite(other) == (by > 0)
    assert exactly_semidefinite(rational(np.zeros((2, 2))))
    assert not exactly_semidefinite(rational(np.array([[0.0, 1.0], [1.0, 5.0]])))
    for seed in range(20):
        x = np.random.default_rng(seed).integers(-3, 4, (6, 4)).astype(float)
        assert exactly_semidefinite(rational(x @ x.T))
        assert not exactly_semidefinite(rational(x @ x.T - 2.0**-40 * np.eye(6)))


def test_solve_with_proof_and_verify(tmp_path):
    instance, out, again = (tmp_path / name for name in ("row.npz", "proof.npz", "again.npz"))
    layer(24, rows=2).save(instance)
    words = ("solve", "--prove", instance, "--output")
    assert "2 of 2 rows proven optimal" in run(*words, out)
    text = run("verify", instance, out)
    shows(text, "holds: 2 rows checked", "2 of 2 rows proven optimal; 2 trees", "leaves")
    assert "pass --overwrite" in run(*words, out, fails=OptionError)
    run(*words, again, "--start", out)
    assert torch.equal(Solution.load(again).mask, Solution.load(out).mask)
    done = ended(*words, tmp_path / "open.npz", "--solver-options", "node_limit=3")
    assert (done.returncode, "0 of 2 rows proven optimal" in done.stdout) == (1, True)
    assert "holds: 2 rows checked" in run("verify", instance, tmp_path / "open.npz")
    run("solve", instance, "--output", tmp_path / "plain.npz", "--solver", "wanda")
    assert "trees" not in run("verify", instance, tmp_path / "plain.npz")
