"""float32 products by the faster library: as precise, and the setting is as before afterwards."""

import pytest
import torch

from maskopt import products
from maskopt.model.threads import Threads
from maskopt.products import fast_products

setting = torch.get_float32_matmul_precision


@pytest.fixture
def fresh():
    """What a product said of this processor is asked for again, before and after."""
    products._precise.cache_clear()
    yield
    products._precise.cache_clear()


def error():
    """Of a product that is large enough for either library."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(300, 300, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    return float((left @ right - exact).norm() / exact.norm())


def check_left_alone():
    """The setting is as before inside, too."""
    before = setting()
    with fast_products():
        assert setting() == before
    assert not products._precise()


def test_products_are_of_float32_inside_and_on_the_threads():
    with fast_products():
        assert error() < 1e-6
    with Threads(torch.device("cpu"), 2) as threads:
        assert max(threads.run([error, error, error])) < 1e-6


@pytest.mark.parametrize("before", ["highest", "high"])
def test_the_setting_is_as_before_when_all_are_out(before, monkeypatch):
    monkeypatch.setattr(products, "_precise", lambda: True)
    usual = setting()
    torch.set_float32_matmul_precision(before)
    try:
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
    def mixed():
        raise RuntimeError("mix of the legacy and new APIs")

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
