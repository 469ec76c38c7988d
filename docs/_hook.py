"""Tables of options on the reference pages, made from the fields of the classes.

A line `{{ options: maskopt.solvers.search.tabu.Tabu }}` becomes the table of that class.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from maskopt.fields import Option, options_of


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"^\{\{ options: (\S+) \}\}$", lambda m: table(m.group(1)), markdown, flags=re.M)


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
