"""The command line, called from tests: in this process, or as from a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from maskopt.cli import app

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def import_path(file: str) -> str:
    """PYTHONPATH of a worker process that imports what this test file defines."""
    return os.pathsep.join([os.path.dirname(file), str(TESTS)])


def run(*arguments: object, fails: type[Exception] | None = None) -> str:
    """What the command prints, or says of the exception that it must end with."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if fails is not None:
        assert isinstance(result.exception, fails), (result.output, result.exception)
        return str(result.exception)
    assert result.exception is None, (result.output, result.exception)
    return result.output


def process(
    *arguments: str, cwd: Path | None = None, columns: int | None = None
) -> subprocess.CompletedProcess[str]:
    """As from a shell of so many columns: a process of its own, with its status and what it says."""
    command = [sys.executable, "-c", "from maskopt.cli import main; main()", *arguments]
    wide = {} if columns is None else {"COLUMNS": str(columns), "TERMINAL_WIDTH": str(columns)}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **wide}
    )
