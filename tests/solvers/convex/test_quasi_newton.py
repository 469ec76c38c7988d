"""The quasi-Newton method of the relaxations: legal, downhill, at the least value, and it goes on."""

import numpy as np
import pytest
from scipy.optimize import minimize

from maskopt.solvers.exact.quasi_newton import QuasiNewton


def quadratic(n, seed=0, rank=None):
    """½xᵀAx − bᵀx."""
    random = np.random.default_rng(seed)
    root = random.normal(size=(rank or 2 * n, n))
    a, b = root.T @ root / len(root), random.normal(size=n)
    if rank:
        b = a @ b
    return lambda x: (float(x @ a @ x / 2 - b @ x), a @ x - b)


def least(function, n, free):
    bounds = [(None, None)] * free + [(0, None)] * (n - free)
    options = {"maxiter": 10_000, "maxfun": 10**6, "ftol": 1e-15, "gtol": 1e-10}
    return minimize(
        function, np.ones(n), jac=True, method="L-BFGS-B", bounds=bounds, options=options
    ).fun


@pytest.mark.parametrize("n", [1, 2, 40])
@pytest.mark.parametrize("free", [0, 0.5, 1])
@pytest.mark.parametrize("rank", [None, 15])
def test_the_least_value_is_reached(n, free, rank):
    free = round(free * n)
    function = quadratic(n, n, rank and min(rank, n))
    x, value = QuasiNewton(free, 25).descend(function, np.ones(n), 2000)
    assert (x[free:] >= 0).all()
    assert value == function(x)[0]
    assert value == pytest.approx(least(function, n, free), rel=1e-4, abs=1e-6)


def test_every_step_is_legal_and_lowers_the_value():
    n, free = 30, 10
    function, newton, x = quadratic(n, 3), QuasiNewton(free, 8), np.ones(n)
    values = [function(x)[0]]
    for _ in range(12):
        x, value = newton.descend(function, x, 1)
        assert (x[free:] >= 0).all()
        values.append(value)
    assert (np.diff(values) <= 0).all()
    assert newton.known == 12
    # the same as in one go
    again, value = QuasiNewton(free, 8).descend(function, np.ones(n), 12)
    assert again == pytest.approx(x, rel=1e-12)
    assert value == values[-1]


def test_what_is_known_outlives_variables_that_come_and_go():
    n, free = 60, 20
    function, newton = quadratic(n, 4), QuasiNewton(free, 25)

    def part(chosen):
        def of(y):
            x = np.zeros(n)
            x[chosen] = y
            value, slope = function(x)
            return value, slope[chosen]

        return of

    few = np.arange(n) < 50
    x, _ = newton.descend(part(few), np.ones(50), 30)
    stay = np.arange(50) % 7 != 6
    newton.keep(stay)
    few[:50] = stay
    few[50:] = True
    x, value = newton.descend(
        part(np.flatnonzero(np.append(stay, np.ones(10, bool)))),
        np.append(x[stay], np.zeros(10)),
        300,
    )
    assert newton.steps.shape == newton.changes.shape == (25, len(x))
    assert value == pytest.approx(least(part(few), len(x), free), rel=1e-5)


@pytest.mark.parametrize("slope", [0.0, np.nan])
def test_where_nothing_is_gained_it_stays(slope):
    x, value = QuasiNewton(0, 5).descend(lambda x: (1.0, np.full(3, slope)), np.ones(3), 10)
    assert x.tolist() == [1, 1, 1]
    assert value == 1


def test_a_step_too_long_is_shortened():
    x, value = QuasiNewton(1, 5).descend(lambda x: (float(500 * x @ x), 1000 * x), np.ones(1), 50)
    assert abs(x[0]) < 1e-3
    assert value < 1e-3
