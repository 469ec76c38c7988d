"""The blocked sweep of the mixing method is the plain Gauss–Seidel sweep, however it is run."""

import numpy as np
import pytest
import torch
from strategies import random_gram, random_weight

from maskopt import NM, LayerProblem, Unstructured, lower_bound
from maskopt.limits import torch_threads
from maskopt.solvers.convex.mixing import Extra, Mixing


def layer(n, rows, pattern, seed=0):
    return LayerProblem(random_weight(rows, n, seed + 1), random_gram(n, "full", seed), pattern)


def plain_sweep(state, row, rho, extra=None):
    """One pass over one row, coordinate by coordinate, from the definition."""
    n, group = len(state.w[row]), state.group
    w, v = state.w[row].double().numpy(), state.v[row].double().numpy().copy()
    label = np.arange(n) // group
    c = w[:, None] * state.gram.double().numpy() * w[None, :] / 4
    c += rho / 4 * (label[:, None] == label[None, :])
    if extra is not None:
        c += extra[:, :n]
    np.fill_diagonal(c, 0)
    fixed = state.linear[row].double().numpy() + rho * (group - 2 * state.pruned) / 4
    if extra is not None:
        fixed = fixed + extra[:, n]
    y = np.zeros(n)
    for i in range(n):
        g = c[i] @ v
        g[0] += fixed[i]
        y[i] = np.linalg.norm(g)
        v[i] = -g / y[i]
    return v, y


def random_extra(n, rows, seed):
    """Dense [rows, n, n + 1] and the same as `Extra`."""
    random = np.random.default_rng(seed)
    dense = np.zeros((rows, n, n + 1))
    for row in range(rows):
        full = random.normal(size=(n + 1, n + 1)) * (
            random.random((n + 1, n + 1)) < 0.1 + 0.1 * row
        )
        full = full + full.T
        np.fill_diagonal(full, 0)
        dense[row] = full[:n]
    counts = (dense != 0).sum(2)
    ends = np.cumsum(counts).reshape(rows, n)
    starts = np.concatenate([ends[:, :1] - counts[:, :1], ends], axis=1)
    _, _, column = np.nonzero(dense)
    return dense, Extra(starts, column.astype(np.int32), dense[dense != 0])


@pytest.mark.parametrize(
    ("n", "pattern", "rank"),
    [
        (1, Unstructured(0.0), 2),
        (5, Unstructured(0.6), 3),
        (8, NM(2, 4), 16),
        (37, Unstructured(0.6), 9),
        (40, NM(2, 4), 17),
        (60, NM(5, 20), 48),
        (259, Unstructured(0.5), 23),  # float32
        (264, NM(4, 8), 16),
        # more vectors of accumulators than are summed side by side
        (30, Unstructured(0.6), 80),
        (264, Unstructured(0.6), 130),
    ],
)
@pytest.mark.parametrize("with_extra", [False, True])
def test_the_sweep_is_plain_gauss_seidel(n, pattern, rank, with_extra):
    problem = layer(n, 3, pattern)
    state = Mixing(problem, rank, 0)
    assert state.v.shape[2] % 16 == 0
    dense, sparse = random_extra(n, 3, 5)
    if with_extra:
        state.extra = sparse
    state.sweep(2, 0.3)  # away from the start
    expected = [plain_sweep(state, r, 0.7, dense[r] if with_extra else None) for r in range(3)]
    state.sweep(1, 0.7)
    tolerance = 1e-10 if n <= 256 else 2e-4
    for row, (v, y) in enumerate(expected):
        np.testing.assert_allclose(state.v[row].numpy(), v, atol=tolerance)
        np.testing.assert_allclose(state.duals[row].numpy(), y, rtol=tolerance, atol=tolerance)
    assert not state.v[:, :, rank:].any()


@pytest.mark.parametrize("n", [48, 264])
def test_no_bit_depends_on_threads_or_on_the_rows_beside(n):
    problem = layer(n, 4, Unstructured(0.6))
    _, extra = random_extra(n, 4, 3)

    def run(rows, threads):
        with torch_threads(threads):
            state = Mixing(problem.take(rows), 16, 0)
            state.extra = extra.take(rows)
            state.sweep(30, 0.5)
        return state.v, state.duals

    v, duals = run([0, 1, 2, 3], 4)
    for rows, threads in (([0, 1, 2, 3], 1), ([2], 1), ([3, 1], 2)):
        again, again_duals = run(rows, threads)
        assert torch.equal(again, v[rows])
        assert torch.equal(again_duals, duals[rows])


def test_keeping_rows_keeps_their_extra_terms():
    problem = layer(20, 3, NM(2, 4))
    _, state_extra = random_extra(20, 3, 1)
    all_rows, some = Mixing(problem, 8, 0), Mixing(problem, 8, 0)
    all_rows.extra = some.extra = state_extra
    some.sweep(3, 0.2)
    some.keep([2, 0])
    some.sweep(4, 0.2)
    all_rows.sweep(3, 0.2)
    all_rows.sweep(4, 0.2)
    assert torch.equal(some.v, all_rows.v[[2, 0]])
    np.testing.assert_array_equal(some.inner(), all_rows.inner()[[2, 0]])


def test_the_torch_sweep_takes_the_extra_terms_too():
    """At the fixed point of the compiled sweep the other one stays."""
    problem = layer(24, 2, Unstructured(0.6))
    _, extra = random_extra(24, 2, 2)
    state = Mixing(problem, 12, 0)
    state.extra = Extra(extra.starts, extra.index, 0.05 * extra.value)
    state.sweep(5000, 1.0)
    v, duals = state.v.clone(), state.duals.clone()
    state.sweep_torch(1.0)
    torch.testing.assert_close(state.v, v, atol=1e-5, rtol=0)
    torch.testing.assert_close(state.duals, duals, atol=1e-5, rtol=1e-5)


def test_bounds_do_not_depend_on_the_tile(monkeypatch):
    problem = layer(40, 5, Unstructured(0.6))
    whole = lower_bound(problem, "sdp", sweeps=50)
    monkeypatch.setattr("maskopt.solvers.bounds.sdp._TILE_ENTRIES", 2 * 40 * 16)
    tiles = lower_bound(problem, "sdp", sweeps=50)
    alone = [lower_bound(problem.row(r), "sdp", sweeps=50) for r in range(5)]
    assert bool((whole.value > 0).all())
    for name in ("diagonal", "penalty", "point"):
        of_whole = getattr(whole.certificate, name)
        assert torch.equal(of_whole, getattr(tiles.certificate, name))
        assert torch.equal(of_whole, torch.cat([getattr(b.certificate, name) for b in alone]))
