"""One row of updated weights against dense matrices: its tableau, exchanges and screening."""

import pytest
import torch
from hypothesis import given, strategies as st
from strategies import HALF, KINDS, TWO_FOUR, patterns, problems, random_gram, refit_layer

from maskopt import NM, LeastSquaresUpdate, Limits, Unstructured, improving_swap, solve
from maskopt.checks.swap_check import costs_of
from maskopt.core.threads import torch_threads
from maskopt.solvers.least_squares import state
from maskopt.solvers.least_squares.compiled_row import exchanges
from maskopt.solvers.least_squares.search import refine
from maskopt.solvers.least_squares.state import Metric, Row, Scratch, inverse, part_of

DAMPINGS = (0.0, 0.01, 0.3)


def made(n=24, kind="full", damping=0.01, pattern=HALF, seed=1, rows=1):
    return refit_layer(pattern, rows, n, kind, damping, seed)


def rows_of(problem, masks):
    squares = problem.least_squares
    metric = Metric(squares.damped, squares.inverse.diagonal().clone(), problem.group_size)
    target = squares.target(problem.weight, problem.correlation)
    return Row.several(metric, Scratch(problem.device), target, masks)


def row_of(problem, mask):
    return rows_of(problem, mask[None])[0]


def random_row(problem, seed=0):
    return row_of(problem, solve(problem, "random", seed=seed).mask[0])


def tableau(row):
    """M, B, C, v and r by LAPACK, in the order of the slots."""
    a, kept, pruned = row.metric.damped, row.kept, row.pruned
    m = torch.linalg.inv(a[kept][:, kept])
    b = m @ a[kept][:, pruned]
    c = a[pruned][:, pruned] - a[pruned][:, kept] @ b
    v = m @ row.target[kept]
    return m, b, c, v, row.target[pruned] - a[pruned][:, kept] @ v


def whole(m, b, c):
    return torch.cat([torch.cat([-m, b], 1), torch.cat([b.T, c], 1)])


def assert_close(found, expected, tolerance=1e-8):
    atol = tolerance * float(expected.abs().max().clamp(min=1e-300))
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def assert_state(row):
    m, _, _, v, r = tableau(row)
    assert_close(row.m, m)
    assert_close(row.v, v)
    torch.testing.assert_close(row.r, r, rtol=0, atol=1e-8 * float(row.target.abs().max()))


def exchanged(problem, mask):
    """Change of F by every pair of a kept and a pruned input, from F of every mask; ∞ between groups."""
    kept, pruned = mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]
    p = (~mask).double().repeat(len(kept) * len(pruned) + 1, 1)
    u, q = kept.repeat_interleave(len(pruned)), pruned.repeat(len(kept))
    at = torch.arange(len(u))
    p[at, u], p[at, q] = 1.0, 0.0
    costs = costs_of(problem).costs(0, p)
    delta = (costs[:-1] - costs[-1]).view(len(kept), len(pruned))
    apart = kept[:, None] // problem.group_size != pruned[None, :] // problem.group_size
    return delta.masked_fill(apart, torch.inf), float(costs[-1])


def noise(problem, cost):
    """What a Δ may be off by: the tolerance of a claim."""
    return 1e-6 * cost + 1e-10 * float(problem.diagonal_mass())


@pytest.mark.parametrize("size", [1, 2, 3, 17, 95, 96, 97, 128, 191, 192, 193, 250, 300])
def test_the_inverse_by_halves_is_that_of_lapack(size):
    a = torch.stack([random_gram(size, "full", size + i) for i in range(3)])
    a += 0.01 * torch.eye(size, dtype=torch.float64)
    out, work = torch.full_like(a, torch.nan), torch.full((3 * (size * size // 2 + 1),), torch.nan)
    with torch_threads(1):  # as the search calls it
        found = inverse(a.clone(), out, work.double())
        assert found is out
        assert_close(found, torch.stack([torch.linalg.inv(one) for one in a]), 1e-10)
        half = size // 2
        assert torch.equal(found[:, half:, :half], found[:, :half, half:].mT)
        alone = inverse(a[1:2].clone(), torch.empty_like(a[:1]), work.double())
        assert torch.equal(alone[0], found[1])
    lines, columns = torch.tensor([size - 1, 0]), torch.tensor([0, 0, size - 1, size // 2])
    part = torch.full((2, 4), torch.nan, dtype=torch.float64)
    assert part_of(a[0], lines, columns, part) is part
    assert torch.equal(part, a[0][lines][:, columns])
    assert part_of(a[0], lines[:0], columns, part[:0]).shape == (0, 4)


@pytest.mark.parametrize("damping", DAMPINGS[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_after_exchanges_the_state_is_that_from_scratch(kind, damping):
    row = random_row(made(kind=kind, damping=damping))
    # the small tableau is a part of the large one
    u, p = torch.tensor([3, 0, 8]), torch.tensor([10, 2])
    block = row.block(u, p)
    assert_close(row.block(u, p).of(torch.tensor([4, 1])).z, block.z[[4, 1]][:, [4, 1]])
    m, b, c, v, r = tableau(row)
    assert_close(block.z, whole(m[u][:, u], b[u][:, p], c[p][:, p]))
    assert_close(block.columns, torch.cat([-m[:, u], b[:, p]], 1))
    assert_close(block.y, torch.cat([v[u], r[p]]))
    generator = torch.Generator().manual_seed(3)
    for count in (1, 2, 5, 11, 12, 1):
        u, p = (torch.randperm(12, generator=generator)[:count] for _ in range(2))
        gone, came = row.kept[u], row.pruned[p]
        row.exchange(u, p, row.block(u, p))
        assert not row.fresh
        row.settle(0.0, 1.0)
        mask = row.mask()
        assert not mask[gone].any()
        assert mask[came].all()
        assert torch.cat([row.kept, row.pruned]).sort().values.tolist() == list(range(24))
        assert_state(row)
    assert row.drift() < 1e-7
    row.renew(row.kept, row.pruned)
    assert row.fresh
    assert_state(row)


@given(problems(max_n=14, max_rows=1), st.sampled_from(DAMPINGS[1:]))
def test_exchanges_in_the_small_tableau_are_those_of_the_row(problem, damping):
    """All inputs being candidates, it ends at a mask that no pair improves."""
    problem = problem.with_update(LeastSquaresUpdate(damping))
    row = random_row(problem)
    k, s = len(row.kept), len(row.pruned)
    if not k or not s:
        return
    before = float(problem.objective(row.mask()[None]))
    threshold = noise(problem, before)
    block = row.block(torch.arange(k), torch.arange(s))
    inputs = torch.cat([row.kept, row.pruned])
    who, z, y = torch.arange(k + s), block.z.clone(), block.y.clone()
    group = inputs // problem.group_size
    swaps = exchanges(z.numpy(), y.numpy(), who.numpy(), group.numpy(), k, threshold, 10_000)
    mask = torch.isin(torch.arange(problem.n), inputs[who[:k]])
    assert bool(problem.pattern.is_legal(mask[None]).all())
    after = float(problem.objective(mask[None]))
    assert after - before <= -threshold * swaps * (1 - 1e-6) + 1e-9 * before
    assert float(exchanged(problem, mask)[0].min()) >= -2 * threshold
    now = row_of(problem, mask)
    order = torch.cat([inputs[who[:k]].argsort(), k + inputs[who[k:]].argsort()])
    m, b, c, v, r = tableau(now)
    assert_close(z[order][:, order], whole(m, b, c), 1e-6)
    assert_close(y[order], torch.cat([v, r]), 1e-6)


@given(problems(max_n=20, max_rows=1), st.sampled_from(DAMPINGS), st.integers(0, 9))
def test_the_scan_of_a_row_finds_what_all_pairs_hold(problem, damping, seed):
    """None where no pair improves; else the best pair is among the candidates. So does the check."""
    problem = problem.with_update(LeastSquaresUpdate(damping))
    mask = solve(problem, "random", seed=seed).mask
    row = row_of(problem, mask[0])
    assert torch.equal(row.mask(), mask[0])
    if damping:
        torch.testing.assert_close(row.weights(), problem.weights(mask)[0], rtol=1e-7, atol=1e-9)
    if damping and len(row.kept):
        assert_state(row)
        assert row.drift() < 1e-9
    if not len(row.kept) or not len(row.pruned):
        return
    delta, cost = exchanged(problem, mask[0])
    slack, least, suspects = noise(problem, cost), float(delta.min()), row._suspects()
    left_out = torch.ones(len(row.pruned), dtype=torch.bool).index_fill(0, suspects, False)
    assert not left_out.any() or float(delta[:, left_out].min()) >= -slack / 2
    found, swap = row.improving(problem.n, slack), improving_swap(problem.row(0), mask[0])
    if least < -2 * slack:
        # of equals another may be named
        assert any(delta[a, b] <= least + slack for a in found[0] for b in found[1])
        assert swap.delta == pytest.approx(least, rel=1e-3, abs=slack)
        assert float(delta[row.kept == swap.kept][:, row.pruned == swap.pruned]) <= least + slack
    elif least > -slack / 2:
        assert (found, swap) == (None, None)


@given(
    st.integers(2, 16), st.sampled_from(KINDS), st.sampled_from(DAMPINGS), st.integers(0, 2**20),
    st.data(),
)  # fmt: skip
def test_no_pair_that_improves_by_little_is_screened_out(n, kind, damping, seed, data):
    """From the masks that are least above an optimum, where the bounds are tight."""
    few = st.integers(1, min(3, n - 1)).map(lambda pruned: Unstructured(keep=n - pruned))
    problem = made(n, kind, damping, data.draw(st.one_of(few, patterns(n))), seed)
    best = solve(problem, "swap").mask[0]
    if best.all() or not best.any():
        return
    delta, cost = exchanged(problem, best)
    kept, pruned = best.nonzero()[:, 0], (~best).nonzero()[:, 0]
    for pair in delta.flatten().argsort()[:8].tolist():
        u, p = kept[pair // len(pruned)], pruned[pair % len(pruned)]
        above = float(delta.flatten()[pair])
        if not 2 * noise(problem, cost + above) < above < torch.inf:
            continue
        mask = best.clone()
        mask[u], mask[p] = False, True
        row = row_of(problem, mask)
        assert u in row.pruned[row._suspects()]
        assert row.improving(n, above / 2) is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", [HALF, NM(keep=4, of=8)], ids=str)
def test_screening_in_parts_leaves_what_it_leaves_at_once(monkeypatch, kind, pattern):
    row = random_row(made(160, kind, 0.01, pattern))
    at_once = row._suspects()
    assert 0 < len(at_once) <= 80
    for chunk in (1, 7, 1000):
        monkeypatch.setattr(state, "CHUNK", chunk)
        assert torch.equal(row._suspects(), at_once)


def test_at_an_optimum_of_a_layer_screening_leaves_little():
    problem = made(192)
    solution = solve(problem, "swap")
    row, start = (row_of(problem, x.mask[0]) for x in (solution, solve(problem, "worst")))
    assert len(row._suspects()) < 48
    assert len(start._suspects()) > 64
    assert row.improving(48, noise(problem, float(solution.objective))) is None
    # rows that begin together are what they are alone
    problem = made(64, rows=5, kind="low-rank")
    masks = solve(problem, "random").mask
    for index, row in enumerate(rows_of(problem, masks)):
        alone = row_of(problem.take([index]), masks[index])
        both = ((one.v, one.r, one.left) for one in (row, alone))
        torch.testing.assert_close(*both, rtol=1e-9, atol=1e-12)
        assert torch.equal(row.m, alone.m)


@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=str)
def test_candidates_are_distinct_and_of_whole_groups(pattern):
    row = random_row(made(64, "outliers", 0.01, pattern))
    for count in (1, 8, 30, 500):
        for pairs in (row.likely(count), row.improving(count, 0.0)):
            for slots in pairs:
                assert 0 < len(slots) == len(slots.unique()) <= max(count, 2)
            if isinstance(pattern, NM):
                groups = (row.kept[pairs[0]] // 4).unique()
                assert torch.equal(groups, (row.pruned[pairs[1]] // 4).unique())
                assert len(pairs[0]) == len(pairs[1]) == 2 * len(groups)


@pytest.mark.parametrize("factor", [1e-9, 1e3])
def test_nothing_is_claimed_on_an_inverse_that_is_none(factor):
    """Where M is too small all kept inputs look dear, and where it is too large pruned ones look poor."""
    problem = made()
    row = row_of(problem, mask := solve(problem, "worst").mask[0])
    cost, mass = float(problem.objective(mask[None])), float(problem.diagonal_mass())
    row.m *= factor
    row.fresh = False
    assert row.drift() > 0.1
    found = refine(row, cost, mass, 10_000, Limits())
    assert (found.proven, improving_swap(problem.row(0), found.mask)) == (True, None)
    now = float(problem.objective(found.mask[None]))
    assert cost > found.objectives[-1] == pytest.approx(now, rel=1e-9)
