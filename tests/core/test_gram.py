"""Gram matrices of batches against the definition; float32 products by the faster library."""

from unittest.mock import Mock

import pytest
import torch
from forging import fails
from hypothesis import given, strategies as st

from maskopt.core import threads as products
from maskopt.core.gram import CHUNK, TILE, Gram
from maskopt.core.threads import fast_products
from maskopt.errors import ProblemError
from maskopt.models.blockwise.forward import Threads

close, setting = torch.testing.assert_close, torch.get_float32_matmul_precision


def summed(*parts):
    gram = Gram(parts[0].shape[1])
    for part in parts:
        gram.add(part)
    return gram


@given(
    st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 1000)
)
def test_the_mean_of_outer_products(n, batches, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(count, n, generator=generator) for count in batches]
    gram, x = summed(*parts), torch.cat(parts).double()
    assert gram.tokens == len(x)
    within = sum(len(part) * part.double().var(0, unbiased=False) for part in parts) / len(x)
    close(gram.value(dtype=torch.float64), x.T @ x / len(x), rtol=1e-5, atol=1e-6)
    moments = torch.stack([x.mean(0), within])
    close(gram.moments(dtype=torch.float64), moments, rtol=1e-5, atol=1e-6)


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


def test_sums_do_not_drift_and_shrinking_keeps_the_diagonal():
    part = torch.full((1000, 1), 0.1)
    one, many = (float(summed(*[part] * k).value(dtype=torch.float64)) for k in (1, 2000))
    # a chunk's own sum, in whatever order it is taken
    assert abs(one / 0.01 - 1) < CHUNK * 2**-24
    assert abs(many / one - 1) < 1e-12
    x = torch.randn(64, 8).to(torch.bfloat16)  # half precision is summed in float32
    close(summed(x).value(), (x.float().T @ x.float()) / 64)
    gram = summed(torch.randn(20, 5))
    plain, shrunk = gram.value(), gram.value(shrinkage=0.25)
    close(shrunk.diagonal(), plain.diagonal())
    off = ~torch.eye(5, dtype=torch.bool)
    close(shrunk[off], 0.75 * plain[off])
    assert not bool(Gram(3).value().any())  # without tokens


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *((lambda x=x: Gram(5).add(x), "must be floating point")
          for x in (torch.zeros(3, 4), torch.zeros(5), torch.zeros(3, 5, dtype=torch.int64))),
        (lambda: Gram(5).add(torch.full((3, 5), float("nan"))), "NaN or infinite"),
        (lambda: Gram(5).value(shrinkage=1.5), "shrinkage"),
        (lambda: Gram(0), "at least one"),
    ],
)  # fmt: skip
def test_what_is_refused(call, message):
    fails(ProblemError, message, call)


def error():
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(300, 300, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    return float((left @ right - exact).norm() / exact.norm())


@pytest.fixture
def fresh():
    """What a product said of this processor is asked for again, before and after."""
    products._precise.cache_clear()
    yield
    products._precise.cache_clear()


def check_left_alone():
    products._precise.cache_clear()
    before = setting()
    with fast_products():
        assert setting() == before
    assert not products._precise()


def test_products_are_of_float32_inside_and_on_the_threads_and_as_before_outside(monkeypatch):
    with fast_products():
        assert error() < 1e-6
    with Threads(torch.device("cpu"), 2) as threads:
        assert max(threads.run([error, error, error])) < 1e-6
    monkeypatch.setattr(products, "_precise", lambda: True)
    usual = setting()
    try:
        for before in ("highest", "high"):
            torch.set_float32_matmul_precision(before)
            with fast_products():
                with fast_products():
                    assert setting() == "medium"
                assert setting() == "medium"
            assert setting() == before
            with pytest.raises(ZeroDivisionError), fast_products():
                raise ZeroDivisionError
            assert setting() == before
    finally:
        torch.set_float32_matmul_precision(usual)


@pytest.mark.parametrize("usual", [torch.float32, torch.float64])
def test_a_processor_that_rounds_is_left_alone(usual, fresh, monkeypatch):
    exact = torch.Tensor.__matmul__

    def rounded(left, right):
        if left.dtype == torch.float32 and setting() == "medium":
            return exact(left.bfloat16(), right.bfloat16()).float()
        return exact(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    # of what torch makes numbers of where nothing is said
    torch.set_default_dtype(usual)
    try:
        check_left_alone()
    finally:
        torch.set_default_dtype(torch.float32)


def test_accelerators_and_settings_by_other_means_are_left_alone(fresh, monkeypatch):
    mixed = Mock(side_effect=RuntimeError("mix of the legacy and new APIs"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        check_left_alone()
    products._precise.cache_clear()
    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    with fast_products():
        assert error() < 1e-6
    assert not products._precise()
    monkeypatch.setattr(products, "_precise", lambda: True)  # as found out before
    with fast_products():
        assert error() < 1e-6
