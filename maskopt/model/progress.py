"""How a walk through the blocks tells of its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockProgress:
    """Told to `on_progress`: `done` of `total` samples or layers of one stage of one block."""

    block: int
    blocks: int
    stage: str
    done: int
    total: int


OnBlockProgress = Callable[[BlockProgress], None]


def ticker(
    report: OnBlockProgress, block: int, blocks: int, stage: str, total: int
) -> Callable[[int], None]:
    """Tell `report` that a stage begins; what is returned counts what is done of it."""
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        report(BlockProgress(block, blocks, stage, done, total))

    report(BlockProgress(block, blocks, stage, 0, total))
    return tick
