"""Streaming Gram accumulation against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskopt.errors import ProblemError
from maskopt.gram import CHUNK, TILE, Gram


@given(
    n=st.integers(1, 40),
    batches=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_the_mean_of_outer_products(n: int, batches: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(count, n, generator=generator) for count in batches]
    gram = Gram(n)
    for part in parts:
        gram.add(part)
    x = torch.cat(parts).double()
    torch.testing.assert_close(
        gram.value(dtype=torch.float64), x.T @ x / len(x), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(gram.mean(dtype=torch.float64), x.mean(0), rtol=1e-5, atol=1e-6)
    assert gram.tokens == len(x)
    within = sum(len(part) * part.double().var(0, unbiased=False) for part in parts) / len(x)
    torch.testing.assert_close(gram.variance(dtype=torch.float64), within, rtol=1e-5, atol=1e-6)


def test_larger_than_a_tile_and_a_chunk() -> None:
    x = torch.randn(CHUNK + 37, TILE + 100)
    gram = Gram(x.shape[1])
    gram.add(x)
    value = gram.value()
    assert torch.equal(value, value.T)
    torch.testing.assert_close(value, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_float64_accumulation_does_not_drift() -> None:
    one, many = Gram(1), Gram(1)
    one.add(torch.full((1000, 1), 0.1))
    for _ in range(2000):
        many.add(torch.full((1000, 1), 0.1))
    single = float(one.value(dtype=torch.float64))
    assert (
        abs(single / 0.01 - 1) < CHUNK * 2**-24
    )  # a chunk's own sum, in whatever order it is taken
    assert abs(float(many.value(dtype=torch.float64)) / single - 1) < 1e-12


def test_order_of_pieces_does_not_change_the_bits() -> None:
    x = torch.randn(100, 2 * TILE)
    one, other = Gram(2 * TILE), Gram(2 * TILE)
    one.add(x)
    for piece in reversed(list(other.tasks(x))):
        piece()
    assert torch.equal(one.value(), other.value())


def test_half_precision_is_summed_in_float32() -> None:
    x = torch.randn(64, 8).to(torch.bfloat16)
    gram = Gram(8)
    gram.add(x)
    torch.testing.assert_close(gram.value(), (x.float().T @ x.float()) / 64)


def test_shrinking_keeps_the_diagonal() -> None:
    gram = Gram(5)
    gram.add(torch.randn(20, 5))
    plain, shrunk = gram.value(), gram.value(shrink=0.25)
    torch.testing.assert_close(shrunk.diagonal(), plain.diagonal())
    off = ~torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(shrunk[off], 0.75 * plain[off])
    with pytest.raises(ProblemError, match="shrink"):
        gram.value(shrink=1.5)


def test_no_tokens_give_zeros() -> None:
    assert not bool(Gram(3).value().any())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(3, 4), "must be floating point"),
        (torch.zeros(5), "must be floating point"),
        (torch.zeros(3, 5, dtype=torch.int64), "must be floating point"),
        (torch.full((3, 5), float("nan")), "NaN or infinite"),
    ],
)
def test_bad_inputs(inputs: torch.Tensor, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        Gram(5).add(inputs)


def test_no_inputs() -> None:
    with pytest.raises(ProblemError, match="at least one"):
        Gram(0)
