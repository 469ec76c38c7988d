"""The command line: one thin layer over the library. Each command is declared in a module of this package."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from maskopt._version import __version__
from maskopt.cli.console import (
    INTERRUPTED,
    errors,
    interrupt_again,
    launched,
    show_compiling,
    speaks,
    write_text,
)
from maskopt.errors import MaskoptError

if TYPE_CHECKING:
    from maskopt.cli.command import Command

#: commands by the headings of `maskopt --help`, and the function of each
PANELS = {
    "Models": {
        "prune": "prune:prune",
        "prune-structured": "models:prune_structured",
        "distill": "models:distill",
        "sweep": "prune:sweep",
        "eval": "models:evaluate",
    },
    "Matrices": {
        "solve": "solve:solve",
        "compare": "rows:compare",
        "bound": "rows:bound",
        "export": "rows:export",
    },
    "Files": {"verify": "files:verify", "report": "files:report", "masks": ""},
    "Information": {"demo": "models:demo", "solvers": "solve:solvers"},
}
_MASKS = {"Commands": {name: f"files:{name}" for name in ("apply", "export")}}
_OF_MASKS = "Apply and export masks."


def summary(function: str) -> str:
    """Return the first sentence of the docstring of `module:function`, read from its source: see `load`."""
    if not function:
        return _OF_MASKS
    module, _, name = function.partition(":")
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    found = (x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef) and x.name == name)
    return " ".join(str(ast.get_docstring(next(found))).split("\n\n")[0].split())


def load(function: str) -> Command:
    """Return the command of `module:function` in this package.

    Its modules import torch, which takes seconds: the help page of all commands does not load them.
    """
    module, _, name = function.partition(":")
    found: Command = getattr(importlib.import_module(f"maskopt.cli.{module}"), name)
    return found


def all_commands() -> dict[str, Command]:
    """Return every command by its name."""
    panels = (*PANELS.values(), *_MASKS.values())
    loaded = [load(function) for panel in panels for function in panel.values() if function]
    return {one.name: one for one in loaded}


class Group(TyperGroup):
    """Commands that are loaded when they run, listed by panel."""

    panels: ClassVar[dict[str, dict[str, str]]] = PANELS

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.functions = {name: x for panel in self.panels.values() for name, x in panel.items()}
        # names only: typer suggests one of them after a typing error
        names = self.functions
        self.commands = {name: self.commands.get(name) or TyperCommand(name) for name in names}

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        function = self.functions.get(cmd_name)
        return load(function).typed() if function else self.commands.get(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write_usage(ctx.command_path, "[OPTIONS] COMMAND [ARGUMENTS]...")
        write_text(formatter, self.help)
        records = (one.get_help_record(ctx) for one in self.get_params(ctx))
        panels = {
            panel: [(name, summary(function)) for name, function in of.items()]
            for panel, of in self.panels.items()
        }
        panels["Options"] = [record for record in records if record]
        for panel, lines in panels.items():
            with formatter.section(panel):
                formatter.write_dl(lines, col_max=26)
        write_text(formatter, self.epilog)


class _MaskGroup(Group):
    panels = _MASKS


app = typer.Typer(
    name="maskopt",
    cls=Group,
    help="Pruning masks for large language models, with a proof of how good they are.",
    no_args_is_help=True,
    epilog="Exit status: 0 done; 1 failure, one line gives the reason; 2 invalid command line; "
    "130 stopped by Ctrl-C.",
    pretty_exceptions_enable=False,
)
_masks = typer.Typer(cls=_MaskGroup, no_args_is_help=True)
_masks.callback()(lambda: None)
app.add_typer(_masks, name="masks", help=_OF_MASKS)

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
    # read when torch loads OpenMP: threads that spin for the cores of other programs take ten times as long
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    show_compiling()
    sys.unraisablehook = interrupt_again
    try:
        with launched():
            _run()
    except MaskoptError as error:  # they did not find each other
        _tell(str(error))
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
            line = (str(error).strip().splitlines() or [""])[0]
            no_memory = (
                f"there is not enough memory{f' ({line})' if line else ''}; free some, take fewer or shorter "
                "windows, or run fewer processes at a time"
            )
            _tell(str(error) if known else no_memory)
        sys.exit(1)
    except SystemExit as end:
        if end.code == INTERRUPTED and speaks():
            errors.print("stopped")
        raise


def _tell(what: str) -> None:
    errors.print(f"[red]error:[/red] {escape(what)}", soft_wrap=True, emoji=False)
