"""What a prune shows while it works: block, layer, errors relative to Wanda's, rows proven."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from maskopt.cli.view import View
from maskopt.core.limits import clock

if TYPE_CHECKING:
    from maskopt.models.blockwise.progress import BlockProgress

#: of a block's usual time, what is shown as done at most before it is
_ALMOST = 0.98


class PruneView:
    """Takes a prune's events and shows them; the time left is by the blocks that are done, before that by
    what was expected.

    Args:
        expected: seconds that all of it will take; None: nobody knows.
    """

    def __init__(self, view: View, expected: float | None = None) -> None:
        self._view, self._expected = view, expected
        self._block = -1
        self._times: list[float] = []
        self._began = clock()
        self._error = self._wanda = 0.0
        self._rows = self._proven = 0

    def __call__(self, event: BlockProgress) -> None:
        if event.block != self._block:
            self._next(event.block)
        facts: dict[str, Any] = {}
        if event.layer is not None:
            self._count(event)
            facts = {"layer": asdict(event.layer)}
        after = event.block == event.blocks  # all blocks are done
        what = event.stage if after else f"block {event.block + 1} of {event.blocks}: {event.stage}"
        self._view.show(
            what,
            event.done,
            event.total or None,
            part=None if after else self._part(event),
            note=self._note(),
            **facts,
        )

    def _next(self, block: int) -> None:
        now = clock()
        # what comes before the first block (gradients, budgets) is none of its time
        if self._block >= 0 and block > self._block:
            self._times.append(now - self._began)
        self._block, self._began = block, now

    def _part(self, event: BlockProgress) -> float | None:
        """Of all blocks, what is done."""
        if not self._times:
            gone = clock() - self._view.began
            return min(gone / self._expected, _ALMOST) if self._expected else 0.0
        usual = sum(self._times) / len(self._times)
        inside = min((clock() - self._began) / usual if usual else 0.0, _ALMOST)
        return (event.block + inside) / event.blocks

    def _count(self, event: BlockProgress) -> None:
        layer = event.layer
        assert layer is not None
        if layer.fallback:
            return
        self._error += layer.error
        self._wanda += layer.error_wanda or 0.0
        self._rows += layer.rows
        self._proven += sum(n for name, n in layer.statuses.items() if name != "feasible")

    def _note(self) -> str:
        words = []
        if self._wanda:
            words.append(f"error {self._error / self._wanda:.3f} times that of Wanda")
        if self._proven:
            words.append(
                f"{self._proven:,} of {self._rows:,} rows proven optimal or 1-swap optimal"
            )
        return "; ".join(words)
