"""Where the command line prints: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import _thread
import logging
import sys
import threading
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

#: status after Ctrl-C
INTERRUPTED = 130
#: a pipe or a file has no width: wide enough there for every table. Names and paths are printed as they are.
_PLAIN = {"markup": False, "emoji": False}
_at_terminal = sys.stdout is not None and sys.stdout.isatty()  # None: it was closed
output = Console(**_PLAIN) if _at_terminal else Console(width=120, **_PLAIN)  # type: ignore[arg-type]
errors = Console(stderr=True, highlight=False)


class _Notice(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        errors.print(record.getMessage(), style="dim")


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
        threading.Timer(0.01, _thread.interrupt_main).start()  # when the callback is through
    else:
        sys.__unraisablehook__(dropped)
