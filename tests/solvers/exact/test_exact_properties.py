"""Thousands of rows of up to 16 inputs against enumeration: no bound passes the optimum.

Rows come in layers of many, so that one enumeration of the masks serves them all.
"""

import pytest
import torch
from strategies import KINDS, random_gram, random_weight

from maskopt import NM, Certificate, LayerProblem, Unstructured, lower_bound, solve

PATTERNS = (Unstructured(keep=8), NM(keep=2, of=4), Unstructured(keep=6), Unstructured(0.25),
            NM(keep=4, of=8), NM(keep=1, of=4))  # fmt: skip


def layer(kind, pattern, n, rows):
    """Gaussian weights; rows 10 and up are of very different scales, row 0 is zero."""
    seed = 7 * KINDS.index(kind) + 1000 * n
    weight = random_weight(rows, n, seed + 1)
    weight[0] = 0
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    weight[10:] *= torch.exp(2 * spread[10:])
    weight[20:30] *= 1e-6
    return LayerProblem(weight, random_gram(n, kind, seed), pattern)


def random_certificate(problem):
    rows, n, groups = problem.rows, problem.n, problem.n // problem.group_size
    unit = problem.diagonal_mass()[:, None] / n

    def noise(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    diagonal = noise(rows, n) * unit * 10 ** (2 * noise(rows, 1))
    return Certificate(diagonal, noise(rows, groups) * unit, noise(rows, n), None, None)


SIZES = [(11, Unstructured(keep=5), 40), (12, PATTERNS[1], 60)]
SLOW = [(n, Unstructured(keep=n // 2), 40) for n in (13, 15)]
SLOW += [(16, pattern, 60) for pattern in PATTERNS]


@pytest.mark.parametrize(
    ("n", "pattern", "rows"),
    [*SIZES, *(pytest.param(*size, marks=pytest.mark.slow) for size in SLOW)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_no_bound_passes_the_optimum(kind, n, pattern, rows):
    problem = layer(kind, pattern, n, rows)
    exact = solve(problem, "exhaustive").objective
    bounds = {
        "box": lower_bound(problem, "box").value,
        "shift": lower_bound(problem, "shift").value,
        "sdp": lower_bound(problem, "sdp").value,
        "crude sdp": lower_bound(problem, "sdp", sweeps=1, rank=2, seed=3).value,
        "random duals": random_certificate(problem).check(problem),
    }
    for name, value in bounds.items():
        most = exact + 1e-13 * problem.diagonal_mass()
        assert bool((value <= most).all()), (name, float((value - exact).max()))
        assert bool((value >= 0).all()), name
    if kind in ("full", "diagonal"):  # and no idle zeros where the relaxation is any good
        assert float(bounds["sdp"].sum()) >= 0.5 * float(exact.sum())
