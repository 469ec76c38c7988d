"""The command line as a user meets it: helps and statuses, examples that it takes, and one clear line for
an expected error."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from io import StringIO

import numpy as np
import pytest
import torch
import typer
from commands import ROOT, ended, run
from rich.console import Console

import maskopt
from maskopt import RowProblem, Unstructured, available_solvers
from maskopt.cli import COMMANDS, app, config, solvers
from maskopt.cli.examples import EXAMPLES
from maskopt.solvers import Swap

NAMES = [name for commands in COMMANDS.values() for name in commands]


def test_solvers_and_their_options_are_listed(monkeypatch):
    """In a pipe, and in a narrow terminal with names and reasons."""
    listed = run("solvers")
    monkeypatch.setattr(solvers, "output", Console(width=80, markup=False))
    Console(width=80, markup=False, file=(shown := StringIO())).print(solvers._solvers())
    words = "".join(shown.getvalue().replace("│", " ").split())
    for name, info in available_solvers().items():
        assert f" {name} " in listed
        assert name in shown.getvalue()
        assert info.available or "unavailable" in words
    assert all(len(line) <= 80 for line in shown.getvalue().splitlines())
    assert shown.getvalue().count("optimality") >= 5
    of_swap = run("solvers", "swap")
    assert "swap: options" in of_swap
    assert all(field.name in of_swap for field in dataclasses.fields(Swap))


def test_helps_name_every_command_and_fit_the_terminal():
    result = ended("--help", columns=120)
    assert result.returncode == 0, result.stderr
    assert set(NAMES) == set(EXAMPLES)
    assert len(LINES) >= 40
    listed = re.findall(r"^│ (\S+) ", result.stdout, re.MULTILINE)
    first = dict.fromkeys(name.split()[0] for name in NAMES)  # of a group, its name
    assert [name for name in listed if not name.startswith("-")] == [*first]
    listed = re.findall(r"^│ (\S+) ", ended("masks", "--help").stdout, re.MULTILINE)
    assert listed[1:] == ["apply", "export", "pack", "unpack"]
    assert "Exit status: 0 done" in result.stdout
    assert run("--version") == f"maskopt {maskopt.__version__}\n"
    for name in NAMES:
        assert f"maskopt {name} [OPTIONS]" in ended(*name.split(), "--help").stdout
    lines = (shown := ended("prune", "--help", columns=80).stdout).splitlines()
    assert max(map(len, lines)) <= 80
    panels = [line.split("─")[1].strip() for line in lines if line.startswith("╭")]
    assert panels == [
        "Arguments", "Options", "What is pruned", "How", "Calibration", "Machine", "Output",
    ]  # fmt: skip
    assert "Example: maskopt prune" in shown
    assert "resume" in shown
    assert "--damping" not in shown
    assert "--damping" in ended("prune", "--help-all").stdout


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("no-such-command", 2, "No such"),
        ("solvers --no-such-option", 2, "No such"),
        ("bound no/[red]:M:.npz", 1, "[red]:M:.npz"),  # brackets and colons are no markup
        ("prune M --sparsity 0.5 --calibration t", 1, "--output is missing"),
        ("solve row.npz --output s.npz --jobs 2", 1, "--jobs is for --prove"),
        ("solve row.npz --output s.npz --prove --solver swap", 1, "--prove takes the solver"),
        ("bound OUT --original M --calibration t --sparsity 0.5", 1, "--sparsity is of masks"),
        ("bound OUT OUT --original M --calibration t", 1, "--original is of one pruned folder"),
        ("bound OUT --original M", 1, "--calibration is missing"),
        ("solvers swap", 1, "error: only prune and gram run as several processes"),
    ],
)
def test_errors_have_a_status_and_no_traceback(words, status, said, monkeypatch):
    if words == "solvers swap":  # where torchrun started two of them
        monkeypatch.setattr("maskopt.cli.several", lambda: True)
    result = ended(*words.split())
    assert result.returncode == status
    assert "Traceback" not in result.stderr
    assert said in result.stderr


def test_too_little_memory_is_one_line_and_another_error_keeps_its_traceback(monkeypatch):
    def fails(error):
        raise error

    for allocate in (
        lambda: np.empty(2**58),
        lambda: torch.empty(2**55),
        lambda: fails(MemoryError()),
        lambda: fails(torch.OutOfMemoryError("CUDA out of memory.\nTried")),
        lambda: fails(RuntimeError("CUDA error: out of memory")),
    ):
        monkeypatch.setattr("maskopt.cli.app", allocate)
        result = ended()
        assert result.returncode == 1
        assert result.stderr.startswith("error: there is not enough memory")
        assert result.stderr.count("\n") == 1
    monkeypatch.setattr("maskopt.cli.app", lambda: fails(IndexError()))
    with pytest.raises(IndexError):
        ended()


SOLVE = ["solve", "row.npz", "--solver", "wanda", "--output", "s.npz"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs limits of files, and /dev/full")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    import resource

    monkeypatch.chdir(tmp_path)
    RowProblem(np.ones(40), np.eye(40), Unstructured(0.5)).save("row.npz")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        result = ended(*SOLVE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.returncode == 1
    assert "File too large: 's.npz'" in result.stderr
    assert os.listdir() == ["row.npz"]
    command = shlex.join([sys.executable, "-m", "maskopt", *SOLVE, "--overwrite"])
    # of a closed stdout nothing is said: nobody need listen
    for to, said in (("> /dev/full", "No space left on device"), (">&-", "")):
        result = subprocess.run(
            ["bash", "-c", f"exec {command} {to}"], capture_output=True, text=True
        )
        assert result.returncode == bool(said), result.stderr
        assert said in result.stderr
        assert "Traceback" not in result.stderr
        assert sorted(os.listdir()) == ["row.npz", "s.npz"]


# Lines that the documents show, and examples of the helps -------------------------------------

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: what a file of --config stands for here
GIVEN = {"model": "MODEL", "calibration": "text.txt", "out": "OUT", "sparsity": 0.5}


def in_blocks(page):
    """Lines that call the program, in blocks of code: `$ maskopt …`, or indented."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ |    )(?:torchrun .* -m )?(maskopt .*)$", text, re.MULTILINE)
    parts = [p for line in lines for p in re.split(r" && | \| | > ", line.split("  #")[0])]
    return {part.strip() for part in parts if part.startswith("maskopt ") and "…" not in part}


LINES = sorted({line for page in PAGES for line in in_blocks(page)} | set(EXAMPLES.values()))
COMMAND = typer.main.get_command(app)


@pytest.mark.parametrize("line", LINES)
def test_the_line_is_taken(line, monkeypatch):
    monkeypatch.setattr(config, "read_config", lambda path, parameters: GIVEN)
    name, *arguments = shlex.split(line, comments=True)[1:]
    command = COMMAND.commands[name]
    if name == "masks":
        command, name = command.commands[arguments[0]], arguments.pop(0)
    with command.make_context(name, arguments) as context:
        assert context.args == []  # nothing is left over
        source = {p.name: context.get_parameter_source(p.name).name for p in command.params}
    flags = [word for word in arguments if word.startswith("-") and len(word) > 1]
    known = {flag: p.name for p in command.params for flag in (*p.opts, *p.secondary_opts)}
    assert {source[known[flag]] for flag in flags} <= {"COMMANDLINE"}
