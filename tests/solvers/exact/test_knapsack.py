"""One level for each item: against enumeration, and where no choice has the total."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskopt.errors import SolverError
from maskopt.knapsack import choose_levels


@st.composite
def items(draw: Any) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    count = draw(st.integers(1, 5))
    sizes, costs, total = [], [], 0
    for _ in range(count):
        size = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
        value = st.floats(0, 1e3, allow_nan=False)
        costs.append(np.array(draw(st.lists(value, min_size=len(size), max_size=len(size)))))
        scale = draw(st.sampled_from([1, 96, 1024]))
        sizes.append(np.array(size) * scale)
        total += scale * draw(st.sampled_from(size))
    return sizes, costs, total


def cheapest(sizes: list[np.ndarray], costs: list[np.ndarray], total: int) -> float:
    every = itertools.product(*(range(len(size)) for size in sizes))
    sums = [
        sum(c[i] for c, i in zip(costs, levels, strict=True))
        for levels in every
        if sum(s[i] for s, i in zip(sizes, levels, strict=True)) == total
    ]
    return min(sums)


@given(items())
@settings(max_examples=150, deadline=None)
def test_it_is_the_cheapest_of_all(item: tuple[list[np.ndarray], list[np.ndarray], int]) -> None:
    sizes, costs, total = item
    choice = choose_levels(sizes, costs, total)
    assert sum(s[i] for s, i in zip(sizes, choice.levels, strict=True)) == total
    best, scale = cheapest(sizes, costs, total), max(float(c.max()) for c in costs)
    assert choice.cost == pytest.approx(best, abs=1e-12 * scale + 1e-12)
    assert choice.bound <= best + 1e-12 * scale


@pytest.mark.parametrize("total", [1, 5, 90])
def test_a_total_that_cannot_be_has_one_line(total: int) -> None:
    sizes = [np.array([0, 2, 4]), np.array([6, 8])]
    with pytest.raises(SolverError, match=f"no choice of levels adds up to {total}"):
        choose_levels(sizes, [np.zeros(3), np.zeros(2)], total)


@pytest.mark.parametrize("seed", range(4))
def test_many_large_items_are_proven(seed: int) -> None:
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
    assert sum(int(s[i]) for s, i in zip(sizes, choice.levels, strict=True)) == total
    assert choice.cost * (1 - 1e-4) <= choice.bound <= choice.cost
    # any price of a pruned weight bounds it, too
    price = -1.1 * max(
        float(np.ptp(c)) / float(np.ptp(s)) for c, s in zip(costs, sizes, strict=True)
    )
    relaxed = sum((c + price * s).min() for c, s in zip(costs, sizes, strict=True))
    assert relaxed - price * total <= choice.bound * (1 + 1e-9)
