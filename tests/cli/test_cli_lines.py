"""Every command line that the documents show, and every example of a help, is one that the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from commands import ROOT, process

from maskopt.cli import COMMANDS, app, config
from maskopt.cli.examples import EXAMPLES

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: what a file of --config stands for here
GIVEN = {"model": "MODEL", "calibration": "text.txt", "out": "OUT", "sparsity": 0.5}


def shown(page: Path) -> list[str]:
    """Lines that begin with the program, in blocks of code: `$ maskopt …`, or indented."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ |    )(maskopt .*)$", text, re.MULTILINE)
    parts = [p for line in lines for p in re.split(r" && | \| | > ", line.split("  #")[0])]
    return [part for part in parts if part.startswith("maskopt ") and "…" not in part]


LINES = sorted({line.strip() for page in PAGES for line in shown(page)} | set(EXAMPLES.values()))


@pytest.mark.parametrize("line", LINES)
def test_the_line_is_taken(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "read_config", lambda path, parameters: GIVEN)
    words = shlex.split(line, comments=True)
    name, *arguments = words[1:]
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    with command.make_context(name, arguments) as context:
        assert context.args == []  # nothing is left over
        given = {
            parameter.name
            for parameter in command.params
            if context.get_parameter_source(parameter.name).name == "COMMANDLINE"
        }
    flags = [word for word in arguments if word.startswith("-") and len(word) > 1]
    known = {flag: p.name for p in command.params for flag in (*p.opts, *p.secondary_opts)}
    assert {known[flag] for flag in flags} <= given


def test_every_command_has_an_example() -> None:
    assert set(EXAMPLES) == set(COMMANDS)
    assert len(LINES) >= 40


def test_the_help_fits_eighty_columns_and_is_in_panels() -> None:
    ended = process("prune", "--help", columns=80)
    lines = ended.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    panels = [line.split("─")[1].strip() for line in lines if line.startswith("╭")]
    assert panels == [
        "Arguments", "Options", "What is pruned", "How", "Calibration", "Machine", "Output",
    ]  # fmt: skip
    assert "Example: maskopt prune" in ended.stdout


def test_the_help_tells_the_statuses() -> None:
    assert "Exit status: 0 done" in process("--help", columns=120).stdout
