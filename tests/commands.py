"""The command line, called in the process of a test: its result, or status and words."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import pytest
import typer.testing

from maskopt.cli import app, main

TESTS = Path(__file__).parent
ROOT = TESTS.parent
# Typer makes the tree of all commands for every call, which takes longer than most calls
typer.main.get_command = typer.testing._get_command = cache(typer.main.get_command)


def import_path(file: str) -> str:
    """PYTHONPATH of a worker process that imports what this test file defines."""
    return os.pathsep.join([os.path.dirname(file), str(TESTS)])


def run(*arguments: object, fails: type[Exception] | None = None) -> str:
    """What the command prints, or says of the exception that it must end with."""
    result = typer.testing.CliRunner().invoke(app, [str(a) for a in arguments])
    if fails is not None:
        assert isinstance(result.exception, fails), (result.output, result.exception)
        return str(result.exception)
    assert result.exception is None, (result.output, result.exception)
    return result.output


def ended(*arguments: object, columns: int | None = None) -> subprocess.CompletedProcess[str]:
    """Status and words as from a shell, without the seconds of a process to import all packages."""
    words, status, out, err = [str(a) for a in arguments], 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["maskopt", *words])
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)
        patch.setattr(logging.getLogger("maskopt.compile"), "handlers", [])
        patch.setattr("typer.rich_utils.MAX_WIDTH", columns)
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else end.code is not None
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())
