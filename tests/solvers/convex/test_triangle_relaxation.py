"""Triangle and pentagonal inequalities: separation, bounds and trees; and the quasi-Newton method."""

from functools import cache
from itertools import combinations, product

import numpy as np
import pytest
import torch
from certificates import claimed, proven
from commands import interrupt
from hypothesis import given, strategies as st
from scipy.optimize import minimize
from strategies import KINDS, TWO_FOUR, drawn, graph, random_gram, random_weight, slow

from maskopt import NM, LayerProblem, Limits, Status, Unstructured, lower_bound, solve
from maskopt.certificates.cuts import NO_INPUT, OF_Z0, Cuts, check_cuts, cut_form
from maskopt.core.files import pack
from maskopt.protocol.solution import relative_gap
from maskopt.solvers.bounds.sdp import cut_certificate
from maskopt.solvers.convex.triangles import PLACES, Incidence, Pool, dense, separate
from maskopt.solvers.exact.tasks import RowTask
from maskopt.solvers.exact.tree import quadratic, relaxation
from maskopt.solvers.exact.tree.node import Form, FreePart, with_penalty
from maskopt.solvers.exact.tree.quadratic import QuadraticTree, TreePlan
from maskopt.solvers.exact.tree.relaxation import QuasiNewton, Relaxed, Schedule, relax_node

SPARSE = Unstructured(sparsity=0.6)
CLIMB = Schedule((20.0, 5.0, 1.0, 0.3, 0.1))
#: a root that proves hardly more than without triangles
ROUGH = TreePlan(Schedule((10.0,), (1,)), Schedule((1.0,), (1,)))
EMPTY = Pool.empty(PLACES)
SIGNS = (-1.0, 1.0)
AGAIN = {"_TRY": 3, "_TRY_AGAIN": 12, "_TOO_MANY": 12}


def correlations(n, rank, seed):
    v = np.random.default_rng(seed).normal(size=(n, rank))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    return v @ v.T


def above(inner, floor):
    """By how much every triangle inequality is violated that is by more than the floor."""
    found = {}
    for i, j, k in combinations(range(len(inner)), 3):
        for a, b in product((-1, 1), repeat=2):
            value = a * inner[i, j] + b * inner[i, k] + a * b * inner[j, k]
            if -1 - value > floor:
                found[(i, j, k, a, b)] = -1 - value
    return found


def named(index, sign, n):
    """With z_0, as the last of n + 1."""
    return [(*i, *s) for i, s in zip((index % (n + 1)).tolist(), sign.tolist(), strict=True)]


@pytest.mark.parametrize("rank", [2, 3, 8])
def test_separation_is_brute_force_and_a_pool_has_a_triangle_once(rank):
    inner = correlations(14, rank, rank).astype(np.float32).astype(np.float64)
    expected = above(inner, 0.02)
    index, sign, violation = separate(inner, 10**6)
    found = named(index, sign, 13)
    assert len(found) == len(set(found))
    # float32 may differ on what sits on the floor itself
    edge = {key for key, size in expected.items() if size < 0.02 + 1e-5}
    assert set(expected) - edge <= set(found) <= set(above(inner, 0.02 - 1e-5))
    np.testing.assert_allclose(violation, [expected.get(f, 0.02) for f in found], atol=2e-5)
    assert len(separate(inner, 0)[0]) == 0
    third = len(found) // 3
    assert separate(inner, third)[0].tolist() == index[:third].tolist()
    pool = Pool.empty().join(index[:third], sign[:third], 13)
    pool.tau[:] = 1
    both = pool.join(index, sign, 13)
    assert named(both.index, both.sign, 13) == found
    assert both.tau.tolist() == [1.0] * third + [0.0] * (len(found) - third)


def test_among_many_vectors_about_the_most_violated_are_found():
    """Their number is estimated from a sample: a few less may be found, and never others."""
    n, most = 420, 3000
    inner = correlations(n, 24, 3).astype(np.float32)
    index, sign, violation = separate(inner, most)
    assert most / 2 < len(index) <= most
    assert len(set(named(index, sign, n - 1))) == len(index)
    (i, j, k), (a, b) = (index % n).T, sign.astype(float).T
    assert bool(((i >= 0) & (i < j) & (j < k) & (k < n)).all())
    value = a * inner[i, j] + b * inner[i, k] + a * b * inner[j, k]
    np.testing.assert_allclose(-1 - value, violation, atol=1e-5)
    assert bool((np.diff(violation) <= 0).all())
    more = 0
    for first in range(n - 2):
        x, y = inner[first, first + 1 :], inner[first + 1 :, first + 1 :]
        least = np.full(y.shape, np.inf)
        for p, q in product((-1, 1), repeat=2):
            least = np.minimum(least, p * x[:, None] + q * x[None, :] + p * q * y)
        more += int((np.triu(-1 - least, 1) > violation[-1] + 1e-5).sum())
    assert more <= len(index)


@given(st.integers(0, 10**6), st.integers(3, 12), st.integers(0, 40))
def test_the_pairs_of_triangles_and_their_sparse_matrix(seed, n, most):
    """Against sets: every pair once and in order, and both its entries, but none of v_0's row."""
    random = np.random.default_rng(seed)
    every = np.array(list(combinations(range(n + 1), 3)))
    index = every[random.permutation(len(every))[:most]]
    found = Incidence.of(index, n)
    distinct = sorted({pair for one in index.tolist() for pair in combinations(one, 2)})
    assert found.pairs.tolist() == [list(pair) for pair in distinct]
    for one, member in zip(index.tolist(), found.member, strict=True):
        assert found.pairs[member].tolist() == [list(pair) for pair in combinations(one, 2)]
    both = sorted({(i, j) for i, j in distinct} | {(j, i) for i, j in distinct if j < n})
    owner = np.repeat(np.arange(n), np.diff(found.starts))
    assert list(zip(owner.tolist(), found.partners.tolist(), strict=True)) == both
    for (i, j), (at, across) in zip(distinct, found.entries.tolist(), strict=True):
        assert both[at] == (i, j)
        assert across == -1 if j == n else both[across] == (j, i)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [SPARSE, TWO_FOUR])
def test_cuts_close_a_good_part_of_the_gap(pattern):
    problem = drawn(8, 20, "low-rank", pattern, (3, 4))
    exact = solve(problem, "exhaustive").objective
    plain, bound = (lower_bound(problem, "sdp", cuts=cuts) for cuts in (0, 8))
    before, after = float(plain.gap(exact).mean()), float(bound.gap(exact).mean())
    assert before > 0.01
    assert after < 0.5 * before
    assert max(bound.trace.cuts.tolist()) > 20


def test_cuts_of_rows_do_not_depend_on_each_other_repeat_and_may_end_early():
    problem = drawn(3, 24, pattern=SPARSE)
    together, again, alone = (
        lower_bound(part, "sdp", rank=16, cuts=3).certificate
        for part in (problem, problem, problem.take([1]))
    )
    assert torch.equal(together.diagonal, again.diagonal)
    for other in (again.cuts[1], alone.cuts[0]):
        assert torch.equal(together.cuts[1].index, other.index)
    torch.testing.assert_close(together.cuts[1].multiplier, alone.cuts[0].multiplier)
    torch.testing.assert_close(together.diagonal[1], alone.diagonal[0])
    problem = drawn(2, 48, pattern=SPARSE)
    found = solve(problem, "swap")
    claimed(problem, found, lower_bound(problem, "sdp", cuts=50, time_limit=1e-3))
    early = cut_certificate(problem.take([0]), 16, 50, Limits(seconds=0).begin())
    assert bool((early.check(problem.take([0])) <= found.objective[:1]).all())


def some_pool(n, count=40, seed=0, inputs=(3, 5)):
    """Inequalities of any inputs and z_0, with multipliers."""
    random = np.random.default_rng(seed)
    index = np.full((count, PLACES), NO_INPUT)
    for line in index:
        size = random.choice(inputs)
        line[:size] = np.sort(random.choice(n + 1, size, replace=False))
    index[index == n] = OF_Z0
    sign = np.where(index[:, 1:] == NO_INPUT, 0, random.choice([-1, 1], (count, PLACES - 1)))
    return Pool(index, sign.astype(np.int8), random.random(count)).merged(n)


def worth(pool, z):
    """Σ τ ((Σ b_iz_i)² − 1)/2."""
    z = np.append(z, [0.0, 1.0])  # NO_INPUT, OF_Z0
    b = np.column_stack([np.ones(len(pool.tau)), pool.sign])
    return float(pool.tau @ ((b * z[pool.index]).sum(1) ** 2 - 1) / 2)


def cuts_of(pool):
    return Cuts(torch.tensor(pool.index), torch.tensor(pool.sign), torch.tensor(pool.tau))


def nothing(q):
    return Relaxed(np.diag(q).copy(), np.zeros((len(q), 8), np.float32), EMPTY)


def hollow(n, random):
    c = random.normal(size=(n, n))
    c = c + c.T
    np.fill_diagonal(c, 0)
    return c


def test_an_inequality_counts_in_p_as_a_certificate_has_it():
    n = 9
    pool = some_pool(n)
    nothing = Form(np.zeros((n, n)), np.zeros(n), 0.0)
    subtracted = relaxation.subtract_cuts(nothing, pool)
    check_cuts(cuts_of(pool), n, 0)
    matrix, linear, kappa, size, _ = cut_form(cuts_of(pool), n, torch.zeros(1).double())
    assert float(matrix.abs().sum() + linear.abs().sum()) + abs(kappa) <= 16 * size * n
    assert float(matrix.norm()) <= size
    e, column = dense(pool, n)
    for p in np.random.default_rng(5).integers(0, 2, (30, n)):
        z = 2 * p - 1
        value = p @ matrix.numpy() @ p + linear.numpy() @ p + kappa
        assert value == pytest.approx(worth(pool, z))
        known = worth(pool, z) - float(pool.tau @ pool.least)
        assert -2 * column @ z - z @ e @ z == pytest.approx(known)
    np.testing.assert_allclose(subtracted.matrix, -matrix.numpy(), atol=1e-12)
    np.testing.assert_allclose(subtracted.linear, -linear.numpy(), atol=1e-12)
    assert subtracted.constant == pytest.approx(-kappa)


@pytest.mark.parametrize("inputs", [(3,), (5,), (3, 5)])
def test_inequalities_of_fixed_inputs_become_those_of_z0(inputs):
    n = 12
    pool, random = some_pool(n, 120, inputs=inputs), np.random.default_rng(2)
    state = np.full(n, -1, dtype=np.int8)
    state[[1, 4, 5, 9]] = (1, 0, 1, 0)
    below = relaxation._below(pool, state)
    free = np.flatnonzero(state < 0)
    assert 0 < len(below.tau) < len(pool.tau)
    check_cuts(cuts_of(below), len(free), 0)
    last = 98 * (below.index == OF_Z0) + (100 + np.arange(PLACES)) * (below.index == NO_INPUT)
    padded = below.index + last
    assert (np.diff(padded, axis=1) > 0).all()
    ends = []
    for _ in range(20):
        z = np.where(state == 1, 1.0, -1.0)
        z[free] = random.choice(SIGNS, len(free))
        ends.append(worth(pool, z) - worth(below, z[free]))
    # what is left out is worth no less than nothing; of triangles nothing but that is left out
    assert min(ends) >= -1e-9
    if inputs == (3,):
        assert max(ends) < float(pool.tau.sum())
    kept = Pool(pool.index, pool.sign, np.ones(len(pool.tau)))
    assert relaxation._below(kept, np.full(n, -1, dtype=np.int8)).tau.tolist() == kept.tau.tolist()


@pytest.mark.parametrize("pattern", [Unstructured(keep=10), TWO_FOUR], ids=str)
def test_a_form_is_convex_and_tighter_than_without_triangles(pattern):
    n, problem = 20, drawn(1, 20, pattern=pattern)
    q, group = problem.row(0).q().numpy(), np.arange(n) // problem.group_size
    same = (group[:, None] == group).astype(float)
    state = np.append(np.arange(4, dtype=np.int8) % 2, np.full(n - 4, -1, dtype=np.int8))
    free, mu, point = np.flatnonzero(state < 0), float(np.trace(q)) / n, np.full(n, 0.5)
    best = float(solve(problem, "branch").objective)
    found = {}
    task = RowTask(q, problem.group_size, problem.pruned_per_group, np.zeros(n, bool))
    for shares in (CLIMB.shares[:1], CLIMB.shares):
        part = FreePart.of(with_penalty(q, mu, task), state)
        own = relax_node(part, nothing(q), point, Schedule(shares, (40,)), best, best)
        e, _ = dense(own.pool, n) if len(own.pool.tau) else (np.zeros((n, n)), None)
        a = q + mu * same + np.diag(own.lam) + 4 * e
        assert np.linalg.eigvalsh(a[np.ix_(free, free)])[0] >= 0
        assert (own.lam[state >= 0] == 0).all()
        assert not np.isin(own.pool.index, np.flatnonzero(state >= 0)).any()
        found[len(shares)] = own
    assert len(found[1].pool.tau) == 0 < len(found[5].pool.tau)
    # numbers without eigenvalues leave the form from above
    start = nothing(np.diag(np.full(n, np.inf)))
    with np.errstate(all="ignore"):
        part = FreePart.of(Form(np.full((n, n), 1e200), np.zeros(n), 0.0), state)
        assert relax_node(part, start, point, CLIMB, 1.0, 1.0) is start


def test_the_function_has_its_gradient_and_is_below_the_relaxation():
    random = np.random.default_rng(3)
    c, pool = hollow(8, random), some_pool(7, 12)
    dual = relaxation._Dual(c, np.full(7, 6.0), pool)
    y, tau, alpha = dual.y + random.normal(size=8), pool.tau.copy(), 0.3
    assert set(pool.least) == {1, 2}
    value, slope = dual._value(y, tau, alpha)
    x = np.append(y, tau)
    for i, step in enumerate(1e-6 * np.eye(len(x))):
        up, down = (dual._value((x + s)[:8], (x + s)[8:], alpha)[0] for s in (step, -step))
        assert (up - down) / 2e-6 == pytest.approx(slope[i], rel=1e-4, abs=1e-5)
    # below every matrix of signs, all of which keep the inequalities
    for z in random.choice(SIGNS, (50, 8)):
        assert value - alpha * 32 <= z @ c @ z + 1e-9
    # a singular form from above is as good a start as another
    n, alpha = 20, 0.01
    c = hollow(n + 1, np.random.default_rng(4))
    least = np.linalg.eigvalsh(c[:n, :n])[0]
    values = []
    for more in (1e-9, 1.0):  # the column of z_0 reaches what has no eigenvalue
        dual = relaxation._Dual(c, np.full(n, more - least), EMPTY)
        dual._homogenize(alpha)
        assert dual.x[n, n] == pytest.approx(1, abs=0.1)
        values.append(dual._ascend(alpha, 30))
    assert values[0] == pytest.approx(values[1], rel=1e-2)


@pytest.mark.parametrize("seed", range(4))
def test_pentagonal_inequalities_that_are_violated_are_found(seed):
    n = 11
    z = correlations(n, 4, seed)
    triangles, signs, _ = separate(z, 10_000)
    pool = EMPTY.join(triangles, signs, n)
    pool.tau[:] = 1.0
    index, sign = relaxation.pentagons(z, pool, 50)

    def violations(index, b):
        return (1 - np.einsum("ti,tij,tj->t", b, z[index[:, :, None], index[:, None, :]], b)) / 2

    found = violations(index, np.column_stack([np.ones(len(index)), sign]))
    assert len(np.unique(np.column_stack([index, sign]), axis=0)) == len(found) > 1
    assert (found > 0.05).all()
    assert (np.diff(found) <= 1e-12).all()
    assert (np.diff(index % n, axis=1) > 0).all()
    assert OF_Z0 <= index.min() < index.max() < n - 1
    every = [(i, (1.0, *s)) for i in combinations(range(n), 5) for s in product(SIGNS, repeat=4)]
    assert found[0] > 0.95 * violations(*(np.array(x) for x in zip(*every, strict=True))).max()
    # nothing that is violated, or too few inputs, make no pentagon
    three = np.array([[0, 1, 2, NO_INPUT, NO_INPUT]])
    triangle = Pool(three, np.array([[1, 1, 0, 0]], np.int8), np.ones(1))
    for z in (np.ones((9, 9)), np.eye(9), np.eye(4), -np.ones((4, 4)) / 3 + np.eye(4) * 4 / 3):
        assert len(relaxation.pentagons(z, triangle, 10)[0]) == 0
    assert len(relaxation.pentagons(correlations(9, 4, 0), EMPTY, 10)[0]) == 0


def patched(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setattr(quadratic, name, value)


def optimal(problem, **options):
    """A solution whose proof was checked, and how many triangles the proof has."""
    solution = proven(problem, **options)
    assert solution.status == (Status.OPTIMAL,)
    return solution, solution.proof[0].cuts.sum()


@pytest.mark.slow
def test_trees_of_graphs_are_small_and_smaller_with_pentagonal_inequalities(monkeypatch):
    problem = graph(60, 0.75, keep=40, seed=2)
    five, _ = optimal(problem)
    small = graph(28, 0.75, keep=21, seed=0)
    tight, cuts = optimal(small)
    without = (plan._replace(pentagons=0) for plan in quadratic.CLOSE[:2])
    monkeypatch.setattr(quadratic, "CLOSE", TreePlan(*without))
    three, _ = optimal(problem)
    for solution, places in ((five, 5), (three, 3)):
        assert solution.proof[0].cut_index.shape[1] == places
    assert float(five.objective) == float(three.objective)
    assert int(five.trace.nodes[0]) < int(three.trace.nodes[0])
    monkeypatch.setattr(QuadraticTree, "_due", lambda self, nodes, least_open: None)
    plain, none = optimal(small)
    assert float(tight.objective) == float(plain.objective)
    assert int(tight.trace.nodes[0]) * 5 < int(plain.trace.nodes[0])
    assert cuts > 0 == none


@pytest.mark.slow
def test_nodes_open_together_make_one_tree_on_any_threads_and_outlive_ctrl_c(monkeypatch):
    """Solved so roughly that even small graphs have several nodes open together."""
    rough = Schedule((10.0, 1.0), (8,), pentagons=1)
    monkeypatch.setattr(quadratic, "CLOSE", TreePlan(rough, rough))
    problem = graph(50, 0.75, keep=34, seed=2)
    best, other = (optimal(problem, threads=threads)[0] for threads in (1, 5))
    assert int(best.trace.nodes) > 4  # some of them are open together
    assert torch.equal(other.trace.nodes, best.trace.nodes)
    np.testing.assert_equal(*(pack(solution.proof)[1] for solution in (best, other)))
    interrupt(monkeypatch, QuadraticTree, "branch", 2)
    solution = proven(problem, threads=1)
    assert solution.trace.ended == ("userinterrupt",)
    assert float(solution.lower_bound) < float(best.objective)


@cache
def optimum(n):
    return solve(drawn(1, n, pattern=SPARSE), "branch").objective


@pytest.mark.parametrize(
    ("n", "near", "values", "kept"),
    [
        (48, 1.0, {"_TRY": 3}, True),
        # whatever the root then lacks, as long as it proves more than all that was branched
        slow(64, 0.0, AGAIN, True),
        slow(64, 0.0, AGAIN | {"_TOO_MANY": 50_000}, False),
        # a root that proves less than its tree
        (64, 1e300, {"_TRY": 12, "CLOSE": ROUGH}, False),
        (64, 0.0, AGAIN | {"FAR": ROUGH._replace(anyway=True)}, False),
    ],
)
def test_triangles_are_tried_where_a_row_is_hard(monkeypatch, n, near, values, kept):
    """Not only of whole numbers; the tree begins from its root again, and its proof with it."""
    objective = optimum(n)
    patched(monkeypatch, _NEAR=near, **values)
    found, cuts = optimal(drawn(1, n, pattern=SPARSE))
    assert (cuts > 0) == kept
    torch.testing.assert_close(found.objective, objective, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("near", "values"), [
    (1e300, {"_TRY": 1}), (-1.0, {"_TRY": 1, "_TRY_AGAIN": 1, "_TOO_MANY": 10**9}),
], ids=["early", "again"])  # fmt: skip
@pytest.mark.parametrize("seed", [1, *map(slow, (0, 2, 3, 4, 5))])
@pytest.mark.parametrize("kind", [KINDS[0], *map(slow, KINDS[1:])])
def test_trees_with_triangles_find_the_optimum_at_any_scale(monkeypatch, near, values, kind, seed):
    patched(monkeypatch, _NEAR=near, **values)
    random = np.random.default_rng(7)
    for number in range(seed + 1):
        size, spread = 10.0 ** random.integers(-9, 9), random.integers(-3 * (number % 2), 1, 12)
    patterns = Unstructured(keep=5), NM(keep=1, of=4)
    for pattern in patterns if seed == 1 else patterns[(seed + KINDS.index(kind)) % 2 :][:1]:
        weight = random_weight(2, 12, seed) * size * torch.tensor(10.0**spread)
        problem = LayerProblem(weight, random_gram(12, kind, seed), pattern)
        solution, exact = proven(problem), solve(problem, "exhaustive").objective
        slack = 1e-6 * exact + 1e-10 * problem.diagonal_mass()
        # of the others the check's own rounding, of large weights that are kept, can exceed 1e-6
        sizeable = exact > 1e-7 * problem.diagonal_mass()
        assert set(np.array(solution.status)[(sizeable | (exact == 0)).numpy()]) <= {Status.OPTIMAL}
        assert bool((relative_gap(solution.objective, solution.lower_bound) < 1e-5).all())
        assert bool(((solution.objective - exact).abs() <= slack).all())


def parabola(n, seed=0, rank=None):
    """½xᵀAx − bᵀx."""
    random = np.random.default_rng(seed)
    root = random.normal(size=(rank or 2 * n, n))
    a, b = root.T @ root / len(root), random.normal(size=n)
    if rank:
        b = a @ b
    return lambda x: (float(x @ a @ x / 2 - b @ x), a @ x - b)


def least(function, n, free):
    options = {"maxiter": 10_000, "maxfun": 10**6, "ftol": 1e-15, "gtol": 1e-10}
    how = {"method": "L-BFGS-B", "bounds": [(None, None)] * free + [(0, None)] * (n - free)}
    return minimize(function, np.ones(n), jac=True, options=options, **how).fun


@pytest.mark.parametrize("n", [1, 2, 40])
@pytest.mark.parametrize("free", [0, 0.5, 1])
@pytest.mark.parametrize("rank", [None, 15])
def test_the_least_value_is_reached(n, free, rank):
    free = round(free * n)
    function = parabola(n, n, rank and min(rank, n))
    x, value = QuasiNewton(free, 25).descend(function, np.ones(n), 2000)
    assert (x[free:] >= 0).all()
    assert value == function(x)[0] == pytest.approx(least(function, n, free), rel=1e-4, abs=1e-6)


def test_every_step_is_legal_and_lowers_the_value():
    n, free = 30, 10
    function, newton, x = parabola(n, 3), QuasiNewton(free, 8), np.ones(n)
    values = [function(x)[0]]
    for _ in range(12):
        x, value = newton.descend(function, x, 1)
        assert (x[free:] >= 0).all()
        values.append(value)
    assert (np.diff(values) <= 0).all()
    assert len(newton.moves) == 8
    again, value = QuasiNewton(free, 8).descend(function, np.ones(n), 12)
    assert again == pytest.approx(x, rel=1e-12)
    assert value == values[-1]
    for slope in (0.0, np.nan):  # where nothing is gained it stays
        x, value = QuasiNewton(0, 5).descend(lambda x, s=slope: (1.0, x * s), np.ones(3), 10)
        assert (x.tolist(), value) == ([1, 1, 1], 1)
    x, value = QuasiNewton(1, 5).descend(lambda x: (float(500 * x @ x), 1000 * x), np.ones(1), 50)
    assert abs(x[0]) < 1e-3 > value


def test_what_is_known_outlives_variables_that_come_and_go():
    n, free = 60, 20
    function, newton = parabola(n, 4), QuasiNewton(free, 25)

    def part(chosen):
        def of(y):
            x = np.zeros(n)
            x[chosen] = y
            value, slope = function(x)
            return value, slope[chosen]

        return of

    x, _ = newton.descend(part(np.arange(50)), np.ones(50), 30)
    stay = np.arange(50) % 7 != 6
    newton.keep(stay)
    rest = part(np.flatnonzero(np.append(stay, np.ones(10, bool))))
    x, value = newton.descend(rest, np.append(x[stay], np.zeros(10)), 300)
    assert len(newton.moves) == 25
    assert {len(part) for move in newton.moves for part in move} == {len(x)}
    assert value == pytest.approx(least(rest, len(x), free), rel=1e-5)
