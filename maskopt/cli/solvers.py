"""`maskopt solvers`: the registered backends."""

from __future__ import annotations

from rich.table import Table

from maskopt.cli.console import output
from maskopt.solver import available_solvers


def solvers() -> None:
    """List the solvers, what each can do, and why one is unavailable."""
    table = Table()
    for heading in ("solver", "patterns", "device", "proves", "largest n", "available"):
        table.add_column(heading, no_wrap=heading != "available")
    table.add_column("note")
    for info in available_solvers().values():
        can = info.capabilities
        table.add_row(
            info.name,
            ", ".join(can.patterns),
            ", ".join(can.devices),
            can.proves,
            "any" if can.largest_n is None else str(can.largest_n),
            info.unavailable or "yes",
            can.note,
        )
    output.print(table)
