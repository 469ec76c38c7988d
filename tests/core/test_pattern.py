"""Exact counts: what a pattern prunes, and which masks it accepts; and one level for each of many items."""

import dataclasses
import itertools
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from forging import fails
from hypothesis import given, settings, strategies as st

from maskopt import NM, Unstructured
from maskopt.core.knapsack import choose_levels
from maskopt.core.pattern import parse_sparsity
from maskopt.errors import PatternError, SolverError

RANGE = r"outside \[0, 1\)"


@given(
    st.integers(0, 999), st.fractions(0, 1, max_denominator=10**6).filter(lambda f: f < 1),
    st.decimals(0, 1, places=15).filter(lambda d: d < 1), st.integers(1, 5000) | st.integers(1, 10**9),
)  # fmt: skip
def test_a_share_prunes_the_floor_of_the_exact_product(mille, share, digits, n):
    for given_share, exact in (
        (mille / 1000, Fraction(mille, 1000)), (share, share), (digits, Fraction(digits)),
    ):  # fmt: skip
        assert Unstructured(given_share).pruned_per_group(n) == math.floor(exact * n)
    pattern, below = Unstructured(share), share.denominator
    whole = n * below % 10**9 // below * below or below
    assert pattern.pruned_per_group(whole) == share * whole
    assert parse_sparsity(str(pattern)) == pattern
    layer = Unstructured(share, per="layer", max_deviation=share)
    assert layer.pruned_in(3, 400) == math.floor(share * 1200)


@pytest.mark.parametrize(
    ("pattern", "counts"),
    [
        (Unstructured(sparsity=0.29), {100: 29}),  # 0.29 * 100 < 29 in binary
        (Unstructured(Fraction(1, 3)), {2: 0, 3: 1, 12: 4, 3000: 1000}),
        (Unstructured(1 / 3), {12: 3}),  # of the decimal 0.3333333333333333
        (Unstructured(keep=0), {3: 3}), (Unstructured(keep=3), {3: 0}),
        (Unstructured(sparsity=0.0), {1: 0}),
        (NM(0, 4), {4: 4}), (NM(4, 4), {4: 0}), (NM(1, 1), {1: 0, 4: 0}),
    ],
)  # fmt: skip
def test_counts(pattern, counts):
    for n, pruned in counts.items():
        pattern.check(n)
        assert pattern.pruned_per_group(n) == pruned
    assert (NM(2, 4).pruned_in(3, 8), Unstructured(0.5).pruned_in(3, 8)) == (12, 12)
    mask = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 0], [1, 1, 1, 0, 1, 0, 0, 0]], dtype=torch.bool)
    assert NM(keep=2, of=4).is_legal(mask).tolist() == [True, False]
    assert Unstructured(keep=4).is_legal(mask).tolist() == [True, True]
    assert Unstructured(sparsity=0.25).is_legal(mask).tolist() == [False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"sparsity": x}, RANGE) for x in (-0.1, 1, 1.0, 1.5, math.nan, math.inf, "0.5", 1j)),
        *(({"sparsity": Decimal(x)}, RANGE) for x in ("NaN", "sNaN", "Infinity", -1)),
        ({"sparsity": Fraction(3, 2)}, RANGE),
        *(({"sparsity": x}, "too many digits for a share")
          for x in (Fraction(1, 10**7 + 1), Decimal("0.3333333333333333333333"))),
        *(({"keep": x}, "keep must be a whole number of at least 0") for x in (-1, 2.0, True, "3")),
        ({"sparsity": None}, "exactly one"),
        ({"sparsity": 0.5, "keep": 3}, "exactly one"),
        *(({"keep": k, "of": of}, "impossible") for k, of in ((5, 4), (-1, 4), (2, 0), (0, 0))),
        *(({"keep": keep, "of": 4}, "takes whole numbers") for keep in (2.0, True)),
        *(((pattern, 0), "at least one input") for pattern in (Unstructured(0.5), NM(1, 1))),
        ((Unstructured(keep=9), 8), "keep=9 is more than the 8 inputs"),
        ((NM(keep=2, of=4), 10), "10 inputs do not divide into groups of 4"),
    ],
)  # fmt: skip
def test_impossible_patterns(options, message):
    pattern, n = options if isinstance(options, tuple) else (None, None)
    with pytest.raises(PatternError, match=message):
        pattern.check(n) if pattern else (NM if "of" in options else Unstructured)(**options)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("0", Unstructured(sparsity=0)),
        ("0.6", Unstructured(sparsity=0.6)),
        ("2:4", NM(keep=2, of=4)),
        ("0.6 per layer", Unstructured(sparsity=0.6, per="layer")),
        ("0.6 per layer ± 0.05", Unstructured(sparsity=0.6, per="layer", max_deviation=0.05)),
        *((None, Unstructured(share, **more)) for share in (0.5, 2 / 3, 0.99996, 1e-7, 0.1 + 0.2)
          for more in ({}, {"per": "layer", "max_deviation": 1 / 7})),
    ],
)  # fmt: skip
def test_text_forms(text, pattern):
    assert (str(pattern), parse_sparsity(str(pattern))) == (text or str(pattern), pattern)
    assert str(Unstructured(keep=3)) == "keep 3"


@pytest.mark.parametrize(
    "given",
    [
        "", "half", "2:4:8", "4:2", "1.0", "a:b", "0.5 per layer 0.1", "0.5 per layer ± 1",
        "keep x", "keep 2 ± 0.1", "2:4 per layer", "2:4 ± 0.1", "0.5 ± 0.1", "0.5 per layer ± a",
        None, True, [], {}, {"sparsity": 0.5},
    ],
)  # fmt: skip
def test_text_that_is_no_pattern(given):
    with pytest.raises(PatternError):
        parse_sparsity(given)


def test_patterns_are_values_and_numbers_of_other_kinds_are_numbers():
    for share in (Fraction(29, 100), Decimal("0.29"), np.longdouble("0.29")):
        assert Unstructured(share) == Unstructured(0.29)
    assert Unstructured(np.float32(0.6)) == Unstructured(0.6)
    assert Unstructured(np.int64(0)) == Unstructured(0)
    assert Unstructured(keep=np.int64(3)) == Unstructured(keep=3)
    assert NM(np.int32(2), np.int64(4)) == NM(2, 4)
    assert len({NM(2, 4), NM(keep=2, of=4), Unstructured(0.5), Unstructured(sparsity=0.5)}) == 2
    for pattern, name in ((NM(2, 4), "keep"), (Unstructured(0.5), "sparsity")):
        fails(dataclasses.FrozenInstanceError, None, setattr, pattern, name, 1)


# --- one level for each item: against enumeration, and where no choice has the total
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
    chosen = choose_levels(sizes, costs, total)
    assert total_of(sizes, chosen) == total
    every = itertools.product(*(range(len(size)) for size in sizes))
    best = min(total_of(costs, levels) for levels in every if total_of(sizes, levels) == total)
    off = 1e-12 * max(float(c.max()) for c in costs) + 1e-12
    assert total_of(costs, chosen) == pytest.approx(best, abs=off)
    given = [np.array([0, 2, 4]), np.array([6, 8])], [np.zeros(3), np.zeros(2)]
    for total in (1, 5, 90):  # which cannot be
        fails(SolverError, f"no choice of levels adds up to {total}", choose_levels, *given, total)


@pytest.mark.parametrize("seed", range(2))
def test_many_large_items_are_proven(seed):
    """As many as a model of 70 billion weights has layers, of their sizes."""
    generator = np.random.default_rng(seed)
    rows = [8192, 1024, 1024, 8192, 28672, 28672, 8192] * 80
    widths = [8192, 8192, 8192, 8192, 8192, 8192, 28672] * 80
    middles = [7 * n // 10 for n in widths]
    levels = [m + (n // 128) * np.arange(-25, 26) for n, m in zip(widths, middles, strict=True)]
    sizes = [r * k for r, k in zip(rows, levels, strict=True)]
    scale = [(generator.lognormal(0, 2), generator.uniform(4, 8)) for _ in rows]
    items = zip(rows, widths, levels, scale, strict=True)
    costs = [r * size * np.exp(k / n * slope) for r, n, k, (size, slope) in items]
    total = sum(r * m for r, m in zip(rows, middles, strict=True))
    chosen = choose_levels(sizes, costs, total)
    assert total_of(sizes, chosen) == total
    pairs = list(zip(costs, sizes, strict=True))

    def bound(price):  # any price of a pruned weight gives one
        return sum((c + price * s).min() for c, s in pairs) - price * total

    steepest = -max(float(np.ptp(c)) / float(np.ptp(s)) for c, s in pairs)
    prices = np.geomspace(steepest, steepest * 1e-9, 2000)
    cost = total_of(costs, chosen)
    assert cost * (1 - 1e-4) <= max(map(bound, prices)) <= cost
