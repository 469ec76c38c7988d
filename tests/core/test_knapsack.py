"""One level for each item: against enumeration, and where no choice has the total."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskopt.core.knapsack import choose_levels
from maskopt.errors import SolverError


def total_of(parts, levels):
    return sum(part[i] for part, i in zip(parts, levels, strict=True))


@st.composite
def items(draw):
    sizes, costs, total = [], [], 0
    for _ in range(draw(st.integers(1, 5))):
        size = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
        value = st.floats(0, 1e3, allow_nan=False)
        costs.append(np.array(draw(st.lists(value, min_size=len(size), max_size=len(size)))))
        scale = draw(st.sampled_from([1, 96, 1024]))
        sizes.append(np.array(size) * scale)
        total += scale * draw(st.sampled_from(size))
    return sizes, costs, total


@given(items())
@settings(max_examples=100)  # milliseconds each
def test_it_is_the_cheapest_of_all(item):
    sizes, costs, total = item
    choice = choose_levels(sizes, costs, total)
    assert total_of(sizes, choice.levels) == total
    every = itertools.product(*(range(len(size)) for size in sizes))
    best = min(total_of(costs, levels) for levels in every if total_of(sizes, levels) == total)
    off = 1e-12 * max(float(c.max()) for c in costs) + 1e-12
    assert choice.cost == pytest.approx(best, abs=off)
    assert choice.bound <= best + off
    sizes = [np.array([0, 2, 4]), np.array([6, 8])]
    for total in (1, 5, 90):  # which cannot be
        with pytest.raises(SolverError, match=f"no choice of levels adds up to {total}"):
            choose_levels(sizes, [np.zeros(3), np.zeros(2)], total)


@pytest.mark.parametrize("seed", range(2))
def test_many_large_items_are_proven(seed):
    """As many as a model of 70 billion weights has layers, of their sizes."""
    generator = np.random.default_rng(seed)
    rows = [8192, 1024, 1024, 8192, 28672, 28672, 8192] * 80
    widths = [8192, 8192, 8192, 8192, 8192, 8192, 28672] * 80
    middles = [7 * n // 10 for n in widths]
    levels = [m + (n // 128) * np.arange(-25, 26) for n, m in zip(widths, middles, strict=True)]
    sizes = [r * k for r, k in zip(rows, levels, strict=True)]
    costs = [
        r * generator.lognormal(0, 2) * np.exp(k / n * generator.uniform(4, 8))
        for r, n, k in zip(rows, widths, levels, strict=True)
    ]
    total = sum(r * m for r, m in zip(rows, middles, strict=True))
    choice = choose_levels(sizes, costs, total)
    assert total_of(sizes, choice.levels) == total
    assert choice.cost * (1 - 1e-4) <= choice.bound <= choice.cost
    # any price of a pruned weight bounds it, too
    pairs = list(zip(costs, sizes, strict=True))
    price = -1.1 * max(float(np.ptp(c)) / float(np.ptp(s)) for c, s in pairs)
    relaxed = sum((c + price * s).min() for c, s in pairs)
    assert relaxed - price * total <= choice.bound * (1 + 1e-9)
