"""Runs that are interrupted on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tokens
from torch import Tensor

from maskopt import prune_model
from maskopt.models.blockwise.progress import BlockProgress

OPTIONS: dict[str, Any] = {
    "sparsity": 0.5, "solver": "elimination", "start": "wanda", "min_tokens": 1,
}  # fmt: skip


class Stop(Exception):
    pass


def interrupted(
    dense: Path, out: Path, block: int, stage: str, data: Tensor | None = None, **options: Any
) -> None:
    def stop(event: BlockProgress) -> None:
        if (event.block, event.stage) == (block, stage) and event.done:
            raise Stop

    data = tokens() if data is None else data
    with pytest.raises(Stop):
        prune_model(dense, data, output=out, on_progress=stop, **{**OPTIONS, **options})


def stop_at(count: int) -> Callable[[int, int], None]:
    """An `on_progress` that interrupts the run when so many jobs are finished."""

    def stop(done: int, total: int) -> None:
        if done == count:
            raise KeyboardInterrupt

    return stop
