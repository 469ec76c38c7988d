"""The relaxation of a node with triangles and pentagonal inequalities: convex, tighter, and worth what it
says; trees that use it."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
from strategies import KINDS, graph, random_gram, random_weight

from maskopt import NM, LayerProblem, Status, Unstructured, solve, verify
from maskopt.certificate import NO_INPUT, OF_Z0, Cuts, check_cuts, cut_form
from maskopt.solvers.convex.triangles import ABSENT, Pool, dense, separate
from maskopt.solvers.exact import tree, trials
from maskopt.solvers.exact.free_part import free_part
from maskopt.solvers.exact.pentagons import PLACES, pentagons
from maskopt.solvers.exact.relaxation import (
    Goal,
    Plan,
    Relaxed,
    _below,
    _Dual,
    relax_node,
    subtract_cuts,
)
from maskopt.solvers.exact.trials import Plans

CLIMB = Plan((20.0, 5.0, 1.0, 0.3, 0.1))
#: a root that proves hardly more than without triangles
ROUGH = Plans(Plan((10.0,), (1,)), Plan((1.0,), (1,)))


def patched(monkeypatch, near, **values):
    monkeypatch.setattr(tree, "_NEAR", near)
    for name, value in values.items():
        monkeypatch.setattr(trials, name, value)


def proven(problem, **options):
    """A solution whose proof was checked, and how many triangles the proof has."""
    solution = solve(problem, "branch", proof=True, workers=0, **options)
    assert solution.status == (Status.OPTIMAL,)
    assert verify(problem, solution, require="checked").checked
    return solution, solution.proof.rows[0].cuts.sum()


def sparse(n):
    return LayerProblem(random_weight(1, n, 1), random_gram(n, "full", 2), Unstructured(0.6))


def some_pool(n, count=40, seed=0, inputs=(3, 5)):
    """Inequalities of any inputs and z_0, with multipliers."""
    random = np.random.default_rng(seed)
    index = np.full((count, PLACES), ABSENT)
    for line in index:
        size = random.choice(inputs)
        line[:size] = np.sort(random.choice(n + 1, size, replace=False))
    sign = np.where(index[:, 1:] == ABSENT, 0, random.choice([-1, 1], (count, PLACES - 1)))
    return Pool(index, sign.astype(np.int8), random.random(count)).merged(n)


def worth(pool, z):
    """Σ τ ((Σ b_iz_i)² − 1)/2, z_0 last."""
    z = np.append(z, [1.0, 0.0])  # ABSENT is the last
    b = np.column_stack([np.ones(len(pool.tau)), pool.sign])
    return float(pool.tau @ ((b * z[pool.index]).sum(1) ** 2 - 1) / 2)


def cuts_of(pool, n):
    """As a certificate has them."""
    index = np.select([pool.index == n, pool.index == ABSENT], [OF_Z0, NO_INPUT], pool.index)
    return Cuts(torch.tensor(index), torch.tensor(pool.sign), torch.tensor(pool.tau))


def nothing(q):
    return Relaxed(np.diag(q).copy(), np.zeros((len(q), 8), np.float32), Pool.empty(PLACES))


def node(n=20, fixed=6, seed=1, pattern=None):
    problem = LayerProblem(
        random_weight(1, n, seed), random_gram(n, "full", 2), pattern or Unstructured(keep=n // 2)
    )
    q = problem.row(0).q().numpy()
    group = np.arange(n) // problem.group_size
    same = (group[:, None] == group).astype(float)
    state = np.full(n, -1, dtype=np.int8)
    state[:fixed] = np.arange(fixed) % 2
    return problem, q, same, state


def test_an_inequality_counts_in_p_as_a_certificate_has_it():
    n = 9
    pool = some_pool(n)
    base, c = np.zeros((n, n)), np.zeros(n)
    constant = subtract_cuts(base, c, pool)
    check_cuts(cuts_of(pool, n), n, 0)
    matrix, linear, kappa, size, _ = cut_form(cuts_of(pool, n), n, torch.zeros(1).double())
    terms = float(matrix.abs().sum() + linear.abs().sum()) + abs(kappa)
    assert terms <= 16 * size * n
    assert float(matrix.norm()) <= size
    for p in np.random.default_rng(5).integers(0, 2, (30, n)):
        value = p @ matrix.numpy() @ p + linear.numpy() @ p + kappa
        assert value == pytest.approx(worth(pool, 2 * p - 1))
    e, column = dense(pool, n)
    for z in np.random.default_rng(6).choice([-1, 1], (30, n)):
        known = worth(pool, z) - float(pool.tau @ pool.least)
        assert -2 * column @ z - z @ e @ z == pytest.approx(known)
    np.testing.assert_allclose(base, -matrix.numpy(), atol=1e-12)
    np.testing.assert_allclose(c, -linear.numpy(), atol=1e-12)
    assert constant == pytest.approx(kappa)


@pytest.mark.parametrize("inputs", [(3,), (5,), (3, 5)])
def test_inequalities_of_fixed_inputs_become_those_of_z0(inputs):
    n = 12
    pool, random = some_pool(n, 120, inputs=inputs), np.random.default_rng(2)
    state = np.full(n, -1, dtype=np.int8)
    state[[1, 4, 5, 9]] = (1, 0, 1, 0)
    below = _below(pool, state)
    free = np.flatnonzero(state < 0)
    assert 0 < len(below.tau) < len(pool.tau)
    check_cuts(cuts_of(below, len(free)), len(free), 0)
    padded = np.where(below.index == ABSENT, 99 + np.arange(PLACES), below.index)
    assert (np.diff(padded, axis=1) > 0).all()
    ends = []
    for _ in range(20):
        z = np.where(state == 1, 1.0, -1.0)
        z[free] = random.choice([-1.0, 1.0], len(free))
        ends.append(worth(pool, z) - worth(below, z[free]))
    # what is left out is worth no less than nothing; of triangles nothing but that is left out
    assert min(ends) >= -1e-9
    if inputs == (3,):
        assert max(ends) < float(pool.tau.sum())
    kept = Pool(pool.index, pool.sign, np.ones(len(pool.tau)))
    assert _below(kept, np.full(n, -1, dtype=np.int8)).tau.tolist() == kept.tau.tolist()


@pytest.mark.parametrize("pattern", [Unstructured(keep=10), NM(keep=2, of=4)], ids=str)
def test_a_form_is_convex_and_tighter_than_without_triangles(pattern):
    problem, q, same, state = node(pattern=pattern, fixed=4)
    n, free = len(q), np.flatnonzero(state < 0)
    mu, point = float(np.trace(q)) / n, np.full(n, 0.5)
    best = float(solve(problem, "branch").objective)
    found = {}
    for shares in (CLIMB.shares[:1], CLIMB.shares):
        part = free_part(q, mu, problem.pruned_per_group, same, state)
        plan, goal = Plan(shares, (40,)), Goal(0.0, best, best / 10)
        own = relax_node(part, nothing(q), point, plan, goal)
        e, _ = dense(own.pool, n) if len(own.pool.tau) else (np.zeros((n, n)), None)
        a = q + mu * same + np.diag(own.lam) + 4 * e
        assert np.linalg.eigvalsh(a[np.ix_(free, free)])[0] >= 0
        assert (own.lam[state >= 0] == 0).all()
        assert not np.isin(own.pool.index, np.flatnonzero(state >= 0)).any()
        found[len(shares)] = own
    assert len(found[1].pool.tau) == 0 < len(found[5].pool.tau)


def test_the_function_has_its_gradient_and_is_below_the_relaxation():
    random = np.random.default_rng(3)
    c = random.normal(size=(8, 8))
    c = c + c.T
    np.fill_diagonal(c, 0)
    pool = some_pool(7, 12)
    dual = _Dual(c, np.full(7, 6.0), pool)
    y, tau, alpha = dual.y + random.normal(size=8), pool.tau.copy(), 0.3
    assert set(pool.least) == {1, 2}
    value, slope = dual._value(y, tau, alpha)
    x = np.append(y, tau)
    for i in range(len(x)):
        step = np.zeros_like(x)
        step[i] = 1e-6
        up, down = (dual._value((x + s)[:8], (x + s)[8:], alpha)[0] for s in (step, -step))
        assert (up - down) / 2e-6 == pytest.approx(slope[i], rel=1e-4, abs=1e-5)
    # below every matrix of signs, all of which keep the inequalities
    for _ in range(50):
        z = random.choice([-1.0, 1.0], 8)
        assert value - alpha * 32 <= z @ c @ z + 1e-9


def test_a_singular_form_from_above_is_as_good_a_start_as_another():
    n, alpha = 20, 0.01
    random = np.random.default_rng(4)
    c = random.normal(size=(n + 1, n + 1))
    c = c + c.T
    np.fill_diagonal(c, 0)
    least = np.linalg.eigvalsh(c[:n, :n])[0]
    values = []
    for above in (1e-9, 1.0):  # the column of z_0 reaches what has no eigenvalue
        dual = _Dual(c, np.full(n, above - least), Pool.empty(PLACES))
        dual._homogenize(alpha)
        assert dual.x[n, n] == pytest.approx(1, abs=0.1)
        values.append(dual._ascend(alpha, 30))
    assert values[0] == pytest.approx(values[1], rel=1e-2)


@pytest.mark.slow
def test_trees_of_graphs_are_small_and_checked(monkeypatch):
    problem = graph(40, 0.75, keep=30, seed=4)
    tight, cuts = proven(problem)
    monkeypatch.setattr(tree.Tree, "_with_triangles", lambda self, plans, least_open: [])
    plain, none = proven(problem)
    assert float(tight.objective) == float(plain.objective)
    assert int(tight.trace.nodes[0]) * 5 < int(plain.trace.nodes[0])
    assert cuts > 0 == none


@pytest.fixture
def loose(monkeypatch):
    """Relaxations that are solved so roughly that even small graphs have several nodes open together."""
    rough = Plan((10.0, 1.0), (8,), pentagons=1)
    monkeypatch.setattr(trials, "CLOSE", Plans(rough, rough))


def test_nodes_open_together_make_the_same_tree_on_any_number_of_threads(loose):
    problem = graph(50, 0.75, keep=34, seed=2)
    proofs = []
    for threads in (1, 5):
        solution, _ = proven(problem, threads=threads)
        proofs.append((solution.trace.nodes, solution.proof.arrays()))
    assert int(proofs[0][0]) > 4  # some of them are open together
    for nodes, arrays in proofs[1:]:
        assert torch.equal(nodes, proofs[0][0])
        assert arrays.keys() == proofs[0][1].keys()
        assert all(np.array_equal(arrays[name], proofs[0][1][name]) for name in arrays)


def test_ctrl_c_among_nodes_open_together_leaves_them_open(monkeypatch, loose):
    problem = graph(50, 0.75, keep=34, seed=2)
    branch, calls = tree.Tree._branch, []

    def interrupted(self, node):
        calls.append(node)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return branch(self, node)

    best = solve(problem, "branch", workers=0)
    monkeypatch.setattr(tree.Tree, "_branch", interrupted)
    solution = solve(problem, "branch", workers=0, threads=1, proof=True)
    assert solution.trace.ended == ("userinterrupt",)
    assert float(solution.lower_bound) < float(best.objective)
    assert verify(problem, solution, require="checked").checked


def test_triangles_are_tried_where_a_row_is_hard(monkeypatch):
    """Not only of whole numbers; the tree begins from its root again, and its proof with it."""
    problem = sparse(48)
    plain = solve(problem, "branch")
    patched(monkeypatch, 1.0, _TRY=3)
    found, cuts = proven(problem)
    assert cuts > 0
    torch.testing.assert_close(found.objective, plain.objective)


@pytest.mark.slow
def test_triangles_are_tried_again_where_the_tree_becomes_too_large(monkeypatch):
    """Whatever the root then lacks, as long as it proves more than all that was branched."""
    kept = []
    for expected in (50_000, 12):
        patched(monkeypatch, 0.0, _TRY=3, _TRY_AGAIN=12, _TOO_MANY=expected)
        kept.append(proven(sparse(64)))
    (least, none), (best, some) = kept
    assert none == 0 < some
    assert float(best.objective) == pytest.approx(float(least.objective), rel=1e-9)


@pytest.mark.parametrize(
    ("near", "values"),
    [
        (1e300, {"_TRY": 12, "CLOSE": ROUGH}),
        (0.0, {"_TRY": 3, "_TRY_AGAIN": 12, "_TOO_MANY": 12, "FAR": ROUGH._replace(anyway=True)}),
    ],
    ids=["early", "again"],
)
def test_a_root_that_proves_less_than_its_tree_is_not_kept(monkeypatch, near, values):
    patched(monkeypatch, near, **values)
    assert proven(sparse(64))[1] == 0


@pytest.mark.parametrize(
    ("near", "values"),
    [(1e300, {"_TRY": 1}), (-1.0, {"_TRY": 1, "_TRY_AGAIN": 1, "_TOO_MANY": 10**9})],
    ids=["early", "again"],
)
@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 2, 3, 4, 5))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_trees_with_triangles_find_the_optimum_at_any_scale(monkeypatch, near, values, kind, seed):
    patched(monkeypatch, near, **values)
    random = np.random.default_rng(7)
    for number in range(seed + 1):
        size, spread = 10.0 ** random.integers(-9, 9), random.integers(-3 * (number % 2), 1, 12)
    for pattern in (Unstructured(keep=5), NM(keep=1, of=4)):
        weight = random_weight(2, 12, seed) * size * torch.tensor(10.0**spread)
        problem = LayerProblem(weight, random_gram(12, kind, seed), pattern)
        solution = solve(problem, "branch", workers=0, proof=True)
        exact = solve(problem, "exhaustive").objective
        slack = 1e-6 * exact + 1e-10 * problem.diagonal_mass()
        # of the others the check's own rounding, of large weights that are kept, can exceed 1e-6
        sizeable = exact > 1e-7 * problem.diagonal_mass()
        statuses = np.array(solution.status)[(sizeable | (exact == 0)).numpy()]
        assert set(statuses) <= {Status.OPTIMAL}
        assert bool((solution.gap < 1e-5).all())
        assert bool(((solution.objective - exact).abs() <= slack).all())
        verify(problem, solution, require="checked")


def test_numbers_without_eigenvalues_leave_the_form_from_above():
    n = 6
    huge = np.full((n, n), 1e200)
    start = nothing(np.diag(np.full(n, np.inf)))
    state, point = np.full(n, -1, dtype=np.int8), np.full(n, 0.5)
    with np.errstate(all="ignore"):
        part = free_part(huge, 1.0, 3, np.ones((n, n)), state)
        own = relax_node(part, start, point, CLIMB, Goal(0.0, 1.0, 0.1))
    assert own is start


def correlations(n, seed):
    """As a relaxation has them: of vectors of few dimensions."""
    v = np.random.default_rng(seed).normal(size=(n, 4))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    return v @ v.T


@pytest.mark.parametrize("seed", range(4))
def test_pentagonal_inequalities_that_are_violated_are_found(seed):
    n = 11
    z = correlations(n, seed)
    triangles, signs, _ = separate(z, 10_000)
    pool = Pool.empty(PLACES).join(triangles, signs, n)
    pool.tau[:] = 1.0
    index, sign = pentagons(z, pool, 50)
    b = np.column_stack([np.ones(len(index)), sign])

    def violations(index, b):
        inner = z[index[:, :, None], index[:, None, :]]
        return (1 - np.einsum("ti,tij,tj->t", b, inner, b)) / 2

    found = violations(index, b)
    assert len(found) > 1
    assert len(np.unique(np.column_stack([index, sign]), axis=0)) == len(found)
    assert (found > 0.05).all()
    assert (np.diff(found) <= 1e-12).all()
    assert (np.diff(index, axis=1) > 0).all()
    assert 0 <= index.min() < index.max() < n
    everything = [
        (i, (1.0, *s)) for i in combinations(range(n), 5) for s in product([-1.0, 1.0], repeat=4)
    ]
    most = violations(*(np.array(x) for x in zip(*everything, strict=True))).max()
    assert found[0] > 0.95 * most


def test_nothing_violated_or_too_few_inputs_make_no_pentagon():
    triangle = Pool(np.array([[0, 1, 2, -1, -1]]), np.array([[1, 1, 0, 0]], np.int8), np.ones(1))
    for z in (np.ones((9, 9)), np.eye(9), np.eye(4), -np.ones((4, 4)) / 3 + np.eye(4) * 4 / 3):
        assert len(pentagons(z, triangle, 10)[0]) == 0
    assert len(pentagons(correlations(9, 0), Pool.empty(PLACES), 10)[0]) == 0


def test_trees_with_pentagonal_inequalities_are_smaller(monkeypatch):
    problem = graph(60, 0.75, keep=40, seed=2)
    five, _ = proven(problem)
    without = (plan._replace(pentagons=0) for plan in trials.CLOSE[:2])
    monkeypatch.setattr(trials, "CLOSE", Plans(*without))
    three, _ = proven(problem)
    for solution, places in ((five, 5), (three, 3)):
        assert solution.proof.rows[0].cut_index.shape[1] == places
    assert float(five.objective) == float(three.objective)
    assert int(five.trace.nodes[0]) < int(three.trace.nodes[0])
