"""Where the command line prints: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import _thread
import logging
import sys
import threading
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskopt.errors import printable

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

#: status after Ctrl-C
INTERRUPTED = 130
#: nothing in a name or a path is markup
_PLAIN = {"markup": False, "emoji": False}


class _Printable(Console):
    """A console that escapes control characters and line breaks in every text and cell that it prints: these
    hold names, paths and messages out of files."""

    def render_str(self, text: str, **given: Any) -> Text:
        return super().render_str(printable(text), **given)


#: a pipe or a file has no width: wide enough there for every table
_at_terminal = sys.stdout is not None and sys.stdout.isatty()  # None: it was closed
screen = _Printable(width=None if _at_terminal else 120, **_PLAIN)  # type: ignore[arg-type]
errors = _Printable(stderr=True, highlight=False)


#: cells of a bound that is not known, and of its gap
NO_BOUND = ("–", "–")


def make_table(*headings: str, left: int = 1, no_wrap: bool = False, **how: Any) -> Table:
    """A table whose columns after the first `left` are right-aligned and, with `no_wrap`, not wrapped."""
    table = Table(**how)
    for index, heading in enumerate(headings):
        text = index < left
        table.add_column(
            heading,
            justify="left" if text else "right",
            no_wrap=no_wrap and not text,
            overflow="fold",
        )
    return table


def bound_cells(record: Any) -> tuple[str, str]:
    """Bound and gap of a record of `compare` or `bound`, in the original units of the row."""
    if not record.bounded or record.gap != record.gap:
        return NO_BOUND
    return f"{record.value_bound:.6g}", f"{record.gap:.2%}"


def written(path: Any, what: str = "written") -> None:
    """Print where a result is."""
    screen.print(f"{what}: {path}", soft_wrap=True)


class _Notice(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        errors.print(record.getMessage(), style="dim", markup=False)


def show_compiling() -> None:
    """Say on stderr when loops are compiled for the first time, which takes some seconds."""
    log = logging.getLogger("maskopt.compile")
    log.setLevel(logging.INFO)
    log.addHandler(_Notice())


def hush_compiling() -> None:
    """Nothing of it, where stderr is to hold JSON alone, or nothing."""
    logging.getLogger("maskopt.compile").setLevel(logging.WARNING)


def insist_on_interrupts() -> None:
    """Make a Ctrl-C count wherever it falls. Python drops what is raised inside a destructor or the
    callback of a weak reference; a KeyboardInterrupt dropped there is raised again just after."""
    sys.unraisablehook = _interrupt_again


def _interrupt_again(dropped: UnraisableHookArgs) -> None:
    if isinstance(dropped.exc_value, KeyboardInterrupt):
        try:
            threading.Timer(0.01, _thread.interrupt_main).start()  # when the callback is through
        except KeyboardInterrupt:  # the timer ended before this call did
            _interrupt_again(dropped)
    else:
        sys.__unraisablehook__(dropped)
