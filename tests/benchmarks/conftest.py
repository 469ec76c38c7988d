"""Options of the benchmarks."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where benchmarks that can choose run: cpu, cuda, cuda:1, …",
    )


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device asked for."""
    return torch.device(request.config.getoption("--device"))
