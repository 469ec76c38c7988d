"""Progress of a command on stderr: a live view, plain lines, JSON lines, or nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from maskopt.cli.console import errors
from maskopt.core.clock import clock
from maskopt.errors import OptionError, printable

if TYPE_CHECKING:
    from maskopt.models.blockwise.forward import BlockProgress
    from maskopt.models.checkpoints.report import LayerReport

#: seconds before plain lines begin, and between two of them; where nothing is finished meanwhile, more
_FIRST, _BETWEEN = 3.0, 30.0
#: the share of everything from which on it estimates the time that is left
_KNOWN = 0.01
#: seconds between two JSON lines of one step
_APART = 1.0
#: of a block's usual time, what is shown as done at most before it is
_ALMOST = 0.98

_asked: type[View] | None = None


@contextmanager
def view() -> Iterator[View]:
    """Open the view that the options of the command chose."""
    shown = (_asked or (LiveView if errors.is_terminal else PlainView))()
    with shown.live:
        yield shown


@dataclass(frozen=True)
class Step:
    """A step of the work that is shown.

    Attributes:
        what: is being done.
        done, total: of it; None: not known.
        left: estimated seconds to the end of everything; None: not known yet.
        note: what is known so far; a new one reports that something is finished.
        facts: for JSON lines alone.
    """

    what: str
    done: float
    total: float | None
    left: float | None
    note: str
    facts: Mapping[str, Any]


class View:
    """Shows nothing; `live` is what the terminal shows meanwhile."""

    live: AbstractContextManager[Any] = nullcontext()

    def __init__(self) -> None:
        self.began = clock()
        self._first: tuple[float, float] | None = None
        self._last_share = 0.0

    def show(
        self,
        what: str,
        done: float,
        total: float | None,
        *,
        part: float | None = None,
        note: str = "",
        **facts: Any,
    ) -> None:
        """Show the current step, as in `Step`; `part`: the finished share of everything."""
        share = part if part is not None else (done / total if total else 0.0)
        self.take(Step(what, done, total, self._left(share), note, facts))

    def _left(self, share: float) -> float | None:
        """Return the seconds to the end, at the pace since the first step that was shown."""
        now = clock()
        begins_anew = share < self._last_share  # and has a pace of its own
        if self._first is None or begins_anew:
            self._first = now, share
        self._last_share = share
        began, begun = self._first
        if share - begun < _KNOWN or now - began < _FIRST:
            return None
        return (now - began) * (1 - share) / (share - begun)

    def take(self, step: Step) -> None:
        """Show a step, or leave it."""

    def say(self, line: str, **facts: Any) -> None:
        """Show a line that stays; its facts are for JSON lines."""


class LiveView(View):
    """One line that fits the terminal, and a note below it."""

    def __init__(self) -> None:
        super().__init__()
        self._bars = Progress(
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(ratio=3, no_wrap=True, overflow="ellipsis"),
            ),
            BarColumn(bar_width=None, table_column=Column(ratio=2)),
            TextColumn("{task.fields[share]:>4}", table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]:>12}", table_column=Column(no_wrap=True)),
            console=errors,
            expand=True,
        )
        self._task = self._bars.add_task("", total=None, share="", left="")
        self._note = Text(no_wrap=True, overflow="ellipsis", style="dim")
        self.live = Live(Group(self._bars, self._note), console=errors, refresh_per_second=4)

    def take(self, step: Step) -> None:
        self._bars.update(
            self._task,
            description=printable(step.what),
            completed=step.done,
            total=step.total,
            share=f"{step.done / step.total:.0%}" if step.total else "",
            left="" if step.left is None else f"{duration(step.left)} left",
        )
        self._note.plain = printable(step.note)

    def say(self, line: str, **facts: Any) -> None:
        _print(line)


class PlainView(View):
    """A line now and then: when something is finished, else every half minute."""

    def __init__(self) -> None:
        super().__init__()
        self._last = self.began
        self._note = ""

    def take(self, step: Step) -> None:
        now = clock()
        if now - self._last < (_BETWEEN if step.note == self._note and self._note else _FIRST):
            return
        self._last, self._note = now, step.note
        part = f" {step.done / step.total:.0%}" if step.total else ""
        left = "" if step.left is None else f"{duration(step.left)} left"
        _print("; ".join(filter(None, (step.what + part, step.note, left))))

    def say(self, line: str, **facts: Any) -> None:
        _print(line)


class JsonView(View):
    """A JSON object per line: what, done, total, seconds since the beginning and to the end, and facts."""

    def __init__(self) -> None:
        super().__init__()
        self._what, self._last = "", 0.0

    def take(self, step: Step) -> None:
        now = clock()
        ends = step.total is not None and step.done >= step.total
        if not (step.facts or ends or step.what != self._what or now - self._last >= _APART):
            return
        self._what, self._last = step.what, now
        line = {"what": step.what, "done": step.done, "total": step.total}
        line["seconds"] = round(now - self.began, 3)
        line["left"] = None if step.left is None else round(step.left, 1)
        _print(json.dumps({**line, **step.facts}))

    def say(self, line: str, **facts: Any) -> None:
        _print(json.dumps(facts))


class PruneView:
    """A callback that shows the events of a prune.

    The time left is extrapolated from finished blocks, before the first one from the expected time.

    Args:
        expected: seconds that all of it will take; None: nobody knows.
    """

    def __init__(self, view: View, expected: float | None = None) -> None:
        self._view, self._expected = view, expected
        self._block = -1
        self._times: list[float] = []
        self._began = clock()
        self._solved: list[LayerReport] = []

    def __call__(self, event: BlockProgress) -> None:
        if event.block != self._block:
            now = clock()
            # what comes before the first block (gradients, budgets) is none of its time
            if self._block >= 0 and event.block > self._block:
                self._times.append(now - self._began)
            self._block, self._began = event.block, now
        facts: dict[str, Any] = {}
        if event.layer is not None:
            self._solved += [] if event.layer.fallback else [event.layer]
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

    def _part(self, event: BlockProgress) -> float | None:
        """Return the finished share of all blocks."""
        if not self._times:
            gone = clock() - self._view.began
            return min(gone / self._expected, _ALMOST) if self._expected else 0.0
        usual = sum(self._times) / len(self._times)
        inside = min((clock() - self._began) / usual if usual else 0.0, _ALMOST)
        return (event.block + inside) / event.blocks

    def _note(self) -> str:
        words, layers = [], self._solved
        if wanda := sum(x.error_wanda or 0.0 for x in layers):
            words.append(f"error {sum(x.error for x in layers) / wanda:.3f} times that of Wanda")
        rows = sum(x.rows for x in layers)
        if proven := rows - sum(x.statuses.get("feasible", 0) for x in layers):
            words.append(f"{proven:,} of {rows:,} rows proven optimal or 1-swap optimal")
        return "; ".join(words)


def _print(line: str) -> None:
    """Print a line without interpreting markup."""
    errors.print(line, soft_wrap=True, markup=False, emoji=False)


def duration(seconds: float) -> str:
    """Format seconds as `0:07`, `3:20` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_as(*, quiet: bool, log_json: bool) -> None:
    """Choose the view of a command: none, JSON lines, or the usual one."""
    global _asked
    if quiet and log_json:
        raise OptionError("`quiet` and `log_json` exclude each other; choose one")
    _asked = View if quiet else JsonView if log_json else None
    if _asked:  # stderr is to hold JSON alone, or nothing
        logging.getLogger("maskopt.compile").setLevel(logging.WARNING)
