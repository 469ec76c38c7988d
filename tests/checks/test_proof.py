"""Proofs of optimality: complete, checked against all masks, and not to be forged."""

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from commands import process, run
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import graph, problems, random_gram, random_linear, random_weight

from maskopt import (
    NM,
    LayerProblem,
    Refit,
    RowProblem,
    Solution,
    Status,
    Unstructured,
    solve,
    verify,
)
from maskopt.certificate import NO_INPUT, Cuts
from maskopt.errors import OptionError, ProblemError, VerificationError
from maskopt.files import read_arrays, write_arrays
from maskopt.limits import Limits
from maskopt.linear import Linear
from maskopt.proof import AGAIN, KINDS, LEAF, NO_FORM, Proof, RowProof
from maskopt.proof_check import check_proof
from maskopt.solvers.bounds.cuts import cut_certificate
from maskopt.values import values_of

HALF, TWO_FOUR = Unstructured(sparsity=0.5), NM(keep=2, of=4)


def layer(n=16, pattern=HALF, kind="full", rows=1, linear=False, seed=1):
    weight, gram = random_weight(rows, n, seed), random_gram(n, kind, seed + 1)
    part = random_linear(weight, gram, 3) if linear else None
    return LayerProblem(weight, gram, pattern, linear=part)


def costs(problem, row=0):
    """The objective of every legal mask of a row."""
    group, pruned = problem.group_size, problem.pruned_per_group
    choices = [list(itertools.combinations(range(first, first + group), pruned))
               for first in range(0, problem.n, group)]  # fmt: skip
    masks = []
    for parts in itertools.product(*choices):
        mask = torch.ones(problem.n, dtype=torch.bool)
        mask[[i for part in parts for i in part]] = False
        masks.append(mask)
    masks = torch.stack(masks)
    one = problem.take([row] * len(masks))
    return masks, one.objective(masks)


def proven(problem, **options):
    return solve(problem, "branch", proof=True, workers=0, **options)


def tree_of(solution, row=0) -> RowProof:
    return solution.proof.rows[row]


def single(lam, mu, point, cuts=None) -> RowProof:
    """A tree of one step."""
    number = 0 if cuts is None else len(cuts.multiplier)
    parts = {
        "forms": np.atleast_2d(lam),
        "cuts": [number],
        "cut_index": np.zeros((0, 3)) if cuts is None else cuts.index.numpy(),
        "cut_sign": np.zeros((0, 2)) if cuts is None else cuts.sign.numpy(),
        "multiplier": [] if cuts is None else cuts.multiplier.numpy(),
        "form": [0],
        "branch": [LEAF],
        "fixes": [0],
        "fixed": [],
        "side": [],
        "points": point,
    }
    return RowProof(penalty=mu, **{k: np.asarray(parts[k], dtype=KINDS[k]) for k in KINDS})


@given(problems(max_n=10, max_rows=2))
@settings(max_examples=40, deadline=None)
def test_what_branch_proves_is_checked_and_the_optimum(problem):
    solution = proven(problem)
    exact = solve(problem, "exhaustive").objective
    slack = 1e-6 * exact + 1e-10 * problem.diagonal_mass()
    assert set(solution.status) == {Status.OPTIMAL}
    assert bool(
        (check_proof(problem, solution.proof) <= exact + 1e-12 * problem.diagonal_mass()).all()
    )
    assert bool(((solution.objective - exact).abs() <= slack).all())
    assert verify(problem, solution, require="checked").checked


@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=str)
@pytest.mark.parametrize("linear", [False, True])
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


@pytest.mark.parametrize("options", [{"node_limit": 3}, {"node_limit": 40}, {"gap_limit": 0.1}])
def test_an_open_tree_proves_the_bound_of_its_leaves(options):
    problem = layer(48)
    best = float(solve(problem, "branch").objective)
    solution = proven(problem, **options)
    assert solution.status == (Status.FEASIBLE,)
    assert 0 < float(solution.lower_bound) < best
    assert float(check_proof(problem, solution.proof)) == float(solution.lower_bound)
    verify(problem, solution, require="checked")


@pytest.mark.parametrize("keep", [0, 16])
def test_rows_without_a_choice_have_a_tree_of_one_leaf(keep):
    problem = layer(16, Unstructured(keep=keep), rows=2)
    solution = proven(problem)
    assert [len(tree.form) for tree in solution.proof.rows] == [1, 1]
    assert verify(problem, solution, require="checked").checked
    free = layer(16, kind="low-rank", pattern=Unstructured(keep=15))
    dead = LayerProblem(torch.zeros(1, 16), free.gram, free.pattern)
    assert proven(dead).status == (Status.OPTIMAL,)


def test_a_tree_is_the_same_every_time_and_survives_a_file(tmp_path):
    problem = layer(40)
    solution, again = proven(problem), proven(problem)
    for name in KINDS:
        assert np.array_equal(getattr(tree_of(solution), name), getattr(tree_of(again), name))
    solution.save(tmp_path / "proof.npz")
    loaded = Solution.load(tmp_path / "proof.npz")
    for name in KINDS:
        one, two = getattr(tree_of(solution), name), getattr(tree_of(loaded), name)
        assert one.dtype == two.dtype
        assert np.array_equal(one, two)
    assert verify(problem, loaded, require="checked").checked


def test_an_answer_of_scip_becomes_a_checked_one():
    problem = layer(20)
    theirs = solve(problem, "scip", time_limit=60)
    assert verify(problem, replace(theirs)).basis != ("checked",)
    ours = proven(problem, start=theirs.mask)
    assert torch.equal(ours.mask, theirs.mask)
    assert verify(problem, ours, require="checked").checked


def test_refitted_weights_and_rows_that_trade_have_no_tree():
    problem = layer(8)
    tree = proven(problem).proof
    with pytest.raises(OptionError, match="refitted weights is not kept"):
        proven(problem.refitting(Refit(0.1)))
    pooled = problem.under(Unstructured(sparsity=0.5, per="layer"))
    for other in (problem.refitting(Refit(0.1)), pooled):
        with pytest.raises(VerificationError, match="proves nothing of refitted"):
            check_proof(other, tree)


# what a step proves, without any search


def exchangeable(problem):
    """Pairs i < j of inputs of a group that may be exchanged."""
    q = problem.row(0).q().numpy()
    for i, j in itertools.combinations(range(problem.n), 2):
        order = np.arange(problem.n)
        order[[i, j]] = j, i
        if i // problem.group_size == j // problem.group_size and ((q[order][:, order] == q).all()):
            yield i, j


def settled(problem, state):
    """The state with counts settled and the first of exchangeable inputs pruned; None: no mask is left."""
    state = np.array(state)
    for _ in range(problem.n + 1):
        for one in state.reshape(-1, problem.group_size):
            ones, free = (one == 1).sum(), (one < 0).sum()
            if ones > problem.pruned_per_group or ones + free < problem.pruned_per_group:
                return None
            if ones == problem.pruned_per_group:
                one[one < 0] = 0
            elif ones + free == problem.pruned_per_group:
                one[one < 0] = 1
        for i, j in exchangeable(problem):
            if (state[i], state[j]) == (0, 1):
                return None
            if state[j] == 1:
                state[i] = 1
            elif state[i] == 0:
                state[j] = 0
    return state


def every_mask_below(problem, state):
    """The `branch` of steps without forms that split a node down to single masks."""
    state = settled(problem, state)
    if state is None or (state >= 0).all():
        return [LEAF]
    first = int(np.flatnonzero(state < 0)[0])
    found = [first]
    for side in (1, 0):
        child = state.copy()
        child[first] = side
        found += every_mask_below(problem, child)
    return found


def tree_with(tree, form, branch, **more):
    """Other steps for a tree."""
    steps = {"form": form, "branch": branch, "fixes": np.zeros(len(form)), **more}
    return replace(tree, **{k: np.asarray(v, dtype=KINDS[k]) for k, v in steps.items()})


@pytest.mark.parametrize("pattern", [Unstructured(keep=5), NM(keep=1, of=3)], ids=str)
@pytest.mark.parametrize("kind", ["full", "low-rank", "outliers"])
def test_any_form_at_any_point_is_below_all_masks(pattern, kind):
    """λ and μ of both signs, at the root and at a node: valid, and often worth something."""
    random = np.random.default_rng(4)
    positive = 0
    for trial in range(30):
        problem = layer(9, pattern, kind, linear=trial % 2 == 1, seed=trial)
        masks, every = costs(problem)
        share = problem.pruned_per_group / problem.group_size
        unit, rounding = float(problem.row(0).q().trace()) / 9, 1e-12 * float(every.max())
        lam, mu = unit * random.normal(size=9) * trial / 30, unit * random.normal() / 9
        tree = single(lam, mu, np.full(9, share) if trial % 3 else random.random(9))
        bound = float(check_proof(problem, Proof([tree])))
        assert bound <= float(every.min()) + rounding
        positive += bound > 0
        # an input pruned: bounded; kept: all masks looked at
        i, state = int(random.integers(9)), np.full(9, -1)
        state[i] = 0
        rest = every_mask_below(problem, state)
        state[i] = 1
        node_state = settled(problem, state)
        free = 0 if node_state is None else (node_state < 0).sum()
        node = tree_with(tree, [NO_FORM, 0, *[NO_FORM] * len(rest)], [i, LEAF, *rest],
                         points=random.random(free))  # fmt: skip
        bound = float(check_proof(problem, Proof([node])))
        assert bound <= float(every.min()) + rounding
        kept = float(every[masks[:, i]].min())
        assert bound <= kept + rounding
    assert positive >= 3


def test_fixings_are_held_to_their_other_side():
    """All masks on the side that is fixed are looked at: what is left is the other side's bound. (With λ = −Q
    of a diagonal Q the form is linear, and every bound the truth.)"""
    problem = layer(7, Unstructured(keep=4), kind="diagonal")
    masks, every = costs(problem)
    lam = -problem.row(0).q().diagonal().numpy() * (1 - 1e-9)
    decisive = 0
    for i, side in itertools.product(range(7), (0, 1)):
        state = np.full(7, -1)
        state[i] = side
        rest = every_mask_below(problem, state)
        steps = [0, *[NO_FORM] * len(rest)], [AGAIN, *rest]
        fixing = {"fixes": [1, *[0] * len(rest)], "fixed": [i], "side": [side]}
        tree = tree_with(single(lam, 0.0, np.full(7, 0.5)), *steps, **fixing)
        bound = float(check_proof(problem, Proof([tree])))
        own, other = (float(every[masks[:, i] == (s == 0)].min()) for s in (side, 1 - side))
        assert bound == pytest.approx(min(own, other), rel=1e-6)
        decisive += other < 0.99 * own
    assert decisive == 7


@pytest.mark.parametrize("kind", ["full", "outliers"])
def test_cuts_of_a_form_are_counted_as_in_a_certificate(kind):
    problem = layer(24, Unstructured(keep=12), kind)
    certificate, _ = cut_certificate(problem, 8, 3, Limits().begin())
    cuts = certificate.cuts[0]
    assert len(cuts.multiplier) > 10
    lam, mu = certificate.diagonal[0].numpy(), float(certificate.penalty[0, 0])
    # a certificate may be checked at a point outside of the box
    point = certificate.point.clamp(0, 1)
    tree = single(lam, mu, point[0].numpy(), cuts)
    bound = float(check_proof(problem, Proof([tree])))
    known = float(replace(certificate, point=point).check(problem))
    assert bound == pytest.approx(known, rel=1e-6)
    assert bound > 1.001 * float(check_proof(problem, Proof([single(lam, mu, point[0].numpy())])))


@pytest.mark.parametrize("linear", [False, True])
def test_cuts_never_pass_the_best_mask(linear):
    random = np.random.default_rng(1)
    for trial in range(20):
        problem = layer(9, Unstructured(keep=4), linear=linear, seed=trial)
        best = float(costs(problem)[1].min())
        index = np.array([random.permutation(np.arange(-1, 9))[:5] for _ in range(12)])
        index[:: 1 + trial % 3, 3:] = NO_INPUT  # all of them triangles, a half, a third
        sign = random.choice([-1, 1], (12, 4)).astype(np.int8)
        tau = random.random(12) * best
        cuts = Cuts(torch.tensor(index), torch.tensor(sign), torch.tensor(tau))
        lam = np.full(9, 40 * best)
        tree = single(lam, best, random.random(9), cuts)
        assert float(check_proof(problem, Proof([tree]))) <= best * (1 + 1e-12)


# forgeries


FORGED = layer(14, rows=1, seed=3)


def forged(change, problem=FORGED):
    """A sound tree in which something is changed."""
    tree = tree_of(proven(problem))
    parts = {f.name: getattr(tree, f.name) for f in fields(tree)}
    parts = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in parts.items()}
    found = change(parts)
    return Proof([RowProof(**(parts if found is None else found))])


def _without(parts, names, place):
    for name in names:
        parts[name] = np.delete(parts[name], place)


def _set(name, place, value):
    def change(parts):
        parts[name][place] = value

    return change


def _drop_leaf(parts):
    _without(parts, ("form", "branch", "fixes"), np.flatnonzero(parts["branch"] == LEAF)[-1])


def _add_leaf(parts):
    for name, value in (("form", NO_FORM), ("branch", LEAF), ("fixes", 0)):
        parts[name] = np.append(parts[name], np.int32(value))


def _fix_twice(parts):
    step = np.flatnonzero(parts["fixes"])[0]
    parts["fixes"][step] += 1
    parts["fixed"] = np.insert(parts["fixed"], 0, parts["fixed"][0])
    parts["side"] = np.insert(parts["side"], 0, 1 - parts["side"][0])


REFUSED = {
    "a leaf is left out": (_drop_leaf, "left out|belong to no step"),
    "a leaf too many": (_add_leaf, "belongs to no node"),
    "an input that is fixed is branched on": (
        lambda p: vars(
            tree_with(
                RowProof(**p), [NO_FORM] * 5, [3, 3, *[LEAF] * 3], points=[], fixed=[], side=[]
            )
        ),
        "not free",
    ),
    "an input outside the row": (_set("branch", 0, 14), "not free"),
    "no such sign for what follows": (_set("branch", 0, -3), "not free"),
    "fixed to both sides": (_fix_twice, "not free, or to no side"),
    "fixed outside the row": (_set("fixed", 0, 99), "not free, or to no side"),
    "fixed to no side": (_set("side", 0, 2), "not free, or to no side"),
    "another form": (_set("form", 0, 10_000), "a form that is not there"),
    "NaN in λ": (_set("forms", (0, 0), np.nan), "NaN or infinite"),
    "NaN in a point": (_set("points", 0, np.nan), "not one of its step's"),
    "a point outside the box": (_set("points", 0, 1.5), "not one of its step's"),
    "points left over": (lambda p: p.update(points=np.append(p["points"], 0.5)), "no step"),
    "points missing": (lambda p: p.update(points=p["points"][:-1]), "not one of its step's"),
    "infinite μ": (lambda p: p.update(penalty=np.inf), "NaN or infinite"),
    "half the precision": (lambda p: p.update(points=p["points"].astype(np.float32)), "float64"),
    "fewer inputs": (lambda p: p.update(forms=p["forms"][:, 1:]), "fit"),
    "no step": (lambda p: p.update(form=p["form"][:0]), "fit"),
    "less than no fixing": (_set("fixes", 0, -1), "less than no entry|as many"),
    "cuts from nowhere": (_set("cuts", 0, 1), "as many cuts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_forged_tree_is_refused(name):
    change, reason = REFUSED[name]
    with pytest.raises(VerificationError, match=f"the tree of row 0: .*({reason})"):
        check_proof(FORGED, forged(change))


@pytest.mark.parametrize("name", KINDS)
def test_arrays_of_any_shape_are_refused_or_prove_nothing_false(name):
    """What a file may hold in the place of an array."""
    tree = tree_of(proven(graph(30, 0.5, keep=20)))
    good, kind = getattr(tree, name), KINDS[name]
    best = float(proven(graph(30, 0.5, keep=20)).objective)
    odd = [np.zeros(shape, kind) for shape in ((), (0,), (1,), (0, 0), (2, 2), (1, 30), (1, 1, 1))]
    odd += [good.astype(np.float16), good[..., :-1], np.concatenate([good, good])]
    for array in odd:
        try:
            bound = check_proof(graph(30, 0.5, keep=20), Proof([replace(tree, **{name: array})]))
        except VerificationError:
            continue
        assert float(bound) <= best


def test_a_file_that_lacks_an_array_is_no_proof(tmp_path):
    solution = proven(layer(12))
    solution.save(tmp_path / "proof.npz")
    header, arrays = read_arrays(tmp_path / "proof.npz", "solution")
    del arrays["proof.0.points"]
    header = {k: v for k, v in header.items() if k not in ("format", "kind")}
    write_arrays(tmp_path / "forged.npz", "solution", header, arrays)
    with pytest.raises(ProblemError, match="not a sound proof"):
        Solution.load(tmp_path / "forged.npz")


def test_bad_cuts_are_refused():
    problem = layer(9, Unstructured(keep=4))
    good = Cuts(torch.tensor([[0, 1, 2]]), torch.tensor([[1, 1]]), torch.tensor([0.1]).double())
    for bad, reason in (
        (replace(good, multiplier=-good.multiplier), "negative multiplier"),
        (replace(good, multiplier=good.multiplier * torch.nan), "negative multiplier"),
        (replace(good, index=torch.tensor([[0, 0, 2]])), "twice"),
        (replace(good, index=torch.tensor([[0, 1, 9]])), "outside"),
        (replace(good, sign=torch.tensor([[1, 2]])), "not ±1"),
    ):
        tree = single(np.ones(9), 0.0, np.full(9, 0.5), bad)
        with pytest.raises(VerificationError, match=reason):
            check_proof(problem, Proof([tree]))


def test_a_tree_for_another_row_proves_less_and_the_claim_is_refused():
    problem = layer(24, seed=1)
    solution = proven(problem)
    harder = layer(24, seed=6)
    other = replace(proven(harder), proof=solution.proof)
    assert float(check_proof(harder, solution.proof)) < 0.999 * float(other.objective)
    with pytest.raises(VerificationError, match="its proof proves"):
        verify(harder, other)
    with pytest.raises(VerificationError, match="1 trees for 2 rows"):
        check_proof(layer(24, rows=2), solution.proof)
    dearer = replace(solution, mask=~solution.mask)
    with pytest.raises(VerificationError):
        verify(problem, dearer)


@given(st.integers(0, 10**9))
@settings(max_examples=150, deadline=None)
def test_whatever_is_changed_nothing_false_is_proven(seed):
    """Random damage to every part: refused, or no more than the truth."""
    random = np.random.default_rng(seed)
    tree = _SOUND[seed % len(_SOUND)]
    problem, best, tree = tree
    parts = {name: getattr(tree, name).copy() for name in KINDS}
    penalty = tree.penalty
    for _ in range(random.integers(1, 4)):
        name = random.choice([k for k in KINDS if parts[k].size] + ["penalty"])
        if name == "penalty":
            penalty = random.choice([-penalty, 0, 0.5 * penalty, 2 * penalty, 1e9, -1e300])
            continue
        array = parts[name]
        at = tuple(random.integers(0, size) for size in array.shape)
        if array.dtype == np.float64:
            array[at] = random.choice(
                [0, 1, array[at] * 2, -array[at], 1e300, -1e12, random.random()]
            )
        else:
            array[at] = random.integers(-3, 15)
    try:
        bound = float(check_proof(problem, Proof([RowProof(penalty=penalty, **parts)])))
    except VerificationError:
        return
    assert bound <= best * (1 + 1e-12)


_SOUND = [
    (problem, float(solve(problem, "exhaustive").objective), tree_of(proven(problem)))
    for problem in (layer(12), layer(12, TWO_FOUR), layer(12, kind="outliers"), graph(12, keep=6))
]


# whole numbers


@pytest.mark.parametrize("chance", [0.25, 0.75])
def test_graphs_are_proven_with_fewer_nodes_where_they_are_whole(chance):
    problem = graph(30, chance, keep=20)
    solution = proven(problem)
    assert solution.status == (Status.OPTIMAL,)
    assert float(solution.lower_bound) == float(solution.objective)
    assert verify(problem, solution, require="checked").checked
    plain = proven(graph(30, chance, keep=20, integral=False))
    assert float(plain.objective) == float(solution.objective)
    assert int(solution.trace.nodes[0]) < int(plain.trace.nodes[0])


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
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
        apart = np.unique((every.numpy() - values.offset) / values.step).astype(int)
        assert (apart == np.unique((every.numpy() - values.offset) / values.step)).all()
    solution = proven(problem)
    assert float(solution.objective) == float(every.min())
    assert verify(problem, solution, require="checked").checked


def test_values_of_a_graph_are_two_apart():
    values = graph().row(0).values()
    assert values.step == 2
    assert values.at_least(values.offset - 3.5) == values.offset - 2
    assert values_of(torch.full((4, 4), 3.0), 2).step == 6
    assert values_of(torch.eye(4) * 3, 2).at_least(1.5) == 6  # f is 6 throughout


def test_what_is_not_whole_is_refused(tmp_path):
    problem = graph(8)
    gram = problem.gram.clone()
    with pytest.raises(ProblemError, match=r"integral: weight holds 0\.5"):
        RowProblem(torch.full((8,), 0.5), gram, HALF, integral=True)
    gram[0, 1] = gram[1, 0] = 0.25
    with pytest.raises(ProblemError, match=r"integral: twice gram holds 0\.5"):
        RowProblem(problem.weight[0], gram, HALF, integral=True)
    with pytest.raises(ProblemError, match="not whole in float64"):
        RowProblem(1e9 * problem.weight[0], problem.gram, HALF, integral=True)
    linear = random_linear(problem.weight, problem.gram, 1)
    with pytest.raises(ProblemError, match="linear part"):
        LayerProblem(problem.weight, problem.gram, HALF, linear=linear, integral=True)
    with pytest.raises(ProblemError, match="refitted"):
        LayerProblem(problem.weight, problem.gram, HALF, refit=Refit(), integral=True)
    with pytest.raises(ProblemError, match="refitted"):
        problem.refitting(Refit())
    problem.save(tmp_path / "graph.npz")
    assert LayerProblem.load(tmp_path / "graph.npz").integral
    assert problem.take([0]).integral
    assert problem.row(0).integral
    assert not layer().integral
    assert layer().row(0).values() is None


# on the command line


def test_prove_and_check(tmp_path):
    instance, out, again = (tmp_path / name for name in ("row.npz", "proof.npz", "again.npz"))
    layer(24, rows=2).save(instance)
    assert "2 of 2 rows proven optimal" in run("prove", instance, "--output", out)
    text = run("check", instance, out)
    assert "holds: 2 rows checked" in text
    assert "leaves" in text
    assert "pass --overwrite" in run("prove", instance, "--output", out, fails=OptionError)
    run("prove", instance, "--output", again, "--start", out)
    assert torch.equal(Solution.load(again).mask, Solution.load(out).mask)


def test_prove_says_what_is_left_open(tmp_path):
    instance, out, plain = (tmp_path / name for name in ("row.npz", "proof.npz", "plain.npz"))
    layer(64).save(instance)
    done = process("prove", str(instance), "--output", str(out), "-o", "node_limit=3")
    assert done.returncode == 1
    assert "0 of 1 rows proven optimal" in done.stdout
    assert "holds: 1 row checked" in run("check", instance, out)
    run("solve", instance, "--output", plain, "--solver", "wanda")
    assert "holds no proof" in run("check", instance, plain, fails=VerificationError)


@pytest.mark.parametrize("keep", [0, 8])
def test_a_row_with_one_legal_mask_is_proven_with_its_linear_part(keep):
    weight, gram = random_weight(2, 8, 3).double(), random_gram(8, "full", 4).double()
    linear = Linear(torch.full((2, 8), 0.1).double(), torch.full((2,), 50.0).double())
    problem = LayerProblem(weight, gram, Unstructured(keep=keep), linear=linear)
    for proof in (False, True):
        found = solve(problem, "branch", proof=proof)
        assert found.status == (Status.OPTIMAL,) * 2
        assert torch.equal(found.lower_bound, found.objective)
        assert verify(problem, found, require="checked")
