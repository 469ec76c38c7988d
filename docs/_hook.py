"""Tables of options on the reference pages, made from the fields of the classes and from the commands.

A line `{{ options: maskopt.solvers.search.tabu.Tabu }}` becomes the table of that class, `{{ commands }}` a
section for every command.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from maskopt.core.fields import Option, options_of


def on_page_markdown(markdown: str, **_: Any) -> str:
    markdown = re.sub(r"^\{\{ commands \}\}$", lambda _: _commands(), markdown, flags=re.M)
    return re.sub(r"^\{\{ options: (\S+) \}\}$", lambda m: table(m.group(1)), markdown, flags=re.M)


def _commands() -> str:
    """Every command: what it does, an example, and a line an option."""
    from maskopt.cli import all_commands

    return "\n".join(map(_command, all_commands().values()))


def _command(command: Any) -> str:
    from maskopt.cli.command import described, left

    lines = [f"## {command.name}", "", *_plain(inspect.getdoc(command.run)).split("\n"), ""]
    lines += [f"    $ {command.example}", "", "| argument or option | meaning |", "|---|---|"]
    for one in command.options:
        cells = (f"`{left(one)}`", _plain(described(one)))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _plain(text: str | None) -> str:
    """Of a help text, what Markdown would take for a tag or a link."""
    return re.sub(r"([<>\[\]*_])", r"\\\1", text or "")


def table(path: str) -> str:
    """Return the declaration of a class, and one line an option."""
    module, name = path.rsplit(".", 1)
    kind = getattr(importlib.import_module(module), name)
    options = options_of(kind)
    lines = [*_declared(kind), ""]
    if not options:
        return "\n".join([*lines, "No options.", ""])
    lines += ["| option | default | may be | unit | meaning |", "|---|---|---|---|---|"]
    lines += [_line(option) for option in options]
    return "\n".join([*lines, ""])


def _declared(kind: Any) -> list[str]:
    can = getattr(kind, "capabilities", None)
    if can is None:
        most = "any" if kind.largest_n is None else f"at most {kind.largest_n}"
        return [f"Registered as `{kind.name}`. Inputs: {most}."]
    start = {
        "needed": f"needed; `{can.default_start}` makes it where none is given",
        "optional": "optional; the answer is never worse",
        "ignored": "ignored",
    }[can.start]
    patterns = "unstructured and N:M" if len(can.patterns) == 2 else can.patterns[0]
    most = "any" if can.largest_n is None else f"at most {can.largest_n}"
    return [
        f"Registered as `{kind.name}`. Patterns: {patterns}. Devices: {', '.join(can.devices)}. "
        f"Inputs: {most}. Proves: {can.proves}. Start: {start}."
    ]


def _line(option: Option) -> str:
    may = f"{option.type} {option.range}".strip()
    cells = (f"`{option.name}`", f"`{option.default}`", may, option.unit, option.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
