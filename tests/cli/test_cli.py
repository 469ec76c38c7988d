"""The command line as a user meets it: one clear line for an expected error, no traceback."""

import re
import subprocess
import sys
from io import StringIO

import numpy as np
import pytest
import torch
from commands import process, run
from rich.console import Console
from typer.testing import CliRunner

import maskopt
from maskopt import RowProblem, Unstructured, available_solvers
from maskopt.cli import app, solvers


def test_a_narrow_terminal_has_names_and_reasons(monkeypatch):
    monkeypatch.setattr(solvers, "output", Console(width=80, markup=False))
    shown = StringIO()
    Console(width=80, markup=False, file=shown).print(solvers._solvers())
    words = "".join(shown.getvalue().replace("│", " ").split())
    for name, info in available_solvers().items():
        assert name in shown.getvalue()
        if not info.available:
            assert "unavailable" in words
    assert all(len(line) <= 80 for line in shown.getvalue().splitlines())
    assert shown.getvalue().count("optimality") >= 5


def test_solvers_lists_every_backend():
    result = process("solvers")
    assert result.returncode == 0, result.stderr
    for name in available_solvers():
        assert f" {name} " in result.stdout


def test_help_names_every_command():
    result = process("--help")
    assert result.returncode == 0, result.stderr
    names = [command.name for command in app.registered_commands]
    assert len(names) > 1
    listed = re.findall(r"^│ (\S+) ", result.stdout, re.MULTILINE)
    assert [name for name in listed if not name.startswith("-")] == names


@pytest.mark.parametrize("command", [command.name for command in app.registered_commands])
def test_every_command_explains_itself(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"maskopt {command} [OPTIONS]" in result.output


@pytest.mark.parametrize("arguments", [("no-such-command",), ("solvers", "--no-such-option")])
def test_usage_errors_exit_with_2_and_no_traceback(arguments):
    result = process(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "No such" in result.stderr


def test_an_error_is_printed_as_it_is(tmp_path):
    """Brackets and colons are no markup."""
    result = process("bound", str(tmp_path / "[red]:M:.npz"))
    assert result.returncode == 1
    assert "[red]:M:.npz" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: np.empty(2**58),
        lambda: torch.empty(2**55),
        lambda: (_ for _ in ()).throw(MemoryError()),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.\nTried")),
        lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: out of memory")),
    ],
)
def test_too_little_memory_is_one_line(allocate, monkeypatch, capsys):
    monkeypatch.setattr("maskopt.cli.app", lambda: list(allocate()))
    monkeypatch.setattr("sys.argv", ["maskopt"])
    with pytest.raises(SystemExit) as end:
        maskopt.cli._run()
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: there is not enough memory")
    assert said.count("\n") == 1


def test_another_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("maskopt.cli.app", lambda: [][0:0].pop())
    with pytest.raises(IndexError):
        maskopt.cli._run()


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits of files, and /dev/full")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    row = RowProblem(np.ones(40), np.eye(40), Unstructured(0.5))
    row.save(tmp_path / "row.npz")
    command = f"{sys.executable} -m maskopt solve row.npz --solver wanda --output found.npz"
    for shell, said in (
        (f"ulimit -f 1; exec {command}", "File too large: 'found.npz'"),
        (f"exec {command} > /dev/full", "No space left on device"),
    ):
        result = subprocess.run(
            ["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 1
        assert said in result.stderr
        assert "Traceback" not in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"row.npz", "found.npz"}


@pytest.mark.skipif(sys.platform != "linux", reason="needs a shell")
def test_nobody_need_listen(tmp_path):
    RowProblem(np.ones(8), np.eye(8), Unstructured(0.5)).save(tmp_path / "row.npz")
    command = f"exec {sys.executable} -m maskopt solve row.npz --solver wanda --output s.npz >&-"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "s.npz").exists()


def test_the_version():
    assert run("--version") == f"maskopt {maskopt.__version__}\n"
