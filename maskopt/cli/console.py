"""Consoles of a command: results on stdout, progress and errors on stderr.

Torchrun may start a command several times: `torchrun --nproc-per-node N -m maskopt prune …`. Rank 0 prints;
an error is printed by the first process that meets it.
"""

from __future__ import annotations

import _thread
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from maskopt.core.table import Table as TextTable
from maskopt.errors import printable

if TYPE_CHECKING:
    from maskopt.models.blockwise.distributed import Ranks

#: status after Ctrl-C
INTERRUPTED = 130
#: that torchrun sets for every process
_RUN, _SIZE, _ON_THIS_MACHINE = "TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
#: the processes of this run, and whether its end is being reported
_ranks: Any = None
_ending = False


class _Printable(Console):
    """A console that escapes control characters and line breaks in every text and cell that it prints.

    Texts hold names, paths and messages out of files.
    """

    def render_str(self, text: str, **given: Any) -> Text:
        return super().render_str(printable(text), **given)


#: a pipe or a file has no width: wide enough there for every table. No name or path is markup
_at_terminal = sys.stdout is not None and sys.stdout.isatty()  # None: it was closed
screen = _Printable(width=None if _at_terminal else 120, markup=False, emoji=False)
errors = _Printable(stderr=True, highlight=False)


def make_table(*headings: str, left: int = 1, no_wrap: bool = False, **how: Any) -> Table:
    """Return a table whose columns after the first `left` are right-aligned.

    With `no_wrap` all columns but the first are on one line.
    """
    table = Table(**how)
    for index, heading in enumerate(headings):
        justify: JustifyMethod = "left" if index < left else "right"
        table.add_column(heading, justify=justify, no_wrap=no_wrap and index > 0, overflow="fold")
    return table


def print_table(table: TextTable, *, no_wrap: bool = False, **layout: Any) -> None:
    """Print a table of the library, with a line above a row of totals."""
    layout |= {"title": table.title or None, "caption": table.note or None}
    printed = make_table(*table.headings, left=table.text_columns, no_wrap=no_wrap, **layout)
    printed.title_justify = "left"
    for index, row in enumerate(table.rows, 2):
        printed.add_row(*row, end_section=table.has_total and index == len(table.rows))
    screen.print(printed)


def written(path: Any, what: str = "written") -> None:
    """Print where a result is; nothing for None."""
    if path is not None:
        screen.print(f"{what}: {path}", soft_wrap=True)


def write_text(formatter: Any, text: str | None) -> None:
    """Write paragraphs to a formatter of help pages."""
    for paragraph in (text or "").split("\n\n"):
        formatter.write_paragraph()
        formatter.write_text(" ".join(paragraph.split()))


class _Notice(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        errors.print(record.getMessage(), style="dim", markup=False)


def show_compiling() -> None:
    """Report on stderr when loops are compiled for the first time, which takes some seconds."""
    log = logging.getLogger("maskopt.compile")
    log.setLevel(logging.INFO)
    log.addHandler(_Notice())


def interrupt_again(dropped: sys.UnraisableHookArgs) -> None:
    """Raise a dropped KeyboardInterrupt again, as `sys.unraisablehook`.

    Python drops exceptions inside a destructor or the callback of a weak reference, also that of Ctrl-C.
    """
    if isinstance(dropped.exc_value, KeyboardInterrupt):
        try:
            threading.Timer(0.01, _thread.interrupt_main).start()  # when the callback is through
        except KeyboardInterrupt:  # the timer ended before this call did
            interrupt_again(dropped)
    else:
        sys.__unraisablehook__(dropped)


def ranks() -> Ranks:
    """Return the processes of this run."""
    from maskopt.models.blockwise.distributed import ALONE

    return _ranks or ALONE


def several() -> bool:
    """Return whether torchrun started more than one process."""
    return _RUN in os.environ and int(os.environ.get(_SIZE, "1")) > 1


@contextmanager
def launched() -> Iterator[None]:
    """Join the other processes, where there are several."""
    global _ranks
    if not several():
        yield
        return
    from maskopt.models.blockwise.distributed import joined

    signal.signal(signal.SIGTERM, _interrupt)  # torchrun ends the others so when one ended
    with joined() as _ranks, open(os.devnull, "w") as nowhere:
        said = sys.stderr
        if not _ranks.leads:
            sys.stdout = sys.stderr = nowhere
        try:
            yield
        except Exception:
            if speaks():
                traceback.print_exc(file=said)
            raise SystemExit(1) from None
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, said


def speaks() -> bool:
    """Return whether this process reports the end of the run and its reason: only the first that asks.

    Its stderr is restored, so that the report can be read.
    """
    global _ending
    _ending = True
    if _ranks is None or _ranks.size == 1:
        return True
    from torch.distributed import distributed_c10d

    me = str(_ranks.rank)
    try:
        store = distributed_c10d._get_default_store()
        first = store.compare_set("maskopt/speaks", "", me).decode() == me
    except RuntimeError:  # whoever keeps the store has ended, too
        first = _ranks.leads
    if first and sys.__stderr__ is not None:
        sys.stderr = sys.__stderr__
    return bool(first)


def again(*more: str) -> str:
    """Return the command line as it was typed, with more words at its end."""
    typed = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    words = ["maskopt", *typed, *more]
    if several():
        here, all_of_them = os.environ.get(_ON_THIS_MACHINE), os.environ.get(_SIZE)
        launcher = (
            ["torchrun", "--nproc-per-node", here] if here == all_of_them else ["torchrun", "…"]
        )
        words = [*launcher, "-m", *words]
    return shlex.join(words)


def _interrupt(*_: object) -> None:
    # torchrun's signal may come while this process reports that another is gone: it ends by itself then
    if not _ending:
        raise KeyboardInterrupt
