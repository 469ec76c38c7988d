"""Streaming Gram accumulation against the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskopt.errors import ProblemError
from maskopt.gram import CHUNK, TILE, Gram

close = torch.testing.assert_close


def summed(*parts):
    gram = Gram(parts[0].shape[1])
    for part in parts:
        gram.add(part)
    return gram


@given(
    n=st.integers(1, 40),
    batches=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_the_mean_of_outer_products(n, batches, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(count, n, generator=generator) for count in batches]
    gram, x = summed(*parts), torch.cat(parts).double()
    assert gram.tokens == len(x)
    within = sum(len(part) * part.double().var(0, unbiased=False) for part in parts) / len(x)
    close(gram.value(dtype=torch.float64), x.T @ x / len(x), rtol=1e-5, atol=1e-6)
    close(gram.mean(dtype=torch.float64), x.mean(0), rtol=1e-5, atol=1e-6)
    close(gram.variance(dtype=torch.float64), within, rtol=1e-5, atol=1e-6)


def test_larger_than_a_tile_and_a_chunk_and_in_pieces_of_any_order():
    x = torch.randn(CHUNK + 37, TILE + 100)
    value = summed(x).value()
    assert torch.equal(value, value.T)
    close(value, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    x = torch.randn(100, 2 * TILE)
    other = Gram(2 * TILE)
    for piece in reversed(list(other.tasks(x))):
        piece()
    assert torch.equal(summed(x).value(), other.value())


def test_float64_accumulation_does_not_drift():
    part = torch.full((1000, 1), 0.1)
    one, many = (float(summed(*[part] * k).value(dtype=torch.float64)) for k in (1, 2000))
    # a chunk's own sum, in whatever order it is taken
    assert abs(one / 0.01 - 1) < CHUNK * 2**-24
    assert abs(many / one - 1) < 1e-12


def test_half_precision_is_summed_in_float32():
    x = torch.randn(64, 8).to(torch.bfloat16)
    close(summed(x).value(), (x.float().T @ x.float()) / 64)


def test_shrinking_keeps_the_diagonal():
    gram = summed(torch.randn(20, 5))
    plain, shrunk = gram.value(), gram.value(shrink=0.25)
    close(shrunk.diagonal(), plain.diagonal())
    off = ~torch.eye(5, dtype=torch.bool)
    close(shrunk[off], 0.75 * plain[off])
    assert not bool(Gram(3).value().any())  # without tokens


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Gram(5).add(torch.zeros(3, 4)), "must be floating point"),
        (lambda: Gram(5).add(torch.zeros(5)), "must be floating point"),
        (lambda: Gram(5).add(torch.zeros(3, 5, dtype=torch.int64)), "must be floating point"),
        (lambda: Gram(5).add(torch.full((3, 5), float("nan"))), "NaN or infinite"),
        (lambda: Gram(5).value(shrink=1.5), "shrink"),
        (lambda: Gram(0), "at least one"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ProblemError, match=message):
        call()
