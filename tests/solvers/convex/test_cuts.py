"""Triangle cuts: what separation finds, and that the tightened bound is a bound."""

import itertools

import numpy as np
import pytest
import torch
from certificates import claimed
from hypothesis import given
from hypothesis import strategies as st
from strategies import problems, random_gram, random_weight

from maskopt import NM, LayerProblem, Solution, Unstructured, lower_bound, solve
from maskopt.limits import Limits
from maskopt.solvers.bounds.cuts import cut_certificate
from maskopt.solvers.convex.triangles import Incidence, Pool, separate

SPARSE = Unstructured(sparsity=0.6)


def layer(rows, n, pattern=SPARSE, kind="full", seed=1):
    return LayerProblem(random_weight(rows, n, seed), random_gram(n, kind, seed + 1), pattern)


def unit_gram(n, rank, seed):
    v = np.random.default_rng(seed).standard_normal((n, rank))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    return (v @ v.T).astype(np.float32)


def brute_force(inner, floor):
    found = {}
    for triple in itertools.combinations(range(len(inner)), 3):
        i, j, k = triple
        for a, b in itertools.product((-1, 1), repeat=2):
            value = a * inner[i, j] + b * inner[i, k] + a * b * inner[j, k]
            if -1 - value > floor:
                found[(*triple, a, b)] = -1 - value
    return found


def named(index, sign):
    return [(*i, *s) for i, s in zip(index.tolist(), sign.tolist(), strict=True)]


@pytest.mark.parametrize("rank", [2, 3, 8])
def test_separation_is_brute_force(rank):
    inner = unit_gram(14, rank, rank).astype(np.float64)
    expected = brute_force(inner, 0.02)
    index, sign, violation = separate(inner, 10**6)
    found = named(index, sign)
    assert len(found) == len(set(found))
    # float32 may differ on what sits on the floor itself
    edge = {key for key, size in expected.items() if size < 0.02 + 1e-5}
    assert set(expected) - edge <= set(found)
    assert set(found) <= set(brute_force(inner, 0.02 - 1e-5))
    np.testing.assert_allclose(violation, [expected.get(f, 0.02) for f in found], atol=2e-5)
    assert len(separate(inner, 0)[0]) == 0
    some, _, _ = separate(inner, len(found) // 3)
    assert some.tolist() == index[: len(found) // 3].tolist()


def test_among_many_vectors_about_the_most_violated_are_found():
    """Their number is estimated from a sample: a few less than asked may be found, and never others."""
    n, most = 420, 3000
    inner = unit_gram(n, 24, 3)
    index, sign, violation = separate(inner, most)
    assert most / 2 < len(index) <= most
    assert len(set(named(index, sign))) == len(index)
    i, j, k = index.T
    a, b = sign.astype(float).T
    assert bool(((i >= 0) & (i < j) & (j < k) & (k < n)).all())
    value = a * inner[i, j] + b * inner[i, k] + a * b * inner[j, k]
    np.testing.assert_allclose(-1 - value, violation, atol=1e-5)
    assert bool((np.diff(violation) <= 0).all())
    above = 0
    for first in range(n - 2):
        x, y = inner[first, first + 1 :], inner[first + 1 :, first + 1 :]
        least = np.full(y.shape, np.inf)
        for p, q in itertools.product((-1, 1), repeat=2):
            least = np.minimum(least, p * x[:, None] + q * x[None, :] + p * q * y)
        above += int((np.triu(-1 - least, 1) > violation[-1] + 1e-5).sum())
    assert above <= len(index)


@given(st.integers(0, 10**6), st.integers(3, 12), st.integers(0, 40))
def test_the_pairs_of_triangles_and_their_sparse_matrix(seed, n, most):
    """Against sets: every distinct pair once and in order, and both of its entries, but none of v_0's row."""
    random = np.random.default_rng(seed)
    every = np.array(list(itertools.combinations(range(n + 1), 3)))
    index = every[random.permutation(len(every))[:most]]
    found = Incidence.of(index, n)
    distinct = sorted({pair for one in index.tolist() for pair in itertools.combinations(one, 2)})
    assert found.pairs.tolist() == [list(pair) for pair in distinct]
    for one, member in zip(index.tolist(), found.member, strict=True):
        assert found.pairs[member].tolist() == [
            list(pair) for pair in itertools.combinations(one, 2)
        ]
    both = sorted(
        {(i, j) for i, j in distinct} | {(j, i) for i, j in distinct if j < n}
    )  # by owner, then by partner
    owner = np.repeat(np.arange(n), np.diff(found.starts))
    assert list(zip(owner.tolist(), found.partners.tolist(), strict=True)) == both
    for (i, j), (at, across) in zip(distinct, found.entries.tolist(), strict=True):
        assert both[at] == (i, j)
        assert across == -1 if j == n else both[across] == (j, i)


def test_a_pool_has_a_triangle_once():
    index, sign, _ = separate(unit_gram(12, 2, 1), 50)
    pool = Pool.empty().join(index[:30], sign[:30], 11)
    pool.tau[:] = 1
    both = pool.join(index, sign, 11)
    assert named(both.index, both.sign) == named(index, sign)
    assert both.tau.tolist() == [1.0] * 30 + [0.0] * 20


@given(problems(max_n=10, max_rows=3))
def test_never_above_the_optimum_and_never_below_the_plain_bound(problem):
    plain = lower_bound(problem, "sdp")
    bound = lower_bound(problem, "sdp", cuts=2)
    assert bool((bound.value >= plain.value * (1 - 1e-9)).all())
    exact = solve(problem, "exhaustive")
    assert bool((bound.value <= exact.objective + 1e-13 * problem.diagonal_mass()).all())
    claimed(problem, Solution.of(problem, exact.mask), bound)


@pytest.mark.parametrize("pattern", [SPARSE, NM(keep=2, of=4)])
def test_cuts_close_a_good_part_of_the_gap(pattern):
    problem = layer(8, 20, pattern, "low-rank", 3)
    exact = solve(problem, "exhaustive").objective
    plain = lower_bound(problem, "sdp")
    bound = lower_bound(problem, "sdp", cuts=8)
    before, after = plain.gap(exact), bound.gap(exact)
    assert float(before.mean()) > 0.01
    assert float(after.mean()) < 0.5 * float(before.mean())
    assert max(bound.trace.cuts.tolist()) > 20


def test_rows_do_not_depend_on_each_other_and_runs_repeat():
    problem = layer(3, 24)
    together, _ = cut_certificate(problem, 16, 3, Limits())
    again, _ = cut_certificate(problem, 16, 3, Limits())
    alone, _ = cut_certificate(problem.take([1]), 16, 3, Limits())
    assert torch.equal(together.diagonal, again.diagonal)
    assert torch.equal(together.cuts[1].index, again.cuts[1].index)
    assert torch.equal(together.cuts[1].index, alone.cuts[0].index)
    torch.testing.assert_close(together.cuts[1].multiplier, alone.cuts[0].multiplier)
    torch.testing.assert_close(together.diagonal[1], alone.diagonal[0])


def test_an_early_end_is_valid():
    problem = layer(4, 64)
    found = solve(problem, "swap")
    claimed(problem, found, lower_bound(problem, "sdp", cuts=50, time_limit=1e-3))
    early, _ = cut_certificate(problem, 16, 50, Limits(seconds=0).begin())
    assert bool((early.check(problem) <= found.objective).all())
