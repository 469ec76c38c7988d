"""KL of two models' next tokens, and its derivative, position by position."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from maskopt.model.divergence import divergence


@pytest.mark.parametrize("positions", [1, 4, 11])
def test_value_and_derivative_are_those_of_torch(positions: int) -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, found = (5 * torch.randn(positions, 300, generator=generator) for _ in range(2))
    exact = found.double().requires_grad_()
    p = wanted.double().log_softmax(1)
    loss = functional.kl_div(exact.log_softmax(1), p, reduction="sum", log_target=True)
    (derivative,) = torch.autograd.grad(loss, exact)
    slope = torch.empty_like(found)
    value = divergence(wanted, found, slope)
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(slope.double(), derivative, atol=1e-6)
    assert torch.equal(divergence(wanted, found, None), value)


def test_a_model_is_at_no_distance_from_itself() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    slope = torch.empty_like(logits)
    assert float(divergence(logits, logits.clone(), slope)) == 0.0
    assert float(slope.abs().max()) == 0.0
