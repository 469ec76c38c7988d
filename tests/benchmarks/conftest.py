"""Options of the benchmarks."""

from __future__ import annotations

import pytest
import torch

from maskopt.models.checkpoints.bos import BOS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where benchmarks that can choose run: cpu, cuda, cuda:1, …",
    )
    parser.addoption(
        "--bos", choices=BOS, default="auto", help="what windows of calibration text begin with"
    )


@pytest.fixture
def bos(request: pytest.FixtureRequest) -> str:
    """What windows begin with."""
    return str(request.config.getoption("--bos"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device asked for."""
    return torch.device(request.config.getoption("--device"))
