"""Tables of options on the reference pages, made from the fields of the classes and from the commands.

A line `{{ options: maskopt.solvers.search.tabu.Tabu }}` becomes the table of that class, `{{ commands }}` a
section for every command.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from maskopt.core.fields import Option, options_of


def on_page_markdown(markdown: str, **_: Any) -> str:
    markdown = re.sub(r"^\{\{ commands \}\}$", lambda _: commands(), markdown, flags=re.M)
    return re.sub(r"^\{\{ options: (\S+) \}\}$", lambda m: table(m.group(1)), markdown, flags=re.M)


def commands() -> str:
    """Every command: what it does, an example, and a line an option."""
    import typer

    from maskopt.cli import app
    from maskopt.cli.examples import EXAMPLES

    known: Any = typer.main.get_command(app)
    found = {}
    for name, command in known.commands.items():
        parts = getattr(command, "commands", {"": command})
        found.update({f"{name} {last}".strip(): part for last, part in parts.items()})
    return "\n".join(_command(name, command, EXAMPLES[name]) for name, command in found.items())


def _command(name: str, command: Any, example: str) -> str:
    lines = [f"## {name}", "", *_plain(command.help).split("\n"), "", f"    $ {example}", ""]
    lines += ["| argument or option | default | meaning |", "|---|---|---|"]
    for one in command.params:
        names = (
            one.name.upper()
            if one.param_type_name == "argument"
            else ", ".join([*one.opts, *one.secondary_opts])
        )
        nothing = one.required or one.default is None or one.default is False or one.default == ()
        default = "" if nothing else f"`{one.default}`"
        meaning = _plain(getattr(one, "help", None) or "")
        cells = (f"`{names}`", default, meaning.replace("\n", " "))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _plain(text: str) -> str:
    """Of a help text, what Markdown would take for a tag or a link."""
    return re.sub(r"([<>\[\]*_])", r"\\\1", text or "")


def table(path: str) -> str:
    """What the class declares, and one line an option."""
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
