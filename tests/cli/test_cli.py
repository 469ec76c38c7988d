"""The command line as a user meets it: helps and statuses, examples that it takes, and one clear line for
an expected error."""

import dataclasses
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from io import StringIO

import numpy as np
import pytest
import torch
import typer
from commands import ROOT, ended, run
from rich.console import Console

import maskopt
from maskopt import RowProblem, Unstructured, available_solvers
from maskopt.cli import PANELS, all_commands, app, information
from maskopt.cli.command import flag
from maskopt.core.fields import JSON_FILE, RECORDED, REQUIRED, options_of
from maskopt.models.options.distill import DistillOptions
from maskopt.models.options.prune import PruneOptions
from maskopt.models.options.structured import ShrinkOptions
from maskopt.models.options.walk import WalkOptions
from maskopt.solvers import Swap

TRUST = "trust_remote_code"
CUT = {PruneOptions: {}, ShrinkOptions: {"heads": 0.5}}

COMMANDS = all_commands()
EXAMPLES = {name: command.example for name, command in COMMANDS.items()}


def test_solvers_and_their_options_are_listed(monkeypatch):
    """In a pipe, and in a narrow terminal with names and reasons."""
    listed = run("solvers")
    monkeypatch.setattr(information, "screen", Console(width=80, markup=False))
    Console(width=80, markup=False, file=(shown := StringIO())).print(information._solvers())
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


def test_helps_name_every_command_and_fit_two_screens():
    shown = ended("--help").stdout
    assert len(LINES) >= 40
    names = [name for panel in PANELS.values() for name in panel]
    listed = re.findall(r"^  ([a-z]\S+) ", shown, re.MULTILINE)
    assert listed == names
    assert re.findall(r"^(\w+):$", shown, re.MULTILINE) == [*PANELS, "Options"]
    assert "Exit status: 0 done" in shown
    listed = re.findall(r"^  ([a-z]\S+) ", ended("masks", "--help").stdout, re.MULTILINE)
    assert listed == ["apply", "export", "pack", "unpack"]
    assert run("--version") == f"maskopt {maskopt.__version__}\n"
    summary = {name: line for panel in PANELS.values() for name, (_, line) in panel.items()}
    for name, command in COMMANDS.items():
        shown = ended(*name.split(), "--help").stdout
        first = " ".join(inspect.getdoc(command.run).split("\n\n")[0].split())
        assert summary.get(name, first) == first
        assert shown.startswith(f"Usage: maskopt {name} [OPTIONS]")
        assert f"Example: {command.example}" in " ".join(shown.split())
        lines = shown.splitlines()
        assert len(lines) <= 48, (name, len(lines))
        assert max(map(len, lines)) <= 80
        every = ended(*name.split(), "--help-all").stdout
        for one in command.options:
            assert one.argument or flag(one.name) in every
            assert not one.choices or f"[{'|'.join(one.choices)}]" in every


def typed(one):
    """A value of an option that is not its default, and the same as words of the command line."""
    values = {"sparsity": "2:4", "include": ("a", "b"), "exclude": ("c",), "counts": {"a": 1}}
    values |= {"training": {"epochs": 2}, "solver_options": {"moves": 3}, "max_memory": 2**30}
    values |= {"threads": 1, "max_deviation": 0.5, "start": "wanda", "damping": 0.5}
    if one.choices:
        value = next(word for word in one.choices if word != one.default)
    elif isinstance(one.default, bool):
        value = not one.default
    elif isinstance(one.default, int | float):
        value = one.default / 2 + 0.25 if isinstance(one.default, float) else one.default + 1
    else:
        value = values.get(one.name, "other")
    value = values.get(one.name, value)
    if value is True:
        return value, []
    if isinstance(value, dict):
        as_json = json.dumps(value)
        return value, [as_json if one.unit == JSON_FILE else "=".join(map(str, *value.items()))]
    return value, [",".join(value) if isinstance(value, tuple) else str(value)]


@pytest.mark.parametrize(
    ("command", "kind"), [("prune", PruneOptions), ("prune-structured", ShrinkOptions)]
)
def test_command_line_file_manifest_and_python_agree(command, kind, tmp_path):
    """Every option has one name, one set of values and one default in all of them."""
    (file := tmp_path / "run.toml").write_text("")
    usual = tomllib.loads(run(command, "--print-config"))
    known = {one.name: one for one in COMMANDS[command].library}
    assert list(known) == [o.name for o in options_of(kind) if o.name not in kind.absent]
    assert {f.name for f in dataclasses.fields(kind)} == {*known, *kind.absent}
    recorded = kind("0.5" if kind is PruneOptions else 0.0, **CUT[kind]).record()
    for name, one in known.items():
        in_python = inspect.signature(kind).parameters[name].default
        if one.default is not REQUIRED and not isinstance(one.default, dict):
            assert in_python == one.default
        unset = one.default in (None, (), {}) or one.default is REQUIRED or name == TRUST
        assert usual.get(name) == (None if unset else one.default)
        assert (name in recorded) == (one.group in RECORDED)
        value, words = typed(one)
        one.checked(value)  # which Python takes
        text = run(command, flag(name), *words, "--print-config")
        found = tomllib.loads(text).get(name)
        assert found == (
            None if name == TRUST else list(value) if isinstance(value, tuple) else value
        )
        file.write_text(text)
        assert run(command, "--config", file, "--print-config") == text
    # what is not of the library is in the file under the names of the command line, too
    own = {o.name for o in COMMANDS[command].own if not isinstance(o.default, bool)}
    given = {name: f"some {name}" for name in own & {"model", "calibration", "output"}}
    file.write_text("\n".join(f'{name} = "{value}"' for name, value in given.items()))
    assert given.items() <= tomllib.loads(run(command, "--config", file, "--print-config")).items()


def test_defaults_of_other_commands_are_those_of_python():
    for name, kind in (("eval", WalkOptions), ("distill", DistillOptions), ("sweep", PruneOptions)):
        usual = {one.name: one.default for one in options_of(kind)}
        assert all(usual[one.name] == one.default for one in COMMANDS[name].library)
    known = {one.name: one for one in options_of(PruneOptions)}
    for name in ("compare", "bound", "export"):
        found = {one.name: one for one in COMMANDS[name].library}
        assert {"bos", "seq_len", "threads", "include", "exclude", "sparsity"} <= found.keys()
        assert all(known[name].hint == one.hint for name, one in found.items())
        differ = {n: o.default for n, o in found.items() if known[n].default != o.default}
        assert differ == {"samples": 32, "seq_len": 512, "sparsity": None}


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
        ("solvers swap", 1, "error: only prune and sweep run as several processes"),
    ],
)
def test_errors_have_a_status_and_no_traceback(words, status, said, monkeypatch):
    if words == "solvers swap":  # where torchrun started two of them
        monkeypatch.setattr("maskopt.cli.command.several", lambda: True)
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


def in_blocks(page):
    """Lines that call the program, in blocks of code: `$ maskopt …`, or indented."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ |    )(?:torchrun .* -m )?(maskopt .*)$", text, re.MULTILINE)
    parts = [p for line in lines for p in re.split(r" && | \| | > ", line.split("  #")[0])]
    return {part.strip() for part in parts if part.startswith("maskopt ") and "…" not in part}


LINES = sorted({line for page in PAGES for line in in_blocks(page)} | set(EXAMPLES.values()))
COMMAND = typer.main.get_command(app)


@pytest.mark.parametrize("line", LINES)
def test_the_line_is_taken(line):
    name, *arguments = shlex.split(line, comments=True)[1:]
    command = COMMAND.get_command(None, name)
    if name == "masks":
        command, name = command.get_command(None, arguments[0]), arguments.pop(0)
    with command.make_context(name, arguments) as context:
        assert context.args == []  # nothing is left over
        source = {p.name: context.get_parameter_source(p.name).name for p in command.params}
    flags = [word for word in arguments if word.startswith("-") and len(word) > 1]
    known = {flag: p.name for p in command.params for flag in (*p.opts, *p.secondary_opts)}
    assert {source[known[flag]] for flag in flags} <= {"COMMANDLINE"}
