"""`maskopt solvers`: the registered backends."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from maskopt.cli.console import output
from maskopt.solver import available_solvers


def solvers() -> None:
    """List the solvers, what each can do, and why one is unavailable."""
    table = Table()
    for heading in ("solver", "patterns", "device", "proves", "n up to"):
        table.add_column(heading, no_wrap=True)
    table.add_column("note")
    for info in available_solvers().values():
        can = info.capabilities
        note = can.note if info.available else f"unavailable: {info.unavailable}"
        table.add_row(
            info.name,
            "all" if len(can.patterns) == 2 else can.patterns[0],
            ", ".join(can.devices),
            can.proves,
            "any" if can.largest_n is None else str(can.largest_n),
            escape(note),
        )
    output.print(table)
