"""Thousands of rows of up to 16 inputs against enumeration: bounds below, exact solvers equal.

Rows come in layers of many, so that one enumeration of the masks serves them all.
"""

import pytest
import torch
from strategies import KINDS, random_gram, random_weight

from maskopt import (
    NM,
    Certificate,
    LayerProblem,
    Status,
    Unstructured,
    available_solvers,
    lower_bound,
    solve,
    verify,
)

ROWS = 60
PATTERNS = (
    Unstructured(keep=8),
    Unstructured(keep=6),
    Unstructured(sparsity=0.25),
    NM(keep=2, of=4),
    NM(keep=4, of=8),
    NM(keep=1, of=4),
)
EXACT = ("branch", "scip", "highs", "gurobi")


def layer(kind, pattern, n=16, rows=ROWS):
    """Gaussian weights; rows 10 and up are of very different scales, row 0 is zero."""
    seed = 7 * KINDS.index(kind) + 1000 * n
    weight = random_weight(rows, n, seed + 1)
    weight[0] = 0
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    weight[10:] *= torch.exp(2 * spread[10:])
    weight[20:30] *= 1e-6
    return LayerProblem(weight, random_gram(n, kind, seed), pattern)


def random_certificate(problem, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, n, groups = problem.rows, problem.n, problem.n // problem.group_size
    unit = problem.diagonal_mass()[:, None] / n

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    size = 10 ** (2 * noise(rows, 1))
    return Certificate(
        noise(rows, n) * unit * size, noise(rows, groups) * unit, noise(rows, n), None, None
    )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_bound_passes_the_optimum(kind, pattern):
    problem = layer(kind, pattern)
    exact = solve(problem, "exhaustive").objective
    noise = 1e-13 * problem.diagonal_mass()
    bounds = {
        "box": lower_bound(problem, "box").value,
        "shift": lower_bound(problem, "shift").value,
        "sdp": lower_bound(problem, "sdp").value,
        "crude sdp": lower_bound(problem, "sdp", sweeps=1, rank=2, seed=3).value,
        "random duals": random_certificate(problem, 5).check(problem),
    }
    for name, value in bounds.items():
        assert bool((value <= exact + noise).all()), (name, float((value - exact).max()))
        assert bool((value >= 0).all()), name
    if kind in ("full", "diagonal"):  # and no idle zeros where the relaxation is any good
        assert float(bounds["sdp"].sum()) >= 0.5 * float(exact.sum())


@pytest.mark.parametrize("n", [11, 13, 15])
def test_no_bound_passes_the_optimum_at_odd_sizes(n):
    for kind in KINDS:
        problem = layer(kind, Unstructured(keep=n // 2), n, rows=40)
        exact = solve(problem, "exhaustive").objective
        for method in ("box", "shift", "sdp"):
            value = lower_bound(problem, method).value
            assert bool((value <= exact + 1e-13 * problem.diagonal_mass()).all()), (kind, method)


@pytest.mark.parametrize("pattern", [Unstructured(keep=7), NM(keep=2, of=4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_solvers_agree(kind, pattern):
    problem = layer(kind, pattern).take([5, 15, 25])
    exact = solve(problem, "exhaustive").objective
    slack = 2e-6 * exact + 1e-10 * problem.diagonal_mass()
    for name in EXACT:
        if not available_solvers()[name].available:
            continue
        solution = solve(problem, name, workers=0)
        assert bool(((solution.objective - exact).abs() <= slack).all()), name
        assert bool((solution.lower_bound <= exact + slack).all()), name
        # far below the mass of Q, SCIP's tolerances leave a relative gap: no OPTIMAL
        clear = exact > 1e-4 * problem.diagonal_mass()
        proven = torch.tensor([status == Status.OPTIMAL for status in solution.status])
        assert bool((proven | ~clear).all()), name
        verify(problem, solution)


@pytest.mark.parametrize("limit", [0.02, 0.3])
@pytest.mark.parametrize("name", EXACT)
def test_gap_limits_are_kept(name, limit):
    if not available_solvers()[name].available:
        pytest.skip(available_solvers()[name].unavailable)
    for pattern in (Unstructured(keep=6), NM(keep=2, of=4)):
        problem = layer("full", pattern).take([1, 2])
        exact = solve(problem, "exhaustive").objective
        solution = solve(problem, name, gap_limit=limit, workers=0)
        assert bool((solution.gap <= limit + 1e-9).all())
        assert bool((solution.objective <= exact / (1 - limit) * (1 + 1e-9)).all())
        assert bool((solution.lower_bound <= exact * (1 + 2e-6)).all())
        verify(problem, solution)
