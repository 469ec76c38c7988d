"""The command line: one thin layer over the library. Each command is declared in a module of this package."""

from __future__ import annotations

import sys

import typer
from rich.markup import escape

from maskopt import __version__
from maskopt.cli import files, information, models, prune, prune_structured, rows, solve, sweep
from maskopt.cli.command import Command, Panels
from maskopt.cli.console import (
    INTERRUPTED,
    errors,
    insist_on_interrupts,
    launched,
    show_compiling,
    speaks,
)
from maskopt.errors import MaskoptError

_MASKS = (files.apply, files.export, files.pack, files.unpack)
#: commands by the headings of `maskopt --help`
PANELS = {
    "Models": (
        *(prune.prune, prune_structured.prune_structured, models.distill),
        *(sweep.sweep, models.evaluate),
    ),
    "Matrices": (solve.solve, rows.compare, rows.bound, rows.export),
    "Files": (files.verify, files.report, *_MASKS),
    "Information": (information.demo, information.solvers),
}
COMMANDS: dict[str, Command] = {one.name: one for panel in PANELS.values() for one in panel}

app = typer.Typer(
    name="maskopt",
    cls=Panels,
    help="Pruning masks for large language models, with a proof of how good they are.",
    no_args_is_help=True,
    epilog="Exit status: 0 done; 1 failure, one line gives the reason; 2 invalid command line; "
    "130 stopped by Ctrl-C.",
    pretty_exceptions_enable=False,
)
_masks = typer.Typer(cls=Panels, no_args_is_help=True)
for _panel, _commands in PANELS.items():
    for _command in _commands:
        _command.register(_masks if _command in _MASKS else app, _panel)
_HELP = "Apply, export, pack and unpack masks."
app.add_typer(_masks, name="masks", help=_HELP, rich_help_panel="Files")

#: in errors of torch on a GPU and on the CPU, for which it has no common class
_NO_MEMORY = ("out of memory", "memory: you tried to allocate")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"maskopt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks of expected errors."),
    version: bool = typer.Option(
        False, "--version", help="Show the version.", is_eager=True, callback=_version
    ),
) -> None:
    """Options before the command's name."""


def main() -> None:
    """Entry point: an expected error is one line on stderr and exit status 1."""
    show_compiling()
    insist_on_interrupts()
    try:
        with launched():
            _run()
    except MaskoptError as error:  # they did not find each other
        _tell(error)
        sys.exit(1)


def _run() -> None:
    try:
        app()
    except (MaskoptError, OSError, MemoryError, RuntimeError) as error:
        known = isinstance(error, MaskoptError | OSError)
        full = isinstance(error, MemoryError) or any(x in str(error) for x in _NO_MEMORY)
        if "--debug" in sys.argv or not (known or full):
            raise
        if speaks():
            _tell(error if known else MaskoptError(_memory_words(error)))
        sys.exit(1)
    except SystemExit as end:
        if end.code == INTERRUPTED and speaks():
            errors.print("stopped")
        raise


def _memory_words(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return (
        f"there is not enough memory{f' ({line})' if line else ''}; free some, take fewer or shorter "
        "windows, or run fewer processes at a time"
    )


def _tell(error: Exception) -> None:
    errors.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, emoji=False)
