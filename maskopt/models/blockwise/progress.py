"""The progress of a walk through the blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from maskopt.models.checkpoints.report import LayerReport


@dataclass(frozen=True)
class BlockProgress:
    """`done` of `total` samples or layers of a stage of a block; `layer`: one that is done."""

    block: int
    blocks: int
    stage: str
    done: int
    total: int
    layer: LayerReport | None = None


OnBlockProgress = Callable[[BlockProgress], None]


#: called with a number of samples or layers that are done, and the report of a layer
Tick = Callable[..., None]


def ticker(report: OnBlockProgress, block: int, blocks: int, stage: str, total: int) -> Tick:
    """Report that a stage begins; the result is called with what is done of it."""
    done = 0

    def tick(count: int, layer: LayerReport | None = None, /) -> None:
        nonlocal done
        done += count
        report(BlockProgress(block, blocks, stage, done, total, layer))

    report(BlockProgress(block, blocks, stage, 0, total))
    return tick
