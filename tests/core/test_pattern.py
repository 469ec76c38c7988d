"""Exact counts: what a pattern prunes, and which masks it accepts."""

import dataclasses
import json
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskopt import NM, Unstructured
from maskopt.errors import PatternError
from maskopt.pattern import parse_pattern, pattern_from_dict, pattern_to_dict


@given(st.integers(0, 999), st.integers(1, 5000))
def test_sparsity_prunes_exactly_the_floor_of_the_decimal_product(thousandths, n):
    pattern = Unstructured(sparsity=thousandths / 1000)
    assert pattern.pruned_per_group(n) == math.floor(Fraction(thousandths, 1000) * n)


def test_binary_rounding_does_not_lose_a_weight():
    assert 0.29 * 100 < 29
    assert Unstructured(sparsity=0.29).pruned_per_group(100) == 29


@given(st.fractions(0, 1, max_denominator=10**6).filter(lambda f: f < 1), st.integers(1, 10**9))
def test_fractions_prune_the_floor_of_the_exact_product(share, n):
    pattern = Unstructured(share)
    assert pattern.pruned_per_group(n) == math.floor(share * n)
    whole = (
        n * share.denominator % 10**9 // share.denominator * share.denominator or share.denominator
    )
    assert pattern.pruned_per_group(whole) == share * whole
    assert pattern_from_dict(json.loads(json.dumps(pattern_to_dict(pattern)))) == pattern
    layer = Unstructured(share, per="layer", spread=share)
    assert layer.pruned_in(3, 400) == math.floor(share * 1200)


@given(st.decimals(0, 1, places=15).filter(lambda d: d < 1), st.integers(1, 10**9))
def test_decimals_prune_the_floor_of_the_exact_product(share, n):
    assert Unstructured(share).pruned_per_group(n) == math.floor(Fraction(share) * n)


def test_a_third_is_a_third():
    assert [Unstructured(Fraction(1, 3)).pruned_per_group(n) for n in (2, 3, 12, 3000)] == [
        0,
        1,
        4,
        1000,
    ]
    assert Unstructured(Fraction(29, 100)) == Unstructured(Decimal("0.29")) == Unstructured(0.29)
    assert Unstructured(1 / 3).pruned_per_group(12) == 3  # of the decimal 0.3333333333333333


@pytest.mark.parametrize("share", [Fraction(1, 10**7 + 1), Decimal("0.3333333333333333333333")])
def test_a_share_that_no_float_can_stand_for_is_refused(share):
    with pytest.raises(PatternError, match="too many digits for a share"):
        Unstructured(share)


@pytest.mark.parametrize(
    "sparsity",
    [Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity"), Decimal(-1), Fraction(3, 2), 1j],
)
def test_other_impossible_sparsities(sparsity):
    with pytest.raises(PatternError, match=r"outside \[0, 1\)"):
        Unstructured(sparsity)


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, 1.5, float("nan"), float("inf"), "0.5", None])
def test_impossible_sparsities(sparsity):
    with pytest.raises(PatternError):
        Unstructured(sparsity=sparsity)


@pytest.mark.parametrize("keep", [-1, 2.0, True, "3"])
def test_impossible_keeps(keep):
    with pytest.raises(PatternError, match="keep must be a whole number of at least 0"):
        Unstructured(keep=keep)


def test_the_extremes_are_patterns():
    assert Unstructured(keep=0).pruned_per_group(3) == 3
    assert Unstructured(keep=3).pruned_per_group(3) == 0
    assert Unstructured(sparsity=0.0).pruned_per_group(1) == 0
    assert [NM(keep, of).pruned_per_group(4) for keep, of in ((0, 4), (4, 4), (1, 1))] == [4, 0, 0]
    NM(keep=1, of=1).check(1)


@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.5), NM(keep=1, of=1)])
def test_a_row_without_inputs_is_refused(pattern):
    with pytest.raises(PatternError, match="at least one input"):
        pattern.check(0)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (Unstructured(sparsity=0.6), "0.6"),
        (Unstructured(sparsity=0), "0"),
        (Unstructured(keep=3), "keep 3"),
        (NM(keep=2, of=4), "2:4"),
    ],
)
def test_a_pattern_is_shown_as_it_is_written(pattern, text):
    assert str(pattern) == text


def test_patterns_are_values():
    assert len({NM(2, 4), NM(keep=2, of=4), Unstructured(0.5), Unstructured(sparsity=0.5)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        NM(2, 4).keep = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Unstructured(0.5).sparsity = 0.6


@pytest.mark.parametrize(("keep", "of"), [(5, 4), (-1, 4), (2, 0), (0, 0), (2.0, 4), (True, 4)])
def test_impossible_nm(keep, of):
    with pytest.raises(PatternError):
        NM(keep=keep, of=of)


def test_patterns_that_do_not_fit():
    with pytest.raises(PatternError, match=r"keep=9 is more than the 8 inputs"):
        Unstructured(keep=9).check(8)
    with pytest.raises(PatternError, match=r"10 inputs do not divide into groups of 4"):
        NM(keep=2, of=4).check(10)
    with pytest.raises(PatternError):
        Unstructured(sparsity=0.5, keep=3)


def test_legality_counts_per_group():
    mask = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 0], [1, 1, 1, 0, 1, 0, 0, 0]], dtype=torch.bool)
    assert NM(keep=2, of=4).is_legal(mask).tolist() == [True, False]
    assert Unstructured(keep=4).is_legal(mask).tolist() == [True, True]
    assert Unstructured(sparsity=0.25).is_legal(mask).tolist() == [False, False]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("0.6", Unstructured(sparsity=0.6)),
        ("2:4", NM(keep=2, of=4)),
        ("0.6 per layer", Unstructured(sparsity=0.6, per="layer")),
        ("0.6 per layer ± 0.05", Unstructured(sparsity=0.6, per="layer", spread=0.05)),
    ],
)
def test_text_and_json_forms(text, pattern):
    assert parse_pattern(text) == pattern
    assert str(pattern) == text
    assert pattern_from_dict(pattern_to_dict(pattern)) == pattern


@pytest.mark.parametrize(
    "text", ["", "half", "2:4:8", "4:2", "1.0", "a:b", "0.5 per layer 0.1", "0.5 per layer ± 1"]
)
def test_text_that_is_no_pattern(text):
    with pytest.raises(PatternError):
        parse_pattern(text)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"kind": "nm", "keep": 2},
        {"kind": "x"},
        {"kind": "x", "keep": 2, "of": 4},
        {"kind": "x", "sparsity": 0.5, "keep": None},
        {"kind": "unstructured", "sparsity": 0.5},
        {"kind": "nm", "keep": 2, "of": 4, "more": 1},
        {"kind": "unstructured", "sparsity": 0.5, "keep": None, "spread": 0.1},
        {"kind": "unstructured", "sparsity": 0.5, "keep": None, "per": "layer", "spread": "a"},
    ],
)
def test_json_that_is_no_pattern(data):
    with pytest.raises(PatternError):
        pattern_from_dict(data)


@pytest.mark.parametrize("share", [0.5, 2 / 3, 0.99996, 1e-7, 0.1 + 0.2])
def test_what_a_pattern_is_called_is_the_pattern(share):
    for pattern in (Unstructured(share), Unstructured(share, per="layer", spread=1 / 7)):
        assert parse_pattern(str(pattern)) == pattern


def test_numbers_of_numpy_are_numbers():
    assert Unstructured(np.float32(0.6)) == Unstructured(0.6)
    assert Unstructured(np.int64(0)) == Unstructured(0)
    assert Unstructured(np.longdouble("0.29")) == Unstructured(0.29)
    assert Unstructured(keep=np.int64(3)) == Unstructured(keep=3)
    assert NM(np.int32(2), np.int64(4)) == NM(2, 4)
