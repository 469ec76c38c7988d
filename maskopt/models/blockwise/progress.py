"""How a walk through the blocks tells of its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from maskopt.models.checkpoints.report import LayerReport


@dataclass(frozen=True)
class BlockProgress:
    """Told to `on_progress`: `done` of `total` samples or layers of one stage of one block; of a prune, with
    what became of a layer that is done."""

    block: int
    blocks: int
    stage: str
    done: int
    total: int
    layer: LayerReport | None = None


OnBlockProgress = Callable[[BlockProgress], None]


class Tick(Protocol):
    """Counts what is done of a stage."""

    def __call__(self, count: int, layer: LayerReport | None = None, /) -> None: ...


def ticker(report: OnBlockProgress, block: int, blocks: int, stage: str, total: int) -> Tick:
    """Tell `report` that a stage begins; what is returned counts what is done of it."""
    done = 0

    def tick(count: int, layer: LayerReport | None = None, /) -> None:
        nonlocal done
        done += count
        report(BlockProgress(block, blocks, stage, done, total, layer))

    report(BlockProgress(block, blocks, stage, 0, total))
    return tick
