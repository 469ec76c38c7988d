"""The command line, called in the process of a test: its result, or status and words."""

import io
import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pyscipopt
import pytest
from typer.testing import CliRunner

from maskopt.cli import app, main

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


def shows(text: str, *parts: str) -> None:
    """All of these are in the text."""
    missing = [part for part in parts if part not in text]
    assert not missing, (missing, text)


def scip_value(path: Path) -> float:
    """What SCIP finds to be the least value of the model in a file."""
    model = pyscipopt.Model()
    model.hideOutput()
    model.readProblem(str(path))
    model.optimize()
    return float(model.getObjVal())


def interrupt(patch: pytest.MonkeyPatch, owner: object, name: str, after: int) -> None:
    """A call after so many is Ctrl-C."""
    calls, original = itertools.count(), getattr(owner, name)

    def interrupted(*given: object) -> object:
        if next(calls) == after:
            raise KeyboardInterrupt
        return original(*given)

    patch.setattr(owner, name, interrupted)


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, as on a full disk."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def ended(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Status and words as from a shell, without the seconds of a process to import all packages."""
    words, status, out, err = [str(a) for a in arguments], 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["maskopt", *words])
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)
        patch.setattr(logging.getLogger("maskopt.compile"), "handlers", [])
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else end.code is not None
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())
