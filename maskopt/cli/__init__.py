"""The command line: one thin layer over the library. Each command is a module of this package."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import typer
from rich.markup import escape

from maskopt import __version__
from maskopt.cli import (
    bound,
    compare,
    demo,
    distill,
    evaluate,
    export,
    gram,
    masks,
    prune,
    prune_structured,
    report,
    solve,
    solvers,
    sweep,
    verify_output,
)
from maskopt.cli.console import INTERRUPTED, errors, insist_on_interrupts, show_compiling
from maskopt.cli.examples import EXAMPLES, STATUSES
from maskopt.cli.flags import FlagCommand
from maskopt.cli.ranks import launched, several, speaks
from maskopt.cli.view import with_view
from maskopt.errors import MaskoptError, OptionError

app = typer.Typer(
    name="maskopt",
    help="Pruning masks for large language models, with a proof of how good they are.",
    no_args_is_help=True,
    epilog=STATUSES,
    pretty_exceptions_enable=False,
)
COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Models": {
        "prune": prune.prune,
        "prune-structured": prune_structured.prune_structured,
        "distill": distill.distill,
        "gram": gram.gram,
        "sweep": sweep.sweep,
        "eval": evaluate.evaluate,
    },
    "Matrices": {
        "solve": solve.solve,
        "compare": compare.compare,
        "bound": bound.bound,
        "export": export.export,
    },
    "Files": {
        "verify": verify_output.verify,
        "report": report.report,
        "masks apply": masks.apply,
        "masks export": masks.export,
        "masks pack": masks.pack,
        "masks unpack": masks.unpack,
    },
    "Information": {"demo": demo.demo, "solvers": solvers.solvers},
}


def _alone(command: Callable[..., None]) -> Callable[..., None]:
    """The command, refused where torchrun starts it several times."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        if several():
            raise OptionError(
                f"only {' and '.join(SHARED)} run as several processes; start this command without torchrun"
            )
        command(**given)

    return run


#: commands that several processes can share
SHARED = ("prune", "gram")
_masks = typer.Typer(no_args_is_help=True)
for _panel, _commands in COMMANDS.items():
    for _name, _command in _commands.items():
        _group, _, _last = _name.rpartition(" ")
        _shown = with_view(_command if _name in SHARED else _alone(_command))
        (_masks if _group else app).command(
            _last,
            cls=FlagCommand,
            epilog=f"Example: {EXAMPLES[_name]}",
            rich_help_panel=None if _group else _panel,
        )(_shown)
app.add_typer(
    _masks,
    name="masks",
    help="Apply, export, pack and unpack masks.",
    rich_help_panel="Files",
)


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
        if "--debug" in sys.argv or not (known or _out_of_memory(error)):
            raise
        if speaks():
            _tell(error if known else MaskoptError(_memory_words(error)))
        sys.exit(1)
    except SystemExit as end:
        if end.code == INTERRUPTED and speaks():
            errors.print("stopped")
        raise


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)


def _memory_words(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return (
        f"there is not enough memory{f' ({line})' if line else ''}; free some, take fewer or shorter "
        "windows, or run fewer processes at a time"
    )


def _tell(error: Exception) -> None:
    errors.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, emoji=False)
