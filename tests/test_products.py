"""float32 products by the faster library: as precise, and the setting is as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from maskopt.model import products
from maskopt.model.products import fast_products
from maskopt.model.threads import Threads

SETTING = getattr(torch.backends.mkldnn, "matmul", None)
has_setting = pytest.mark.skipif(SETTING is None, reason="torch 2.9 has the setting")


@pytest.fixture
def fresh() -> Iterator[None]:
    """What a product said of this processor is asked for again, before and after."""
    products._precise.cache_clear()
    yield
    products._precise.cache_clear()


def error() -> float:
    """Of a product that is large enough for either library."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(300, 300, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    return float((left @ right - exact).norm() / exact.norm())


def test_products_are_of_float32_inside_and_on_the_threads() -> None:
    with fast_products():
        assert error() < 1e-6
    with Threads(torch.device("cpu"), 2) as threads:
        assert max(threads.run([error, error, error])) < 1e-6


@has_setting
def test_the_setting_is_as_before_when_all_are_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_precise", lambda: True)
    before = SETTING.fp32_precision  # type: ignore[union-attr]
    with fast_products():
        with fast_products():
            assert SETTING.fp32_precision == "bf16"  # type: ignore[union-attr]
        assert SETTING.fp32_precision == "bf16"  # type: ignore[union-attr]
    assert before == SETTING.fp32_precision  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError), fast_products():
        raise ZeroDivisionError
    assert before == SETTING.fp32_precision  # type: ignore[union-attr]


@has_setting
def test_a_processor_that_rounds_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    before = SETTING.fp32_precision  # type: ignore[union-attr]
    exact = torch.Tensor.__matmul__

    def rounded(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype == torch.float32 and SETTING.fp32_precision == "bf16":  # type: ignore[union-attr]
            return exact(left.bfloat16(), right.bfloat16()).float()
        return exact(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    with fast_products():
        assert before == SETTING.fp32_precision  # type: ignore[union-attr]
    assert not products._precise()


def test_an_older_torch_is_left_alone(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setattr(products, "_SETTING", None)
    with fast_products():
        assert error() < 1e-6
