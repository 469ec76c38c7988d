"""The command line: one thin layer over the library. Each command is a module of this package."""

from __future__ import annotations

import sys

import typer

from maskopt.cli import (
    apply,
    certify,
    compare,
    demo,
    evaluate,
    extract,
    plan,
    prune,
    solvers,
    verify_output,
)
from maskopt.cli.console import errors, show_compiling
from maskopt.errors import MaskoptError

#: status after Ctrl-C
INTERRUPTED = 130

app = typer.Typer(
    name="maskopt",
    help="Pruning masks for large language models, with a proof of how good they are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("solvers")(solvers.solvers)
app.command("compare")(compare.compare)
app.command("bound")(certify.bound)
app.command("certify")(certify.certify)
app.command("extract")(extract.extract)
app.command("prune")(prune.prune)
app.command("plan")(plan.plan)
app.command("eval")(evaluate.evaluate)
app.command("verify")(verify_output.verify)
app.command("apply")(apply.apply)
app.command("extract-masks")(apply.extract_masks)


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks of expected errors."),
) -> None:
    """Options before the command's name."""


def main() -> None:
    """Entry point: an expected error is one line on stderr and exit status 1."""
    show_compiling()
    try:
        app()
    except MaskoptError as error:
        if "--debug" in sys.argv:
            raise
        errors.print(f"[red]error:[/red] {error}", soft_wrap=True)
        sys.exit(1)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            errors.print("stopped")
        raise
